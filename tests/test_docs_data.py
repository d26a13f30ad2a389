"""docs/data.md: its commands run, its tables load, and it names what there is."""

import re
import shlex
import tomllib

import pytest
from conftest import ROOT, require

from mlx_grpo import MLXGRPOConfig, main
from mlx_grpo.sources import OWN

PAGE = (ROOT / "docs" / "data.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines() if line.startswith("python")]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A directory with what a clone has, to run in."""
    for name in ("data", "configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_runs(command, clone, capsys):
    if "reasoning_gym" in command:
        require("reasoning_gym")
    words = shlex.split(command)
    assert words[:2] == ["python", "mlx_grpo.py"] and main(words[2:]) == 0
    assert capsys.readouterr().out


def test_the_tables_are_configurations():
    tables = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    assert len(tables) == 2 and all(MLXGRPOConfig(**tomllib.loads(text)) for text in tables)


def test_the_page_names_every_option_of_a_data_set():
    assert all(f"`{name}`" in PAGE for name in (*OWN, "weight", "name"))


def test_the_page_is_in_the_guides():
    assert "(docs/data.md)" in (ROOT / "README.md").read_text()
