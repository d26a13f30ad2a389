"""Callbacks: when each event comes and with what, how they are named, and the examples in examples/."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from test_trainer import CONFIG, make_trainer, numbers, weights

from mlx_grpo import ConfigError, TrainerCallback, extract_answer, main, read_metrics
from mlx_grpo.hooks import find_callbacks

LOGGED = replace(CONFIG, log_jsonl=True)
EXAMPLES = ROOT / "examples"
DOC = (ROOT / "docs" / "hooks.md").read_text()


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]


class Recorder(TrainerCallback):
    """What it was told of rollouts."""

    def __init__(self):
        self.seen = []

    def on_rollouts(self, trainer, rollouts, rewards, advantages):
        self.seen.append((trainer.step_count, rollouts, rewards, advantages))


def test_on_rollouts_sees_what_was_sampled_and_scored(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, replace(LOGGED, max_steps=2), callbacks=[recorder]).train()
    logged = rows(tmp_path)
    texts = [text for _, rollouts, _, _ in recorder.seen for r in rollouts for text in r.texts]
    assert [step for step, *_ in recorder.seen] == [1, 2] and texts == [row["completion"] for row in logged]
    assert np.concatenate([r for _, _, r, _ in recorder.seen]).tolist() == [row["reward"] for row in logged]
    assert np.concatenate([a.ravel() for *_, a in recorder.seen]).tolist() == [row["advantage"] for row in logged]


def test_steps_that_reuse_a_rollout_batch_dont_call_on_rollouts(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, replace(LOGGED, num_iterations=2), callbacks=[recorder]).train()
    assert [step for step, *_ in recorder.seen] == [1, 3]


def test_callbacks_are_named_in_the_configuration_as_classes_or_objects(tmp_path):
    (tmp_path / "hooks.py").write_text(
        "from mlx_grpo import TrainerCallback\n"
        "class Adds(TrainerCallback):\n"
        "    def __init__(self, value=1):\n"
        "        self.value = value\n"
        "    def on_step_end(self, trainer, metrics):\n"
        "        metrics[f'added/{self.value}'] = self.value\n"
        "seven = Adds(7)\n")
    config = replace(CONFIG, max_steps=1, callbacks=[f"{tmp_path}/hooks.py:Adds", f"{tmp_path}/hooks.py:seven"])
    metrics = make_trainer(tmp_path, config).train()
    assert (metrics["added/1"], metrics["added/7"]) == (1, 7)
    kinds = {type(callback).__name__ for callback in make_trainer(tmp_path, config, callbacks=[]).callbacks}
    assert "Adds" not in kinds and "HealthMonitor" in kinds                   # the argument replaces the option, no more


@pytest.mark.parametrize("text, name, reason", [
    ("class C:\n    pass\n", "C", "C is no TrainerCallback"),
    ("from mlx_grpo import TrainerCallback\nclass C(TrainerCallback):\n    def __init__(self, x):\n        pass\n", "C",
     "make an object of it in the file"),
    ("from mlx_grpo import TrainerCallback\nclass Mine(TrainerCallback):\n    pass\n", "Mime", "did you mean 'Mine'"),
    ("1 / 0\n", "C", "ZeroDivisionError"),
])
def test_what_is_no_callback_is_refused_before_the_model_is_loaded(tmp_path, text, name, reason):
    (tmp_path / "hooks.py").write_text(text)
    spec = json.dumps([f"{tmp_path}/hooks.py:{name}"])
    with pytest.raises(ConfigError, match=reason):
        main(["--config", str(ROOT / "configs/demo.toml"), "--set", f"callbacks={spec}", "--set", "model_name=nowhere"])


def test_an_exception_in_a_callback_is_raised_as_it_is_and_saved_checkpoints_stay(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_end(self, trainer, metrics):
            if metrics["step"] == 2:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        make_trainer(tmp_path, replace(LOGGED, save_steps=1), callbacks=[Breaks()]).train()
    assert (tmp_path / "checkpoint-1" / "manifest.json").exists()


# ---- the examples

def example(name):
    return find_callbacks([f"{EXAMPLES / name.partition(':')[0]}:{name.partition(':')[2]}"])


def test_distinct_answers_is_the_mean_share_of_different_answers_in_a_group(tmp_path):
    make_trainer(tmp_path, replace(LOGGED, max_steps=1), callbacks=example("custom_metric.py:DistinctAnswers")).train()
    answers = [extract_answer(row["completion"]) for row in rows(tmp_path)]
    groups = [set(answers[i:i + CONFIG.num_generations]) for i in range(0, len(answers), CONFIG.num_generations)]
    expected = sum(len(group) for group in groups) / len(answers)
    assert read_metrics(tmp_path)[-1]["answers/distinct"] == pytest.approx(expected)


EVALUATED = replace(LOGGED, learning_rate=0.0, eval_steps=1, eval_samples=4, max_steps=9)      # nothing is learnt


def test_early_stop_ends_after_its_patience_with_a_checkpoint(tmp_path, capsys):
    trainer = make_trainer(tmp_path, EVALUATED, callbacks=example("early_stop.py:EarlyStop"))
    trainer.train()
    assert trainer.step_count == 3 and (tmp_path / "checkpoint-3").is_dir()      # the first value, and two no better
    assert "stopping" in capsys.readouterr().out


def test_a_resumed_early_stop_counts_on(tmp_path):
    make_trainer(tmp_path, replace(EVALUATED, max_steps=2), callbacks=example("early_stop.py:EarlyStop")).train()
    trainer = make_trainer(tmp_path, EVALUATED, callbacks=example("early_stop.py:EarlyStop"))
    trainer.load_checkpoint(tmp_path / "checkpoint-2")
    trainer.train()
    assert trainer.step_count == 3


def test_a_rising_metric_is_not_stopped(tmp_path):
    class Rises(TrainerCallback):
        def on_step_end(self, trainer, metrics):
            metrics["eval/exact_match"] = 0.1 * metrics["step"]

    trainer = make_trainer(tmp_path, replace(LOGGED, max_steps=5), callbacks=[Rises(), *example("early_stop.py:EarlyStop")])
    trainer.train()
    assert trainer.step_count == 5


def test_the_reward_schedule_goes_along_its_line_and_resumes_exactly(tmp_path):
    schedule = "reward_schedule.py:FormatFirst"
    whole = make_trainer(tmp_path / "whole", replace(LOGGED, save_steps=1), callbacks=example(schedule))
    whole.train()
    found = [m["reward_weight/strict_format"] for m in read_metrics(tmp_path / "whole")]
    assert found == pytest.approx([2.0, 1.1, 0.2, 0.2])                          # 4 steps: half of them from 2 to 0.2
    again = make_trainer(tmp_path / "again", LOGGED, callbacks=example(schedule))
    again.load_checkpoint(tmp_path / "whole" / "checkpoint-2")
    again.train()
    assert all(np.array_equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True))
    first, second = read_metrics(tmp_path / "whole")[2:], read_metrics(tmp_path / "again")
    assert [numbers(m) for m in first] == [numbers(m) for m in second]


def test_the_custom_loop_is_short_and_learns(capsys):
    assert len((EXAMPLES / "custom_loop.py").read_text().splitlines()) < 60
    before, after = runpy.run_path(EXAMPLES / "custom_loop.py")["train"](5)
    assert before < 0.1 and after > before + 0.2


COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", DOC, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_run(command, tmp_path):
    """From a directory like a clone; the training runs are shortened."""
    for name in ("examples", "configs", "data", "utils", "mlx_grpo.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = shlex.split(command.partition(" #")[0])
    if "custom_loop" in command:
        words[-1] = "1"
    else:
        words += ["--set", "max_steps=1", "--set", "eval_samples=4", "--set", "batch_size=2"]
    result = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env=os.environ)
    assert result.returncode == 0, result.stderr


def test_the_callback_of_the_guide_adds_its_metric(tmp_path):
    (tmp_path / "my_hooks.py").write_text(re.search(r"```python\n# my_hooks.py\n(.*?)```", DOC, re.S)[1])
    config = replace(CONFIG, max_steps=1, callbacks=[f"{tmp_path}/my_hooks.py:Tokens"])
    metrics = make_trainer(tmp_path, config).train()
    assert metrics["tokens_per_s"] == metrics["num_tokens"] / metrics["step_time"]


def test_the_guide_names_every_event_and_every_example():
    events = {name for name in vars(TrainerCallback) if name.startswith("on_")}
    assert set(re.findall(r"^\| `(on_\w+)", DOC, re.M)) == events
    assert set(re.findall(r"examples/(\w+\.py)", DOC)) == {path.name for path in EXAMPLES.glob("*.py")} - {"augment.py"}     # docs/data.md


def test_what_a_callback_keeps_in_its_state_survives_a_resume(tmp_path):
    class Counts(TrainerCallback):
        def __init__(self):
            self.state = []

        def on_step_end(self, trainer, metrics):
            self.state.append(metrics["step"])

    config = replace(LOGGED, max_steps=2)
    make_trainer(tmp_path, config, callbacks=[Counts(), Counts()]).train()
    mine = [Counts(), Counts(), Counts()]          # the third one is new
    again = make_trainer(tmp_path, replace(config, max_steps=3), callbacks=mine)
    again.load_checkpoint(tmp_path / "checkpoint-2")
    again.train()
    assert [callback.state for callback in mine] == [[1, 2, 3], [1, 2, 3], [3]]


def test_every_callback_is_closed_after_an_exception_too(tmp_path):
    closed = []

    class Closes(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_train_end(self, trainer):
            closed.append("end")

        def on_close(self, trainer):
            closed.append(self.name)
            if self.name == "last":
                raise RuntimeError("a closing that fails")

    class Fails(TrainerCallback):
        def on_step_end(self, trainer, metrics):
            raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="a closing that fails"):
        make_trainer(tmp_path, replace(LOGGED, max_steps=1), callbacks=[Closes("first"), Closes("last")]).train()
    assert closed == ["end", "end", "last", "first"]
    closed.clear()
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, replace(LOGGED, max_steps=1), callbacks=[Closes("first"), Fails()]).train()
    assert closed == ["first"]
