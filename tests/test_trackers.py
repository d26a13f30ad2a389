"""report_to: what TensorBoard, Trackio and Weights & Biases hold after a run, after one that was resumed and one that failed."""

import importlib.machinery
import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, require
from mlx_grpo import ConfigError, TrainerCallback, UserError, main, read_metrics
from mlx_grpo.trackers import COLUMNS, TRACKERS, find_trackers, markdown, table
from test_trainer import CONFIG, make_trainer

RUN = replace(CONFIG, log_jsonl=True, logging_steps=2, eval_samples=4, eval_steps=2, save_steps=2)


def numbers_of(run_dir):
    """{step: {key: number}} of metrics.jsonl."""
    return {m["step"]: {k: v for k, v in m.items() if k != "step" and isinstance(v, (int, float))} for m in read_metrics(run_dir)}


def resumed(run_dir, config):
    trainer = make_trainer(run_dir, config)
    trainer.load_checkpoint(run_dir / "checkpoint-2")
    trainer.train()
    return trainer


# ---- TensorBoard, read back by its own reader

def board(run_dir):
    """({step: {key: number}}, {(tag, step): text}) of a run's event files, each step once."""
    require("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    steps, texts = defaultdict(dict), {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in steps[event.step]
            steps[event.step][tag] = event.value
    for tag in events.Tags()["tensors"]:
        texts |= {(tag, event.step): event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}
    return dict(steps), texts


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    make_trainer(tmp_path, replace(RUN, report_to="tensorboard")).train()
    steps, texts = board(tmp_path)
    logged = numbers_of(tmp_path)
    assert list(logged) == [0, 1, 2, 3, 4] and steps.keys() == logged.keys()
    for step, numbers in logged.items():
        assert steps[step] == {k: pytest.approx(v, rel=1e-6, abs=1e-30) for k, v in numbers.items()}
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [step for tag, step in texts if tag == "completions"] == [2, 4]         # those that logging_steps prints
    for step in (2, 4):
        shown = texts["completions", step].split("\n")[2:]
        group = [row for row in rows if row["step"] == step][:RUN.num_generations]
        assert len(shown) == len(group) and all(f"| {row['reward']} | {row['advantage']} |" in line for row, line in zip(group, shown))
    assert "| learning\\_rate | 0.0001 |" in texts["config", 0]


def test_what_a_resumed_run_repeats_is_in_tensorboard_once(tmp_path):
    config = replace(RUN, report_to="tensorboard")
    make_trainer(tmp_path, config).train()
    (before,) = json.loads((tmp_path / "trackers.json").read_text()).values()
    resumed(tmp_path, replace(config, max_steps=5))
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"tensorboard": {"id": before["id"], "step": 5}}
    steps, texts = board(tmp_path)
    assert sorted(steps) == [0, 1, 2, 3, 4, 5] and ("config", 0) in texts


def test_a_tracker_that_joins_at_a_resume_gets_the_steps_before_it_too(tmp_path):
    make_trainer(tmp_path, RUN).train()
    resumed(tmp_path, replace(RUN, report_to="tensorboard"))
    steps, _ = board(tmp_path)
    assert sorted(steps) == [0, 1, 2, 3, 4] and steps[1]["reward"] == pytest.approx(read_metrics(tmp_path)[1]["reward"])


def test_a_run_from_the_start_is_a_new_one(tmp_path):
    config = replace(RUN, report_to="tensorboard", eval_samples=0)
    make_trainer(tmp_path, config).train()
    before = json.loads((tmp_path / "trackers.json").read_text())["tensorboard"]["id"]
    (tmp_path / "metrics.jsonl").unlink()
    make_trainer(tmp_path, replace(config, max_steps=1)).train()
    after = json.loads((tmp_path / "trackers.json").read_text())["tensorboard"]
    assert after["id"] != before and after["step"] == 1 and list(board(tmp_path)[0]) == [1]


# ---- Trackio and Weights & Biases, offline, in a process of their own: where they write is fixed when they are imported

RUNS = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import mlx_grpo
from test_trackers import Fails, RUN, make_trainer, resumed
config, run_dir = replace(RUN, report_to={name!r}, max_steps=3), Path({run_dir!r})
make_trainer(run_dir, config).train()
resumed(run_dir, replace(config, max_steps=4))
try:
    make_trainer(run_dir.with_name("failed"), config, callbacks=[Fails()]).train()
except ZeroDivisionError:
    print("failed as it should")
"""


class Fails(TrainerCallback):
    def on_step_end(self, trainer, metrics):
        if metrics["step"] == 2:
            raise ZeroDivisionError


def environment(tmp_path, **more):
    unwanted = ("WANDB_", "TRACKIO_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    return kept | {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)} | more


def run_with(name, tmp_path):
    """A run of 3 steps, resumed at 2 and ended at 4, and one that fails at step 2, reported to a tracker."""
    require(name)
    code = RUNS.format(tests=str(ROOT / "tests"), name=name, run_dir=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path,
                          env=environment(tmp_path, WANDB_MODE="offline", WANDB_SILENT="true"))
    assert done.returncode == 0 and "failed as it should" in done.stdout, done.stderr
    return done


def same_numbers(found, logged):
    """{step: metrics} holds every key of metrics.jsonl, and those values that a repeated step has again."""
    assert list(found) == list(logged)
    for step, numbers in logged.items():
        assert numbers.keys() <= found[step].keys()
        for key in numbers.keys() & {"reward", "loss", "kl", "eval/exact_match", "completions/mean_length"}:
            assert found[step][key] == numbers[key], (step, key)


def test_trackio_holds_a_resumed_run_as_one_with_each_step_once(tmp_path):
    run_with("trackio", tmp_path)
    reads = ("import json; from trackio.sqlite_storage import SQLiteStorage as S; p = 'mlx-grpo'; "
             "print(json.dumps({run: [S.get_logs(p, run), S.get_run_config(p, run)] for run in S.get_runs(p)}))")
    out = subprocess.run([sys.executable, "-c", reads], capture_output=True, text=True, timeout=60, check=True,
                         env=environment(tmp_path)).stdout
    runs = json.loads(out.splitlines()[-1])
    assert sorted(name.rpartition("-")[0] for name in runs) == ["failed", "run"]
    logs, config = next(found for name, found in runs.items() if name.startswith("run-"))
    steps = [log["step"] for log in logs]
    assert steps == [0, 1, 2, 3, 4] and config["learning_rate"] == RUN.learning_rate
    same_numbers(dict(zip(steps, logs)), numbers_of(tmp_path / "run"))
    rows = logs[2]["completions"]["_value"]
    assert list(rows[0]) == COLUMNS and len(rows) == RUN.num_generations and "completions" not in logs[1]


def wandb_records(file):
    """The protobuf records of a .wandb file: a header of 7 bytes, then LevelDB's log of 32 KiB blocks, whose records begin
    with checksum (4 bytes), length (2) and kind (1: whole, 2 to 4: first, middle, last part)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = Path(file).read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4:at + 7])
        parts += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_wandb_holds_a_resumed_run_under_one_id_with_each_step_once(tmp_path):
    run_with("wandb", tmp_path)
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.parent.name)
    records = [record for file in files for record in wandb_records(file)]
    assert len(files) == 2 and len({r.run.run_id for r in records if r.HasField("run")}) == 1
    assert {r.run.project for r in records if r.HasField("run")} == {"mlx-grpo"}
    rows = [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records if r.HasField("history")]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    same_numbers({row["_step"]: row for row in rows}, numbers_of(tmp_path / "run"))
    assert [row["_step"] for row in rows if any(key.startswith("completions.") or key == "completions" for key in row)] == [2, 3, 4]
    for media in files[0].parent.glob("files/media/table/*.json"):       # of steps 2 and 3, the last one of its process
        kept = json.loads(media.read_text())
        assert kept["columns"] == COLUMNS and len(kept["data"]) == RUN.num_generations and kept["data"][0][0] in (2, 3)
    codes = lambda folder: [r.exit.exit_code for file in (tmp_path / folder / "wandb").glob("offline-run-*/*.wandb")
                            for r in wandb_records(file) if r.HasField("exit")]
    assert codes("run") == [0, 0] and codes("failed") == [1]


def test_wandb_without_a_login_is_one_line_before_the_first_step(tmp_path):
    require("wandb")
    sets = {"output_dir": tmp_path, "run_name": "r", "max_steps": 1, "eval_samples": 0, "report_to": "wandb"}
    done = subprocess.run([sys.executable, str(ROOT / "mlx_grpo.py"), "--config", str(ROOT / "configs/demo.toml"),
                           *(word for k, v in sets.items() for word in ("--set", f"{k}={v}"))], capture_output=True, text=True,
                          timeout=120, stdin=subprocess.DEVNULL, env=environment(tmp_path, WANDB_INIT_TIMEOUT="10"))
    assert done.returncode == 2 and "error: wandb: " in done.stderr and "WANDB_MODE=offline" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "r/metrics.jsonl").exists()


DOC = (ROOT / "docs/trackers.md").read_text()


@pytest.mark.parametrize("line", [line for line in DOC.partition("```sh\n")[2].partition("```")[0].splitlines()])
def test_the_commands_of_the_guide_run(line, tmp_path):
    sets = {"output_dir": tmp_path, "run_name": "r", "max_steps": 1, "eval_samples": 0, "num_generations": 2}
    line = line.replace("python ", f"{sys.executable} ", 1) + "".join(f" --set {k}={v}" for k, v in sets.items())
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, cwd=ROOT,
                          env=environment(tmp_path, WANDB_SILENT="true"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r/trackers.json").read_text()).keys() == set(line.partition("report_to=")[2].split()[0].split(","))


# ---- names, tables

def test_trackers_are_named_with_commas():
    assert find_trackers("") == find_trackers(" ") == []
    assert [t.name for t in find_trackers("tensorboard, trackio,wandb")] == ["tensorboard", "trackio", "wandb"]
    for wrong, hint in (("tensorbord", "did you mean 'tensorboard'"), ("wandb,wandb", "each once"), ("wandb,", "expected some of")):
        with pytest.raises(ConfigError, match=hint):
            find_trackers(wrong)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_told_with_its_command_before_anything_is_loaded(name, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    for spec in (None, importlib.machinery.ModuleSpec(name, None)):        # nothing, and a folder of that name
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest, spec=spec: spec if n == name else real(n, *rest))
        sets = [f"--set=output_dir={tmp_path}/out", f"--set=report_to={name}", "--set=model_name=no/such-model"]
        with pytest.raises(UserError, match=f"pip install {name}$"):
            main(["--config", str(ROOT / "configs/demo.toml"), *sets])
        assert not (tmp_path / "out").exists()


def test_the_extras_name_the_packages():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(TRACKERS) == set(extras["trackers"]) and set(TRACKERS) <= set(extras["test"])


def test_a_table_has_the_completions_of_the_first_prompt():
    problem = SimpleNamespace(prompt=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}], answer="2")
    rollout = SimpleNamespace(problem=problem, texts=["2", "3"])
    rows = table(7, rollout, np.array([1.0, np.nan, 5.0, 6.0]), np.array([0.5, -0.5]))
    assert rows == [[7, "system: be brief\nuser: 1+1", "2", "2", 1.0, 0.5], [7, "system: be brief\nuser: 1+1", "2", "3", None, -0.5]]


def test_a_markdown_table_shows_any_text_as_it_is():
    require("tensorboard")
    from tensorboard.plugin_util import markdown_to_safe_html

    text = "<reasoning>a*b*c | `x`\n# _y_ [z](http://e.org) \\ &lt;</reasoning>"
    html = markdown_to_safe_html(markdown(["k"], [[text]]))
    cell = html.partition("<td>")[2].partition("</td>")[0]
    import html as escapes
    assert escapes.unescape(cell.replace("<br>", "\n")) == text and "<em>" not in html and "<a" not in html


def test_options_are_all_sent():
    assert all(isinstance(json.dumps(value), str) for value in asdict(RUN).values())
