"""
Try a grid or a random sample of option values: one run after another, each in a process of its own.

    python mlx_grpo.py sweep --config my.toml --sweep sweep.toml --dry-run      what would be run
    python mlx_grpo.py sweep --config my.toml --sweep sweep.toml                run it, or go on with it
    python mlx_grpo.py sweep --config my.toml --sweep sweep.toml --max-runs 4   four runs now, the rest later

A run that crashes doesn't end the sweep. The same command again skips what is finished and resumes what was
interrupted. At the end: results.md, results.json, curves.svg and report.html (docs/sharing.md).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx_grpo
from mlx_grpo import ConfigError, UserError, add_config_arguments, configured_callbacks, find_rewards, load_config
from mlx_grpo.report import write_file
from mlx_grpo.run_guard import run_lock, signals_to
from mlx_grpo.sweep_results import label, write_results
from mlx_grpo.sweep_space import NOT_SWEPT, combinations, key_of, read_space

STATE = "sweep.json"
LINE = 300           # characters of a reason


def add_arguments(parser):
    add_config_arguments(parser)
    parser.add_argument("--sweep", metavar="FILE", required=True, help="TOML: method, metric and the [values] to try")
    parser.add_argument("-o", "--output", metavar="DIR", help="where runs and results go (default: output_dir/sweep-NAME)")
    parser.add_argument("--max-runs", type=int, metavar="N", help="start at most so many runs now")
    parser.add_argument("--retry", action="store_true", help="run again what failed, from its last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="list the runs; nothing is written")


def set_arguments(values):
    """--set arguments for these values. JSON of a text, number or list is TOML as well; a table is written as one."""
    from mlx_grpo.make_docs import toml

    return [part for name, value in values.items() for part in ("--set", f"{name}={toml(value)}")]


def planned(args, space):
    """(base, [(values, trouble)], output_dir). base: what the configuration sets beside the sweep's values. trouble: why
    these values contradict each other or the base, or None. Raises ConfigError where all of them do."""
    plan, first = [], None
    for values in combinations(space):
        try:
            config, sources = load_config(args.config, [*args.set, *set_arguments(values)[1::2]])
        except ConfigError as error:
            plan.append((values, str(error)))
            continue
        first = first or (config, sources)
        plan.append((values, None))
    if first is None:
        raise ConfigError(plan[0][1])
    config, sources = first
    find_rewards(config.rewards, config.reward_options), configured_callbacks(config)      # a typo is told once
    base = {name: vars(config)[name] for name, source in sources.items()
            if source != "default" and not source.startswith("recipe") and name not in (*space.values, *NOT_SWEPT)}
    return base, plan, config.output_dir


class Sweep:
    """The runs of a sweep directory and what became of them, in sweep.json. status of a run: planned, running (or
    interrupted, to be resumed), finished, failed with a reason."""

    def __init__(self, directory, space, base, plan):
        self.directory, self.space, self.file = directory, space, directory / STATE
        record = self.read() if self.file.exists() else {"format": 1, "base": base, "runs": []}
        changed = sorted(name for name in base.keys() | record["base"].keys() if base.get(name) != record["base"].get(name))
        if changed:
            raise UserError(f"{directory} was begun with another configuration ({', '.join(changed)} differ), so its runs "
                            "can't be compared with new ones; set it back, or choose another --output")
        self.base, self.runs = record["base"], record["runs"]
        known = {key_of(run["values"]): run for run in self.runs}
        self.plan = []
        for values, trouble in plan:
            run = known.get(key_of(values))
            if run is None:
                run = {"name": f"run-{len(self.runs) + 1:03d}", "values": values, "status": "planned", "reason": None,
                       "seconds": 0.0}
                self.runs.append(run)
            if trouble:
                run |= {"status": "failed", "reason": trouble}
            self.plan.append(run)

    def read(self):
        try:
            record = json.loads(self.file.read_text(encoding="utf-8"))
            if record["format"] != 1 or not isinstance(record["runs"], list):
                raise ValueError("unknown format")
            return record
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file}: not the state of a sweep ({error}); mend it, or choose another --output"
                            ) from error

    def save(self):
        record = {"format": 1, "base": self.base, "runs": self.runs}
        write_file(self.file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def left(self, retry):
        """The planned runs that are still to be done."""
        done = {"finished"} if retry else {"finished", "failed"}
        return [run for run in self.plan if run["status"] not in done]


def last_words(log, code):
    """Why a run failed: its last "error: ..." line, else the signal that ended it, else its last line."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors[-1] if errors and code == 2 else lines[-1] if lines else f"exit code {code}")[:LINE]


def passed_on(children, stopped):
    """While it lasts, SIGINT and SIGTERM go to the `children` as SIGTERM, which lets a run save first, and their numbers to
    `stopped`."""
    def handle(number, frame):
        stopped.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM)

    return signals_to(handle)


def run_child(command, log, lock, children, stopped):
    """The exit code of a run whose output goes to the file `log`. It inherits the sweep's lock: should the sweep be killed,
    the lock holds until the run has ended. It has a session of its own, so that Ctrl-C reaches it once, by way of us."""
    with open(log, "ab") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                 pass_fds=[lock.fileno()], start_new_session=True,
                                 env=os.environ | {"PYTHONUNBUFFERED": "1"})
        children[:] = [child]
        if stopped:                       # while it was being started
            child.send_signal(signal.SIGTERM)
        return child.wait()


def command_of(sweep, run, args):
    """The command line of a run. --resume auto starts what has not begun, and continues what has."""
    place = {"output_dir": str(sweep.directory), "run_name": run["name"]}
    return [sys.executable, str(Path(mlx_grpo.__file__).resolve()), sweep.space.command,
            *(["--config", args.config] if args.config else []), *(part for text in args.set for part in ("--set", text)),
            *set_arguments(run["values"] | place), "--resume", "auto"]


def run_all(sweep, args, lock):
    """Run what is left, at most --max-runs of it. Returns the number of the signal that ended it, or 0."""
    todo, children, stopped = sweep.left(args.retry), [], []
    with passed_on(children, stopped):
        for i, run in enumerate(todo[:args.max_runs]):
            log = sweep.directory / f"{run['name']}.log"
            print(f"{run['name']} ({len(todo) - i} to do): {label(run['values'])} | {log}", flush=True)
            run |= {"status": "running", "reason": None}
            sweep.save()
            started = time.monotonic()
            code = run_child(command_of(sweep, run, args), log, lock, children, stopped)
            run["seconds"] = round(run["seconds"] + time.monotonic() - started, 1)
            if code == 0:
                run["status"] = "finished"
            elif stopped or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                run["status"] = "interrupted"
            else:
                run |= {"status": "failed", "reason": last_words(log, code)}
            sweep.save()
            reason = f": {run['reason']}" if run["reason"] else ""
            print(f"{run['name']} {run['status']}{reason} ({run['seconds']:.0f} s)", flush=True)
            if stopped:
                return stopped[0]
    return 0


def run(args):
    """Try a grid or a random sample of option values: one run after another, each in a process of its own. The same
    command again skips what is finished and resumes what was interrupted (docs/sharing.md).

    examples:
      python mlx_grpo.py sweep --config my.toml --sweep sweep.toml --dry-run
      python mlx_grpo.py sweep --config my.toml --sweep sweep.toml --max-runs 4
    """
    if args.max_runs is not None and args.max_runs < 1:
        raise UserError(f"--max-runs must be at least 1, got {args.max_runs}")
    space = read_space(args.sweep)
    base, plan, output = planned(args, space)
    directory = Path(args.output or Path(output) / f"sweep-{Path(args.sweep).stem}")
    sweep = Sweep(directory, space, base, plan)        # before anything is written: another sweep's directory is refused
    if args.dry_run:
        for one in sweep.plan:
            reason = f" | {one['reason']}" if one["reason"] else ""
            print(f"{one['name']} {one['status']:12} {label(one['values'])}{reason}")
        print(f"{len(sweep.left(args.retry))} of {len(sweep.plan)} runs to do in {directory}")
        return 0
    with run_lock(directory, "--output", "--output") as lock:
        sweep = Sweep(directory, space, base, plan)
        sweep.save()
        number = run_all(sweep, args, lock)
        text, files = write_results(sweep.runs, space, directory)
    print(f"\n{text}\n" + "\n".join(map(str, files)))
    failed, left = [one for one in sweep.plan if one["status"] == "failed"], sweep.left(False)
    if left:
        print(f"{len(left)} runs are left; the same command goes on with them", file=sys.stderr)
    if failed:
        print(f"{len(failed)} runs failed; --retry runs them again, their logs are in {directory}", file=sys.stderr)
    return 128 + number if number else int(bool(failed))
