"""
What a run is doing, in run_state.json of its directory, noted before each phase: so that after a death without a word
the next process knows where it happened and how large the arrays were.

A note is one write of 1024 bytes at a fixed place, about 5 microseconds: whole after a kill at any moment, and without
need of room on a disk that has filled up. `ended` is null while the run lives, and after a death.
"""

import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx

from mlx_grpo import UserError
from mlx_grpo.memory_limit import memory_limit_bytes

NAME, CRASH = "run_state.json", "crash.txt"
SIZE = 1024      # bytes of the record
MEASURED = ("rollout", "scoring", "update")      # phases whose peak memory is logged
ALLOCATION = "out of memory"      # how a run ended whose allocation failed with an exception


class RunState:
    """Notes the phases of a run. One that isn't `kept_in` a directory (a trainer without files) does nothing."""

    def __init__(self):
        self.path = self.file = None
        self.record, self.background, self.turn = {}, None, threading.Lock()
        self.peaks = {}          # phase -> the peak of MLX's memory when it last ran, bytes
        self.peak = 0            # of the whole run

    def __call__(self, phase, **shapes):
        """Note that `phase` begins. shapes: whatever tells how large its arrays are; `step` stays until it is given
        again. Raises UserError where the run directory has vanished, so that nothing is written into a new one."""
        if threading.current_thread() is not threading.main_thread():      # a checkpoint is being written meanwhile
            self.background = phase
        else:
            self.begin(phase, shapes)
        if self.file is not None:
            self.check_place()
            self.write()

    def begin(self, phase, shapes):
        self.measure()
        kept = {name: self.record[name] for name in ("step", "pid", "machine", "limits", "deaths", "memory_limit")
                if name in self.record}
        self.record = kept | {"phase": phase, "memory": self.peak, "ended": None} | shapes

    def measure(self):
        """The peak of the phase that ends; MLX has one counter, which starts again here."""
        now = mx.get_peak_memory()
        self.peak, self.peaks[self.record.get("phase", "start")] = max(self.peak, now), now
        mx.reset_peak_memory()

    def peaks_gb(self):
        """A step's metrics: the peak of the run so far, and of the phases of training when they last ran, GB."""
        peaks = {f"memory/{name}_peak_gb": self.peaks[name] / 1e9 for name in MEASURED if name in self.peaks}
        return {"peak_gb": max(self.peak, mx.get_peak_memory()) / 1e9} | peaks

    def check_place(self):
        try:
            there = os.stat(self.path).st_ino
        except OSError:
            there = None
        if there != os.fstat(self.file).st_ino:
            raise UserError(f"{self.path.parent} has vanished or was replaced while the run was going (step "
                            f"{self.record.get('step', 0)}): put it back and go on with --resume")

    def write(self):
        with self.turn:
            text = json.dumps(self.record | {"background": self.background})
            assert len(text) < SIZE, f"the note has {len(text)} bytes: {text}"
            os.pwrite(self.file, text.ljust(SIZE - 1).encode() + b"\n", 0)

    def end(self, how):
        """Note how the run ended; after that nothing is taken for a death."""
        self.record["ended"] = how
        if self.file is not None:
            self.write()

    @contextlib.contextmanager
    def kept_in(self, run_dir, memory):
        """While it lasts, notes go to the run directory, with the `Memory` that is known of earlier deaths; crashes of
        the interpreter and of MLX leave their place in crash.txt. An allocation that fails becomes a UserError."""
        self.path = Path(run_dir) / NAME
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            crash = open(self.path.with_name(CRASH), "w")
            self.record = {"pid": os.getpid(), "machine": machine(), "memory_limit": memory_limit_bytes(), **memory}
            self("start", step=0)
        except OSError as error:
            raise UserError(f"can't write {self.path}: {error.strerror}; make room or choose another output_dir") from error
        watched = not faulthandler.is_enabled()           # unless someone does already
        if watched:
            faulthandler.enable(file=crash)
        how = "failed"
        try:
            yield
            how = "done"
        except (MemoryError, RuntimeError) as error:
            if not is_allocation_failure(error):
                raise
            how = ALLOCATION
            raise UserError(f"out of memory in phase {self.record['phase']!r} of step {self.record.get('step')} ({error}); go on "
                            "with --resume auto, which takes smaller parts") from error
        finally:
            if watched:
                faulthandler.disable()
            crash.close()
            with contextlib.suppress(OSError):            # a directory that has vanished or turned read-only; it says nothing
                self.path.with_name(CRASH).unlink()
            if self.record["ended"] is None:
                self.end(how)
            os.close(self.file)
            self.file = None


def is_allocation_failure(error):
    """Whether an exception means that memory was short."""
    signs = ("[malloc", "[metal::malloc", "insufficient memory", "out of memory", "unable to allocate", "bad_alloc")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def read_state(run_dir):
    """The last note of a run, or None where there is none that can be read."""
    try:
        return json.loads((Path(run_dir) / NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):      # ValueError: a power cut may have left zeros
        return None


def read_crash(run_dir):
    """The first line of crash.txt ("Fatal Python error: Aborted"), or ""."""
    try:
        return (Path(run_dir) / CRASH).read_text(errors="replace").partition("\n")[0]
    except FileNotFoundError:
        return ""


def machine():
    """{"boot": an id that changes when the machine starts, "oom_kills": processes that Linux has ended for want of
    memory since then, null elsewhere}."""
    if sys.platform == "darwin":
        boot = subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True).stdout.strip()
        return {"boot": boot, "oom_kills": None}
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "oom_kills": int(counters["oom_kill"]) if "oom_kill" in counters else None}
