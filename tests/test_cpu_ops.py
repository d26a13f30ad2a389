"""The CPU's versions of SwiGLU, rope, RMS norm and attention give MLX's values and gradients, and leave to MLX what they don't cover."""

import mlx.core as mx
import pytest
from mlx_grpo import cpu_ops, load_model
from mlx_lm.models import activations
from tiny_models import tiny_qwen2

RNG = mx.random.key(0)
normal = lambda *shape: mx.random.normal(shape, key=mx.random.split(RNG, 100)[sum(shape) % 100])


def silu_product(gate, x):
    return gate * mx.sigmoid(gate) * x


def assert_same(ours, plain, *arguments, tolerance=2e-6):
    """Values, and gradients to every argument for a random cotangent, relative to the largest value."""
    cotangent = normal(*plain(*arguments).shape)
    for a, b in zip(mx.vjp(ours, list(arguments), [cotangent]), mx.vjp(plain, list(arguments), [cotangent])):
        for x, y in zip(a, b):
            assert x.shape == y.shape and mx.abs(x - y).max().item() <= tolerance * max(mx.abs(y).max().item(), 1)


def test_swiglu_is_mlx_lms_for_small_and_large_arguments():
    assert_same(cpu_ops.swiglu, silu_product, normal(3, 50, 64), normal(3, 50, 64))
    assert_same(cpu_ops.swiglu, silu_product, normal(5, 64) * 40, normal(5, 64))
    assert mx.isfinite(mx.vjp(cpu_ops.swiglu, [mx.array([-500.0, 500.0]), mx.ones(2)], [mx.ones(2)])[1][0]).all()


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_rms_norm_is_mlxs(eps):
    plain = cpu_ops.PLAIN["rms_norm"]
    ours = lambda x, w: cpu_ops.rms_norm(x, w, eps)
    assert_same(ours, lambda x, w: plain(x, w, eps), 3 * normal(2, 600, 64), normal(64))
    assert_same(ours, lambda x, w: plain(x, w, eps), normal(2, 900, 4, 16) / 100, normal(16))
    assert_same(ours, lambda x, w: plain(x, w, eps), normal(2, 9, 64), normal(64))


@pytest.mark.parametrize("T,offset,base,scale", [(9, 0, 10000.0, 1.0), (1, 700, 1e6, 1.0), (33, 5, 1e4, 0.25), (9, 1, 1e4, 1.0)])
def test_rope_is_mlxs(T, offset, base, scale):
    options = dict(traditional=False, base=base, scale=scale, offset=offset)
    assert_same(lambda x: cpu_ops.rope(x, 32, **options), lambda x: cpu_ops.PLAIN["rope"](x, 32, **options), normal(2, 3, T, 32),
                tolerance=1e-4 if offset > 100 else 2e-5)       # MLX rounds its angles to float32


@pytest.mark.parametrize("offset", [mx.array([3, 700]), mx.array([0, 1]), mx.array(5)], ids=str)
def test_rope_of_one_token_a_row_is_mlxs(offset):
    options = dict(traditional=False, base=1e4, scale=0.5, offset=offset)
    assert_same(lambda x: cpu_ops.rope(x, 32, **options), lambda x: cpu_ops.PLAIN["rope"](x, 32, **options), normal(2, 3, 1, 32),
                tolerance=1e-4)


MASKS = {"none": lambda T, S: None, "causal": lambda T, S: "causal", "of rows": lambda T, S: mx.arange(S) > mx.array([1, 4])[:, None, None, None],
         "flat": lambda T, S: mx.arange(S) < mx.arange(T)[:, None] + 2, "added": lambda T, S: normal(T, S),
         "of heads": lambda T, S: normal(2, 4, T, S), "of one row's heads": lambda T, S: normal(4, T, S)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_mlxs(mask, T, kv_heads):
    S = 9
    options = dict(scale=0.25, mask=MASKS[mask](T, S))
    plain = cpu_ops.PLAIN["scaled_dot_product_attention"]
    assert_same(lambda *a: cpu_ops.scaled_dot_product_attention(*a, **options), lambda *a: plain(*a, **options),
                normal(2, 4, T, 16), normal(2, kv_heads, S, 16), normal(2, kv_heads, S, 8))


def test_attention_of_rows_that_see_nothing_and_of_huge_scores_stays_finite():
    q, k = 500 * normal(1, 2, 3, 16), 500 * normal(1, 2, 5, 16)
    for mask in (mx.zeros((3, 5), dtype=mx.bool_), mx.full((3, 5), mx.finfo(mx.float32).min), None):
        out = cpu_ops.scaled_dot_product_attention(q, k, k, scale=1.0, mask=mask)
        plain = cpu_ops.PLAIN["scaled_dot_product_attention"](q, k, k, scale=1.0, mask=mask)
        assert mx.isfinite(out).all() and mx.allclose(out, plain, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", [dict(dtype=mx.float16), dict(sinks=mx.zeros(2))], ids=str)
def test_other_attention_is_mlxs_to_the_last_bit(options):
    q, k = (normal(1, 2, n, 16).astype(options.get("dtype", mx.float32)) for n in (3, 5))
    sinks = options.get("sinks")
    ours = cpu_ops.scaled_dot_product_attention(q, k, k, scale=0.3, sinks=sinks)
    assert mx.array_equal(ours, cpu_ops.PLAIN["scaled_dot_product_attention"](q, k, k, scale=0.3, sinks=sinks)).item()


@pytest.mark.parametrize("options", [dict(traditional=True), dict(dims=16), dict(offset=mx.array([3, 4])), dict(dtype=mx.bfloat16),
                                     dict(freqs=mx.arange(1, 17).astype(mx.float32), base=None)])
def test_other_ropes_are_mlxs_to_the_last_bit(options):
    options = dict(dims=32, traditional=False, base=1e4, scale=1.0, offset=3) | options
    x = normal(2, 3, 5, 32).astype(options.pop("dtype", mx.float32))
    assert mx.array_equal(cpu_ops.rope(x, **options), cpu_ops.PLAIN["rope"](x, **options)).item()


def test_norms_in_half_precision_are_mlxs_to_the_last_bit():
    x, w = normal(4000, 32).astype(mx.float16), normal(32).astype(mx.float16)
    assert mx.array_equal(cpu_ops.rms_norm(x, w, 1e-6), cpu_ops.PLAIN["rms_norm"](x, w, 1e-6)).item()


def test_a_loaded_model_uses_them_on_the_cpu_and_gives_the_same_logits(tmp_path, monkeypatch):
    path = tiny_qwen2(tmp_path / "model")
    model, _ = load_model(path, dtype="float32")
    assert mx.default_device() != mx.cpu or activations.swiglu is cpu_ops.swiglu and mx.fast.rope is cpu_ops.rope
    ids = mx.array([[5, 6, 7, 8, 9, 10]])
    light = model(ids)
    for name, plain in cpu_ops.PLAIN.items():
        monkeypatch.setattr(mx.fast, name, plain)
    monkeypatch.setattr("mlx_lm.models.qwen2.swiglu", silu_product)
    assert mx.abs(light - model(ids)).max().item() < 2e-5
