"""PEFT's adapter_config.json of a LoRA: which modules it adapts, with which rank and strength.

Everything else that such a configuration can ask for is refused by its name, as an mlx-lm adapter couldn't honour it:
an option not known here passes only where it is off."""

import json
import math
import re

from mlx_grpo import UserError
from mlx_grpo.adapter_files import finite_number
from mlx_grpo.checked_load import read_json

CONFIG = "adapter_config.json"
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
    regular expressions, before r and lora_alpha. The factor is alpha / r, with use_rslora alpha / sqrt(r) (arXiv
    2312.03732)."""
    def own(patterns, default):
        found = (value for key, value in (patterns or {}).items() if matched(rf"(.*\.)?({key})", name, directory))
        return next(found, default)

    rank, alpha = own(config.get("rank_pattern"), config["r"]), own(config.get("alpha_pattern"), config["lora_alpha"])
    if type(rank) is not int or rank < 1 or not finite_number(alpha):
        raise UserError(f"{directory / CONFIG}: {name} has rank {rank!r} and alpha {alpha!r}")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
