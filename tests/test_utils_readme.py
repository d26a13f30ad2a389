"""utils/README.md: an entry for every script, every option in its table, and commands that run."""

import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny_hf import CHATML, save_adapter, save_tiny, save_tokenizer

from mlx_grpo import convert_model, inference
from mlx_grpo.checked_load import load_checked

README = (ROOT / "utils" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
OURS = [c for c in COMMANDS if "convert_model" in c or "inference.py" in c]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory like a clone, with the models that the commands name."""
    path = tmp_path_factory.mktemp("clone")
    for name in ("utils", "data", "configs", "mlx_grpo.py", "convert_nanochat.py"):
        (path / name).symlink_to(ROOT / name)
    save_tiny(path / "hf_model", "qwen3", hidden_size=64, intermediate_size=128, vocab_size=300, eos_token_id=3)
    save_tokenizer(path / "hf_model", CHATML, every_byte=True)
    save_adapter(path / "adapter", load_checked(path / "hf_model")[0])
    return path


def run(command, workplace):
    result = subprocess.run(command.replace("python ", f"{sys.executable} ", 1) if command.startswith("python")
                            else command.replace("| python ", f"| {sys.executable} "),
                            shell=True, cwd=workplace, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def run_here(command, workplace, monkeypatch):
    """As `run`, in this process, which saves the libraries' start."""
    words = shlex.split(command)
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", words[1:])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        assert not end.code, command
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_every_script_has_an_entry_and_every_entry_a_script():
    scripts = {path.name for path in (ROOT / "utils").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert set(re.findall(r"^## (\S+\.py)$", README, re.M)) == scripts
    assert set(re.findall(r"^\| \[(\S+\.py)\]", README, re.M)) == scripts


@pytest.mark.parametrize("module", [convert_model, inference])
def test_every_option_is_in_the_table_with_its_default(module, capsys):
    section = README.split(f"## {module.__name__.split('.')[-1]}.py")[-1].split("\n## ")[0]
    with pytest.raises(SystemExit):
        module.parse(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("options:")[1])) - {"--help"}
    told = set(re.findall(r"^\| `?(?:-q`, `)?(--[a-z-]+)", section, re.M))
    assert told == options


def test_the_hub_commands_are_understood():
    lines = [shlex.split(line) for line in re.findall(r"^python utils/convert_model.py (.*)$", README, re.M)]
    parsed = [convert_model.parse(words) for words in lines]
    assert len(parsed) >= 6 and all(words[words.index("--hf-path") + 1] == str(p.hf_path)
                                    for words, p in zip(lines, parsed) if "--hf-path" in words)


def test_the_commands_of_conversion_and_inference_run_in_their_order(workplace, monkeypatch):
    for command in OURS:
        if command.startswith("python "):
            run_here(command, workplace, monkeypatch)
        else:
            run(command, workplace)


@pytest.mark.soak
def test_the_other_commands_run_after_a_short_training_run(workplace):
    run("python mlx_grpo.py --config configs/demo.toml --set max_steps=1 --set eval_samples=10", workplace)
    shutil.rmtree(workplace / "nemo_model", ignore_errors=True)
    for command in COMMANDS:
        if command not in OURS:
            run(command, workplace)
