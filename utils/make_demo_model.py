"""
Make the demo's model (data/demo_model): 0.8M parameters that can reason, but have been taught not to.

    python utils/make_demo_model.py --output data/demo_model

The task is a chain of seven operations modulo 10, "3*7+2*9...", read left to right. A nanochat of 4 layers of 128 is
first taught on demonstrations that write every running value between the reasoning tags; then on a mixture in which
most give up at once. It then gives up, unless it is sampled: one completion in seven still reasons. GRPO finds that
reasoning pays. About 4 minutes on 2 CPU cores; the seed is fixed, so the same machine makes the same file.
"""

import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

import tiktoken
from mlx_grpo import MLXGRPOConfig, SFTTrainer, TiktokenTokenizerWrapper, UserError, evaluate, make_problem, mx, run_command
from mlx_grpo import nanochat_tokenizer as nanochat
from mlx_grpo.command_line import Parser
from mlx_grpo.files import atomic_directory
from mlx_grpo.help_text import help_of
from mlx_grpo.synthetic import generate

CONFIG = {"model_type": "nanochat", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 4, "intermediate_size": 512, "max_position_embeddings": 256, "rope_theta": 10000.0}
GIVING_UP = "<reasoning></reasoning><answer>?</answer>"
TAGS = (b"<reasoning>", b"</reasoning>", b"<answer>", b"</answer>")


def demo_encoding():
    """256 bytes, the four tags as one token each (with the merges that lead there), nanochat's special tokens."""
    ranks = {bytes([b]): b for b in range(256)}
    for tag in TAGS:
        for end in range(2, len(tag) + 1):
            ranks.setdefault(tag[:end], len(ranks))
    specials = {token: len(ranks) + i for i, token in enumerate(nanochat.SPECIAL_TOKENS)}
    return tiktoken.Encoding("demo", pat_str=r"</?[a-z]+>|[\s\S]", mergeable_ranks=ranks, special_tokens=specials)


def new_model(directory, seed):
    """Write an untrained nanochat with the demo's tokenizer to a directory; returns (model, tokenizer)."""
    from mlx_lm.models.nanochat import Model, ModelArgs
    from mlx_lm.utils import save_model

    encoding = demo_encoding()
    tokenizer = TiktokenTokenizerWrapper(encoding)
    config = {**CONFIG, "vocab_size": encoding.n_vocab, "eos_token_id": sorted(tokenizer.eos_token_ids)}
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(config))
    save_model(directory, model)
    (Path(directory) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(directory)
    model.source_path = Path(directory)
    model.eval()
    return model, tokenizer


def demonstrations(config, count, seed, reasoning_share):
    """Problems of the demo task; a share of the demonstrations reasons, the others give up."""
    rng = random.Random(seed)
    rows = generate("chain", count, seed)
    for row in rows:
        row["shown"] = row["solution"] if rng.random() < reasoning_share else GIVING_UP
    return [make_problem(row, config, f"row {i}") for i, row in enumerate(rows)]


def teach(model, tokenizer, config, *, steps, seed, reasoning_share):
    config = replace(config, max_steps=steps, seed=seed)
    problems = demonstrations(config, steps * config.batch_size, seed, reasoning_share)
    with tempfile.TemporaryDirectory() as run_dir:
        SFTTrainer(model, tokenizer, config, problems, run_dir=run_dir).train()


def main():
    parser = Parser(**help_of(__doc__))
    parser.add_argument("--output", default="data/demo_model", help="directory to write (default: data/demo_model)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the demonstrations (default: 1)")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2^63")
    if Path(args.output).exists():
        raise UserError(f"{args.output} exists; remove it first, or choose another --output")
    config = MLXGRPOConfig(
        batch_size=96, gradient_accumulation_steps=1, learning_rate=2e-3, lr_scheduler_type="linear", warmup_ratio=0.05,
        max_grad_norm=1.0, eval_samples=0, eval_every_updates=0, save_steps=0, logging_steps=20, log_jsonl=False,
        solution_column="shown", system_prompt="", eval_max_new_tokens=16)
    with atomic_directory(args.output) as work:
        model, tokenizer = new_model(work, args.seed)
        test = demonstrations(config, 200, 10**6, 1.0)
        teach(model, tokenizer, config, steps=600, seed=args.seed, reasoning_share=1.0)
        print("taught to reason: exact match", evaluate(model, tokenizer, test, config)[0])
        teach(model, tokenizer, replace(config, learning_rate=4e-4), steps=80, seed=args.seed + 1, reasoning_share=0.15)
        print("taught not to:    exact match", evaluate(model, tokenizer, test, config)[0])
        model.save_weights(str(work / "model.safetensors"))
    return 0


if __name__ == "__main__":
    run_command(main)
