"""utils/synthetic.py: problems from a seed."""

import hashlib
import json
import re

import pytest

from mlx_grpo import UserError
from mlx_grpo.synthetic import TASKS, evaluate, generate, reaches_target

PINNED = {"chain": "c10dd802dd7ef215", "arithmetic": "20f1962a050b401e", "sort": "eedf77bd5d83a324",
          "reverse": "d30b3aeadc3c6570", "countdown": "f0cbcf56ec1040f0"}
DEMONSTRATION = re.compile(r"<reasoning>(.*)</reasoning><answer>(.*)</answer>")


def reasoning(row, column="solution"):
    steps, answer = DEMONSTRATION.fullmatch(row[column]).groups()
    assert answer == row["answer"]
    return steps


def columns(row):
    return {k: v for k, v in row.items() if k not in ("question", "answer", "solution", "direct")}


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_the_same_for_every_count_and_differ_by_seed(task):
    rows = generate(task, 40, seed=3)
    assert len(rows) == 40
    assert generate(task, 7, seed=3) == rows[:7]
    assert generate(task, 40, seed=4) != rows


@pytest.mark.parametrize("task", TASKS)
def test_questions_of_one_call_are_all_different(task):
    assert len({row["question"] for row in generate(task, 2000, seed=1)}) == 2000


@pytest.mark.parametrize("task", TASKS)
def test_both_demonstrations_end_in_the_gold_answer_and_only_one_reasons(task):
    for row in generate(task, 50, seed=2):
        assert type(row["question"]) is str and type(row["answer"]) is str
        assert len(reasoning(row)) > 0
        assert reasoning(row, "direct") == ""
    json.dumps(row)


def test_the_rows_are_these_on_every_machine():
    """A pinned digest: a changed generator changes what old runs trained on, and must be a deliberate act."""
    digest = lambda task: hashlib.sha256(json.dumps(generate(task, 100, seed=0)).encode()).hexdigest()[:16]
    assert {task: digest(task) for task in TASKS} == PINNED


def test_a_chain_is_read_from_left_to_right_modulo_ten():
    for row in generate("chain", 200, seed=0):
        assert re.fullmatch(r"\d(\*[379]\+[1-9]){3}\*[379]", row["question"])
        value, running = int(row["question"][0]), ""
        for sign, operand in re.findall(r"([*+])(\d)", row["question"]):
            value = (value * int(operand) if sign == "*" else value + int(operand)) % 10
            running += str(value)
        assert row["answer"] == str(value)
        assert reasoning(row) == running
        assert columns(row) == {"length": 7, "modulus": 10}


def test_chain_answers_are_uniform_so_that_no_guess_is_worth_more_than_chance():
    answers = [row["answer"] for row in generate("chain", 4000, seed=5)]
    assert all(330 < answers.count(str(d)) < 470 for d in range(10))        # 400 expected, sigma 19


def test_chain_options_set_length_and_modulus():
    row = generate("chain", 1, options={"length": 4, "modulus": 7})[0]
    assert re.fullmatch(r"[0-6]\*[2-6]\+[1-6]\*[2-6]\+[1-6]", row["question"])
    assert int(row["answer"]) < 7 and len(reasoning(row)) == 4


def test_arithmetic_answers_and_every_reasoning_line_are_true():
    for digits in (1, 2, 3, 6):
        for row in generate("arithmetic", 100, seed=digits, options={"digits": digits, "wording": "bare"}):
            assert row["question"] == f"{row['a']}{row['operation']}{row['b']}"
            assert int(row["answer"]) == evaluate(row["question"])
            steps = reasoning(row)
            lines = re.findall(r"([\d+*-]+)=(\d+)", steps)
            assert lines and all(evaluate(line) == int(value) for line, value in lines)
            assert steps.endswith(row["answer"])


def test_written_arithmetic_carries_borrows_and_adds_partial_products():
    from mlx_grpo.synthetic import by_columns, by_partial_products
    assert by_columns(47, 38, "+") == "7+8=15, 4+3+1=8, so 85"
    assert by_columns(502, 137, "-") == "12-7=5, 10-3-1=6, 5-1-1=3, so 365"
    assert by_partial_products(47, 38, "*") == "47*8=376, 47*30=1410, 376+1410=1786"
    assert by_partial_products(47, 30, "*") == "47*30=1410"


def test_arithmetic_uses_only_the_operations_asked_for():
    assert {row["operation"] for row in generate("arithmetic", 50, options={"operations": "*"})} == {"*"}
    assert {row["operation"] for row in generate("arithmetic", 50)} == {"+", "-", "*"}


def test_sort_and_reverse_do_what_they_say():
    for row in generate("sort", 50, options={"length": 8, "wording": "bare"}):
        digits = row["question"].split()
        assert len(digits) == 8 and row["answer"].split() == sorted(digits) and row["numbers"] == list(map(int, digits))
    for row in generate("reverse", 50, options={"length": 6}):
        assert len(row["word"]) == 6 and f"'{row['word']}'" in row["question"] and row["answer"][::-1] == row["word"]


@pytest.mark.parametrize("numbers", [2, 4, 6])
def test_countdown_answers_use_every_number_once_and_reach_the_target(numbers):
    for row in generate("countdown", 100, seed=numbers, options={"numbers": numbers, "largest": 30, "max_target": 60}):
        assert len(row["numbers"]) == numbers and max(row["numbers"]) <= 30 and 0 < row["target"] <= 60
        assert reaches_target(row["answer"], row["numbers"], row["target"])
        lines = re.findall(r"([\d+*/-]+)=(\d+)", reasoning(row))
        assert len(lines) == numbers - 1 and all(evaluate(line) == int(value) for line, value in lines)


@pytest.mark.parametrize("answer", ["3*7", "3*7+1", "3*7+1+1", "(3*7", "", "22", "x", "3*7+2-1", "__import__('os')"])
def test_countdown_refuses_other_numbers_other_values_and_what_is_no_arithmetic(answer):
    assert reaches_target("(3*7)+1", [1, 3, 7], 22)
    assert reaches_target(answer, [1, 3, 7], 22) == (answer == "3*7+1")


def test_evaluate_is_exact():
    assert evaluate("0.1+0.2") == evaluate("0.3")
    assert evaluate("7*(10-4)/3") == 14
    assert evaluate(".5*8") == 4


@pytest.mark.parametrize("expression", ["1/0", "2**9", "9//2", "abs(1)", "1e9999999999", "1_000", "True", "'a'*3", "-1",
                                        "1,2", "()", "1 2", "1+", "", "(" * 150 + "1" + ")" * 150, "[1][0]"])
def test_evaluate_takes_nothing_but_arithmetic(expression):
    with pytest.raises(ValueError, match="not plain arithmetic"):
        evaluate(expression)


def test_sentences_say_what_to_do():
    ask = lambda task: generate(task, 1, options={"wording": "sentence"})[0]["question"]
    assert re.fullmatch(r"Start with the first number and apply .* modulo 10 after each: [\d*+]+", ask("chain"))
    assert re.fullmatch(r"What is \d\d [-+*] \d\d\?", ask("arithmetic"))
    assert re.fullmatch(r"Sort these digits from smallest to largest: \d \d \d \d \d", ask("sort"))
    assert re.fullmatch(r"Write the word '[a-z]{5}' backwards.", ask("reverse"))
    assert re.fullmatch(r"Use each of the numbers \[[\d, ]+\] exactly once, .* to make \d+\.", ask("countdown"))


@pytest.mark.parametrize("task, options, message", [
    ("chian", {}, "unknown synthetic task 'chian'; did you mean 'chain'?; there are chain, arithmetic"),
    ("chain", {"lenght": 3}, "synthetic:chain has no option 'lenght'; did you mean 'length'?"),
    ("chain", {"length": 0}, "synthetic:chain: length must be a whole number from 1 to 100, got 0"),
    ("chain", {"length": "7"}, "got '7'"),
    ("chain", {"length": True}, "got True"),
    ("arithmetic", {"operations": "+/"}, "operations must be some of the characters '+-*', got '+/'"),
    ("arithmetic", {"operations": ""}, "got ''"),
    ("sort", {"wording": "long"}, "wording must be 'bare' or 'sentence', got 'long'"),
])
def test_mistakes_are_named_with_the_remedy(task, options, message):
    with pytest.raises(UserError) as caught:
        generate(task, 1, options=options)
    assert message in str(caught.value)


def test_a_task_that_runs_out_of_different_questions_says_so():
    with pytest.raises(UserError, match=r"synthetic:sort with length=2 ran out of different questions after .* of 200"):
        generate("sort", 200, options={"length": 2})
