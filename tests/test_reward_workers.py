"""Rewards in threads while other groups decode: the same numbers, and who may call what at once."""

import asyncio
import json
import threading
from dataclasses import replace

import mlx.core as mx
import mlx_grpo
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from mlx_grpo import (MLXGRPOConfig, MLXGRPOTrainer, NotFinite, RewardError, Scorer, TrainerCallback, find_rewards,
                      find_world, load_model, load_problems)
from mlx_grpo.reward_workers import RewardWorkers
from test_rewards import rollouts
from test_trainer import numbers
from tiny_models import QUICK, tiny_qwen2

WAIT_S = 20      # of a test that would fail


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_qwen2(tmp_path_factory.mktemp("tiny"))


def trainer_of(tiny, run_dir, rewards, **changes):
    data = {"dataset": str(ROOT / "data/word_problems.jsonl"), "gradient_accumulation_steps": 3, "eval_samples": 0,
            "log_jsonl": True, "model_name": tiny}
    config = MLXGRPOConfig(**QUICK | data | changes)
    return MLXGRPOTrainer(*load_model(tiny), find_rewards(rewards), replace(config, rewards=["correctness"] * len(rewards)),
                          *load_problems(config), run_dir=run_dir)


def even(completions, completion_ids, log_extra, log_metric, trainer_state, **columns):
    """Raises, gives None, logs; its values differ from row to row."""
    log_extra("columns", [sorted(columns)] * len(completions))
    log_metric("even/step", trainer_state.global_step)
    log_metric("even/rows", len(completions), "sum")
    values = [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
    return [1 / 0 if value == 0.5 else None if value > 0.8 else value for value in values]


async def length(completions, log_metric):
    await asyncio.sleep(0)
    log_metric("longest", max(map(len, completions)), "max")
    return [float(len(text)) for text in completions]


def run_of(tiny, run_dir, workers, **changes):
    """(metrics, completions, weights) of a run of three steps with reward errors, two rounds of sampling, two passes."""
    changes |= dict(reward_workers=workers, on_reward_error="skip", max_steps=3)
    trainer = trainer_of(tiny, run_dir, [even, length], **changes)
    trainer.train()
    read = lambda name: [json.loads(line) for line in (run_dir / name).read_text().split("\n") if line]
    weights = {k: np.array(v) for k, v in tree_flatten(trainer.learner.master)}
    return [numbers(m) for m in read("metrics.jsonl")], read("completions.jsonl"), weights


@pytest.mark.parametrize("changes", [
    {}, {"rollout_batch_size": 4, "num_iterations": 2}, {"dynamic_sampling": True, "max_gen_batches": 2}])
def test_workers_change_no_number(changes, tiny, tmp_path):
    expected = run_of(tiny, tmp_path / "0", 0, **changes)
    assert expected[0][0]["even/rows"] == 12 - expected[0][0]["reward_errors"] < 12 and expected[1][0]["columns"]
    for workers in (1, 3):
        metrics, completions, weights = run_of(tiny, tmp_path / str(workers), workers, **changes)
        assert metrics == expected[0] and completions == expected[1]
        assert all(np.array_equal(weights[k], expected[2][k]) for k in weights)


def test_a_group_is_scored_while_others_decode(tiny, tmp_path, monkeypatch):
    scored, late = threading.Event(), []
    sample = mlx_grpo.make_rollout

    def make_rollout(tokenizer, problem, *args, **kwargs):
        late.append(problem)
        assert len(late) < 3 or scored.wait(WAIT_S), "the last group is about to be done, and none has been scored"
        return sample(tokenizer, problem, *args, **kwargs)

    def reward(completions):
        scored.set()
        return [0.0] * len(completions)

    monkeypatch.setattr(mlx_grpo, "make_rollout", make_rollout)
    trainer = trainer_of(tiny, tmp_path, [reward], reward_workers=1, rollout_batch_size=4)
    trainer.collect()
    assert len(late) == 3


def score_with(workers, functions, groups, **options):
    scorer = Scorer(find_rewards(functions), **options)
    with RewardWorkers(scorer, workers, [g.problem for g in groups], None, find_world()) as threads:
        for place in reversed(range(len(groups))):
            threads.finished(place, groups[place])
        return threads.score(groups)[1:]


def groups(*texts):
    """A Rollout for each tuple of texts; all but the first have a column `rare`."""
    return [rollouts(*group, prompt=f"prompt {i}", place=i, **{"rare": 1} if i else {})[0] for i, group in enumerate(texts)]


def broken_on_b(completions):
    return [1 / 0 if text == "b" else 1.0 for text in completions]


@pytest.mark.parametrize("function", [
    broken_on_b, lambda completions: [float("nan") if text == "c" else 1.0 for text in completions],
    lambda completions, absent: 0])
def test_errors_read_as_they_do_without_workers(function):
    if function.__name__ == "<lambda>":
        function.__name__ = "wrong"
    messages = []
    for workers in (0, 1, 3):
        with pytest.raises(RewardError) as error:
            score_with(workers, [function], groups(("a", "a"), ("a", "b"), ("c", "b")))
        messages.append(str(error.value))
    assert len(set(messages)) == 1


def test_lengths_are_those_of_each_call():
    """[3 values] and [1 value] for two groups of two are no four values."""
    lopsided = lambda completions: [0.0] * (3 if "a" in completions else 1)
    with pytest.raises(RewardError, match="returned 3 values for 2 completions, the first of them 'a'"):
        score_with(1, [lopsided], groups(("a", "a"), ("b", "b")))
    def extra(completions, log_extra):
        log_extra("note", ["x"] * (3 if "a" in completions else 1))
        return [0.0] * 2
    with pytest.raises(RewardError, match=r"log_extra\('note'\) got 3 values for 2"):
        score_with(1, [extra], groups(("a", "a"), ("b", "b")))


def test_a_column_that_only_some_groups_have_is_none_in_the_others():
    seen = {}
    def reward(completions, rare, place):
        seen[place[0]] = rare
        return [0.0] * len(completions)
    score_with(2, [reward], groups(("a", "a"), ("b", "b")))
    assert seen == {0: [None, None], 1: [1, 1]}


def test_what_only_some_groups_log_is_none_in_the_others():
    def reward(completions, log_extra):
        if "b" in completions:
            log_extra("note", completions)
        return [0.0] * len(completions)
    assert score_with(1, [reward], groups(("a", "a"), ("b", "b")))[1] == {"note": [None, None, "b", "b"]}


def counting(inside, most):
    def reward(completions):
        with threading.Lock():
            inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()
        return [0.0] * len(completions)
    return reward


def test_a_function_is_called_by_one_thread_at_a_time_unless_it_says_that_it_is_safe():
    inside, most = [], []
    plain, other = counting(inside, most), counting(inside, most)
    other.__name__ = "other"
    async def third(completions):
        return plain(completions)
    score_with(4, [plain, other, third], groups(*[("a", "a")] * 6))
    assert len(most) == 18 and max(most) == 1

    together = threading.Barrier(2, timeout=WAIT_S)
    def safe(completions):
        together.wait()                                   # breaks unless two are inside
        return [0.0] * len(completions)
    safe.thread_safe = True
    score_with(2, [safe], groups(("a", "a"), ("b", "b")))


def test_sampling_that_fails_leaves_no_call_behind(tiny, tmp_path, monkeypatch):
    calls, sample = [], mlx_grpo.make_rollout
    def make_rollout(tokenizer, problem, *args, **kwargs):
        if len(calls) and calls[-1] == "sampled":
            raise NotFinite("no number")
        calls.append("sampled")
        return sample(tokenizer, problem, *args, **kwargs)

    monkeypatch.setattr(mlx_grpo, "make_rollout", make_rollout)
    reward = lambda completions: [0.0] * len(completions)
    trainer = trainer_of(tiny, tmp_path, [reward], reward_workers=2, rollout_batch_size=4)
    with pytest.raises(NotFinite):
        trainer.collect()
    assert not [t for t in threading.enumerate() if t.name.startswith("reward")]


def test_mlx_arrays_of_the_main_thread_are_refused_in_words():
    pending = mx.ones(3) * 2                              # not computed yet: it belongs to this thread
    with pytest.raises(RewardError, match="raised RuntimeError: There is no Stream"):
        score_with(1, [lambda completions: [pending.sum().item()] * len(completions)], groups(("a", "a")))


def test_a_kind_of_metric_that_there_is_not_is_told():
    with pytest.raises(RewardError, match="by mean, sum, max, not by 'median'"):
        score_with(0, [lambda completions, log_metric: log_metric("x", 1, "median")], groups(("a",)))


def test_callbacks_see_what_the_workers_gave(tiny, tmp_path):
    class Sees(TrainerCallback):
        def on_rollouts(self, trainer, rollouts, rewards, advantages):
            self.rewards = rewards

    trainer = trainer_of(tiny, tmp_path, [length], reward_workers=2)
    trainer.callbacks.append(Sees())
    trainer.train()
    assert trainer.callbacks[-1].rewards.shape == (12,)
