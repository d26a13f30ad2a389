"""
Few-shot examples: rows of the training data, each with its demonstration or gold answer, put before a prompt.
"""

import json
import random
from dataclasses import replace

from mlx_grpo import UserError
from mlx_grpo.problems import build_prompt, make_problem, read_rows


def with_examples(problems, pool, config):
    """The problems with `few_shot` examples of `pool` (training problems of the same data) in their prompts, drawn by the
    seed and the question; or with every row of the file that few_shot names. Never one that asks the same question."""
    if not config.few_shot:
        return problems
    if isinstance(config.few_shot, str):
        pool = [make_problem(row, config, where) for row, where in read_rows(config.few_shot)]
    asked = [json.dumps(p.columns[config.prompt_column]) for p in pool]
    if isinstance(config.few_shot, int) and len(set(asked)) <= config.few_shot:
        raise UserError(f"few_shot is {config.few_shot}, and {config.dataset!r} has {len(set(asked))} different training questions; "
                        "lower it, or use more rows")
    shots = [shot(problem, config) for problem in pool]
    found = []
    for problem in problems:
        own = json.dumps(problem.columns[config.prompt_column])
        if isinstance(config.few_shot, str):
            chosen = [i for i, other in enumerate(asked) if other != own]
        else:
            chosen = draw(asked, own, config.few_shot, random.Random(f"few-shot {config.seed} {own}"))
        examples = tuple(shots[i] for i in chosen)
        prompt = build_prompt(problem.columns, config, "few_shot", examples)
        found.append(replace(problem, prompt=prompt, examples=examples))
    return found


def shot(problem, config):
    """(question, text that answers it) of one example. Raises UserError where it has neither demonstration nor answer."""
    text = problem.answer if problem.solution is None else problem.solution
    if text is None:
        raise UserError(f"few_shot: {problem.columns[config.prompt_column]!r} has neither a demonstration nor a gold answer; set "
                        "solution_column or answer_column")
    return problem.columns[config.prompt_column], text


def draw(asked, own, count, rng):
    """Places of `count` different questions of `asked`, none of them `own`."""
    chosen = {}
    while len(chosen) < count:
        i = rng.randrange(len(asked))
        if asked[i] != own:
            chosen.setdefault(asked[i], i)
    return list(chosen.values())
