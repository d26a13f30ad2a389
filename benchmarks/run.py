"""
All benchmarks, one after the other, then the figures into the documents; what `make bench` runs.

    python benchmarks/run.py                          # about 25 minutes on 2 quiet CPU cores
    python benchmarks/run.py --only grpo_step rollouts
    python benchmarks/run.py --quick --out /tmp/trial # shows in two minutes that everything runs; measures nothing

Each is a script of its own with --help; its raw figures go to benchmarks/results/NAME.json.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import RESULTS, ROOT  # noqa: E402
from mlx_grpo import UserError, run_command  # noqa: E402

SCRIPTS = ("grpo_step", "rollouts", "training_memory", "ablation", "scaling", "quantised_rollouts")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--lora-python", type=Path, help="the interpreter of an environment with mlx-lm-lora")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    for name in o.only:
        started = time.perf_counter()
        command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), "--out", str(o.out.resolve())]
        command += ["--quick"] * o.quick
        command += ["--lora-python", str(o.lora_python)] if o.lora_python and name == "grpo_step" else []
        print(f"{name}.py", flush=True)
        if code := subprocess.run(command).returncode:
            raise UserError(f"benchmarks/{name}.py ended with {code}; the results before it are written")
        print(f"{name}.py took {time.perf_counter() - started:.0f} s\n", flush=True)
    if o.out.resolve() == RESULTS and not o.quick:
        return subprocess.run([sys.executable, str(ROOT / "benchmarks/write_figures.py")]).returncode


if __name__ == "__main__":
    run_command(main)
