"""What a checkpoint is and whether it is whole: from headers and sizes at once, from every byte on demand."""

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from mlx_grpo import UserError
from mlx_grpo.checkpoint_find import entries, why_incomplete
from mlx_grpo.checkpoint_weights import FLOATS, NeedsTorch, count_parameters, open_weights
from mlx_grpo.files import human_bytes
from mlx_grpo.manifest import NAME as MANIFEST
from mlx_grpo.manifest import check_manifest

FORMAT_NAMES = {"mlx": "training run", "hf": "Hugging Face", "nemo1": "NeMo 1", "nemo2": "NeMo 2",
                "bridge": "Megatron-Bridge"}


@dataclass(frozen=True)
class Info:
    """A line of `list`. `format` and the rest are None where they aren't known; `bytes` is what all its files hold;
    `date` is local, ISO 8601; `valid` is None where it couldn't be looked into, and `why` then tells the reason, as it
    does where it is False. `link` is what a symbolic link points to."""
    path: str
    name: str
    format: str
    bytes: int
    parameters: int
    step: int
    date: str
    valid: bool
    why: str
    link: str


def describe(found):
    """The Info of a Found, from its sizes and headers."""
    parameters, valid, why = None, True, None
    try:
        if found.format == "mlx" and (fault := check_manifest(found.path, quick=True)):
            raise UserError(fault)
        weights = open_weights(found)
        parameters = count_parameters(found, weights.tensors)
        weights.close()
    except (UserError, OSError) as error:
        valid, why = None if isinstance(error, NeedsTorch) else False, str(error)
    link = str(found.path.readlink()) if found.path.is_symlink() else None
    name = found.path.name or found.path.resolve().name
    return Info(str(found.path), name, found.format, size_of(found.path), parameters, step_of(found),
                date_of(found.time), valid, why, link)


def fault(found, hashes):
    """Why a Found isn't valid, None where it is or can't be looked into; with `hashes`, those of a manifest as well."""
    if hashes and found.format == "mlx" and (why := check_manifest(found.path)):
        return why
    info = describe(found)
    return info.why if info.valid is False else None


def date_of(seconds):
    """Local time, ISO 8601, of seconds since 1970."""
    return datetime.fromtimestamp(seconds).isoformat(timespec="seconds")


def size_of(path):
    """Bytes of a file, or of all files in a directory and below."""
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def step_of(found):
    """The step in the name, else in trainer_state.json (ours says step, transformers' global_step), else None."""
    state = found.path / "trainer_state.json"
    if found.step >= 0 or not state.is_file():
        return found.step if found.step >= 0 else None
    try:
        table = json.loads(state.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return None                                   # damaged, which `verify` tells
    step = table.get("step", table.get("global_step")) if isinstance(table, dict) else None
    return step if type(step) is int else None


def list_all(directory):
    """An Info of everything in `directory` and below that is a checkpoint or was to be one, newest first."""
    infos = []
    for path, found in entries(directory):
        if found:
            infos.append(describe(found))
        elif why := why_incomplete(path):
            date = date_of(path.stat().st_mtime)
            infos.append(Info(str(path), path.name, None, size_of(path), None, None, date, False, why, None))
    return sorted(infos, key=lambda info: (info.date, info.step or -1), reverse=True)


def verify(found):
    """(faults, lines): what is wrong with a Found after reading every byte of it, and what was looked at: with a
    manifest every file's hash; every JSON file; header, place and value of each tensor (no NaN, no infinity). Raises
    NeedsTorch."""
    faults, looked = [], []
    if (found.path / MANIFEST).is_file():
        fault = check_manifest(found.path)
        faults += [fault] if fault else []
    looked.append(f"SHA-256 of all files against {MANIFEST}" if (found.path / MANIFEST).is_file() else
                  f"sizes and headers (no {MANIFEST}, so no hashes: a weight that became another number stays unseen)")
    files = sorted(found.path.glob("*.json")) if found.path.is_dir() else []
    faults += [fault for file in files if (fault := json_fault(file))]
    looked.append(f"{len(files)} JSON files")
    try:
        weights = open_weights(found)
    except NeedsTorch:
        raise
    except UserError as error:
        return [*faults, str(error)], looked
    try:
        faults += value_faults(weights)
    except UserError as error:
        faults.append(str(error))
    finally:
        weights.close()
    looked.append(f"{len(weights.tensors)} tensors, every value")
    return faults, looked


def json_fault(file):
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{file.name} is not valid JSON: {error}"
    return None


def value_faults(weights):
    """A line for each tensor with NaN or infinity in it, three at most and how many more."""
    bad = []
    for name, (kind, shape) in weights.tensors.items():
        count = sum(int(np.count_nonzero(~np.isfinite(piece))) for piece in weights.pieces(name) if kind in FLOATS)
        bad += [f"{name} {list(shape)} has {count} values that are NaN or infinite"] if count else []
    return bad[:3] + ([f"and {len(bad) - 3} more tensors with NaN or infinity"] if len(bad) > 3 else [])


def table(infos, base):
    """Lines of aligned columns for people; paths are relative to `base`."""
    rows = [("checkpoint", "format", "size", "parameters", "step", "date", "valid")]
    for info in infos:
        path = Path(info.path)
        name = str(path.relative_to(base)) if path != Path(base) else path.name or str(path)
        state = {True: "yes", False: f"no: {info.why}", None: f"? {info.why}"}[info.valid].replace("\n", " ")
        rows.append((name + (f" -> {info.link}" if info.link else ""), FORMAT_NAMES.get(info.format, "-"),
                     human_bytes(info.bytes), "-" if info.parameters is None else human_count(info.parameters),
                     "-" if info.step is None else str(info.step), info.date.replace("T", " ")[:16], state))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[6]]) for row in rows]


def human_count(n):
    """"1.54 B" for 1.54e9 parameters."""
    for unit in ("", " k", " M", " B"):
        if n < 1000:
            return f"{n}" if not unit else f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} T"


def as_json(info):
    return asdict(info)
