"""
Rollouts from a quantised copy, at 2, 4 and 8 bits and in full, for a small and a larger model: the copy's size, tokens a
second, memory, the gap between sampler and trainer; and what the demo learns from them.

    python benchmarks/quantised_rollouts.py                           # with four runs of the demo, a minute each
    python benchmarks/quantised_rollouts.py --shapes 7m --no-demo

The gap is that of one step: the mean difference of a sampled token's log-prob, by the copy it was drawn from and by the
model that is trained, nats. Bits take turns.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import SHAPES, Peer, alternate, bench_parser, random_model, store, work  # noqa: E402
from benchmarks.demo_runs import Variant, run_demo  # noqa: E402
from mlx_grpo import frozen_copy, load_model, run_command  # noqa: E402

from mlx.utils import tree_flatten  # noqa: E402

BITS = (0, 8, 4, 2)     # 0 = full precision


def bit_options(bits):
    return {"quantize_for_rollouts": True, "rollout_bits": bits} if bits else {}


def copy_size(path, bits):
    """Bytes of the weights that are sampled from."""
    copy = frozen_copy(load_model(path)[0], bits=bits)
    return sum(array.nbytes for _, array in tree_flatten(copy.parameters()))


def main():
    parser = bench_parser(__doc__, 3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7m", "100m"])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--num-generations", type=int, default=16)
    parser.add_argument("--no-demo", action="store_true")
    o = parser.parse_args()
    if o.quick:
        o.shapes, o.rounds, o.max_tokens, o.num_generations, o.no_demo = ["7m"], 1, 4, 2, True
    rows = []
    for shape in o.shapes:
        with tempfile.TemporaryDirectory() as folder:
            size = dict(prompts=1, G=o.num_generations, max_tokens=o.max_tokens, threads=o.threads)
            path = random_model(folder, shape)
            options = {bits: work(path, **size, options=bit_options(bits)) for bits in BITS}
            found = alternate({f"{shape} at {bits} bits": Peer("our_rollouts", options[bits]) for bits in BITS}, o.rounds)
            for bits, row in zip(BITS, found.values()):
                gap = alternate({f"{shape} at {bits} bits, step": Peer("ours", options[bits])}, 1, warmup=0)
                rows.append({"shape": shape, "bits": bits, "copy_gb": copy_size(path, bits) / 1e9, **row,
                             "gap": next(iter(gap.values()))["gap"]})
    for bits in () if o.no_demo else BITS:
        with tempfile.TemporaryDirectory() as folder:
            demo = run_demo(Variant(f"demo at {bits} bits", bit_options(bits)), folder)
        rows.append({"shape": "demo", "bits": bits, **{key: demo[key] for key in ("before", "after", "step_s")}})
        print(f"  demo at {bits} bits: exact match {demo['before']:.3f} -> {demo['after']:.3f}", flush=True)
    store("quantised_rollouts", rows, {"max_tokens": o.max_tokens, "num_generations": o.num_generations,
                                       "threads": o.threads, "rounds": o.rounds}, o.out)


if __name__ == "__main__":
    run_command(main)
