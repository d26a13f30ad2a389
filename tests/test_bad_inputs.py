"""Bad input for every command: exit code 2, one line that names value, place and remedy, and nothing written."""

import collections
import importlib
import os
import shlex
import signal
import subprocess
import sys

import huggingface_hub.constants
import pytest
from bad_inputs import Bad, copy_good, make_good, tree
from bad_inputs_table import TABLE
from conftest import ROOT, require

from mlx_grpo import COMMANDS, run_command

CASES = [Bad(command, kind, line, says.split(" | "), list(spoil))
         for command, cases in TABLE.items() for kind, line, says, *spoil in cases]
FIRST = [next(case for case in CASES if case.command == command) for command in TABLE]      # one of each as a process
GOOD_LINES = {  # what the cases spoil works as it is
    "train": "--config run.toml", "sft": "--config run.toml", "eval": "--config run.toml", "rewards": "--config run.toml",
    "plan": "--config run.toml", "preview": "--config run.toml", "report": "logged",
    "convert_nanochat": "--cache-dir nanochat --output-dir out --no-verify",
    "convert_model": "--hf-path model --output-dir out", "inference": "--model model --prompt hello --max-tokens 3",
    "convert_nemo": "import --source hf --output out", "checkpoints backup": "kept/checkpoint-10 --dest copies",
    "adapters to-peft": "--adapter adapter --output out", "adapters from-peft": "--adapter peft --output out --model model",
    "adapters fuse": "--adapter adapter --output out", "sensitivity": "--model model --num-prompts 1 --max-new-tokens 4",
}


def script_of(command):
    """(module, script file, the words before a case's line)."""
    name, *rest = command.split()
    if name in COMMANDS:
        return "mlx_grpo", ROOT / "mlx_grpo.py", [] if name == "train" else [name, *rest]
    if name == "convert_nanochat":
        return name, ROOT / "convert_nanochat.py", rest
    name = name.removesuffix(".py")
    return f"mlx_grpo.{name}", ROOT / "utils" / f"{name}.py", rest


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    """A function that makes a copy of the good inputs of a command the working directory; all of this is undone."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def enter(command):
        require("torch") if command == "convert_nemo" else None
        copy_good(good, tmp_path, command)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    yield enter
    signal.signal(signal.SIGTERM, handler)


def check(case, code, errors, before, after):
    line = errors.splitlines()[-1] if errors else ""
    assert code == 2 and line.startswith("error: ") and errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    assert [text for text in case.says if text not in line] == [], line
    assert after == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.command}: {case.kind}: {case.line[:60]}")
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(case, place, monkeypatch, capfd):
    directory = place(case.command)
    for spoil in case.spoil:
        spoil()
    module, script, words = script_of(case.command)
    monkeypatch.setattr(sys, "argv", [str(script), *words, *shlex.split(case.line)])
    before = tree(directory)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(importlib.import_module(module).main)
    check(case, end.value.code, capfd.readouterr().err, before, tree(directory))


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.command)
def test_so_it_is_in_a_process(case, place):
    directory = place(case.command)
    for spoil in case.spoil:
        spoil()
    _, script, words = script_of(case.command)
    before = tree(directory)
    done = subprocess.run([sys.executable, "-B", str(script), *words, *shlex.split(case.line)], cwd=directory,
                          env=dict(os.environ), capture_output=True, text=True)
    check(case, done.returncode, done.stderr, before, tree(directory))


@pytest.mark.parametrize("command", GOOD_LINES)
def test_what_the_cases_spoil_works_as_it_is(command, place, monkeypatch):
    place(command)
    module, script, words = script_of(command)
    monkeypatch.setattr(sys, "argv", [str(script), *words, *shlex.split(GOOD_LINES[command])])
    with pytest.raises(SystemExit) as end:
        run_command(importlib.import_module(module).main)
    assert not end.value.code


def test_the_table_has_every_command_at_least_150_cases_and_at_most_4_of_a_kind():
    """With -s it prints the counts."""
    counts = collections.Counter(case.command for case in CASES)
    print("\n" + "\n".join(f"{command:22} {count:4}" for command, count in (*counts.items(), ("together", len(CASES)))))
    scripts = {path.stem for path in (ROOT / "utils").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    tried = {command.split()[0].removesuffix(".py") for command in counts}
    assert scripts | set(COMMANDS) | {"convert_nanochat"} <= tried, (scripts | set(COMMANDS)) - tried
    assert len(CASES) >= 150
    assert max(collections.Counter((case.command, case.kind) for case in CASES).values()) <= 4
