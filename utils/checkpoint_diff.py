"""Which tensors of two checkpoints differ, and by how much."""

from dataclasses import asdict, dataclass

import numpy as np

from mlx_grpo import UserError
from mlx_grpo.checkpoint_weights import open_weights

BITS_ONLY = {"U32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64", "F4"}     # packed or without a NumPy type: equal or not


@dataclass(frozen=True)
class Change:
    """A tensor that differs. `changed` counts its elements that do; `largest` is the largest absolute difference,
    `relative` the norm of the difference over A's norm; both None where only the bits can be compared, over finite
    elements otherwise; `not_finite` counts changed elements that are NaN or infinite on either side."""
    name: str
    shape: list
    types: list             # of A and B
    elements: int
    changed: int
    largest: float
    relative: float
    not_finite: int


@dataclass(frozen=True)
class Difference:
    only_in_a: list
    only_in_b: list
    reshaped: list          # [name, shape in A, shape in B]
    changed: list           # of Change, the largest relative one first
    equal: int              # tensors with the same type, shape and bits

    @property
    def none(self):
        return not (self.only_in_a or self.only_in_b or self.reshaped or self.changed)


def diff(a, b):
    """The Difference between the weights of two Founds (the adapters, of a run that trains those). Reads both once, in
    pieces. Raises UserError where one can't be read, or they share no name."""
    first, second = open_weights(a), open_weights(b)
    try:
        shared = [name for name in first.tensors if name in second.tensors]
        if not shared:
            names = [next(iter(weights.tensors), "none") for weights in (first, second)]
            raise UserError(f"{a.path} and {b.path} have no tensor name in common ({', '.join(names)}); "
                            "only checkpoints of one format and model compare")
        reshaped = [[name, list(first.tensors[name][1]), list(second.tensors[name][1])] for name in shared
                    if first.tensors[name][1] != second.tensors[name][1]]
        skipped = {name for name, _, _ in reshaped}
        results = [compare(name, first, second) for name in shared if name not in skipped]
    finally:
        first.close()
        second.close()
    changed = [one for one in results if one]
    changed.sort(key=lambda one: (one.not_finite, one.relative or 0, one.changed), reverse=True)
    only_in_a, only_in_b = set(first.tensors) - set(second.tensors), set(second.tensors) - set(first.tensors)
    return Difference(sorted(only_in_a), sorted(only_in_b), reshaped, changed, len(results) - len(changed))


def compare(name, first, second):
    """The Change of one tensor, None where type and bits are equal."""
    (kind, shape), (other, _) = first.tensors[name], second.tensors[name]
    numbers = kind not in BITS_ONLY and other not in BITS_ONLY
    elements = changed = not_finite = 0
    largest = of_difference = of_a = 0.0
    for a, b in aligned(first.pieces(name), second.pieces(name)):
        elements += a.size
        differ = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}") if a.dtype == b.dtype else a != b
        changed += int(np.count_nonzero(differ))
        if not numbers:
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        not_finite += int(np.count_nonzero(differ & ~finite))
        gap = np.abs(a[finite] - b[finite])
        largest = max(largest, float(gap.max(initial=0.0)))
        of_difference += float(gap @ gap)
        of_a += float(a[finite] @ a[finite])
    if not changed and kind == other:
        return None
    relative = None if not numbers else (of_difference / of_a) ** 0.5 if of_a else None
    return Change(name, list(shape), [kind, other], elements, changed, largest if numbers else None, relative,
                  not_finite)


def aligned(first, second):
    """Pairs of equally long arrays from two streams of arrays that add up to the same length."""
    a, b = np.empty(0), np.empty(0)
    while True:
        a, b = a if a.size else next(first, a), b if b.size else next(second, b)
        size = min(a.size, b.size)
        if not size:
            return
        yield a[:size], b[:size]
        a, b = a[size:], b[size:]


def lines(difference, most=20):
    """The Difference for people, `most` changed tensors at most."""
    d = difference
    yield f"{d.equal} tensors equal, {len(d.changed)} changed"
    yield from (f"only in A: {name}" for name in d.only_in_a)
    yield from (f"only in B: {name}" for name in d.only_in_b)
    yield from (f"shape: {name} {a} in A, {b} in B" for name, a, b in d.reshaped)
    width = max((len(one.name) for one in d.changed[:most]), default=0)
    if d.changed:
        yield f"{'tensor'.ljust(width)}  {'elements':>22}  {'largest':>9}  {'relative':>9}"
    for one in d.changed[:most]:
        count = f"{one.changed} of {one.elements}"
        row = f"{one.name.ljust(width)}  {count:>22}  {number(one.largest):>9}  {number(one.relative):>9}"
        row += f"  {one.types[0]} to {one.types[1]}" if one.types[0] != one.types[1] else ""
        yield row + (f"  {one.not_finite} not finite" if one.not_finite else "")
    if len(d.changed) > most:
        yield f"and {len(d.changed) - most} more; --json lists all"


def number(value):
    return "-" if value is None else f"{value:.3g}"


def as_json(difference):
    return asdict(difference)
