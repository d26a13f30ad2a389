"""
Curves of a GRPO step of ours: seconds and peak memory by group size, vocabulary and completion length.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --only completion --rounds 2

One prompt of 64 tokens; what isn't varied is a group of 16, a vocabulary of 8192 and 64 tokens a completion. Each point
is a fresh process: one step that doesn't count, then --rounds. write_figures.py draws docs/scaling.svg.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import Peer, alternate, bench_parser, random_model, store, work  # noqa: E402
from mlx_grpo import run_command  # noqa: E402

BASE = {"group": 16, "vocabulary": 8192, "completion": 64}
CURVES = {"group": [4, 8, 16, 32, 64], "vocabulary": [8192, 32768, 65536, 131072, 151936],
          "completion": [32, 64, 128, 256, 512]}


def main():
    parser = bench_parser(__doc__, 1)
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES))
    o = parser.parse_args()
    curves = {"group": [2, 4], "vocabulary": [8192, 16384], "completion": [4, 8]} if o.quick else CURVES
    base = {"group": 2, "vocabulary": 8192, "completion": 4} if o.quick else BASE
    rows, measured = [], {}
    for what in o.only:
        for value in curves[what]:
            size = base | {what: value}
            key = tuple(size.values())
            if key not in measured:
                print(", ".join(f"{name} {n}" for name, n in size.items()), flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    options = work(random_model(folder, vocab_size=size["vocabulary"]), prompts=1, G=size["group"],
                                   max_tokens=size["completion"], threads=o.threads)
                    measured[key] = alternate({"ours": Peer("ours", options)}, o.rounds)["ours"]
            rows.append({"curve": what, **size, **measured[key]})
    store("scaling", rows, {"prompt_tokens": 64, **base, "threads": o.threads, "rounds": o.rounds}, o.out)


if __name__ == "__main__":
    run_command(main)
