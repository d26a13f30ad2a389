"""
Rewards in threads while other groups still decode (reward_workers). Which thread scores a group, and when, changes no
number: what the functions gave is put together in the order of the prompts and checked in the main thread, as if they had
run there. MLX is not touched in these threads: its streams belong to the thread that made them.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np


class RewardWorkers:
    """Scores the rollouts of one batch of problems, in `count` threads; 0 = all together, when they are asked for.

        with RewardWorkers(scorer, 2, problems, trainer_state, world) as workers:
            rollouts = ...                                           # workers.finished(place, rollout) as each one is done
            rollouts, scores, extras, metrics = workers.score(rollouts)

    Leaving the block by an exception calls no function that hasn't begun."""

    def __init__(self, scorer, count, problems, trainer_state, world):
        self.scorer, self.problems, self.trainer_state, self.world, self.calls = scorer, problems, trainer_state, world, {}
        self.errors = scorer.errors
        self.columns = set().union(*(p.columns for p in problems))
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="reward") if count else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def finished(self, place, rollout):
        """The rollout of the problem at `place` is done: have it scored."""
        if self.pool:
            self.calls[place] = self.pool.submit(self.scorer.call, [rollout], self.trainer_state, self.columns)

    def parts(self, rollouts):
        """What Scorer.call gave for equal shares of the rollouts, in their order."""
        if not self.pool:
            return [self.scorer.call(rollouts, self.trainer_state)]
        for place, rollout in enumerate(rollouts):
            if place not in self.calls:                    # a rollout_func tells nothing meanwhile
                self.finished(place, rollout)
        return [self.calls[place].result() for place in range(len(rollouts))]

    def score(self, rollouts):
        """(rollouts, scores, extras, metrics) of these rollouts, as a Scorer gives them, and those that other processes have
        sampled of the problems. Raises RewardError."""
        found = np.zeros((0, len(self.scorer.functions))), {}, {}
        if rollouts:
            found = self.scorer.check(rollouts, self.trainer_state, self.parts(rollouts))
        rollouts, scores, extras, metrics = self.world.scored(self.problems, self.scorer, self.errors, rollouts, *found)
        return rollouts, scores, extras, self.scorer.finish(metrics)
