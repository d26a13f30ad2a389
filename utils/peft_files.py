"""PEFT's LoRA directories (adapter_config.json beside adapter_model.safetensors), read into an Adapter and written.

PEFT adds (alpha / r) B A to a weight, mlx-lm scale * (lora_a lora_b)^T: A = lora_a^T, B = lora_b^T, alpha = scale r
(LoRA, arXiv 2106.09685; with use_rslora alpha / sqrt(r), 2312.03732; DoRA's magnitudes, 2402.09353, are m). Everything
else that a PEFT configuration can ask for is refused by its name: an option not known here passes only where it is off.
"""

import json
import math
import re

import mlx.core as mx

from mlx_grpo import UserError
from mlx_grpo.adapter_files import Adapter, by_layer, finite_number
from mlx_grpo.checked_load import check_safetensors, read_json

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
PREFIX = "base_model.model."
LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
OF_LAYER = r"model\.layers\.\d+\."
DENSE, ATTENTION = OF_LAYER + r"(self_attn|mlp)\.\w+|lm_head", OF_LAYER + r"self_attn\.\w+|lm_head"

# model_type -> the modules (a regular expression) to which mlx-lm and transformers give the same name for the same
# weight; the tests compare the logits of each. Experts and routers are packed and named otherwise, and left out.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "stablelm")
SAME_NAMES = dict.fromkeys(FAMILIES, DENSE) | dict.fromkeys(("mixtral", "qwen3_moe"), ATTENTION)

UNDERSTOOD = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
              "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
              "peft_type", "task_type", "bias"}
WITHOUT_EFFECT = {  # on what a loaded adapter computes
    "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version", "runtime_config",
    "megatron_core", "eva_config", "qalora_group_size", "ensure_weight_tying"}
MERGE = "merge it with PEFT and convert the model"
REASONS = {
    "modules_to_save": f"whole layers were trained too, which an mlx-lm adapter can't hold; {MERGE}",
    "bias": f"biases were trained too, which an mlx-lm adapter can't hold; {MERGE}",
    "lora_bias": f"its LoRA layers have biases, which mlx-lm's don't; {MERGE}",
    "fan_in_fan_out": "its base stores weights transposed (Conv1D), and mlx-lm's linear layers don't",
    "target_parameters": "it adapts bare parameters (experts), which mlx-lm packs differently",
    "layer_replication": "it repeats layers of the base, which mlx-lm doesn't build",
    "trainable_token_indices": "embedding rows were trained too, which an mlx-lm adapter can't hold",
    "alora_invocation_tokens": "it acts only after certain tokens, and mlx-lm's adapters always act",
    "init_lora_weights": "that changed the base weights when training began; convert it to plain LoRA with PEFT "
                         "(save_pretrained with path_initial_model_for_weight_conversion)",
}


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


def read_peft_config(directory):
    """adapter_config.json of a LoRA; UserError for each option that mlx-lm couldn't honour."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG}; it isn't an adapter directory")
    config = read_json(path)
    if "peft_type" not in config:
        raise UserError(f"{path} has no peft_type; it isn't PEFT's (mlx-lm's own need no from-peft)")
    if config["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type {config['peft_type']!r}; mlx-lm has LoRA and DoRA only")
    others = set(config) - UNDERSTOOD - WITHOUT_EFFECT
    refused = {name for name in others if config[name] not in (None, False, [], {}, "")}
    if config.get("bias", "none") != "none":
        refused.add("bias")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva", "orthogonal"):
        refused.add("init_lora_weights")
    for name in sorted(refused):
        reason = REASONS.get(name, "mlx-lm has nothing that computes it")
        raise UserError(f"{path}: {name} is {json.dumps(config[name])}: {reason}")
    check_peft_types(config, path)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{path}: task_type {config['task_type']!r} isn't a language model (CAUSAL_LM)")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise UserError(f"{path}: r must be a whole number from 1, got {config.get('r')!r}")
    for name in ("lora_alpha", "lora_dropout"):
        if not finite_number(config.setdefault(name, {"lora_alpha": 8, "lora_dropout": 0.0}[name])):
            raise UserError(f"{path}: {name} must be a number, got {config[name]!r}")
    return config


def check_peft_types(config, path):
    """Raises UserError where an option that says which modules are adapted, and how, has an unexpected type."""
    strings = lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)
    whole = lambda value: type(value) is int or isinstance(value, list) and all(type(v) is int for v in value)
    text = lambda value: isinstance(value, str) or strings(value)
    table, switch = lambda value: isinstance(value, dict), lambda value: isinstance(value, bool)
    for names, fits, what in ((("target_modules", "exclude_modules", "layers_pattern"), text, "a name or names"),
                              (("layers_to_transform",), whole, "a layer's number or numbers"),
                              (("rank_pattern", "alpha_pattern"), table, "an object"),
                              (("use_dora", "use_rslora"), switch, "true or false")):
        for name in names:
            if config.get(name) is not None and not fits(config[name]):
                raise UserError(f"{path}: {name} must be {what}, got {json.dumps(config[name])}")
    if not config.get("target_modules"):
        raise UserError(f"{path}: target_modules is empty, so PEFT adapts nothing")


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


def is_target(name, config, directory):
    """Whether PEFT adapts the module `name` under target_modules, exclude_modules and layers_to_transform
    (peft.tuners.tuners_utils.check_target_module_exists)."""
    matches = lambda spec: matched(spec, name, directory) if isinstance(spec, str) else \
        name in spec or any(name.endswith(f".{ending}") for ending in spec)
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if config.get("exclude_modules") and matches(config["exclude_modules"]):
        return False
    if targets == "all-linear":
        return name != "lm_head"
    if isinstance(targets, str) or name in targets:
        return bool(matches(targets))
    if not matches(targets) or layers in (None, []):
        return matches(targets)
    patterns = config.get("layers_pattern") or "[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = matched(rf"(?:|.*?\.){pattern}\.(?P<layer>\d+)\..*", name, directory)
        if match:
            return int(match["layer"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def matched(pattern, name, directory):
    """The match of a configuration's regular expression with a whole name, or None. UserError for a broken one."""
    try:
        return re.fullmatch(pattern, name)
    except re.error as error:
        raise UserError(f"{directory / CONFIG}: {pattern!r} isn't a regular expression: {error}") from error


def rank_and_scale(name, config, directory):
    """(r, what B A is multiplied by) of a module: rank_pattern and alpha_pattern, whose keys are ends of names or
    regular expressions, before r and lora_alpha."""
    def own(patterns, default):
        found = (value for key, value in (patterns or {}).items() if matched(rf"(.*\.)?({key})", name, directory))
        return next(found, default)

    rank, alpha = own(config.get("rank_pattern"), config["r"]), own(config.get("alpha_pattern"), config["lora_alpha"])
    if type(rank) is not int or rank < 1 or not finite_number(alpha):
        raise UserError(f"{directory / CONFIG}: {name} has rank {rank!r} and alpha {alpha!r}")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


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
