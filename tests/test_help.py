"""--help of every command and script fits a screen of 40 lines and 100 columns, and ends with commands to copy."""

import runpy
import shlex
import sys

import pytest
from conftest import ROOT

from mlx_grpo import COMMANDS, main
from mlx_grpo.help_text import help_of

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "convert_nanochat.py", *(ROOT / "utils").glob("*.py")]
                 if '__name__ == "__main__"' in path.read_text())


def helped(program, capsys, monkeypatch):
    """What --help of a script, or of a command of mlx_grpo.py, prints on a screen of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        if program.endswith(".py"):
            monkeypatch.setattr(sys, "argv", [program, "--help"])
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            main([*shlex.split(program), "--help"])
    assert not end.value.code
    return capsys.readouterr().out.rstrip("\n").splitlines()


@pytest.mark.parametrize("program", ["", *COMMANDS, *SCRIPTS])
def test_help_fits_a_screen_and_ends_with_examples(program, capsys, monkeypatch):
    lines = helped(program, capsys, monkeypatch)
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    examples = lines[lines.index("examples:") + 1:]
    assert examples and all(line.startswith("  ") for line in examples)
    name = program if program.endswith(".py") else "completion" if program == "completion" else "mlx_grpo.py"
    assert any(name in line for line in examples)
    assert len(lines[0]) > 10 and "options:" in lines and len(" ".join(lines[:lines.index("options:")])) > 60


def test_a_docstrings_prose_comes_first_and_its_commands_last():
    found = help_of("""Does
    this.

        python a.py --x    # first
        python a.py --y

    And that.

    examples:
      a z
    """)
    assert found["description"] == "Does this.\n\nAnd that."
    assert found["epilog"] == "examples:\n  python a.py --x    # first\n  python a.py --y\n  a z"
    assert help_of("Only this.")["epilog"] is None


def test_a_long_command_is_continued_at_an_option():
    command = "python a.py --model " + "m" * 60 + " --output somewhere"
    first, second = help_of(f"\nDoes.\n\n    {command}\n")["epilog"].splitlines()[1:]
    assert first.endswith(" \\") and shlex.split(first[:-1] + second) == command.split()


def test_prose_is_wrapped_to_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, help_of("word " * 100)["description"].splitlines())) <= 58
