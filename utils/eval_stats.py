"""
Statistics of an evaluation: pass@k, maj@k, bootstrap intervals, paired tests. NumPy alone; part of `mlx_grpo.py eval`.
"""

import math
from collections import Counter

import numpy as np

RESAMPLES, LEVEL = 10_000, 0.95     # of a bootstrap


def pass_at_k(n, c, k):
    """The chance that k completions, drawn without replacement from n with c right ones, hold a right one:
    1 - C(n-c, k) / C(n, k), unbiased (Chen et al., arXiv 2107.03374, Eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(votes, right, k):
    """The chance that the most frequent answer among k completions, drawn without replacement, is right (self-consistency,
    arXiv 2203.11171): exact over all draws, so unbiased like pass@k.

    votes: the answer of each completion, None = none given, which doesn't vote (nobody votes: wrong). right: whether each
    completion is right; an answer counts as right by the mean of its completions. A tie between t answers is decided by
    lot: each wins 1/t of the time."""
    sizes = Counter(vote for vote in votes if vote is not None)
    total = 0.0
    for answer, size in sizes.items():
        share = np.mean([r for vote, r in zip(votes, right) if vote == answer])
        if share:
            others = [other for name, other in sizes.items() if name != answer]
            total += share * win_chance(size, others, len(votes) - sizes.total(), k)
    return float(total)


def win_chance(size, others, silent, k):
    """The chance that an answer given by `size` completions wins the vote of k drawn ones. others: how many gave each
    other answer; silent: how many gave none."""
    n, wins = size + sum(others) + silent, 0.0
    for m in range(1, min(size, k) + 1):                      # m of the answer are drawn, k - m of the rest
        rest = k - m
        rivals = [other for other in others if other >= m]    # that can reach m; the rest can't, whatever is drawn
        ways = np.zeros((rest // m + 1, rest + 1))            # ways[t, s]: to draw s with t rivals level and none ahead
        free = n - size - sum(rivals)
        ways[0] = [math.comb(free, s) for s in range(rest + 1)]
        for rival in rivals:
            more = np.zeros_like(ways)
            for drawn in range(min(rival, m, rest) + 1):
                level = int(drawn == m)
                more[level:, drawn:] += math.comb(rival, drawn) * ways[:len(ways) - level, :rest + 1 - drawn]
            ways = more
        wins += math.comb(size, m) * (ways[:, rest] / np.arange(1, len(ways) + 1)).sum()
    return wins / math.comb(n, k)


def bootstrap_interval(values, seed):
    """(low, high), each (M,): percentile bootstrap over problems of the means of M metrics, at LEVEL. values: (P, M), NaN
    where a metric does not apply (each applies somewhere)."""
    values = np.asarray(values, dtype=np.float64)
    known, rng, means = ~np.isnan(values), np.random.default_rng(seed), []
    for _ in range(10):
        drawn = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES // 10).astype(float)    # R, P
        count = drawn @ known.astype(float)
        means.append(drawn @ np.where(known, values, 0) / np.where(count, count, np.nan))
    means, tail = np.concatenate(means), (1 - LEVEL) / 2
    return tuple(np.nanquantile(means, q, axis=0) for q in (tail, 1 - tail))


def sign_flip_p(differences):
    """Two-sided p of the paired permutation test: the share of all sign patterns of the differences (integers) whose sum is
    at least as far from 0 as the one seen. Exact, by convolution. For differences of 1 and -1 it is McNemar's exact test,
    the binomial one."""
    seen, sizes = abs(sum(differences)), [abs(d) for d in differences if d]
    chance = np.zeros(sum(sizes) + 1)              # of the sum of those that stay positive
    chance[0] = 1
    for size in sizes:
        chance[size:], chance[:size] = (chance[size:] + chance[:-size]) / 2, chance[:size] / 2
    low = (sum(sizes) - seen) // 2                 # all sums have the parity of their total
    return 1.0 if not seen else float(min(1, chance[:low + 1].sum() + chance[low + seen:].sum()))
