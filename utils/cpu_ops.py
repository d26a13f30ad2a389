"""
Four operations of mlx-lm's models, in versions that MLX's CPU backend runs faster. Part of mlx_grpo; Metal and CUDA have
kernels of their own for them and are left alone.

On the CPU MLX composes rms_norm and rope of 7 and 22 operations, of about 8 us each whatever their size, and takes 12 to 20
ns for an exponential, where a power of two takes 5. Here the turns of a rope are computed once for all layers, and that of
a single position is one product with a matrix; norms and SwiGLU have gradients of their own that hold only their arguments;
SwiGLU and attention take powers of two. Values are within 1e-6 of MLX's, relative.
"""

import contextlib
import functools
import math
import os
import sys

import mlx.core as mx
import numpy as np

from mlx_grpo.backend import sum_last

LOG2_E = math.log2(math.e)
PLAIN = {name: getattr(mx.fast, name) for name in ("rope", "rms_norm", "scaled_dot_product_attention")}


def use_light_ops():
    """Put the four in the place of those of mx.fast and of mlx-lm's swiglu, for this process, where the default device is
    the CPU; not with MLX_GRPO_CPU_OPS=off in the environment. Models that were imported before take them too."""
    from mlx_lm.models import activations

    if mx.default_device() != mx.cpu or activations.swiglu is swiglu or os.environ.get("MLX_GRPO_CPU_OPS") == "off":
        return
    for name in PLAIN:
        setattr(mx.fast, name, globals()[name])
    plain = activations.swiglu
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models") and getattr(module, "swiglu", None) is plain:
            module.swiglu = swiglu


def sigmoid(x):
    return 1 / (1 + mx.power(2.0, x * -LOG2_E))


@mx.custom_function
def light_swiglu(gate, x):
    return gate * x / (1 + mx.power(2.0, gate * -LOG2_E))


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
    angles = np.outer((np.arange(T) + offset) * scale, frequencies(dims, base))
    return mx.array(np.cos(angles).astype(np.float32)), mx.array((np.sin(angles) * signs(dims)).astype(np.float32))


@functools.lru_cache(maxsize=4)
def turn(offset, dims, base, scale):
    """(dims, dims) matrix that turns a row to the position offset."""
    angles = offset * scale * frequencies(dims, base)
    return mx.array((eye(dims) * np.cos(angles) + swap(dims) * np.sin(angles)).astype(np.float32))


@functools.cache
def frequencies(dims, base):
    """(dims,) of both halves, radians a position (arXiv 2104.09864)."""
    return np.tile(base ** (-np.arange(dims // 2) / (dims // 2)), 2)


def signs(dims):
    return np.repeat([-1.0, 1.0], dims // 2)


eye = functools.cache(np.eye)


@functools.cache
def swap(dims):
    """(dims, dims) matrix that swaps the halves of a row, the new first one negated."""
    return np.roll(np.eye(dims), dims // 2, axis=0) * signs(dims)


@functools.cache
def turn_parts(dims, base, scale):
    """swap and frequencies as MLX's."""
    return mx.array(swap(dims).astype(np.float32)), mx.array((scale * frequencies(dims, base)).astype(np.float32))


def rope(x, dims, *, traditional, base, scale, offset, freqs=None, stream=None):
    """mx.fast.rope: halves of the last axis turned by their position. Other layouts, precisions and several tokens of rows
    with an offset each go to MLX's own."""
    T, each = x.shape[-2], isinstance(offset, mx.array)
    if traditional or freqs is not None or stream is not None or dims != x.shape[-1] or x.dtype != mx.float32 \
            or each and (T > 1 or x.ndim != 4 or offset.ndim > 1):
        return PLAIN["rope"](x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, stream=stream)
    if each:
        swapped, per_position = turn_parts(dims, base, scale)
        angles = offset.reshape(-1, 1, 1, 1) * per_position                    # (B, 1, 1, dims)
        return x * mx.cos(angles) + (x @ swapped) * mx.sin(angles)
    if T == 1:
        return x @ turn(offset, dims, base, scale)
    c, s = turns(T, offset, dims, base, scale)
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
    if x.size < 2**14:                  # little memory to save, so the fewest operations
        return x * mx.rsqrt(mx.addmm(mx.array(eps), mx.square(x), shares(x.shape[-1]))) * weight
    return norm_of(eps)(x, weight)


@functools.cache
def shares(width):
    """(width, 1): a product with it is the mean."""
    return mx.array(np.full((width, 1), 1 / width, dtype=np.float32))


queueing = False       # set by queue_layers


@contextlib.contextmanager
def queue_layers():
    """While it is open, attention is queued as soon as it is built. MLX's CPU backend is never more than about a hundred
    operations ahead, a millisecond of decoding, and would wait for Python to build a whole model before it goes on."""
    global queueing
    queueing = True
    try:
        yield
    finally:
        queueing = False


def scaled_dot_product_attention(q, k, v, *, scale, mask=None, sinks=None, stream=None):
    """mx.fast.scaled_dot_product_attention, without sinks."""
    if sinks is not None or stream is not None or q.dtype != mx.float32:
        return PLAIN["scaled_dot_product_attention"](q, k, v, scale=scale, mask=mask, sinks=sinks, stream=stream)
    out = attend(q, k, v, scale, mask)
    if queueing:
        mx.async_eval(out)
    return out


def attend(q, k, v, scale, mask):
    """q (B, H, T, D), k and v (B, H_kv, S, D); mask: None, "causal", or booleans or numbers that broadcast to (B, H, T, S)."""
    B, H, T, D = q.shape
    _, groups, S, _ = k.shape
    if isinstance(mask, str):
        mask = mx.arange(S - T, S)[:, None] >= mx.arange(S)
    z = (scale * LOG2_E * q).reshape(B, groups, -1, D) @ k.swapaxes(-1, -2)                 # (B, H_kv, H / H_kv * T, S)
    if mask is not None:
        z = z.reshape(B, groups, -1, T, S)
        if mask.ndim > 2:                                                  # heads of their own, or all alike
            mask = mask.reshape(-1, groups, H // groups, *mask.shape[-2:]) if mask.shape[-3] > 1 else mask[..., None, :, :]
        z = mx.where(mask, z, mx.finfo(z.dtype).min) if mask.dtype == mx.bool_ else \
            z + mx.maximum(LOG2_E * mask.astype(z.dtype), mx.finfo(z.dtype).min)
        z = z.reshape(B, groups, -1, S)
    if T > 1:
        return attended(z, v)[0].reshape(B, H, T, -1)
    powers = mx.power(2.0, z - z.max(axis=-1, keepdims=True))
    return (powers @ v / powers.sum(axis=-1, keepdims=True)).reshape(B, H, T, -1)


@mx.custom_function
def attended(z, v):
    """(softmax of z ln 2 over the last axis times v, and what the gradient needs: 2^z and its sums)."""
    powers = mx.power(2.0, z - z.max(axis=-1, keepdims=True))
    total = sum_last(powers)
    return powers @ v / total, powers, total


@attended.vjp
def _(primals, cotangents, outputs):                # of v and the results: z is not held
    (_, v), (out, powers, total) = primals, outputs
    slope = cotangents[0] / total
    of_z = slope / LOG2_E
    return powers * (of_z @ v.swapaxes(-1, -2) - sum_last(of_z * out)), powers.swapaxes(-1, -2) @ slope
