"""
A fast BLAS for MLX's CPU backend on Linux; imported once, before `mlx.core`.

MLX's Linux CPU wheel links the reference BLAS: float32 matmul at about 5 GFLOP/s. A library with plain `cblas_*`
symbols that is already loaded globally takes its place. Two are tried: the system's libopenblas, and the PyPI package
scipy-openblas32, whose symbols carry the prefix `scipy_` and are reached through a three-function shim, built once with
the system's C compiler and kept in the cache folder. Nothing happens on macOS, with a CUDA build of MLX, or with
MLX_GRPO_BLAS=off in the environment.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

SYSTEM_LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
SHIM = """
#define FORWARD(name, scalar, element) \\
  void scipy_##name(int, int, int, int, int, int, scalar, const element *, int, const element *, int, scalar, element *, int); \\
  void name(int order, int ta, int tb, int m, int n, int k, scalar alpha, const element *a, int lda, \\
            const element *b, int ldb, scalar beta, element *c, int ldc) \\
  { scipy_##name(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); }
FORWARD(cblas_sgemm, float, float)
FORWARD(cblas_dgemm, double, double)
FORWARD(cblas_cgemm, const void *, void)
"""


def installed(package):
    try:
        return distribution(package) is not None
    except PackageNotFoundError:
        return False


def load_globally(path):
    """Load a shared library so that libraries loaded later resolve their symbols in it; False if it can't be loaded."""
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        return True
    except OSError:
        return False


def build_shim(cache):
    """The path of the compiled shim in folder `cache`, building it if it isn't there; None without a C compiler.

    Written under a temporary name and renamed, so that two processes may build it at once."""
    shim = cache / f"cblas_shim_{os.uname().machine}.so"
    if shim.exists():
        return shim
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        source, built = Path(work, "shim.c"), Path(work, "shim.so")
        source.write_text(SHIM)
        done = subprocess.run([*compiler.split(), "-O2", "-shared", "-fPIC", "-o", built, source], capture_output=True)
        if done.returncode:
            return None
        os.replace(built, shim)
    return shim


def load_fast_blas():
    """Put a fast BLAS in place for MLX. Returns its name, "" where none is needed, or None (after a line on standard
    error that says what is slow and how to mend it) where there is none."""
    if sys.platform != "linux" or os.environ.get("MLX_GRPO_BLAS") == "off":
        return ""
    if any(installed(p) for p in ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")):
        return ""
    if "mlx.core" in sys.modules:
        print("mlx_grpo: mlx.core was imported first, so MLX keeps its slow reference BLAS (about 30 times slower in "
              "float32); import mlx_grpo before mlx", file=sys.stderr)
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "18")      # idle threads spin for 2**18 cycles, not 2**26, in the way of ours
    for library in SYSTEM_LIBRARIES:
        if load_globally(library):
            return library
    spec = find_spec("scipy_openblas32")
    if spec is None:
        remedy = "pip install scipy-openblas32"
    else:
        library = next(Path(spec.origin).parent.glob("lib/libscipy_openblas*.so"), None)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-grpo"
        try:
            shim = build_shim(cache)
        except OSError as error:      # a read-only home: the run is slow, not broken
            shim, remedy = None, f"make {cache} writable ({error.strerror})"
        else:
            remedy = "install a C compiler (apt-get install gcc) or libopenblas0"
        if library and shim and load_globally(library) and load_globally(shim):
            return "scipy-openblas32"
    print(f"mlx_grpo: MLX uses its slow reference BLAS here (about 30 times slower in float32); {remedy}", file=sys.stderr)
    return None


BLAS = load_fast_blas()
