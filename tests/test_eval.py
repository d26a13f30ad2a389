"""`eval`: statistics against enumeration and scipy, the command on the demo's model, comparisons."""

import itertools
import json
import re
import shlex
from collections import Counter
from dataclasses import replace
from math import comb

import numpy as np
import pytest
from conftest import ROOT, require
from mlx_grpo import MLXGRPOConfig, Sampling, UserError, eval_rollouts, evaluate, load_model, load_problems, main, same_answer
from mlx_grpo.eval_stats import bootstrap_interval, majority_at_k, pass_at_k, sign_flip_p
from mlx_grpo.evaluation import vote_of
from tiny_models import sets

CHAIN = dict(model_name="data/demo_model", dataset="synthetic:chain", system_prompt="", eval_samples=12, eval_max_new_tokens=16,
             max_train_samples=20, rewards=["correctness", "strict_format"])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)


def run(*argv, **changes):
    assert main(["eval", *sets(**CHAIN | changes), *map(str, argv)]) == 0


def read(path):
    return json.loads(open(path, encoding="utf-8").read())


def refusal(*argv, **changes):
    with pytest.raises(UserError) as caught:
        run(*argv, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- statistics

def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one():
    for n, c in itertools.product(range(1, 8), range(8)):
        for k in range(1, n + 1) if c <= n else ():
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5) and pass_at_k(200, 0, 100) == 0


def majority_by_enumeration(votes, right, k):
    """Every draw voted on, a tie shared among the tied answers."""
    total = 0
    for draw in itertools.combinations(range(len(votes)), k):
        counts = Counter(votes[i] for i in draw if votes[i] is not None)
        tied = [v for v, count in counts.items() if count == max(counts.values())]
        total += sum(np.mean([r for vote, r in zip(votes, right) if vote == v]) for v in tied) / max(len(tied), 1)
    return total / comb(len(votes), k)


def test_maj_at_k_is_the_share_of_all_draws_whose_vote_is_right():
    rng = np.random.default_rng(0)
    for n in (1, 3, 6, 9):
        for _ in range(6):
            votes = [None if v == 0 else int(v) for v in rng.integers(0, rng.integers(2, 6), n)]
            for right in ([v == 1 for v in votes], list(rng.random(n) < 0.5)):
                for k in range(1, n + 1):
                    assert majority_at_k(votes, right, k) == pytest.approx(majority_by_enumeration(votes, right, k), abs=1e-12)


def test_maj_at_k_by_hand_ties_silence_and_a_thousand_votes():
    assert majority_at_k(["a", "b"], [True, False], 2) == 0.5                   # a tie is decided by lot
    assert majority_at_k(["a", None, None], [True, False, False], 3) == 1       # silence doesn't vote
    assert majority_at_k([None, None], [False, False], 2) == 0
    votes = ["a"] * 600 + ["b"] * 400
    assert majority_at_k(votes, [v == "a" for v in votes], 1) == pytest.approx(0.6)
    assert 0.999 < majority_at_k(votes, [v == "a" for v in votes], 501) <= 1


def test_answers_that_are_the_same_vote_together():
    answers = ["1,000", "1000.0", " 1000 ", "1001", "Yes", "yes", "1/2", "0.5", ""]
    for a, b in itertools.product(answers, repeat=2):
        assert (vote_of(a) == vote_of(b)) == same_answer(a, b)
    assert vote_of(None) is None


def test_mcnemar_and_the_permutation_test_are_scipys():
    require("scipy")
    from scipy import stats

    for won, lost in ((0, 0), (5, 0), (7, 3), (3, 7), (40, 61), (300, 290)):
        expected = stats.binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
        assert sign_flip_p([1] * won + [-1] * lost + [0] * 5) == pytest.approx(expected, rel=1e-9)
    rng = np.random.default_rng(1)
    for n in (4, 9, 12):
        d = rng.integers(-8, 9, n)
        if d.sum():
            theirs = stats.permutation_test((d, np.zeros(n)), lambda x, y: np.sum(x - y), permutation_type="samples", n_resamples=np.inf)
            assert sign_flip_p(d.tolist()) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_the_permutation_test_is_the_share_of_all_sign_patterns():
    for d in ([3, -1, 2, 2], [5], [0, 0], [1, -1], [8, 7, -6, 1, 1, 2]):
        sums = [sum(s * x for s, x in zip(signs, d)) for signs in itertools.product((1, -1), repeat=len(d))]
        assert sign_flip_p(d) == pytest.approx(np.mean([abs(s) >= abs(sum(d)) for s in sums]), abs=1e-12)


def test_the_intervals_are_the_bootstraps_of_scipy_and_cover_the_truth():
    require("scipy")
    from scipy import stats

    rng = np.random.default_rng(2)
    values = rng.random((80, 2)) < [0.3, 0.8]
    low, high = bootstrap_interval(values, 0)
    for j in range(2):
        theirs = stats.bootstrap((values[:, j].astype(float),), np.mean, method="percentile", n_resamples=10_000,
                                 rng=np.random.default_rng(0)).confidence_interval
        assert low[j] == pytest.approx(theirs.low, abs=0.015) and high[j] == pytest.approx(theirs.high, abs=0.015)
    assert all(np.array_equal(a, b) for a, b in zip((low, high), bootstrap_interval(values, 0)))
    covered = [bool((iv := bootstrap_interval(rng.normal(size=(40, 1)), seed))[0] <= 0 <= iv[1]) for seed in range(60)]
    assert 0.85 < np.mean(covered) <= 1


def test_problems_that_a_metric_does_not_apply_to_are_left_out_of_its_interval():
    values = np.array([[1.0, np.nan], [0.0, 2.0], [1.0, 2.0], [0.0, np.nan]])
    low, high = bootstrap_interval(values, 0)
    assert low[1] == high[1] == 2 and low[0] < 0.5 < high[0]


# ---- the command

@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(result, page) of the demo's model with eight samples."""
    place = tmp_path_factory.mktemp("result")
    run("--samples", 8, "--k", "1,4,8", "--temperature", 1, "--category", "answer", "--output", place / "x.json",
        "--output", place / "x.md")
    return read(place / "x.json"), (place / "x.md").read_text(encoding="utf-8")


def test_every_number_follows_from_the_stored_completions(result):
    scores, _ = result
    rows, value = scores["problems"], {name: m["value"] for name, m in scores["metrics"].items()}
    right = lambda text, row: same_answer(text.rpartition("<answer>")[2].partition("</answer>")[0], row["answer"])
    counts = [sum(right(s["completion"], row) for s in row["samples"]) for row in rows]
    assert 0 < sum(counts) < 8 * len(rows)
    assert value["exact_match"] == pytest.approx(np.mean([right(row["completion"], row) for row in rows]))
    assert value["avg@8"] == value["pass@1"] == pytest.approx(np.mean(counts) / 8)
    assert value["pass@8"] == pytest.approx(np.mean([c > 0 for c in counts]))
    assert value["pass@4"] == pytest.approx(np.mean([1 - comb(8 - c, 4) / comb(8, 4) for c in counts]))
    votes = [[None if s["extracted"] is None else s["extracted"] for s in row["samples"]] for row in rows]
    brute = [majority_by_enumeration(v, [s["correct"] for s in row["samples"]], 4) for v, row in zip(votes, rows)]
    assert value["maj@4"] == pytest.approx(np.mean(brute))
    assert value["rewards/correctness@8"] == pytest.approx(2 * np.mean(counts) / 8)
    assert value["reward@8"] == pytest.approx(value["rewards/correctness@8"] + value["rewards/strict_format@8"])
    assert value["mean_length@8"] == pytest.approx(np.mean([s["length"] for row in rows for s in row["samples"]]))
    assert all(m["low"] <= m["value"] <= m["high"] for m in scores["metrics"].values())


def test_categories_hold_the_problems_of_each_value(result):
    scores, page = result
    assert sum(c["problems"] for c in scores["categories"].values()) == len(scores["problems"])
    for name, part in scores["categories"].items():
        mine = [row for row in scores["problems"] if row["category"] == name]
        assert len(mine) == part["problems"] and all(row["answer"] == name for row in mine)
        assert part["metrics"]["avg@8"]["value"] == pytest.approx(np.mean([[s["correct"] for s in row["samples"]] for row in mine]))
        assert f"\n| {name} | {len(mine)} |" in page
    assert "| pass@4 |" in page and "| avg@8 |" in page


def test_how_rows_are_batched_changes_no_completion(result):
    scores, _ = result
    run("--samples", 8, "--k", "8", "--temperature", 1, "--limit", 5, "--output", "y.json", rollout_batch_size=1)
    texts = lambda rows: [[row["completion"]] + [s["completion"] for s in row["samples"]] for row in rows]
    assert texts(read("y.json")["problems"]) == texts(scores["problems"][:5])


def test_the_trainers_evaluation_and_the_commands_are_one():
    config = MLXGRPOConfig(**CHAIN | {"model_name": str(ROOT / "data/demo_model")})
    model, tokenizer = load_model(config.model_name)
    held_out = load_problems(config)[1]
    greedy, texts = evaluate(model, tokenizer, held_out, config)
    again = eval_rollouts(model, tokenizer, held_out, config, Sampling(0.0, max_new_tokens=16), num_generations=2)
    assert [r.texts for r in again] == [[t, t] for t in texts]                   # greedy whatever the row's random numbers
    assert greedy["exact_match"] == np.mean([same_answer(t.rpartition("<answer>")[2].partition("<")[0], p.answer)
                                             for t, p in zip(texts, held_out)])
    warm = evaluate(model, tokenizer, held_out, replace(config, eval_temperature=1.0))[1]
    assert warm != texts and warm == evaluate(model, tokenizer, held_out, replace(config, eval_temperature=1.0))[1]


def test_splits_are_the_held_out_the_training_and_all_problems(tmp_path):
    rows = [{"question": f"{i}+1", "answer": str(i + 1)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {}
    for split in ("eval", "train", "all"):
        run("--split", split, "--output", "x.json", dataset="rows.jsonl", eval_fraction=0.25, max_train_samples=0, eval_max_new_tokens=2)
        asked[split] = {row["answer"] for row in read("x.json")["problems"]}
    assert len(asked["eval"]) == 5 and len(asked["train"]) == 15 and asked["eval"] | asked["train"] == asked["all"]


def test_a_reward_function_can_say_what_is_right_and_answers_may_be_missing(tmp_path):
    (tmp_path / "mine.py").write_text("def brief(completions, trainer_state):\n"
                                      "    return [trainer_state.global_step - len(c[0]['content']) for c in completions]\n")
    run("--correct", "brief:-40", "--output", "x.json", rewards=["mine.py:brief"])
    rows = read("x.json")["problems"]
    assert all(row["correct"] == (len(row["completion"]) <= 40) for row in rows) and rows[0]["rewards"]["brief"] < 0
    run("--output", "y.json", rewards=["mine.py:brief"], answer_column="", dataset=str(ROOT / "data/questions.jsonl"), eval_fraction=0.5)
    metrics = read("y.json")["metrics"]
    assert "exact_match" not in metrics and metrics["reward"]["value"] < 0


@pytest.mark.parametrize("argv, words", [
    (["--samples", "-1"], "--samples -1"), (["--samples", "2000"], "1 to 1000"), (["--k", "4"], "--samples N"),
    (["--temperature", "1"], "--samples N"), (["--samples", "4", "--k", "1,8"], "from 1 to --samples (4)"),
    (["--samples", "4", "--k", "a"], "whole numbers"), (["--samples", "4", "--temperature", "0"], "above 0"),
    (["--category", "anwser"], "did you mean 'answer'"), (["--correct", "correctnes:1"], "did you mean 'correctness'"),
    (["--correct", "correctness"], "REWARD:LEAST"), (["--output", "x.txt"], ".json or .md"), (["--limit", "-2"], "--limit -2"),
    (["--compare", "a.json", "b.json"], "a.json: can't read"), (["--compare", "./a", "./b"], "no such directory"),
])
def test_what_can_not_be_meant_is_one_line(argv, words, tmp_path):
    assert words in refusal(*argv)
    assert list(tmp_path.iterdir()) == []


# ---- comparisons

def made(path, right, samples=(), **settings):
    """A result file of problems 0, 1, ... that were answered right or not."""
    record = lambda r: {"completion": f"it is {int(r)} | <b>", "extracted": str(int(r)), "correct": bool(r), "length": 3, "ended": True,
                        "rewards": {"correctness": 2.0 * r}, "reward": 2.0 * r}
    problems = [{"prompt": f"problem {i}", "answer": "1", **record(r)} for i, r in enumerate(right)]
    for row, drawn in zip(problems, samples):
        row["samples"] = [record(r) for r in drawn]
    n = len(samples[0]) if samples else 0
    path.write_text(json.dumps({"model": path.stem, "dataset": "d", "split": "eval", "settings": {"seed": 0, "samples": n} | settings,
                                "k": [n] if n else [], "metrics": {}, "problems": problems}))
    return str(path)


def test_a_comparison_counts_what_was_won_and_lost_and_tests_it(tmp_path, capsys):
    a, b = made(tmp_path / "a.json", [0] * 9 + [1, 1, 1]), made(tmp_path / "b.json", [1] * 8 + [0] + [0, 1, 1])
    assert main(["eval", "--compare", a, b, "--output", "c.json", "--output", "c.md"]) == 0
    told, found, page = capsys.readouterr().out, read("c.json"), open("c.md", encoding="utf-8").read()
    assert found["won"] == list(range(8)) and found["lost"] == [9]
    d = found["differences"]["exact_match"]
    assert (d["a"], d["b"], d["difference"]) == pytest.approx((0.25, 10 / 12, 7 / 12))
    assert d["p"] == pytest.approx(2 * (1 + 9) / 2**9) and 0 < d["low"] < d["difference"] < d["high"]       # 8 against 1
    assert "B wins 8 and loses 1 of 12 problems" in told and "p = 0.039" in told and "B is better" in told
    assert "## Won by B: 8" in page and "| problem 0 | 1 | it is 0 \\| &lt;b> | it is 1 \\| &lt;b> |" in page
    assert main(["eval", "--compare", a, a]) == 0
    assert "wins 0 and loses 0" in capsys.readouterr().out


def test_samples_are_compared_by_the_paired_permutation_test(tmp_path):
    rng = np.random.default_rng(3)
    first = (rng.random((15, 4)) < 0.3).tolist()
    second = (rng.random((15, 4)) < 0.6).tolist()
    a, b = made(tmp_path / "a.json", [0] * 15, first), made(tmp_path / "b.json", [0] * 15, second)
    main(["eval", "--compare", a, b, "--output", "c.json"])
    found, counts = read("c.json"), [sum(y) - sum(x) for x, y in zip(first, second)]
    assert found["differences"]["avg@4"]["p"] == pytest.approx(sign_flip_p(counts)) and found["differences"]["exact_match"]["p"] == 1
    assert found["won_samples"] == [i for i, c in enumerate(counts) if c > 0]
    assert found["differences"]["pass@4"]["difference"] == pytest.approx(np.mean([any(y) - any(x) for x, y in zip(first, second)]))


def test_other_problems_or_settings_are_refused_in_one_line(tmp_path):
    a = made(tmp_path / "a.json", [0, 1])
    assert "seed is 0 and 1" in refusal("--compare", a, made(tmp_path / "b.json", [0, 1], seed=1))
    assert "different problems (2 and 3, 2 of them the same)" in refusal("--compare", a, made(tmp_path / "b.json", [0, 1, 1]))
    turned = read(a)
    turned["problems"].reverse()
    (tmp_path / "t.json").write_text(json.dumps(turned))
    assert "in another order" in refusal("--compare", a, tmp_path / "t.json")
    (tmp_path / "n.json").write_text("[]")
    assert "not a result" in refusal("--compare", a, tmp_path / "n.json")
    assert "leave the other options out" in refusal("--compare", a, a, "--samples", 2)


def test_two_models_are_asked_the_same_with_the_same_random_numbers(tmp_path, result):
    """A model against itself differs in nothing; a result written before takes the place of its model."""
    base = str(ROOT / "data/demo_model")
    run("--samples", 2, "--temperature", 1, "--compare", base, base, "--output", "c.json")
    found = read("c.json")
    assert found["a"]["problems"] == found["b"]["problems"] and all(d["difference"] == 0 for d in found["differences"].values())
    assert any(s["completion"] != row["completion"] for row in found["a"]["problems"] for s in row["samples"])
    (tmp_path / "before.json").write_text(json.dumps(found["a"]))
    run("--samples", 2, "--temperature", 1, "--compare", "before.json", base, "--output", "d.json")
    assert read("d.json")["differences"]["avg@2"]["difference"] == 0
    assert "samples is 2 and 4" in refusal("--samples", 4, "--temperature", 1, "--compare", "before.json", base)


# ---- the guide

@pytest.mark.parametrize("page", ["evaluation", "incremental"])
def test_the_commands_of_the_guide_run_in_their_order(page, tmp_path):
    """In a directory like a clone after the demo; fewer problems."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "outputs/demo-1").mkdir(parents=True)
    (tmp_path / "outputs/demo-1/checkpoint-30").symlink_to(ROOT / "data/demo_model")
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i % 10)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(commands) == {"evaluation": 7, "incremental": 1}[page]
    for command in commands:
        python, script, *argv = shlex.split(command)
        assert (python, script) == ("python", "mlx_grpo.py")
        if "before.json after.json" not in command:
            argv += ["--set", "eval_samples=8", *(["--limit", "8"] if argv[0] == "eval" else ["--set", "num_generations=2"])]
        assert main(argv) == 0, command
    assert {"evaluation": tmp_path / "comparison.md", "incremental": tmp_path / "outputs/demo-2/checkpoint-last"}[page].exists()
