"""The sandbox and the reward "code": what passes, what is held back, and that nothing runs where it can't be held back."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from mlx_grpo import ConfigError, Scorer, find_rewards, main, sandbox
from mlx_grpo.sandbox import Limits, SandboxError, find_isolation, run_program
from test_rewards import rollouts
from tiny_models import sets

ISOLATED = sys.platform in ("linux", "darwin") and find_isolation()[0] != "none"
isolated = pytest.mark.skipif(not ISOLATED, reason="programs can't be isolated here")
on_linux = pytest.mark.skipif(not ISOLATED or sys.platform != "linux", reason="namespaces are Linux's")
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]


def run(program, stdin="", seconds=20, memory_mb=256, disk_mb=8):
    return run_program(program, stdin, Limits(seconds, memory_mb, disk_mb), find_isolation()[0])


def score(*texts, tests=TESTS, **options):
    scorer = Scorer(find_rewards(["code"], {"code": options | {"timeout": 20}}))
    return scorer(rollouts(*texts, tests=tests))[0][:, 0].tolist()


# ---- the sandbox

@isolated
def test_a_program_runs_with_its_input_and_its_exit_code_and_output_come_back():
    assert run("import sys; print(sys.stdin.read() * 2); sys.exit(7)", "abc") == (7, "abcabc\n")
    assert run("import numpy; print(numpy.arange(3).sum())", memory_mb=1024) == (0, "3\n")        # this Python's packages


@isolated
@pytest.mark.parametrize("program", [
    "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)", "open({secret!r}).read()",
    "open({secret!r}, 'w').write('x')", "import os; os.listdir({folder!r})", "open('/usr/lib/x', 'w')",
    "open('/etc/passwd').read()" if sys.platform == "linux" else "open({secret!r}).read()",
    "import os; os.environ['HF_TOKEN']"])
def test_network_files_and_environment_are_out_of_reach(program, tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "secret").write_text("key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"port": server.getsockname()[1], "secret": str(tmp_path / "secret"), "folder": str(tmp_path)}
        assert run(program.format(**place) + "; print('reached')") == (1, "")
    assert (tmp_path / "secret").read_text() == "key"
    assert run("print('reached')") == (0, "reached\n")


@isolated
def test_time_memory_and_disk_are_limited():
    assert run("while True: pass", seconds=1.5)[0] is None
    assert run("b = bytearray(600 << 20)", memory_mb=256)[0] != 0 and run("b = bytearray(60 << 20)", memory_mb=256)[0] == 0
    assert run("open('big', 'wb').write(b'0' * (20 << 20))", disk_mb=8)[0] == 1
    code, text = run("print('x' * (20 << 20))", disk_mb=1)
    assert code == 1 and len(text) <= 1 << 20


@on_linux
def test_nothing_outlives_a_program():
    mark = f"mark{time.time_ns()}"
    leave = f"import os, sys, time\nif os.fork() == 0:\n    os.setsid()\n    os.execv(sys.executable, ['{mark}', '-c', " \
            "'import time; time.sleep(300)'])\ntime.sleep(0.3)\nprint('parent')"
    assert run(leave) == (0, "parent\n")
    assert run(leave + "\ntime.sleep(300)", seconds=3)[0] is None
    for _ in range(50):
        alive = mark in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


@on_linux
def test_a_program_has_no_rights_over_its_sandbox():
    assert run("import ctypes; print(ctypes.CDLL(None).mount(b't', b'/tmp', b'tmpfs', 0, None))") == (0, "-1\n")
    assert run("import os; os.kill(1, 9); print(os.getuid())") == (0, "1000\n")       # process 1 is deaf to its children
    assert run("import os; print(sorted(os.listdir('.')))") == (0, "['program.py', 'stdin']\n")


def test_a_sandbox_that_can_not_be_set_up_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "readable_paths", lambda: ["/nowhere"])
    if sys.platform == "linux":
        with pytest.raises(SandboxError):
            run_program("print('ran')", "", Limits(), "linux")


def test_without_isolation_it_refuses_unless_it_is_allowed(monkeypatch, capsys):
    monkeypatch.setattr("mlx_grpo.code_reward.find_isolation", lambda: ("none", "unshare: Operation not permitted"))
    with pytest.raises(ConfigError, match="can't be isolated here .unshare: Operation not permitted.*allow_unsandboxed"):
        find_rewards(["code"])
    assert score(ADD, allow_unsandboxed=True) == [1.0]
    assert "NOT enforced: network" in capsys.readouterr().err


# ---- the reward

@isolated
def test_the_share_of_passed_tests_is_the_reward(capsys):
    half = "```python\ndef add(a, b):\n    return abs(a) + abs(b)\n```"
    wrong = "```python\nadd = lambda a, b: 0\n```"
    assert score(ADD, half, wrong, "", "no code", "```python\ndef add(:\n```") == pytest.approx([1, 1 / 3, 1 / 3, 0, 0, 0])
    assert score(ADD, half, partial=False) == [1, 0]
    assert score(ADD, tests="\n".join(TESTS)) == [1]
    assert "no network" in capsys.readouterr().err


@isolated
@pytest.mark.parametrize("cheat", [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "print('ok\\n' * 9)", "while True: pass",
    "import sys\nfor line in sys.stdin: print(line)"])
def test_leaving_early_printing_and_hanging_earn_nothing(cheat):
    scorer = Scorer(find_rewards(["code"], {"code": {"timeout": 1.5}}))
    assert scorer(rollouts(f"```python\n{cheat}\n```", tests=TESTS))[0][:, 0].tolist() == [0]


@isolated
def test_programs_that_read_and_print_are_compared_line_by_line():
    tests = [{"input": "1 2\n", "output": "3"}, {"input": "5 6", "output": "11 \n\n"}]
    add, wrong = "print(sum(map(int, input().split())))", "print(3)"
    assert score(add, wrong, "print(3) or 1 / 0", tests=tests) == [1, 0.5, 0]


@isolated
def test_rows_without_tests_do_not_apply_and_strange_tests_are_told():
    from mlx_grpo import RewardError

    function = find_rewards(["code"])["code"]
    assert function(completions=["x", "y"], tests=[None, []]) == [None, None]
    with pytest.raises(RewardError, match="'input' and 'output'|\"input\" and \"output\""):
        score(ADD, tests=[1])
    with pytest.raises(RewardError, match="no column 'cases'"):
        score(ADD, tests_column="cases")


@isolated
def test_rewards_test_finds_nothing_wrong_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"question": "Write add.", "tests": TESTS, "demo": ADD}
    rows = [row | {"question": f"Write add, number {i}."} for i in range(3)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = sets(dataset="code.jsonl", answer_column="", solution_column="demo", rewards=["code"], eval_samples=0)
    assert main(["rewards", "test", "--rows", "1", *arguments]) == 0
    assert "no flags" in capsys.readouterr().out


def test_the_guide_says_what_is_enforced_where():
    page = (ROOT / "docs" / "rewards.md").read_text()
    assert all(word in page for word in ("allow_unsandboxed", "sandbox-exec", "namespaces", "RLIMIT"))
    assert os.path.exists(sandbox.CHILD)
