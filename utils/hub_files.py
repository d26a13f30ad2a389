"""A model's directory from its name: a local directory as it is, a hub id downloaded once the disk has room for it."""

import errno
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.checked_load import read_json
from mlx_grpo.files import check_free_space
from mlx_grpo.model_config import unsupported_reason

# What a model needs; weights in safetensors only, Python files only where they may run.
PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jinja",
            "additional_chat_templates/*", "README.md"]


def fetch_model(name, revision=None, trust_remote_code=False):
    """The local directory of a model named by a directory or a hub id (owner/name). A download starts only once its
    config.json is one that mlx-lm runs and the disk has room. Raises UserError in one line."""
    path = Path(name).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(f"{name} is a directory here, so --revision {revision} has no meaning; leave it away")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise UserError(f"{name}: " + ("a file; give the directory that holds it" if path.is_file() else
                                       "no such directory; check the path"))
    patterns = PATTERNS + (["*.py"] if trust_remote_code else [])
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, HTTPError
    try:
        try:
            files = snapshot_download(name, revision=revision, allow_patterns=patterns, dry_run=True)
        except DryRunError:      # the hub can't be reached: what is cached will do
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(file.filename == "config.json" for file in files):
            raise UserError(f"{name} on the hub has no config.json, so it isn't a model for transformers or mlx-lm")
        reason = unsupported_reason(read_json(hf_hub_download(name, "config.json", revision=revision)))
        if reason:
            raise UserError(f"{name}: {reason}")
        download = sum(file.file_size or 0 for file in files if file.will_download)
        check_free_space(constants.HF_HUB_CACHE, download, f"downloading {name}")
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HFValidationError, HTTPError, OSError) as error:
        raise UserError(f"{name}: {hub_trouble(error, revision)}") from error


def hub_trouble(error, revision=None):
    """What an error of the hub's client means for the user, in one line."""
    from huggingface_hub import constants, errors
    host = constants.ENDPOINT.split("//")[-1]
    if isinstance(error, errors.GatedRepoError):
        return f"gated on {host}: ask for access on its page, then `hf auth login`, and try again"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{host} has no revision {revision!r} of it; give a branch, a tag or a commit hash"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (f"no such directory here and no such model on {host}; check the spelling (a private one needs "
                "`hf auth login`)")
    if isinstance(error, errors.HFValidationError):
        return "no such directory here, and not a name that the hub could have (owner/name)"
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "offline mode is on (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"{host} can't be reached"
        return f"no such directory here, {why} and the hub's cache doesn't have it whole; check the name"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk with {constants.HF_HUB_CACHE} is full"
    return f"{host} refused: {str(error).strip().splitlines()[0]}"
