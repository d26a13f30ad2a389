"""Never lose a run: signals, supervised restarts, damaged checkpoints, two processes, changed configurations."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import replace

import mlx.core as mx
import mlx_grpo
import numpy as np
import pytest
from fault_tools import COMMAND, left_by, options, run
from mlx_grpo import ConfigError, TrainerCallback, UserError, newest_valid, read_metrics, tidy
from mlx_grpo.run_state import read_state
from test_trainer import CONFIG, make_trainer, numbers, steps, weights

RUN = replace(CONFIG, log_jsonl=True, max_steps=4, save_steps=1, learning_rate=1e-3)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    assert run(output).returncode == 0
    return left_by(output / "r")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, unbroken, number, code):
    process = subprocess.Popen([*COMMAND, *options(tmp_path, save_steps=0)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in errors
    saved, _ = newest_valid(tmp_path / "r")
    assert saved and 2 <= int(saved.name.removeprefix("checkpoint-")) < 6
    assert run(tmp_path, "--resume", save_steps=0).returncode == 0
    assert left_by(tmp_path / "r") == unbroken


def test_a_damaged_checkpoint_is_skipped_by_name_and_the_one_before_is_taken(tmp_path, capsys):
    trainer = make_trainer(tmp_path, RUN)
    trainer.train()
    file = tmp_path / "checkpoint-4/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (tmp_path / "checkpoint-3/manifest.json").unlink()
    found, skipped = newest_valid(tmp_path)
    assert found.name == "checkpoint-2" and [s.split(":")[0] for s in skipped] == ["checkpoint-4", "checkpoint-3"]
    with pytest.raises(UserError, match="not a whole checkpoint: .*optimizer.safetensors"):
        make_trainer(tmp_path, RUN).load_checkpoint(tmp_path / "checkpoint-4")


def test_a_half_written_last_line_of_the_log_is_dropped_on_resume(tmp_path):
    make_trainer(tmp_path, RUN).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "re')
    resumed = make_trainer(tmp_path, replace(RUN, max_steps=5))
    resumed.load_checkpoint(tmp_path / "checkpoint-4")
    resumed.train()
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_links_lead_to_the_last_and_the_best_and_the_rest_is_pruned(tmp_path):
    class Scores(TrainerCallback):
        def on_step_end(self, trainer, metrics):
            metrics["mine"] = [0.1, 0.9, 0.5, 0.4][trainer.step_count - 1]

    make_trainer(tmp_path, replace(RUN, save_best="mine", save_total_limit=1), callbacks=[Scores()]).train()
    assert (tmp_path / "checkpoint-last").resolve().name == "checkpoint-4"
    assert (tmp_path / "checkpoint-best").resolve().name == "checkpoint-2"
    assert sorted(p.name for p in tmp_path.glob("checkpoint-[0-9]*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_configuration_that_differs_in_what_matters_is_refused_with_the_differences(tmp_path):
    make_trainer(tmp_path, RUN).train()
    with pytest.raises(ConfigError, match="learning_rate was 0.001, is 0.5; temperature was 1.0, is 0.9|temperature .* learning_rate"):
        make_trainer(tmp_path, replace(RUN, learning_rate=0.5, temperature=0.9)).load_checkpoint(tmp_path / "checkpoint-4")
    make_trainer(tmp_path, replace(RUN, max_steps=9, logging_steps=0, save_steps=3)).load_checkpoint(tmp_path / "checkpoint-4")


def test_a_second_process_in_the_same_directory_is_refused(tmp_path):
    first = subprocess.Popen([*COMMAND, *options(tmp_path, max_steps=200)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        for line in first.stdout:
            if line.startswith("step 1/"):
                break
        second = run(tmp_path, "--resume", max_steps=200)
        assert second.returncode == 2 and f"in use by process {first.pid}" in second.stderr
    finally:
        first.kill()
        first.wait()
    assert run(tmp_path, "--resume", max_steps=2).returncode == 0          # the lock died with its process


def test_bad_batches_are_left_out_up_to_their_limit(tmp_path, capsys):
    class Poison(TrainerCallback):
        def on_gradients(self, trainer, gradients):
            from mlx.utils import tree_map
            bad = trainer.step_count == 1 and trainer.bad_steps < 2
            return tree_map(lambda g: g * (float("nan") if bad else 1), gradients)

    trainer = make_trainer(tmp_path, replace(CONFIG, max_bad_steps=2), callbacks=[Poison()])
    steps(trainer, 2)
    assert trainer.bad_steps == 2 and trainer.prompts_drawn == 4 * CONFIG.prompts_per_step
    assert all(np.isfinite(w).all() for w in weights(trainer).values())
    assert capsys.readouterr().err.count("left out") == 2


def test_a_read_only_directory_is_one_line(tmp_path):
    if os.geteuid() == 0:
        place = "/proc/nowhere"
    else:
        place = tmp_path / "closed"
        place.mkdir(mode=0o500)
    done = run(place)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "can't write" in done.stderr


class Poison(TrainerCallback):
    """Gradients that are not finite from step 2 on."""

    def on_gradients(self, trainer, gradients):
        from mlx.utils import tree_map
        return tree_map(lambda g: g * float("nan" if trainer.step_count else 1), gradients)


def test_a_batch_that_is_not_finite_is_kept_with_its_texts(tmp_path):
    config = replace(CONFIG, log_jsonl=True, minibatches=2)
    trainer = make_trainer(tmp_path, config, callbacks=[Poison()])
    trainer.step()
    batches = trainer.window[0]
    with pytest.raises(UserError, match="failure.json"):
        trainer.step()
    record, arrays = json.loads((tmp_path / "failure.json").read_text()), mx.load(str(tmp_path / "failure.safetensors"))
    assert record["step"] == 2 and len(record["rows"]) == sum(len(b.mask) for b in batches) == 16
    for i, batch in enumerate(batches):
        assert {name for name in vars(batch) if f"{i}.{name}" in arrays} >= {"completion_ids", "mask", "advantages", "old_logprobs"}
        assert all(mx.array_equal(arrays[f"{i}.{name}"], a).item() for name, a in vars(batch).items() if a.size)
    logged = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()][16:]
    assert [re.sub(r"<\|.*?\|>", "", row["completion"]) for row in record["rows"]] == [row["completion"] for row in logged]
    assert len(record["problems"]) == 4 and all(row["prompt"] in record["problems"] for row in record["rows"])


def test_a_damaged_checkpoint_is_kept_under_another_name_when_its_step_is_saved_again(tmp_path, capsys):
    make_trainer(tmp_path, RUN).train()
    damaged = (tmp_path / "checkpoint-4/config.json")
    damaged.write_text("{}")
    trainer = make_trainer(tmp_path, RUN)
    trainer.load_checkpoint(newest_valid(tmp_path)[0])
    trainer.train()
    assert newest_valid(tmp_path)[0].name == "checkpoint-4" and "kept as checkpoint-4.damaged-1" in capsys.readouterr().err
    assert (tmp_path / "checkpoint-4.damaged-1/config.json").read_text() == "{}"


def test_what_a_kill_left_while_saving_is_removed_and_a_checkpoint_that_lost_its_name_gets_it_back(tmp_path):
    (tmp_path / ".checkpoint-3.0a1b2c3d.tmp/x").mkdir(parents=True)
    (tmp_path / ".checkpoint-2.0a1b2c3d.old").mkdir()
    (tmp_path / ".checkpoint-1.0a1b2c3d.old").mkdir()
    (tmp_path / ".checkpoint-1.removed").mkdir()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / ".checkpoint-last.tmp").symlink_to("nowhere")
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_background_save_changes_nothing_and_has_one_write_in_flight(tmp_path, monkeypatch):
    """Writes last longer than steps here; the arrays saved must be those of the step, and the run waits for them."""
    results, flying, most = [], [], []
    write_checkpoint = mlx_grpo.run_files.write_checkpoint

    def slow(*args):
        flying.append(1)
        most.append(len(flying))
        time.sleep(0.3)
        write_checkpoint(*args)
        flying.pop()

    monkeypatch.setattr(mlx_grpo.run_files, "write_checkpoint", slow)
    for name, background in (("a", False), ("b", True)):
        make_trainer(tmp_path / name, replace(RUN, save_in_background=background, update_every=3, num_iterations=2)).train()
        results.append([{file.name: file.read_bytes() for file in sorted((tmp_path / name / f"checkpoint-{n}").glob("*.safetensors"))}
                        for n in range(1, 5)])
        state = json.loads((tmp_path / name / "checkpoint-3/trainer_state.json").read_text())
        results[-1].append({k: numbers(v) if isinstance(v, dict) else v for k, v in state.items() if k not in ("config", "callbacks")})
    assert results[0] == results[1] and max(most) == 1 and len(results[0][0]) >= 2
    assert (tmp_path / "b/checkpoint-last").resolve().name == "checkpoint-4" and newest_valid(tmp_path / "b")[1] == []
    logged = read_metrics(tmp_path / "b")
    assert sum(m["save_background_s"] for m in logged) > 0.2 and "save_background_s" not in read_metrics(tmp_path / "a")[3]


def test_a_background_save_that_fails_is_told_at_the_next_step(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlx_grpo.run_files, "write_checkpoint", full)
    trainer = make_trainer(tmp_path, replace(RUN, save_in_background=True))
    with pytest.raises(UserError, match="can't save .*checkpoint-[12]: No space left on device"):
        trainer.train()
    assert trainer.step_count <= 2 and not list(tmp_path.glob("*checkpoint-*"))


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
KILLER = """
import os, signal
from pathlib import Path
def dies_once(completions, **_):
    mark = Path({mark!r})
    with mark.open("a") as file:
        file.write("x")
    if len(mark.read_text()) in {calls}:
        {die}
    return [float(len(c) % 5) for c in completions]
"""


def supervised(tmp_path, die, calls, **changes):
    script = tmp_path / "killer.py"
    script.write_text(KILLER.format(mark=str(tmp_path / "calls"), calls=calls, die=die))
    return [*COMMAND, *options(tmp_path, rewards=f'["{script}:dies_once"]', eval_samples=0, **changes), "--supervise"]


@pytest.mark.parametrize("name, die", [("SIGKILL", KILL), pytest.param("SIGSEGV", "os.kill(os.getpid(), signal.SIGSEGV)", marks=pytest.mark.soak),
                                       pytest.param("exit code 1", "os._exit(1)", marks=pytest.mark.soak)])
def test_a_supervised_run_is_started_again_after_a_death(tmp_path, name, die):
    command = supervised(tmp_path, die, (1, 4), max_steps=4, run_name='"s-{n}"')
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"the run died ({name})") == 2
    assert "again from the beginning" in done.stderr and "from checkpoint-2" in done.stderr
    assert [m["step"] for m in read_metrics(tmp_path / "s-1")] == [1, 2, 3, 4]
    assert not (tmp_path / "s-2").exists()


@pytest.mark.soak
def test_a_supervised_run_that_never_gets_further_is_given_up(tmp_path):
    done = subprocess.run(supervised(tmp_path, KILL, range(2, 99), max_steps=4), capture_output=True, text=True, timeout=200)
    assert done.returncode == 137 and "5 times in a row without a new checkpoint: giving up" in done.stderr
    assert len((tmp_path / "calls").read_text()) == 6 and newest_valid(tmp_path / "r")[0].name == "checkpoint-1"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_supervisor_passes_signals_on_and_stops_with_its_run(tmp_path, number, code):
    process = subprocess.Popen(supervised(tmp_path, KILL, (), max_steps=500), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and errors.count("finishing the step, then saving") == 1 and "--resume" in errors
    assert "again" not in errors and read_state(tmp_path / "r")["ended"] == "done"


def test_an_error_of_the_users_ends_a_supervised_run_at_once(tmp_path):
    done = subprocess.run([*COMMAND, *options(tmp_path, rewards='["nowhere.py:f"]'), "--supervise"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
