"""
Finds checkpoints of every kind we know below a directory: our own training runs, Hugging Face models, NeMo 1, NeMo 2
and Megatron-Bridge.

    python utils/checkpoints.py latest DIR     prints the newest one's path, `*-last` before others

Unfinished ones are never found: NeMo's with a `-unfinished` mark beside them, our hidden temporary directories, and
those that lack the file their writer puts there last.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

import argparse                                                # noqa: E402
import os                                                      # noqa: E402
import re                                                      # noqa: E402
from dataclasses import dataclass                              # noqa: E402

from mlx_grpo import UserError, run_command                    # noqa: E402

STEP = re.compile(r"(?:step=|iter_|checkpoint-|step[-_])(\d+)")
MAX_DEPTH = 8              # directories below DIR

# format -> the file (relative) that its writer puts there last, and one that tells it from the other formats
MARKERS = {
    "nemo2": ("weights/metadata.json", "context"),
    "bridge": ("metadata.json", "run_config.yaml"),
    "nemo1": ("model_config.yaml", "model_config.yaml"),
    "mlx": ("trainer_state.json", "config.json"),
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


def checkpoint_at(path):
    """The Found at `path` itself, None where it isn't a complete checkpoint."""
    path = Path(path)
    if path.name.endswith("-unfinished") or Path(f"{path}-unfinished").exists():
        return None
    if path.suffix == ".nemo" and path.is_file():
        return found(path, "nemo1", path)
    for name, (last, telling) in MARKERS.items():
        if (path / last).is_file() and (path / telling).exists() and (name != "hf"
                                                                      or any((path / w).is_file() for w in WEIGHTS)):
            return found(path, name, path / last)
    return None


def found(path, name, marker):
    match = STEP.findall(path.name)
    return Found(path, name, int(match[-1]) if match else -1, marker.stat().st_mtime)


def find_checkpoints(directory):
    """All complete checkpoints in `directory` and below, in no order. Links are seen, not followed deeper; a checkpoint
    isn't searched for others, nor is a hidden directory."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    own = checkpoint_at(directory)
    results = [own] if own else []
    for folder, names, files in os.walk(directory):
        folder = Path(folder)
        if len(folder.relative_to(directory).parts) >= MAX_DEPTH or own:
            names.clear()
            continue
        inside = [checkpoint_at(folder / name) for name in [*names, *files] if not name.startswith(".")]
        results += [one for one in inside if one]
        taken = {one.path.name for one in inside if one}
        names[:] = [name for name in names if name not in taken and not name.startswith(".")]
    return results


def latest(directory):
    """The newest Found: in each folder a `*-last` one or the highest step, of those the one completed last, `*-last`
    before others.

    Raises UserError where there is none."""
    folders = {}
    for one in find_checkpoints(directory):
        folders.setdefault(one.path.parent, []).append(one)
    if not folders:
        raise UserError(f"no complete checkpoint in {directory} or below (looked for NeMo, Megatron-Bridge, Hugging "
                        "Face and our own)")
    best = [max(group, key=lambda one: (one.is_last, one.step, one.time)) for group in folders.values()]
    return max(best, key=lambda one: (one.is_last, one.time, one.step))


def main():
    parser = argparse.ArgumentParser(prog="checkpoints.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    newest = commands.add_parser("latest", help="print the path of the newest checkpoint below DIR")
    newest.add_argument("directory", metavar="DIR")
    arguments = parser.parse_args()
    print(latest(arguments.directory).path)


if __name__ == "__main__":
    run_command(main)
