"""
Opening models: any mlx-lm model directory or hub id, every nanochat generation, checkpoints and adapters of ours, and
what a user's own loader opens. Part of mlx_grpo, which gives all of these names out again.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_grpo import ConfigError, TiktokenTokenizerWrapper, UserError, cast_floats, load_symbol, nearest, shipped_path
from mlx_grpo.checked_load import read_json
from mlx_grpo.cpu_ops import use_light_ops


def resolve_model(name_or_path, trust_remote_code=False):
    """The local directory of a model: itself, the shipped one of that name, or the hub's snapshot of that id, downloaded
    once its config is one that runs and the disk has room. Raises UserError."""
    from mlx_grpo.hub_files import fetch_model

    shipped = shipped_path(name_or_path)           # a Path drops the "./" that tells a directory from a hub id
    return fetch_model(str(shipped if shipped.exists() else name_or_path), trust_remote_code=trust_remote_code)


class BaseModelLoader:
    """How one kind of model directory is opened; subclass it for model_loader = "my_loader.py:MyLoader"."""

    trust_remote_code = False

    def validate_compatibility(self, path, config):
        """Raises UserError where the directory `path` (config: its config.json) is not of this loader's kind or can't
        be trained."""
        from mlx_grpo.model_config import unsupported_reason

        if reason := unsupported_reason(config):
            raise UserError(f"{path}: {reason}")

    def load_model(self, path, config):
        """(model, config) from a directory; names that don't match are told, a layer left at random is refused."""
        from mlx_grpo.checked_load import load_checked

        stored = json.loads((Path(path) / "config.json").read_text())
        changes = {key: value for key, value in config.items() if key not in stored or stored[key] != value}
        model, config, keys = load_checked(path, changes=changes, lazy=True, trust_remote_code=self.trust_remote_code)
        for line in keys.lines():
            print(f"note: {path}: {line}", file=sys.stderr)
        return model, config

    def load_tokenizer(self, path, config):
        """The tokenizer, with mlx-lm's TokenizerWrapper's attributes (encode, decode, apply_chat_template,
        eos_token_ids, detokenizer...)."""
        from mlx_grpo.model_files import open_tokenizer

        return open_tokenizer(path, config, trust_remote_code=self.trust_remote_code)


class NanoChatLoader(BaseModelLoader):
    """nanochat, all generations: mlx-lm's model for the first, ours for the others; tokenizer.pkl through the wrapper."""

    def load_tokenizer(self, path, config):
        if (Path(path) / "tokenizer.pkl").exists():
            return TiktokenTokenizerWrapper.from_directory(path)
        return super().load_tokenizer(path, config)


class CustomModelLoader(BaseModelLoader):
    """A model whose directory brings its own Python file (config.json's model_file); needs trust_remote_code."""

    def validate_compatibility(self, path, config):
        if not config.get("model_file"):
            raise UserError(f'{path}: model_loader = "custom" needs a config.json that names a model_file')
        if not self.trust_remote_code:
            raise UserError(f"{path}: loading would run {config['model_file']} from that directory; "
                            "set trust_remote_code = true if you trust it")


LOADERS = {"mlx_lm": BaseModelLoader, "nanochat": NanoChatLoader, "custom": CustomModelLoader}


def find_loader(path, config, loader="auto"):
    """The loader's class for a model directory: by name from LOADERS, from the user's file, or recognised."""
    if loader == "auto":
        nanochat = (Path(path) / "tokenizer.pkl").exists() or str(config.get("model_type")).startswith("nanochat")
        return NanoChatLoader if nanochat else CustomModelLoader if config.get("model_file") else BaseModelLoader
    if loader in LOADERS:
        return LOADERS[loader]
    if not loader.partition(":")[0].endswith(".py"):
        raise ConfigError(f'model_loader {loader!r} is neither "auto", one of {", ".join(LOADERS)}, nor file.py:Class'
                          + nearest(loader, LOADERS))
    found = load_symbol(loader, "model_loader")
    if not isinstance(found, type):
        raise ConfigError(f"model_loader {loader!r} is {found!r}, not a class; name a subclass of BaseModelLoader")
    return found


def open_directory(path, loader, trust_remote_code):
    """(loader, config.json) of a model directory. Raises UserError."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; give a model's directory, or a checkpoint of a run")
    config = read_json(path / "config.json")
    use_light_ops()
    opener = find_loader(path, config, loader)()
    opener.trust_remote_code = trust_remote_code
    opener.validate_compatibility(path, config)
    return opener, config


def load_tokenizer(name_or_path, *, loader="auto", trust_remote_code=False):
    """The tokenizer that load_model gives, without reading any weights. Raises UserError."""
    path = resolve_model(name_or_path, trust_remote_code)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        return load_tokenizer(base_of(path), loader=loader, trust_remote_code=trust_remote_code)
    opener, config = open_directory(path, loader, trust_remote_code)
    return opener.load_tokenizer(path, config)


def load_model(name_or_path, *, loader="auto", trust_remote_code=False, dtype=None):
    """(model, tokenizer) of a directory or hub id: any mlx-lm model, any nanochat generation, a checkpoint of ours.

    dtype: weights are cast to it ("float32", "bfloat16", "float16"); None keeps the stored one. `model.source_path` is
    the directory. Raises UserError for what can't be loaded, encoder models among them."""
    path = resolve_model(name_or_path, trust_remote_code)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        return load_adapted_model(path, loader=loader, trust_remote_code=trust_remote_code, dtype=dtype)
    opener, config = open_directory(path, loader, trust_remote_code)
    model, config = opener.load_model(path, config)
    tokenizer = opener.load_tokenizer(path, config)
    if dtype:
        model.update(cast_floats(model.parameters(), dtype))
    mx.eval(model.parameters())
    check_weights(model, path)
    model.eval()
    model.source_path = path
    return model, tokenizer


def check_weights(model, path):
    """Raises UserError where a weight is not finite: nothing could be sampled from such a model, or trained."""
    for name, weight in tree_flatten(model.parameters()):
        if mx.issubdtype(weight.dtype, mx.floating) and not mx.isfinite(weight).all().item():
            raise UserError(f"{path}: {name} holds NaN or infinity; the run that wrote it diverged, or the file is damaged: "
                            "take an earlier checkpoint, or download it again")


def check_end_token(model, tokenizer, config):
    """Raises UserError where the model has no end token that it could write, and no stop text ends a completion."""
    from mlx_grpo import vocabulary_of

    size = vocabulary_of(model)
    if not config.stop and not any(token is not None and token < size for token in tokenizer.eos_token_ids):
        given = ", ".join(map(str, tokenizer.eos_token_ids))
        raise UserError(f"{config.model_name}: its end token ({given}) is none of its {size} tokens, so no completion "
                        "would ever end; set eos_token_id in its config.json, or the option stop")


def base_of(path):
    """The base model that adapters are for. Raises UserError."""
    base = read_json(path / "adapter_config.json").get("model")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path / 'adapter_config.json'} names no base model; write its directory or hub id "
                        "there as \"model\"")
    return base


def load_adapted_model(path, **options):
    """(model, tokenizer) of adapters in mlx-lm's format on the base model that their adapter_config.json names."""
    from mlx_grpo.adapter_files import load_onto

    model, tokenizer = load_model(base_of(path), **options)
    load_onto(model, path)
    mx.eval(model.parameters())
    model.eval()
    return model, tokenizer
