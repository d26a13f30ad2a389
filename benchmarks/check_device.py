"""
Does it work on this machine's device, and how fast; what `make check-metal` runs. Made for a Mac, works anywhere.

    python benchmarks/check_device.py                        # tests, then figures in float32 and in the device's own dtype
    python benchmarks/check_device.py --no-tests --shape qwen2.5-0.5b --vocab 151936 --num-generations 16
    python benchmarks/check_device.py --tests tests/test_loss.py

Prints machine and versions; runs the tests of sampling, log-probs, losses and training on the default device, the parity
group among them; then a few GRPO steps of a random model: tokens a second, memory, and the gap between sampler and
trainer (mean difference of a sampled token's log-prob, nats), which must stay below --max-gap. Exit code 1 where a test
or the gap fails. The figures are stored as device_NAME.json.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import (ROOT, SHAPES, Peer, alternate, bench_parser, device, machine,  # noqa: E402
                               random_model, store, work)
from mlx_grpo import run_command  # noqa: E402
from mlx_grpo.run_files import versions  # noqa: E402

TESTS = ("test_sampling", "test_rollouts", "test_head", "test_loss", "test_objective", "test_trainer", "test_optimizers",
         "test_nanochat_model")
MAX_GAP = {"float32": 1e-4, "bfloat16": 0.05}       # nats; the second is what bfloat16 rounds away in a logit


def run_tests(paths):
    """pytest's last line and whether all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:], file=sys.stderr)
    return (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1], done.returncode == 0


def main():
    parser = bench_parser(__doc__, 3)
    parser.add_argument("--tests", nargs="+", metavar="FILE", default=[f"tests/{name}.py" for name in TESTS])
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--dtypes", nargs="+", choices=MAX_GAP, help="default: float32, and bfloat16 on Metal and CUDA")
    parser.add_argument("--max-gap", type=float, help="nats (default: 1e-4 in float32, 0.05 in bfloat16)")
    parser.add_argument("--shape", choices=SHAPES, default="7m")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    o = parser.parse_args()
    if o.quick:
        o.rounds, o.max_tokens, o.num_generations = 1, 4, 2
    print("\n".join(f"{key}: {value}" for key, value in (machine() | versions()).items()), flush=True)
    text, well = ("not run", True) if o.no_tests else run_tests(o.tests)
    print(f"tests: {text}", flush=True)
    rows = {}
    for dtype in o.dtypes or ["float32"] + ["bfloat16"] * (device() != "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            options = work(random_model(folder, o.shape, o.vocab, dtype), prompts=2, G=o.num_generations, dtype=dtype,
                           max_tokens=o.max_tokens, threads=o.threads)
            rows |= alternate({dtype: Peer("ours", options)}, o.rounds)
        r, most = rows[dtype], o.max_gap or MAX_GAP[dtype]
        well &= r["gap"] <= most
        print(f"{dtype}: {r['tokens'] / r['rollout_s']:.0f} tokens/s in rollouts, {r['median_s']:.2f} s a step, peak "
              f"{r['peak_gb']:.2f} GB, gap {r['gap']:.2g} nats (at most {most:g})", flush=True)
    store(f"device_{device()}", rows, {"tests": text, **{k: vars(o)[k] for k in ("shape", "vocab", "num_generations",
                                                                                "max_tokens", "rounds")}}, o.out)
    print("well" if well else "not well: see above")
    return 0 if well else 1


if __name__ == "__main__":
    run_command(main)
