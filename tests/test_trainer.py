"""The trainer: what one step is, which copies it makes, and that training moves what it should."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, require
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_grpo import (Learner, MLXGRPOConfig, MLXGRPOTrainer, Rollout, TrainerCallback, UserError, cast_floats, frozen_copy,
                      learning_rate_at, load_model, load_problems, prompt_order)

CONFIG = MLXGRPOConfig(
    model_name=str(ROOT / "data/demo_model"), dataset="synthetic:chain", system_prompt="", max_train_samples=32,
    rewards=["correctness", "strict_format"], num_generations=4, batch_size=2, gradient_accumulation_steps=2, max_steps=4,
    max_new_tokens=16, max_completion_length=16, temperature=1.0, learning_rate=1e-4, lr_scheduler_type="constant",
    max_grad_norm=1.0, update_every=1, eval_samples=0, eval_every_updates=0, save_steps=0, logging_steps=0, log_jsonl=False)


def make_trainer(tmp_path, config=CONFIG, **options):
    problems, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name)
    return MLXGRPOTrainer(model, tokenizer, config.rewards, config, problems, held_out, run_dir=tmp_path, **options)


def steps(trainer, n):
    """Metrics of n steps, without the run's saving and logging around them."""
    return [trainer.step() for _ in range(n)]


def weights(trainer):
    return {k: np.array(v.astype(mx.float32)) for k, v in tree_flatten(trainer.learner.master)}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(a[k] - b[k]).max() for k in a)


def numbers(metrics):
    """A step's metrics without times and memory."""
    machine = ("rollout_s", "step_time", "peak_gb", "save_s", "save_background_s", "watch/waiting")
    return {k: v for k, v in metrics.items() if k not in machine and not k.startswith(("machine/", "memory/", "health/machine/"))}


def test_how_a_step_is_cut_into_passes_changes_nothing(tmp_path):
    base = replace(CONFIG, learning_rate=1e-3, kl_coeff=0.1, update_every=2)
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(tmp_path, replace(base, batch_size=batch_size, gradient_accumulation_steps=accumulation))
        results.append((steps(trainer, 2), weights(trainer)))
    (a, wa), (b, wb) = results
    for x, y in zip(a, b):
        assert numbers(x) == pytest.approx(numbers(y), rel=1e-3, abs=1e-5)
    assert largest_difference(wa, wb) < 2e-5


def test_no_copy_is_made_that_is_not_needed(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.model_old is trainer.model and trainer.ref_model is None
    assert make_trainer(tmp_path, replace(CONFIG, update_every=2)).model_old is not trainer.model
    assert make_trainer(tmp_path, replace(CONFIG, kl_coeff=0.1)).ref_model is not None


def test_without_its_copy_the_numbers_are_the_same(tmp_path):
    """update_every = 1 samples from the model itself; a trainer that copies it each step gives the same run."""
    shared, copying = make_trainer(tmp_path), make_trainer(tmp_path)
    copying.sync_old = lambda calm=False: setattr(copying, "model_old", frozen_copy(copying.model))
    copying.sync_old()
    a, b = steps(shared, 3), steps(copying, 3)
    assert [numbers(m) for m in a] == [numbers(m) for m in b]
    assert largest_difference(weights(shared), weights(copying)) == 0


def test_a_frozen_copy_shares_its_arrays_until_the_model_moves():
    model, _ = load_model(CONFIG.model_name)
    before, count = mx.get_active_memory(), sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    twin = frozen_copy(model)
    assert mx.get_active_memory() - before < 0.2 * count
    kept = np.array(twin.lm_head.weight)
    model.update(cast_floats({"lm_head": {"weight": model.lm_head.weight + 1}}, mx.float32))
    np.testing.assert_array_equal(np.array(twin.lm_head.weight), kept)
    assert twin.trainable_parameters() == {} or not tree_flatten(twin.trainable_parameters())


def test_a_copy_of_weights_that_are_not_finite_is_refused():
    model, _ = load_model(CONFIG.model_name)
    model.lm_head.weight = model.lm_head.weight * float("nan")
    with pytest.raises(UserError, match="lm_head.weight holds NaN"):
        frozen_copy(model)


def test_on_policy_the_ratio_is_one_and_after_a_move_it_is_not(tmp_path):
    config = replace(CONFIG, update_every=3, learning_rate=1e-3, clip_eps=0.0)
    first, second, third = steps(make_trainer(tmp_path, config), 3)
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert second["sampling/sampling_logp_difference/max"] > 1e-2 and second["clip_ratio/region_mean"] > 0
    still = steps(make_trainer(tmp_path, replace(config, learning_rate=0.0)), 3)
    assert max(m["sampling/sampling_logp_difference/max"] for m in still) < 1e-4


def test_model_old_follows_every_update_every_steps(tmp_path):
    trainer = make_trainer(tmp_path, replace(CONFIG, update_every=2, learning_rate=1e-3))
    same = lambda: mx.array_equal(trainer.model.lm_head.weight, trainer.model_old.lm_head.weight).item()
    seen = []
    for _ in range(4):
        steps(trainer, 1)
        seen.append(same())
    assert seen == [False, True, False, True]


def test_kl_is_zero_at_the_start_grows_with_the_policy_and_holds_it_back(tmp_path):
    free, held = (make_trainer(tmp_path, replace(CONFIG, learning_rate=1e-3, kl_coeff=k)) for k in (1e-6, 5.0))
    a, b = steps(free, 4), steps(held, 4)
    assert a[0]["kl"] == pytest.approx(0, abs=1e-9) and a[-1]["kl"] > 1e-3
    assert b[-1]["kl"] < a[-1]["kl"]


def test_quantised_rollouts_sample_from_a_quantised_copy_and_still_train(tmp_path):
    trainer = make_trainer(tmp_path, replace(CONFIG, quantize_for_rollouts=True, update_every=2))
    assert any(name.endswith("scales") for name, _ in tree_flatten(trainer.model_old.parameters()))
    metrics = steps(trainer, 2)
    assert all(math.isfinite(m["loss"]) and m["sampling/sampling_logp_difference/max"] > 1e-4 for m in metrics)
    auto = make_trainer(tmp_path, replace(CONFIG, quantize_for_rollouts="auto"))
    assert auto.quantize_rollouts and auto.model_old is not auto.model


@pytest.mark.parity      # the CPU backend calls a C++ compiler for every fused kernel
def test_compiled_and_plain_steps_agree(tmp_path):
    plain, compiled = (make_trainer(tmp_path, replace(CONFIG, use_compile=flag, kl_coeff=0.1)) for flag in (False, True))
    a, b = steps(plain, 2), steps(compiled, 2)
    for x, y in zip(a, b):
        assert numbers(x) == pytest.approx(numbers(y), rel=1e-3, abs=1e-5)


def test_a_bfloat16_model_moves_as_far_as_a_float32_one():
    """100 AdamW updates at 1e-6: MLX's optimizer alone moves 2 % of bfloat16 weights."""
    moved = {}
    for dtype in (mx.float32, mx.bfloat16):
        model, _ = load_model(CONFIG.model_name, dtype="bfloat16")
        learner = Learner(model, replace(CONFIG, learning_rate=1e-6), dtype)
        start = {k: np.array(v) for k, v in tree_flatten(learner.master)}
        rng = np.random.default_rng(0)
        gradients = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
        for _ in range(100):
            learner.update(tree_unflatten([(k, mx.array(g)) for k, g in gradients.items()]), 1e-6)
        end = {k: np.array(v) for k, v in tree_flatten(learner.master)}
        moved[dtype] = np.mean([np.abs(end[k] - start[k]).mean() for k in start])
        assert all(v.dtype == mx.float32 for _, v in tree_flatten([learner.master, learner.optimizer.state]) if v.size > 1)
    assert moved[mx.bfloat16] >= 0.9 * moved[mx.float32] > 0


def test_training_in_bfloat16_steps_and_keeps_float32_weights(tmp_path):
    trainer = make_trainer(tmp_path, replace(CONFIG, dtype="bfloat16"))
    metrics = steps(trainer, 1)[0]
    assert math.isfinite(metrics["loss"]) and trainer.model.lm_head.weight.dtype == mx.bfloat16
    assert all(v.dtype == np.float32 for v in weights(trainer).values())


def test_adamw_step_equals_torch():
    torch = require("torch")
    model, _ = load_model(CONFIG.model_name)
    learner = Learner(model, replace(CONFIG, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5), mx.float32)
    start = np.array(learner.master["lm_head"]["weight"])
    rng = np.random.default_rng(1)
    mine = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([mine], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)
    zeros = cast_floats(learner.master, mx.float32)
    for _ in range(3):
        gradient = rng.normal(size=start.shape).astype(np.float32)
        full = tree_map(mx.zeros_like, zeros)
        full["lm_head"]["weight"] = mx.array(gradient)
        norm = learner.update(full, 1e-3)
        mine.grad = torch.tensor(gradient)
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_([mine], 0.5).item(), rel=1e-5)
        theirs.step()
    np.testing.assert_allclose(np.array(learner.master["lm_head"]["weight"]), mine.detach().numpy(), atol=1e-6)


def test_a_quantised_model_is_refused_for_full_fine_tuning(tmp_path):
    import mlx.nn as nn
    model, tokenizer = load_model(CONFIG.model_name)
    nn.quantize(model, 64, 4)
    with pytest.raises(UserError, match="only its norms.*--dequantize"):
        MLXGRPOTrainer(model, tokenizer, CONFIG.rewards, CONFIG, load_problems(CONFIG)[0], run_dir=tmp_path)


def test_gradients_that_are_not_finite_stop_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path)
    before = weights(trainer)
    with pytest.raises(UserError, match="gradient norm is nan"):
        trainer.learner.update(tree_map(lambda a: a * float("nan"), trainer.learner.master), 1e-3)
    assert largest_difference(before, weights(trainer)) == 0


def test_rollout_func_replaces_the_sampler_and_injected_tokens_are_not_trained(tmp_path):
    """A tool's output in the middle of a completion changes no gradient, whatever it is paid."""
    def rollouts(trainer, problems, injected):
        plain = trainer.generate_plain(problems)
        return [replace(r, env_mask=[[0] * len(ids) if injected else mask for ids, mask in zip(r.completion_ids, r.env_mask)])
                for r in plain]

    norms = []
    for injected in (False, True):
        trainer = make_trainer(tmp_path, rollout_func=lambda t, problems, i=injected: rollouts(t, problems, i))
        sampler = MLXGRPOTrainer.generate_responses
        def generate_plain(problems, t=trainer):
            function, t.rollout_func = t.rollout_func, None
            try:
                return sampler(t, problems)
            finally:
                t.rollout_func = function
        trainer.generate_plain = generate_plain
        norms.append(steps(trainer, 1)[0]["grad_norm"])
    assert norms[0] > 0 and norms[1] == 0


def test_a_malformed_rollout_is_refused(tmp_path):
    def bad(trainer, problems):
        return [Rollout(p, [1], [[1, 2]] * 4, [[0.0]] * 4, [[1, 1]] * 4, [True] * 4, ["x"] * 4) for p in problems]
    with pytest.raises(UserError, match="rollout_func.*equal lengths"):
        steps(make_trainer(tmp_path, rollout_func=bad), 1)


def test_callbacks_see_every_event_and_can_stop(tmp_path):
    seen = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, trainer):
            seen.append("begin")

        def on_step_end(self, trainer, metrics):
            seen.append(metrics["step"])
            metrics["mine"] = 7
            return metrics["step"] == 2

        def on_save(self, trainer, path):
            seen.append(path.name)

        def on_train_end(self, trainer):
            seen.append("end")

    trainer = make_trainer(tmp_path, callbacks=[Recorder()])
    assert trainer.train()["mine"] == 7
    assert seen == ["begin", 1, 2, "checkpoint-2", "end"]


def test_plain_rows_and_a_reward_function_are_enough_from_python(tmp_path):
    def brevity(completions, **kwargs):
        return [-float(len(c[0]["content"])) for c in completions]

    model, tokenizer = load_model(CONFIG.model_name)
    rows = [{"question": "3*7+2*9", "answer": "9"}, {"question": "1*3+2*7", "answer": "5"}]
    trainer = MLXGRPOTrainer(model, tokenizer, [brevity], replace(CONFIG, rewards=["int"]), rows, run_dir=tmp_path)
    assert steps(trainer, 1)[0]["rewards/brevity/mean"] < 0


def test_learning_rate_warms_up_then_follows_its_shape():
    rates = lambda kind: [learning_rate_at(s, 10, replace(CONFIG, learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type=kind))
                          for s in range(1, 11)]
    assert rates("constant") == [1.0] * 10
    assert rates("constant_with_warmup") == [0.5] + [1.0] * 9
    assert rates("linear")[:3] == [0.5, 1.0, 1.0] and rates("linear")[-1] == pytest.approx(1 / 8)
    cosine = rates("cosine")
    assert cosine[:3] == [0.5, 1.0, 1.0] and cosine[6] == pytest.approx(0.5) and cosine[-1] > 0


def test_every_epoch_visits_each_prompt_once_in_an_order_of_its_own():
    orders = [prompt_order(start, 2, 6, seed=0, shuffle=True) for start in range(0, 12, 2)]
    first, second = sum(orders[:3], []), sum(orders[3:], [])
    assert sorted(first) == sorted(second) == list(range(6)) and first != second
    assert prompt_order(0, 6, 6, 0, shuffle=False) == list(range(6))
    assert prompt_order(0, 5, 3, 0, False) == [0, 1, 2, 0, 1]          # a step larger than the data wraps around


@pytest.mark.seeds
@pytest.mark.parametrize("seed", range(5))
def test_the_demo_meets_its_bar(tmp_path, seed, capsys):
    from mlx_grpo import main, read_metrics
    main(["--config", str(ROOT / "configs/demo.toml"), "--set", f"seed={seed}", "--set", f"output_dir={tmp_path}"])
    scores = [m["eval/exact_match"] for m in read_metrics(tmp_path / "demo-1") if "eval/exact_match" in m]
    assert scores[0] <= 0.10 and scores[-1] >= 0.95
