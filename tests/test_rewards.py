"""Rewards: what each built-in gives, when two answers are the same, and TRL's signature down to its corners."""

import asyncio
import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import require
from mlx_grpo import (REWARDS, ConfigError, Problem, RewardError, Scorer, UserError, correctness_reward_func, extract_xml_answer,
                      find_rewards, group_advantages, int_reward_func, make_rollout, same_answer,
                      soft_format_reward_func,
                      strict_format_reward_func, weighted_rewards, xmlcount_reward_func)

PLAIN = {name: function for name, function in REWARDS.items() if callable(function) and name != "reasoning_gym"}      # no options, any data
GOOD = "<reasoning>\n2+2\n</reasoning>\n<answer>\n4\n</answer>"


class Words:
    eos_token_ids = {0}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def rollouts(*texts, prompt="2+2?", answer="4", **columns):
    """One group whose completions have these texts."""
    ids = [[k + 1] * (len(text.split()) or 1) for k, text in enumerate(texts)]
    problem = Problem(prompt, answer, {"answer": answer, **columns})
    rollout = make_rollout(Words(), problem, [7], ids, [[-0.1] * len(row) for row in ids])
    return [type(rollout)(**vars(rollout) | {"texts": list(texts)})]


def score(function, *texts, on_error="stop", max_errors=100, **options):
    """(column, extras, metrics) that a Scorer of one function gives."""
    scorer = Scorer(find_rewards([function]), on_error=on_error, max_errors=max_errors)
    scores, extras, metrics = scorer(rollouts(*texts or ("a", "b", "c"), **options), trainer_state="state")
    return scores[:, 0].tolist(), extras, metrics


def refusal(function, *texts, **options):
    with pytest.raises(RewardError) as caught:
        score(function, *texts, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the same answer

@pytest.mark.parametrize("a, b", [
    ("1,000", "1000"), ("1000.0", "1,000"), ("$1,000.50", "1000.5"), ("-3", "-3.0"), ("+5", "5"), ("\u22125", "-5"),
    (" 7 ", "7"), ("7.", "7"),
    ("0.5", "1/2"), ("2/4", "1/2"), (".5", "0.50"), ("50%", "50"), ("1,234,567", "1234567"), ("-0", "0"),
    ("Paris", " paris "), ("007", "7")])
def test_answers_that_mean_the_same_agree(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize("a, b", [
    ("1000", "1001"), ("1,0", "10"), ("10,00", "1000"), ("1 000", "1000"), ("", "0"), ("-", "0"), ("$", "0"),
    ("%", "0"), ("1/0", "0"),
    ("4 apples", "4"), ("5", "-5"), ("0.1", "0.10000000000000001"), ("nan", "0"), ("inf", "1e999"), (None, "4"),
    ("4", None),
    (None, None), ("1e3", "1000"), ("0x10", "16"), ("1_000", "1000"), ("--5", "5"), ("5-", "5"), ("²", "2")])
def test_answers_that_do_not_mean_the_same_differ(a, b):
    assert not same_answer(a, b)


@pytest.mark.parametrize("hostile", [
    "9" * 1_000_000, "1e999999999", "1/" + "0" * 60, "(" * 100_000, "," * 100_000, "1," * 100_000, "\ud800", "\x00",
    "$" * 500_000 + "%" * 500_000, "-" * 1_000_000, "٣" * 64, "1/3" * 100_000])
def test_a_hostile_answer_costs_no_time_and_raises_nothing(hostile):
    started = time.perf_counter()
    assert same_answer(hostile, "4") is False
    assert same_answer(hostile, hostile) is True                 # as text, where it is no number
    assert time.perf_counter() - started < 1


def test_the_last_closed_answer_counts():
    for text, answer in (("<answer>1</answer> <answer> 2\n</answer>", "2"), ("<answer>1</answer> <answer>2", "1"),
                         ("<answer>a<answer>b</answer>", "b"), ("<answer>1</answer></answer>", "1"),
                         ("<answer></answer>", ""),
                         ("</answer><answer>", None), ("<answer>", None), ("4", None), ("", None)):
        assert extract_xml_answer(text) == answer, text


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "<answer></answer>", "<",
                                   "<reasoning></reasoning>",
                                   "</reasoning> ", " ", "<reasoning>x"])
def test_a_completion_full_of_tags_costs_no_time(piece):
    started = time.perf_counter()
    texts = [piece * 30_000, "<reasoning>" + piece * 30_000, piece * 30_000 + "</answer>"]
    for function in PLAIN.values():
        assert all(math.isfinite(v) for v in function(prompts=texts, completions=texts, answer=["4"] * 3))
    assert time.perf_counter() - started < 5


# ---- the built-in rewards

@pytest.mark.parametrize("completion, correct, integer, strict, soft", [
    (GOOD, 2.0, 0.5, 0.5, 0.5),
    ("<reasoning></reasoning><answer>4</answer>", 2.0, 0.5, 0.5, 0.5),
    ("\n  " + GOOD + "\n", 2.0, 0.5, 0.5, 0.5),
    ("Well. " + GOOD, 2.0, 0.5, 0.0, 0.5),
    (GOOD + " That's it.", 2.0, 0.5, 0.0, 0.5),
    (GOOD + GOOD, 2.0, 0.5, 0.0, 0.5),
    ("<reasoning>x</reasoning> so <answer>4</answer>", 2.0, 0.5, 0.0, 0.0),
    ("<answer>4</answer><reasoning>x</reasoning>", 2.0, 0.5, 0.0, 0.0),
    ("<reasoning>x <answer>4</answer></reasoning>", 2.0, 0.5, 0.0, 0.0),
    ("<reasoning>x</reasoning><answer>5</answer>", 0.0, 0.5, 0.5, 0.5),
    ("<reasoning>x</reasoning><answer>four</answer>", 0.0, 0.0, 0.5, 0.5),
    ("<reasoning>x</reasoning><answer>4.0</answer>", 2.0, 0.0, 0.5, 0.5),
    ("<answer>-1,000</answer>", 0.0, 0.5, 0.0, 0.0),
    ("so it is 4\n#### 4", 2.0, 0.5, 0.0, 0.0),
    ("<answer>5</answer> #### 4", 0.0, 0.5, 0.0, 0.0),                  # the XML answer goes before the marker
    ("4", 0.0, 0.0, 0.0, 0.0), ("", 0.0, 0.0, 0.0, 0.0),
    ("<answer>4", 0.0, 0.0, 0.0, 0.0)])
def test_each_built_in_reward_gives_what_it_says(completion, correct, integer, strict, soft):
    for wrap in (lambda text: text, lambda text: [{"role": "assistant", "content": text}]):
        one = [wrap(completion)]
        assert correctness_reward_func(["2+2?"], one, ["4"]) == [correct]
        assert int_reward_func(one) == [integer]
        assert strict_format_reward_func(one) == [strict]
        assert soft_format_reward_func(one) == [soft]


@pytest.mark.parametrize("completion, value", [
    (GOOD, 0.5), ("", 0.0), ("<reasoning>", 0.125), ("<reasoning>x</reasoning>", 0.25), ("<answer>4</answer>", 0.25),
    (GOOD + "x", 0.499), (GOOD + "x" * 100, 0.4), (GOOD + "x" * 9999, 0.0), ("x" * 100 + GOOD, 0.5),
    (GOOD + "<reasoning>", 0.375 - 0.011),                              # a tag that comes twice earns nothing
    (GOOD + GOOD, 0.0)])
def test_xmlcount_gives_an_eighth_for_each_tag_less_a_thousandth_for_each_character_after(completion, value):
    assert xmlcount_reward_func([completion]) == [pytest.approx(value)]


def test_no_built_in_leaves_its_range():
    ranges = {"correctness": (0, 2), "int": (0, 0.5), "strict_format": (0, 0.5), "soft_format": (0, 0.5),
              "xmlcount": (0, 0.5)}
    assert ranges.keys() == PLAIN.keys()
    rng = np.random.default_rng(0)
    parts = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "4", " ", "\n", "####", "text"]
    texts = ["".join(rng.choice(parts, rng.integers(0, 9))) for _ in range(500)]
    for name, (low, high) in ranges.items():
        values = PLAIN[name](prompts=texts, completions=texts, answer=["4"] * len(texts))
        assert min(values) == low and max(values) <= high


# ---- finding them

def test_rewards_are_found_by_name_by_file_and_as_functions(tmp_path):
    (tmp_path / "mine.py").write_text("def brevity_reward_func(completions):\n"
                                      "    return [-float(len(c)) for c in completions]\n")

    class Judge:
        def __call__(self, completions):
            return [0.0] * len(completions)

    found = find_rewards(["int", "correctness_reward_func", f"{tmp_path}/mine.py:brevity_reward_func", Judge(),
                          functools.partial(sum), soft_format_reward_func])
    assert list(found) == ["int", "correctness", "brevity", "Judge", "partial", "soft_format"]
    assert score(found["brevity"], "aa", "b")[0] == [-2, -1]


@pytest.mark.parametrize("spec, words", [
    ("corectness", ["there is no 'corectness'", "did you mean 'correctness'?"]), ("length", ["file.py:function"]),
    ("nowhere.py:f", ["no file 'nowhere.py'"]), ("mine.py:brevty", ["did you mean 'brevity'?"]),
    ("mine.py:LIMIT", ["int", "not a function"]),
    ("broken.py:f", ["broken.py", "SyntaxError"]), ("raises.py:f", ["ZeroDivisionError"]),
    ("mine:brevity", ["no file"])])
def test_a_reward_that_can_not_be_found_is_named(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("LIMIT = 3\ndef brevity(completions): return [0.0] * len(completions)\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        find_rewards([spec])
    assert all(word in str(caught.value) for word in [*words, spec.partition(":")[0]])


def test_one_name_can_not_be_used_twice():
    with pytest.raises(ConfigError, match="'int' is named twice"):
        find_rewards(["int", int_reward_func])


# ---- TRL's signature

def test_functions_of_trl_run_unchanged():
    require("trl")
    from trl import rewards

    chat = [{"role": "user", "content": "2+2?"}]
    assert score(rewards.think_format_reward, "<think>\nx\n</think>\n4", "4", prompt=chat)[0] == [1.0, 0.0]
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
    assert score(overlong, "1 2", "1 2 3", "1 2 3 4 5")[0] == [0.0, -0.5, -1.0]
    repeated = rewards.get_repetition_penalty_reward(ngram_size=1)
    assert score(repeated, "1 1 1 1", "1")[0] == [-0.75, 0.0]


def test_a_function_gets_what_it_names_and_everything_where_it_has_kwargs():
    seen = {}

    def names_two(completions, level):
        seen["two"] = completions, level
        return [0.0] * len(completions)

    def takes_all(prompts, completions, **kwargs):
        seen["all"] = prompts, completions, kwargs
        return [0.0] * len(prompts)

    chat = [{"role": "user", "content": "2+2?"}]
    score(names_two, "a", "b", level=3)
    assert seen["two"] == (["a", "b"], [3, 3])
    score(takes_all, "a", "b", prompt=chat, level=3, **{"odd name": "x"})
    prompts, completions, kwargs = seen["all"]
    assert prompts == [chat, chat] and completions == [[{"role": "assistant", "content": t}] for t in "ab"]
    assert kwargs.keys() == {"completion_ids", "answer", "level", "odd name", "trainer_state", "log_extra",
                             "log_metric"}
    assert kwargs["completion_ids"] == [[1], [2]] and kwargs["answer"] == ["4",
                                                                           "4"] and kwargs["trainer_state"] == "state"


def test_a_column_that_the_data_does_not_have_is_named_even_where_errors_are_skipped():
    for on_error in ("stop", "skip"):
        message = refusal(lambda completions, leval: [], level=1, on_error=on_error)
        assert "'leval'" in message and "did you mean 'level'?" in message
    assert score(lambda completions, leval=None: [float(leval is None)] * 3, level=1)[0] == [1.0] * 3


def test_coroutine_functions_are_awaited_even_inside_an_event_loop():
    async def slow(completions, **_):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook():
        return score(slow)[0]

    assert score(slow)[0] == asyncio.run(notebook()) == [1.0] * 3


def test_coroutine_functions_wait_together_and_each_keeps_its_own_error():
    arrived = []

    def meeting(name):
        async def function(completions, log_metric):
            arrived.append(name)
            for _ in range(500):
                if len(arrived) >= 3:                    # all three are under way before any of them ends
                    break
                await asyncio.sleep(0.01)
            log_metric(f"seen/{name}", len(arrived))
            return [1.0] * len(completions) if name != "bad" else [1 / 0]
        function.__name__ = name
        return function

    scorer = Scorer(find_rewards([meeting("a"), "int", meeting("bad"), meeting("b")]), on_error="skip")
    scores, _, metrics = scorer(rollouts("x", "y"))
    assert scores[:, 0].tolist() == scores[:, 3].tolist() == [1.0, 1.0] and np.isnan(scores[:, 2]).all()
    assert metrics["seen/a"] >= 3 and metrics["seen/b"] >= 3 and metrics["reward_errors"] == 2


def test_several_threads_may_score_at_once_and_every_error_counts():
    scorer = Scorer(find_rewards([breaks_on_b]), on_error="skip", max_errors=1000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: scorer(rollouts("a", "b", "c"))[0][:, 0].tolist(), range(100)))
    assert all(column[0] == column[2] == 1.0 and math.isnan(column[1]) for column in found) and scorer.errors == 100


def test_none_means_not_applicable():
    column, _, metrics = score(lambda completions: [1.0, None, 0.0])
    assert column[0] == 1.0 and math.isnan(column[1]) and column[2] == 0.0 and "reward_errors" not in metrics


def test_weights_multiply_and_what_does_not_apply_is_left_out_of_the_sum():
    scores = np.array([[1.0, 2.0], [np.nan, 2.0], [np.nan, np.nan]])
    np.testing.assert_array_equal(weighted_rewards(scores, np.array([3.0, -0.5])), [2.0, -1.0, np.nan])
    advantages = group_advantages(weighted_rewards(scores, np.array([3.0, -0.5])).reshape(1, 3))
    assert advantages[0, 2] == 0 and advantages[0, 0] == pytest.approx(-advantages[0, 1]) and advantages[0, 0] > 0


def test_booleans_and_numpy_numbers_are_numbers():
    assert score(lambda completions: np.array([1, 0, 2]))[0] == [1, 0, 2]
    assert score(lambda completions: (c == "a" for c in completions))[0] == [1, 0, 0]


def test_log_extra_and_log_metric_reach_the_log():
    def function(completions, log_extra, log_metric):
        log_extra("letters", [len(c) for c in completions])
        log_extra("share", np.array([0.5, 0.25, 0.0], dtype=np.float32))
        log_metric("mine/first", 1)
        log_metric("mine/first", 2)
        return [0.0] * len(completions)

    _, extras, metrics = score(function, "a", "bb", "ccc")
    assert extras == {"letters": [1, 2, 3], "share": [0.5, 0.25, 0.0]} and metrics == {"mine/first": 1.5}
    assert type(extras["share"][0]) is float


@pytest.mark.parametrize("log, words", [
    (lambda extra, metric: extra("a", [1]), ["'a'", "1 values for 3"]),
    (lambda extra, metric: extra("reward", [1, 2, 3]), ["'reward'", "another name"]),
    (lambda extra, metric: extra("a", [{1}, 2, 3]), ["TypeError"]),
    (lambda extra, metric: metric("m", "high"), ["ValueError", "'high'"])])
def test_what_can_not_be_logged_is_refused(log, words):
    def function(completions, log_extra, log_metric):
        log(log_extra, log_metric)
        return [0.0] * 3

    message = refusal(function)
    assert "'function'" in message and all(word in message for word in words)


def test_a_user_error_of_a_function_is_told_as_it_is_and_the_function_is_not_called_again():
    calls = []

    def needs_a_key(completions):
        calls.append(1)
        raise UserError("set MY_KEY")

    assert refusal(needs_a_key) == "reward 'needs_a_key': set MY_KEY" and len(calls) == 1


# ---- errors

def breaks_on_b(completions, log_extra, log_metric):
    log_metric("seen", len(completions))
    log_extra("text", list(completions))
    return [1.0 if c != "b" else 1 / 0 for c in completions]


def test_an_exception_stops_the_run_and_names_function_problem_and_completion():
    message = refusal(breaks_on_b)
    assert message == "reward 'breaks_on_b' raised ZeroDivisionError: division by zero on the completion 'b' to '2+2?'"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1.0", [1.0], 10**400, np.nan])
def test_a_value_that_is_no_finite_number_stops_the_run(value):
    message = refusal(lambda completions: [1.0, value, None])
    assert "'<lambda>'" in message and "for the completion 'b' to '2+2?'" in message and "or None" in message
    column, _, metrics = score(lambda completions: [1.0, value, None], on_error="skip")
    assert column[0] == 1.0 and math.isnan(column[1]) and math.isnan(column[2]) and metrics == {"reward_errors": 1}


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, []])
def test_a_wrong_length_stops_the_run(values):
    message = refusal(lambda completions: values)
    assert f"{len(values)} values for 3 completions" in message and "'a'" in message and "'2+2?'" in message
    column, _, metrics = score(lambda completions: values, on_error="skip")
    assert all(map(math.isnan, column)) and metrics == {"reward_errors": 3}


def test_a_function_that_returns_nothing_or_fails_only_on_the_whole_batch_is_told():
    assert "TypeError" in refusal(lambda completions: None)
    assert "3 completions together" in refusal(lambda completions: [1.0] * (1 // (len(completions) < 3)))


def test_a_skipped_row_is_left_out_counted_and_told_and_the_others_keep_their_scores(capsys):
    column, extras, metrics = score(breaks_on_b, on_error="skip")
    assert column[0] == column[2] == 1.0 and math.isnan(column[1])
    assert extras == {"text": ["a", None, "c"]} and metrics == {"seen": 1.0, "reward_errors": 1}
    told = capsys.readouterr().err
    assert "breaks_on_b" in told and "ZeroDivisionError" in told and "1 rows" in told


def test_too_many_skipped_rows_stop_the_run_all_the_same():
    scorer = Scorer(find_rewards([breaks_on_b]), on_error="skip", max_errors=2)
    group = rollouts("a", "b", "c")
    for errors in (1, 2):
        assert scorer(group)[2]["reward_errors"] == errors
    with pytest.raises(RewardError, match="3 reward errors, more than max_reward_errors = 2.*breaks_on_b"):
        scorer(group)
