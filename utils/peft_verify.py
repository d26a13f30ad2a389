"""The proof that an adapter computes the same through PEFT in torch as through mlx-lm, on a few short texts."""

from mlx_grpo import UserError
from mlx_grpo.model_check import LOGIT_TOLERANCE, check_sequences, compare_logits, in_float32, mlx_logits
from mlx_grpo.model_files import open_tokenizer

LIMIT = 1e-4        # largest difference of logits, relative to the largest logit (at least 1)


def check_ahead(config, name):
    """Raises UserError where --verify could not compare in the end."""
    if "quantization" in config:
        raise UserError(f"--verify opens the base in transformers, which can't read {name} (quantised by MLX); give "
                        "its float original as --model")
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError("--verify compares with PEFT and needs torch: pip install torch transformers peft") from error


def compare_with_peft(base, model, config, directory):
    """(whether equal, what to say) of the logits of `model`, the base with the adapter on (its weights become float32),
    and of the model directory `base` in transformers with the PEFT directory on, both computing in float32."""
    sequences = check_sequences(open_tokenizer(base, config), config["vocab_size"])
    found = compare_logits(mlx_logits(in_float32(model), sequences), peft_logits(base, directory, sequences))
    limit = found["limit"] / LOGIT_TOLERANCE * LIMIT
    equal = found["max"] <= limit       # NaN isn't
    return equal, (f"logits against PEFT: largest difference {found['max']:.2e}, mean {found['mean']:.2e} (limit "
                   f"{limit:.1e}): {'equal' if equal else 'NOT EQUAL'}")


def peft_logits(base, directory, sequences):
    """Logits (L, V) of each sequence by transformers with the adapter on, in float32."""
    import peft
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float().numpy() for ids in sequences]
