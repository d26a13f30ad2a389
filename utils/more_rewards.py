"""
Built-in rewards that take options: `rewards = ["repetition"]` with `reward_options = { repetition = { ngram = 4 } }`. Part
of mlx_grpo, whose REWARDS lists them.

Each is a Maker: a function of the options that returns the reward function. The options are its keyword parameters, with
their types and defaults; what is wrong with them is told before a model is loaded.
"""

import functools
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_grpo import ConfigError, completion_text, extract_answer, nearest, same_answer

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a table",
         dict | str: "a table or the path of a .json file"}
GIVEN = ("prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric")   # no options


@dataclass(frozen=True)
class Maker:
    """A reward function to be made: `make(**options)` returns it. Its docstring is the function's description."""

    make: Callable

    @property
    def __doc__(self):
        return inspect.getdoc(self.make)

    @property
    def options(self):
        """{name: parameter} of the options; one without a default must be given."""
        return inspect.signature(self.make).parameters


def maker(make):
    return Maker(make)


def bind_options(spec, name, function, given):
    """The reward function with its options: those of a Maker checked and made, those of your own function bound to its
    parameters of that name. Raises ConfigError naming the option."""
    where = f"reward_options.{name}"
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must be a table of options, got {given!r}")
    if not callable(function) and not isinstance(function, Maker):
        raise ConfigError(f"rewards: {spec!r} is a {type(function).__name__}, not a function")
    if not isinstance(function, Maker) and not given:
        return function
    parameters = function.options if isinstance(function, Maker) else inspect.signature(function).parameters
    known = {k: p for k, p in parameters.items() if k not in GIVEN and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    reads_all = any(p.kind is p.VAR_KEYWORD and k != "_" for k, p in parameters.items())
    for key in given:
        if key not in known and not reads_all:
            raise ConfigError(f"{where}: there is no {key!r} (known: {', '.join(known) or 'none'}){nearest(key, known)}")
    if not isinstance(function, Maker):
        bound = functools.partial(function, **given)
        bound.__doc__ = inspect.getdoc(function)
        return bound
    if missing := [key for key, p in known.items() if p.default is p.empty and key not in given]:
        raise ConfigError(f"{where}: {missing[0]} is missing; reward {spec!r} can't do without it")
    made = function.make(**{key: checked(f"{where}.{key}", value, known[key].annotation) for key, value in given.items()})
    made.__doc__, made.__name__ = function.__doc__, name
    return made


def checked(where, value, kind):
    """An option's value, a whole number as a float where that is the kind. Raises ConfigError."""
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (type(value) is bool and kind is not bool):
        raise ConfigError(f"{where} must be {KINDS[kind]}, got {value!r}")
    return value


def demand(holds, where, value, wanted):
    """Raises ConfigError unless `holds`: "reward_options.WHERE is VALUE; WANTED"."""
    if not holds:
        raise ConfigError(f"reward_options: {where} is {value!r}; {wanted}")


def part_of(text, where):
    """The text that a reward looks at: the completion, or the answer in it ("" where there is none)."""
    return text if where == "completion" else (extract_answer(text) or "").strip()


def fenced(text, *languages):
    """The last block between ``` fences, of one of these languages or of none named; else the answer; else all of it."""
    blocks = re.findall(r"```([\w+-]*)[ \t]*\n(.*?)```", text, re.DOTALL)
    fitting = [block for language, block in blocks if language.lower() in ("", *languages)]
    answer = extract_answer(text)
    return fitting[-1] if fitting else text if answer is None else answer


# ---- form ------------------------------------------------------------------------------------------------------------

@maker
def regex(pattern: str, where: str = "completion", whole: bool = False):
    """1.0 where the pattern (Python's re; flags inside, as (?si)) is found, else 0.0.

    where: in the "completion" or in its "answer". whole: it must match all of it."""
    demand(where in ("completion", "answer"), "where", where, 'use "completion" or "answer"')
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"reward_options: pattern {pattern!r} is no regular expression: {error}") from error
    find = compiled.fullmatch if whole else compiled.search

    def score(completions, **_):
        return [float(find(part_of(completion_text(c), where)) is not None) for c in completions]
    return score


def no_constant(text):
    raise ValueError(f"{text} is not JSON")


@maker
def json_reward(schema: dict | str = ""):
    """1.0 for JSON, in the last ``` block, else in the answer, else the whole completion; else 0.0.

    schema: a JSON schema, as a table or the path of a .json file; JSON that breaks it gets 0.5. Remote references are not
    fetched. Needs jsonschema."""
    validator = schema_validator(schema) if schema else None

    def score_one(text):
        try:
            value = json.loads(fenced(text, "json"), parse_constant=no_constant)       # NaN is Python's JSON only
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if validator is None or validator.is_valid(value) else 0.5
    return lambda completions, **_: [score_one(completion_text(c)) for c in completions]


def schema_validator(schema):
    """A jsonschema validator that fetches nothing. Raises ConfigError for a file or schema that is none."""
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from jsonschema_specifications import REGISTRY
    except ImportError as error:
        raise ConfigError("reward 'json' checks a schema with jsonschema: pip install jsonschema") from error
    if isinstance(schema, str):
        try:
            schema = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward_options: schema {schema!r} can't be read: {error}") from error
    try:
        kind = validator_for(schema)
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"reward_options: schema is no JSON schema: {error.message}") from error
    return kind(schema, registry=REGISTRY)


# ---- length and repetition -------------------------------------------------------------------------------------------

@maker
def overlong(max_length: int, cache: int):
    """0 up to max_length - cache tokens, then falling to -1 at max_length, -1 beyond (DAPO, arXiv 2503.14476)."""
    demand(0 < cache <= max_length, "cache", cache, f"use 1 to max_length = {max_length} tokens")

    def score(completion_ids, **_):
        return [min(0.0, max(-1.0, (max_length - cache - len(ids)) / cache)) for ids in completion_ids]
    return score


@maker
def repetition(ngram: int = 3, max_penalty: float = -1.0):
    """max_penalty * (1 - different n-grams / n-grams) of the tokens; 0.0 below n tokens (arXiv 2502.03373).

    ngram: n, tokens. max_penalty: at most 0."""
    demand(ngram > 0, "ngram", ngram, "use at least 1")
    demand(max_penalty <= 0, "max_penalty", max_penalty, "use at most 0")

    def score_one(ids):
        grams = list(zip(*(ids[i:] for i in range(ngram))))
        repeated = 1 - len(set(grams)) / len(grams) if grams else 0
        return max_penalty * repeated if repeated else 0.0
    return lambda completion_ids, **_: [score_one(ids) for ids in completion_ids]


@maker
def cosine_length(max_length: int, correct: list = [1.0, 0.5], wrong: list = [-1.0, -0.5]):    # noqa: B006  read only
    """b + (a - b)(1 + cos(pi L / max_length)) / 2 for L tokens, from a (shortest) to b (max_length and beyond), where
    [a, b] is `correct` or `wrong` as the answer is (arXiv 2502.03373): a short right answer earns most, and a long wrong
    one loses least. None without a gold answer."""
    demand(max_length > 0, "max_length", max_length, "use at least 1 token")
    for name, pair in (("correct", correct), ("wrong", wrong)):
        fits = len(pair) == 2 and all(type(v) in (int, float) and math.isfinite(v) for v in pair)
        demand(fits, name, pair, "use two numbers, [shortest, longest]")

    def score_one(text, ids, gold):
        a, b = correct if same_answer(extract_answer(text), gold) else wrong
        return b + 0.5 * (a - b) * (1 + math.cos(math.pi * min(len(ids), max_length) / max_length))

    def score(completions, completion_ids, answer, **_):
        return [None if gold is None else score_one(completion_text(c), ids, gold)
                for c, ids, gold in zip(completions, completion_ids, answer)]
    return score


# ---- those with a module of their own --------------------------------------------------------------------------------

@maker
def math_verify(timeout: float = 5.0):
    """1.0 where the answer equals the gold one as mathematics (1/2 = 0.5 = \\frac{1}{2}), by math-verify, else 0.0; None
    where the gold answer is none. timeout: seconds for each of parsing and comparing. Needs math-verify."""
    demand(timeout >= 1, "timeout", timeout, "use at least 1 second")
    return importlib.import_module("mlx_grpo.math_equal").make_reward(timeout)


@maker
def code(tests_column: str = "tests", timeout: float = 5.0, memory_mb: int = 512, partial: bool = True, workers: int = 0,
         allow_unsandboxed: bool = False):
    """Share of the row's tests that the Python program in the completion (last ``` block, else the answer, else all) passes,
    run in a sandbox; None for a row without tests.

    partial: false = 1.0 for all tests, else 0.0. timeout: seconds for a program with its tests. workers: programs at once,
    0 = one for each CPU. allow_unsandboxed: run even where programs can't be isolated."""
    module = importlib.import_module("mlx_grpo.code_reward")
    return module.make_reward(tests_column, timeout, memory_mb, partial, workers, allow_unsandboxed)


@maker
def judge(url: str, model: str, prompt: str = "", scale: list = [0, 10], temperature: float = 0.0,      # noqa: B006
          max_tokens: int = 512, api_key_env: str = "OPENAI_API_KEY", timeout: float = 60.0, retries: int = 4,
          concurrency: int = 8, cache: str = "outputs/judge.sqlite", price_in: float = 0.0, price_out: float = 0.0,
          max_cost: float = 0.0, body: dict = {}):                                                      # noqa: B006
    """The score, moved to 0..1, that a model behind an OpenAI-compatible endpoint gives; None where it gives none.

    prompt: with {prompt}, {completion}, {answer}; empty = a general one, whose reply ends "Score: N" within `scale`. Prices:
    US dollars for a million tokens. max_cost: US dollars over all runs with this cache, then the run stops; 0 = no limit.
    body: further fields of the request."""
    given = dict(locals())
    module = importlib.import_module("mlx_grpo.judge")
    return module.make_reward(**given | {"prompt": prompt or module.PROMPT})


MORE_REWARDS = {
    "math_verify": math_verify,
    "regex": regex,
    "json": json_reward,
    "overlong": overlong,
    "repetition": repetition,
    "cosine_length": cosine_length,
    "code": code,
    "judge": judge,
}
