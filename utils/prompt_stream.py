"""
Which prompt comes when: the run's order as a function of (seed, position), over several weighted data sets, at the level
that the curriculum has reached, augmented. Nothing is remembered but the curriculum, which is part of a checkpoint.
"""

import copy
import json
import random
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mlx_grpo import UserError, load_symbol
from mlx_grpo.problems import build_prompt
from mlx_grpo.sources import sources_of

BLOCK = 4096                       # positions whose data set is drawn together


@lru_cache(maxsize=32)
def permutation(key, total):
    order = list(range(total))
    random.Random(key).shuffle(order)
    return order


def prompt_order(start, count, total, seed, shuffle):
    """`count` problem indices from place `start` of an endless stream of epochs, each a permutation of its own."""
    places = [divmod(start + i, total) for i in range(count)]
    return [permutation(f"order {seed} {epoch}", total)[place] if shuffle else place for epoch, place in places]


def choices(weights, seed, count):
    """(count,) which of the data sets stands at each position, each with its share of the weights: Philox with key (seed,
    stream) and the block as counter, so a position's choice depends on nothing else."""
    shares = np.cumsum(weights) / np.sum(weights)
    raw = [np.random.Philox(key=[seed, 0x6D6978], counter=[0, block, 0, 0]).random_raw(BLOCK)
           for block in range(-(-count // BLOCK))]
    uniforms = (np.concatenate(raw)[:count] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.minimum(np.searchsorted(shares, uniforms, side="right"), len(shares) - 1)


def find_augments(specs):
    """The functions of `augment`, in their order. Raises ConfigError."""
    return [(spec, load_symbol(spec, "augment")) for spec in specs]


class PromptStream:
    """The prompts of a run. problems: those of all data sets and levels; fits(problem): whether it is short enough.

    The state of the curriculum is a dictionary, name of a data set -> {"level", "recent": mean rewards of the latest rollout
    batches at this level}, which the trainer keeps and which advanced() makes anew."""

    def __init__(self, problems, config, fits=lambda problem: True):
        self.sources, self.fits, self.seed = sources_of(config), fits, config.seed
        self.rising = True         # False: all levels at once, for sft
        self.augments = [find_augments(source.config.augment) for source in self.sources]
        self.drawn = np.zeros(0, dtype=np.int64)
        self.seen = {}
        self.pools = {}            # (name, level or None for all levels) -> problems
        for problem in problems:
            for level in (problem.level, None):
                self.pools.setdefault((problem.source, level), []).append(problem)
        for source in self.sources:
            for level, options in enumerate(source.levels):
                if (source.name, level) not in self.pools:
                    at = f" at level {level} ({options})" if source.config.curriculum else ""
                    raise UserError(f"dataset {source.config.dataset!r} has no training problem{at}; rows given from Python "
                                    "can't be mixed or have levels")

    def take(self, start, count, curriculum):
        """The `count` problems from position `start`, at the levels of `curriculum`."""
        return [self.at(position, curriculum) for position in range(start, start + count)]

    def at(self, position, curriculum):
        k, place = 0, position
        if len(self.sources) > 1:
            if position >= len(self.drawn):
                self.drawn = choices([s.weight for s in self.sources], self.seed, 2 * position + BLOCK)
            k = int(self.drawn[position])
            place = int(np.count_nonzero(self.drawn[:position] == k))
        source = self.sources[k]
        rising = self.rising and source.config.curriculum
        pool = self.pools[source.name, curriculum.get(source.name, {"level": 0})["level"] if rising else None]
        index = prompt_order(place, 1, len(pool), f"{self.seed} {source.name}".strip(), source.config.shuffle)[0]
        if not self.augments[k]:
            return pool[index]
        return augmented(pool[index], source.config, self.augments[k], place // len(pool), self.fits)

    def observe(self, rollouts, scores, totals, names):
        """Note the rewards of a data set's rows for its curriculum. scores (B, K), totals (B,), names of the K rewards."""
        rows = [r.problem.source for r in rollouts for _ in r.completion_ids]
        for source in self.sources:
            if source.config.curriculum:
                reward = source.config.curriculum.get("reward")
                values = totals if reward is None else scores[:, names.index(reward)]
                mine = [float(v) for v, name in zip(values, rows) if name == source.name and not np.isnan(v)]
                self.seen.setdefault(source.name, []).extend(mine)

    def advanced(self, curriculum):
        """(the curriculum after the rollout batch whose rewards were observed, lines that tell of raised levels)."""
        state, lines = dict(curriculum), []
        for source in self.sources:
            plan = source.config.curriculum
            if not plan or not self.seen.get(source.name):
                continue
            rewards, window = self.seen[source.name], plan.get("window", 20)
            level, recent = state.get(source.name, {"level": 0, "recent": []}).values()
            recent = [*recent, sum(rewards) / len(rewards)][-window:]
            mean = sum(recent) / len(recent)
            if len(recent) == window and mean >= plan["raise_at"] and level + 1 < len(plan["levels"]):
                level, recent = level + 1, []
                lines.append(f"{source.name or source.config.dataset}: level {level} ({plan['levels'][level]!r}) from here, "
                             f"after a mean reward of {mean:.3f} over {window} rollout batches")
            state[source.name] = {"level": level, "recent": recent}
        self.seen = {}
        return state, lines

    def metrics(self, rollouts, rewards, curriculum):
        """Of a rollout batch with rewards (B,): prompts and mean reward of each data set, levels of the curricula."""
        found = {}
        rows = np.array([r.problem.source for r in rollouts for _ in r.completion_ids])
        for source in self.sources:
            end = f"/{source.name}" if source.name else ""
            mine = rewards.reshape(-1)[rows == source.name]
            if source.name and len(mine):
                known = mine[~np.isnan(mine)]
                found[f"prompts{end}"] = sum(r.problem.source == source.name for r in rollouts)
                found[f"reward{end}"] = float(known.mean()) if len(known) else None
            if source.config.curriculum and self.rising:
                found[f"curriculum_level{end}"] = curriculum.get(source.name, {"level": 0})["level"]
        return found


def augmented(problem, config, functions, epoch, fits):
    """The problem after the user's functions f(row, rng) -> row, rng seeded by seed, prompt and epoch. The gold answer must
    stay. A prompt that becomes too long is left as it was, which is told. Raises UserError."""
    rng = random.Random(f"augment {config.seed} {epoch} {json.dumps(problem.prompt)}")
    row = copy.deepcopy(problem.columns)
    where = f"{problem.columns[config.prompt_column]!r}"
    for spec, function in functions:
        try:
            row = function(row, rng)
        except (Exception, SystemExit) as error:         # the user's code may raise anything
            raise UserError(f"augment {spec!r} raised {type(error).__name__}: {error} on {where}") from error
        if not isinstance(row, dict) or not row.get(config.prompt_column):
            raise UserError(f"augment {spec!r} must return the row with its {config.prompt_column!r}, got {row!r} for "
                            f"{where}")
        kept = {"answer", config.answer_column} & problem.columns.keys()
        if changed := [name for name in kept if row.get(name) != problem.columns[name]]:
            raise UserError(f"augment {spec!r} changed {changed[0]!r} from {problem.columns[changed[0]]!r} to "
                            f"{row.get(changed[0])!r} for {where}; the gold answer must stay what it is")
    solution = row.get(config.solution_column) if config.solution_column else problem.solution
    prompt = build_prompt(row, config, f"augment of {where}", problem.examples)
    new = replace(problem, prompt=prompt, columns=row, solution=solution)
    if not fits(new):
        print(f"augment made a prompt longer than max_prompt_length ({config.max_prompt_length} tokens), so it stays as it "
              f"was: {where}", file=sys.stderr)
        return problem
    return new
