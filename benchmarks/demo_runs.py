"""
Runs of the demo (configs/demo.toml) with other options, each as a command of its own, and tables of them in a document.
Used by objectives.py and fine_tuning.py.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))   # runs from a plain clone, from any directory

from mlx_grpo import MLXGRPOConfig, UserError, compute_dtype, read_metrics  # noqa: E402
from mlx_grpo.run_files import versions  # noqa: E402

import mlx.core as mx  # noqa: E402


@dataclass(frozen=True)
class Variant:
    """One run: its name in the table, and the options it sets on top of configs/demo.toml. A value "{name}" stands for a
    model that is made on the spot."""

    name: str
    options: dict

    def sets(self, **models):
        """As --set takes them, with the paths of the models filled in."""
        made = {f"{{{name}}}": str(path) for name, path in models.items()}
        return [f"{key}={as_text(made.get(value, value) if isinstance(value, str) else value)}"
                for key, value in self.options.items()]


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


def run_demo(variant, directory, **models):
    """Train `variant` in a process of its own, below `directory`. models: name=path. Returns {"before", "at_10", "after":
    exact match at steps 0, 10 and the last; "length_before", "length_after": tokens; "steps", "seconds" (whole command),
    "step_s" (median), "peak_mb", "trained" (parameters), "checkpoint"}. Raises UserError where the run fails."""
    command = [sys.executable, str(ROOT / "mlx_grpo.py"), "--config", str(ROOT / "configs/demo.toml")]
    for text in [f"output_dir={directory}", "run_name=run", *variant.sets(**models)]:
        command += ["--set", text]
    started = time.perf_counter()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if found.returncode:
        raise UserError(f"{variant.name}: {' '.join(command)} ended with {found.returncode}:\n{found.stderr.strip()}")
    seconds, run_dir = time.perf_counter() - started, Path(directory) / "run"
    metrics = read_metrics(run_dir)
    evaluations = [m for m in metrics if "eval/exact_match" in m]
    steps = [m for m in metrics if "step_time" in m]
    first, last = evaluations[0], evaluations[-1]
    return {"before": first["eval/exact_match"], "after": last["eval/exact_match"],
            "at_10": next(m["eval/exact_match"] for m in evaluations if m["step"] == 10),
            "length_before": first["eval/mean_length"], "length_after": last["eval/mean_length"],
            "steps": len(steps), "seconds": seconds, "step_s": statistics.median(m["step_time"] for m in steps),
            "peak_mb": steps[-1]["peak_gb"] * 1000, "checkpoint": run_dir / f"checkpoint-{len(steps)}",
            "trained": int(re.search(r": ([\d,]+) of [\d,]+ parameters", found.stdout)[1].replace(",", ""))}


def shown(options):
    """Options as a cell of a table."""
    return "<br>".join(f"`{key} = {as_text(value)}`" for key, value in options.items()) or "as shipped"


def where():
    """One line: machine and versions."""
    v = versions()
    device = "the CPU" if mx.default_device() == mx.cpu else "Metal" if mx.metal.is_available() else "CUDA"
    dtype = str(compute_dtype(MLXGRPOConfig())).rpartition(".")[2]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (f"{platform.system()} {platform.machine()}, {cores} cores shared with other work, so that times are rough; "
            f"MLX {v['mlx']} on {device} in {dtype}, mlx-lm {v['mlx-lm']}, Python {v['python']}")


def write_table(file, marker, lines):
    """Put lines between <!-- marker --> and <!-- /marker --> of a document. Raises UserError where these are missing."""
    text = Path(file).read_text(encoding="utf-8")
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if start not in text or end not in text:
        raise UserError(f"{file} has no {start} ... {end} to write the table into")
    before, after = text.split(start)[0], text.split(end)[1]
    Path(file).write_text(before + "\n".join([start, *lines, end]) + after, encoding="utf-8")


def table_rows(file, marker):
    """{first cell: row} of the table between the markers."""
    text = Path(file).read_text(encoding="utf-8")
    block = text.partition(f"<!-- {marker} -->")[2].partition(f"<!-- /{marker} -->")[0]
    rows = [line for line in block.splitlines() if line.startswith("| ")][1:]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}
