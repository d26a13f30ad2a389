"""
Rollouts: our tokens a second against mlx-lm's BatchGenerator, the bound of a bare forward pass, and the machine's limits.

    python benchmarks/rollouts.py                       # a group of 16 of one prompt; 32 rows of mixed lengths
    python benchmarks/rollouts.py --max-tokens 32 --rounds 2

"mixed": prompts of 16 to 128 tokens, completions that end by themselves after 1 to 256 tokens, 16 rows at once, so
that rows leave and enter. BatchGenerator gets as many rows at once as ours; "prompt cached" hands it the caches of a
prompt that was prefilled once.
"""

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import Peer, alternate, bench_parser, random_model, store, work  # noqa: E402
from mlx_grpo import count_parameters, load_model, run_command  # noqa: E402


def machine_limits(settings, model_path, length):
    """Row of the limits: measured speeds, and the tokens a second that follow for decoding at this batch and at the mean
    cache length: matmuls alone (2 operations a parameter), and reading weights and keys and values once a token."""
    peer = Peer("limits", settings)
    turns = [peer.turn() for _ in range(3)]
    peer.close()
    row = {key: statistics.median(t[key] for t in turns) for key in ("matmul_gflops", "read_gb_s", "exp_ns")}
    model, _ = load_model(model_path)
    parameters, args, rows = count_parameters(model), model.args, len(settings["prompts"]) * settings["G"]
    cache = 2 * 4 * rows * length * args.num_hidden_layers * args.num_key_value_heads * args.head_dim        # bytes, float32
    return row | {"parameters": parameters, "matmul_tokens_per_s": row["matmul_gflops"] * 1e9 / (2 * parameters),
                  "read_tokens_per_s": rows * row["read_gb_s"] * 1e9 / (4 * parameters + cache)}


def main():
    parser = bench_parser(__doc__, 5)
    parser.add_argument("--num-generations", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    o = parser.parse_args()
    lengths, most = [16, 32, 48, 64, 80, 96, 112, 128], 256
    if o.quick:
        o.rounds, o.max_tokens, o.num_generations, lengths, most = 1, 4, 2, [8, 12], 6
    with tempfile.TemporaryDirectory() as folder:
        plain, ends = random_model(folder), random_model(folder, ends_early=True)
        same = work(plain, prompts=1, prompt_tokens=o.prompt_tokens, G=o.num_generations, max_tokens=o.max_tokens,
                    threads=o.threads)
        mixed = work(ends, prompts=lengths, G=4, max_tokens=most, threads=o.threads, at_once=16)
        rows = alternate({
            "same prompt, ours": Peer("our_rollouts", same),
            "same prompt, BatchGenerator": Peer("batch_generator", same),
            "same prompt, BatchGenerator, prompt cached": Peer("batch_generator", same | {"cached": True}),
            "same prompt, forward only": Peer("forward_only", same)}, o.rounds)
        rows |= alternate({
            "mixed, ours": Peer("our_rollouts", mixed),
            "mixed, BatchGenerator": Peer("batch_generator", mixed),
            "mixed, BatchGenerator, prompt cached": Peer("batch_generator", mixed | {"cached": True})}, o.rounds)
        rows["limits"] = machine_limits(same, plain, o.prompt_tokens + o.max_tokens // 2)
    store("rollouts", rows, {"same": [1, o.num_generations, o.prompt_tokens, o.max_tokens], "mixed": [lengths, 4, most],
                             "threads": o.threads, "rounds": o.rounds}, o.out)


if __name__ == "__main__":
    run_command(main)
