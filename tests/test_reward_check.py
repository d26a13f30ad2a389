"""`rewards test`: planted defects are found by name, sound functions pass, and wrong input is refused."""

import json
import random
import re
import shlex

import pytest
from conftest import ROOT
from mlx_grpo import REWARDS, UserError, main, reward_findings, same_answer
from mlx_grpo.reward_probes import FORMS, fill, wrong_answer
from tiny_models import sets, tiny_qwen2

DEFECTS = '''
import itertools, random
from mlx_grpo import extract_answer, same_answer
calls, rng = itertools.count(), random.Random(0)
right = lambda completions, answer: [same_answer(extract_answer(c[0]["content"]), a) for c, a in zip(completions, answer)]

def sound(completions, answer):
    return [float(x) for x in right(completions, answer)]
def always_one(completions):
    return [1.0] * len(completions)
def pays_silence(completions):
    return [1.0 if len(c[0]["content"]) < 10 else 0.0 for c in completions]
def strict_text(completions, answer):                   # the gold answer of the data has no comma, and no unit
    return [float(c[0]["content"] == "The answer is " + a + " units") + len(c[0]["content"]) / 1e4 for c, a in zip(completions, answer)]
def off_by_one(completions, answer):
    return [float(x) for x in right(completions, [str(int(a) + 1) for a in answer])]
def substring(completions, answer):
    return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]
def raises_on_odd(completions):
    return [float(int(c[0]["content"].split()[-1]) > 3) for c in completions]
def dice(completions):
    return [rng.random() for _ in completions]
def too_few(completions):
    return [float(len(c[0]["content"])) for c in completions if c[0]["content"]]
def first_is_best(completions):
    return [1.0 / (i + 1) for i in range(len(completions))]
def ranks(completions):
    lengths = sorted(len(c[0]["content"]) for c in completions)
    return [lengths.index(len(c[0]["content"])) / len(lengths) for c in completions]
def not_a_number(completions):
    return [float("nan") if not c[0]["content"] else 1.0 / len(c[0]["content"]) for c in completions]
def never(completions):
    return [None] * len(completions)
def clears(completions, answer):
    values = [float(x) for x in right(completions, answer)]
    completions.clear()
    return values
def asks_for_more(completions, difficulty):
    return [0.0] * len(completions)
'''
FOUND = {  # planted defect -> the code that names it
    "always_one": "constant", "pays_silence": "rewards-empty", "strict_text": "gold", "off_by_one": "gold",
    "substring": "wrong-answer-pays", "raises_on_odd": "raises", "dice": "random", "too_few": "wrong-length",
    "first_is_best": "order", "ranks": "other-rows", "not_a_number": "not-finite", "never": "never-applies",
    "clears": "changes-arguments", "asks_for_more": "raises"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(DEFECTS)
    return tmp_path


def check(capsys, *extra, rewards=("correctness",), **options):
    """(exit code, the JSON) of `rewards test`."""
    options = {"dataset": f"{ROOT}/data/word_problems.jsonl", "rewards": list(rewards)} | options
    code = main(["rewards", "test", "--json", *sets(**options), *extra])
    return code, json.loads(capsys.readouterr().out)


def codes(found, name):
    return [flag["code"] for flag in found["functions"][name]["flags"]]


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_defect_is_found(name, capsys):
    code, found = check(capsys, "--rows", "3", rewards=[f"mine.py:{name}", "correctness"])
    assert code == 1 and FOUND[name] in codes(found, name) and codes(found, "correctness") == []


@pytest.mark.parametrize("rewards", [["mine.py:sound"], ["correctness", "int", "strict_format", "soft_format", "xmlcount"],
                                     ["correctness", "repetition"], ["math_verify"]])
def test_sound_functions_pass(rewards, capsys):
    if "math_verify" in rewards:
        pytest.importorskip("math_verify")
    code, found = check(capsys, "--rows", "4", rewards=rewards)
    assert code == found["flags"] == 0


def test_a_sum_that_pays_a_wrong_answer_as_much_as_the_right_one_is_told(capsys):
    code, found = check(capsys, rewards=["strict_format", "int"])
    assert code == 1 and codes(found, "strict_format") == codes(found, "int") == []
    assert any("'off by one'" in flag["text"] for flag in found["functions"]["total"]["flags"])


def test_a_flag_that_is_meant_to_be_can_be_allowed(capsys):
    assert check(capsys, "--allow", "ranks:other-rows", rewards=["mine.py:ranks", "correctness"])[0] == 1     # it pays length
    allowed = [part for code in ("other-rows", "gold", "rewards-empty") for part in ("--allow", f"ranks:{code}")]
    assert check(capsys, *allowed, rewards=["mine.py:ranks", "correctness"], reward_weights=[0.1, 1])[0] == 0


def test_values_spread_and_none_are_those_of_the_functions(capsys):
    _, found = check(capsys, "--rows", "2", rewards=["mine.py:sound", "mine.py:never"])
    sound, never = found["functions"]["sound"], found["functions"]["never"]
    assert sound["kinds"]["gold <answer>"] == {"mean": 1.0, "min": 1.0, "max": 1.0, "n": 2} and sound["kinds"]["empty"]["max"] == 0
    assert sound["spread"] > 0 and sound["flat_groups"] == 0 and sound["none"] == 0
    assert never["none"] == found["completions"] and never["min"] is None and found["rows"] == 2


def test_given_completions_are_tried_on_their_row_or_on_every_row(place, capsys):
    rows = [{"question": "2+2?", "answer": "#### 4", "completion": "<answer>4</answer>"},
            {"prompt": "3+3?", "answer": "6", "completion": "<answer>7</answer>", "kind": "mine"}]
    (place / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = check(capsys, "--rows", "2", "--completions", "given.jsonl")
    kinds = found["functions"]["correctness"]["kinds"]
    assert kinds["given"] == {"mean": 2.0, "min": 2.0, "max": 2.0, "n": 1} and kinds["mine"]["max"] == 0
    (place / "given.txt").write_text("one\n\ntwo\n")
    assert check(capsys, "--rows", "2", "--completions", "given.txt")[1]["functions"]["correctness"]["kinds"]["given"]["n"] == 4


def test_sampled_completions_show_how_many_groups_would_teach_nothing(place, capsys):
    model = tiny_qwen2(place / "tiny")
    _, found = check(capsys, "--rows", "2", "--sample", "3", model_name=model, max_new_tokens=4)
    correctness = found["functions"]["correctness"]
    assert correctness["kinds"]["sampled"]["n"] == 6 and correctness["sampled_flat_groups"] == 1.0


def test_gold_template_is_the_right_form(capsys):
    pattern = "reward_options={regex = {pattern = 'The answer is [0-9.]+'}}"
    code, found = check(capsys, "--gold", "The answer is {answer}.", "--set", pattern, rewards=["regex"])
    assert found["functions"]["regex"]["kinds"]["gold"]["min"] == 1 and codes(found, "regex") == []


def test_tables_and_flags_are_printed(capsys):
    assert main(["rewards", "test", "--rows", "2", *sets(dataset=f"{ROOT}/data/word_problems.jsonl", rewards=["mine.py:dice"])]) == 1
    text = capsys.readouterr().out
    assert "gold <answer>" in text and "dice: random: the same call gave other values" in text


@pytest.mark.parametrize("arguments, words", [
    (["rewards", "--rows", "3"], "--rows belongs to `rewards test`"), (["rewards", "test", "--rows", "0"], "use at least 1"),
    (["rewards", "test", "--completions", "nowhere.jsonl"], "nowhere.jsonl"),
    (["rewards", "test", "--gold", "four"], "{answer}"), (["rewards", "test", "--allow", "nobody:gold"], "NAME:CODE"),
    (["rewards", "test", "--completions", "mine.py:"], "can't be read")])
def test_wrong_input_is_refused(arguments, words):
    with pytest.raises(UserError, match=None) as caught:
        main([*arguments, *sets(dataset=f"{ROOT}/data/word_problems.jsonl")])
    assert words in str(caught.value)


@pytest.mark.parametrize("line, words", [("{", "given.jsonl:1: not JSON"), ("[]", '"completion"'), ('{"completion": 3}', '"completion"')])
def test_a_line_that_is_no_completion_is_named(line, words, place):
    (place / "given.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        main(["rewards", "test", "--completions", "given.jsonl", *sets(dataset=f"{ROOT}/data/word_problems.jsonl")])
    assert words in str(caught.value)


def test_a_wrong_answer_is_wrong_and_looks_alike():
    rng = random.Random(0)
    for gold in ("4", "-3", "9", "1,000", "kavot", "1 1 3 5 9", "(14-(5+2))*8", "z", "?", "1/2", *(str(rng.random()) for _ in range(20))):
        assert not same_answer(wrong_answer(gold), gold), gold
    assert fill(FORMS["boxed"], "{4}", "r") == "r\n\\boxed{{4}}"


# ---- docs/rewards.md

PAGE = (ROOT / "docs" / "rewards.md").read_text()


def test_the_commands_of_the_guide_run_and_print_what_it_shows(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [line.partition("#")[0] for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["python", "mlx_grpo.py"]
        main(words[2:])
    shown = re.search(r"```\n(total: .*?)```", PAGE, re.S)[1]
    assert capsys.readouterr().out.endswith(shown)


def test_the_guide_names_every_built_in_its_options_and_every_flag():
    for name, function in REWARDS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert callable(function) or all(f"`{option}`" in row for option in function.options), name
    for line in reward_findings.__doc__.splitlines():
        if code := re.match(r"    ([a-z-]+)  +[^ ]", line):
            assert f"`{code[1]}`" in PAGE or code[1] == "code"
