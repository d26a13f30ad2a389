"""Rollouts: what the sampler records is what the trainer computes, and a row draws the same numbers in any company."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx_grpo import (MLXGRPOConfig, Problem, SplitModel, UserError, completion_logprobs, draw, load_model, make_rollout,
                      Sampling, pad_batch, prefill, row_uniforms, sample_completions, train_sampling)
from mlx_grpo.synthetic import generate

CONFIG = MLXGRPOConfig(temperature=0.7, system_prompt="", max_new_tokens=16, num_generations=4, seed=3)


@pytest.fixture(scope="module")
def demo():
    return load_model(ROOT / "data" / "demo_model")


def chains(*lengths, seed=0):
    """One problem of the demo's task for each length, as chat messages."""
    rows = [generate("chain", 1, seed + i, options={"length": n})[0] for i, n in enumerate(lengths)]
    return [Problem([{"role": "user", "content": r["question"]}], r["answer"], r) for r in rows]


def sample(demo, problems, step=1, config=CONFIG, **options):
    num_generations = options.pop("num_generations", config.num_generations)
    sampling = replace(train_sampling(config), **options)
    return sample_completions(*demo, problems, config, sampling, num_generations=num_generations, step=step)


def trainer_logprobs(model, rollouts, temperature):
    """Log-probs of each completion as the trainer computes them, rows of float arrays."""
    batch = pad_batch(rollouts, np.zeros((len(rollouts), len(rollouts[0].completion_ids))))
    logprobs = np.array(completion_logprobs(SplitModel(model), batch, temperature)[0])
    lengths = np.array(batch.mask).sum(1).astype(int)
    return [row[:n] for row, n in zip(logprobs, lengths)]


@pytest.mark.parametrize("lengths", [(7,), (7, 7, 7), (3, 7, 5)], ids=["alone", "one length", "mixed lengths"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampled_logprobs_equal_the_trainers_at_the_sampling_temperature(demo, lengths, temperature):
    rollouts = sample(demo, chains(*lengths), temperature=temperature)
    recorded = [np.array(row) for r in rollouts for row in r.logprobs]
    for row, again in zip(recorded, trainer_logprobs(demo[0], rollouts, temperature)):
        np.testing.assert_allclose(row, again, atol=1e-4)


def test_scoring_at_another_temperature_than_sampling_is_told_apart(demo):
    rollouts = sample(demo, chains(7, 7), temperature=0.7)
    recorded = np.concatenate([row for r in rollouts for row in r.logprobs])
    wrong = np.concatenate(trainer_logprobs(demo[0], rollouts, 1.0))
    assert np.abs(recorded - wrong).max() > 1e-2


def test_a_row_draws_the_same_alone_in_a_batch_and_in_small_batches(demo):
    problems = chains(3, 7, 5, 7, 6)
    together = sample(demo, problems)
    first = sample(demo, problems[:1])
    one_group_at_a_time = sample(demo, problems, config=replace(CONFIG, rollout_batch_size=1))
    assert first[0].completion_ids == together[0].completion_ids
    assert [r.completion_ids for r in one_group_at_a_time] == [r.completion_ids for r in together]


def test_more_generations_leave_the_first_rows_as_they_were(demo):
    few, many = sample(demo, chains(7)), sample(demo, chains(7), num_generations=12)
    assert many[0].completion_ids[:4] == few[0].completion_ids
    assert len({tuple(ids) for ids in many[0].completion_ids}) > 1


def test_seed_step_prompt_row_and_position_each_change_the_numbers_and_length_does_not():
    base = row_uniforms(1, 2, 3, 4, 8)
    for other in (row_uniforms(2, 2, 3, 4, 8), row_uniforms(1, 3, 3, 4, 8), row_uniforms(1, 2, 4, 4, 8), row_uniforms(1, 2, 3, 5, 8),
                  row_uniforms(1, 2, 3, 4, 8, stream=1)):
        assert not np.intersect1d(base, other).size
    assert len(set(base)) == 8
    np.testing.assert_array_equal(row_uniforms(1, 2, 3, 4, 20)[:8], base)
    assert base.dtype == np.float32 and (base > 0).all() and (base < 1).all()
    np.testing.assert_allclose(base[:3], [0.82967883, 0.42230242, 0.05205864], rtol=1e-6)    # pinned: a resume depends on them


def test_draws_follow_the_distribution_at_the_temperature():
    logits, temperature, n = mx.array([1.0, 0.0, -1.0, 2.0, -40.0]), 0.7, 20_000
    uniforms = mx.array(row_uniforms(0, 1, 0, 0, n))
    tokens, logprobs = draw(mx.broadcast_to(logits, (n, 5)), uniforms, Sampling(temperature))[:2]
    p = np.array(mx.softmax(logits / temperature))
    counts = np.bincount(np.array(tokens), minlength=5)
    expected = p[:4] * n
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3     # chi-square, 3 degrees of freedom, p = 0.001
    assert counts[4] == 0
    np.testing.assert_allclose(np.array(logprobs), np.log(p)[np.array(tokens)], atol=1e-5)


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token():
    logits = mx.array([[-1e9, 0.0, -1e9, 1.0, -1e9]])
    for uniform, token in ((2.0**-24, 1), (1 - 2.0**-24, 3)):
        assert draw(logits, mx.array([uniform]), Sampling(1.0))[0].item() == token


def test_temperature_zero_takes_the_best_token():
    tokens, logprobs = draw(mx.array([[0.0, 3.0, 1.0]]), mx.array([0.99]), Sampling(0.0))[:2]
    assert tokens.item() == 1 and logprobs.item() == pytest.approx(3 - np.log(1 + np.exp(3) + np.e), abs=1e-5)


def test_greedy_completions_equal_a_full_forward_pass_without_cache(demo):
    model, tokenizer = demo
    problem, = chains(7)
    rollout, = sample(demo, [problem], temperature=0.0, num_generations=1)
    ids = list(rollout.prompt_ids)
    for token in rollout.completion_ids[0]:
        assert mx.argmax(model(mx.array([ids]))[0, -1]).item() == token
        ids.append(token)
    assert rollout.ended == [True] and ids[-1] in tokenizer.eos_token_ids


def test_completions_keep_the_end_token_and_nothing_after_it(demo):
    model, tokenizer = demo
    for r in sample(demo, chains(7, 5), num_generations=8):
        for ids, ended, logprobs, mask in zip(r.completion_ids, r.ended, r.logprobs, r.env_mask):
            ends = [i for i, token in enumerate(ids) if token in tokenizer.eos_token_ids]
            assert ends == ([len(ids) - 1] if ended else [])
            assert len(ids) == len(logprobs) == len(mask) and all(mask)
            assert ended or len(ids) == 16


def test_max_new_tokens_cuts_and_is_told(demo):
    r, = sample(demo, chains(7), max_new_tokens=3)
    assert [len(ids) for ids in r.completion_ids] == [3] * 4 and not any(r.ended)


def test_each_prompt_is_prefilled_once_and_ended_rows_leave_the_batch(demo):
    """Rows forwarded while decoding stay below twice the sampled tokens: compaction at half."""
    model, tokenizer = demo
    rows = []

    class Counting:
        layers = model.layers

        def __call__(self, tokens, cache=None):
            rows.append(tokens.shape)
            return model(tokens, cache=cache)

    rollouts = sample((Counting(), tokenizer), chains(7, 5, 3), num_generations=8)
    sampled = sum(len(ids) for r in rollouts for ids in r.completion_ids)
    assert sum(shape[1] > 1 for shape in rows) == 3
    assert sum(shape[0] for shape in rows if shape[1] == 1) < 2 * sampled


def test_a_logprob_that_is_not_finite_stops_with_advice(demo):
    with pytest.raises(UserError, match="quantize_for_rollouts = false"):
        make_rollout(demo[1], chains(7)[0], [1], [[5]], [[float("nan")]])


def test_padding_reaches_neither_the_logprobs_nor_the_mask(demo):
    rollouts = sample(demo, chains(3, 7))
    narrow, wide = (pad_batch(rollouts, np.zeros((2, 4)), least=m) for m in (1, 64))
    for batch in (narrow, wide):
        assert batch.mask.sum().item() == sum(len(ids) for r in rollouts for ids in r.completion_ids)
    split = SplitModel(demo[0])
    a, b = (np.array(completion_logprobs(split, x, 0.7)[0] * x.mask) for x in (narrow, wide))
    np.testing.assert_allclose(a, b[:, :a.shape[1]], atol=1e-5)


def test_truncated_rows_and_injected_tokens_leave_the_mask(demo):
    r, = sample(demo, chains(7), max_new_tokens=3)
    assert pad_batch([r], np.zeros((1, 4)), mask_truncated=True).mask.sum().item() == 0
    injected = replace(r, env_mask=[[1, 0, 1]] * 4)
    assert pad_batch([injected], np.zeros((1, 4))).mask.sum().item() == 8


def test_entropy_is_that_of_the_full_distribution_at_the_temperature(demo):
    model, _ = demo
    rollouts = sample(demo, chains(7))
    batch = pad_batch(rollouts, np.zeros((1, 4)))
    entropy = np.array(completion_logprobs(SplitModel(model), batch, 0.7)[1])
    r = rollouts[0]
    logits = np.array(model(mx.array([list(r.prompt_ids) + r.completion_ids[0]])))[0].astype(np.float64) / 0.7
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    want = -(p * np.log(p + 1e-300)).sum(-1)[len(r.prompt_ids) - 1:-1]
    np.testing.assert_allclose(entropy[0, :len(want)], want, atol=1e-4)


def test_of_a_long_prompt_only_the_last_pieces_logits_are_computed(demo):
    """The head multiplied by 40 copies of itself: what computes 64 rows of it holds 64 x 40 x V numbers."""
    model, _ = demo
    ids, wide = list(range(5, 134)), []

    def widened(tokens, cache=None):
        logits = model(tokens, cache=cache)
        wide.append(logits.shape[-1])
        return mx.concatenate([logits] * 40, axis=-1)

    widened.layers = model.layers
    plain = model(mx.array([ids]))[:, -1]
    mx.eval(plain)
    peaks = []
    for chunk in (64, 129):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        _, logits = prefill(widened, ids, chunk=chunk)
        peaks.append(mx.get_peak_memory() - before)
        np.testing.assert_allclose(np.array(logits[:, :wide[0]]), np.array(plain), atol=1e-4)
    assert peaks[0] < 64 * 40 * wide[0] * 4 < peaks[1]
