"""The loss, its gradient and the advantages, against grpo-reference's frozen vectors and TRL's own code."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import require
from mlx_grpo import (LOSSES, gdpo_advantages, group_advantages, grpo_loss, importance_weights, merge_metrics,
                      rloo_advantages)

LOGP = [[-.10, -.50, -1.20, -.30, -.05], [-.70, -.20, -.90], [-1.50, -.40], [-.25, -.60, -.80, -.15]]
OLD = [[-.15, -.90, -1.10, -.30, -.10], [-.30, -.25, -.80], [-.90, -.45], [-.30, -.20, -1.50, -.15]]
REF = [[-.20, -.60, -1.00, -.40, -.10], [-.50, -.30, -1.00], [-1.20, -.50], [-.35, -.40, -1.10, -.20]]
ADVANTAGES = [1.0, -1.0, 0.5, -0.5]


def padded(rows, width=5):
    return mx.array([row + [0.0] * (width - len(row)) for row in rows])


ENTROPY = padded([[.30, 1.10, 1.80, .60, .10], [1.30, .40, 1.60], [1.90, .90], [.50, 1.20, 1.50, .35]])
SAMPLER = padded(OLD) + padded([[.02, -.03, .05, 0, .01], [.1, -.1, 0], [-.2, .3], [0, 0, .9, 0]])
LOGP, OLD, REF, MASK = padded(LOGP), padded(OLD), padded(REF), padded([[1.0] * len(row) for row in LOGP])


def loss_and_gradient(logp=LOGP, old=OLD, ref=REF, advantages=ADVANTAGES, mask=MASK, **options):
    """(loss, gradient with respect to logp) of grpo_loss with the vectors' defaults."""
    options = {"loss_type": "grpo", "clip_eps": 0.2, "clip_eps_high": 0.2, "kl_coeff": 0.0, "max_tokens": 8} | options
    if isinstance(options.get("is_weights"), tuple):
        options["is_weights"] = importance_weights(old, SAMPLER, mask, *options["is_weights"])
    value = lambda logp: grpo_loss(logp, old, ref, mx.array(advantages), mask, **options)[0]
    loss, gradient = mx.value_and_grad(value)(logp)
    return loss.item(), np.array(gradient)


@pytest.mark.parametrize("options, loss, gradient", [
    ({}, 0.021333552, 0.590415188),
    ({"loss_type": "bnpo"}, -0.058485754, 0.628288671),
    ({"loss_type": "dapo"}, -0.058485754, 0.628288671),
    ({"loss_type": "dr_grpo"}, -0.025587518, 0.274876294),
    ({"loss_type": "dapo", "clip_eps_high": 0.28}, -0.064200040, 0.628288671),
    ({"kl_coeff": 0.04, "kl_estimator": "k3_corrected"}, 0.021907903, 0.594189897),
    ({"kl_coeff": 0.04, "kl_estimator": "k3"}, 0.021955634, 0.594777329),
    ({"loss_type": "luspo"}, -0.204700140, 2.199010348),
    ({"loss_type": "luspo", "level": "sequence"}, -0.352749751, 2.735253980),
    ({"level": "sequence"}, -0.014161005, 0.717375559),
    ({"level": "sequence", "clip_eps": 3e-4, "clip_eps_high": 4e-4}, 0.041308768, 0.231376798),
    ({"loss_type": "dapo", "level": "sequence", "clip_eps": 3e-4, "clip_eps_high": 4e-4}, -0.041399114, 0.210175475),
    ({"loss_type": "dapo", "delta": 1.5}, -0.076834065, 0.556368931),
    ({"loss_type": "cispo", "clip_eps_high": 5.0}, 0.014602354, 0.806667583),
    ({"loss_type": "cispo", "clip_eps_high": 1.2}, 0.027430120, 0.756760365),
    ({"loss_type": "sapo"}, -0.046126903, 0.718115840),
    ({"loss_type": "vespo"}, 0.010260321, 0.557586318),
    ({"level": "sequence", "kl_coeff": 0.04, "kl_estimator": "k3_corrected"}, -0.013597307, 0.718492297),
    ({"loss_type": "dapo", "entropy": ENTROPY, "entropy_threshold": 1.0}, 0.052319324, 0.220782643),
    ({"loss_type": "dapo", "sampler_logprobs": SAMPLER, "off_policy_threshold": .10}, -0.429101498, 0.343387213),
    ({"loss_type": "dapo", "sampler_logprobs": SAMPLER, "off_policy_threshold": .14}, -0.255350648, 0.488566634),
    ({"loss_type": "dapo", "is_weights": ("token_truncate", 0, 3.0)}, -0.090538330, 0.582729020),
    ({"loss_type": "dapo", "is_weights": ("token_truncate", 0, 1.05)}, -0.091321593, 0.575226627),
    ({"loss_type": "dapo", "is_weights": ("token_mask", .5, 1.5)}, -0.119778714, 0.553488636),
    ({"loss_type": "dapo", "is_weights": ("sequence_truncate", 0, 3.0)}, -0.138016145, 0.522736497),
    ({"loss_type": "dapo", "is_weights": ("sequence_mask", .6, 1.5)}, -0.208657969, 0.463710949),
    ({"loss_type": "vespo", "is_weights": ("token_truncate", 0, 1.05)}, 0.067735650, 0.448500827),
    ({"entropy": ENTROPY, "entropy_coef": .01}, 0.011654981, 0.590415188),
    ({"loss_type": "rloo"}, 0.005264717, 0.853771227),
])
def test_loss_and_gradient_equal_the_reference_vectors(options, loss, gradient):
    got, grad = loss_and_gradient(**options)
    assert got == pytest.approx(loss, rel=1e-5)
    assert np.abs(grad).sum() == pytest.approx(gradient, rel=1e-4)


@pytest.mark.parametrize("kl_coeff, loss, gradient", [(0.0, 0.0, 0.75), (0.04, 0.000622082, 0.751325000)])
def test_on_policy_the_ratio_is_one_and_only_the_gradient_speaks(kl_coeff, loss, gradient):
    got, grad = loss_and_gradient(old=LOGP, kl_coeff=kl_coeff, kl_estimator="k3_corrected")
    assert got == pytest.approx(loss, abs=1e-7)
    assert np.abs(grad).sum() == pytest.approx(gradient, rel=1e-4)


def test_the_top_entropy_threshold_of_the_vectors_is_the_quantile_of_the_step():
    """dapo, top_entropy .2: the quantile of all trained tokens, kept at or above."""
    threshold = float(np.quantile(np.array(ENTROPY)[np.array(MASK) > 0], 0.8))
    loss, gradient = loss_and_gradient(loss_type="dapo", entropy=ENTROPY, entropy_threshold=threshold)
    assert loss == pytest.approx(-0.019600416, rel=1e-5) and np.abs(gradient).sum() == pytest.approx(0.148862904, rel=1e-4)


def test_a_sequence_ratio_that_is_not_divided_by_the_length_fails_the_gspo_vector():
    assert loss_and_gradient(level="sequence_sum")[0] != pytest.approx(-0.014161005, rel=1e-2)


def test_distillation_on_policy_is_the_token_mean_of_k1():
    teacher = (REF - LOGP) * MASK
    loss, gradient = loss_and_gradient(old=LOGP, advantages=teacher, loss_type="dapo")
    assert loss == pytest.approx(0.014285714, rel=1e-5) and np.abs(gradient).sum() == pytest.approx(0.142857143, rel=1e-4)


def test_gradient_rows_equal_the_reference_vectors():
    _, gradient = loss_and_gradient()
    np.testing.assert_allclose(gradient[0], [-.0525635548, 0, -.0452418709, -.05, -.0525635548], atol=1e-7)
    np.testing.assert_allclose(gradient[1, :3], [0, .0876059247, .0754031182], atol=1e-7)


def test_metrics_equal_the_reference_vectors():
    _, m = grpo_loss(LOGP, OLD, REF, mx.array(ADVANTAGES), MASK, loss_type="grpo", clip_eps=0.2, clip_eps_high=0.2,
                     kl_coeff=0.04, kl_estimator="k3_corrected")
    found = {k: v.item() for k, v in m.items()}
    assert found == pytest.approx({
        "kl": .014065, "clip_ratio/low_mean": 2 / 14, "clip_ratio/high_mean": 1 / 14, "clip_ratio/region_mean": 3 / 14,
        "clip_ratio/low_min": 0, "clip_ratio/high_max": .2}, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_splitting_the_rows_changes_neither_loss_nor_gradient_nor_metrics(loss_type, cut):
    options = dict(loss_type=loss_type, clip_eps=0.2, clip_eps_high=0.2, kl_coeff=0.04, max_tokens=8,
                   num_rows=mx.array(4), num_tokens=mx.array(14.0))
    whole = loss_and_gradient(**options)
    parts = [loss_and_gradient(LOGP[s], OLD[s], REF[s], ADVANTAGES[s], MASK[s], **options) for s in (slice(0, cut), slice(cut, 4))]
    assert sum(p[0] for p in parts) == pytest.approx(whole[0], rel=1e-5)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), whole[1], rtol=1e-5)
    metrics = lambda s: {k: v.item() for k, v in grpo_loss(LOGP[s], OLD[s], REF[s], mx.array(ADVANTAGES[s]), MASK[s], **options)[1].items()}
    merged = merge_metrics([metrics(slice(0, cut)), metrics(slice(cut, 4))])
    assert merged == pytest.approx(metrics(slice(0, 4)), rel=1e-5)


def test_padding_and_the_order_of_rows_change_nothing():
    wide = [mx.pad(x, [(0, 0), (0, 7)]) for x in (LOGP, OLD, REF, MASK)]
    order = mx.array([2, 0, 3, 1])
    shuffled = [x[order] for x in (LOGP, OLD, REF, MASK)]
    plain, grad = loss_and_gradient(kl_coeff=0.04)
    assert loss_and_gradient(*wide[:3], ADVANTAGES, wide[3], kl_coeff=0.04)[0] == pytest.approx(plain, rel=1e-5)
    value, moved = loss_and_gradient(*shuffled[:3], [ADVANTAGES[i] for i in order.tolist()], shuffled[3], kl_coeff=0.04)
    assert value == pytest.approx(plain, rel=1e-5)
    np.testing.assert_allclose(moved, grad[np.array(order)], rtol=1e-5)


def test_garbage_under_the_mask_does_not_reach_loss_or_gradient():
    nan = mx.where(MASK > 0, LOGP, mx.array(float("nan")))
    value, gradient = loss_and_gradient(nan, kl_coeff=0.04)
    assert value == pytest.approx(loss_and_gradient(kl_coeff=0.04)[0])
    assert np.isfinite(gradient).all() and (gradient[np.array(MASK) == 0] == 0).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_batch_without_a_trained_token_gives_zero_and_no_nan(loss_type):
    value, gradient = loss_and_gradient(mask=mx.zeros_like(MASK), loss_type=loss_type, kl_coeff=0.1)
    assert value == 0 and (gradient == 0).all()


def test_wild_ratios_stay_finite():
    value, gradient = loss_and_gradient(old=LOGP - 200, ref=LOGP + 100, kl_coeff=0.1, kl_estimator="k3_corrected")
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_kl_is_zero_at_the_reference_and_positive_on_both_sides():
    def kl_at(d):     # one token, zero advantage: the loss is the KL term alone, d = log(pi_theta/pi_ref)
        d, zero, one = mx.array([[d]]), mx.zeros((1, 1)), mx.ones((1, 1))
        return grpo_loss(d, d, zero, mx.zeros(1), one, loss_type="grpo", clip_eps=0.2, clip_eps_high=0.2, kl_coeff=1.0)[0].item()
    assert kl_at(0.0) == 0
    assert kl_at(0.5) == pytest.approx(0.106531, abs=1e-6)      # exp(-0.5) + 0.5 - 1
    assert kl_at(-0.5) == pytest.approx(0.148721, abs=1e-6)     # exp(0.5) - 0.5 - 1


def test_corrected_kl_has_the_unbiased_gradient_on_policy():
    """beta (l - l_ref) times the token's weight (grpo-reference, section 7)."""
    _, gradient = loss_and_gradient(old=LOGP, advantages=[0.0] * 4, loss_type="dapo", kl_coeff=0.04, kl_estimator="k3_corrected")
    np.testing.assert_allclose(gradient, np.array(0.04 * (LOGP - REF) * MASK / 14), atol=1e-8)


NAN = float("nan")


@pytest.mark.parametrize("rewards, scale, expected", [
    ([[1, 0, 0, 1], [2, 2, 2, 2]], "group", [[.865875, -.865875, -.865875, .865875], [0] * 4]),
    ([[1, 0, 0, 1], [2, 2, 2, 2]], "batch", [[.564012, -.564012, -.564012, .564012], [0] * 4]),
    ([[1, 0, 0, 1], [2, 2, 2, 2]], "none", [[.5, -.5, -.5, .5], [0] * 4]),
    ([[1.25, .25, 0, NAN], [1, .5, 1.5, 0]], "group", [[1.133722, -.377907, -.755815, 0], [.387238, -.387238, 1.161715, -1.161715]]),
    ([[1.25, .25, 0, NAN], [1, .5, 1.5, 0]], "batch", [[1.229432, -.409811, -.819622, 0], [.409811, -.409811, 1.229432, -1.229432]]),
    ([[1.25, .25, 0, NAN], [1, .5, 1.5, 0]], "none", [[.75, -.25, -.5, 0], [.25, -.25, .75, -.75]]),
    ([[NAN, NAN, 2, NAN], [1, 0, 0, 0]], "group", [[0] * 4, [1.499700, -.499900, -.499900, -.499900]]),
    ([[NAN] * 4, [NAN] * 4], "batch", [[0] * 4, [0] * 4]),
])
def test_advantages_equal_the_reference_vectors(rewards, scale, expected):
    np.testing.assert_allclose(group_advantages(rewards, scale), expected, atol=2e-6)


def test_rloo_and_gdpo_advantages_equal_the_reference_vectors():
    plain = [[1, 0, 0, 1], [2, 2, 2, 2]]
    third = 2 / 3
    np.testing.assert_allclose(rloo_advantages(plain), [[third, -third, -third, third], [0] * 4], atol=1e-6)
    np.testing.assert_allclose(rloo_advantages(plain, whiten=True)[0], np.array([1, -1, -1, 1]) * 1.322613, atol=2e-6)
    np.testing.assert_allclose(rloo_advantages([[1, 0, NAN, 1], [NAN, NAN, 2, NAN]]), [[.5, -1, 0, .5], [0] * 4], atol=1e-12)
    two = np.array([[(1, .5), (0, .5), (0, NAN), (NAN, NAN)], [(1, 0), (0, 1), (1, 1), (0, 0)]])
    np.testing.assert_allclose(gdpo_advantages(two, np.array([1, .5])), [
        [1.179415, -.589708, -.589708, 0], [.442281, -.442281, 1.326842, -1.326842]], atol=2e-6)


def test_rloo_is_the_unscaled_advantage_times_g_over_g_minus_1():
    rewards = np.random.default_rng(1).normal(size=(3, 5))
    np.testing.assert_allclose(rloo_advantages(rewards), group_advantages(rewards, "none") * 5 / 4, atol=1e-12)


def test_advantages_sum_to_zero_and_ignore_a_constant():
    rewards = np.random.default_rng(0).normal(size=(3, 8))
    for scale in ("group", "none"):
        np.testing.assert_allclose(group_advantages(rewards, scale).sum(axis=1), 0, atol=1e-12)
        np.testing.assert_allclose(group_advantages(rewards + 5, scale), group_advantages(rewards, scale), atol=1e-9)


# ---- TRL's own code --------------------------------------------------------------------------------------------------

def trl_loss(logp, old, ref, advantages, mask, *, loss_type, clip_eps, clip_eps_high, kl_coeff, corrected, max_tokens,
             level="token", delta=None, sampler=None, off_policy=None, entropy=None, top_entropy=1.0, is_weights=None):
    """(loss, gradient) by TRL's GRPOTrainer._compute_loss in float64, without a model or a trainer."""
    import types

    torch = require("torch")
    require("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    tensor = lambda x: torch.tensor(np.array(x), dtype=torch.float64)
    logp = tensor(logp).requires_grad_()
    accelerator = types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction=None: x, num_processes=1,
                                        pad_across_processes=lambda x, **_: x, unwrap_model=lambda m: m)
    args = types.SimpleNamespace(delta=delta, use_bias_correction_kl=corrected, steps_per_generation=1,
                                 sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
                                 vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, gradient_accumulation_steps=1)
    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp) if entropy is None else tensor(entropy), None),
        loss_type=loss_type, importance_sampling_level=level, epsilon_low=clip_eps, epsilon_high=clip_eps_high, beta=kl_coeff,
        top_entropy_quantile=top_entropy, off_policy_mask_threshold=off_policy, max_completion_length=max_tokens, args=args,
        current_gradient_accumulation_steps=1, use_vllm=is_weights is not None,
        vllm_importance_sampling_correction=is_weights is not None,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, accelerator=accelerator, temperature=1.0, entropy_coef=0.0,
        model=types.SimpleNamespace(training=True), _metrics={"train": __import__("collections").defaultdict(list)},
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask, get_gamma_weights=GRPOTrainer.get_gamma_weights,
        pad_token_id=0, _tokenizer=types.SimpleNamespace(pad_token_id=0))
    mask = tensor(mask)
    inputs = {"prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long), "prompt_mask": torch.ones(len(mask), 1),
              "completion_ids": torch.zeros(mask.shape, dtype=torch.long), "completion_mask": mask,
              "advantages": tensor(advantages), "old_per_token_logps": tensor(old), "ref_per_token_logps": tensor(ref),
              "num_items_in_batch": mask.sum()}
    fake.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, fake)
    if sampler is not None:
        inputs["sampling_per_token_logps"] = tensor(sampler)
    if is_weights is not None:
        inputs["importance_sampling_ratio"] = tensor(is_weights)
    loss = GRPOTrainer._compute_loss(fake, fake.model, inputs)
    loss.backward()
    return loss.item(), logp.grad.numpy()


def random_case(rng):
    B, T = rng.integers(1, 6), rng.integers(1, 12)
    lengths = rng.integers(1, T + 1, size=B)
    mask = (np.arange(T) < lengths[:, None]).astype(np.float32)
    logp = -rng.exponential(size=(B, T)).astype(np.float32) * mask
    near = lambda scale: ((logp + rng.normal(scale=scale, size=(B, T))) * mask).astype(np.float32)
    return logp, near(0.4), near(0.2), rng.normal(size=B).astype(np.float32), mask


def random_options(rng, sampler, entropy, old, mask):
    """(options for trl_loss, options for grpo_loss) that mean the same."""
    loss_type = str(rng.choice([name for name in LOSSES if name != "rloo"]))
    low, high = float(rng.uniform(0.05, 0.4)), float(rng.uniform(0.05, 0.6))
    shared = dict(loss_type=loss_type, clip_eps=low, clip_eps_high=float(rng.uniform(1, 5)) if loss_type == "cispo" else high,
                  kl_coeff=float(rng.choice([0, 0.04, 0.5])), max_tokens=16)
    theirs, ours = {"corrected": bool(rng.integers(2))}, {}
    ours["kl_estimator"] = "k3_corrected" if theirs["corrected"] else "k3"
    if loss_type != "vespo" and rng.integers(2):
        shared["level"] = "sequence"
    if loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo") and rng.integers(2):
        shared["delta"] = 1 + high + float(rng.uniform(0.1, 2))
    if rng.integers(3) == 0:
        theirs |= {"sampler": sampler, "off_policy": 0.1}
        ours |= {"sampler_logprobs": mx.array(sampler), "off_policy_threshold": 0.1}
    if rng.integers(3) == 0 and mask.sum() > 1:
        share = float(rng.uniform(0.2, 0.9))
        theirs |= {"entropy": entropy, "top_entropy": share}
        ours |= {"entropy": mx.array(entropy), "entropy_threshold": float(np.quantile(entropy[mask > 0].astype(np.float64), 1 - share))}
    if rng.integers(3) == 0:
        mode = str(rng.choice(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]))
        weights = importance_weights(mx.array(old), mx.array(sampler), mx.array(mask), mode, 0.5, 2.0)
        theirs["is_weights"], ours["is_weights"] = np.array(weights), weights
    return shared | theirs, shared | ours


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(200))
def test_random_options_equal_trl_live(seed):
    rng = np.random.default_rng(seed)
    logp, old, ref, advantages, mask = random_case(rng)
    sampler = ((old + rng.normal(scale=0.3, size=old.shape)) * mask).astype(np.float32)
    entropy = (rng.uniform(0.1, 2, size=old.shape) * mask).astype(np.float32)
    theirs, ours = random_options(rng, sampler, entropy, old, mask)
    want, want_gradient = trl_loss(logp, old, ref, advantages, mask, **theirs)
    got, gradient = loss_and_gradient(mx.array(logp), mx.array(old), mx.array(ref), advantages, mx.array(mask), **ours)
    assert got == pytest.approx(want, rel=1e-5, abs=2e-6), theirs
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=2e-6)


def test_the_reference_vectors_equal_trl_live():
    want, gradient = trl_loss(LOGP, OLD, REF, ADVANTAGES, MASK, loss_type="grpo", clip_eps=0.2, clip_eps_high=0.2, kl_coeff=0.04,
                              corrected=True, max_tokens=8)
    assert want == pytest.approx(0.021907903, abs=1e-8)
    assert np.abs(gradient).sum() == pytest.approx(0.594189897, abs=1e-7)
