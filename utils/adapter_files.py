"""LoRA and DoRA adapters as mlx-lm keeps them: adapters.safetensors beside adapter_config.json.

mlx-lm itself decides which modules an adapter reaches (num_layers and keys) and whether its tensors fit: `load_onto`
puts the adapter on a base model and reads it back from there."""

import json
import math
import re
from dataclasses import dataclass

import mlx.core as mx

from mlx_grpo import UserError
from mlx_grpo.checked_load import check_safetensors, read_json

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
LEAVES = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
LORA_PARAMETERS = {"rank", "scale", "dropout", "keys"}
IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Adapter:
    """An adapter in mlx-lm's orientation. kind is "lora" or "dora"; modules: {module name: {"lora_a": (in, rank),
    "lora_b": (rank, out), with DoRA "m": (out,)}}; each adds scale * x @ lora_a @ lora_b before DoRA's norm."""
    kind: str
    rank: int
    scale: float
    dropout: float
    modules: dict


def read_mlx_config(directory):
    """adapter_config.json as mlx-lm reads it, checked. Raises UserError for what mlx-lm would trip over or ignore."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} has no {CONFIG}; it isn't an adapter directory")
    config = read_json(path)
    if "peft_type" in config:
        raise UserError(f"{directory} is a PEFT adapter; bring it over with from-peft first")
    kind = config.setdefault("fine_tune_type", "lora")
    if kind == "full":
        return config
    if kind not in LEAVES:
        raise UserError(f"{path}: fine_tune_type {kind!r}; mlx-lm knows lora, dora and full")
    if type(config.get("num_layers")) is not int:
        raise UserError(f"{path}: num_layers must be a whole number, got {config.get('num_layers')!r}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise UserError(f"{path}: lora_parameters (rank, scale, dropout) is missing")
    for name in sorted(set(parameters) - LORA_PARAMETERS):
        raise UserError(f"{path}: lora_parameters has {name!r}, which mlx-lm ignores; it knows "
                        + ", ".join(sorted(LORA_PARAMETERS)))
    if type(parameters.get("rank")) is not int or parameters["rank"] < 1:
        raise UserError(f"{path}: rank must be a whole number from 1, got {parameters.get('rank')!r}")
    for name in ("scale", "dropout"):
        if not finite_number(parameters.get(name)):
            raise UserError(f"{path}: {name} must be a number, got {parameters.get(name)!r}")
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise UserError(f"{path}: keys must be a list of module names, got {keys!r}")
    return config


def finite_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def load_onto(model, directory):
    """Put the adapter of `directory` on the base `model` (changed in place, in evaluation mode). Returns (config,
    {name: adapted module}, [names of modules that the configuration selects and the file has nothing for]); those last
    are bare again. Raises UserError where the adapter doesn't fit the model."""
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.utils import load_adapters
    config = read_mlx_config(directory)
    if not (directory / WEIGHTS).is_file():
        raise UserError(f"{directory} has no {WEIGHTS}")
    stored = check_safetensors(directory / WEIGHTS)
    try:
        load_adapters(model, str(directory))
    except ValueError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{directory} doesn't fit this base model: {reason}") from error
    for name, array in mx.load(str(directory / WEIGHTS)).items():
        if not mx.isfinite(array).all().item():
            raise UserError(f"{directory / WEIGHTS}: {name} holds NaN or infinity; the run that wrote it diverged: take an "
                            "earlier checkpoint")
    model.eval()                    # new layers begin in training mode, with dropout
    if config["fine_tune_type"] == "full":
        return config, {}, []
    adapted, bare = {}, {}
    for name, module in model.named_modules():
        if "lora_a" not in module:
            continue
        lost = [leaf for leaf in LEAVES[config["fine_tune_type"]] if f"{name}.{leaf}" not in stored]
        if not lost:
            adapted[name] = module
        elif any(f"{name}.{leaf}" in stored for leaf in ("lora_a", "lora_b", "m")):
            raise UserError(f"{directory / WEIGHTS}: {name} has no {' and no '.join(lost)}; the file is incomplete")
        else:                       # lora_b is zero, so it changes nothing
            bare[name] = base_of(module)
    if not adapted:
        raise UserError(f"{directory / WEIGHTS} holds no adapter weights")
    model.update_modules(tree_unflatten(list(bare.items())))
    return config, adapted, sorted(bare)


def base_of(module):
    """The module under an adapted one."""
    return module["linear"] if "linear" in module else module["embedding"]


def read_mlx(model, directory):
    """(Adapter, [selected modules without weights]) of an mlx-lm adapter directory for `model`, which gets it on.
    Raises UserError by the module's name where that isn't a linear layer, as PEFT computes something else there."""
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear
    if read_mlx_config(directory)["fine_tune_type"] == "full":
        raise UserError(f"{directory}: fine_tune_type full holds whole weights, not LoRA; fuse it and use the model")
    config, adapted, bare = load_onto(model, directory)
    kind, parameters = config["fine_tune_type"], config["lora_parameters"]
    for name, module in adapted.items():
        if not isinstance(module, (LoRALinear, DoRALinear)):
            raise UserError(f"{name} is a {type(module).__name__}: PEFT's LoRA has no counterpart that computes the "
                            "same (experts are laid out otherwise, and an adapted embedding acts on a tied head here "
                            "and not there); train without it, or fuse")
    modules = {name: {leaf: module[leaf] for leaf in LEAVES[kind]} for name, module in adapted.items()}
    return Adapter(kind, parameters["rank"], parameters["scale"], parameters["dropout"], modules), bare


def write_mlx(adapter, directory, base_name, num_layers):
    """Write `adapter` for a base with `num_layers` blocks as mlx-lm's trainer does."""
    count, keys = reach(adapter.modules, num_layers)
    parameters = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": keys}
    config = {"fine_tune_type": adapter.kind, "model": base_name, "num_layers": count, "lora_parameters": parameters}
    arrays = {f"{name}.{leaf}": array
              for name, leaves in sorted(adapter.modules.items()) for leaf, array in leaves.items()}
    mx.save_safetensors(str(directory / WEIGHTS), arrays, metadata={"format": "mlx"})
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def reach(names, num_layers):
    """(num_layers, keys) with which mlx-lm adapts exactly the modules `names`: short keys in the last n blocks, where
    they are the same in each, else full names (mlx-lm matches those in the whole model, whatever num_layers says)."""
    layers, others = by_layer(names)
    last = list(range(num_layers - len(layers), num_layers))
    if layers and sorted(layers) == last and len({frozenset(inner) for inner in layers.values()}) == 1:
        return len(layers), sorted(layers[last[0]]) + sorted(others)
    return num_layers, sorted(names)


def by_layer(names):
    """({block: {names in it}}, {names outside the blocks}): "model.layers.3.mlp.up_proj" is {3: {"mlp.up_proj"}}."""
    layers, others = {}, set()
    for name in names:
        match = IN_LAYER.fullmatch(name)
        if match:
            layers.setdefault(int(match[1]), set()).add(match[2])
        else:
            others.add(name)
    return layers, others
