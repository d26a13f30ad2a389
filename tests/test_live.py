"""The live view, on a pseudo-terminal: what it shows, that nothing printed is lost, and plain lines elsewhere."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from mlx_grpo import read_metrics
from mlx_grpo.live import ASCII_BARS, LiveView, duration, one_line, sparkline
from terminal import run_on_terminal
from test_trainer import CONFIG, make_trainer

HOOKS = """
import sys
from mlx_grpo import TrainerCallback, UserError

class Talks(TrainerCallback):
    def on_step_end(self, trainer, metrics):
        print(f"out {metrics['step']} [/bold] :smile: " + "x" * 500 + " end")
        print(f"err {metrics['step']} [red]", file=sys.stderr)

class Half(TrainerCallback):
    def on_step_end(self, trainer, metrics):
        print("half a line", end="")
        return metrics["step"] == 2

class Fails(TrainerCallback):
    def on_step_end(self, trainer, metrics):
        if metrics["step"] == 2:
            raise UserError("it went wrong")
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "hooks.py").write_text(HOOKS)

    def make(hook, *more, **changes):
        values = {"output_dir": tmp_path, "run_name": "r", "max_steps": 4, "eval_samples": 8, "eval_steps": 2, "batch_size": 2,
                  "num_generations": 4, "max_train_samples": 64, "callbacks": f'["{tmp_path}/hooks.py:{hook}"]'} | changes
        return [sys.executable, str(ROOT / "mlx_grpo.py"), "--config", str(ROOT / "configs/demo.toml"),
                *sum((["--set", f"{k}={v}"] for k, v in values.items()), []), *more]
    return make


VIEW = re.compile(r"training +step|tokens/s|last sample")


def steps_in(lines):
    return [int(m[1]) for line in lines if (m := re.match(r"step (\d+)/4 \|", line))]


def test_on_a_terminal_the_view_is_shown_and_every_line_stays(command):
    code, sent, screen = run_on_terminal(command("Talks", max_new_tokens=3))
    assert code == 0 and screen.cursor
    for label in ("training ", "reward ", "exact match ", "tokens/s ", "memory ", "warnings ", "last sample "):
        assert re.search(rf"^{label}", sent, re.M), label
    assert re.search(r"step 3/4  ━+─+  0:0\d left", sent) and re.search(r"warnings +truncated", re.sub(r"\x1b\[[\d;]*m", "", sent))
    lines = screen.lines
    assert steps_in(lines) == [0, 1, 2, 3, 4]
    for step in range(1, 5):
        assert lines.count(f"out {step} [/bold] :smile: " + "x" * 500 + " end") == 1      # not wrapped, no markup
        assert lines.count(f"err {step} [red]") == 1
    assert sum("[health/truncated]" in line for line in lines) == 1
    assert not any(VIEW.match(line) for line in lines)       # the view is gone at the end
    assert any(line.startswith("report ") for line in lines)


@pytest.mark.parametrize("changes, env", [({"live": "false"}, {}), ({}, {"TERM": "dumb"})])
def test_without_it_a_terminal_gets_plain_lines(command, changes, env):
    code, sent, _ = run_on_terminal(command("Talks", **changes), env=env)
    assert code == 0 and "\x1b" not in sent and steps_in(sent.splitlines()) == [0, 1, 2, 3, 4]


def test_standard_error_that_goes_to_a_file_arrives_there(command, tmp_path):
    with open(tmp_path / "errors", "w") as errors:
        code, sent, screen = run_on_terminal(command("Talks"), stderr=errors)
    written = (tmp_path / "errors").read_text()
    assert code == 0 and re.findall(r"^err (\d)", written, re.M) == ["1", "2", "3", "4"]
    assert "tokens/s" in sent and not any(line.startswith("err") for line in screen.lines)


def test_a_pipe_gets_plain_lines(command):
    done = subprocess.run(command("Talks"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
    assert steps_in(done.stdout.splitlines()) == [0, 1, 2, 3, 4] and "tokens/s" not in done.stdout


def test_an_error_leaves_the_terminal_as_it_was(command):
    code, _, screen = run_on_terminal(command("Fails"))
    assert code == 2 and screen.cursor and "error: it went wrong" in screen.lines
    assert steps_in(screen.lines) == [0, 1] and not any(VIEW.match(line) for line in screen.lines)


def test_half_a_line_isnt_lost_when_the_run_ends(command):
    code, _, screen = run_on_terminal(command("Half"))
    assert code == 0 and "".join(screen.lines).count("half a line") == 2


def test_a_resumed_runs_curves_begin_where_the_run_began(tmp_path, monkeypatch):
    config = replace(CONFIG, log_jsonl=True, max_steps=2)
    make_trainer(tmp_path, config).train()
    trainer = make_trainer(tmp_path, replace(config, max_steps=3))
    trainer.load_checkpoint(tmp_path / "checkpoint-2")
    view = next(c for c in trainer.callbacks if isinstance(c, LiveView))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    trainer.train()
    assert view.rewards == [m["reward"] for m in read_metrics(tmp_path)] and len(view.rewards) == 3
    assert view.live is None


def test_what_a_model_wrote_cant_move_the_cursor():
    view = LiveView()
    view.sample = 0.5, "2*3\n", "\x1b[2J\x1b]0;title\x07 a\r\nb\x9b1A"
    ((_, text),) = view.lines()
    assert text.isprintable() and "a b" in text and one_line("\x1b[31mred") == " [31mred"


def test_a_view_without_a_step_has_no_lines_and_no_time_left():
    view = LiveView()
    assert view.lines() == [] and view.time_left() is None


def test_sparklines_and_durations():
    assert sparkline([]) == "" and sparkline([5]) == "▁" and sparkline([2, 2]) == "▁▁"
    assert sparkline([1, 2, 3]) == "▁▅█" and sparkline(list(range(8))) == "▁▂▃▄▅▆▇█"
    assert sparkline([0] * 50 + [1] * 50, width=4) == "▁▁██"           # 25 values each
    assert sparkline([0, 1, 0, 1], width=2) == "▁▁"                     # means, not picked values
    assert sparkline([0, 1], bars=ASCII_BARS) == "_#" and len(sparkline(list(range(1000)))) == 40
    assert (duration(-1), duration(75), duration(3700)) == ("0:00", "1:15", "1:01:40")
