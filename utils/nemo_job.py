"""
A conversion that can be interrupted: it writes into a hidden directory beside its target, keeps a journal of what is
complete, and is renamed at the end. `--resume` cuts the files back to the journal and goes on.

    with resumable(target, fingerprint, resume, overwrite) as job:
        job.append(path, save)       # save(file) writes one item at the end of `path`, once over all runs

An error removes the hidden directory; Ctrl-C, a full disk or a crash leave it for --resume.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import uuid
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.files import sync_directory

SYNC_BYTES = 64 << 20      # the journal runs at most this far behind the data


class Job:
    """The hidden directory `directory` and its journal: one line per item, [file, start, end], in the order of
    writing."""

    def __init__(self, directory, journal, done):
        self.directory, self.journal, self.done = directory, journal, done
        self.progress = lambda nbytes: None
        self.files, self.pending, self.unsynced, self.index = {}, [], 0, 0

    @property
    def resumed_bytes(self):
        return sum(end - start for _, start, end in self.done)

    def open(self, path):
        name = str(path.relative_to(self.directory))
        if name not in self.files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            ends = [end for file, _, end in self.done if file == name]
            self.files[name] = open(path, "r+b")
            self.files[name].truncate(max(ends, default=0))     # what an interrupted run wrote behind its journal
            self.files[name].seek(0, os.SEEK_END)
        return name, self.files[name]

    def append(self, path, save):
        """(start, end) of the next item of `path`; save(file) is called only if no earlier run completed it."""
        name, file = self.open(path)
        if self.index < len(self.done):
            recorded, start, end = self.done[self.index]
            if recorded != name:
                raise UserError(f"the journal of the interrupted run names {recorded} where {name} comes next; run "
                                "without --resume")
        else:
            start = file.tell()
            save(file)
            end = file.tell()
            self.pending.append([name, start, end])
            self.unsynced += end - start
            if self.unsynced > SYNC_BYTES:
                self.flush()
        self.index += 1
        self.progress(end - start)
        return start, end

    def flush(self):
        """Data to the disk first, then the journal lines that vouch for it."""
        for name in {name for name, _, _ in self.pending}:
            self.files[name].flush()
            os.fsync(self.files[name].fileno())
        for line in self.pending:
            self.journal.write(json.dumps(line) + "\n")
        self.journal.flush()
        self.pending, self.unsynced = [], 0

    def close(self):
        for file in self.files.values():
            file.close()
        self.files = {}


def read_journal(path, fingerprint):
    """The complete lines of an interrupted run's journal, [] where it is empty. Raises UserError where it is another
    conversion's."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if lines and json.loads(lines[0]) != fingerprint:
        raise UserError(f"{path.parent} holds an interrupted conversion of another source or with other options; "
                        "repeat it as it was, or run without --resume to start again")
    return [json.loads(line) for line in lines[1:]]


def open_directory(target, overwrite, resume):
    """(hidden directory beside `target`, its locked journal); what an interrupted run left is emptied unless `resume`.
    Raises UserError where `target` exists (unless `overwrite`), can't be written, or another conversion is writing to
    it."""
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already exists; choose another place, remove it, or pass --overwrite")
    if target.is_symlink() and not target.exists():
        raise UserError(f"{target} is a link that leads nowhere; remove it or choose another place")
    work = target.with_name(f".{target.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        journal = open(work / ".journal", "a+")
    except OSError as error:
        raise UserError(f"can't write in {target.parent}: {error.strerror}; choose a directory you can write to, or "
                        "change its "
                        "permissions") from error
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        journal.close()
        raise UserError(f"another conversion is writing to {work}; wait for it or choose another output") from error
    for path in work.iterdir() if not resume else ():
        if path.name != ".journal":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return work, journal


def publish(result, target):
    """Rename `result` (a directory or file) to `target`, replacing what is there."""
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        os.rename(target, old)
        os.rename(result, target)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        os.rename(result, target)
    sync_directory(target.parent)


@contextlib.contextmanager
def resumable(target, fingerprint, resume=False, overwrite=False, result="."):
    """Yields a Job; afterwards `result` (a path inside its directory) is renamed to `target`. fingerprint: JSON data
    that is the same only for the same conversion. Raises UserError where `target` exists (unless `overwrite`) or can't
    be written."""
    target = Path(target).absolute()
    work, journal = open_directory(target, overwrite, resume)
    keep, job = False, None
    try:
        done = read_journal(work / ".journal", fingerprint) if resume else []
        journal.truncate(0)
        for line in (fingerprint, *done):
            journal.write(json.dumps(line) + "\n")
        journal.flush()
        job = Job(work, journal, done)
        yield job
        job.flush()
        job.close()
        for path in work.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        (work / ".journal").unlink()
        publish((work / result).resolve(), target)
    except KeyboardInterrupt:
        keep = True
        if job is not None:
            job.flush()
        print(f"interrupted; the same command with --resume goes on from {work}", file=sys.stderr)
        raise
    except OSError as error:
        keep = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not keep:
            raise
        raise UserError(f"the disk of {target.parent} is full; free some space, then the same command with --resume "
                        "goes on") from error
    finally:
        if job is not None:
            job.close()
        journal.close()
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
