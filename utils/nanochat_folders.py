"""Where a nanochat checkpoint lies: a plain folder, nanochat's own folders by phase and tag, or a hub cache."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_grpo import UserError

PHASES = ("chatrl", "chatsft", "mid", "base")        # what was trained last first, as nanochat's own chat prefers


@dataclass(frozen=True)
class CheckpointFiles:
    model: Path
    meta: Path
    tokenizer: Path
    step: int


def step_of(path):
    """650 for model_000650.pt, None for a name of another kind."""
    match = re.fullmatch(r"model_(\d{6,18})\.pt", path.name)
    return int(match.group(1)) if match else None


def models_in(folder):
    return [path for path in folder.glob("model_*.pt") if step_of(path) is not None]


def checkpoint_folders(root, say):
    """The folders of checkpoints below `root`: itself, the tags of one of nanochat's phases (in its base folder the
    last phase that was trained), or the snapshots in a hub cache."""
    if models_in(root):
        return [root]
    phases = {f"{phase}_checkpoints": [folder for folder in root.glob(f"{phase}_checkpoints/*") if models_in(folder)]
              for phase in PHASES}
    phases = {phase: folders for phase, folders in phases.items() if folders}
    if phases:
        latest, *others = phases
        if others:
            say(f"taking {latest} in {root} (also there: {', '.join(others)}); choose another with --cache-dir")
        return phases[latest]
    tags = [folder for folder in root.glob("*") if models_in(folder)]
    if tags:
        return tags
    repositories = [root] if (root / "snapshots").is_dir() else sorted(root.glob("models--*nanochat*"))
    return [folder for repository in repositories for folder in current_snapshot(repository)]


def current_snapshot(repository):
    """[the snapshot of a repository in the hub cache]: that of refs/main, else the newest with a checkpoint; or []."""
    main = repository / "refs" / "main"
    if main.is_file() and re.fullmatch("[0-9a-f]{40}", main.read_text().strip()):
        snapshot = repository / "snapshots" / main.read_text().strip()
        if models_in(snapshot):
            return [snapshot]
    found = [folder for folder in (repository / "snapshots").glob("*") if models_in(folder)]
    return sorted(found, key=lambda folder: folder.stat().st_mtime)[-1:]


def tag_depth(folder):
    """20 for a tag like d20, as nanochat names its runs by depth; -1 for another name."""
    match = re.fullmatch(r"d(\d{1,4})", folder.name)
    return int(match.group(1)) if match else -1


def no_checkpoint(root):
    """The UserError for a folder without a checkpoint; says what it is instead where that can be told."""
    if (root / "config.json").is_file() and list(root.glob("*.safetensors")):
        return UserError(f"{root}: a Transformers or MLX model (config.json, safetensors), not a nanochat checkpoint: "
                         "give the folder of nanochat's model_<step>.pt, or use utils/convert_model.py for a hub model")
    return UserError(f"no nanochat checkpoint (model_<step>.pt) in {root}; give the folder that holds one with "
                     "--cache-dir, or download one with --repo sdobson/nanochat")


def find_checkpoint(root, step=None, tokenizer=None, say=print):
    """The files of one checkpoint below `root`: the given or the largest step, its meta file and tokenizer.pkl (beside
    the model, or in nanochat's ../../tokenizer). Says through `say` what was chosen where there was a choice."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"--cache-dir {root}: {'a file' if root.exists() else 'no such directory'}; give the folder "
                        "that holds model_<step>.pt, or one above it")
    folders = checkpoint_folders(root, say)
    if not folders:
        raise no_checkpoint(root)
    if len(folders) > 1:
        deepest = max(tag_depth(folder) for folder in folders)
        chosen = [folder for folder in folders if tag_depth(folder) == deepest]
        if len(chosen) > 1:
            names = ", ".join(sorted(str(folder.relative_to(root)) for folder in folders))
            raise UserError(f"several models in {root}: {names}; give the folder of one with --cache-dir")
        say(f"{len(folders)} models in {root}: taking {chosen[0].relative_to(root)}, the deepest; "
            "choose another with --cache-dir")
        folders = chosen
    folder, steps = folders[0], {step_of(path): path for path in models_in(folders[0])}
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: {folder} has the steps {', '.join(map(str, sorted(steps)))}")
    chosen = max(steps) if step is None else step
    if step is None and len(steps) > 1:
        say(f"{len(steps)} checkpoints in {folder}: taking step {chosen}, the newest; choose another with --step")
    meta = folder / steps[chosen].name.replace("model_", "meta_").replace(".pt", ".json")
    if not meta.is_file():
        raise UserError(f"{meta} is missing: the sizes of {steps[chosen].name} stand in it; copy it from where the "
                        "model came from")
    places = [Path(tokenizer).expanduser()] if tokenizer else [folder / "tokenizer.pkl",
                                                               folder.parent.parent / "tokenizer" / "tokenizer.pkl"]
    present = [place for place in places if place.is_file()]
    if not present:
        raise UserError(f"no tokenizer at {' or '.join(map(str, places))}; name the model's with --tokenizer")
    return CheckpointFiles(steps[chosen], meta, present[0], chosen)
