"""The built-in rewards with options: what each gives, by hand and against TRL, and what is refused before a run."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import require
from mlx_grpo import REWARDS, ConfigError, Scorer, extract_answer, find_rewards, load_config
from mlx_grpo.math_equal import Worker
from mlx_grpo.more_rewards import fenced
from test_rewards import GOOD, rollouts


def score(name, *texts, answer="4", prompt="2+2?", columns=None, **options):
    """The values that a built-in gives to these completions; a token is a word, its id the word's hash."""
    scorer = Scorer(find_rewards([name], {name.rpartition(":")[2]: options} if options else {}))
    group = rollouts(*texts, answer=answer, prompt=prompt, **columns or {})
    ids = [[hash(word) for word in text.split()] for text in texts]
    return [None if math.isnan(v) else v for v in scorer([type(group[0])(**vars(group[0]) | {"completion_ids": ids})])[0][:, 0]]


def refusal(name, **options):
    with pytest.raises(ConfigError) as caught:
        find_rewards([name], {name: options} if options else {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- options

def test_reward_options_reach_built_ins_named_copies_and_own_functions(tmp_path):
    (tmp_path / "mine.py").write_text('def brevity(completions, limit=10, limits=None):\n    """Short."""\n'
                                      "    return [float(len(c) <= limit) for c in completions]\n")
    (tmp_path / "run.toml").write_text(f'''
rewards = ["regex:because", "regex:digits", "{tmp_path}/mine.py:brevity"]
[reward_options]
because = {{ pattern = "because" }}
digits = {{ pattern = '\\d+', where = "answer", whole = true }}
brevity = {{ limit = 3 }}
''')
    config, _ = load_config(str(tmp_path / "run.toml"))
    functions = find_rewards(config.rewards, config.reward_options)
    assert list(functions) == ["because", "digits", "brevity"] and functions["brevity"].__doc__ == "Short."
    scores = Scorer(functions)(rollouts("because", "<answer>42</answer>", "abc", limit=99))[0]   # a column of that name
    assert scores.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("name, options, words", [
    ("regex", {}, ["pattern is missing"]), ("regex", {"patern": "a"}, ["no 'patern'", "did you mean 'pattern'?"]),
    ("regex", {"pattern": 3}, ["reward_options.regex.pattern must be a text, got 3"]),
    ("regex", {"pattern": "("}, ["'('", "no regular expression"]), ("regex", {"pattern": "a", "where": "x"}, ['"answer"']),
    ("json", {"schema": {"type": "nonsense"}}, ["no JSON schema"]), ("json", {"schema": "nowhere.json"}, ["nowhere.json"]),
    ("json", {"schema": 3}, ["a table or the path"]),
    ("repetition", {"ngram": 0}, ["at least 1"]), ("repetition", {"max_penalty": 1}, ["at most 0"]),
    ("repetition", {"ngram": True}, ["whole number"]), ("repetition", {"ngram": 2.5}, ["whole number"]),
    ("overlong", {"max_length": 8}, ["cache is missing"]), ("overlong", {"max_length": 8, "cache": 9}, ["1 to max_length = 8"]),
    ("cosine_length", {}, ["max_length is missing"]), ("cosine_length", {"max_length": 9, "wrong": [1]}, ["two numbers"]),
    ("math_verify", {"timeout": 0.5}, ["at least 1 second"]), ("int", {"x": 1}, ["no 'x'", "known: none"])])
def test_options_are_checked_before_a_run(name, options, words):
    require("jsonschema")
    require("math_verify")
    message = refusal(name, **options)
    assert all(word in message for word in words), message


def test_a_table_for_no_reward_and_a_second_name_for_what_has_no_options_are_refused():
    with pytest.raises(ConfigError, match="'regx' is none of the rewards .regex.; did you mean 'regex'"):
        find_rewards(["regex"], {"regex": {"pattern": "a"}, "regx": {}})
    with pytest.raises(ConfigError, match="must be a table"):
        find_rewards(["regex"], {"regex": "a"})
    with pytest.raises(ConfigError, match="no file"):
        find_rewards(["int:second"])


def test_every_built_in_says_what_it_gives():
    for name, function in REWARDS.items():
        assert len(function.__doc__) > 40, name


# ---- form

def test_regex_looks_where_it_is_told():
    assert score("regex", "so 12", "none", pattern=r"\d+") == [1, 0]
    assert score("regex", "<answer>12</answer>", "12", "<answer>x12</answer>", pattern=r"\d+", where="answer", whole=True) \
        == [1, 0, 0]
    assert score("regex", "A\nB", pattern="(?is)a.b", whole=True) == [1]


@pytest.mark.parametrize("text, valid", [
    ("{}", 1), ('{"a": [1, 2.5, null]}', 1), ("```json\n[1]\n```", 1), ("Here:\n```\n{}\n```\nDone.", 1), ("3", 1),
    ("```json\n{]\n```\n```json\n{}\n```", 1), ("<answer>[1]</answer> yes", 1), ("```python\nx\n```\n[1]", 0),
    ("", 0), ("{", 0), ("NaN", 0), ("{} {}", 0), ("{'a': 1}", 0), ("[" * 100_000, 0), ("9" * 10_000, 0)])
def test_json_is_json_in_a_block_in_the_answer_or_the_whole(text, valid):
    assert score("json", text) == [valid]


def test_a_schema_as_a_table_or_a_file_tells_valid_from_fitting_json(tmp_path):
    require("jsonschema")
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for given in (schema, str(tmp_path / "schema.json")):
        assert score("json", '{"name": "a"}', '{"name": 1}', "[]", "{", schema=given) == [1, 0.5, 0.5, 0]


def test_a_fenced_block_goes_before_the_answer_and_the_last_before_the_others():
    assert fenced("```py\na\n```\n<answer>b</answer>\n```\nc\n```\n```sh\nd\n```", "python") == "c\n"
    assert fenced("<answer>b</answer>", "python") == "b" and fenced("plain", "python") == "plain"


# ---- length and repetition, by the formulas

def test_overlong_falls_over_the_last_cache_tokens_as_trl_has_it():
    require("trl")
    from trl import rewards

    texts = ["w " * n for n in range(13)]
    assert score("overlong", *texts, max_length=10, cache=4) == [0] * 7 + [-0.25, -0.5, -0.75, -1, -1, -1]
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    assert score("overlong", *texts, max_length=10, cache=4) == theirs(completion_ids=[t.split() for t in texts])


def test_repetition_is_the_share_of_repeated_ngrams_as_trl_has_it():
    require("trl")
    from trl import rewards

    texts = ["a b a b a b", "a a a a a", "a b c", "a b", "", "a b c a b c"]
    by_hand = [-(1 - 2 / 4), -(1 - 1 / 3), 0, 0, 0, -(1 - 3 / 4)]
    assert score("repetition", *texts) == pytest.approx(by_hand)
    for ngram, penalty in ((1, -1.0), (2, -0.5), (4, -2.0)):
        theirs = rewards.get_repetition_penalty_reward(ngram_size=ngram, max_penalty=penalty)
        assert score("repetition", *texts, ngram=ngram, max_penalty=penalty) == theirs(completion_ids=[t.split() for t in texts])


def test_cosine_length_pays_short_right_answers_most_and_forgives_long_wrong_ones():
    right, wrong = "<answer>4</answer>", "<answer>5</answer>"
    padded = lambda text, n: text + " w" * (n - 1)
    assert score("cosine_length", padded(right, 50), padded(wrong, 50), max_length=100) == pytest.approx([0.75, -0.75])
    assert score("cosine_length", padded(right, 100), padded(wrong, 100), padded(wrong, 300), max_length=100) \
        == pytest.approx([0.5, -0.5, -0.5])
    by_hand = -0.5 + 0.5 * (-1 + 0.5) * (1 + math.cos(math.pi * 0.25))       # L = 25 of 100
    assert score("cosine_length", padded(wrong, 25), max_length=100) == pytest.approx([by_hand])
    assert score("cosine_length", right, "", max_length=1, correct=[3, 2], wrong=[-2, -1]) == pytest.approx([2, -2])
    assert score("cosine_length", right, answer=None, max_length=100) == [None]


# ---- mathematics

MATHS = [("1/2", "0.5", 1), (r"\frac{1}{2}", "$0.5$", 1), ("4", r"So it is \boxed{4}", 1), ("x^2+1", "1+x^2", 1),
         ("{1,2}", "{2,1}", 1), ("7", "8", 0), ("5", "", 0), ("3", "(" * 5000, 0), ("blue sky", "blue", None),
         (None, "4", None), ("2", GOOD, 0), ("4", GOOD, 1)]


def test_math_verify_sees_equal_mathematics_in_any_thread():
    require("math_verify")
    texts = [text if extract_answer(text) else f"<answer>{text}</answer>" for _, text, _ in MATHS]
    texts += ["4", "The answer is 4", r"The answer is \boxed{4}", "Is 4 more than 3?"]
    more = [("4", "", 1), ("4", "", 0), ("4", "", 1), ("3", "", 0)]         # a number in a sentence is no answer
    function = find_rewards(["math_verify"])["math_verify"]
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(function, completions=texts, answer=[gold for gold, *_ in MATHS + more], log_metric=None).result()
    assert found == [value for *_, value in MATHS + more]


def test_a_comparison_that_hangs_or_dies_is_ended_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_grpo.math_equal.SPARE", 0.3)
    (tmp_path / "worker.py").write_text("""
import sys, time
def main(timeout):
    for line in sys.stdin:
        time.sleep(60 * ("hang" in line))
        if "die" in line:
            sys.exit(1)
        print("true", flush=True)
""")
    monkeypatch.setattr("mlx_grpo.math_equal.START", 2)
    worker = Worker(0.1, tmp_path / "worker.py")
    pairs = [("a", "b"), ("a", "hang"), ("a", "b"), ("a", "die"), ("a", "b")]
    assert worker.compare(pairs) == ([True, False, True, False, True], 2)
