"""
A training loop of your own on the public pieces, without the trainer; on the shipped model, offline.

    python examples/custom_loop.py 10        # steps
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                       # runs from a plain clone, from any directory

from mlx_grpo import (                              # noqa: E402  before mlx.core: on Linux it brings a fast BLAS
    MLXGRPOConfig, Scorer, SplitModel, completion_logprobs, evaluate, find_rewards, group_advantages, grpo_loss, load_model,
    load_problems, pad_batch, sample_completions, train_sampling, weighted_rewards)

import mlx.core as mx                               # noqa: E402
import mlx.nn as nn                                 # noqa: E402
import mlx.optimizers as optim                      # noqa: E402

P, G = 16, 8                                        # prompts in a step, completions per prompt


def train(steps):
    """(exact match before, after) of `steps` updates on chains of sums and products modulo 10."""
    config = MLXGRPOConfig(dataset="synthetic:chain", system_prompt="", temperature=1.0, max_new_tokens=16,
                           eval_max_new_tokens=16, eval_samples=100, max_train_samples=2000)
    model, tokenizer = load_model(str(ROOT / "data/demo_model"))
    problems, held_out = load_problems(config)
    scorer = Scorer(find_rewards(["correctness", "strict_format"]))
    optimizer, split, sampling = optim.AdamW(learning_rate=1e-4), SplitModel(model), train_sampling(config)

    def loss_of(batch):
        logprobs, _ = completion_logprobs(split, batch, sampling.temperature)                       # (B, T)
        return grpo_loss(logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, batch.mask,
                         loss_type="dapo", clip_eps=0.2, clip_eps_high=0.28, kl_coeff=0.0)

    gradients_of = nn.value_and_grad(model, loss_of)
    before, _ = evaluate(model, tokenizer, held_out, config)
    for step in range(1, steps + 1):
        prompts = [problems[(step * P + i) % len(problems)] for i in range(P)]
        rollouts = sample_completions(model, tokenizer, prompts, config, sampling, num_generations=G, step=step)
        scores, _, _ = scorer(rollouts)                                                             # (B, K)
        rewards = weighted_rewards(scores, scorer.weights).reshape(P, G)
        batch = pad_batch(rollouts, group_advantages(rewards))                                      # B = P * G rows
        (loss, metrics), gradients = gradients_of(batch)
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        print(f"step {step}/{steps} | reward {rewards.mean():.3f} | loss {loss.item():.4f} | norm {norm.item():.2f}")
    after, _ = evaluate(model, tokenizer, held_out, config)
    print(f"exact match {before['exact_match']:.2f} -> {after['exact_match']:.2f}")
    return before["exact_match"], after["exact_match"]


if __name__ == "__main__":
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
