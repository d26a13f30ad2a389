"""Tiny random vision-language models, made on the spot as transformers (Qwen) or the hub (DeepSeek-OCR) has them."""

import json

import mlx.core as mx
import numpy as np
from conftest import require

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]
TEMPLATE = (    # Qwen's: an image is a place for its tokens between two marks
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT = dict(vocab_size=263, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=2, pad_token_id=0)
ROPE = dict(rope_type="default", rope_theta=33333.0, mrope_section=[2, 3, 3])     # no architecture's default
TOWER = dict(depth=3, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)
QWEN = {    # family: (text settings, vision settings)
    "qwen2_vl": (dict(rope_parameters=ROPE), dict(embed_dim=64, hidden_size=64, mlp_ratio=2)),
    "qwen2_5_vl": (dict(rope_parameters=ROPE), dict(hidden_size=64, intermediate_size=96, out_hidden_size=64,
                   window_size=32, fullatt_block_indexes=[1])),
    "qwen3_vl": (dict(head_dim=16, rope_parameters=ROPE | dict(mrope_interleaved=True)),
                 dict(hidden_size=64, intermediate_size=96, out_hidden_size=64, num_position_embeddings=64,
                      deepstack_visual_indexes=[0, 1])),
}
DEEPSEEK_TEXT = dict(first_k_dense_replace=1, hidden_size=64, intermediate_size=96, kv_lora_rank=None, lm_head=True,
                     max_position_embeddings=2048, moe_intermediate_size=64, n_group=1, n_routed_experts=4,
                     n_shared_experts=2, num_attention_heads=4, num_experts_per_tok=2, num_hidden_layers=2,
                     num_key_value_heads=4, q_lora_rank=None, qk_nope_head_dim=0, qk_rope_head_dim=0, topk_group=1,
                     topk_method="greedy", use_mla=False, v_head_dim=0, vocab_size=300)


def save_vision_tokenizer(directory, specials=SPECIALS, template=TEMPLATE):
    """A byte-level tokenizer without merges: the specials, then all 256 bytes."""
    tokenizers, transformers = require("tokenizers"), require("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=specials[0], eos_token=specials[2], pad_token=specials[0],
        additional_special_tokens=specials[1:])
    fast.chat_template = template
    fast.save_pretrained(directory)


def save_qwen(directory, family, seed=0, **changes):
    """Save a random float32 model as transformers 5 writes it (nested config); returns its torch model."""
    torch, transformers = require("torch"), require("transformers")
    text, tower = QWEN[family]
    config = transformers.CONFIG_MAPPING[family](
        text_config=TEXT | text, vision_config=TOWER | tower, image_token_id=5, video_token_id=6,
        vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=False, **changes)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.1)
            elif weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(directory)
    save_vision_tokenizer(directory)
    kind = "Qwen2VLImageProcessor" if family != "qwen3_vl" else "Qwen2VLImageProcessorFast"
    preprocessor = dict(image_processor_type=kind, patch_size=8, temporal_patch_size=2, merge_size=2,
                        size=dict(shortest_edge=256, longest_edge=16384), image_mean=[0.5, 0.4, 0.3],
                        image_std=[0.5, 0.6, 0.7])
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


def flatten_config(directory):
    """Turn a Qwen2-VL's nested config.json into the hub's flat one, with the settings' old names."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "rope_parameters"):
        del config["vision_config"][name]
    flat = {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    flat |= dict(rope_theta=rope["rope_theta"], rope_scaling=dict(type="mrope", mrope_section=rope["mrope_section"]))
    path.write_text(json.dumps(flat | config))


def small_deepseek_tower(monkeypatch):
    """Make mlx-vlm's SAM tower small: its size is fixed in the code, whatever config.json says."""
    deepseekocr = require("mlx_vlm.models.deepseekocr.deepseekocr")
    from mlx_vlm.models.deepseekocr.config import SAMViTConfig
    monkeypatch.setattr(deepseekocr, "SAMViTConfig", lambda: SAMViTConfig(width=16, layers=2, heads=1,
                                                                          global_attn_indexes=(1,)))


def save_deepseek(directory, seed=0):
    """Save a random model as the hub has DeepSeek-OCR: its config's names, torch's layouts, separate experts. The small
    tower (see small_deepseek_tower) has to be in place."""
    deepseekocr = require("mlx_vlm.models.deepseekocr")
    from mlx.utils import tree_flatten, tree_map
    directory.mkdir(parents=True, exist_ok=True)
    specials = ["<bos>", "<x>", "<eos>", "<｜▁pad▁｜>", "<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>",
                "<|grounding|>", "<|User|>", "<|Assistant|>"]
    save_vision_tokenizer(directory, specials, None)
    config = dict(architectures=["DeepseekOCRForCausalLM"], model_type="deepseek_vl_v2", tile_tag="2D",
                  global_view_pos="head", language_config=DEEPSEEK_TEXT, eos_token_id=2,
                  projector_config=dict(input_dim=2048, n_embed=64, projector_type="linear"),
                  vision_config=dict(model_type="vision", layers=1, intermediate_size=32, image_size=1024))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "processor_config.json").write_text(json.dumps(dict(
        candidate_resolutions=[[1024, 1024]], patch_size=16, downsample_ratio=4, image_token="<image>")))
    mx.random.seed(seed)
    model = deepseekocr.Model(deepseekocr.ModelConfig.from_dict(json.loads(json.dumps(config))))
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.parameters()))
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        hub = name.replace("view_separator", "view_seperator").removeprefix("language_model.")
        hub = hub if hub.startswith(("model.", "lm_head")) else f"model.{hub}"
        if value.ndim == 4 and "pos_embed" not in name:             # (O, kH, kW, I) -> torch's (O, I, kH, kW)
            value = value.transpose(0, 3, 1, 2)
        if "switch_mlp" in hub:
            weights |= {hub.replace("switch_mlp", f"experts.{n}"): expert for n, expert in enumerate(value)}
        else:
            weights[hub] = value
    mx.save_safetensors(str(directory / "model-00001-of-000001.safetensors"), weights, {"format": "pt"})


def save_image(path, size=(52, 36), seed=0):
    """A PNG of random blocks, `size` in (width, height). Returns its path."""
    Image = require("PIL.Image")
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)
    return path
