"""Proof that a converted vision-language model computes what its source does: logits on short texts and on an image."""

import mlx.core as mx
import numpy as np

from mlx_grpo import UserError, model_check
from mlx_grpo.vision_config import text_settings
from mlx_grpo.vision_engine import make_inputs, user_message

MIXED = "What is in this image?"


def check_inputs(config, tokenizer, processor):
    """A list of model inputs (see make_inputs): model_check's texts and random ids, and a question about an image."""
    from PIL import Image
    settings = text_settings(config)
    rows = [{"input_ids": mx.array([ids])} for ids in model_check.check_sequences(tokenizer, settings["vocab_size"])]
    noise = np.random.default_rng(0).integers(0, 256, (60, 84, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((168, 120))
    return rows + [make_inputs(config["model_type"], processor, [user_message(MIXED, ["noise"])], [image])]


def mlx_logits(model, inputs):
    """Logits (L, V) of each input by mlx-vlm, computed in float32 unless the weights are quantised."""
    results = []
    for one in inputs:
        named = ("input_ids", "pixel_values", "attention_mask")
        others = {key: value for key, value in one.items() if key not in named}
        features = model.get_input_embeddings(one["input_ids"], one.get("pixel_values"), **others).to_dict()
        logits = model.language_model(one["input_ids"], **{k: v for k, v in features.items() if v is not None}).logits
        results.append(np.array(logits[0].astype(mx.float32)))
    return results


def torch_logits(path, config, inputs, dtype):
    """Logits (L, V) of each input by transformers, in float32, of weights rounded to `dtype` first."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--verify compares with transformers and needs torch: pip install torch") from error
    import transformers
    try:
        model, keys = transformers.AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    except (ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--verify: transformers can't open {path}: {reason}; convert without --verify") from error
    if keys["missing_keys"]:
        raise UserError(f"--verify: transformers finds no weights for {sorted(keys['missing_keys'])[0]} in {path}, "
                        "so it can't be the measure; convert without --verify")
    model.eval()
    results = []
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(getattr(torch, dtype)))
        for one in inputs:
            tensors = {key: torch.tensor(np.array(value)) for key, value in one.items() if key != "attention_mask"}
            tensors["mm_token_type_ids"] = (tensors["input_ids"] == config["image_token_id"]).int()    # 1: of an image
            results.append(model(**tensors).logits[0].float().numpy())
    return results


def compare(ours, theirs, inputs, quantized):
    """model_check's comparison of floats, or of distributions where one side is quantised."""
    if not quantized:
        return model_check.compare_logits(ours, theirs)
    return model_check.compare_distributions(ours, theirs, [one["input_ids"][0].tolist() for one in inputs])
