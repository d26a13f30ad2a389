"""
Each fast path turned off, one option a row: seconds and memory of a GRPO step. And shared-prefix training by itself.

    python benchmarks/ablation.py                                     # all rows, then the long prompt
    python benchmarks/ablation.py --only prefix_sharing               # the first row and the named ones
    python benchmarks/ablation.py --workload prefix                   # prompt 512, completion 64, group of 16, training

"step": 4 prompts of 256 tokens x 8 completions that end by themselves after 1 to 128 tokens. Rows take turns.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import Peer, alternate, bench_parser, random_model, store, work  # noqa: E402
from mlx_grpo import UserError, run_command  # noqa: E402

ABLATIONS = [  # (what, options of MLXGRPOConfig, constants of mlx_grpo, environment): one fast path off, or a saving on
    ("as shipped", {}, {}, {}),
    ("every completion computes its prompt", {"prefix_sharing": "off"}, {}, {}),
    ("all rows in one pass", {"max_tokens_per_microbatch": 0}, {}, {}),
    ("logits of all completion tokens at once", {}, {"HEAD_CHUNK": 2**40}, {}),
    ("MLX's own operations on the CPU", {}, {}, {"MLX_GRPO_CPU_OPS": "off"}),
    ("gradient checkpointing", {"gradient_checkpointing": True}, {}, {}),
    ("keys and values of rollouts at 8 bits", {"kv_bits": 8}, {}, {}),
    ("8 rows decoded together", {"rollout_batch_size": 8}, {}, {}),
    ("a copy to sample from", {"update_every": 2}, {}, {}),
]
PREFIX = [("prefix sharing", {"prefix_sharing": "on"}), ("plain", {"prefix_sharing": "off"})]


def step(o, folder):
    """The ablation table: whole steps."""
    size = dict(prompts=2, prompt_tokens=16, G=2, max_tokens=4) if o.quick else \
        dict(prompts=4, prompt_tokens=256, G=8, max_tokens=128)
    model = random_model(folder, ends_early=True)
    chosen = [a for i, a in enumerate(ABLATIONS) if not o.only or i == 0 or any(n in a[0] or n in a[1] for n in o.only)]
    if o.only and len(chosen) == 1:
        raise UserError(f"--only {' '.join(o.only)}: there are " + ", ".join(repr(a[0]) for a in ABLATIONS))
    peers = {what: Peer("ours", work(model, **size, threads=o.threads, options=options, constants=constants, environment=environment))
             for what, options, constants, environment in chosen}
    rows = alternate(peers, o.rounds)
    for what, options, constants, environment in chosen:
        rows[what]["changed"] = options | constants | environment
    store("ablation", rows, {**size, "threads": o.threads, "rounds": o.rounds}, o.out)


def prefix(o, folder):
    """Training alone, with and without the prompt shared by its group."""
    size = dict(prompts=1, prompt_tokens=32, G=4, max_tokens=8) if o.quick else \
        dict(prompts=1, prompt_tokens=512, G=16, max_tokens=64)
    model = random_model(folder)
    rows = alternate({what: Peer("our_training", work(model, **size, threads=o.threads, options=options))
                      for what, options in PREFIX}, o.rounds)
    store("shared_prefix", rows, {**size, "threads": o.threads, "rounds": o.rounds}, o.out)


WORKLOADS = {"step": step, "prefix": prefix}


def main():
    parser = bench_parser(__doc__, 3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of the step workload, by name or option")
    parser.add_argument("--workload", choices=WORKLOADS, help="only this one")
    o = parser.parse_args()
    o.rounds = 1 if o.quick else o.rounds
    for name in [o.workload] if o.workload else WORKLOADS:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            WORKLOADS[name](o, folder)


if __name__ == "__main__":
    run_command(main)
