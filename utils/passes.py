"""
How the rows of a Batch are cut into forward and backward passes: by a budget of tokens, rows of like length together, the
prompts computed as seldom as that allows. Part of mlx_grpo, which gives these names out again.

  way       the prompts of a pass are computed           for
  each      once for each row, in front of it            models that can't share them, prompts that are not worth it
  within    once for all rows that share one             groups that fit into a pass whole
  before    once before all passes of their group,       larger groups: a pass takes the prompt's keys and values, and
            and once more to go back through it          the gradient of all passes goes back through it at the end
"""

import math

import mlx.core as mx
import numpy as np

from mlx_grpo import Batch, backend, bucket

PAYS = {"off": 0.0, "auto": 0.8, "on": math.inf}     # prefix_sharing: share of the tokens that a shared prompt may leave


def trained_lengths(batch):
    """(B,) NumPy: how many completion tokens of each row matter, up to the last that is trained (at least one)."""
    mask = np.array(batch.mask) > 0
    return np.maximum((mask * np.arange(1, mask.shape[1] + 1)).max(axis=1), 1)


def take_rows(batch, rows, filler=0):
    """The Batch of some rows (a list of indices), as narrow as they allow, with their prompts only. filler: so many rows
    without trained tokens behind them."""
    chosen = list(rows) + [rows[0]] * filler
    prompts, prompt_of = np.unique(np.array(batch.prompt_of)[chosen], return_inverse=True)
    L = bucket(int(np.array(batch.prompt_lengths)[prompts].max()))
    T = bucket(int(trained_lengths(batch)[list(rows)].max()))
    narrow = lambda name, a: a if name == "first_seen" or a.shape[1] == 1 else a[:, :T]
    picked = {name: narrow(name, a[mx.array(chosen)]) for name, a in vars(batch).items() if not name.startswith("prompt")}
    if filler:
        picked["mask"] = picked["mask"] * (mx.arange(len(chosen)) < len(rows))[:, None]
    return Batch(prompts=batch.prompts[mx.array(prompts)][:, :L], prompt_lengths=batch.prompt_lengths[mx.array(prompts)],
                 prompt_of=mx.array(prompt_of), **picked)


def pass_budget(config):
    """Tokens of a pass: max_tokens_per_microbatch, where that is -1 enough to keep the backend busy. 0 = no limit."""
    given = config.max_tokens_per_microbatch
    return backend.default_pass_tokens() if given < 0 else given


def plan_passes(batch, rows, budget, sharing):
    """[(way, [[row]])]: `rows` of a Batch in passes of at most `budget` padded tokens, but at least one row; 0 = no limit.
    sharing: the option prefix_sharing."""
    lengths, prompt_of, prompts = trained_lengths(batch), np.array(batch.prompt_of), np.array(batch.prompt_lengths)
    tokens = lambda rows, way: pass_tokens(lengths[rows], prompts, prompt_of[rows], way)
    fits = lambda rows, way: not budget or tokens(rows, way) <= budget

    def fill(units, way):
        passes = []
        for unit in units:
            trial = [*passes[-1], *unit] if passes else unit
            passes[-1:] = [trial] if fits(trial, way) else [*passes[-1:], unit]
        return passes

    groups = [sorted((i for i in rows if prompt_of[i] == p), key=lambda i: lengths[i]) for p in sorted(set(prompt_of[rows]))]
    groups.sort(key=lambda group: lengths[group[-1]])
    shared = [group for group in groups if tokens(group, "within") <= PAYS[sharing] * tokens(group, "each")]
    alone = sorted((lengths[i] + prompts[prompt_of[i]], i) for group in groups if group not in shared for i in group)
    small = [group for group in shared if fits(group, "within") or len(group) == 1]
    found = [("each", fill([[i] for _, i in alone], "each")), ("within", fill(small, "within"))]
    found += [("before", fill([[i] for i in group], "before")) for group in shared if group not in small]
    return [(way, passes) for way, passes in found if passes]


def pass_tokens(lengths, prompts, prompt_of, way):
    """Tokens that a pass over rows of these completion lengths runs through the trunk, padding included."""
    run = {"each": prompt_of, "within": set(prompt_of), "before": ()}[way]
    return len(lengths) * bucket(int(lengths.max())) + len(run) * bucket(int(prompts[prompt_of].max()))
