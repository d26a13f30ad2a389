"""
The numbers of a step for metrics.jsonl, made of its scores, its completions and the passes of its update. Part of mlx_grpo,
which gives these names out again.
"""

import math
import re

import mlx.core as mx
import numpy as np

from mlx_grpo import guarded_exp


def finite_or_none(x):
    return float(x) if np.isfinite(x) else None


def score_metrics(scores, rewards, names):
    """Reward metrics of a step: grpo-reference's names; None where no row was scorable."""
    known = lambda x: x[~np.isnan(x)]
    mean = lambda x: finite_or_none(known(x).mean()) if len(known(x)) else None
    std = lambda x: finite_or_none(known(x).std(ddof=1)) if len(known(x)) > 1 else None
    flat = [len(known(group)) < 2 or np.ptp(known(group)) < 1e-8 for group in rewards]
    found = {"reward": mean(rewards), "reward_std": std(rewards), "frac_reward_zero_std": float(np.mean(flat))}
    for k, name in enumerate(names):
        found |= {f"rewards/{name}/mean": mean(scores[:, k]), f"rewards/{name}/std": std(scores[:, k])}
    return found


def completion_metrics(rollouts):
    lengths = np.array([len(ids) for r in rollouts for ids in r.completion_ids])
    ended = np.array([e for r in rollouts for e in r.ended])
    whole = lengths[ended] if ended.any() else np.zeros(1)
    return {"completions/mean_length": float(lengths.mean()), "completions/min_length": int(lengths.min()),
            "completions/max_length": int(lengths.max()), "completions/clipped_ratio": float(1 - ended.mean()),
            "completions/mean_terminated_length": float(whole.mean()),
            "completions/min_terminated_length": int(whole.min()), "completions/max_terminated_length": int(whole.max())}


def gap_metrics(logprobs, entropy, batch, num_tokens):
    """How far the sampler's log-probs are from those of the model being trained, and the mean entropy; sums to be
    finished by finish_metrics."""
    mean = lambda x: mx.where(batch.mask > 0, x, 0).sum() / mx.maximum(num_tokens, 1)
    gap = mx.where(batch.mask > 0, logprobs - batch.sampler_logprobs, 0)
    weights = guarded_exp(gap)
    return {"entropy": mean(entropy), "sampling/sampling_logp_difference/mean": mean(mx.abs(gap)),
            "sampling/sampling_logp_difference/max": mx.abs(gap).max(), "weights": mean(weights), "squares": mean(weights * weights),
            "sampling/importance_sampling_ratio/mean": mean(batch.is_weights),
            "sampling/importance_sampling_ratio/min": mx.where(batch.mask > 0, batch.is_weights, mx.inf).min(),
            "sampling/importance_sampling_ratio/max": mx.where(batch.mask > 0, batch.is_weights, -mx.inf).max()}


def finish_metrics(metrics, share):
    """Merged metrics with means taken over the tokens of the rows that were computed (their share of all), and the
    effective sample size (sum w)^2 / (n sum w^2) of the sampler's tokens under the policy, between 0 and 1."""
    spread = ("min", "max")
    metrics = {k: v if re.split("[_/]", k)[-1] in spread else v / share for k, v in metrics.items()}
    weights, squares = metrics.pop("weights"), metrics.pop("squares")
    metrics = {k: v if math.isfinite(v) else None if "ratio/m" in k else v for k, v in metrics.items()}
    return metrics | {"sampling/effective_sample_size": weights**2 / squares if squares else 1.0}


def merge_metrics(parts):
    """Metrics of a step from those of its parts: sums, but for names that end in min or max."""
    merge = {"min": min, "max": max}
    return {key: merge.get(re.split("[_/]", key)[-1], sum)(part[key] for part in parts) for key in parts[0]}
