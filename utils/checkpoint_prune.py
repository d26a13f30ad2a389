"""Which checkpoints of one directory are older than the newest N, and their removal."""

import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.checkpoint_find import LEFTOVER, checkpoint_at, why_incomplete
from mlx_grpo.checkpoint_info import fault, size_of
from mlx_grpo.files import sync_directory


@dataclass
class Plan:
    """`kept` and `removed` are paths, newest first; `untouched` {path: why it isn't valid}, never counted and never
    removed; `links` lead to what is removed, and go with it."""
    kept: list = field(default_factory=list)
    removed: list = field(default_factory=list)
    untouched: dict = field(default_factory=dict)
    links: list = field(default_factory=list)
    bytes: int = 0          # that removal frees


def plan(directory, keep, keep_best=False):
    """The Plan for the checkpoints directly in `directory` whose names tell a step: the newest `keep` valid ones stay,
    and those that a `*-last` name or link says, with `keep_best` the best one too. Raises UserError."""
    directory = Path(directory)
    if keep < 1:
        raise UserError(f"--keep is {keep}; at least 1 checkpoint has to stay")
    if not directory.is_dir():
        raise UserError(f"{directory}: {'not a' if directory.exists() else 'no such'} directory; give one that holds "
                        "checkpoints")
    result, found, links = Plan(), [], []
    for path in sorted(directory.iterdir()):
        if path.is_symlink():
            links.append(path)
        elif path.name.startswith(".") and not LEFTOVER.fullmatch(path.name):
            continue
        elif one := checkpoint_at(path):
            found += [one] if one.step >= 0 else []
        elif why := why_incomplete(path):
            result.untouched[path] = why
    if not found and not result.untouched:
        raise UserError(f"no checkpoints with a step in their name directly in {directory} (checkpoint-20, step_20, "
                        "iter_20); give the directory of one run")
    pinned = {link.resolve() for link in links if link.name.endswith("-last")}
    pinned |= {best_in(directory, links, found)} if keep_best else set()
    wanted = keep
    for one in sorted(found, key=lambda one: (one.step, one.time), reverse=True):
        why = fault(one, hashes=wanted > 0)          # what is relied on is hashed
        if why:
            result.untouched[one.path] = why
        elif wanted > 0 or one.is_last or one.path.resolve() in pinned:
            result.kept.append(one.path)
            wanted -= 1
        else:
            result.removed.append(one.path)
    gone = {path.resolve() for path in result.removed}
    result.links = [link for link in links if link.resolve() in gone]
    result.bytes = sum(freed(path) for path in result.removed)
    return result


def best_in(directory, links, found):
    """What checkpoint-best points to, or the best_model_checkpoint of the newest transformers state.
    Raises UserError."""
    for link in links:
        if link.name.endswith("-best") and link.exists():
            return link.resolve()
    for one in sorted(found, key=lambda one: one.step, reverse=True):
        state = one.path / "trainer_state.json"
        if one.format == "hf" and state.is_file():
            try:
                best = json.loads(state.read_text(encoding="utf-8")).get("best_model_checkpoint")
            except (ValueError, AttributeError, RecursionError) as error:
                raise UserError(f"{state}: can't be read, so the best checkpoint isn't known: {error}") from error
            if isinstance(best, str) and (directory / Path(best).name).exists():
                return (directory / Path(best).name).resolve()
    raise UserError(f"--keep-best: nothing in {directory} tells the best checkpoint (looked for a link "
                    "checkpoint-best, and best_model_checkpoint in trainer_state.json); leave the option out, "
                    "or set save_best in the run")


def freed(path):
    """Bytes that removing `path` gives back: not those of files that have another name elsewhere."""
    if path.is_file():
        return size_of(path) if path.stat().st_nlink == 1 else 0
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and p.lstat().st_nlink == 1)


def remove(result):
    """Remove what the Plan says, oldest first: each is renamed to a hidden name before, so that none is ever half there
    under its own. Raises UserError where the directory can't be written."""
    for path in [*result.links, *reversed(result.removed)]:
        try:
            if path.is_symlink():
                path.unlink()
                continue
            hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
            os.rename(path, hidden)
            sync_directory(path.parent)
            hidden.unlink() if hidden.is_file() else shutil.rmtree(hidden)
        except OSError as error:
            raise UserError(f"can't remove {path}: {error.strerror}; what was removed before it is gone") from error
