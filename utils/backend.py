"""
What differs between MLX's backends, in one place: Metal on a Mac, CUDA and the CPU on Linux.
"""

import functools
import math
import shutil
import sys

import mlx.core as mx
import numpy as np

from mlx_grpo.memory_limit import memory_limit_bytes


def exp(x):
    """e^x for whole rows of the vocabulary. MLX's CPU kernel takes 12 ns for an exp and 5 ns for a power of two of the same
    accuracy (1.2e-7 relative near 0, 2e-6 at -20, where probabilities no longer matter)."""
    return mx.power(2.0, x * math.log2(math.e)) if mx.default_device() == mx.cpu else mx.exp(x)


@functools.lru_cache(maxsize=64)
def ones(width):
    return mx.array(np.ones((width, 1), dtype=np.float32))


def sum_last(x):
    """(..., n) float32 -> (..., 1). MLX's CPU kernel takes four times as long for a sum as BLAS for a product with ones."""
    return x @ ones(x.shape[-1]) if mx.default_device() == mx.cpu else x.sum(axis=-1, keepdims=True)


PASS_TOKENS = {"cpu": 256, "gpu": 2048}


def default_pass_tokens():
    """Tokens of a training pass that keep the matrix products busy; more of them take memory and no less time."""
    return PASS_TOKENS["cpu" if mx.default_device() == mx.cpu else "gpu"]


def compiles(wanted):
    """Whether losses are compiled, for the option use_compile. MLX's CPU backend compiles with g++, and without one runs
    the same operations one by one: said once."""
    on_cpu = mx.default_device() == mx.cpu
    if wanted == "auto":
        return not on_cpu
    if wanted and on_cpu and not shutil.which("g++"):
        say_without_compiler()
        return False
    return wanted


@functools.cache
def say_without_compiler():
    print("use_compile needs a C++ compiler on the CPU and there is no g++: the run goes on uncompiled, with the same "
          "numbers; install one (apt-get install g++, xcode-select --install) or leave use_compile out", file=sys.stderr)


def set_limits(cache_gb=-1.0, wired_gb=-1.0):
    """MLX's limits for this process. cache_gb: freed memory that is kept for the next array; MLX itself keeps as much as
    there is, which varying shapes fill; -1 = an eighth of the memory (the CPU backend's own 34 MB are left alone).
    wired_gb: Metal's memory that macOS may not swap out; -1 = all that it recommends. Raises ConfigError where that is
    exceeded."""
    from mlx_grpo import ConfigError

    on_cpu = mx.default_device() == mx.cpu
    if cache_gb >= 0 or not on_cpu:
        mx.set_cache_limit(int(cache_gb * 1e9) if cache_gb >= 0 else memory_limit_bytes() // 8)
    if not mx.metal.is_available():
        return
    most = mx.device_info()["max_recommended_working_set_size"]
    if wired_gb * 1e9 > most:
        raise ConfigError(f"wired_limit_gb is {wired_gb:g} and Metal wires at most {most / 1e9:.1f} GB; lower it, or raise the "
                          f"limit until the next start: {sysctl_line(wired_gb * 1e9)}")
    mx.set_wired_limit(int(wired_gb * 1e9) if wired_gb >= 0 else most)


def sysctl_line(size):
    """The command that lets Metal wire `size` bytes."""
    return f"sudo sysctl iogpu.wired_limit_mb={math.ceil(size / 2**20)}"
