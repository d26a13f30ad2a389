"""A copy of a checkpoint that is whole or not there, compared with the original by hash."""

import errno
import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.checkpoint_find import checkpoint_at, why_incomplete
from mlx_grpo.files import atomic_directory, check_free_space, sha256, sync_directory
from mlx_grpo.manifest import check_manifest

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)   # another disk, or no links on it


@dataclass(frozen=True)
class Backup:
    path: Path
    copied: int            # files with bytes of their own
    linked: int            # files that share their bytes with the original
    bytes: int             # written


def found_at(path):
    """The Found at `path`. Raises UserError that tells why there is none."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} doesn't exist")
    found = checkpoint_at(path)
    if not found:
        why = why_incomplete(path) or "neither a checkpoint of a run nor Hugging Face's, NeMo's or Megatron-Bridge's"
        raise UserError(f"{path} is no complete checkpoint: {why}")
    return found


def backup_name(path):
    """checkpoint-20 -> checkpoint-20_backup_20260131_235959; model.nemo -> model_backup_20260131_235959.nemo."""
    stem = path.name.removesuffix(".nemo")
    return f"{stem}_backup_{datetime.now():%Y%m%d_%H%M%S}" + path.name[len(stem):]


def backup(path, dest="backups", name=None, links=True):
    """Back up the checkpoint at `path` as dest/name; returns a Backup. Times are kept. Raises UserError where it is no
    whole checkpoint, the target exists or lies inside it, space is short, or the copy differs.

    A file is hard linked rather than copied where that is safe: the weights of a run of ours, which are only ever
    replaced, never written to, on the same disk. Small files are copied, as people edit them."""
    found = found_at(path)
    source = Path(path).resolve()
    name = name or backup_name(Path(os.path.abspath(path)))
    if name in (".", "..") or Path(name).name != name or name.startswith("."):
        raise UserError(f"--name {name!r} must be a bare name; choose the directory with --dest")
    if source.is_file() and not name.endswith(".nemo"):
        name += ".nemo"
    target = Path(dest).absolute() / name
    if len(os.fsencode(name)) > 240:
        raise UserError(f"--name {name[:40]}... is too long for a file's name; give a shorter one")
    if source in target.resolve().parents or source == target.resolve():
        raise UserError(f"{target} lies inside {source}; choose another directory with --dest")
    if found.format == "mlx" and (fault := check_manifest(source)):
        raise UserError(f"{path} is damaged, and so would be its backup: {fault}")
    if source.is_file():
        size = source.stat().st_size
        make_room(target, size)
        copy_single(source, target)
        return Backup(target, 1, 0, size)
    return backup_directory(source, target, links and found.format == "mlx")


def backup_directory(source, target, links):
    files = files_of(source)
    linked = 0
    make_room(target, sum(p.stat().st_size for p in files if not (links and p.suffix == ".safetensors")))
    written = 0
    with atomic_directory(target) as work:
        for file in files:
            copy = work / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if links and file.suffix == ".safetensors" and hard_link(file, copy):
                linked += 1
                continue
            copy_file(file, copy)
            written += copy.stat().st_size
        for folder in [source, *{file.parent for file in files}]:
            shutil.copystat(folder, work / folder.relative_to(source))
    return Backup(target, len(files) - linked, linked, written)


def files_of(source):
    """Every file in a directory and below. Raises UserError for links to directories, sockets and the like."""
    files = []
    for path in sorted(source.rglob("*")):
        if path.is_symlink() and not path.is_file() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is neither a file nor a directory (a link that leads nowhere or to a directory, "
                            "say), and can't be backed up")
        files += [path] if path.is_file() else []
    return files


def make_room(target, size):
    check_free_space(target.parent, size, f"the backup {target.name}")
    if target.is_file() or target.is_symlink():
        raise UserError(f"{target} already exists; choose another --name")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write in {target.parent}: {error.strerror}; choose another --dest") from error


def hard_link(file, copy):
    """Whether `copy` now is another name of `file`; False on a disk without links, or another disk."""
    if file.is_symlink():
        return False
    try:
        os.link(file, copy)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def copy_single(source, target):
    """Copy one file under a temporary name, then rename it."""
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        copy_file(source, work)
        os.rename(work, target)
        sync_directory(target.parent)
    finally:
        work.unlink(missing_ok=True)


def copy_file(source, target):
    """Copy a file with its times, flush it, read it back from the disk and compare. Raises UserError where the original
    changed meanwhile, the disk is full, or the copy differs."""
    digest = hashlib.sha256()
    try:
        before = source.stat()
        with open(source, "rb") as from_file, open(target, "xb") as to_file:
            while piece := from_file.read(1 << 20):
                digest.update(piece)
                to_file.write(piece)
            to_file.flush()
            os.fsync(to_file.fileno())
        shutil.copystat(source, target)
        after = source.stat()
    except OSError as error:
        raise UserError(f"can't copy {source} to {target.parent}: {error.strerror}; nothing was left there") from error
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise UserError(f"{source} changed while it was copied; back it up again when nothing writes to it")
    if sha256(target) != digest.hexdigest():
        raise UserError(f"the copy of {source} differs from the original when it is read back; the disk may be failing")
