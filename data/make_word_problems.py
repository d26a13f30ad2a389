"""
Writes word_problems.jsonl and questions.jsonl from the hand-written texts beside this script.

    python data/make_word_problems.py

A problem in word_problems.txt or questions.txt is a question and its solution, and a blank line ends it:

    Q: Theo buys a box of 40 chocolate bars for $28. If he sells every single bar for $1.25, what is his profit?
    S: He takes in ${40*1.25}.
    S: His profit is ${50-28}.

The script does the arithmetic, in the schema of GSM8K: the first step becomes "He takes in 40 * 1.25 =
$<<40*1.25=50>>50.", and the value of the last step is the answer, "#### 22".
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))   # runs from a plain clone, from any directory

from mlx_grpo import UserError, run_command     # noqa: E402
from mlx_grpo.synthetic import evaluate         # noqa: E402

STEP = re.compile(r"(\$?)\{([^{}]+)\}")


def main():
    for name in ("word_problems", "questions"):
        lines = build((HERE / f"{name}.txt").read_text(encoding="utf-8"), f"{name}.txt")
        (HERE / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        print(f"{name}.jsonl: {len(lines)} problems")


def build(text, source):
    """The JSON lines of a text of problems. UserError names source and problem when one is malformed or its answer is
    not a positive whole number."""
    return [json.dumps(problem(block, source), ensure_ascii=False) for block in re.split(r"\n\s*\n", text.strip())]


def problem(block, source):
    """{"question", "answer"} from one block of lines."""
    first, *rest = block.splitlines()
    if not first.startswith("Q: ") or not rest or not all(line.startswith("S: ") for line in rest):
        raise UserError(f"{source}: a problem is one 'Q: ' line and then 'S: ' lines, got {block[:80]!r}")
    steps = [STEP.sub(worked, line[3:]) for line in rest]
    values = re.findall(r">>([\d.]+)", steps[-1])
    if not values or not re.fullmatch(r"[1-9]\d*", values[-1].rstrip(".")):
        raise UserError(f"{source}: the last step of {first[:60]!r} gives no positive whole number")
    return {"question": first[3:], "answer": "\n".join(steps) + f"\n#### {values[-1].rstrip('.')}"}


def worked(match):
    """One {expression} with its value: "${3*1.50}" -> "3 * 1.50 = $<<3*1.50=4.5>>4.5"."""
    currency, expression = match.groups()
    try:
        value = decimal(evaluate(expression))
    except ValueError as error:
        raise UserError(f"the step {{{expression}}} can't be worked out: {error}") from error
    spaced = re.sub(r"([-+*/])", r" \1 ", expression)
    return f"{spaced} = {currency}<<{expression}={value}>>{value}"


def decimal(value):
    """The exact decimal text of a Fraction; ValueError when it has none of up to four places."""
    places = next((n for n in range(5) if (value * 10 ** n).denominator == 1), None)
    if places is None:
        raise ValueError(f"{value} has no short decimal text")
    return f"{float(value):.{places}f}"


if __name__ == "__main__":
    run_command(main)
