"""Projection onto the vocabulary in chunks: equal to the plain pass, for every kind of head, with a fraction of its memory."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx_grpo
import numpy as np
import pytest
from conftest import require
from mlx.utils import tree_flatten
from mlx_grpo import MLXGRPOConfig, SplitModel, completion_logprobs, evaluate_pieces, load_model, pad_batch
from mlx_grpo.learner import prepare_trainable
from test_rollouts import chains, demo  # noqa: F401
from test_sampling import BASE, rollouts_of
from tiny_hf import save_tiny, save_tokenizer


def random_batch(vocab, B=3, L=5, T=9, seed=0):
    from mlx_grpo import Problem, Rollout

    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, vocab, n).tolist()
    rollouts = [Rollout(Problem("", None, {}), ids(L), [ids(T - i)], [[-1.0] * (T - i)], [[1] * (T - i)], [True], [""]) for i in range(B)]
    return pad_batch(rollouts)


def values_and_gradients(model, batch, entropy_gradient=True, **options):
    split, pieces = SplitModel(model), []
    assert split.name
    def loss(weights):
        model.update(weights)
        logprobs, entropy = completion_logprobs(split, batch, 0.8, entropy_gradient=entropy_gradient, pieces=pieces, **options)
        return (mx.where(batch.mask > 0, logprobs + 0.3 * entropy, 0)).sum(), (logprobs * batch.mask, entropy * batch.mask)
    weights = model.trainable_parameters()
    (_, values), gradients = mx.value_and_grad(loss)(weights)
    model.update(weights)
    evaluate_pieces(pieces)
    return [np.array(v) for v in values], {k: np.array(g) for k, g in tree_flatten(gradients)}


def assert_chunks_change_nothing(model, batch, monkeypatch, **options):
    values, gradients = values_and_gradients(model, batch, **options)
    for tokens in (1, 4, 7):
        monkeypatch.setattr(mlx_grpo, "HEAD_CHUNK", tokens * SplitModel(model).vocab_size)
        again, same = values_and_gradients(model, batch, **options)
        for a, b in zip(values, again):
            np.testing.assert_allclose(a, b, atol=2e-5)
        for name in gradients:
            np.testing.assert_allclose(gradients[name], same[name], atol=2e-4, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("family, changes", [("llama3", {}), ("qwen2.5", {"tie_word_embeddings": True}), ("gemma2", {})])
def test_untied_tied_and_soft_capped_heads(tmp_path, monkeypatch, family, changes):
    require("torch")
    save_tiny(tmp_path, family, **changes)
    save_tokenizer(tmp_path)
    model, _ = load_model(tmp_path)
    assert_chunks_change_nothing(model, random_batch(128), monkeypatch)


def test_a_head_with_adapters_on_a_quantised_base(monkeypatch):
    model, _ = load_model("data/demo_model")
    nn.quantize(model, 64, 4)
    prepare_trainable(model, MLXGRPOConfig(fine_tune_type="lora", lora_keys=["lm_head", "attn.c_q"]))
    assert any("lm_head" in name for name, _ in tree_flatten(model.trainable_parameters()))
    assert_chunks_change_nothing(model, random_batch(300), monkeypatch)


@pytest.mark.parametrize("cut", [{"top_k": 20}, {"top_p": 0.9, "repetition_penalty": 1.3}], ids=str)
def test_kept_sets_and_penalties(demo, monkeypatch, cut):  # noqa: F811
    config = replace(BASE, **cut)
    batch = pad_batch(rollouts_of(demo, config), vocab_size=300 if "repetition_penalty" in cut else 0)
    assert_chunks_change_nothing(demo[0], batch, monkeypatch, repetition_penalty=config.repetition_penalty)


def test_memory_is_that_of_a_chunk_and_not_of_the_batch(monkeypatch):
    from mlx_lm.models.qwen2 import Model, ModelArgs

    mx.random.seed(0)
    model = Model(ModelArgs("qwen2", 32, 1, 64, 2, 1e-6, 50_000, 2, rope_theta=1e4, tie_word_embeddings=False))
    batch = random_batch(50_000, B=8, T=128)
    peak = []
    for chunk in (2**40, 2**21):
        monkeypatch.setattr(mlx_grpo, "HEAD_CHUNK", chunk)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()      # other tests' models are still held
        values_and_gradients(model, batch, entropy_gradient=False)
        peak.append(mx.get_peak_memory() - before)
    assert peak[1] < peak[0] / 6
