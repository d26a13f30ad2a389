"""Several processes train as one: over loopback, against a single process."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import processes
import pytest
from conftest import ROOT
from mlx_grpo import UserError, find_world, launched, main, newest_valid, read_metrics
from mlx_grpo.distributed import World
from processes import CASES, finish, run_case, start
from test_trainer import numbers

COMMAND = [sys.executable, str(ROOT / "mlx_grpo.py"), "--config", str(ROOT / "configs/demo.toml")]
OPTIONS = dict(run_name="r", batch_size=2, num_generations=4, max_train_samples=64, max_steps=2, save_steps=1, eval_samples=3,
               eval_steps=2)


def rows(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def assert_same_run(a, b):
    """Equal logs, numbers within 1e-5 of each other (relative 1e-4), and equal keys."""
    for name in ("metrics.jsonl", "completions.jsonl", "eval_completions.jsonl"):
        if not (a / name).exists() and not (b / name).exists():
            continue
        x, y = rows(a / name), rows(b / name)
        assert len(x) == len(y) > 0, name
        for one, other in zip(x, y):
            assert one.keys() == other.keys()
            for key in numbers(one):
                if isinstance(one[key], (int, float)) or key == "token_logprobs":       # these are rounded to 4 digits
                    near = 1e-4 if key == "token_logprobs" else 1e-5
                    assert other[key] == pytest.approx(one[key], rel=1e-4, abs=near), (name, key)
                else:
                    assert other[key] == one[key], (name, key)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(a directory with each case trained by one process, one with each case trained by two)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    running = start([sys.executable, processes.__file__, str(two), *CASES], two)
    for name in CASES:
        run_case(name, one)
    for code, _, errors in finish(running):
        assert code == 0, errors
    return one, two


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_updates_of_one(name, both):
    one, two = (folder / name for folder in both)
    start_of = mx.load(str(ROOT / "data/demo_model/model.safetensors"))
    expected, first, second = map(np.load, (one / "weights-0.npz", two / "weights-0.npz", two / "weights-1.npz"))
    for key in expected:
        assert np.array_equal(first[key], second[key]), f"the two processes differ in {key}"
        assert np.abs(first[key] - expected[key]).max() < 1e-5, key
    if CASES[name].get("fine_tune_type") != "lora":
        assert max(np.abs(expected[k] - np.array(start_of[k])).max() for k in expected) > 1e-4, "nothing was trained"
    assert_same_run(one, two)


def test_errors_in_any_process_are_counted_once(both):
    counts = [m.get("reward_errors") for m in rows(both[1] / "errors/metrics.jsonl") if m["step"]]
    assert counts[0] and counts == sorted(counts)


def command(output, *more, **changes):
    options = {"output_dir": output, **OPTIONS} | changes
    return [*COMMAND, *sum((["--set", f"{k}={v}"] for k, v in options.items()), []), *more]


@pytest.mark.soak
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """1 process, then 2, then 1, against 3 steps by one; in the middle of a rollout batch that serves two steps. The second
    process works in a directory from which it doesn't see the checkpoint."""
    (tmp_path / "elsewhere").mkdir()
    changes = dict(num_iterations=2, max_steps=3, eval_samples=0)
    alone = lambda *args, **changes: subprocess.run(command(*args, **changes), cwd=tmp_path, capture_output=True).returncode
    assert alone("whole", **changes) == alone("parts", **changes | {"max_steps": 1}) == 0
    resumed = command("parts", "--resume", **changes | {"max_steps": 2})
    found = finish(start(resumed, tmp_path, [tmp_path, tmp_path / "elsewhere"]))
    assert [code for code, *_ in found] == [0, 0], found
    assert "2 processes" in found[0][1] and not found[1][1], "one process talks"
    assert alone("parts", "--resume", **changes) == 0 and not list((tmp_path / "elsewhere").iterdir())
    whole, parts = (tmp_path / name / "r" for name in ("whole", "parts"))
    a, b = (mx.load(str(path / "checkpoint-3/model.safetensors")) for path in (whole, parts))
    assert max(mx.abs(a[k] - b[k]).max().item() for k in a) < 1e-5
    assert [m["step"] for m in read_metrics(parts)] == [1, 2, 3]
    assert [r["completion"] for r in rows(parts / "completions.jsonl")] == [r["completion"] for r in rows(whole / "completions.jsonl")]


def test_the_launcher_of_mlx_starts_a_run_in_which_one_process_writes(tmp_path):
    launcher = Path(sys.executable).with_name("mlx.launch")
    with socket.create_server(("127.0.0.1", 0)) as free:          # it takes two in a row: the neighbour is likely free
        port = free.getsockname()[1]
    found = subprocess.run([launcher, "-n", "2", "-p", str(port), "--", *command(tmp_path)], capture_output=True, text=True,
                           timeout=240, stdin=subprocess.DEVNULL)
    assert found.stdout.count("step 2/2") == 1 and "2 processes" in found.stdout, found
    assert newest_valid(tmp_path / "r")[0].name == "checkpoint-2"


def fails(tmp_path, how, rank, **changes):
    callback = f'["{Path(processes.__file__)}:Fails"]'
    run = command(tmp_path, callbacks=callback, max_steps=4, eval_samples=0, **changes)
    return start(run, tmp_path, MLX_GRPO_TEST=f"{how} {rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all(rank, tmp_path):
    found = finish(fails(tmp_path, "raise", rank))
    assert found[rank][0] == 1 and "ZeroDivisionError: a callback's own" in found[rank][2]
    code, _, errors = found[1 - rank]
    assert code == 2 and f"error: process {rank} failed: ZeroDivisionError: a callback's own" in errors


@pytest.mark.soak
def test_a_process_that_dies_without_a_word_ends_all_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    found = finish(fails(tmp_path, "kill", 1, save_steps=1))
    assert found[1][0] == -signal.SIGKILL
    assert found[0][0] == 1 and "error: process 1 has died" in found[0][2]
    assert find_run(tmp_path, "--resume", max_steps=2).returncode == 0


def find_run(tmp_path, *more, **changes):
    return subprocess.run(command(tmp_path, *more, eval_samples=0, **changes), capture_output=True, text=True)


@pytest.mark.parametrize("how, code", [("term", 143), ("stop", 0)])
def test_a_signal_or_a_callback_of_one_process_stops_all_after_the_same_step(how, code, tmp_path):
    found = finish(fails(tmp_path, how, 1))
    assert [code for code, *_ in found] == [code, code], found
    path, skipped = newest_valid(tmp_path / "r")
    assert path.name in ("checkpoint-1", "checkpoint-2") and not skipped
    assert len(read_metrics(tmp_path / "r")) == int(path.name[-1])


@pytest.mark.parametrize("more, changes, words", [
    (["--supervise"], {}, "--supervise starts one process, and a launcher started 2"),
    (["--watch", "rows.jsonl"], {"lr_scheduler_type": "constant"}, "watch reads rows as they arrive"),
    ([], {"batch_size": 1}, "is 1 prompts, fewer than the 2 processes"),
    (["--resume", "nowhere"], {}, "no checkpoint in nowhere")])
def test_what_several_processes_can_not_do_is_refused_by_name(more, changes, words, tmp_path):
    found = finish(start(command(tmp_path / "out", *more, **changes), tmp_path))
    assert [code for code, *_ in found] == [2, 2] and all(words in errors for _, _, errors in found), found
    assert not (tmp_path / "out").exists()


def test_other_commands_run_in_one_process(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    with pytest.raises(UserError, match="eval runs in one process"):
        main(["eval", "--config", str(ROOT / "configs/demo.toml")])


@pytest.mark.parametrize("env, count", [
    ({}, 0), ({"MLX_WORLD_SIZE": "3"}, 3), ({"OMPI_COMM_WORLD_SIZE": "4"}, 4), ({"PMI_SIZE": "2"}, 2)])
def test_the_number_of_processes_is_the_launcher_s(env, count, monkeypatch):
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launched() == count


def test_one_process_communicates_nothing(monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", None)
    for name in ("all_gather", "all_sum"):
        monkeypatch.setattr(mx.distributed, name, None)
    world = World()
    with world:
        assert world.first and world.gather(1) == [1] and world.share([1, 2, 3]) == ([1, 2, 3], 0) and world.rows(4) is None
        assert world.sum(tree := {"a": mx.ones(2)}) is tree
    assert find_world().size == 1
