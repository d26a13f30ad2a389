"""Shared fixtures. `mlx_grpo` is imported first, so that MLX finds the fast BLAS on Linux."""

import os
import signal
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)     # a job in the background ignores Ctrl-C, and so would what tests start
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")     # tiny matrices: threads cost more than they give

import mlx_grpo  # noqa: E402, F401
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"


def require(module):
    """The module, or a skip where it isn't installed; in CI (CI=true) a missing one fails, so parity is never skipped there."""
    if os.environ.get("CI"):
        return __import__(module)
    return pytest.importorskip(module)


def pytest_terminal_summary(terminalreporter):
    """The table of faults that tests recorded (record_property "fault": [what, how many, of what kinds])."""
    reports = [report for group in ("passed", "failed") for report in terminalreporter.stats.get(group, [])]
    rows = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "fault"]
    if rows:
        terminalreporter.section("faults")
        for what, count, kinds in sorted(rows):
            terminalreporter.write_line(f"{count:5}  {what}: {kinds}")
