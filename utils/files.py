"""Files that are whole or not there: directories written under a temporary name and renamed, sizes and space checked."""

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path

from mlx_grpo import UserError


def human_bytes(n):
    """"1.5 GB" for 1.5e9; decimal units, as disks and model cards use."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def sha256(path):
    """Hex SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_free_space(directory, needed_bytes, what):
    """Raises UserError where the disk that will hold `directory` has less than `needed_bytes` free."""
    parent = Path(directory).absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UserError(f"{what} needs about {human_bytes(needed_bytes)} in {parent}, which has {human_bytes(free)} free; "
                        "free some space or choose another place")


def check_output_file(option, path):
    """Raises UserError where `path`, given by `option`, can't become a file: told before the work whose result it holds."""
    path, parent = Path(path), Path(path).parent
    if not parent.is_dir():
        raise UserError(f"{option} {path}: there is no directory {parent}; create it first")
    if path.is_dir() or path.is_symlink() and not path.exists():
        raise UserError(f"{option} {path}: {'a directory' if path.is_dir() else 'a link that leads nowhere'}; name a file")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UserError(f"{option} {path}: no permission to write there; choose another place")


def sync_directory(path):
    """Flush a directory's entries to the disk (a rename is only durable after this)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def disk_errors(path):
    """An OSError becomes a UserError that names `path`; around writes of a run that leave its checkpoints as they were."""
    try:
        yield
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}; checkpoints are as they were: make room and go on with "
                        "--resume") from error


@contextlib.contextmanager
def atomic_directory(target, replace=False):
    """Yield a temporary directory beside `target` that becomes `target` when the block ends, whole, and is removed when
    the block raises. Raises UserError where `target` exists and is not an empty directory, unless `replace` is true,
    and where its parent can't be written."""
    target = Path(target).absolute()
    if target.is_symlink() and not target.exists():
        raise UserError(f"{target} is a link that leads nowhere; remove it or choose another directory")
    if target.exists() and not replace and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists and is not empty; choose another directory or remove it first")
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"can't write in {target.parent}: {error.strerror}; choose a directory you can write to") from error
    try:
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
            os.rename(target, old)
            os.rename(work, target)
            shutil.rmtree(old)
        else:
            os.rename(work, target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
