"""
Problems made offline from a seed: what `dataset = "synthetic:<task>"` draws from.

    generate("chain", count=500, seed=0, options={"length": 5})

  task        question (bare)   answer        options (default)
  chain       3*7+2*9+4*3+5*7   6             length (7), modulus (10)
  arithmetic  47*38             1786          digits (2), operations ("+-*")
  sort        5 3 9 1 1         1 1 3 5 9     length (5)
  reverse     tovak             kavot         length (5)
  countdown   2 8 5 14 -> 56    (14-(5+2))*8  numbers (4), largest (20), max_target (100)

Every task also takes `wording`: "bare" is the question as above, "sentence" says what is to be done with it (the
default everywhere but in `chain`, whose model is taught the task by demonstrations).

A row holds `question`, `answer`, two demonstrations for a supervised warm start (`solution` reasons step by step,
`direct` answers at once) and the task's own columns for rewards. No two rows of one call have the same question, so a
split of the rows never puts a training question into the held-out part.
"""

import ast
import math
import operator
import random
import re
from difflib import get_close_matches
from fractions import Fraction

from mlx_grpo import UserError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MAX_DRAWS = 1000                   # draws for one row without a new question before the task counts as exhausted


def generate(task, count, seed=0, *, options=None):
    """The first `count` rows of (task, seed, options): dicts with question, answer, solution, direct and more columns.

    Row i is the same for every count and on every machine. Raises UserError for an unknown task or option, a value out
    of range, and options that allow fewer than `count` different questions.
    """
    if task not in TASKS:
        raise UserError(f"unknown synthetic task {task!r}{suggestion(task, TASKS)}; there are {', '.join(TASKS)}")
    make_row, sentence, declared = TASKS[task]
    values = check_options(task, declared, options or {})
    wording = values.pop("wording")
    rows, seen = [], set()
    for i in range(count):
        rng = random.Random(f"{task}:{seed}:{i}")      # seeded from text: hashed with SHA-512, the same everywhere
        row = next((r for r in (make_row(rng, **values) for _ in range(MAX_DRAWS)) if r["question"] not in seen), None)
        if row is None:
            shown = ", ".join(f"{k}={v}" for k, v in values.items())
            raise UserError(f"synthetic:{task} with {shown} ran out of different questions after {i} of {count}; "
                            "ask for fewer or widen its options")
        seen.add(row["question"])
        if wording == "sentence":
            row["question"] = sentence.format(**row)
        rows.append(row)
    return rows


def check_options(task, declared, given):
    """Defaults of `declared` with `given` on top. declared: name -> (default, allowed), allowed a range or a predicate
    with its description. Raises UserError with the task, option, value and what is allowed."""
    values = {name: default for name, (default, _) in declared.items()}
    for name, value in given.items():
        if name not in declared:
            raise UserError(f"synthetic:{task} has no option {name!r}{suggestion(name, declared)}; "
                            f"there are {', '.join(declared)}")
        default, allowed = declared[name]
        if isinstance(allowed, range):
            valid = type(value) is int and value in allowed
            wanted = f"a whole number from {allowed[0]} to {allowed[-1]}"
        else:
            check, wanted = allowed
            valid = type(value) is str and check(value)
        if not valid:
            raise UserError(f"synthetic:{task}: {name} must be {wanted}, got {value!r}")
        values[name] = value
    return values


def suggestion(name, known):
    """The end of an error text: "; did you mean 'x'?", or nothing when no known name is near."""
    near = get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def row_of(question, answer, steps, **columns):
    """A row from its parts; `steps` is the reasoning text."""
    shown = f"<answer>{answer}</answer>"
    return {"question": question, "answer": str(answer), "solution": f"<reasoning>{steps}</reasoning>{shown}",
            "direct": f"<reasoning></reasoning>{shown}", **columns}


# ---- tasks: each draws one row from rng ----

def chain(rng, length, modulus):
    """`length` operations modulo `modulus`, read left to right: * by a number prime to the modulus, then + by a digit,
    in turn. Every operation is a bijection, so the answer is uniform and no part of the chain gives it away.
    The reasoning is the running value after each operation, one digit each."""
    multipliers = [k for k in range(2, modulus) if math.gcd(k, modulus) == 1]       # 3, 7, 9 for modulus 10
    value = rng.randrange(modulus)
    question, running = str(value), []
    for k in range(length):
        if k % 2 == 0:
            operand = rng.choice(multipliers)
            value, sign = value * operand % modulus, "*"
        else:
            operand = rng.randrange(1, modulus)
            value, sign = (value + operand) % modulus, "+"
        question += f"{sign}{operand}"
        running.append(str(value))
    return row_of(question, value, "".join(running), length=length, modulus=modulus)


def arithmetic(rng, digits, operations):
    """One operation on two numbers of `digits` digits; a subtraction has the larger one first."""
    operation = rng.choice(operations)
    a, b = (rng.randrange(10 ** (digits - 1), 10 ** digits) for _ in range(2))
    if operation == "-":
        a, b = max(a, b), min(a, b)
    answer, work = {"+": (a + b, by_columns), "-": (a - b, by_columns), "*": (a * b, by_partial_products)}[operation]
    return row_of(f"{a}{operation}{b}", answer, work(a, b, operation), a=a, b=b, operation=operation)


def by_columns(a, b, operation):
    """Written addition or subtraction from the ones up: 47+38 -> "7+8=15, 4+3+1=8, so 85"."""
    columns, carry = zip(reversed(str(a)), reversed(str(b)), strict=True), 0
    lines = []
    for x, y in ((int(x), int(y)) for x, y in columns):
        carried = f"{operation}1" if carry else ""
        if operation == "+":
            value = x + y + carry
            lines.append(f"{x}+{y}{carried}={value}")
            carry = value // 10
        else:
            borrow = x - y - carry < 0
            x += 10 * borrow                          # a borrowed ten stands in the line: 12-5=7
            lines.append(f"{x}-{y}{carried}={x - y - carry}")
            carry = int(borrow)
    return ", ".join(lines) + f", so {a + b if operation == '+' else a - b}"


def by_partial_products(a, b, _):
    """Written multiplication: 47*38 -> "47*8=376, 47*30=1410, 376+1410=1786"."""
    parts = [int(digit) * 10 ** place for place, digit in enumerate(reversed(str(b))) if digit != "0"]
    lines = [f"{a}*{part}={a * part}" for part in parts]
    total = a * parts[0]
    for part in parts[1:]:
        lines.append(f"{total}+{a * part}={total + a * part}")
        total += a * part
    return ", ".join(lines)


def sort(rng, length):
    """`length` digits to be put in rising order; the reasoning takes the smallest one left each time."""
    numbers = [rng.randrange(10) for _ in range(length)]
    left, lines = list(numbers), []
    for _ in numbers:
        smallest = min(left)
        left.remove(smallest)
        lines.append(f"{smallest} leaves {' '.join(map(str, left)) or 'nothing'}")
    return row_of(" ".join(map(str, numbers)), " ".join(map(str, sorted(numbers))), ", ".join(lines), numbers=numbers)


def reverse(rng, length):
    """A made-up word of `length` letters, consonants and vowels in turn; the reasoning spells it both ways."""
    word = "".join(rng.choice("aeiou" if k % 2 else "bcdfghjklmnpqrstvwxyz") for k in range(length))
    return row_of(word, word[::-1], f"{' '.join(word)} -> {' '.join(reversed(word))}", word=word)


def countdown(rng, numbers, largest, max_target):
    """`numbers` numbers up to `largest`, each to be used exactly once with + - * / to reach a target up to
    `max_target`. Found by combining them at random through positive whole numbers, so it can always be reached.
    `answer` is one way of many: rewards should ask `reaches_target`."""
    while True:
        drawn = [rng.randrange(1, largest + 1) for _ in range(numbers)]
        pool, lines = [(n, str(n)) for n in drawn], []
        while len(pool) > 1:
            (a, a_text), (b, b_text) = sorted((pool.pop(rng.randrange(len(pool))) for _ in range(2)), reverse=True)
            ways = [(a + b, "+"), (a * b, "*")] + [(a - b, "-")] * (a > b) + [(a // b, "/")] * (a % b == 0)
            value, sign = rng.choice(ways)
            pool.append((value, f"({a_text}{sign}{b_text})"))
            lines.append(f"{a}{sign}{b}={value}")
        target, expression = pool[0]
        if target <= max_target and target not in drawn:
            return row_of(f"{' '.join(map(str, drawn))} -> {target}", expression[1:-1], ", ".join(lines),
                          numbers=drawn, target=target)


# ---- checking ----

def evaluate(expression):
    """The exact value (Fraction) of an expression of non-negative whole or decimal numbers, + - * / and brackets.
    ValueError for anything else, a division by zero and more than 200 characters."""
    source = expression.strip()
    if len(source) > 200 or not re.fullmatch(r"[0-9.+*/() -]+", source):      # no names, no 1e999999999
        raise ValueError(f"not plain arithmetic: {source[:200]!r}")

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(ast.get_source_segment(source, node))      # 0.1 is exactly 1/10
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(f"not plain arithmetic: {source!r}")

    try:
        return value(ast.parse(source, mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"not plain arithmetic: {source!r}") from error


def reaches_target(expression, numbers, target):
    """Whether a countdown answer uses each of `numbers` exactly once and equals `target`."""
    try:
        value = evaluate(expression)
        used = sorted(node.value for node in ast.walk(ast.parse(expression.strip(), mode="eval"))
                      if isinstance(node, ast.Constant))
    except ValueError:
        return False
    return value == target and used == sorted(numbers)


# ---- the table: task -> (row maker, sentence, options) ----

def wording(default):
    """The option every task shares."""
    return default, (lambda v: v in ("bare", "sentence"), "'bare' or 'sentence'")


TASKS = {
    "chain": (chain, "Start with the first number and apply each operation from left to right, keeping only the "
              "remainder modulo {modulus} after each: {question}",
              {"length": (7, range(1, 101)), "modulus": (10, range(3, 11)), "wording": wording("bare")}),
    "arithmetic": (arithmetic, "What is {a} {operation} {b}?",
                   {"digits": (2, range(1, 19)), "wording": wording("sentence"),
                    "operations": ("+-*", (lambda v: v and set(v) <= set("+-*"), "some of the characters '+-*'"))}),
    "sort": (sort, "Sort these digits from smallest to largest: {question}",
             {"length": (5, range(2, 101)), "wording": wording("sentence")}),
    "reverse": (reverse, "Write the word {question!r} backwards.",
                {"length": (5, range(2, 101)), "wording": wording("sentence")}),
    "countdown": (countdown, "Use each of the numbers {numbers} exactly once, with + - * / and brackets, to make "
                  "{target}.",
                  {"numbers": (4, range(2, 7)), "largest": (20, range(2, 101)), "max_target": (100, range(10, 10001)),
                   "wording": wording("sentence")}),
}
