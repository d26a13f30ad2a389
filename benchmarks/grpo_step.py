"""
A whole GRPO step, ours against mlx-lm-lora, TRL on torch, and the plain sequential loop: seconds and memory.

    python benchmarks/grpo_step.py                                    # 2 prompts x 8 completions x 128 tokens, 7M parameters
    python benchmarks/grpo_step.py --peers ours TRL --rounds 3
    python benchmarks/grpo_step.py --shape qwen2.5-0.5b --vocab 151936 --dtype bfloat16 --prompts 1 --num-generations 16 \\
        --max-tokens 256 --peers ours TRL --name grpo_step_cuda       # on an NVIDIA GPU

Every program is a process of its own on the same model directory, prompts, lengths, learning rate and dtype; they take
turns, step by step, after one that doesn't count. mlx-lm-lora needs an environment of its own (docs/benchmarks.md).
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from benchmarks.common import ROOT, SHAPES, Peer, alternate, bench_parser, random_model, store, work  # noqa: E402
from mlx_grpo import UserError, run_command  # noqa: E402

PEERS = {  # row: (peer, further options, turns that count at most)
    "ours": ("ours", {}, 99),
    "mlx-lm-lora": ("mlx_lm_lora", {}, 99),
    "mlx-lm-lora, all rows at once": ("mlx_lm_lora", {"at_once": True}, 3),
    "TRL": ("trl", {}, 99),
    "sequential": ("sequential", {}, 3),
}


def main():
    parser = bench_parser(__doc__, 6)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--lora-python", type=Path, default=ROOT / ".venv-bench/bin/python",
                        help="the interpreter of an environment with mlx-lm-lora")
    parser.add_argument("--shape", choices=SHAPES, default="7m")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--kl", type=float, default=0.0, help="weight of the KL to a reference model, in all of them")
    parser.add_argument("--name", default="grpo_step", help="of the result")
    o = parser.parse_args()
    if o.quick:
        o.rounds, o.max_tokens, o.num_generations = 1, 4, 2
    if unknown := [name for name in o.peers if name not in PEERS]:
        raise UserError(f"--peers {unknown[0]!r}: there are {', '.join(PEERS)}")
    if any("lora" in name for name in o.peers) and not o.lora_python.exists():
        raise UserError(f"{o.lora_python} is missing: make .venv-bench/.installed, or leave mlx-lm-lora out of --peers")
    with tempfile.TemporaryDirectory() as folder:
        model, rows = random_model(folder, o.shape, o.vocab, o.dtype), o.prompts * o.num_generations
        settings = work(model, prompts=o.prompts, prompt_tokens=o.prompt_tokens, G=o.num_generations, dtype=o.dtype, kl=o.kl,
                        max_tokens=o.max_tokens, threads=o.threads)
        peers = {}
        for name in o.peers:
            peer, more, _ = PEERS[name]
            more = {"at_once": rows} if more else {}
            peers[name] = Peer(peer, settings | more, o.lora_python if peer == "mlx_lm_lora" else None)
        found = alternate(peers, o.rounds, turns={name: PEERS[name][2] for name in peers})
    if short := [name for name, row in found.items() if row["tokens"] != rows * o.max_tokens]:
        raise UserError(f"{short[0]} sampled {found[short[0]]['tokens']} tokens a step instead of {rows * o.max_tokens}")
    store(o.name, found, {k: vars(o)[k] for k in ("shape", "vocab", "dtype", "prompts", "prompt_tokens", "num_generations",
                                                  "max_tokens", "kl", "threads", "rounds")}, o.out)


if __name__ == "__main__":
    run_command(main)
