"""
Opening models: any mlx-lm model directory or hub id, every nanochat generation, checkpoints and adapters of ours, and
what a user's own loader opens. Part of mlx_grpo, which gives all of these names out again.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx

from mlx_grpo import ConfigError, TiktokenTokenizerWrapper, UserError, cast_floats, load_symbol, nearest, shipped_path


def resolve_model(name_or_path, trust_remote_code=False):
    """The local directory of a model: itself, the shipped one of that name, or the hub's snapshot of that id, downloaded
    once its config is one that runs and the disk has room. Raises UserError."""
    from mlx_grpo.hub_files import fetch_model

    return fetch_model(str(shipped_path(name_or_path)), trust_remote_code=trust_remote_code)


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
        from mlx_lm.utils import load_tokenizer

        try:
            return load_tokenizer(path, {"trust_remote_code": self.trust_remote_code}, config.get("eos_token_id"))
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: can't load the tokenizer: {str(error).splitlines()[0]}") from error


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
    return load_symbol(loader, "model_loader")


def load_model(name_or_path, *, loader="auto", trust_remote_code=False, dtype=None):
    """(model, tokenizer) of a directory or hub id: any mlx-lm model, any nanochat generation, a checkpoint of ours.

    dtype: weights are cast to it ("float32", "bfloat16", "float16"); None keeps the stored one. `model.source_path` is
    the directory. Raises UserError for what can't be loaded, encoder models among them."""
    path = resolve_model(name_or_path, trust_remote_code)
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        return load_adapted_model(path, loader=loader, trust_remote_code=trust_remote_code, dtype=dtype)
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable config.json ({error}); is it a model directory?") from error
    opener = find_loader(path, config, loader)()
    opener.trust_remote_code = trust_remote_code
    opener.validate_compatibility(path, config)
    model, config = opener.load_model(path, config)
    tokenizer = opener.load_tokenizer(path, config)
    if dtype:
        model.update(cast_floats(model.parameters(), dtype))
    mx.eval(model.parameters())
    model.eval()
    model.source_path = path
    return model, tokenizer


def load_adapted_model(path, **options):
    """(model, tokenizer) of adapters in mlx-lm's format on the base model that their adapter_config.json names."""
    from mlx_grpo.adapter_files import load_onto

    try:
        base = json.loads((path / "adapter_config.json").read_text()).get("model")
    except ValueError as error:
        raise UserError(f"{path}/adapter_config.json: not JSON: {error}") from error
    if not base:
        raise UserError(f"{path}/adapter_config.json names no base model; load that with --adapter-path instead")
    model, tokenizer = load_model(base, **options)
    load_onto(model, path)
    mx.eval(model.parameters())
    model.eval()
    return model, tokenizer
