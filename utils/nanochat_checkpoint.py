"""
nanochat's checkpoints: which generation one is, its constants, and what MLX calls its parameters.

The constants of a generation (rotary base, windows, scales, softcap) stand in nanochat's code only, never in a file, so
a checkpoint is classified by the names and shapes of its tensors, and `architecture` writes the resolved numbers down.
"""

import json
import math
import re
from dataclasses import dataclass

from mlx_grpo import UserError
from mlx_grpo.nanochat_model import MODEL_TYPE

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
EXPERIMENTS = ("bigram_embed.", "bigram_lambdas", "v0_lambdas", "value_embed_A.", "value_embed_B.",
               "value_embed.weight")
NORM_EPS = 2.0 ** -23                                # torch's default, for every dtype nanochat runs in


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def ceil128(n):
    return math.ceil(n / 128) * 128


@dataclass(frozen=True)
class Generation:
    """What nanochat's code fixed in a stretch of its history (first commit in the comment)."""
    number: int
    short_window: object            # sequence_len -> the window of an S layer
    residual_lambdas: bool = True
    gate_channels: int = 0          # 0: no value embeddings
    gate_scale: float = 0.0
    rope_theta: float = 10000.0
    qk_scale: float = 1.0
    logit_softcap: float = 15.0
    smear_channels: int = 0
    backout: bool = False


GENERATIONS = {g.number: g for g in (
    Generation(1, None, residual_lambdas=False),                                              # 2025-10-13 3a5e0bc
    Generation(2, lambda n: n // 2),                                                          # 2026-01-11 aa530cd
    Generation(3, lambda n: n // 2, gate_channels=32, gate_scale=2.0),                        # 2026-01-16 e85db6b
    Generation(4, lambda n: ceil128(math.ceil(n / 3)), gate_channels=12, gate_scale=3.0,      # 2026-03-09 6ed7d1d
               rope_theta=100000.0, qk_scale=1.15),
    Generation(5, lambda n: ceil128(math.ceil(n / 4)), gate_channels=12, gate_scale=3.0,      # 2026-03-14 a825e63
               rope_theta=100000.0, qk_scale=1.2, smear_channels=24, backout=True),
)}


# ---- meta ------------------------------------------------------------------------------------------------------------

def read_meta(path):
    """The meta file as a dict whose model_config is checked. Raises UserError."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from error
    config = meta.get("model_config") if isinstance(meta, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{path}: no model_config in it; that is not a nanochat meta file")
    unknown = sorted(set(config) - {*SIZES, "window_pattern"})
    if unknown:
        raise UserError(f"{path}: unknown model_config entry {unknown[0]!a}: a nanochat newer than this converter?")
    for name in SIZES:
        if type(config.get(name)) is not int or not 0 < config[name] < 1 << 31:
            raise UserError(f"{path}: model_config.{name} is {config.get(name)!a}, expected a positive whole number")
    if config["n_embd"] % (2 * config["n_head"]) or config["n_head"] % config["n_kv_head"]:
        raise UserError(f"{path}: n_embd {config['n_embd']}, n_head {config['n_head']} and n_kv_head "
                        f"{config['n_kv_head']} don't divide into heads of even width")
    pattern = config.get("window_pattern", "L")
    if type(pattern) is not str or not re.fullmatch("[SLsl]+", pattern):
        raise UserError(f"{path}: window_pattern {pattern!a}, expected letters S (short) and L (long)")
    return meta


# ---- architecture ----------------------------------------------------------------------------------------------------

def classify(tensors, source):
    """The Generation of a checkpoint, from its names and shapes."""
    for name in tensors:
        if name.startswith(EXPERIMENTS):
            raise UserError(f"{source}: the parameter {name} belongs to one of nanochat's one-day experiments, which "
                            "aren't supported; use a checkpoint from before or after it")
    gates = {tensor.shape[-1:] for name, tensor in tensors.items() if name.endswith(".attn.ve_gate.weight")}
    if "smear_gate.weight" in tensors:
        return GENERATIONS[5]
    if gates:
        return GENERATIONS[3 if gates == {(32,)} else 4]
    return GENERATIONS[2 if "resid_lambdas" in tensors else 1]


def value_embed_layers(generation, sizes):
    """Every other layer, the last one among them."""
    n = sizes["n_layer"]
    return [i for i in range(n) if generation.gate_channels and i % 2 == (n - 1) % 2]


def expected_shapes(generation, sizes, rows):
    """nanochat's parameter name -> shape, with `rows` rows (the padded vocabulary) in embeddings and head."""
    width = sizes["n_embd"]
    kv_width = sizes["n_kv_head"] * width // sizes["n_head"]
    shapes = {"transformer.wte.weight": (rows, width), "lm_head.weight": (rows, width)}
    for i in range(sizes["n_layer"]):
        block = f"transformer.h.{i}."
        shapes |= {block + "attn.c_q.weight": (width, width), block + "attn.c_k.weight": (kv_width, width),
                   block + "attn.c_v.weight": (kv_width, width), block + "attn.c_proj.weight": (width, width),
                   block + "mlp.c_fc.weight": (4 * width, width), block + "mlp.c_proj.weight": (width, 4 * width)}
    if generation.residual_lambdas:
        shapes |= {"resid_lambdas": (sizes["n_layer"],), "x0_lambdas": (sizes["n_layer"],)}
    for i in value_embed_layers(generation, sizes):
        shapes[f"value_embeds.{i}.weight"] = (rows, kv_width)
        shapes[f"transformer.h.{i}.attn.ve_gate.weight"] = (sizes["n_kv_head"], generation.gate_channels)
    if generation.smear_channels:
        shapes |= {"smear_gate.weight": (1, generation.smear_channels), "smear_lambda": (1,)}
    if generation.backout:
        shapes["backout_lambda"] = (1,)
    return shapes


def check_parameters(tensors, generation, sizes, source):
    """The number of rows of the padded vocabulary. Raises UserError naming every difference between the checkpoint and
    its generation: nothing is loaded leniently, since a missing part gives wrong logits without an error."""
    head = tensors.get("transformer.wte.weight")
    rows = head.shape[0] if head is not None and len(head.shape) == 2 else sizes["vocab_size"]
    if rows < sizes["vocab_size"]:
        raise UserError(f"{source}: {rows} embeddings for a vocabulary of {sizes['vocab_size']}: model and meta don't "
                        "belong together")
    if sizes["n_layer"] > len(tensors):
        raise UserError(f"{source}: {len(tensors)} parameters for {sizes['n_layer']} layers: model and meta don't "
                        "belong together")
    expected = expected_shapes(generation, sizes, rows)
    faults = [("missing", sorted(expected.keys() - tensors.keys())),
              ("unknown", sorted(tensors.keys() - expected.keys())),
              ("of another shape", [f"{name} {tensors[name].shape}, not {shape}" for name, shape in expected.items()
                                    if name in tensors and tensors[name].shape != shape])]
    found = [f"{len(names)} {kind} ({', '.join(ascii(name)[1:-1] for name in names[:3])}{', ...' * (len(names) > 3)})"
             for kind, names in faults if names]
    if found:
        raise UserError(f"{source}: looks like nanochat's generation {generation.number}, but its parameters aren't: "
                        f"{'; '.join(found)}")
    return rows


def strip_prefix(tensors, source):
    """The names without `_orig_mod.`, which torch.compile puts in front."""
    stripped = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        raise UserError(f"{source}: has parameters both with and without the prefix _orig_mod.")
    return stripped


def attention_windows(generation, model_config):
    """Per layer the number of past tokens a query sees, None for all; the last layer is long whatever the pattern."""
    n, length = model_config["n_layer"], model_config["sequence_len"]
    pattern = model_config.get("window_pattern", "L").upper()     # a missing pattern is nanochat's "L", not its default
    if generation.short_window is None:
        if "S" in pattern:
            raise UserError(f"window_pattern {pattern} in a checkpoint of generation {generation.number}, which has no "
                            "windows: model and meta don't belong together")
        return [None] * n
    letters = [pattern[i % len(pattern)] for i in range(n - 1)] + ["L"]
    return [generation.short_window(length) if letter == "S" else length for letter in letters]


def architecture(generation, model_config, logit_softcap=None):
    """The fields of nanochat_model.ModelArgs: every constant of the generation resolved for this model."""
    n = model_config["n_layer"]
    return {
        "model_type": MODEL_TYPE, "hidden_size": model_config["n_embd"], "num_hidden_layers": n,
        "num_attention_heads": model_config["n_head"], "num_key_value_heads": model_config["n_kv_head"],
        "vocab_size": model_config["vocab_size"], "max_position_embeddings": model_config["sequence_len"],
        "intermediate_size": 4 * model_config["n_embd"], "rope_theta": generation.rope_theta, "norm_eps": NORM_EPS,
        "qk_scale": generation.qk_scale, "logit_softcap": logit_softcap or generation.logit_softcap,
        "attention_windows": attention_windows(generation, model_config),
        "residual_lambdas": generation.residual_lambdas,
        "value_embed_layers": value_embed_layers(generation, model_config),
        "value_gate_channels": generation.gate_channels, "value_gate_scale": generation.gate_scale,
        "smear_channels": generation.smear_channels, "backout_layer": n // 2 if generation.backout else None,
    }


def mlx_name(name):
    """What the MLX model calls nanochat's parameter: value_embeds.3.weight is transformer.h.3.value_embed.weight (MLX
    takes a number in a name for a place in a list); what stands beside the transformer, but for the head, is in it."""
    name = re.sub(r"^value_embeds\.(\d+)\.", r"transformer.h.\1.value_embed.", name)
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def nanochat_name(name):
    """The inverse of mlx_name."""
    name = re.sub(r"^transformer\.h\.(\d+)\.value_embed\.", r"value_embeds.\1.", name)
    return name if name.startswith(("transformer.h.", "transformer.wte.")) else name.removeprefix("transformer.")


def has_vocabulary_rows(name):
    """Whether a parameter (nanochat's name) has a row per token, padding rows among them."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")
