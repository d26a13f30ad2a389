"""
Three operations of mlx-lm's models, in versions that MLX's CPU backend runs faster. Part of mlx_grpo; Metal and CUDA have
kernels of their own for them and are left alone.

On the CPU MLX composes rms_norm and rope of 7 and 22 operations and takes 12 ns for an exponential, where a power of two
takes 5. Here the turns of a rope are computed once for all layers, norms and SwiGLU have gradients of their own that hold
only their arguments, and SwiGLU takes powers of two. Values are within 1e-6 of MLX's, relative.
"""

import functools
import math
import os
import sys

import mlx.core as mx
import numpy as np

LOG2_E = math.log2(math.e)
PLAIN = {"rope": mx.fast.rope, "rms_norm": mx.fast.rms_norm}


def use_light_ops():
    """Put the three in the place of mx.fast.rope, mx.fast.rms_norm and mlx-lm's swiglu, for this process, where the default
    device is the CPU; not with MLX_GRPO_CPU_OPS=off in the environment. Models that were imported before take them too."""
    from mlx_lm.models import activations

    if mx.default_device() != mx.cpu or activations.swiglu is swiglu or os.environ.get("MLX_GRPO_CPU_OPS") == "off":
        return
    plain, mx.fast.rope, mx.fast.rms_norm = activations.swiglu, rope, rms_norm
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models") and getattr(module, "swiglu", None) is plain:
            module.swiglu = swiglu


def sigmoid(x):
    return 1 / (1 + mx.power(2.0, x * -LOG2_E))


@mx.custom_function
def light_swiglu(gate, x):
    return gate * sigmoid(gate) * x


@light_swiglu.vjp
def _(primals, cotangent, _output):
    gate, x = primals
    s = sigmoid(gate)
    silu = gate * s
    return cotangent * x * (s + silu * (1 - s)), cotangent * silu


def swiglu(gate, x):
    """silu(gate) * x (arXiv 2002.05202)."""
    return light_swiglu(gate, x)


@functools.lru_cache(maxsize=16)
def turns(T, offset, dims, base, scale):
    """(cosines, signed sines), (T, dims) each, of positions offset to offset + T."""
    angles = np.outer((np.arange(T) + offset) * scale, base ** (-np.arange(dims // 2) / (dims // 2)))
    c, s = np.cos(angles), np.sin(angles)
    return mx.array(np.hstack([c, c]).astype(np.float32)), mx.array(np.hstack([-s, s]).astype(np.float32))


def rope(x, dims, *, traditional, base, scale, offset, freqs=None, stream=None):
    """mx.fast.rope: halves of the last axis turned by their position (arXiv 2104.09864). Other layouts, precisions and
    offsets of each row go to MLX's own."""
    if traditional or freqs is not None or stream is not None or dims != x.shape[-1] or not isinstance(offset, int) \
            or x.dtype != mx.float32:
        return PLAIN["rope"](x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, stream=stream)
    c, s = turns(x.shape[-2], offset, dims, base, scale)
    half = dims // 2
    return x * c + mx.concatenate([x[..., half:], x[..., :half]], axis=-1) * s


@functools.cache
def norm_of(eps):
    """rms_norm(x, weight) for one eps: its gradient holds x and nothing else."""
    inverse = lambda x: mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + eps)

    @mx.custom_function
    def norm(x, weight):
        return x * inverse(x) * weight

    @norm.vjp
    def _(primals, cotangent, _output):
        x, weight = primals
        r = inverse(x)
        normed, slope = x * r, cotangent * weight
        of_x = r * (slope - normed * (slope * normed).mean(axis=-1, keepdims=True))
        return of_x, (cotangent * normed).reshape(-1, x.shape[-1]).sum(axis=0)

    return norm


def rms_norm(x, weight, eps, *, stream=None):
    """mx.fast.rms_norm (arXiv 1910.07467)."""
    if weight is None or stream is not None or x.dtype != mx.float32:
        return PLAIN["rms_norm"](x, weight, eps, stream=stream)
    return norm_of(eps)(x, weight)
