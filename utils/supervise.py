"""
`--supervise`: runs the training command as a process of its own, and starts it again with --resume after a death by
SIGKILL, SIGSEGV, SIGABRT or SIGBUS, an allocation that failed, or an exit in the midst of a phase (OpenBLAS, when it gets
no memory). Out of memory ends a process in one of these ways, and the next start then takes smaller parts
(out_of_memory.py).
"""

import json
import os
import signal
import subprocess
import sys

import mlx_grpo
from mlx_grpo.out_of_memory import after_death, died
from mlx_grpo.run_dir import find_run_dir
from mlx_grpo.run_guard import newest_valid, signals_to
from mlx_grpo.run_state import read_state

DEATHS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
FRUITLESS = 5      # starts in a row that end in a death, without a new checkpoint or smaller parts


def supervise(args, config):
    """Run the training command that `args` came from until it ends otherwise than by a death; returns its exit code
    (128 + n for a signal). SIGINT and SIGTERM are passed on, and end it as they would alone."""
    run_dir, _, config = find_run_dir(config, args.resume)
    sets = [*args.set, f"run_name={json.dumps(config.run_name)}"]      # {n} is a number from here on
    argv = [args.command, *(["--config", args.config] if args.config else []), *sum((["--set", s] for s in sets), [])]
    resume, fruitless, before = args.resume, 0, None
    while True:
        code, told, pid = run_once([sys.executable, mlx_grpo.__file__, *argv, *(["--resume", resume] if resume else [])])
        record = read_state(run_dir)
        dead = -code in DEATHS or (code > 0 and died(record) and record["pid"] == pid)
        if not dead or told:
            return 128 - code if code < 0 else code
        saved = newest_valid(run_dir)[0]
        now = saved, after_death(run_dir, config, say=False)[1].get("limits")
        fruitless, before = 1 if now != before else fruitless + 1, now
        name = signal.Signals(-code).name if code < 0 else "out of memory" if record["ended"] else f"exit code {code}"
        if fruitless == FRUITLESS:
            print(f"the run died ({name}) {FRUITLESS} times in a row without a new checkpoint: giving up; what it was doing is in "
                  f"{run_dir / 'run_state.json'}", file=sys.stderr)
            return 128 - code if code < 0 else code
        resume = "auto" if saved or not resume else resume
        print(f"the run died ({name}): starting it again from {saved.name if saved else 'the beginning'}", file=sys.stderr, flush=True)


def run_once(command):
    """(return code, whether it was told to stop, process id) of the command. It has a process group of its own, so that Ctrl-C on
    the terminal reaches it once, through here."""
    process, told = subprocess.Popen(command, process_group=0), []

    def pass_on(number, frame):
        told.append(number)
        os.kill(process.pid, number)

    with signals_to(pass_on):
        return process.wait(), bool(told), process.pid
