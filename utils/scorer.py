"""
Calling reward functions: TRL's signature, coroutines awaited together, and what happens when one fails. Part of mlx_grpo,
which gives Scorer and RewardError out again.
"""

import asyncio
import contextlib
import functools
import inspect
import json
import math
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

from mlx_grpo import UserError, nearest

COMPLETION_COLUMNS = ("step", "prompt", "answer", "completion", "rewards", "reward", "advantage", "length", "ended")


class RewardError(UserError):
    """A reward function raised, or returned something that is not one finite number or None for each completion."""


KINDS = {"mean": lambda values: sum(values) / len(values), "sum": sum, "max": max}      # of a logged metric


class Logs:
    """What one call of a reward function logs. extras: column -> values of log_extra; metrics: (name, kind) -> list of what
    log_metric got, from which the step's number is made as KINDS says."""

    def __init__(self):
        self.extras, self.metrics = {}, {}

    def log_extra(self, column, values):
        if column in COMPLETION_COLUMNS:
            raise ValueError(f"log_extra can't replace the column {column!r}; use another name")
        values = [v.item() if isinstance(v, (np.generic, mx.array)) else v for v in values]
        json.dumps(values)                                # a value that can't be logged is an error of the function
        self.extras[column] = values

    def log_metric(self, name, value, kind="mean"):
        if kind not in KINDS:
            raise ValueError(f"log_metric makes one number of a step's values by {', '.join(KINDS)}, not by {kind!r}")
        self.metrics.setdefault((name, kind), []).append(float(value))


def thread_safe(function):
    """Whether a reward function says that several threads may call it at once (function.thread_safe = True)."""
    return getattr(function.func if isinstance(function, functools.partial) else function, "thread_safe", False)


def call_rewards(calls, turn=None):
    """[(values, extras, metrics), or the exception] for calls, a list of (function, arguments).

    The functions run one after the other; what coroutine functions left to be awaited then runs together, in a thread, as
    the caller may have an event loop of its own. turn: a lock, held while functions run that aren't thread_safe."""
    logs, found = [Logs() for _ in calls], []
    alone = lambda functions: turn if turn and not all(map(thread_safe, functions)) else contextlib.nullcontext()
    for (function, given), log in zip(calls, logs):
        try:
            logging = {k: getattr(log, k) for k in ("log_extra", "log_metric") if k in given}
            with alone([function]):
                value = function(**given | logging)
                found.append(list(value) if inspect.isgenerator(value) else value)
        except SystemExit as error:
            found.append(RuntimeError(f"it ended the program (exit {error.code})"))
        except Exception as error:                        # the user's code may raise anything
            found.append(error)
    if waiting := [i for i, value in enumerate(found) if inspect.iscoroutine(value)]:
        async def together():
            return await asyncio.gather(*(found[i] for i in waiting), return_exceptions=True)

        with alone([calls[i][0] for i in waiting]), ThreadPoolExecutor(1) as pool:
            for i, value in zip(waiting, pool.submit(asyncio.run, together()).result()):
                found[i] = value
    for i, value in enumerate(found):
        if not isinstance(value, BaseException):
            try:
                if not isinstance(value, Iterable):
                    raise TypeError(f"it returned {value!r}, not a list with a number for each completion")
                found[i] = list(value), logs[i].extras, logs[i].metrics
            except Exception as error:                    # None, or a generator that raises
                found[i] = error
    return found


def call_reward(function, given):
    """(values, extras, metrics) of one call; raises what the function raises."""
    (found,) = call_rewards([(function, given)])
    if isinstance(found, BaseException):
        raise found
    return found


def joined(name, parts, sizes):
    """([values of each part], extras, metrics) of what the calls of one function gave for parts of the rows, or the first
    exception among them. sizes: rows of each part. Raises RewardError for a column of another length."""
    if error := next((found for found in parts if isinstance(found, BaseException)), None):
        return error
    extras, metrics = {column: [] for _, extras, _ in parts for column in extras}, {}
    for (_, logged, numbers), size in zip(parts, sizes):
        for column, values in extras.items():
            given = logged.get(column, [None] * size)
            if len(given) != size:
                raise RewardError(f"reward {name!r}: log_extra({column!r}) got {len(given)} values for {size} completions; "
                                  "give one each")
            values += given
        for key, more in numbers.items():
            metrics.setdefault(key, []).extend(more)
    return [values for values, _, _ in parts], extras, metrics


def rows_of(rollouts):
    """[(Problem, completion ids, completion text)] of all completions."""
    return [(r.problem, ids, text) for r in rollouts for ids, text in zip(r.completion_ids, r.texts)]


def row_of(given, i):
    """The arguments for row i alone."""
    return {name: [value[i]] if isinstance(value, list) else value for name, value in given.items()}


def finite_number(value):
    """A reward as a float; None for what isn't a finite number."""
    try:
        return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else None
    except OverflowError:                                 # an int beyond floats
        return None


def reward_arguments(rows, trainer_state=None, columns=()):
    """What reward functions may ask for, by name. rows: [(Problem, completion ids, completion text)]; columns: more names
    of columns than these rows have, None in each of them."""
    columns = sorted(set(columns).union(*(p.columns for p, _, _ in rows)))
    return {name: [p.columns.get(name) for p, _, _ in rows] for name in columns} | {
        "prompts": [p.prompt for p, _, _ in rows],
        "completions": [t if isinstance(p.prompt, str) else [{"role": "assistant", "content": t}] for p, _, t in rows],
        "completion_ids": [list(ids) for _, ids, _ in rows],
        "trainer_state": trainer_state, "log_extra": None, "log_metric": None,          # call_rewards puts these in
    }


def arguments_for(name, function, arguments):
    """Those that the function names, or all of them if it has **kwargs, less those that reward_options gave it. Raises
    RewardError for an unknown one."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    try:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in bound]
    except ValueError as error:
        raise RewardError(f"reward {name!r} is built in and doesn't tell its arguments; wrap it in a def") from error
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in needed:
        if parameter not in arguments:
            raise RewardError(f"reward {name!r} asks for {parameter!r}, which is no column of the data "
                              f"({', '.join(sorted(arguments))}){nearest(parameter, arguments)}")
    wants_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters}
    return {k: v for k, v in arguments.items() if k in known or (wants_all and k not in bound)}


class Scorer:
    """Calls the reward functions on all rollouts of a step, under TRL's signature.

    f(prompts, completions, **columns) -> list[float | None]; a function gets the arguments that it names, or all of
    them if it has **kwargs: prompts, completions (text for a plain prompt, one assistant message for a chat),
    completion_ids, every column of the data, trainer_state, log_extra(column, values), log_metric(name, value)."""

    def __init__(self, functions, weights=(), on_error="stop", max_errors=100):
        self.functions = functions
        self.weights = np.array(weights or [1.0] * len(functions))
        self.on_error, self.max_errors = on_error, max_errors
        self.errors, self.lock, self.turn = 0, threading.Lock(), threading.Lock()     # several threads may score at once

    def __call__(self, rollouts, trainer_state=None):
        """(scores, extras, metrics): scores (B, number of functions) float64, NaN where a function returned None;
        extras: column -> B values for completions.jsonl; metrics: name -> number made of what was logged. Raises
        RewardError."""
        scores, extras, metrics = self.check(rollouts, trainer_state, [self.call(rollouts, trainer_state)])
        return scores, extras, self.finish(metrics)

    def call(self, rollouts, trainer_state=None, columns=()):
        """What call_rewards gives for some rollouts."""
        return call_rewards(self.calls(rollouts, trainer_state, columns), self.turn)

    def calls(self, rollouts, trainer_state, columns=()):
        """[(function, arguments)] for some rollouts."""
        arguments = reward_arguments(rows_of(rollouts), trainer_state, columns)
        return [(function, arguments_for(name, function, arguments)) for name, function in self.functions.items()]

    def check(self, rollouts, trainer_state, parts):
        """(scores, extras, metrics by (name, kind)) from `parts`, what self.call gave for equal shares of the rollouts."""
        rows, sizes = rows_of(rollouts), [len(rows_of(rollouts)) // len(parts)] * len(parts)
        calls = self.calls(rollouts, trainer_state)
        scores, extras, metrics = np.full((len(rows), len(calls)), np.nan), {}, {}
        for k, (name, call) in enumerate(zip(self.functions, calls)):
            found = joined(name, [part[k] for part in parts], sizes)
            scores[:, k], logged, numbers = self.check_one(name, *call, found, sizes, rows)
            extras |= logged
            for key, values in numbers.items():
                metrics.setdefault(key, []).extend(values)
        return scores, extras, metrics

    def finish(self, metrics):
        """{name: number} of metrics by (name, kind), with the number of errors so far."""
        found = {name: KINDS[kind](values) for (name, kind), values in metrics.items()}
        return found | ({"reward_errors": self.errors} if self.errors else {})

    def check_one(self, name, function, given, found, sizes, rows):
        """(column (B,), extras, metrics) of what a function gave. What to do about an error is on_error's to say."""
        if isinstance(found, BaseException):
            reason = f"raised {type(found).__name__}: {found}"
            if self.on_error == "stop" and isinstance(found, UserError):
                raise RewardError(f"reward {name!r}: {found}") from found
            if self.on_error == "stop":
                raise RewardError(f"reward {name!r} {reason}{self.culprit(function, given, rows)}") from found
            values, extras, metrics = self.score_rows(function, given, len(rows))
        else:
            lists, extras, metrics = found
            values, reason = [v for values in lists for v in values], "returned something else than a finite number"
            if wrong := [i for i, size in enumerate(sizes) if len(lists[i]) != size]:
                reason = f"returned {len(lists[wrong[0]])} values for {sizes[0]} completions"
                problem, _, text = rows[wrong[0] * sizes[0]]
                if self.on_error == "stop":
                    raise RewardError(f"reward {name!r} {reason}, the first of them {text!r} to {problem.prompt!r}; return "
                                      "one value each")
                values = [math.nan] * len(rows)
        column, bad = np.full(len(rows), np.nan), 0
        for i, value in enumerate(values):
            number = finite_number(value)
            if number is not None:
                column[i] = number
            elif value is not None:
                bad += 1
                if self.on_error == "stop":
                    raise RewardError(f"reward {name!r} returned {value!r} for the completion {rows[i][2]!r} to "
                                      f"{rows[i][0].prompt!r}; return a finite number, or None for 'does not apply'")
        if bad:
            self.count_errors(bad, name, reason)
        return column, extras, metrics

    @staticmethod
    def score_rows(function, given, n):
        """Each row alone, after the whole batch raised; NaN for one that raises again, to be counted."""
        values, extras, metrics = [], {}, {}
        for i in range(n):
            try:
                (value,), logged, numbers = call_reward(function, row_of(given, i))
                logged = {column: entry for column, (entry,) in logged.items()}
            except Exception:                            # counted, logged, and stopping after max_errors
                values.append(math.nan)
                continue
            values.append(value)
            for column, entry in logged.items():
                extras.setdefault(column, [None] * n)[i] = entry
            for key, more in numbers.items():
                metrics.setdefault(key, []).extend(more)
        return values, extras, metrics

    @staticmethod
    def culprit(function, given, rows):
        """" on the completion ... to ..." for the first row that raises alone; for the whole batch if none does."""
        for i, (problem, _, text) in enumerate(rows):
            try:
                call_reward(function, row_of(given, i))
            except Exception:                            # found: named in the message of the RewardError being raised
                return f" on the completion {text!r} to {problem.prompt!r}"
        return f" on {len(rows)} completions together, the first of them {rows[0][2]!r} to {rows[0][0].prompt!r}"

    def count_errors(self, n, name, reason):
        with self.lock:
            self.errors += n
        print(f"reward {name!r} {reason}: {n} rows left out ({self.errors} so far)", file=sys.stderr)
        if self.errors > self.max_errors:
            raise RewardError(f"{self.errors} reward errors, more than max_reward_errors = {self.max_errors}; "
                              f"the last: reward {name!r} {reason}")
