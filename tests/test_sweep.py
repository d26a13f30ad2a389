"""Sweeps: which combinations a file names, runs in processes of their own that may crash or be interrupted, one table."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from report_fixtures import make_run
from test_trainer import numbers
from tiny_models import EVEN_SHARE, QUICK, sets, tiny_qwen2

from mlx_grpo import ConfigError, UserError, load_config, main, read_metrics
from mlx_grpo.sweep import last_words, set_arguments
from mlx_grpo.sweep_results import ranked, table, write_results
from mlx_grpo.sweep_space import Space, combinations, read_space


def space_of(tmp_path, text):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    return read_space(file)


# ---- which runs

def test_a_grid_is_every_combination_with_ranges_that_include_both_ends(tmp_path):
    space = space_of(tmp_path, """[values]
        kl_coeff = [0.0, 0.04]
        lora_rank = { range = [4, 12, 4] }
        temperature = { range = [0.7, 0.9, 0.1] }""")
    runs = combinations(space)
    assert len(runs) == 2 * 3 * 3 and runs[0] == {"kl_coeff": 0.0, "lora_rank": 4, "temperature": 0.7}
    assert [r["temperature"] for r in runs[:3]] == [0.7, 0.8, 0.9] and {r["lora_rank"] for r in runs} == {4, 8, 12}


def test_points_of_a_grid_are_even_on_their_scale(tmp_path):
    space = space_of(tmp_path, """[values]
        learning_rate = { log_uniform = [1e-6, 1e-4], points = 3 }
        num_generations = { uniform = [2, 8], points = 4 }""")
    assert space.values == {"learning_rate": [1e-6, 1e-5, 1e-4], "num_generations": [2, 4, 6, 8]}


RANDOM = """method = "random"
runs = {runs}
seed = {seed}
[values]
learning_rate = {{ log_uniform = [1e-6, 1e-2] }}
num_generations = {{ uniform = [2, 64] }}
{more}"""


def test_random_draws_are_inside_their_ranges_and_even_on_their_scale(tmp_path):
    runs = combinations(space_of(tmp_path, RANDOM.format(runs=400, seed=0, more="kl_coeff = [0.0, 0.1]")))
    rates = [r["learning_rate"] for r in runs]
    assert len(runs) == 400 and all(1e-6 <= x <= 1e-2 for x in rates)
    assert all(type(r["num_generations"]) is int and 2 <= r["num_generations"] <= 64 for r in runs)
    assert 0.4 < sum(x < 1e-4 for x in rates) / 400 < 0.6 and 0.4 < sum(r["kl_coeff"] == 0 for r in runs) / 400 < 0.6


def test_more_runs_or_another_option_leave_the_draws_as_they_were(tmp_path):
    few, many, beside, other = (combinations(space_of(tmp_path, RANDOM.format(runs=runs, seed=seed, more=more)))
                                for runs, seed, more in ((5, 0, ""), (9, 0, ""), (5, 0, "top_p = [0.9, 1.0]"), (5, 1, "")))
    assert many[:5] == few and [{k: r[k] for k in few[0]} for r in beside] == few and other != few


def test_a_random_search_never_runs_the_same_values_twice(tmp_path):
    text = 'method = "random"\nruns = 50\n[values]\nkl_coeff = [0.0, 0.1]\nupdate_every = [1, 2]\n'
    assert len(combinations(space_of(tmp_path, text))) == 4


@pytest.mark.parametrize("text, reason", [
    ("[values]\nlearning_rat = [1]", "did you mean 'learning_rate'"),
    ("[values]\nlearning_rate = [-1.0]", "at least 0"),
    ("[values]\nnum_generations = [4, 1]", "at least 2"),
    ("[values]\nlearning_rate = 1e-5", "list of choices"),
    ("[values]\nlearning_rate = { log_uniform = [0, 1] }", "low above 0"),
    ("[values]\nlearning_rate = { uniform = [1e-5, 1e-4] }", "points = how many"),
    ("[values]\nloss_type = { uniform = [1, 2], points = 2 }", "list choices"),
    ("[values]\nkl_coeff = { range = [0, 1, 0] }", "step above 0"),
    ("[values]\nkl_coeff = { range = [0, 1, 1e-9] }", "more than"),
    ("[values]\nrun_name = ['a', 'b']", "has one of its own"),
    ("[values]\nkl_coeff = []", "no choices"),
    ("learning_rate = [1e-5]", r"belong in the table \[values\]"),
    ("method = 'gird'\n[values]\nkl_coeff = [0.0]", "did you mean 'grid'"),
    ("method = 'random'\n[values]\nkl_coeff = [0.0]", "needs runs"),
    ("runs = 3\n[values]\nkl_coeff = [0.0]", "runs belongs to method random"),
    ("[values", "not TOML"), ("", "names no option"),
])
def test_a_faulty_sweep_file_is_refused_in_one_line_that_names_it(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        space_of(tmp_path, text)
    assert "sweep.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_every_kind_of_value_reaches_the_run_as_it_was(monkeypatch):
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)
    values = {"learning_rate": 1e-05, "stop": ["a\"b", "\u00fc\U0001f600\n"], "system_prompt": " \"quoted\" = \u00fc\n",
              "rollout_precision": {"model.layers.0": 0, "lm_head": 8}, "use_compile": False,
              "quantize_for_rollouts": "auto",
              "rollout_bits": [4, 8, 0], "max_train_samples": 3, "run_name": "12"}
    config, _ = load_config(None, set_arguments(values)[1::2])
    assert {name: vars(config)[name] for name in values} == values


# ---- the table

def test_runs_are_ranked_by_the_metric_and_failed_ones_come_last(tmp_path):
    make_run(tmp_path / "run-001", steps=10, seed=1)
    make_run(tmp_path / "run-002", steps=10, seed=2, start=0.4)
    run = lambda n, **more: {"name": f"run-00{n}", "values": {"kl_coeff": n / 10}, "status": "finished", "reason": None,
                             "seconds": 1.0} | more
    runs = [run(1), run(2), run(3, status="failed", reason="ended by | SIGKILL"), run(4, status="planned")]
    space = Space("grid", 0, 0, "reward_std", "min", "best", "train", {})
    rows = ranked(runs, space, tmp_path)
    assert [row["name"] for row in rows] == ["run-002", "run-001", "run-004", "run-003"]
    rewards = {row["step"]: row["reward_std"] for row in read_metrics(tmp_path / "run-002") if row["step"]}
    assert rows[0]["value"] == min(rewards.values()) == rewards[rows[0]["step"]]
    last = ranked(runs, Space("grid", 0, 0, "reward", "max", "last", "train", {}), tmp_path)[0]
    assert last["value"] == read_metrics(tmp_path / last["name"])[-1]["reward"] and last["steps"] == 10
    text = table(rows, space)
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines()}) == 1
    assert r"failed: ended by \| SIGKILL" in text
    assert text in write_results(runs, space, tmp_path)[0]
    svg = (tmp_path / "curves.svg").read_text()
    assert "run-001 kl_coeff = 0.1" in svg and "run-002" in svg and (tmp_path / "report.html").stat().st_size > 10_000
    assert [row["name"] for row in json.loads((tmp_path / "results.json").read_text())["runs"]] == [r["name"] for r in rows]


def test_the_reason_of_a_failure_is_the_line_that_says_it(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1/2\nerror: no such thing; mend it\n")
    assert last_words(log, 2) == "no such thing; mend it"
    log.write_text("Traceback ...\n  File x\nKeyError: 'mine'\n\n")
    assert last_words(log, 1) == "KeyError: 'mine'" and "SIGKILL" in last_words(log, -9)
    log.write_text("")
    assert last_words(log, 1) == "exit code 1"


# ---- runs

DIES = """
import os, pathlib, signal, time
def dies(completions, **_):
    if not pathlib.Path("mended").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(completions)
def slow(completions, trainer_state, **_):
    pathlib.Path("began").touch()
    while trainer_state.global_step == 1 and not pathlib.Path("go").exists():
        time.sleep(0.05)
    return [0.0] * len(completions)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(options of a base configuration, directory): the working directory, with a tiny model and rewards that misbehave."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)
    (tmp_path / "bad.py").write_text(DIES)
    model = tiny_qwen2(tmp_path / "tiny")
    return sets(**QUICK | {"model_name": model, "output_dir": "out"})


def sweep(place, text, *more):
    with open("s.toml", "w") as file:
        file.write(text)
    return main(["sweep", *place, "--sweep", "s.toml", *more])


def state():
    with open("out/sweep-s/sweep.json") as file:
        return {run["name"]: run for run in json.load(file)["runs"]}


@pytest.mark.soak
def test_a_crash_doesnt_end_the_sweep_and_finished_runs_are_not_run_again(place, tmp_path, capsys):
    text = f'[values]\nrewards = [["correctness", "{EVEN_SHARE}"], ["bad.py:dies", "int"], ["int", "{EVEN_SHARE}"]]\n'
    assert sweep(place, text, "--max-runs", "2") == 1
    assert {n: r["status"] for n, r in state().items()} == {"run-001": "finished", "run-002": "failed", "run-003": "planned"}
    assert "SIGKILL" in state()["run-002"]["reason"]
    seen = (tmp_path / "out/sweep-s/run-001.log").read_bytes()
    (tmp_path / "mended").touch()
    capsys.readouterr()
    assert sweep(place, text, "--retry") == 0
    out = capsys.readouterr().out
    assert {r["status"] for r in state().values()} == {"finished"}
    assert (tmp_path / "out/sweep-s/run-001.log").read_bytes() == seen
    assert out.count("| run-00") == 3 and "eval/exact_match (last)" in out
    assert sweep(place, text) == 0 and "run-001 (" not in capsys.readouterr().out        # nothing is left to do
    with pytest.raises(UserError, match="learning_rate differ"):
        sweep([*place, "--set", "learning_rate=0.5"], text)


def test_values_that_contradict_each_other_are_shown_with_the_reason_and_start_no_process(place, tmp_path, capsys):
    text = "[values]\nmax_new_tokens = [6, 600]\n"
    assert sweep(place, text, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "run-002 failed" in out and "max_completion_length" in out and "1 of 2 runs to do" in out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="max_completion_length"):
        sweep(place, "[values]\nmax_new_tokens = [500, 600]\n", "--dry-run")


def wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_an_interrupted_run_is_saved_and_resumed_to_what_an_unbroken_one_gives(place, tmp_path):
    text = f'[values]\nrewards = [["bad.py:slow", "{EVEN_SHARE}"]]\nlearning_rate = [1e-3]\n'
    (tmp_path / "s.toml").write_text(text)
    command = [sys.executable, str(ROOT / "mlx_grpo.py"), "sweep", *place, "--set", "max_steps=3", "--sweep", "s.toml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(tmp_path / "began", process)
    while "step 1/" not in (tmp_path / "out/sweep-s/run-001.log").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and state()["run-001"]["status"] == "interrupted", out
    assert "the same command goes on" in out and not (tmp_path / "out/sweep-s/run-001/checkpoint-3").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert main(["train", *place, "--set", "max_steps=3", "--set", f'rewards=["bad.py:slow", "{EVEN_SHARE}"]',
                 "--set", "run_name=whole"]) == 0
    broken, whole = read_metrics("out/sweep-s/run-001"), read_metrics("out/whole")
    assert [numbers(m) for m in broken] == [numbers(m) for m in whole]


@pytest.mark.soak
def test_a_sweep_whose_parent_was_killed_is_refused_until_its_run_has_ended(place, tmp_path):
    (tmp_path / "s.toml").write_text('[values]\nrewards = [["bad.py:slow", "int"]]\n')
    command = [sys.executable, str(ROOT / "mlx_grpo.py"), "sweep", *place, "--sweep", "s.toml"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "began", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "is in use by process" in again.stderr and "--output" in again.stderr
    (tmp_path / "go").touch()
    for _ in range(1200):
        again = subprocess.run([*command, "--max-runs", "1"], capture_output=True, text=True)
        if again.returncode != 2:
            break
        time.sleep(0.5)
    assert again.returncode == 0 and state()["run-001"]["status"] == "finished", again.stderr


# ---- the guide

DOC = (ROOT / "docs" / "sharing.md").read_text()
COMMANDS = [line.partition(" #")[0] for block in re.findall(r"```sh\n(.*?)```", DOC, re.S) for line in block.splitlines()]


def test_the_commands_of_the_guide_run(tmp_path):
    """From a directory like a clone; the training runs are shortened."""
    for name in ("examples", "configs", "data", "utils", "mlx_grpo.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in [c for c in COMMANDS if " sweep " in c]:
        words = shlex.split(command) + ["--set", "max_steps=1", "--set", "eval_samples=4", "--set", "batch_size=2"]
        result = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert "run-004" in (tmp_path / "outputs/sweep-sweep/results.md").read_text()


def test_the_sweep_file_of_the_guide_is_understood(tmp_path):
    text = re.search(r"```toml\n(.*?)```", DOC, re.S)[1]
    assert len(combinations(space_of(tmp_path, text))) == 20


def test_the_guide_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("options:")[1].split("examples:")[0]))
    section = DOC.split("## Sweeps")[1].split("\n## ")[0]
    assert options - {"--help", "--config", "--set", "--output"} == set(re.findall(r"^\| `(--[a-z-]+)", section, re.M))
