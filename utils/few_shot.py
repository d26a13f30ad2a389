"""
Few-shot examples: rows of the training data, each with its demonstration or gold answer, put before a prompt.
"""

import json
import random
from dataclasses import replace

from mlx_grpo import UserError
from mlx_grpo.problems import build_prompt, make_problem, read_rows


class Examples:
    """The examples of `few_shot`: so many of `pool` (training problems of the same data), drawn by the seed and the
    question, or every row of the file that few_shot names. Never one that asks the same question."""

    def __init__(self, pool, config):
        self.config, self.whole = config, isinstance(config.few_shot, str)
        if self.whole:
            pool = [make_problem(row, config, where) for row, where in read_rows(config.few_shot)]
        pool = pool if config.few_shot else []
        self.asked = [json.dumps(p.columns[config.prompt_column]) for p in pool]
        if not self.whole and config.few_shot and len(set(self.asked)) <= config.few_shot:
            raise UserError(f"few_shot is {config.few_shot}, and {config.dataset!r} has {len(set(self.asked))} different "
                            "training questions; lower it, or use more rows")
        self.shots = [shot(problem, config) for problem in pool]

    def put(self, problem):
        """The problem with its examples in the prompt; as it is without few_shot."""
        config = self.config
        if not config.few_shot:
            return problem
        own = json.dumps(problem.columns[config.prompt_column])
        if self.whole:
            chosen = [i for i, other in enumerate(self.asked) if other != own]
        else:
            chosen = draw(self.asked, own, config.few_shot, random.Random(f"few-shot {config.seed} {own}"))
        examples = tuple(self.shots[i] for i in chosen)
        return replace(problem, prompt=build_prompt(problem.columns, config, "few_shot", examples), examples=examples)


def with_examples(problems, pool, config):
    """The problems with their Examples in the prompts."""
    examples = Examples(pool, config)
    return [examples.put(problem) for problem in problems]


def shot(problem, config):
    """(question, text that answers it) of one example. Raises UserError where it has neither demonstration nor answer."""
    text = problem.answer if problem.solution is None else problem.solution
    if text is None:
        raise UserError(f"few_shot: {problem.columns[config.prompt_column]!r} has neither a demonstration nor a gold "
                        "answer; set solution_column or answer_column")
    return problem.columns[config.prompt_column], text


def draw(asked, own, count, rng):
    """Places of `count` different questions of `asked`, none of them `own`."""
    chosen = {}
    while len(chosen) < count:
        i = rng.randrange(len(asked))
        if asked[i] != own:
            chosen.setdefault(asked[i], i)
    return list(chosen.values())
