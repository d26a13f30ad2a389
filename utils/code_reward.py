"""
The built-in reward "code": the share of a row's tests that the Python program in a completion passes, run in a sandbox.

A row's tests, in the column `tests_column`: Python text (one test), a list of such texts (MBPP's test_list), or a list of
{"input", "output"} tables, for a program that reads standard input and prints. None for a row without tests.
"""

import json
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor

from mlx_grpo import ConfigError, UserError, completion_text
from mlx_grpo.more_rewards import demand, fenced
from mlx_grpo.sandbox import Limits, enforced, find_isolation, run_program

# Each test runs after the completion, in its namespace; the mark, unknown to it, tells our lines from what it prints.
HARNESS = """
import json, os, sys
job, out = json.loads(sys.stdin.readline()), os.fdopen(os.dup(1), "w")
scope = {"__name__": "__main__"}
exec(compile(job["program"], "completion.py", "exec"), scope)
for test in job["tests"]:
    try:
        exec(compile(test, "test.py", "exec"), dict(scope))
    except BaseException:
        continue
    sys.stdout.flush()
    print("\\n" + job["mark"], file=out, flush=True)
"""


def make_reward(tests_column, timeout, memory_mb, partial, workers, allow_unsandboxed):
    """The reward function of mlx_grpo.more_rewards.code. Raises ConfigError where programs can't be isolated here, unless
    allow_unsandboxed; says once on standard error what is enforced."""
    demand(timeout > 0, "timeout", timeout, "use more than 0 seconds")
    demand(memory_mb >= 64, "memory_mb", memory_mb, "use at least 64 MB, which Python itself needs")
    demand(workers >= 0, "workers", workers, "use 0 (one for each CPU) or more")
    limits, (isolation, why) = Limits(timeout, memory_mb), find_isolation()
    if isolation == "none" and not allow_unsandboxed:
        raise ConfigError(f"reward 'code' runs programs that a model wrote, and they can't be isolated here ({why}); see "
                          "docs/rewards.md, or set allow_unsandboxed = true to run them with your own rights")
    print(f"reward 'code', sandbox: {enforced(isolation, limits)}", file=sys.stderr)

    def score(completions, **columns):
        rows = columns.get(tests_column)
        if rows is None:
            raise UserError(f"the data has no column {tests_column!r}; set reward_options.code.tests_column")
        pairs = [(fenced(completion_text(c), "python", "py", "python3"), tests) for c, tests in zip(completions, rows)]
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            shares = list(pool.map(lambda pair: share_passed(*pair, limits, isolation), pairs))
        return [s if s is None or partial else float(s == 1) for s in shares]
    score.thread_safe = True
    return score


def share_passed(program, tests, limits, isolation):
    """Share of the tests that a program passes; None without tests. Raises UserError for tests of no known kind."""
    if not tests:
        return None
    tests = [tests] if isinstance(tests, str) else tests
    if all(isinstance(test, str) for test in tests):
        mark = secrets.token_hex(16)
        job = json.dumps({"program": program, "tests": tests, "mark": mark}) + "\n"
        _, output = run_program(HARNESS, job, limits, isolation)
        return min(1.0, output.split("\n").count(mark) / len(tests))
    if not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        raise UserError(f'tests must be texts, or tables with "input" and "output", got {str(tests)[:80]}')
    runs = [run_program(program, str(test["input"]), limits, isolation) for test in tests]
    passed = [code == 0 and lines(text) == lines(str(test["output"])) for (code, text), test in zip(runs, tests)]
    return sum(passed) / len(passed)


def lines(text):
    """The lines without blanks at their ends, and without blank lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
