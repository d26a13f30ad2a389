"""What the fault tests share: the real command as a process, killed at a chosen phase; what a finished run left; a small
disk; damage to files. Everything is drawn from seeds."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from conftest import ROOT
from mlx_grpo import newest_valid, read_metrics
from mlx_grpo.run_state import read_state
from test_trainer import numbers

COMMAND = [sys.executable, str(ROOT / "mlx_grpo.py"), "--config", str(ROOT / "configs/demo.toml")]
SMALL = {"max_steps": 6, "save_steps": 1, "eval_samples": 8, "eval_steps": 3, "batch_size": 2, "num_generations": 4,
         "max_train_samples": 64}
DEMO = {"save_steps": 1}                                           # the demo as it ships, with a checkpoint each step
KILLED_IN = ("rollout", "scoring", "update", "save", "rename")     # at least so often each, by `must`


def options(output, sizes=SMALL, **changes):
    values = {"output_dir": output, "run_name": "r"} | sizes | changes
    return sum((["--set", f"{name}={value}"] for name, value in values.items()), [])


def run(output, *more, timeout=280, **changes):
    return subprocess.run([*COMMAND, *options(output, **changes), *more], capture_output=True, text=True, timeout=timeout)


def left_by(run_dir):
    """What a finished run left, but for times and memory: every byte of the last checkpoint's arrays, metrics, texts."""
    last = (run_dir / "checkpoint-last").resolve()
    arrays = {file.name: file.read_bytes() for file in sorted(last.glob("*.safetensors"))}
    logs = {file.name: file.read_text() for file in sorted(run_dir.glob("*completions.jsonl"))}
    return arrays, [numbers(m) for m in read_metrics(run_dir)], logs


def kill_in(process, run_dir, phase, step, delay):
    """SIGKILL `delay` seconds after the process is seen in `phase` of `step` or of a later one; returns the last note of
    run_state.json when it died, or None where it ended before."""
    while process.poll() is None:
        note = read_state(run_dir)
        if note and note["pid"] == process.pid and phase in (note["phase"], writing(note)) and note["step"] >= step:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.0002)
    return read_state(run_dir) if process.wait() == -signal.SIGKILL else None


def writing(note):
    """"save" or "rename" where a checkpoint was being written in the background, else None."""
    return note["background"] if note["background"] in ("save", "rename") else None


def kill_and_resume(output, seed, kills, must=0, sizes=SMALL, **changes):
    """Start a run and kill it, `kills` times at phases and moments drawn from the seed (more, until each of KILLED_IN was
    hit `must` times), then let it finish. A run that finished before is followed by another one in the next directory.
    Never thrice in a row in one place: that counts as want of memory, and the run would go on in smaller parts.

    Returns (Counter of the phases it died in, [run directory])."""
    rng, deaths, finished = random.Random(seed), Counter(), []
    place, last, again = Path(output) / "0", (None, 1), False
    place.parent.mkdir(parents=True, exist_ok=True)
    while deaths.total() < kills or min(deaths[p] for p in KILLED_IN) < must:
        wanted = min((*KILLED_IN, "rewards", "sync", "log"), key=lambda phase: (deaths[phase], rng.random()))
        step = last[1] + (1 if again else rng.choice([0, 0, 1]))
        delay = rng.choice([0, rng.uniform(0, 0.005), rng.uniform(0, 0.05)])
        with open(place.with_suffix(".err"), "a") as errors:
            command = [*COMMAND, *options(place, sizes, **changes), "--resume"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        note = kill_in(process, place / "r", wanted, step, delay)
        if note is None:
            assert process.returncode == 0, place.with_suffix(".err").read_text()
            finished.append(place / "r")
            place = place.with_name(str(len(finished)))
        else:
            deaths[writing(note) or note["phase"]] += 1
        now = (note["phase"], note["step"]) if note else (None, 1)
        last, again = now, now == last
    done = run(place, "--resume", sizes=sizes, **changes)
    assert done.returncode == 0, done.stderr
    return deaths, [*finished, place / "r"]


def every_checkpoint_is_whole(run_dir):
    newest, skipped = newest_valid(run_dir)
    return newest is not None and not skipped


# ---- damage

def truncations(file):
    """{what: its length, None where the file is gone} of every way to cut a file short that differs for a reader: for
    safetensors around its header and inside each tensor, for JSON inside each field at the top."""
    content = file.read_bytes()
    found = {"gone": None, "empty": 0, "1 byte": 1, "cut in the middle": len(content) // 2, "no last byte": len(content) - 1}
    if file.suffix == ".safetensors":
        body = 8 + int.from_bytes(content[:8], "little")
        found |= {"cut in the header's length": 4, "no header": 8, "cut in the header": body // 2, "header only": body}
        for name, tensor in json.loads(content[8:body]).items():
            if name != "__metadata__":
                found[f"cut in {name}"] = body + sum(tensor["data_offsets"]) // 2
    elif file.suffix == ".json":
        found |= {f"cut in {field[1].decode()}": field.end() for field in re.finditer(rb'^  "(.*?)":', content, re.M)}
    return {what: length for what, length in found.items() if length is None or length < len(content)}


def cut(file, length):
    if length is None:
        file.unlink()
    else:
        os.truncate(file, length)


def flip(directory, rng):
    """Change one byte of one file; returns where."""
    file = rng.choice(sorted(p for p in directory.iterdir() if p.is_file()))
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= rng.randrange(1, 256)
    file.write_bytes(content)
    return f"byte {place} of {file.name}"


# ---- disks of its own

def own_namespace(script, timeout=250):
    """Run a shell script as root of its own user and mount namespace, where it may mount."""
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=timeout)


def may_mount():
    return bool(shutil.which("unshare")) and own_namespace("mount -t tmpfs -o size=100k tmpfs /mnt").returncode == 0


def on_a_disk(place, size, command, between, again, meanwhile=""):
    """[(exit code, standard error, copy of its files)] of `command` on a tmpfs of that size at `place`, and of `again`,
    after the shell line `between`. The line `meanwhile` is run once the command has begun step 3 of its run `r`."""
    place.mkdir()
    begun = f"while kill -0 $pid 2>/dev/null && ! grep -qs '^step 2/' {place}.first.out; do sleep 0.02; done; {meanwhile}\n"
    step = lambda name, argv, during="": (f"{shlex.join(argv)} >{place}.{name}.out 2>{place}.{name}.err & pid=$!\n{during}"
                                          f"wait $pid; echo $? >{place}.{name}.code; cp -a {place} {place}.{name}\n")
    done = own_namespace(f"mount -t tmpfs -o size={size} tmpfs {place}\n{step('first', command, begun if meanwhile else '')}"
                         f"{between}\n{step('second', again)}")
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [(int(Path(f"{place}.{name}.code").read_text()), Path(f"{place}.{name}.err").read_text(), Path(f"{place}.{name}"))
            for name in ("first", "second")]
