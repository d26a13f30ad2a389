"""Faults as they happen, against the real command: kills in every phase, damaged files, full disks, closed directories,
memory that runs out. `make test` runs a short form of each, `make soak` the long one with a table of what was tried."""

import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from fault_tools import (COMMAND, DEMO, SMALL, cut, every_checkpoint_is_whole, flip, kill_and_resume, left_by, may_mount,
                         on_a_disk, options, run, truncations)
from mlx_grpo import check_manifest, main, newest_valid, read_metrics
from mlx_grpo.run_state import read_state
from tiny_models import QUICK, sets, tiny_qwen2

VARIANTS = [{"num_iterations": 2}, {"quantize_for_rollouts": "true", "update_every": 2}, {"gradient_accumulation_steps": 2},
            {"fine_tune_type": "lora", "lora_rank": 4}, {"dynamic_sampling": "true"}, {"save_in_background": "true"},
            {"minibatches": 2, "kl_coeff": 0.05, "ref_sync_steps": 2}]


# ---- SIGKILL

def check_kills(tmp_path, record_property, fault, **kwargs):
    whole = tmp_path / "whole"
    changes = {name: value for name, value in kwargs.items() if name not in ("seed", "kills", "must")}
    assert run(whole, timeout=1200, **changes).returncode == 0
    deaths, runs = kill_and_resume(tmp_path / "broken", **kwargs)
    expected = left_by(whole / "r")
    for run_dir in runs:
        assert left_by(run_dir) == expected
        assert every_checkpoint_is_whole(run_dir) and not list(run_dir.glob(".checkpoint-*"))
        assert [m["step"] for m in read_metrics(run_dir)] == sorted({m["step"] for m in read_metrics(run_dir)})
    said = "".join(file.read_text() for file in (tmp_path / "broken").glob("*.err"))
    assert "Traceback" not in said and "from now on" not in said
    record_property("fault", [fault, deaths.total(), ", ".join(f"{phase} {n}" for phase, n in sorted(deaths.items()))])


def test_a_run_killed_in_any_phase_resumes_to_the_same_bytes(tmp_path, record_property):
    check_kills(tmp_path, record_property, "SIGKILL, small run", seed=0, kills=5)


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_the_demo_killed_fifty_times_ends_in_the_same_bytes(tmp_path, record_property):
    check_kills(tmp_path, record_property, "SIGKILL, the demo", seed=1, kills=50, must=5, sizes=DEMO)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: ", ".join(c))
def test_runs_of_other_kinds_killed_in_every_phase_end_in_the_same_bytes(tmp_path, record_property, changes):
    check_kills(tmp_path, record_property, f"SIGKILL, {', '.join(f'{k} = {v}' for k, v in changes.items())}",
                seed=2, kills=10, must=1, **changes)


# ---- damaged checkpoints

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(command, run directory) of three steps of a tiny model; checkpoint-3 holds every kind of file there is: a rollout
    batch that isn't used up and a model_old that is older than the model."""
    place = tmp_path_factory.mktemp("finished")
    model = tiny_qwen2(place / "model")
    command = sets(**QUICK | dict(model_name=model, num_iterations=2, update_every=2, max_steps=3, save_steps=1,
                                  eval_samples=0, output_dir=str(place / "out"), run_name="r"))
    assert main(command) == 0
    return command, place / "out/r"


def resume_a_damaged_copy(finished, place, damage, capsys):
    """Damage checkpoint-3 of a copy of the run, resume it, and check that checkpoint-2 was used and nothing is lost."""
    command, whole = finished
    shutil.copytree(whole, place / "r", symlinks=True)
    damage(place / "r/checkpoint-3")
    assert check_manifest(place / "r/checkpoint-3")
    assert newest_valid(place / "r")[0].name == "checkpoint-2"
    capsys.readouterr()
    assert main([*command, "--set", f"output_dir={place}", "--resume"]) == 0
    output = capsys.readouterr()
    assert "skipped checkpoint-3: " in output.err and "resuming from" in output.out and "checkpoint-2\n" in output.out
    assert left_by(place / "r") == left_by(whole)
    assert (place / "r/checkpoint-3.damaged-1").is_dir() and every_checkpoint_is_whole(place / "r")
    shutil.rmtree(place)


def files_of(finished):
    return sorted(path for path in (finished[1] / "checkpoint-3").iterdir() if path.is_file())


def test_every_file_cut_short_in_every_way_is_noticed(tmp_path, finished, record_property):
    names, tried = {path.name for path in files_of(finished)}, 0
    assert names > {"model.safetensors", "optimizer.safetensors", "old_policy.safetensors", "rollouts.safetensors",
                    "trainer_state.json", "manifest.json", "config.json", "tokenizer.json"}
    shutil.copytree(finished[1], tmp_path / "r", symlinks=True)
    for path in files_of(finished):
        for what, length in truncations(path).items():
            cut(tmp_path / "r/checkpoint-3" / path.name, length)
            assert newest_valid(tmp_path / "r")[0].name == "checkpoint-2", f"{path.name} {what}"
            shutil.copy(path, tmp_path / "r/checkpoint-3")
            tried += 1
    assert newest_valid(tmp_path / "r")[0].name == "checkpoint-3" and tried > 100
    record_property("fault", ["a checkpoint's file gone or cut short: noticed", tried, f"{len(names)} files"])


def test_200_flipped_bytes_are_noticed(tmp_path, finished, record_property):
    rng, where = random.Random(0), set()
    shutil.copytree(finished[1] / "checkpoint-3", tmp_path / "checkpoint-3")
    for _ in range(200):
        where.add(flip(tmp_path / "checkpoint-3", rng))
        assert newest_valid(tmp_path) == (None, [f"checkpoint-3: {check_manifest(tmp_path / 'checkpoint-3')}"]), where
        shutil.copytree(finished[1] / "checkpoint-3", tmp_path / "checkpoint-3", dirs_exist_ok=True)
    assert not check_manifest(tmp_path / "checkpoint-3")
    record_property("fault", ["a checkpoint's byte flipped: noticed", 200, f"{len(where)} places"])


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(tmp_path, finished, capsys):
    rng, paths = random.Random(1), files_of(finished)
    for n in range(3):
        path = rng.choice(paths)
        length = rng.choice(list(truncations(path).values()))
        resume_a_damaged_copy(finished, tmp_path / f"{n}", lambda checkpoint: cut(checkpoint / path.name, length), capsys)
        resume_a_damaged_copy(finished, tmp_path / f"flip{n}", lambda checkpoint: flip(checkpoint, rng), capsys)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_truncation_and_200_flips_resumed_end_to_end(tmp_path, finished, capsys, record_property):
    rng, cuts = random.Random(2), [(p, length) for p in files_of(finished) for length in truncations(p).values()]
    for n, (path, length) in enumerate(cuts):
        resume_a_damaged_copy(finished, tmp_path / f"cut{n}", lambda checkpoint: cut(checkpoint / path.name, length), capsys)
    for n in range(200):
        resume_a_damaged_copy(finished, tmp_path / f"flip{n}", lambda checkpoint: flip(checkpoint, rng), capsys)
    files = f"{len(files_of(finished))} files"
    record_property("fault", ["a checkpoint's file gone or cut short: resumed", len(cuts), files])
    record_property("fault", ["a checkpoint's byte flipped: resumed", 200, "seeded places"])


# ---- disks and directories

needs_mounts = pytest.mark.skipif(not may_mount(), reason="no mounts in a user namespace here; RLIMIT_FSIZE stands in below")


def one_line_of(errors):
    """The only line of standard error, but for warnings about the run's health."""
    told = [line for line in errors.splitlines() if ": warning: " not in line]
    assert len(told) == 1, errors
    return told[0]


def real_command(finished, output):
    return [sys.executable, str(ROOT / "mlx_grpo.py"), *finished[0], "--set", f"output_dir={output}"]


def check_small_disk(place, finished, kilobytes):
    """A run on a disk that fills up: one line, whole checkpoints, and the same run after room was made; returns the line."""
    argv = real_command(finished, place)
    (code, errors, files), (code_again, errors_again, after) = on_a_disk(
        place, f"{kilobytes}k", argv, f"mount -o remount,size=200m {place}", [*argv, "--resume"])
    assert code in (0, 2) and not newest_valid(files / "r")[1]
    line = one_line_of(errors) if code else ""
    assert not code or any(sign in line for sign in ("No space left", "was cut short", " free")), errors
    assert code_again == 0 and left_by(after / "r") == left_by(finished[1]), errors_again
    shutil.rmtree(files)
    shutil.rmtree(after)
    return line


@needs_mounts
def test_a_full_disk_stops_the_run_with_one_line_and_no_broken_checkpoint(tmp_path, finished):
    assert "can't save" in (line := check_small_disk(tmp_path / "a", finished, 1000)) and "No space left" in line


@needs_mounts
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_disks_that_fill_up_at_any_place(tmp_path, finished, record_property):
    stops = [line for size in range(8, 1800, 60) if (line := check_small_disk(tmp_path / f"{size}", finished, size))]
    where = Counter(re.search(r"a checkpoint needs|can't (?:save|write)(?: in)? \S+(?=: )", line)[0] for line in stops)
    assert len(stops) >= 15
    kinds = ", ".join(f"{re.sub('/.*/', '', what)} {n}" for what, n in sorted(where.items()))
    record_property("fault", ["disk full (tmpfs)", len(stops), kinds])


def test_a_limit_on_file_size_stops_the_run_with_one_line(tmp_path, finished):
    """A full disk where mounts are forbidden: writes beyond 150 kB of a file fail."""
    done = subprocess.run(real_command(finished, tmp_path), capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    assert done.returncode == 2 and "can't save" in one_line_of(done.stderr)
    assert newest_valid(tmp_path / "r") == (None, []) and not list((tmp_path / "r").glob("*checkpoint-*"))
    assert subprocess.run([*real_command(finished, tmp_path), "--resume"]).returncode == 0
    assert left_by(tmp_path / "r") == left_by(finished[1])


@needs_mounts
def test_a_disk_that_turns_read_only_stops_the_run_with_one_line(tmp_path):
    """The run directory is bound over itself read-only, as Linux leaves a disk after errors."""
    place = tmp_path / "disk"
    argv = [*COMMAND, *options(place, eval_samples=0, max_steps=500)]
    again = [*COMMAND, *options(place, eval_samples=0), "--resume"]
    (code, errors, files), (code_again, errors_again, after) = on_a_disk(
        place, "200m", argv, f"umount {place}/r", again,
        meanwhile=f"mount --bind {place}/r {place}/r; "
                  f"for _ in $(seq 200); do mount -o remount,bind,ro {place}/r 2>/dev/null && break; sleep 0.05; done")
    assert code == 2 and "Read-only file system" in one_line_of(errors), errors
    assert newest_valid(files / "r")[0] and not newest_valid(files / "r")[1]
    assert code_again == 0 and every_checkpoint_is_whole(after / "r"), errors_again


def bound_by_modes():
    """What to put before a command so that directory modes bind it, or None: root needs a namespace for that."""
    if os.geteuid():
        return []
    works = shutil.which("unshare") and subprocess.run(["unshare", "-U", "true"], capture_output=True).returncode == 0
    return ["unshare", "-U"] if works else None


@pytest.mark.skipif(bound_by_modes() is None, reason="root is not bound by directory modes, and may make no namespace here")
def test_a_directory_that_turns_read_only_stops_the_run_with_one_line(tmp_path):
    argv = [*bound_by_modes(), *COMMAND]
    process = subprocess.Popen([*argv, *options(tmp_path, eval_samples=0, max_steps=500)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            (tmp_path / "r").chmod(0o555)
            break
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "Permission denied" in one_line_of(errors)
    closed = subprocess.run([*argv, *options(tmp_path, eval_samples=0), "--resume"], capture_output=True, text=True)
    (tmp_path / "r").chmod(0o755)
    assert closed.returncode == 2 and "Permission denied" in one_line_of(closed.stderr)
    assert every_checkpoint_is_whole(tmp_path / "r")
    again = run(tmp_path, "--resume", eval_samples=0)
    assert again.returncode == 0 and every_checkpoint_is_whole(tmp_path / "r"), again.stderr


@pytest.mark.parametrize("vanish", [lambda path: path.rename(path.with_name("moved")), shutil.rmtree], ids=["moved", "gone"])
def test_the_command_stops_with_one_line_where_its_directory_vanishes(tmp_path, vanish):
    command = [*COMMAND, *options(tmp_path, eval_samples=0, max_steps=500, save_steps=0)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            vanish(tmp_path / "r")
            break
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "vanished" in one_line_of(errors) and not (tmp_path / "r").exists()


# ---- memory

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS doesn't bind on macOS")
HUNGRY = dict(SMALL, batch_size=32, num_generations=16, max_steps=1, eval_samples=0)       # 512 rows of 48 tokens at once
HUNGRIER = dict(HUNGRY, batch_size=64, num_generations=32, max_steps=2)


def with_memory(limit, output, sizes, *more):
    """The real command with so many MiB of address space."""
    return subprocess.run([*COMMAND, *options(output, sizes), *more], capture_output=True, text=True, timeout=1100,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit << 20, limit << 20)))


@only_linux
def test_a_run_that_died_of_memory_goes_on_in_smaller_parts(tmp_path):
    died = with_memory(1_200, tmp_path, HUNGRY)
    assert died.returncode < 0 and read_state(tmp_path / "r")["ended"] is None
    assert newest_valid(tmp_path / "r") == (None, [])
    done = run(tmp_path, "--resume", sizes=HUNGRY)
    assert done.returncode == 0, done.stderr
    assert re.search("died in phase '(rollout|update)' of step 1: .* from now on", done.stderr), done.stderr
    assert read_state(tmp_path / "r")["limits"] and every_checkpoint_is_whole(tmp_path / "r")


@only_linux
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_out_of_memory_is_survived_in_smaller_parts_that_compute_the_same(tmp_path, record_property):
    rich, poor = tmp_path / "rich", tmp_path / "poor"
    assert run(rich, timeout=1100, sizes=HUNGRIER).returncode == 0
    done = with_memory(1_400, poor, HUNGRIER, "--supervise")
    assert done.returncode == 0, done.stderr
    assert "the run died" in done.stderr and "max_tokens_per_microbatch is" in done.stderr
    limits = read_state(poor / "r")["limits"]
    a, b = (mx.load(str(place / "r/checkpoint-2/model.safetensors")) for place in (rich, poor))
    assert max(np.abs(np.array(a[k]) - np.array(b[k])).max() for k in a) < 1e-5        # sums of float32 in another order
    assert (rich / "r/completions.jsonl").read_text() == (poor / "r/completions.jsonl").read_text()
    record_property("fault", ["out of memory (RLIMIT_AS), supervised", done.stderr.count("the run died"),
                              ", ".join(f"{name} down to {value}" for name, value in limits.items())])


# ---- the table

def test_the_table_of_faults_names_tests_that_exist_and_all_of_this_file():
    table = re.findall(r"^\|.*\|$", (ROOT / "docs/reliability.md").read_text(), re.M)
    named = {tuple(name.split("::")) if "::" in name else ("test_faults.py", name)
             for row in table for name in re.findall(r"`((?:\w+\.py::)?test_\w+)`", row)}
    tests = {name: re.findall(r"^def (test_\w+)", (ROOT / "tests" / name).read_text(), re.M) for name, _ in named}
    assert [(file, test) for file, test in named if test not in tests[file]] == []
    assert {("test_faults.py", test) for test in tests["test_faults.py"][:-1]} <= named and len(table) > 15
