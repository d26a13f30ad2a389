"""Shell completion: what bash really completes, and that every command, option and option name is in all three scripts."""

import os
import pty
import re
import shlex
import shutil
import subprocess
import time

import pytest

from mlx_grpo import COMMANDS, OPTIONS, main
from mlx_grpo.completion import SHELLS, commands


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "mlx-grpo.bash"
    file.write_text(SHELLS["bash"](commands()))
    return file


def completed(script, lines):
    """What bash's completion function gives for each command line; words are broken at "=", as bash does, the last one is
    the one at the cursor."""
    asked = []
    for line in lines:
        words = [word for part in line.split(" ") for word in (re.findall(r"=|[^=]+", part) or [""])]
        asked.append(f"COMP_WORDS=({' '.join(shlex.quote(w) for w in words)}); COMP_CWORD={len(words) - 1}; _mlx_grpo; "
                     "echo \"${COMPREPLY[@]}\"")
    result = subprocess.run(["bash", "--norc", "-c", f"source {script}\n" + "\n".join(asked)], capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    return dict(zip(lines, [line.split() for line in result.stdout.splitlines()], strict=True))


CASES = {
    "mlx-grpo ": set(COMMANDS), "mlx-grpo pl": {"plan"}, "mlx-grpo --re": {"--resume"},
    "mlx-grpo eval --spl": {"--split"}, "mlx-grpo eval --split ": {"eval", "train", "all"},
    "mlx-grpo eval --split t": {"train"}, "mlx-grpo rewards te": {"test"}, "mlx-grpo completion z": {"zsh"},
    "mlx-grpo --set num_gen": {"num_generations="}, "mlx-grpo eval --set kl_e": {"kl_estimator="},
    "mlx-grpo --set kl_estimator=": {"k1", "k2", "k3", "k3_corrected"},
    "mlx-grpo --set kl_estimator=k3": {"k3", "k3_corrected"},
    "mlx-grpo --set loss_type=d": {"dapo", "dr_grpo"}, "mlx-grpo --set learning_rate=": set(),
    "mlx-grpo --set seed=1 --set log_jsonl=f": {"false"}, "mlx-grpo train --config ": set(),
    "mlx-grpo report --p": {"--png"}, "mlx-grpo push outputs/a --with": {"--with-optimizer"},
}


def test_bash_completes_commands_options_choices_and_option_names(script):
    found = completed(script, CASES)
    assert {line: set(words) for line, words in found.items()} == CASES


def test_bash_offers_every_option_of_every_command(script):
    found = completed(script, [f"mlx-grpo {command} -" for command in COMMANDS] + ["mlx-grpo --set "])
    assert set(found["mlx-grpo --set "]) == {f"{name}=" for name in OPTIONS}
    for command, (_, arguments) in commands().items():
        assert set(found[f"mlx-grpo {command} -"]) == {name for a in arguments for name in a.names} >= {"--help"}


def test_it_works_at_a_prompt(script):
    """bash at a terminal, with the tab key: a name after --set gets no space behind, its value does."""
    master, slave = pty.openpty()
    shell = subprocess.Popen(["bash", "--norc", "--noprofile", "-i"], stdin=slave, stdout=slave, stderr=slave,
                             env=os.environ | {"PS1": "$ ", "TERM": "dumb"}, start_new_session=True)
    os.set_blocking(master, False)
    seen = ""

    def type_and_wait(text, expected):
        nonlocal seen
        os.write(master, text.encode())
        for _ in range(400):
            try:
                seen += os.read(master, 65536).decode()
            except BlockingIOError:
                pass
            if expected in seen:
                return
            time.sleep(0.05)
        raise AssertionError(seen)

    try:
        type_and_wait(f"mlx-grpo() {{ echo \"[$@]\"; }}\nsource {script}\nmlx-grpo go\n", "[go]")
        type_and_wait("mlx-grpo pla\t--set num_gener\t8 --set kl_esti\tk3_\t--se\tx\n",
                      "[plan --set num_generations=8 --set kl_estimator=k3_corrected --set x]")
    finally:
        shell.kill()
        shell.wait()
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_command_option_and_name(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for command, (_, arguments) in commands().items():
        assert command in text
        for name in [name for a in arguments for name in a.names]:
            fish = f"-l {name[2:]} " if name.startswith("--") else f"-s {name[1:]} "
            assert (fish if shell == "fish" else name) in text
    assert all(re.search(rf"\b{name}\b", text) for name in OPTIONS)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)       # it parses
