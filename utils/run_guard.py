"""
What keeps a run whole: one process per run directory, signals that end it after a checkpoint, links to the last and best
checkpoints, old ones removed, and which checkpoint a resume may take.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from mlx_grpo import ConfigError, UserError
from mlx_grpo.files import disk_errors
from mlx_grpo.manifest import check_manifest

# Options that may change between a checkpoint and its resume: how long, how often, how much is written.
FREE_TO_CHANGE = {
    "num_epochs", "max_steps", "logging_steps", "log_jsonl", "log_token_details", "save_steps", "save_total_limit",
    "save_best", "eval_steps", "eval_samples", "eval_every_updates", "eval_subset_size", "eval_max_new_tokens",
    "eval_temperature", "watch_idle", "watch_target", "output_dir", "run_name", "max_reward_errors", "max_bad_steps",
    "rollout_batch_size", "use_compile", "callbacks", "health", "live", "report_to", "save_in_background",
    "max_tokens_per_microbatch", "reward_workers"}


@contextlib.contextmanager
def run_lock(run_dir, other="output_dir", name="--set run_name=NAME"):
    """Hold a run directory (made if need be) for this process; yields the open lock file. The lock is the kernel's and dies
    with the process, and with every process that inherited the file. Raises UserError, naming the options `other` and
    `name` as the way out, where another process holds it or the directory can't be written."""
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(run_dir) / ".lock", "a+")
    except OSError as error:
        raise UserError(f"can't write in {run_dir}: {error.strerror}; choose another {other}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(f"{run_dir} is in use by process {file.read().strip() or '?'}; wait for it, or choose another "
                            f"{name}") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


@contextlib.contextmanager
def run_lock_or_nothing(run_dir, started):
    """run_lock, and where it or the block ends in a UserError before `started()`, a run directory made here is taken away
    again, with the empty directories above it: once what the error complains of is mended, the same command can be given
    again. Files go only while the lock is held, so that a process that is refused never takes away the run of another."""
    whole = Path(run_dir).absolute()
    made = [path for path in [whole, *whole.parents] if not os.path.lexists(path)]
    try:
        with run_lock(run_dir) as lock:
            try:
                yield lock
            except UserError:
                if made and not started():
                    shutil.rmtree(whole, ignore_errors=True)
                raise
    except UserError:
        for path in made:
            with contextlib.suppress(OSError):             # not empty, or never made: it stays as it is
                path.rmdir()
        raise


def in_use(run_dir):
    """Whether a living process holds the run directory."""
    try:
        with open(Path(run_dir) / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:                     # there is none, or it can't be read: run_lock tells
        return False
    return False


@contextlib.contextmanager
def signals_to(handle):
    """While it lasts, SIGINT and SIGTERM call handle(number, frame)."""
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_on_signals(trainer):
    """SIGINT and SIGTERM let the step finish, after which the trainer saves a checkpoint and stops; a second one ends the
    process at once, which leaves what is on disk whole as well."""
    def handle(number, frame):
        if trainer.signalled:
            trainer.phase.end("stopped")
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")           # the cursor, which the live view hides
            os._exit(128 + number)
        trainer.signalled = number
        if trainer.world.size == 1:            # else all processes agree on it after the step
            trainer.interrupted = number
        print(f"{signal.Signals(number).name}: finishing the step, then saving; once more to end at once", file=sys.stderr, flush=True)

    return signals_to(handle)


def checkpoints_of(run_dir):
    """The checkpoint-N directories of a run, oldest first, whole or not; links left out."""
    found = [p for p in Path(run_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=lambda p: int(p.name.removeprefix("checkpoint-")))


def newest_valid(run_dir):
    """(the newest checkpoint whose manifest fits, or None; ["checkpoint-8: what is wrong with it", ...] of newer ones)."""
    skipped = []
    for path in reversed(checkpoints_of(run_dir)):
        if not (trouble := check_manifest(path)):
            return path, skipped
        skipped.append(f"{path.name}: {trouble}")
    return None, skipped


def point_to(run_dir, name, checkpoint):
    """The link `name` in the run directory leads to the checkpoint; replaced in one step."""
    work = Path(run_dir) / f".{name}.tmp"
    with disk_errors(Path(run_dir) / name):
        work.unlink(missing_ok=True)
        work.symlink_to(Path(checkpoint).name)
        os.replace(work, Path(run_dir) / name)


def set_aside(checkpoint):
    """Give a checkpoint-N that isn't whole another name, so that a new one can have its own; says so."""
    if not checkpoint.exists() or not (trouble := check_manifest(checkpoint)):
        return
    number = next(n for n in range(1, 10_000) if not checkpoint.with_name(f"{checkpoint.name}.damaged-{n}").exists())
    kept = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    os.rename(checkpoint, kept)
    print(f"{checkpoint} is not whole ({trouble}); kept as {kept.name}", file=sys.stderr)


def tidy(run_dir):
    """Remove what a process left that was killed while it saved; a checkpoint that was about to be replaced gets its name
    back. For the process that holds the run directory."""
    for path in sorted(Path(run_dir).glob(".checkpoint-*")):
        name, kind = re.fullmatch(r"\.(checkpoint-[a-z0-9]+)(?:\.\w+)*?\.(tmp|old|removed)", path.name).groups()
        with disk_errors(path):
            if kind == "old" and not path.with_name(name).exists():
                os.rename(path, path.with_name(name))
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def prune(run_dir, keep):
    """Remove all but the newest `keep` whole checkpoints; never those that a link leads to, never one that isn't whole."""
    whole = [path for path in checkpoints_of(run_dir) if check_manifest(path, quick=True) is None]
    linked = {path.resolve() for name in ("checkpoint-last", "checkpoint-best") if (path := Path(run_dir) / name).exists()}
    for path in whole[:-keep]:
        if path.resolve() not in linked:
            doomed = path.with_name(f".{path.name}.removed")      # gone under its own name in one step
            with disk_errors(path):
                os.rename(path, doomed)
                shutil.rmtree(doomed)


def check_same_run(before, now, path):
    """Raises ConfigError listing the options that differ between a checkpoint's configuration and today's, and matter."""
    differing = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in now
                 if name in before and name not in FREE_TO_CHANGE and before[name] != now[name]]
    if differing:
        raise ConfigError(f"{path} was made by another configuration ({'; '.join(differing)}); set these back, or start a new "
                          "run from it with --set model_name=" + str(path))
