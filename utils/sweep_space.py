"""
What a sweep tries: its TOML file read and checked, and the combinations of values that it names. Part of utils/sweep.py.

    [values]
    learning_rate = { log_uniform = [1e-6, 1e-4] }      # random: drawn; grid: with points = 5
    kl_coeff = [0.0, 0.01, 0.04]                        # choices
    lora_rank = { range = [4, 16, 4] }                  # 4, 8, 12, 16
    temperature = { uniform = [0.7, 1.1] }
"""

import itertools
import json
import math
import random
import tomllib
from dataclasses import dataclass

from mlx_grpo import OPTIONS, ConfigError, check_option, nearest

KEYS = {"method": "grid", "runs": 0, "seed": 0, "metric": "eval/exact_match", "goal": "max", "pick": "last",
        "command": "train", "values": {}}
CHOICES = {"method": ("grid", "random"), "goal": ("max", "min"), "pick": ("last", "best"), "command": ("train", "sft")}
NOT_SWEPT = ("output_dir", "run_name")       # each run has its own
MAX_RUNS = 10_000                            # combinations of a grid


@dataclass(frozen=True)
class Space:
    """A checked sweep file. values: option -> list of choices, or (kind, low, high) to draw from."""

    method: str
    runs: int
    seed: int
    metric: str
    goal: str
    pick: str
    command: str
    values: dict


def read_space(path):
    """The Space of a TOML file. Raises ConfigError, naming the file, for anything that isn't as it should be."""
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: can't read the sweep: {error.strerror}; check --sweep") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for key, value in table.items():
        if key not in KEYS:
            hint = " (options to try belong in the table [values])" if key in OPTIONS else nearest(key, KEYS)
            raise ConfigError(f"{path}: unknown key {key!r}{hint}; there are {', '.join(KEYS)}")
        if type(value) is not type(KEYS[key]):
            raise ConfigError(f"{path}: {key} must be a {type(KEYS[key]).__name__}, got {value!r}")
        if key in CHOICES and value not in CHOICES[key]:
            raise ConfigError(f"{path}: {key} must be one of {', '.join(CHOICES[key])}, got {value!r}"
                              + nearest(value, CHOICES[key]))
    found = KEYS | table
    if not found["values"]:
        raise ConfigError(f"{path}: [values] names no option; learning_rate = [1e-6, 1e-5] for instance")
    if found["method"] == "random" and found["runs"] < 1:
        raise ConfigError(f"{path}: method random needs runs = how many, got {found['runs']}")
    if found["method"] == "grid" and "runs" in table:
        raise ConfigError(f"{path}: runs belongs to method random; a grid has as many as there are combinations (--max-runs "
                          "does a part of them)")
    values = {name: parse_values(name, spec, found["method"], path) for name, spec in found["values"].items()}
    return Space(**found | {"values": values})


def parse_values(name, spec, method, path):
    """The choices of one option as a list, or (kind, low, high) to draw from. Raises ConfigError."""
    if name in NOT_SWEPT:
        raise ConfigError(f"{path}: {name} can't be swept: each run has one of its own")
    if name not in OPTIONS:
        check_option(name, spec, f"{path} [values]")          # raises, with the nearest name
    if isinstance(spec, list):
        choices = spec
    elif isinstance(spec, dict) and "range" in spec:
        choices = stepped(name, spec, path)
    elif isinstance(spec, dict) and {"uniform", "log_uniform"} & spec.keys():
        kind, low, high, points = bounds(name, spec, path)
        for value in (low, high):
            check_option(name, value, f"{path} [values]")
        if method == "random":
            return kind, low, high
        if not points:
            raise ConfigError(f"{path}: {name}: a grid needs {kind} with points = how many, at least 2")
        choices = list(dict.fromkeys(inside(name, kind, low, high, i / (points - 1)) for i in range(points)))
    else:
        raise ConfigError(f"{path}: {name} must be a list of choices, or a table with range = [low, high, step], uniform or "
                          f"log_uniform = [low, high], got {spec!r}")
    choices = [check_option(name, value, f"{path} [values]") for value in choices]
    if not choices:
        raise ConfigError(f"{path}: {name} has no choices")
    return choices


def stepped(name, spec, path):
    """The numbers of { range = [low, high, step] }, both ends included: [4, 16, 4] -> 4, 8, 12, 16."""
    numbers = spec["range"]
    fits = isinstance(numbers, list) and len(numbers) == 3 and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    if not fits or set(spec) != {"range"} or numbers[2] <= 0 or numbers[0] > numbers[1]:
        raise ConfigError(f"{path}: {name}: expected {{ range = [low, high, step] }} with a step above 0, got {spec!r}")
    low, high, step = numbers
    count = math.floor((high - low) / step + 1e-9) + 1
    if count > MAX_RUNS:
        raise ConfigError(f"{path}: {name}: range {numbers} has {count} values, more than {MAX_RUNS}")
    whole = all(type(n) is int for n in numbers)
    return [low + i * step if whole else float(f"{low + i * step:.12g}") for i in range(count)]


def bounds(name, spec, path):
    """(kind, low, high, points or None) of { uniform or log_uniform = [low, high], points = n }."""
    kind = "log_uniform" if "log_uniform" in spec else "uniform"
    ends, points = spec[kind], spec.get("points")
    fits = isinstance(ends, list) and len(ends) == 2 and all(type(n) in (int, float) for n in ends) and ends[0] < ends[1]
    if not fits or set(spec) - {kind, "points"} or (kind == "log_uniform" and ends[0] <= 0):
        raise ConfigError(f"{path}: {name}: expected {{ {kind} = [low, high] }}"
                          + (" with low above 0" if kind == "log_uniform" else "") + f", got {spec!r}")
    if points is not None and (type(points) is not int or not 2 <= points <= MAX_RUNS):
        raise ConfigError(f"{path}: {name}: points must be a whole number of at least 2, got {points!r}")
    if OPTIONS[name].type.startswith(("str", "bool", "list", "dict")):
        raise ConfigError(f"{path}: {name} is a {OPTIONS[name].type} and has no {kind} values; list choices")
    return kind, *ends, points


def inside(name, kind, low, high, share):
    """The value at `share` in [0, 1] of the way from low to high, even on a log scale for log_uniform; a whole number for an
    option of whole numbers, else to 6 digits."""
    value = low * (high / low) ** share if kind == "log_uniform" else low + share * (high - low)
    if OPTIONS[name].type.startswith("int"):
        return min(max(round(value), math.ceil(low)), math.floor(high))
    return float(f"{value:.6g}")


def combinations(space):
    """[{option: value}] of all runs. A grid: every combination, the last option fastest. Random: `runs` different ones,
    fewer where there aren't as many; draw i of an option depends on (seed, option, i) alone, so that more runs, or another
    option beside, leave the others as they are. Raises ConfigError for a grid of more than MAX_RUNS."""
    if space.method == "grid":
        count = math.prod(len(choices) for choices in space.values.values())
        if count > MAX_RUNS:
            raise ConfigError(f"the grid has {count} combinations, more than {MAX_RUNS}; try fewer, or method = \"random\"")
        rows = [dict(zip(space.values, row)) for row in itertools.product(*space.values.values())]
        return list({key_of(values): values for values in rows}.values())
    found = {}
    for i in range(20 * space.runs + 100):
        values = {name: draw(space.seed, i, name, spec) for name, spec in space.values.items()}
        found.setdefault(key_of(values), values)
        if len(found) == space.runs:
            break
    return list(found.values())


def draw(seed, i, name, spec):
    share = random.Random(f"sweep {seed} {name} {i}").random()
    return spec[int(share * len(spec))] if isinstance(spec, list) else inside(name, *spec, share)


def key_of(values):
    """Text that is equal for equal combinations, whatever the order of options."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False)
