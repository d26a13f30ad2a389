"""
Completions that a reward function is tried with (`mlx_grpo.py rewards test`): the gold answer in several forms, ways to get
it wrong or to cheat, and completions given in a file.

    kind               right   what it is
    gold <form>        yes     the gold answer: between tags, after ####, in \\boxed{}, bare, or in your --gold template
    demonstration      yes     the data's worked solution
    off by one         no      the same forms with another number, or the last letter changed
    other row's        no      the gold answer of the next row
    mentioned          no      the gold answer among the reasoning, another one as the answer
    every answer       no      the gold answer among those of the other rows
    tags only          no      the form with nothing in it
    truncated          no      the form, cut before the answer
    prompt echoed      no      the prompt
    odd characters     no      NUL, right-to-left marks, emoji, brackets
    empty, whitespace  no
    answer repeated    ?       the gold form three times
    long               ?       the gold form stretched beyond max_completion_length
    given, sampled     ?       from --completions, from the model
"""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from mlx_grpo import UserError, as_number, make_problem

FORMS = {"<answer>": "<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>",
         "####": "{reasoning}\n#### {answer}", "boxed": "{reasoning}\n\\boxed{{{answer}}}", "bare": "{answer}"}
REASONING = "Let me go through this step by step."
ODD = "\x00 \u202eabc\u202c \U0001f916 \\ %s {0} [(*+ </answer><answer> \ufffd \u0663"


@dataclass(frozen=True)
class Probe:
    """A completion to try. right: whether its answer is the gold one; None = not known, or open to dispute."""

    kind: str
    text: str
    right: bool | None = None


def fill(form, answer, reasoning=REASONING):
    """A form with its answer; text that isn't a field of it stays as it is."""
    fields = {"{answer}": answer, "{reasoning}": reasoning, "{{": "{", "}}": "}"}
    return re.sub(r"\{answer\}|\{reasoning\}|\{\{|\}\}", lambda m: fields[m[0]], form)


def wrong_answer(gold):
    """Another answer of the same look: the number plus one, else the last letter or digit moved on by one."""
    number = as_number(gold)
    if number is not None and number.denominator == 1:
        return str(number + 1)
    place = max((i for i, c in enumerate(gold) if c.isalnum()), default=None)
    if place is None:
        return gold + "x"
    last = gold[place]
    other = str((int(last) + 1) % 10) if last in "0123456789" else "b" if last in "aA" else "a"
    return gold[:place] + other + gold[place + 1:]


def main_form(problem, config, forms):
    """The form that the prompt, the system prompt or the demonstration asks for; the first one where none does."""
    asked = f"{config.system_prompt} {json.dumps(problem.prompt)} {problem.solution}"
    marks = {"<answer>": "<answer>", "####": "####", "boxed": "\\boxed"}
    return next((name for name in forms if marks.get(name, "\0") in asked), next(iter(forms)))


def probes_for(problem, others, config, template=None):
    """[Probe] for a problem. others: gold answers of the other rows, the next row's first. template: of --gold."""
    prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    forms = {"": template} if template else FORMS
    main = forms[main_form(problem, config, forms)]
    gold, probes = problem.answer, []
    if gold is not None:
        wrong = wrong_answer(gold)
        probes += [Probe(f"gold {name}".strip(), fill(form, gold), True) for name, form in forms.items()]
        probes += [Probe("off by one", fill(form, wrong), False) for form in forms.values()]
        if different := [answer for answer in others if answer is not None and answer != gold]:
            listed = " ".join(dict.fromkeys([*different[:10], gold, *different[10:20]]))
            probes += [Probe("other row's", fill(main, different[0]), False),
                       Probe("every answer", fill(main, listed), False)]
        cut = fill(main, "\0").partition("\0")[0]
        probes += [Probe("mentioned", fill(main, wrong, f"It might be {gold}, or not."), False),
                   Probe("truncated", cut or gold[:len(gold) // 2], False),
                   Probe("answer repeated", "\n".join([fill(main, gold)] * 3)),
                   Probe("long", fill(main, gold, "and so it goes on " * (config.max_completion_length // 5 + 1)))]
    if problem.solution is not None:
        probes.append(Probe("demonstration", problem.solution, True))
    return probes + [Probe("tags only", fill(main, "", ""), False), Probe("prompt echoed", prompt, False),
                     Probe("odd characters", ODD, False), Probe("empty", "", False), Probe("whitespace", " \n\t\n ", False)]


def word_ids(text):
    """Stand-ins for token ids where no tokenizer is loaded: one for each word, the same word the same id."""
    return [zlib.crc32(word.encode("utf-8", "replace")) for word in text.split()]


def read_completions(path, config):
    """[(Problem or None, Probe)] of a file: .jsonl objects with a `completion` and, to say which row it is for, the columns
    of a data row or the `prompt` and `answer` that a run's completions.jsonl has; in any other file each line is a
    completion. None = for every row. Raises UserError naming file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--completions {path}: can't be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip() and Path(path).suffix != ".jsonl":
            found.append((None, Probe("given", line)))
        elif line.strip():
            found.append(given_completion(line, f"{path}:{number}", config))
    if not found:
        raise UserError(f"--completions {path}: there is no completion in it")
    return found


def given_completion(line, where, config):
    """(Problem or None, Probe) of one line of JSON."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("completion"), str):
        raise UserError(f'{where}: expected an object with a text "completion", got {line[:80]!r}')
    probe = Probe(str(row.get("kind", "given")), row["completion"])
    if config.prompt_column in row:
        return make_problem(row, config, where), probe
    if "prompt" in row:                       # as logged: rendered already, with its system message
        from mlx_grpo import Problem

        return Problem(row["prompt"], row.get("answer"), {**row, "answer": row.get("answer")}), probe
    return None, probe
