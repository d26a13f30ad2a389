"""Truncated sampling: the distribution drawn from is the one that is scored, on the kept set, after the policy has moved too."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx_grpo import MLXGRPOConfig, Sampling, SplitModel, completion_logprobs, draw, load_model, pad_batch, sample_completions, train_sampling, vocabulary_of
from test_rollouts import chains
from test_trainer import CONFIG, make_trainer, steps

BASE = MLXGRPOConfig(temperature=1.3, system_prompt="", max_new_tokens=12, num_generations=8, seed=5)
CUTS = [{"top_p": 0.8, "top_k": 20}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 100, "min_p": 0.02},
        {"repetition_penalty": 1.4}, {"repetition_penalty": 1.2, "top_p": 0.8, "top_k": 20}]


@pytest.fixture(scope="module")
def demo():
    return load_model(ROOT / "data/demo_model")


def softer(model):
    """The demo's model with a flatter head, so that the cuts matter."""
    model.update({"lm_head": {"weight": model.lm_head.weight * 0.5}})
    return model


def rollouts_of(demo, config, problems=None):
    return sample_completions(*demo, problems or chains(7, 5), config, train_sampling(config), num_generations=8, step=1)


def scored(model, rollouts, config, restricted=True):
    """(trainer's log-probs, the sampler's), of all sampled tokens one after the other."""
    V = vocabulary_of(model) if config.repetition_penalty != 1 else 0
    batch = pad_batch(rollouts, vocab_size=V)
    if not restricted:
        batch = replace(batch, kept=mx.zeros((*batch.mask.shape, 0), dtype=mx.int32))
    logprobs = completion_logprobs(SplitModel(model), batch, config.temperature, config.repetition_penalty)[0]
    inside = np.array(batch.mask) > 0
    return np.array(logprobs)[inside], np.array(batch.sampler_logprobs)[inside]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_trainer_scores_what_the_sampler_drew_from(demo, cut):
    config = replace(BASE, **cut)
    rollouts = rollouts_of(demo, config)
    trainer, sampler = scored(demo[0], rollouts, config)
    np.testing.assert_allclose(trainer, sampler, atol=1e-4)


def test_scoring_without_the_kept_set_is_told_apart(demo):
    config = replace(BASE, top_p=0.8, top_k=20)
    trainer, sampler = scored(demo[0], rollouts_of(demo, config), config, restricted=False)
    assert np.abs(trainer - sampler).max() > 1e-2


def exact_distribution(logits, config):
    """NumPy float64: the distribution that transformers' warpers (top_k, then top_p, then min_p) leave of one logit row."""
    z = np.array(logits, dtype=np.float64) / config.temperature
    order = np.argsort(-z, kind="stable")
    p = np.exp(z[order] - z.max())
    if config.top_k:
        p[config.top_k:] = 0
    p /= p.sum()
    if config.top_p < 1:
        p[np.cumsum(p) - p >= config.top_p] = 0
    if config.min_p:
        p[p < config.min_p * p[0]] = 0
    found = np.zeros_like(z)
    found[order] = p / p.sum()
    return found


@pytest.mark.parametrize("cut", CUTS[:5], ids=str)
def test_draws_follow_the_truncated_distribution(cut):
    config, n = replace(BASE, **cut), 40_000
    logits = mx.array(np.random.default_rng(0).normal(scale=2, size=30).astype(np.float32))
    uniforms = mx.array((np.arange(n, dtype=np.float32) + 0.5) / n)            # a grid: the counts are nearly exact
    tokens, logprobs, kept = draw(mx.broadcast_to(logits, (n, 30)), uniforms, train_sampling(config))
    want = exact_distribution(logits, config)
    np.testing.assert_allclose(np.bincount(np.array(tokens), minlength=30) / n, want, atol=2e-4)
    np.testing.assert_allclose(np.array(logprobs), np.log(want[np.array(tokens)]), atol=1e-4)
    inside = {t for t in np.array(kept[0]).tolist() if t >= 0} if 0 < config.top_k <= 64 else set(np.flatnonzero(np.array(kept[0])))
    assert inside == set(np.flatnonzero(want))


def test_the_warpers_agree_with_transformers():
    from conftest import require

    torch, _ = require("torch"), require("transformers")
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(3)
    logits = rng.normal(scale=2, size=(1, 50)).astype(np.float32)
    context = torch.tensor([[1, 7, 7, 30]])
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(context, torch.tensor(logits)) / 0.9
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        theirs = warper(context, theirs)
    want = torch.log_softmax(theirs, -1).numpy()[0]
    seen = mx.array(np.isin(np.arange(50), context.numpy())[None])
    for uniform in (0.01, 0.3, 0.6, 0.95):
        token, logprob, kept = draw(mx.array(logits), mx.array([uniform]), Sampling(0.9, 20, 0.9, 0.02, 1.3), seen)
        assert logprob.item() == pytest.approx(want[token.item()], abs=1e-5)
        assert {t for t in np.array(kept[0]).tolist() if t >= 0} == set(np.flatnonzero(np.isfinite(want)))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_fresh_ratios_are_one_and_moved_ones_equal_those_of_the_full_distributions(cut):
    """After the policy has moved, the ratio on the kept set equals the quotient of the two exact distributions, both
    restricted to the set of the sampler; the mean ratio over the sampler's draws is 1 within its standard error."""
    model, tokenizer = load_model(ROOT / "data/demo_model")
    config = replace(BASE, **cut)
    rollouts = sample_completions(softer(model), tokenizer, chains(7, 7, 7), config, train_sampling(config), num_generations=24, step=1)
    fresh, sampler = scored(model, rollouts, config)
    np.testing.assert_allclose(np.exp(fresh - sampler), 1, atol=2e-4)
    rng = np.random.default_rng(0)
    weight = model.lm_head.weight
    model.update({"lm_head": {"weight": weight + mx.array(rng.normal(scale=0.01, size=weight.shape).astype(np.float32))}})
    moved, _ = scored(model, rollouts, config)
    ratios = np.exp(moved - sampler)
    assert np.abs(ratios - 1).max() > 0.05
    assert abs(ratios.mean() - 1) < 4 * ratios.std() / np.sqrt(len(ratios))
    exact = []
    for r in rollouts[:1]:
        for g, ids in enumerate(r.completion_ids):
            full = list(r.prompt_ids) + ids
            logits = np.array(model(mx.array([full]))).astype(np.float64)[0]
            for t, token in enumerate(ids):
                z = logits[len(r.prompt_ids) + t - 1]
                seen = np.unique(full[:len(r.prompt_ids) + t])
                z[seen] = np.where(z[seen] > 0, z[seen] / config.repetition_penalty, z[seen] * config.repetition_penalty)
                z = z / config.temperature
                inside = np.arange(len(z))
                if r.kept is not None and r.kept[g].dtype == np.uint8:
                    inside = np.flatnonzero(np.unpackbits(r.kept[g][t])[:len(z)])
                elif r.kept is not None:
                    inside = r.kept[g][t][r.kept[g][t] >= 0]
                exact.append(z[token] - np.log(np.exp(z[inside] - z.max()).sum()) - z.max())
    np.testing.assert_allclose(moved[:len(exact)], exact, atol=1e-4)


def test_kept_sets_are_ids_while_small_and_bits_beyond(demo):
    small, = rollouts_of(demo, replace(BASE, top_k=20), chains(7))
    large, = rollouts_of(demo, replace(BASE, top_p=0.9), chains(7))
    plain, = rollouts_of(demo, BASE, chains(7))
    assert small.kept[0].shape == (len(small.completion_ids[0]), 20) and small.kept[0].dtype == np.int32
    assert large.kept[0].shape == (len(large.completion_ids[0]), -(-vocabulary_of(demo[0]) // 8)) and large.kept[0].dtype == np.uint8
    assert plain.kept is None


def test_a_stop_text_ends_a_completion_and_stays_in_it(demo):
    config = replace(BASE, stop=["</reasoning>"], temperature=0.7)
    for r in rollouts_of(demo, config):
        for text, ended, ids in zip(r.texts, r.ended, r.completion_ids):
            assert ended == (text.endswith("</reasoning>") or ids[-1] in demo[1].eos_token_ids)
            assert text.count("</reasoning>") <= 1


def test_a_response_prefix_is_seen_by_rewards_and_not_trained(demo):
    plain, = rollouts_of(demo, BASE, chains(7))
    prefixed, = rollouts_of(demo, replace(BASE, response_prefix="<reasoning>"), chains(7))
    assert len(prefixed.prompt_ids) == len(plain.prompt_ids) + 1
    assert all(text.startswith("<reasoning>") for text in prefixed.texts)
    assert pad_batch([prefixed]).mask.sum().item() == sum(map(len, prefixed.completion_ids))


@pytest.mark.parametrize("cut", [{"top_p": 0.8, "top_k": 20}, {"min_p": 0.05, "repetition_penalty": 1.1}], ids=str)
def test_training_on_truncated_rollouts_reports_no_gap_when_fresh(tmp_path, cut):
    first, second = steps(make_trainer(tmp_path, replace(CONFIG, update_every=2, learning_rate=1e-3, temperature=1.5, num_generations=8, **cut)), 2)
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert first["sampling/effective_sample_size"] == pytest.approx(1, abs=1e-4)
    assert second["sampling/sampling_logp_difference/max"] > 1e-3
