"""Never lose a run: kills, signals, damaged checkpoints, two processes, changed configurations."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from mlx_grpo import ConfigError, TrainerCallback, UserError, newest_valid, read_metrics
from test_trainer import CONFIG, largest_difference, make_trainer, numbers, steps, weights

RUN = replace(CONFIG, log_jsonl=True, max_steps=4, save_steps=1, learning_rate=1e-3)
COMMAND = [sys.executable, str(ROOT / "mlx_grpo.py"), "--config", str(ROOT / "configs/demo.toml")]


def options(output, **changes):
    values = {"output_dir": output, "run_name": "r", "max_steps": 6, "save_steps": 1, "eval_samples": 8, "eval_steps": 3,
              "batch_size": 2, "num_generations": 4, "max_train_samples": 64} | changes
    return sum((["--set", f"{k}={v}"] for k, v in values.items()), [])


def run(output, *more, **changes):
    return subprocess.run([*COMMAND, *options(output, **changes), *more], capture_output=True, text=True, timeout=120)


def final_bytes(output, step=6):
    path = output / "r" / f"checkpoint-{step}"
    files = {name: (path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    logged = [{k: v for k, v in numbers(m).items()} for m in read_metrics(output / "r")]
    return files, logged, (output / "r/completions.jsonl").read_text()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    assert run(output).returncode == 0
    return final_bytes(output)


def kill_until_done(output, seed, kills, **changes):
    """Start, kill at random moments (each resumed), then let it finish; returns how many kills hit a living process."""
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen([*COMMAND, *options(output, **changes), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.3, 3.0))
        except subprocess.TimeoutExpired:
            process.kill()
            hits += 1
        process.wait()
    done = run(output, "--resume", **changes)
    assert done.returncode == 0, done.stderr
    return hits


def test_killed_runs_resume_to_the_same_bytes(tmp_path, unbroken):
    assert kill_until_done(tmp_path, seed=0, kills=4) > 0
    assert final_bytes(tmp_path) == unbroken


@pytest.mark.soak
@pytest.mark.parametrize("changes", [
    {}, {"num_iterations": 2}, {"quantize_for_rollouts": "true", "update_every": 2}, {"gradient_accumulation_steps": 2},
    {"fine_tune_type": "lora", "lora_rank": 4}, {"dynamic_sampling": "true"}], ids=str)
def test_many_kills_resume_to_the_same_bytes(tmp_path, changes):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, **changes).returncode == 0
    assert kill_until_done(broken, seed=len(str(changes)), kills=10, **changes) > 0
    names = ["adapters.safetensors" if "fine_tune_type" in changes else "model.safetensors", "optimizer.safetensors"]
    for name in names:
        assert (whole / "r/checkpoint-6" / name).read_bytes() == (broken / "r/checkpoint-6" / name).read_bytes()
    assert [numbers(m) for m in read_metrics(whole / "r")] == [numbers(m) for m in read_metrics(broken / "r")]


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
    assert final_bytes(tmp_path)[0] == unbroken[0] and final_bytes(tmp_path)[1] == unbroken[1]


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
