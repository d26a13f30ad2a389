"""PEFT's LoRA directories (adapter_config.json beside adapter_model.safetensors), read into an Adapter and written.

PEFT adds (alpha / r) B A to a weight, mlx-lm scale * (lora_a lora_b)^T: A = lora_a^T, B = lora_b^T, alpha = scale r
(LoRA, arXiv 2106.09685; DoRA's magnitudes, 2402.09353, are m). utils/peft_config.py reads the configuration."""

import json
import re

import mlx.core as mx

from mlx_grpo import UserError
from mlx_grpo.adapter_files import Adapter, by_layer
from mlx_grpo.checked_load import check_safetensors
from mlx_grpo.peft_config import CONFIG, is_target, rank_and_scale, read_peft_config

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
OF_LAYER = r"model\.layers\.\d+\."
DENSE, ATTENTION = OF_LAYER + r"(self_attn|mlp)\.\w+|lm_head", OF_LAYER + r"self_attn\.\w+|lm_head"

# model_type -> the modules (a regular expression) to which mlx-lm and transformers give the same name for the same
# weight; the tests compare the logits of each. Experts and routers are packed and named otherwise, and left out.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "stablelm")
SAME_NAMES = dict.fromkeys(FAMILIES, DENSE) | dict.fromkeys(("mixtral", "qwen3_moe"), ATTENTION)


# ---- reading ---------------------------------------------------------------------------------------------------------

def read_peft(directory, model_type, linears, parameters):
    """(Adapter, notes) of a PEFT LoRA directory for a base of `model_type` with `linears` {module name: (out, in)} and
    `parameters` {name: array}. Ranks and scales that differ between modules are brought to one, see `join`. Raises
    UserError, by name, for what mlx-lm can't hold."""
    config = read_peft_config(directory)
    kind = "dora" if config.get("use_dora") else "lora"
    tensors, copies = without_copies(read_tensors(directory), parameters)
    modules = sort_tensors(tensors, kind, directory)
    adaptable = {name for name in linears if re.fullmatch(SAME_NAMES[model_type], name)}
    for name, leaves in sorted(modules.items()):
        if name not in adaptable:
            what = "is known to be the same in transformers" if name in linears else \
                "has that name (it is packed, renamed or, as a head, tied to the embedding)"
            raise UserError(f"{directory}: adapts {name}, and no linear layer of mlx-lm's {model_type} {what}; it "
                            "can't be brought over")
        check_shapes(name, leaves, linears[name], directory)
    targets = {name for name in adaptable if is_target(name, config, directory)}
    for name in sorted(set(modules) - targets):
        raise UserError(f"{directory}: holds weights for {name}, which its target_modules leave out, so PEFT ignores "
                        "them; correct adapter_config.json or save the adapter again")
    for name in sorted(targets - set(modules)):
        raise UserError(f"{directory}: targets {name} and has no weights for it; the file is incomplete")
    adapter, notes = join(modules, {name: rank_and_scale(name, config, directory) for name in modules}, kind, config)
    return adapter, [f"{name}: the base's own weights, saved along by PEFT" for name in copies] + notes


def read_tensors(directory):
    """{name: array} of adapter_model.safetensors, or of adapter_model.bin without running any code in it."""
    if (directory / WEIGHTS).is_file():
        check_safetensors(directory / WEIGHTS)
        return mx.load(str(directory / WEIGHTS))
    if not (directory / PICKLE).is_file():
        raise UserError(f"{directory} has no {WEIGHTS}")
    import pickle
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{directory / PICKLE} is PyTorch's and needs torch: pip install torch") from error
    try:
        tensors = torch.load(directory / PICKLE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory / PICKLE}: not a plain file of tensors, or damaged: {reason}") from error
    kinds = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
    known = lambda value: isinstance(value, torch.Tensor) and value.dtype in kinds
    if not isinstance(tensors, dict) or not all(known(value) for value in tensors.values()):
        raise UserError(f"{directory / PICKLE}: expected names and tensors of float32, float16 or bfloat16")
    return {name: mx.array(t.float().numpy()).astype(kinds[t.dtype]) for name, t in tensors.items()}


def without_copies(tensors, parameters):
    """(tensors, [names left out]): without those that are the base's own, bit for bit; PEFT saves embedding and head
    along where one of them is adapted."""
    def is_copy(key, array):
        own = parameters.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        return own is not None and own.shape == array.shape and \
            mx.array_equal(own.astype(mx.float32), array.astype(mx.float32)).item()

    copies = sorted(key for key, array in tensors.items() if is_copy(key, array))
    return {key: array for key, array in tensors.items() if key not in copies}, copies


def sort_tensors(tensors, kind, directory):
    """{module name: {"lora_a": (in, r), "lora_b": (r, out), "m": (out,)}} of PEFT's tensors; UserError for any other
    tensor and for a module that lacks one."""
    modules = {}
    for key, array in tensors.items():
        for ending, leaf in LEAVES.items():
            if key.startswith(PREFIX) and key.endswith("." + ending):
                name = key.removeprefix(PREFIX).removesuffix("." + ending)
                modules.setdefault(name, {})[leaf] = array.T
                break
        else:
            what = "LoRA on an embedding, which in mlx-lm acts on a tied head too" if "lora_embedding" in key else \
                "whole weights, other than the base's" if "lora_" not in key else "not one of " + ", ".join(LEAVES)
            raise UserError(f"{directory}: tensor {key!r}: {what}; it can't be brought over")
    wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    for name, leaves in sorted(modules.items()):
        if set(leaves) != wanted:
            raise UserError(f"{directory}: {name} has {', '.join(sorted(leaves))} where {kind} (use_dora in {CONFIG}) "
                            f"needs {', '.join(sorted(wanted))}")
    if not modules:
        raise UserError(f"{directory} holds no adapter weights")
    return modules


def check_shapes(name, leaves, base_shape, directory):
    """Raises UserError where the tensors don't belong to a linear layer of `base_shape` (out, in)."""
    out_size, in_size = base_shape
    rank = leaves["lora_b"].shape[0]
    wanted = {"lora_a": (in_size, rank), "lora_b": (rank, out_size), "m": (out_size,)}
    for leaf, array in leaves.items():
        if array.shape != wanted[leaf]:
            raise UserError(f"{directory}: {name}.{leaf} has shape {list(array.shape)} (in, out), and the base model "
                            f"needs {list(wanted[leaf])}; the adapter belongs to another base")


def join(modules, settings, kind, config):
    """(Adapter, notes) with one rank and one scale, as mlx-lm has them, that computes the same: smaller ranks are
    filled up with zeros (which get no gradient either), and a scale of its own is multiplied into lora_b, in float32.
    """
    for name, leaves in sorted(modules.items()):
        if leaves["lora_b"].shape[0] != settings[name][0]:
            own_rank = leaves["lora_b"].shape[0]
            raise UserError(f"{name} has rank {own_rank} in the weights and {settings[name][0]} in {CONFIG}")
    ranks, scales = [rank for rank, _ in settings.values()], [scale for _, scale in settings.values()]
    rank, scale = max(ranks), max(set(scales), key=lambda s: (s != 0, scales.count(s), s))
    joined, notes = {}, []
    for name, leaves in modules.items():
        own_rank, own_scale = settings[name]
        lora_a, lora_b = leaves["lora_a"], leaves["lora_b"]
        if own_scale != scale:
            lora_b = lora_b.astype(mx.float32) * (own_scale / scale)
        if own_rank != rank:
            lora_a = mx.pad(lora_a, ((0, 0), (0, rank - own_rank)))
            lora_b = mx.pad(lora_b, ((0, rank - own_rank), (0, 0)))
        joined[name] = leaves | {"lora_a": lora_a, "lora_b": lora_b}
    if len(set(ranks)) > 1:
        notes.append(f"ranks {', '.join(map(str, sorted(set(ranks))))} (rank_pattern): filled up to {rank} with zeros")
    if len(set(scales)) > 1:
        notes.append(f"scales (alpha / r) of {sum(s != scale for s in scales)} modules multiplied into lora_b; the "
                     f"common one is {scale:g}")
    return Adapter(kind, rank, scale, config["lora_dropout"], joined), notes


# ---- writing ---------------------------------------------------------------------------------------------------------

def write_peft(adapter, directory, base_name, model_type, linears):
    """Write `adapter` as PEFT's save_pretrained does, for a base of `model_type` with `linears` {module name: (out,
    in)}. Raises UserError for a module whose name in transformers isn't known to be the same."""
    for name in sorted(adapter.modules):
        if not re.fullmatch(SAME_NAMES[model_type], name):
            raise UserError(f"{name}: it isn't known to be the same module in transformers' {model_type}, so PEFT "
                            "couldn't find it; train without it, or fuse")
    targets, layers = targets_of(set(adapter.modules), set(linears))
    alpha = adapter.scale * adapter.rank
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
              "inference_mode": True, "r": adapter.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
              "lora_dropout": adapter.dropout, "target_modules": targets, "layers_to_transform": layers,
              "use_dora": adapter.kind == "dora", "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
              "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True}
    endings = {leaf: ending for ending, leaf in LEAVES.items()}
    arrays = {f"{PREFIX}{name}.{endings[leaf]}": mx.contiguous(array.T)
              for name, leaves in sorted(adapter.modules.items()) for leaf, array in leaves.items()}
    mx.save_safetensors(str(directory / WEIGHTS), arrays, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def targets_of(names, linears):
    """(target_modules, layers_to_transform) with which PEFT adapts exactly `names` of a base's `linears`: ends of names
    where those, in some of the blocks, mean nothing else; full names otherwise."""
    layers, others = by_layer(names)
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    meant = {name for name in linears if name.rsplit(".", 1)[-1] in ends}
    if names == meant:
        return ends, None
    in_layers = {f"model.layers.{layer}.{end}" for layer, inner in by_layer(meant)[0].items() if layer in layers
                 for end in inner}
    return (ends, sorted(layers)) if not others and names == in_layers else (sorted(names), None)
