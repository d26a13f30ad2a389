"""
Peak memory of a training step by size of the vocabulary: ours against logits of every position at once.

    python benchmarks/training_memory.py                              # 8k to 152k, 16 rows of 128 tokens, then longer ones
    python benchmarks/training_memory.py --vocabularies 8192 65536 --tokens 64 --long 64

Each size is one step in a fresh process (mx.get_peak_memory), of the 7M-parameter model with that vocabulary; prompts
of 64 tokens, completions ready made. The full-logits path is ended when it goes beyond --limit-gb, and the size is
recorded as one that doesn't fit.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import OutOfMemory, Peer, alternate, bench_parser, random_model, store, work  # noqa: E402
from mlx_grpo import run_command  # noqa: E402


def main():
    parser = bench_parser(__doc__, 1)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768, 65536, 131072, 151936])
    parser.add_argument("--tokens", type=int, default=128, help="of each completion, for all vocabularies")
    parser.add_argument("--long", type=int, nargs="*", default=[256, 512], help="tokens, for the largest vocabulary too")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--limit-gb", type=float, default=min(16.0, 0.85 * os.sysconf("SC_PAGE_SIZE")
                                                              * os.sysconf("SC_PHYS_PAGES") / 1e9))
    o = parser.parse_args()
    if o.quick:
        o.vocabularies, o.tokens, o.long, o.rows = [8192, 16384], 8, [16], 2
    sizes = [(V, o.tokens) for V in o.vocabularies] + [(max(o.vocabularies), T) for T in o.long]
    rows = []
    for V, T in sizes:
        with tempfile.TemporaryDirectory() as folder:
            options = work(random_model(folder, vocab_size=V), prompts=1, G=o.rows, max_tokens=T, threads=o.threads,
                           limit_gb=o.limit_gb)
            row = {"vocab": V, "rows": o.rows, "tokens": T}
            print(f"vocabulary {V}, {o.rows} x {T} tokens", flush=True)
            for name, peer in (("ours", "our_training"), ("full", "full_logits")):
                try:
                    found = alternate({name: Peer(peer, options)}, 1, warmup=0)[name]
                    row |= {f"{name}_gb": found["peak_gb"], f"{name}_s": found["median_s"], "versions": found["versions"]}
                except OutOfMemory:
                    row |= {f"{name}_gb": None, f"{name}_s": None}
                    print(f"  {name}: more than {o.limit_gb:.0f} GB", flush=True)
            rows.append(row)
    store("training_memory", rows, {"limit_gb": o.limit_gb, "threads": o.threads}, o.out)


if __name__ == "__main__":
    run_command(main)
