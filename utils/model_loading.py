"""
Opening models: any mlx-lm model directory or hub id, every nanochat generation, checkpoints and adapters of ours, and
what a user's own loader opens. Part of mlx_grpo, which gives all of these names out again.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx

from mlx_grpo import ConfigError, TiktokenTokenizerWrapper, UserError, cast_floats, load_symbol, nearest, shipped_path


def resolve_model(name_or_path):
    """The local directory of a model: itself, or the hub's snapshot of that id. Raises UserError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from mlx_lm.utils import _download

    if shipped_path(name_or_path).is_dir():
        return shipped_path(name_or_path)
    if str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") != 1:
        raise UserError(f"model_name {str(name_or_path)!r}: no such directory, and not a hub id like Qwen/Qwen3-0.6B")
    try:
        return Path(_download(str(name_or_path)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_name {str(name_or_path)!r}: no such directory, and the hub did not give it ({reason}); "
                        "check the name, the connection, or `hf auth login` for a gated model") from error


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
        """(model, config) from a directory and its config.json as a dictionary."""
        from mlx_grpo.model_config import normalize_config
        from mlx_lm.utils import load_model

        try:
            return load_model(path, lazy=True, model_config=normalize_config(config),
                              trust_remote_code=self.trust_remote_code)
        except (ValueError, FileNotFoundError, KeyError) as error:
            reason = str(error).splitlines()[0]
            remedy = "; set trust_remote_code = true if you trust it" if config.get("model_file") else ""
            raise UserError(f"{path}: mlx-lm can't load this model: {reason}{remedy}") from error

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

    def load_model(self, path, config):
        from mlx_grpo import nanochat_model

        if config.get("model_type") != nanochat_model.MODEL_TYPE:
            return super().load_model(path, config)
        sys.modules[f"mlx_lm.models.{nanochat_model.MODEL_TYPE}"] = nanochat_model
        return super().load_model(path, {**config, "model_file": None})     # the project's own class, not the folder's

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
    path = resolve_model(name_or_path)
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
    from mlx_lm.tuner.utils import load_adapters

    try:
        base = json.loads((path / "adapter_config.json").read_text()).get("model")
    except ValueError as error:
        raise UserError(f"{path}/adapter_config.json: not JSON: {error}") from error
    if not base:
        raise UserError(f"{path}/adapter_config.json names no base model; load that with --adapter-path instead")
    model, tokenizer = load_model(base, **options)
    try:
        load_adapters(model, str(path))
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: these adapters don't fit {base}: {str(error).splitlines()[-1].strip()}") from error
    mx.eval(model.parameters())
    model.eval()
    return model, tokenizer
