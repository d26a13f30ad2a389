"""GRPO fine-tuning of language models on MLX, in one file (the algorithm lands here; see utils/ for the tools)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# This file is also the package of its tools: `mlx_grpo.files` is utils/files.py in a clone, mlx_grpo_utils/files.py in a wheel.
__path__ = [str(next(d for d in (HERE / "mlx_grpo_utils", HERE / "utils") if d.is_dir()))]
sys.modules.setdefault("mlx_grpo", sys.modules[__name__])   # one module, whether run or imported

from mlx_grpo import linux_blas                             # noqa: E402  before mlx.core, see there

import mlx.core as mx                                       # noqa: E402


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


class ConfigError(UserError):
    """An option that is unknown, of the wrong type, out of range or contradictory."""


def run_command(main):
    """Run a script's `main`: its UserError becomes one line on standard error and exit code 2; other errors are bugs
    and keep their traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
