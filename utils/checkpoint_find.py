"""
Where the checkpoints below a directory are: our own training runs', Hugging Face models, NeMo 1, NeMo 2 and
Megatron-Bridge; and what was left there unfinished.

Unfinished ones are never found: NeMo's with a `-unfinished` mark beside them, hidden temporary directories, those of
ours whose manifest doesn't fit, and those that lack the file their writer puts there last.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.manifest import NAME as MANIFEST
from mlx_grpo.manifest import check_manifest

STEP = re.compile(r"(?:step=|iter_|checkpoint-|step[-_])(\d+)")
LEFTOVER = re.compile(r"\..+\.([0-9a-f]{8}\.(tmp|old)|partial)")     # of utils/files.py and utils/nemo_job.py
MAX_DEPTH = 8              # directories below DIR

# format -> the file (relative) that its writer puts there last, and one that tells it from the other formats
MARKERS = {
    "nemo2": ("weights/metadata.json", "context"),
    "bridge": ("metadata.json", "run_config.yaml"),
    "nemo1": ("model_config.yaml", "model_config.yaml"),
    "mlx": (MANIFEST, "trainer_state.json"),
    "hf": ("config.json", "config.json"),
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
           "weights.npz")


@dataclass(frozen=True)
class Found:
    """A checkpoint on the disk. `step` is -1 where its name has none; `time` is when it was completed, seconds since
    1970."""
    path: Path
    format: str
    step: int
    time: float

    @property
    def is_last(self):
        return self.path.name.removesuffix(".nemo").endswith("-last")


def of_a_run(path):
    """Whether `path` is, or was to be, a checkpoint of our own trainer, whichever of its files is lost
    (transformers' have a trainer_state.json as well)."""
    return (path / "optimizer.safetensors").is_file() or all((path / name).is_file() for name in MARKERS["mlx"])


def checkpoint_at(path):
    """The Found at `path` itself, None where it isn't a complete checkpoint."""
    path = Path(path)
    if LEFTOVER.fullmatch(path.name) or path.name.endswith("-unfinished") or Path(f"{path}-unfinished").exists():
        return None
    if path.suffix == ".nemo" and path.is_file():
        return found(path, "nemo1", path)
    ours = of_a_run(path)
    if ours and check_manifest(path, quick=True):
        return None
    for name, (last, telling) in MARKERS.items():
        if (path / last).is_file() and (path / telling).exists() and (name != "mlx" or ours) and (
                name != "hf" or any((path / w).is_file() for w in WEIGHTS)):
            return found(path, name, path / last)
    return None


def found(path, name, marker):
    match = STEP.findall(path.name)
    return Found(path, name, int(match[-1]) if match else -1, marker.stat().st_mtime)


def why_incomplete(path):
    """Why what lies at `path`, which checkpoint_at refused, is no complete checkpoint; None where it doesn't look like
    one at all."""
    if LEFTOVER.fullmatch(path.name) and (path.is_dir() or ".nemo." in path.name):
        return "left over from a save, copy or conversion that was interrupted"
    if not path.is_dir() or path.name.endswith("-unfinished"):
        return None
    if Path(f"{path}-unfinished").exists():
        return "marked unfinished: its saving was interrupted"
    if of_a_run(path):
        return check_manifest(path, quick=True)
    pieces = any(path.glob("*.distcp"))
    if (path / "weights").is_dir() and ((path / "context").is_dir() or any((path / "weights").glob("*.distcp"))):
        return f"no {'context' if (path / MARKERS['nemo2'][0]).is_file() else MARKERS['nemo2'][0]}"
    if pieces and path.name != "weights" and path.name != "model_weights":
        return f"no {next(name for name in MARKERS['bridge'] if not (path / name).exists())}"
    if any(path.glob("model*.safetensors")):
        wanted = "config.json" if not (path / "config.json").is_file() else "model.safetensors.index.json"
        return f"weights, but no {wanted}"
    return None


def entries(directory):
    """(path, Found or None) of `directory`, and of every file and directory below that isn't inside a checkpoint or a
    hidden directory. Links are seen, not followed deeper. Raises UserError where there is no such directory."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory; give one that holds "
                        "checkpoints")
    own = checkpoint_at(directory)
    yield directory, own
    if own:
        return
    for folder, names, files in os.walk(directory):
        folder, inside = Path(folder), []
        if len(folder.relative_to(directory).parts) < MAX_DEPTH:
            for name in sorted([*names, *files]):
                one = None if name.startswith(".") else checkpoint_at(folder / name)
                inside += [name] if not one and not name.startswith(".") else []
                yield folder / name, one
        names[:] = [name for name in names if name in inside]


def find_checkpoints(directory):
    """All complete checkpoints in `directory` and below, in no order. A checkpoint isn't searched for others, nor is a
    hidden directory."""
    return [one for _, one in entries(directory) if one]


def latest(directory, why_not=lambda one: None):
    """The newest Found: in each folder a `*-last` one or the highest step, of those the one completed last, `*-last`
    before others; `why_not(found)` returns a reason to pass one over, or None.

    Raises UserError where there is none."""
    left = find_checkpoints(directory)
    while left:
        folders = {}
        for one in left:
            folders.setdefault(one.path.parent, []).append(one)
        best = [max(group, key=lambda one: (one.is_last, one.step, one.time)) for group in folders.values()]
        newest = max(best, key=lambda one: (one.is_last, one.time, one.step, -len(one.path.parts)))   # not its backup
        if why_not(newest) is None:
            return newest
        left.remove(newest)
    raise UserError(f"no complete checkpoint in {directory} or below (looked for NeMo, Megatron-Bridge, Hugging "
                    "Face and our own)")
