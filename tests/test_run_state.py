"""What a run notes of itself, and what the next process makes of a death."""

import json
import os
from dataclasses import replace

import pytest
from mlx_grpo import UserError, main, memory_limit, pass_budget
from mlx_grpo import out_of_memory as oom
from mlx_grpo.run_state import RunState, machine, read_state
from test_trainer import CONFIG, make_trainer

RUN = replace(CONFIG, max_steps=2, save_steps=1, log_jsonl=True, eval_samples=4, eval_steps=1)
NOW = {"boot": "a", "oom_kills": 0}
UPDATE = {"phase": "update", "step": 5, "tokens": 4096, "least_tokens": 600, "rows": 16, "ended": None, "machine": NOW,
          "memory": 1, "memory_limit": 100, "limits": {}}


def leave(run_dir, record, crash=""):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run_state.json").write_text(json.dumps(record))
    (run_dir / "crash.txt").write_text(crash)


def test_every_phase_is_noted_with_its_step_and_sizes(tmp_path):
    trainer, seen = make_trainer(tmp_path, RUN), []
    write = trainer.phase.write
    trainer.phase.write = lambda: (write(), seen.append(read_state(tmp_path)))
    tmp_path.mkdir(exist_ok=True)
    with trainer.phase.kept_in(tmp_path, {}):
        trainer.train()
    assert [s["phase"] for s in seen if s["step"] == 2 and not s["ended"]] == [
        "step", "rollout", "rewards", "scoring", "update", "sync", "evaluate", "log", "save", "rename", "links"]
    of = {s["phase"]: s for s in seen if s["step"] == 2}
    assert of["rollout"]["rows"] == 16 and of["rollout"]["group"] == 4          # 4 prompts x 4, all decoded together
    assert of["update"]["rows"] == 8 and of["update"]["tokens"] == pass_budget(trainer.args) > of["update"]["least_tokens"]
    assert of["save"]["pid"] == os.getpid() and read_state(tmp_path)["ended"] == "done"


def test_a_note_is_one_write_of_a_fixed_size_over_the_last_one(tmp_path, monkeypatch):
    writes, pwrite = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: writes.append((len(data), offset)) or pwrite(file, data, offset))
    state = RunState()
    with state.kept_in(tmp_path, {}):
        state("rollout", step=3, rows=10**9)
        state("log")
    assert set(writes) == {(1024, 0)} and (tmp_path / "run_state.json").stat().st_size == 1024


@pytest.mark.parametrize("error, ended", [(RuntimeError("[malloc] Unable to allocate 64 bytes."), "out of memory"),
                                          (MemoryError(), "out of memory"), (KeyboardInterrupt(), "failed")])
def test_how_a_run_ended_is_noted(tmp_path, error, ended):
    state = RunState()
    with pytest.raises(UserError if ended == "out of memory" else KeyboardInterrupt, match="'update' of step 3|"):
        with state.kept_in(tmp_path, {}):
            state("update", step=3)
            raise error
    assert read_state(tmp_path)["ended"] == ended and oom.died(read_state(tmp_path)) == (ended == "out of memory")


@pytest.mark.parametrize("change, crash, deaths, told", [
    ({}, "", 1, None), ({}, "", 3, "3 times in a row"),
    ({}, "Fatal Python error: Segmentation fault", 1, "'Segmentation fault'"),
    ({"ended": "out of memory"}, "", 1, "an allocation failed"),
    ({"machine": {"boot": "a", "oom_kills": -1}}, "", 1, "Linux ended a process"),
    ({"machine": {"boot": "b", "oom_kills": -1}}, "", 3, None),                # the machine was switched off meanwhile
])
def test_what_speaks_for_memory_as_the_cause_of_a_death(change, crash, deaths, told):
    said = oom.evidence(UPDATE | change, crash, NOW, deaths)
    assert said is told is None or told in said


def test_where_linux_does_not_count_a_process_near_the_limit_is_taken_for_out_of_memory():
    record = UPDATE | {"memory": 95, "machine": NOW | {"oom_kills": None}}
    assert "of the" in oom.evidence(record, "", NOW | {"oom_kills": None}, 1)
    assert oom.evidence(record | {"memory": 50}, "", NOW | {"oom_kills": None}, 1) is None


def test_each_death_halves_again_down_to_one_row(tmp_path, capsys):
    record, seen = UPDATE | {"machine": machine()}, []
    for _ in range(5):
        leave(tmp_path, record, "Fatal Python error: Aborted\n")
        _, memory = oom.after_death(tmp_path, RUN)
        seen.append(memory["limits"]["max_tokens_per_microbatch"])
        record |= memory | {"tokens": seen[-1]}
    assert seen == [2048, 1024, 600, 600, 600]
    said = capsys.readouterr().err
    assert said.count("max_tokens_per_microbatch is 2048 from now on") == 1 and said.count("as small as it gets") == 2


def test_a_death_while_sampling_halves_the_rows_down_to_a_group_and_a_lower_setting_stays(tmp_path):
    record = UPDATE | {"phase": "rollout", "rows": 16, "group": 4, "machine": machine()}
    leave(tmp_path, record, "Fatal Python error: Aborted\n")
    config, memory = oom.after_death(tmp_path, RUN)
    assert config.rollout_batch_size == 8 and memory["limits"] == {"rollout_batch_size": 8}
    assert oom.after_death(tmp_path, replace(RUN, rollout_batch_size=4))[0].rollout_batch_size == 4
    leave(tmp_path, record | {"rows": 6}, "Fatal Python error: Aborted\n")
    assert oom.after_death(tmp_path, RUN)[0].rollout_batch_size == 4
    leave(tmp_path, record | {"phase": "save"}, "Fatal Python error: Aborted\n")
    assert oom.after_death(tmp_path, RUN)[0] == RUN


def test_a_death_that_nothing_explains_changes_nothing_until_its_third_time_in_one_place(tmp_path):
    record, changed = UPDATE | {"phase": "rollout", "group": 4, "machine": machine()}, []
    for _ in range(3):
        leave(tmp_path, record)
        config, memory = oom.after_death(tmp_path, RUN)
        changed.append(config != RUN)
        record |= memory
    assert changed == [False, False, True] and not memory["deaths"]


def test_a_run_that_ended_by_itself_and_one_without_a_note_change_nothing(tmp_path, capsys):
    assert oom.after_death(tmp_path, RUN) == (RUN, {})
    for ended in ("done", "failed", "stopped"):
        leave(tmp_path, UPDATE | {"ended": ended})
        assert oom.after_death(tmp_path, RUN)[0] == RUN
    (tmp_path / "run_state.json").write_bytes(b"\0" * 1024)
    assert oom.after_death(tmp_path, RUN) == (RUN, {})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("vanish", [lambda d: d.rename(d.with_name("moved")),
                                    lambda d: (d.rename(d.with_name("moved")), d.mkdir())], ids=["moved", "replaced"])
def test_a_run_directory_that_vanishes_stops_the_run_with_one_line_and_is_not_made_again(tmp_path, vanish):
    run_dir = tmp_path / "run"
    trainer = make_trainer(run_dir, RUN)
    run_dir.mkdir()
    with pytest.raises(UserError, match="run has vanished or was replaced while the run was going .step 2"):
        with trainer.phase.kept_in(run_dir, {}):
            trainer.step()
            vanish(run_dir)
            trainer.train()
    assert not run_dir.exists() or not any(run_dir.iterdir())


def test_limits_of_control_groups_are_found_in_both_versions_and_above(tmp_path):
    (tmp_path / "memory/outer/inner").mkdir(parents=True)
    (tmp_path / "memory/outer/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/outer/inner/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2/memory.max").write_text("500\n")
    table = tmp_path / "cgroup"
    table.write_text("9:memory:/outer/inner\n")
    assert memory_limit.cgroup_limit(table, tmp_path) == 1000
    table.write_text("0::/v2\n")
    assert memory_limit.cgroup_limit(table, tmp_path) == 500
    table.write_text("0::/v2/none\n2:cpu:/outer\n")
    assert memory_limit.cgroup_limit(table, tmp_path) == 500
    (tmp_path / "v2/memory.max").write_text("max\n")
    assert memory_limit.cgroup_limit(table, tmp_path) is None
    assert 0 < memory_limit.memory_limit_bytes() <= memory_limit.memory_limits()["physical memory"]


def test_the_command_keeps_the_note_and_a_finished_run_resumes_without_a_word(tmp_path, capsys):
    command = ["--config", "configs/demo.toml"] + sum((["--set", f"{k}={v}"] for k, v in {
        "output_dir": tmp_path, "run_name": "r", "max_steps": 1, "eval_samples": 0, "batch_size": 1, "num_generations": 2}.items()), [])
    assert main(command) == 0
    assert read_state(tmp_path / "r")["ended"] == "done"
    assert main([*command, "--resume"]) == 0
    assert "died" not in capsys.readouterr().err
