"""data/word_problems.jsonl and data/questions.jsonl: every step is worked again, every number must come from somewhere,
and no two problems may be alike."""

import importlib.util
import json
import re
from fractions import Fraction

import pytest
from conftest import ROOT

from mlx_grpo import UserError
from mlx_grpo.synthetic import evaluate

DATA = ROOT / "data"
NAMES = ["word_problems", "questions"]
STEP = re.compile(r"<<([^<>=]+)=([\d.]*\d)>>")

# Words that state a number, in a question or in the words of a step.
NUMBER_WORDS = {word: (value,) for value, words in {
    1: "one once single", 2: "two twice double doubles doubled doubling second both pair pairs twins",
    3: "three third thirds triple", 4: "four fourth quarter quarters", 5: "five fifth fifths", 6: "six sixth sixths",
    7: "seven seventh sevenths", 8: "eight eighth eighths", 9: "nine ninth ninths", 10: "ten tenth tenths",
    11: "eleven eleventh", 12: "twelve twelfth twelfths dozen", 13: "thirteen", 15: "fifteen", 20: "twenty",
    32: "thirty-two", 50: "fifty", 54: "fifty-four", 1000: "thousand"}.items() for word in words.split()}
NUMBER_WORDS["half"] = NUMBER_WORDS["halves"] = (2, Fraction(1, 2))
# Numbers that everybody knows, each with the words that call for it.
CONSTANTS = {60: "minute hour second", 24: "day", 7: "week", 12: "year month", 100: "percent % cent dollar metre cm",
             1000: "litre kilo gram kg tonne", 10: "mm", 180: "triangle", 3: "triangle", 4: "square",
             2: "perimeter around radii half even", 1: ""}
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|[A-Za-z]+(?:-[a-z]+)?")


def load(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers_in(text):
    """The numbers that a text states, in digits or in words."""
    found = set()
    for token in NUMBER.findall(text):
        if token[0].isdigit():
            found.add(Fraction(token.replace(",", "")))
        for part in {token.lower(), *token.lower().split("-")}:
            found.update(map(Fraction, NUMBER_WORDS.get(part, ())))
    return found


def skeleton(text):
    """The text with names, numbers, number words and the persons of pronouns replaced. Every word with a capital counts
    as a name, so this takes away more than names."""
    text = re.sub(r"\d+(?:[,.:]\d+)*", "#", text.replace("$", ""))
    text = re.sub(r"[^\W\d_][\w'’-]*", word_class, text)
    return re.sub(r"(NAME )+NAME", "NAME", text)


def word_class(match):
    word = match[0]
    if any(part in NUMBER_WORDS for part in {word.lower(), *word.lower().split("-")}):
        return "#"
    if word[0].isupper():
        return "NAME"
    return "they" if word in ("he", "she", "him", "his", "her", "hers") else word


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_the_schema_of_gsm8k(name):
    for row in load(name):
        assert list(row) == ["question", "answer"]
        steps, answer = row["answer"].split("\n#### ")
        assert re.fullmatch(r"[1-9]\d*", answer)
        assert all(step.strip() == step and step for step in [row["question"], *steps.split("\n")])
        assert 2 <= len(STEP.findall(steps)) <= 5
        assert row["question"].endswith((".", "?", "Timo"))
        assert not re.search(r"[{}]|  ", row["question"] + steps)


def test_there_are_over_400_problems_with_as_many_skeletons():
    rows = load("word_problems")
    assert len(rows) >= 400
    assert len({skeleton(row["question"]) for row in rows}) == len(rows)
    assert len(load("questions")) == 10


def test_sentence_skeletons_vary():
    """Not only whole questions but their sentences differ: at least 80 are asked for, taken alone."""
    rows = load("word_problems")
    sentences = [set(re.split(r"(?<=[.?!]) ", skeleton(row["question"]))) for row in rows]
    assert len(set.union(*sentences)) > 1000
    openings = {" ".join(skeleton(row["question"]).split()[:4]) for row in rows}
    assert len(openings) > 250


def test_no_two_problems_are_near_copies():
    """Runs of three words, after the replacement: no pair of questions shares 40 % of them."""
    runs = []
    for name in NAMES:
        for row in load(name):
            words = re.findall(r"[\w#]+", skeleton(row["question"]).lower())
            runs.append((row["question"], set(zip(words, words[1:], words[2:]))))
    for i, (question, mine) in enumerate(runs):
        for other, theirs in runs[:i]:
            assert len(mine & theirs) < 0.4 * len(mine | theirs), (question, other)


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_right_and_the_last_one_is_the_answer(name):
    for row in load(name):
        steps, answer = row["answer"].split("\n#### ")
        worked = STEP.findall(steps)
        assert steps.count("<<") == steps.count(">>") == len(worked), row
        for expression, value in worked:
            assert evaluate(expression) == Fraction(value), (row["question"], expression)
            assert f"<<{expression}={value}>>{value}" in steps, row
        assert STEP.findall(steps.split("\n")[-1])[-1][1] == answer, row


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_step_comes_from_the_question_or_an_earlier_step_or_is_common_knowledge(name):
    for row in load(name):
        known, steps = numbers_in(row["question"]), row["answer"].split("\n#### ")[0]
        for line in steps.split("\n"):
            words = (row["question"] + " " + re.sub(r"\d", "", line)).lower()
            for expression, value in STEP.findall(line):
                for number in map(Fraction, re.findall(r"\d+(?:\.\d+)?", expression)):
                    common = number in CONSTANTS and any(w in words for w in CONSTANTS[number].split(" "))
                    assert number in known or common, (row["question"], line, float(number))
                known.add(Fraction(value))


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_used(name):
    """A step whose value neither a later step nor the answer takes up would be a sign of a wrong solution."""
    for row in load(name):
        worked = STEP.findall(row["answer"])
        for i, (_, value) in enumerate(worked[:-1]):
            later = [number for expression, _ in worked[i + 1:] for number in re.findall(r"\d+(?:\.\d+)?", expression)]
            assert Fraction(value) in map(Fraction, later), (row["question"], value)


def builder():
    spec = importlib.util.spec_from_file_location("make_word_problems", DATA / "make_word_problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_what_the_script_makes_of_the_texts(name):
    lines = builder().build((DATA / f"{name}.txt").read_text(encoding="utf-8"), name)
    assert (DATA / f"{name}.jsonl").read_text(encoding="utf-8") == "".join(line + "\n" for line in lines)


@pytest.mark.parametrize("text, message", [
    ("Q: How many?\nS: No step.", "gives no positive whole number"),
    ("Q: How many?\nS: {1-1}.", "gives no positive whole number"),
    ("Q: How many?\nS: {7/2}.", "gives no positive whole number"),
    ("Q: How many?\nS: {7/3}.", "7/3 has no short decimal text"),
    ("Q: How many?\nS: {open('x')}.", "not plain arithmetic"),
    ("Q: How many?", "a problem is one 'Q: ' line and then 'S: ' lines"),
])
def test_a_malformed_text_is_refused(text, message):
    with pytest.raises(UserError) as caught:
        builder().build(text, "x.txt")
    assert message in str(caught.value)
