"""Shared fixtures. `mlx_grpo` is imported first, so that MLX finds the fast BLAS on Linux."""

import os
from pathlib import Path

import mlx_grpo  # noqa: F401
import pytest

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"


def require(module):
    """The module, or a skip where it isn't installed; in CI (CI=true) a missing one fails, so parity is never skipped there."""
    if os.environ.get("CI"):
        return __import__(module)
    return pytest.importorskip(module)
