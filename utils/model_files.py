"""The files beside a converted model's weights: tokenizer, end token, card, and the way to the hub."""

import json
import shutil
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.checked_load import read_json
from mlx_grpo.hub_files import hub_trouble

TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                   "merges.txt", "*.tiktoken", "tiktoken.model", "tokenizer.pkl", "chat_template*",
                   "additional_chat_templates/*", "generation_config.json")
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


def open_tokenizer(source, config, eos_token=None, trust_remote_code=False):
    """The tokenizer of a directory, opened to know that it works and that it has `eos_token`. Raises UserError."""
    from mlx_lm.utils import load_tokenizer
    there = any(True for pattern in VOCABULARIES for _ in Path(source).glob(pattern))
    if not there and not trust_remote_code:                                             # transformers makes one up
        raise UserError(f"{source} has no tokenizer ({', '.join(VOCABULARIES)}); copy the tokenizer files of the model "
                        "it was made from beside it")
    try:
        tokenizer = load_tokenizer(source, {"trust_remote_code": trust_remote_code}, config.get("eos_token_id"))
    except Exception as error:      # its files may be anything, and the tokenizers library raises bare Exceptions
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise UserError(f"{source}: its tokenizer can't be opened ({reason}); copy the tokenizer files of the model it "
                        "was made from beside it, or add --trust-remote-code where it brings its own code") from error
    if eos_token and eos_token not in tokenizer.get_vocab():
        specials = ", ".join(tokenizer.all_special_tokens)
        raise UserError(f"--eos-token {eos_token!r} isn't in the vocabulary of {source}; "
                        f"its special tokens: {specials}")
    return tokenizer


def copy_tokenizer(source, work, trust_remote_code):
    """Copy the tokenizer's files byte for byte, so that its ids can't change; Python files only where they may run."""
    for pattern in TOKENIZER_FILES + (("*.py",) if trust_remote_code else ()):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                target = work / path.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def set_eos_token(work, config, tokenizer, token):
    """Make `token` the one end token in tokenizer_config.json, special_tokens_map.json, config.json and
    generation_config.json of `work`."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    changes = {"tokenizer_config.json": {"eos_token": token}, "special_tokens_map.json": {"eos_token": token},
               "config.json": {"eos_token_id": token_id}, "generation_config.json": {"eos_token_id": token_id}}
    for name, change in changes.items():
        path = work / name
        if path.exists() or name in ("tokenizer_config.json", "generation_config.json"):
            old = read_json(path) if path.exists() else {}
            path.write_text(json.dumps(old | change, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_card(source, work, name, base_model):
    """README.md for the hub: the source's metadata (its licence above all), with base_model and the mlx tag."""
    from huggingface_hub import ModelCard
    old = source / "README.md"
    text = old.read_text(encoding="utf-8", errors="replace") if old.exists() else ""
    card = ModelCard(text if text.startswith("---") else "---\n{}\n---\n", ignore_metadata_errors=True)
    card.data.library_name, card.data.pipeline_tag = "mlx", "text-generation"
    card.data.tags = sorted({*(card.data.tags or []), "mlx"})
    origin = ""
    if not Path(base_model).expanduser().is_dir():
        card.data.base_model = base_model
        origin = f"\nConverted from [{base_model}](https://huggingface.co/{base_model}) by MLX-GRPO on mlx-lm.\n"
    card.text = (f"\n# {name}\n{origin}\n```python\nfrom mlx_lm import load, generate\n\n"
                 f'model, tokenizer = load("{name}")\nprint(generate(model, tokenizer, prompt="Hello"))\n```\n')
    card.save(work / "README.md")


def upload(directory, repo):
    """Put the converted directory on the hub. Raises UserError; the directory stays in any case."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=str(directory), repo_id=repo)
    except (HTTPError, OSError) as error:
        raise UserError(f"{directory} is converted, but the upload to {repo} failed: {hub_trouble(error)}") from error
