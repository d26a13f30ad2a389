"""
Running a program that a model wrote, with what is kept from it: time, memory, disk, network, your files. How much of that
can be enforced depends on the system; `find_isolation` says which way there is here, `enforced` what it holds back.
"""

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
SEATBELT = """(version 1)(allow default)(deny network*)(deny process-fork)(deny file-write*)
(allow file-write* (subpath "{box}") (literal "/dev/null"))
(deny file-read* (subpath "{home}"))(allow file-read* {readable} (subpath "{box}"))"""
ENFORCED = {  # isolation -> what is enforced, for people; {s}, {mb}, {disk}: the limits
    "linux": "time {s:g} s, memory {mb} MB a process, {disk} MB written, 64 processes (unless run as root), no network, no "
             "file of yours, an own temporary directory in memory (namespaces and resource limits)",
    "macos": "time {s:g} s, memory {mb} MB (watched), one process, {disk} MB a file, no network, no reading in your home, "
             "writing only in an own temporary directory (sandbox-exec)",
    "none": "time {s:g} s, memory {mb} MB a process (Linux only), {disk} MB a file, an own temporary directory; NOT "
            "enforced: network, and your files: programs run with your rights"}


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0
    memory_mb: int = 512
    disk_mb: int = 64
    processes: int = 64


class SandboxError(Exception):
    """The sandbox could not be set up, so that the program was not run."""


def enforced(isolation, limits):
    return ENFORCED[isolation].format(s=limits.seconds, mb=limits.memory_mb, disk=limits.disk_mb)


@functools.cache
def find_isolation():
    """("linux" or "macos", "") where programs can be isolated here, tried out; else ("none", why not)."""
    kind = {"linux": "linux", "darwin": "macos"}.get(sys.platform)
    if kind is None:
        return "none", f"there is no sandbox for {sys.platform}"
    try:
        code, text = run_program("print('ran')", "", Limits(seconds=30), kind)
    except (SandboxError, OSError) as error:
        return "none", str(error)
    return (kind, "") if (code, text) == (0, "ran\n") else ("none", f"a trial program gave {code}, {text!r}")


def readable_paths():
    """What a Python program reads: the system's directories and this Python's, without those inside others."""
    wanted = [*SYSTEM, *(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)), sys.prefix, sys.base_prefix]
    found = []
    for path in dict.fromkeys(wanted):
        if os.path.lexists(path) and not any(path.startswith(f"{p}/") for p in found):
            found.append(path)
    return found


def run_program(program, stdin, limits, isolation):
    """(exit code, standard output) of a Python program; None for a code where it ran out of time or (macOS) memory. Output
    beyond disk_mb is cut. Raises SandboxError where the isolation can't be set up."""
    with tempfile.TemporaryDirectory(prefix="mlx_grpo_box_") as box:
        box, paths = os.path.realpath(box), readable_paths()
        wrapper = []
        if isolation == "macos":
            readable = " ".join(f'(subpath "{path}")' for path in paths)
            profile = SEATBELT.format(box=box, home=Path.home(), readable=readable)
            wrapper = ["/usr/bin/sandbox-exec", "-p", profile]
        inner = os.path.join(box, "inner")
        os.mkdir(inner)
        job = {"program.py": program, "stdin": stdin, "box": inner, "readable": paths, "isolation": isolation,
               "wrapper": wrapper, "python": sys.executable, "cpu": math.ceil(limits.seconds) + 1, "memory": limits.memory_mb << 20,
               "disk": limits.disk_mb << 20, "processes": limits.processes}
        with open(os.path.join(box, "out"), "w+b") as out, open(os.path.join(box, "err"), "w+b") as err:
            process = subprocess.Popen([sys.executable, "-I", "-S", str(CHILD)], stdin=subprocess.PIPE, stdout=out,
                                       stderr=err, cwd=box, start_new_session=True)
            try:
                with contextlib.suppress(BrokenPipeError):                 # it failed before it read: err says why
                    process.stdin.write(json.dumps(job).encode())
                    process.stdin.close()
                code = wait(process, limits)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)                 # and what it left running
                process.wait()
            err.seek(0)
            if trouble := err.read().decode(errors="replace").strip():
                raise SandboxError(trouble.splitlines()[-1])
            out.seek(0)
            return code, out.read(limits.disk_mb << 20).decode(errors="replace")


def wait(process, limits):
    """The exit code, or None when the time is over, or on macOS, whose kernel limits no memory, too much memory is used."""
    deadline = time.monotonic() + limits.seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            return process.wait(min(left, 0.1) if sys.platform == "darwin" else left)
        except subprocess.TimeoutExpired:
            if sys.platform == "darwin" and resident_mb(process.pid) > limits.memory_mb:
                return None
    return None


def resident_mb(pid):
    """Memory that a process holds, MB; 0 for one that has ended."""
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(found.stdout.strip() or 0) / 1024
