"""reasoning_gym as data and reward: its rows on every start, its scores, and model text that reaches nothing."""

import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, require
from test_trainer import CONFIG, make_trainer

from mlx_grpo import UserError, extract_answer, find_rewards, gym_tasks, is_right, load_problems
from mlx_grpo.gym_tasks import gym_rows, score_answer, worker

require("reasoning_gym")
GYM = replace(CONFIG, dataset="reasoning_gym:chain_sum", max_train_samples=12, rewards=["reasoning_gym", "strict_format"])
UNSTABLE = ["isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder"]     # these walk over sets


def entry(task, **options):
    row = gym_rows(task, 2, 0, options)[0][0]
    return row, row["reasoning_gym"]


def test_a_row_is_what_the_library_makes_with_that_seed():
    import reasoning_gym

    row, source = entry("chain_sum", max_terms=3, max_digits=2)
    data = reasoning_gym.create_dataset("chain_sum", max_terms=3, max_digits=2, seed=source["seed"], size=2)
    assert (row["question"], row["answer"]) == (data[0]["question"], data[0]["answer"])
    assert row["metadata"]["num_terms"] <= 3


PRINT_ROWS = """
import json, sys
import mlx_grpo
from mlx_grpo.gym_tasks import gym_rows
print(json.dumps([gym_rows(task, 4, 0, {}) for task in sys.argv[1:]]))
"""


def test_rows_are_the_same_in_every_process_also_where_the_library_walks_over_sets():
    """In the trainer's own process these tasks gave other rows at each start, so a resumed run saw other problems."""
    runs = [subprocess.run([sys.executable, "-c", PRINT_ROWS, *UNSTABLE], cwd=ROOT, capture_output=True, text=True,
                           env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}, check=True).stdout for seed in "12"]
    assert runs[0] == runs[1] and len(runs[0]) > 1000


def test_the_score_is_the_task_s_own():
    row, source = entry("chain_sum")
    assert score_answer(row["answer"], source) == 1 and score_answer(f"+{row['answer']}.00", source) == 1
    assert score_answer("no number", source) < 1 and score_answer(None, source) == 0
    row, source = entry("countdown", min_numbers=3, max_numbers=3)
    assert score_answer(f"({row['answer']})", source) == 1                  # another way to write it


def test_the_reward_takes_the_extracted_answer_and_leaves_other_data_alone():
    reward = find_rewards(["reasoning_gym"])["reasoning_gym"]
    row, source = entry("chain_sum")
    texts = [f"<answer>{row['answer']}</answer>", f"so #### {row['answer']}", row["answer"], "<answer>x</answer>"]
    values = reward(completions=[*texts, "<answer>1</answer>"], reasoning_gym=[source] * 4 + [None])
    assert values[:2] == [1, 1] and max(values[2:4]) < 1 and values[4] is None
    assert reward(completions=["a", "b"]) == [None, None]


@pytest.mark.parametrize("task, text", [
    ("string_insertion", "__import__('os').system('touch {}')"), ("spiral_matrix", "[open('{}', 'w')]"),
    ("simple_integration", "__import__('os').system('touch {}')"), ("simple_integration", "open('{}', 'w')"),
    ("polynomial_multiplication", "__import__('pathlib').Path('{}').touch()"),
    ("polynomial_multiplication", "__import__('subprocess').run(['touch', '{}'])")])
def test_an_answer_that_is_a_program_does_nothing(task, text, tmp_path):
    """Their scorers hand the answer to eval, or to sympy's parser, which is eval."""
    assert score_answer(text.format(tmp_path / "made"), entry(task)[1]) < 1
    assert not (tmp_path / "made").exists()


def test_an_answer_that_takes_for_ever_is_worth_nothing_and_the_next_one_is_scored(monkeypatch, capsys):
    row, source = entry("simple_integration")
    monkeypatch.setattr(gym_tasks, "SCORE_LIMIT_S", 1.0)
    assert score_answer("9**9**9**9", source) == 0
    assert "more than 1 s" in capsys.readouterr().err
    monkeypatch.setattr(gym_tasks, "SCORE_LIMIT_S", 60.0)
    assert score_answer(row["answer"], source) == 1                         # by a new process, which makes the entry again


def test_a_scorer_that_stumbles_over_a_word_gives_nothing():
    assert score_answer("seven", entry("prime_factorization")[1]) == 0     # the library raises ValueError


def test_the_level_is_that_of_the_library_s_own_curriculum():
    terms = lambda level: max(row["metadata"]["num_terms"] for row, _ in gym_rows("chain_sum", 40, 0, {"level": level}))
    assert terms(0) <= 3 < terms(4) <= 7


@pytest.mark.parametrize("task, options, message", [
    ("chain_summ", {}, "there is no task 'chain_summ'"), ("chain_sum", {"x": 1}, "has no option 'x'; it has allow_negation"),
    ("chain_sum", {"max_terms": 0}, "max_terms must be >= min_terms"), ("chain_sum", {"level": "low"}, "got 'low'"),
    ("chain_sum", {"seed": 1}, "follows from seed"), ("chain_sum", {"max_terms": "a"}, "chain_sum: ")])
def test_mistakes_are_one_line(task, options, message):
    with pytest.raises(UserError, match=message) as caught:
        gym_rows(task, 2, 0, options)
    assert "\n" not in str(caught.value)


def test_without_the_package_its_name_is_told(monkeypatch):
    worker().process and worker().stop()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        gym_rows("chain_sum", 2, 0, {})


def test_a_run_is_trained_evaluated_and_raised_on_it(tmp_path):
    plan = {"option": "level", "levels": [0, 1], "raise_at": -1.0, "window": 1}
    trainer = make_trainer(tmp_path, replace(GYM, max_steps=2, curriculum=plan, eval_samples=4, eval_steps=1, max_prompt_length=2048))
    metrics = trainer.train()
    assert metrics["curriculum_level"] == 1 and 0 <= metrics["rewards/reasoning_gym/mean"] <= 1
    assert "eval/exact_match" in metrics


def test_exact_match_asks_the_task_where_many_answers_are_right():
    problem = load_problems(replace(GYM, dataset="reasoning_gym:countdown"))[0][0]
    other = f"<answer>({problem.answer})</answer>"
    assert extract_answer(other) != problem.answer and is_right(problem, other) and not is_right(problem, "<answer>1</answer>")
