"""
What is wrong with a reward function, found by calling it (`mlx_grpo.py rewards test`).

    code               what was seen
    raises             an exception, and on which kinds of completion
    wrong-length       not one value for each completion
    not-finite         a value that is no finite number and not None
    never-applies      None for every completion
    constant           the same value for every completion
    rewards-empty      more than 0 for an empty or blank completion
    gold               a row whose gold answer gets less than a wrong one, or no more than an almost right one does there
    wrong-answer-pays  a function that tells right from wrong, and gives a wrong answer as much as the right one
    random             other values when it is called again
    order              other values when the rows come in another order
    other-rows         other values when a row comes alone
    changes-arguments  it writes into the lists that it is given
"""

import contextlib
import copy
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from mlx_grpo import RewardError
from mlx_grpo.scorer import arguments_for, call_rewards, finite_number, reward_arguments, row_of

ALONE = 24             # completions that are also scored alone
CLOSE = 1e-9           # values this near are equal


@dataclass
class Row:
    """One completion under test: of which problem (its number), the probe, its token ids."""

    problem: object
    number: int
    probe: object
    ids: list


@dataclass
class Tested:
    """What calling one function gave. values: (B,) float64, NaN for None and where it failed; flags: [(code, text)]."""

    name: str
    values: np.ndarray
    none: int = 0
    failed: int = 0
    seconds: float = 0.0
    flags: list = field(default_factory=list)

    def flag(self, code, text):
        self.flags.append((code, text))


def shown(text, limit=70):
    """A text on one line, shortened."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


def counted(n, of, what="rows"):
    return f"{n} of {of} {what}"


def test_function(name, function, rows):
    """A Tested with all flags of one function on these Rows."""
    found = Tested(name, np.full(len(rows), np.nan))
    state = SimpleNamespace(global_step=0, max_steps=1, epoch=0.0)
    arguments = reward_arguments([(row.problem, row.ids, row.probe.text) for row in rows], state)
    try:
        given = arguments_for(name, function, arguments)
    except RewardError as error:               # a column that the data doesn't have
        found.failed = len(rows)
        found.flag("raises", str(error))
        return found
    copied = copy.deepcopy(given)
    started = time.perf_counter()
    values = call(function, copied)
    found.seconds = time.perf_counter() - started
    if isinstance(values, BaseException):
        values = raised(found, function, given, rows, values)
    elif copied != given:
        found.flag("changes-arguments", "it changes the lists that it is given, which others get too; copy them first")
    if len(values) != len(rows):
        found.flag("wrong-length", f"it returned {len(values)} values for {len(rows)} completions")
        found.failed = len(rows)
        return found
    keep_values(found, values, rows)
    check_values(found, rows)
    check_answers(found, rows)
    check_calls(found, function, given)
    return found


def call(function, given):
    """What one call returns, as a list, or the exception. What it prints goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        (outcome,) = call_rewards([(function, given)])
    return outcome if isinstance(outcome, BaseException) else outcome[0]


def raised(found, function, given, rows, error):
    """The values row by row, after the whole batch raised; NaN where a row raises too."""
    values, kinds = [], defaultdict(int)
    for i, row in enumerate(rows):
        alone = call(function, copy.deepcopy(row_of(given, i)))
        bad = isinstance(alone, BaseException) or len(alone) != 1
        kinds[row.probe.kind] += bad
        found.failed += bad
        values.append(None if bad else alone[0])
    where = ", ".join(kind for kind, n in kinds.items() if n) or "all completions together, and not on each alone"
    found.flag("raises", f"{type(error).__name__}: {' '.join(str(error).split())} (on: {where})")
    return values


def keep_values(found, values, rows):
    """Numbers into found.values; None and what is no finite number are counted."""
    bad = []
    for i, value in enumerate(values):
        number = finite_number(value)
        if number is not None:
            found.values[i] = number
        elif value is not None:
            bad.append(i)
    found.none = sum(value is None for value in values) - (found.failed if found.flags else 0)
    found.failed += len(bad)
    if bad:
        found.flag("not-finite", f"it returned {values[bad[0]]!r} for {rows[bad[0]].probe.kind!r} "
                   f"({counted(len(bad), len(rows), 'completions')}); return a finite number, or None for 'does not apply'")


def check_values(found, rows):
    known = found.values[~np.isnan(found.values)]
    if not len(known):
        if not found.failed:
            found.flag("never-applies", f"it returned None for all {len(rows)} completions")
        return
    if len(known) > 1 and np.ptp(known) < CLOSE:
        found.flag("constant", f"it gave {known[0]:g} to all {len(known)} completions that it scored: nothing to learn from")
    blank = [i for i, row in enumerate(rows) if row.probe.kind in ("empty", "whitespace") and found.values[i] > CLOSE]
    if blank:
        found.flag("rewards-empty", f"the {rows[blank[0]].probe.kind} completion gets {found.values[blank[0]]:g}")


def best(values, rows, wanted):
    """{row number: (value, Row)} of the highest value among the probes that `wanted` picks; NaN left out."""
    found = {}
    for value, row in zip(values, rows):
        if wanted(row.probe) and not math.isnan(value) and value > found.get(row.number, (-math.inf,))[0]:
            found[row.number] = value, row
    return found


def check_answers(found, rows):
    """gold and wrong-answer-pays: the best form of the gold answer against the wrong ones, row by row."""
    right = best(found.values, rows, lambda p: p.right is True)
    near = best(found.values, rows, lambda p: p.kind == "off by one")
    wrong = best(found.values, rows, lambda p: p.right is False)
    tells = any(right[n][0] > near[n][0] + CLOSE for n in right if n in near)          # right from wrong, on some row
    missed = [n for n in right if n in wrong and right[n][0] < wrong[n][0] - CLOSE
              or tells and n in near and right[n][0] <= near[n][0] + CLOSE]
    if missed:
        n = missed[0]
        value, row = wrong[n]
        found.flag("gold", f"on {counted(len(missed), len(right))} the gold answer doesn't satisfy it: "
                   f"{row.problem.answer!r} gets {right[n][0]:g} in its best form, {row.probe.kind!r} {value:g}")
    pays = [n for n in right if tells and n not in missed and n in wrong and wrong[n][0] >= right[n][0] - CLOSE]
    if pays:
        value, row = wrong[pays[0]]
        found.flag("wrong-answer-pays", f"on {counted(len(pays), len(right))} {row.probe.kind!r} gets {value:g}, as much "
                   f"as the gold answer {row.problem.answer!r}: {shown(row.probe.text)}")


def check_calls(found, function, given):
    """random, order and other-rows: the same rows again, in reverse, and some of them alone."""
    if found.failed:
        return
    again = numbers(call(function, copy.deepcopy(given)))
    if not equal(again, found.values):
        found.flag("random", f"the same call gave other values ({differences(found.values, again)})")
        return
    backwards = {name: value[::-1] if isinstance(value, list) else value for name, value in copy.deepcopy(given).items()}
    turned = numbers(call(function, backwards))
    if not equal(turned[::-1], found.values):
        found.flag("order", f"the rows in reverse order get other values ({differences(found.values, turned[::-1])})")
    step = max(1, len(found.values) // ALONE)
    for i in range(0, len(found.values), step):
        alone = numbers(call(function, copy.deepcopy(row_of(given, i))))
        if not equal(alone, found.values[i:i + 1]):
            found.flag("other-rows", f"a row alone gets another value ({differences(found.values[i:i + 1], alone)}): it "
                       "depends on the other rows of the batch")
            return


def numbers(values):
    """A call's values as float64, NaN for None; empty where it raised or returned something else."""
    if isinstance(values, BaseException):
        return np.array([])
    return np.array([math.nan if v is None or finite_number(v) is None else float(v) for v in values])


def equal(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=CLOSE, equal_nan=True)


def differences(before, after):
    """"0.5, then 0.25" for the first value that differs."""
    if before.shape != after.shape:
        return f"{len(before)} values, then {len(after) or 'an exception'}"
    i = next(i for i, (a, b) in enumerate(zip(before, after)) if not equal(np.array([a]), np.array([b])))
    return f"{before[i]:g}, then {after[i]:g}"


def total_of(tested, weights, rows):
    """A Tested named "total": the weighted sum that is trained on, with what it pays wrong answers."""
    columns = np.stack([t.values for t in tested])
    values = np.where(np.isnan(columns).all(axis=0), np.nan, np.nansum(columns * np.array(weights)[:, None], axis=0))
    total = Tested("total", values, none=int(np.isnan(values).sum()))
    right = best(values, rows, lambda p: p.right is True)
    kinds = defaultdict(list)
    for value, row in zip(values, rows):
        if row.probe.right is False and row.number in right and value >= right[row.number][0] - CLOSE:
            kinds[row.probe.kind].append((value, row))
    for kind, cases in kinds.items():
        value, row = cases[0]
        n = len({row.number for _, row in cases})
        total.flag("wrong-answer-pays", f"on {counted(n, len(right))} {kind!r} earns {value:g}, and the gold answer "
                   f"{right[row.number][0]:g}")
    return total
