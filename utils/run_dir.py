"""Where a run lives and what it continues from, and the record of how it was started. Part of mlx_grpo."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_grpo
from mlx_grpo import HERE, UserError
from mlx_grpo.run_files import versions
from mlx_grpo.run_guard import newest_valid


def find_run_dir(config, resume):
    """(run directory, checkpoint to resume from or None, config). {n} in run_name becomes the next free number, or the
    last used one with --resume auto. Raises UserError where the directory already holds a run and nothing says resume,
    and where --resume names no checkpoint."""
    checkpoint = None
    if resume not in (None, "auto"):
        whole = (Path(resume) / "trainer_state.json").exists()
        checkpoint = Path(resume) if whole else newest_valid(resume)[0]
        if not checkpoint:
            raise UserError(f"no checkpoint in {resume} (looked for trainer_state.json and checkpoint-*/trainer_state.json); "
                            "--resume auto takes the newest one of the run, or starts fresh where there is none")
    place = lambda n: Path(config.output_dir) / config.run_name.replace("{n}", str(n))
    if "{n}" in config.run_name:
        taken = [n for n in range(1, 10_000) if place(n).exists()]
        number = max(taken, default=0) + (resume != "auto" or not taken)
        if checkpoint:                       # of one of the numbered runs: that one goes on
            number = next((n for n in taken if place(n).resolve() == checkpoint.resolve().parent), number)
        config = replace(config, run_name=config.run_name.replace("{n}", str(number)))
    run_dir = Path(config.output_dir) / config.run_name
    if resume == "auto":
        checkpoint, skipped = newest_valid(run_dir)
        for line in skipped:
            print(f"skipped {line}", file=sys.stderr)
        print(f"resuming from {checkpoint}" if checkpoint else f"no checkpoint in {run_dir}: starting fresh", flush=True)
    elif (run_dir / "config.json").exists() and not (checkpoint and checkpoint.resolve().parent == run_dir.resolve()):
        raise UserError(f"{run_dir} already holds a run; continue it with --resume auto, or choose another "
                        "--set run_name=NAME (demo-{n} numbers the runs)")
    return run_dir, checkpoint, config


def git_revision():
    """The commit of this checkout with "+" for local changes, or None outside of one (an installed wheel)."""
    run = partial(subprocess.run, capture_output=True, text=True, cwd=HERE, timeout=10)
    try:
        if run(["git", "ls-files", "--error-unmatch", Path(mlx_grpo.__file__).name]).returncode:
            return None
        commit = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return commit + "+" * bool(run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None


def write_run_config(run_dir, config, sources, command):
    """The resolved configuration as JSON, with where each value came from, versions, device, git revision and seed."""
    record = {"command": command, "config": asdict(config), "sources": sources, "versions": versions(),
              "device": str(mx.default_device()), "git": git_revision(), "seed": config.seed}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"can't write in {run_dir}: {error.strerror}; choose another output_dir") from error
