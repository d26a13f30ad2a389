"""
Completions for judging a model: what the trainer's own evaluations and `mlx_grpo.py eval` share. Part of mlx_grpo, which
gives these names out again.
"""

import numpy as np

from mlx_grpo import EVAL, Sampling, completion_metrics, find_world, is_right, sample_completions


def eval_rollouts(model, tokenizer, problems, config, sampling=None, *, num_generations=1, first_prompt=0):
    """A Rollout for each problem, from the training prompt; greedy (or at eval_temperature) unless `sampling` says
    otherwise. Random numbers are apart from training's and keyed by a problem's place, first_prompt + i: two models that
    are asked the same problems draw the same ones."""
    sampling = sampling or Sampling(config.eval_temperature, stop=tuple(config.stop),
                                    max_new_tokens=config.eval_max_new_tokens)
    return sample_completions(model, tokenizer, problems, config, sampling, num_generations=num_generations, step=0,
                              stream=EVAL, first_prompt=first_prompt)


def right_answers(rollout):
    """Whether each completion's answer is the gold one, compared as numbers where both are (is_right)."""
    return [is_right(rollout.problem, text) for text in rollout.texts]


def evaluate(model, tokenizer, problems, config):
    """({"exact_match", "mean_length", "clipped_ratio"}, [completion text]): one completion for each problem. With several data
    sets, exact_match/<name> for each of them too."""
    sample = lambda mine, first: eval_rollouts(model, tokenizer, mine, config, first_prompt=first)
    rollouts = find_world().rollouts(problems, sample)
    lengths = completion_metrics(rollouts)
    right, sources = np.array([right_answers(r)[0] for r in rollouts]), np.array([p.source for p in problems])
    by_source = {f"exact_match/{name}": float(right[sources == name].mean()) for name in sorted(set(sources.tolist())) if name}
    return {"exact_match": float(right.mean()), **by_source,
            "mean_length": lengths["completions/mean_length"],
            "clipped_ratio": lengths["completions/clipped_ratio"]}, [r.texts[0] for r in rollouts]
