"""
`plan` against the trainer: configurations drawn by a seed, the peak that plan gives and the one that the run has.

    python benchmarks/plan_accuracy.py --seed 11 --count 10

Each draws a model (width, layers, vocabulary, tied or not), what is trained, the optimizer, rows, lengths, a reference
model, microbatches, checkpointing and where old log-probs come from. The run is three steps of the trainer with an
evaluation, in a process of its own; its peak is MLX's own (peak_gb of the metrics).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))   # runs from a plain clone, from any directory

from benchmarks import common  # noqa: E402
from mlx_grpo import MLXGRPOConfig, MLXGRPOTrainer, Problem, load_model, run_command  # noqa: E402
from mlx_grpo.plan import planned, work_of  # noqa: E402

QUIET = {"truncated": False, "no_spread": False}
RUN = [sys.executable, __file__, "--run"]


def draw(rng, directory):
    """(options of MLXGRPOConfig, tokens of each prompt) of one configuration; its model is written below directory."""
    heads = rng.choice([2, 4])
    width = heads * rng.choice([32, 64])
    shape = dict(model_type=rng.choice(["qwen3", "qwen2", "llama"]), hidden_size=width, num_hidden_layers=rng.randint(2, 6),
                 intermediate_size=width * rng.choice([2, 3, 4]), num_attention_heads=heads, num_key_value_heads=heads // 2,
                 head_dim=width // heads, tie_word_embeddings=rng.random() < 0.5)
    name = f"drawn-{rng.randrange(10**9)}"
    model = common.random_model(directory, name, rng.choice([500, 2000, 8000, 16000]), shape=shape)
    lora, kl = rng.random() < 0.4, rng.choice([0.0, 0.04])
    G, prompts, T = rng.choice([4, 6, 8, 12]), rng.choice([1, 2]), rng.choice([16, 32, 48, 64])
    lengths = rng.choice([16, 40, 90])
    options = dict(
        model_name=model, num_generations=G, batch_size=prompts, gradient_accumulation_steps=rng.choice([1, 2, 3]),
        max_new_tokens=T, max_completion_length=T, kl_coeff=kl, update_every=rng.choice([1, 2]),
        fine_tune_type="lora" if lora else "full", optimizer=rng.choice(["adamw", "lion", "adafactor", "muon"]),
        gradient_checkpointing=rng.random() < 0.3, old_logprobs=rng.choice(["sampler", "proximal"]),
        max_tokens_per_microbatch=rng.choice([0, 0, 4 * (T + lengths)]), eval_samples=rng.choice([0, 12]), eval_max_new_tokens=T,
        max_steps=3, eval_every_updates=0, save_steps=0, prompt_format="text", system_prompt="", temperature=1.0, dtype="float32",
        max_prompt_length=4096, log_jsonl=False, logging_steps=0, health=QUIET)
    return options, lengths


def spread(completions, **_):
    """A reward that differs from row to row."""
    return [len(set(c)) + i / 1000 for i, c in enumerate(completions)]


def real_run(asked):
    """The peak of the run, GB."""
    config = MLXGRPOConfig(**asked["options"])
    rows = [Problem(text, "0", {}) for text in common.random_prompts([asked["lengths"] - i % 3 for i in range(24)])]
    trainer = MLXGRPOTrainer(*load_model(config.model_name), [spread], config, rows, rows[:config.eval_samples],
                             run_dir=tempfile.mkdtemp())
    return trainer.train()["peak_gb"]


def measured(options, lengths):
    done = subprocess.run(RUN, input=json.dumps({"options": options, "lengths": lengths}), text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1]) * 1e9


def compare(seed, count, cheap=False):
    """Yields (options, planned bytes, measured bytes) of each configuration."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(count):
            options, lengths = draw(rng, directory)
            config = MLXGRPOConfig(**options)
            work = work_of(config, lengths, min(config.eval_samples, 24))
            yield options, planned(config, work, measured=not cheap), measured(options, lengths)


def main():
    parser = argparse.ArgumentParser(description="plan's peak memory against the trainer's, on configurations drawn by a seed.")
    parser.add_argument("--seed", type=int, default=11, help="of the configurations (default: 11)")
    parser.add_argument("--count", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--cheap", action="store_true", help="the estimate without a trial run, as the warning before training")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(real_run(json.load(sys.stdin))))
        return 0
    print(f"{'model':28} {'what':30} {'planned':>9} {'measured':>9}  off")
    worst = 0.0
    for o, plan, real in compare(args.seed, args.count, args.cheap):
        shape = json.loads(Path(o["model_name"], "config.json").read_text())
        model = f"{shape['model_type']} {shape['hidden_size']}x{shape['num_hidden_layers']} V {shape['vocab_size']}"
        what = (f"{o['fine_tune_type']} {o['optimizer']} {o['batch_size']}x{o['num_generations']}x{o['gradient_accumulation_steps']} "
                f"T {o['max_new_tokens']} kl {o['kl_coeff']:g} mb {o['max_tokens_per_microbatch']}"
                + " ckpt" * o["gradient_checkpointing"] + f" old {o['update_every']} {o['old_logprobs'][:4]} eval {o['eval_samples']}")
        worst = max(worst, abs(plan / real - 1))
        print(f"{model:28} {what:66} {plan / 1e6:7.1f} MB {real / 1e6:7.1f} MB {plan / real - 1:+.1%}", flush=True)
    print(f"largest difference: {worst:.1%}")
    return 0


if __name__ == "__main__":
    run_command(main)
