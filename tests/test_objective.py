"""The objective in the trainer: recipes, contradictions, several updates for each rollout, dynamic sampling, KL, entropy,
proximal old log-probs, healing, distillation."""

import itertools
import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from mlx_grpo import (KL_ESTIMATORS, LOSSES, RECIPES, ConfigError, MLXGRPOConfig, MLXGRPOTrainer, UserError, load_config, load_model,
                      load_problems, options_without_effect, overlong_punishment)
from test_trainer import CONFIG, largest_difference, make_trainer, numbers, steps, weights

MOVING = replace(CONFIG, learning_rate=1e-3)


@pytest.mark.parametrize("loss, level, kl, advantage", list(itertools.product(
    LOSSES, ("token", "sequence"), KL_ESTIMATORS, ("group", "rloo", "gdpo"))))
def test_every_combination_works_or_is_refused_by_name(loss, level, kl, advantage):
    options = dict(loss_type=loss, importance_sampling_level=level, kl_estimator=kl, kl_coeff=0.1, advantage=advantage,
                   clip_eps_high=5.0 if loss == "cispo" else -1.0)
    if loss in ("vespo", "rloo") and level == "sequence":
        with pytest.raises(ConfigError, match=loss):
            MLXGRPOConfig(**options)
        return
    MLXGRPOConfig(**options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", [(1, 4), (4, 1)], ids=str)
def test_every_loss_steps_and_how_it_is_split_changes_nothing(tmp_path, loss, split):
    config = replace(MOVING, loss_type=loss, clip_eps_high=5.0 if loss == "cispo" else -1.0, update_every=2, kl_coeff=0.05,
                     entropy_coef=0.01, top_entropy_quantile=0.8, off_policy_threshold=0.5)
    whole = make_trainer(tmp_path, replace(config, batch_size=2, gradient_accumulation_steps=2))
    parts = make_trainer(tmp_path, replace(config, batch_size=split[0], gradient_accumulation_steps=split[1]))
    a, b = steps(whole, 2), steps(parts, 2)
    for x, y in zip(a, b):
        assert numbers(x) == pytest.approx(numbers(y), rel=2e-3, abs=2e-5)
    assert largest_difference(weights(whole), weights(parts)) < 5e-5


@pytest.mark.parametrize("options, text", [
    ({"loss_type": "grop"}, "did you mean 'grpo'"), ({"loss_type": "cispo"}, "clip_eps_high = 5.0"),
    ({"loss_type": "sapo", "delta": 4.0}, "delta has no place"), ({"delta": 1.1}, "inside the clip range"),
    ({"kl_in": "reward", "advantage": "gdpo"}, "never forms"), ({"ref_sync_steps": 5}, "kl_coeff above 0"),
    ({"normalize_advantages": True}, "advantage rloo"), ({"advantage": "rloo", "scale_rewards": "none"}, "advantage group"),
    ({"objective": "distill"}, "set both"), ({"teacher_model": "x"}, "set both"), ({"rollout_bits": 5}, "rollout_bits must be"),
    ({"rollout_bits": [4, 8, 0, 5]}, "rollout_bits must be"), ({"rollout_bits": [0]}, "rollout_bits must be"),
    ({"rollout_precision": {"lm_head": 5}}, "rollout_precision"), ({"stop": [""]}, "empty text"),
    ({"overlong_cache": 4000}, "more than max_completion_length"),
])
def test_contradictions_are_refused_with_the_remedy(options, text):
    with pytest.raises(ConfigError, match=text):
        MLXGRPOConfig(**options)


def test_options_that_can_have_no_effect_are_named():
    lines = lambda *sets: options_without_effect(*load_config(sets=sets))
    assert lines("update_every=1", "clip_eps=0.3") == ["clip_eps has no effect: one update for each rollout, on policy: the ratio is 1"]
    assert lines("update_every=1", "clip_eps=0.3", "num_iterations=2") == [] == lines()
    assert lines("kl_estimator=k1", "rollout_bits=8") == ["kl_estimator has no effect: kl_coeff is 0",
                                                          "rollout_bits has no effect: quantize_for_rollouts is false"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_its_options_below_file_and_command_line(recipe):
    config, sources = load_config(sets=[f"recipe={recipe}", "num_generations=6"])
    for name, value in RECIPES[recipe].items():
        if name != "num_generations":
            assert vars(config)[name] == value and sources[name] == f"recipe {recipe}"
    assert config.num_generations == 6 and sources["num_generations"] == "--set"
    assert MLXGRPOConfig(recipe=recipe, num_generations=6) == config            # and in Python alike


def test_several_passes_use_real_old_logprobs_and_take_the_rewards_once(tmp_path):
    trainer = make_trainer(tmp_path, replace(MOVING, num_iterations=3, learning_rate=3e-3, clip_eps=0.01))
    first, second, third = steps(trainer, 3)
    assert first["sampling/sampling_logp_difference/max"] < 1e-4 and first["clip_ratio/region_mean"] == 0
    assert third["clip_ratio/region_mean"] > 0 and third["sampling/sampling_logp_difference/max"] > 1e-2
    assert first["reward"] == third["reward"] and first["num_tokens"] == third["num_tokens"] and third["rollout_s"] == 0
    assert steps(trainer, 1)[0]["num_tokens"] > third["num_tokens"]
    still = make_trainer(tmp_path, replace(MOVING, num_iterations=2, learning_rate=0.0))
    assert max(m["sampling/sampling_logp_difference/max"] for m in steps(still, 2)) < 1e-4


def test_minibatches_share_one_rollout_batch_with_prompts_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, replace(MOVING, minibatches=2, num_iterations=2))
    found = steps(trainer, 5)
    assert [m["rollout_s"] > 0 for m in found] == [True, False, False, False, True]
    assert trainer.prompts_drawn == 2 * 2 * trainer.args.prompts_per_step
    assert found[0]["sampling/sampling_logp_difference/max"] < 1e-4 < found[1]["sampling/sampling_logp_difference/max"]


@pytest.mark.parametrize("options", [
    {"num_iterations": 2, "minibatches": 2, "kl_coeff": 0.05}, {"dynamic_sampling": True, "num_iterations": 2},
    {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "num_iterations": 3}, {"kl_coeff": 0.1, "ref_sync_steps": 2},
    {"entropy_adaptive": True, "entropy_target": 5.0}, {"quantize_for_rollouts": True, "num_iterations": 2, "update_every": 3},
], ids=str)
def test_a_run_resumed_inside_a_rollout_batch_is_the_run_that_went_on(tmp_path, options):
    config = replace(MOVING, **options)
    whole = make_trainer(tmp_path, config)
    before = steps(whole, 3)
    whole.save_checkpoint(tmp_path / "checkpoint-3")
    resumed = make_trainer(tmp_path, config)
    resumed.load_checkpoint(tmp_path / "checkpoint-3")
    a, b = steps(whole, 3), steps(resumed, 3)
    assert [numbers(m) for m in a] == [numbers(m) for m in b] and before
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ(tmp_path):
    trainer = make_trainer(tmp_path, replace(MOVING, dynamic_sampling=True, rewards=["correctness"], num_generations=2))
    metrics = steps(trainer, 1)[0]
    assert metrics["frac_reward_zero_std"] == 0 and metrics["dynamic_sampling/dropped_groups"] > 0
    assert metrics["dynamic_sampling/rounds"] > 1 and trainer.prompts_drawn > trainer.args.prompts_per_step
    plain = steps(make_trainer(tmp_path, replace(MOVING, rewards=["correctness"], num_generations=2)), 1)[0]
    assert plain["frac_reward_zero_std"] > 0


def test_dynamic_sampling_gives_up_after_its_cap_and_says_so(tmp_path, capsys):
    def always(completions, **_):
        return [1.0] * len(completions)

    problems, _ = load_problems(CONFIG)
    model, tokenizer = load_model(CONFIG.model_name)
    config = replace(MOVING, dynamic_sampling=True, max_gen_batches=2)
    trainer = MLXGRPOTrainer(model, tokenizer, [always], config, problems, run_dir=tmp_path)
    metrics = steps(trainer, 1)[0]
    assert metrics["dynamic_sampling/rounds"] == 2 and metrics["grad_norm"] == 0
    assert "0 of 4 groups have different rewards after 2 rounds" in capsys.readouterr().err


def test_rows_without_advantage_cost_no_pass_and_change_no_update(tmp_path):
    skipping, computing = make_trainer(tmp_path, MOVING), make_trainer(tmp_path, MOVING)
    computing.rows_that_count = lambda batches: ([list(range(len(b.mask))) for b in batches], 1.0)
    rows = []
    part = skipping.part
    skipping.part = lambda batch, chosen, way: rows.append(len(chosen)) or part(batch, chosen, way)
    a, b = steps(skipping, 2), steps(computing, 2)
    assert sum(rows) < 2 * 16
    assert [m["grad_norm"] for m in a] == pytest.approx([m["grad_norm"] for m in b], rel=1e-4)
    assert largest_difference(weights(skipping), weights(computing)) < 2e-5


def test_a_batch_of_truncated_rows_gives_no_gradient_and_a_warning(tmp_path, capsys):
    config = replace(MOVING, mask_truncated_completions=True, max_new_tokens=2)
    metrics = steps(make_trainer(tmp_path, config), 1)[0]
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0 and metrics["completions/clipped_ratio"] == 1
    assert "raise max_new_tokens" in capsys.readouterr().err


def test_a_completion_that_ends_at_once_trains_its_end_token():
    from mlx_grpo import Problem, make_rollout, pad_batch

    tokenizer = load_model(CONFIG.model_name)[1]
    rollout = make_rollout(tokenizer, Problem("x", None, {}), [5, 6], [[tokenizer.eos_token_id]], [[-0.5]])
    assert rollout.ended == [True] and rollout.texts == [""] and pad_batch([rollout]).mask.sum().item() == 1


def test_a_step_in_which_no_reward_applies_is_an_error(tmp_path):
    def never(completions, **_):
        return [None] * len(completions)

    model, tokenizer = load_model(CONFIG.model_name)
    trainer = MLXGRPOTrainer(model, tokenizer, [never], CONFIG, load_problems(CONFIG)[0], run_dir=tmp_path)
    with pytest.raises(UserError, match="every reward function returned None"):
        steps(trainer, 1)


def test_kl_in_the_reward_lowers_it_by_the_summed_k1(tmp_path):
    config = replace(MOVING, kl_coeff=0.5, kl_in="reward", advantage="rloo", learning_rate=1e-2)
    metrics = steps(make_trainer(tmp_path, config), 3)
    functions = lambda m: m["rewards/correctness/mean"] + m["rewards/strict_format/mean"]
    assert metrics[0]["reward"] == pytest.approx(functions(metrics[0]), abs=1e-3)
    assert abs(metrics[2]["reward"] - functions(metrics[2])) > 1e-3


def test_the_reference_follows_by_its_mix(tmp_path):
    trainer = make_trainer(tmp_path, replace(MOVING, kl_coeff=0.1, ref_sync_steps=2, ref_sync_mix=0.25))
    start = np.array(trainer.ref_model.lm_head.weight)
    steps(trainer, 1)
    np.testing.assert_array_equal(np.array(trainer.ref_model.lm_head.weight), start)
    steps(trainer, 1)
    want = 0.25 * np.array(trainer.model.lm_head.weight) + 0.75 * start
    np.testing.assert_allclose(np.array(trainer.ref_model.lm_head.weight), want, atol=1e-7)


def test_the_entropy_bonus_raises_entropy_and_adapts(tmp_path):
    plain, bonus = (steps(make_trainer(tmp_path, replace(MOVING, entropy_coef=c)), 4)[-1]["entropy"] for c in (0.0, 1.0))
    assert bonus > plain
    adaptive = make_trainer(tmp_path, replace(MOVING, entropy_adaptive=True, entropy_target=5.0, entropy_step=0.1))
    assert [round(m["entropy_coef"], 6) for m in steps(adaptive, 3)] == [0.0, 0.1, 0.2]
    down = make_trainer(tmp_path, replace(MOVING, entropy_adaptive=True, entropy_coef=0.15, entropy_target=0.0, entropy_step=0.1))
    assert [round(m["entropy_coef"], 6) for m in steps(down, 3)] == [0.15, 0.05, 0.0]


def test_overlong_punishment_is_dapos():
    np.testing.assert_allclose(overlong_punishment(np.array([1, 16384, 18432, 20480, 30000]), 20480, 4096), [0, 0, -.5, -1, -1])


def test_overlong_punishment_enters_the_reward(tmp_path):
    plain, punished = (steps(make_trainer(tmp_path, replace(CONFIG, overlong_cache=c)), 1)[0]["reward"] for c in (0, 16))
    assert punished < plain


def test_quantised_rollouts_take_proximal_old_logprobs_and_correct_for_the_sampler(tmp_path):
    config = replace(MOVING, quantize_for_rollouts=True, update_every=3, rollout_bits=3, sampler_correction="token_truncate",
                     sampler_clip_max=1.01)
    first = steps(make_trainer(tmp_path, config), 1)[0]
    assert first["clip_ratio/region_mean"] == 0                          # proximal: the ratio starts at 1
    assert first["sampling/importance_sampling_ratio/max"] == pytest.approx(1.01) and first["sampling/importance_sampling_ratio/min"] < 1
    assert 0 < first["sampling/effective_sample_size"] < 1
    by_sampler = steps(make_trainer(tmp_path, replace(config, old_logprobs="sampler", clip_eps=0.001)), 1)[0]
    assert by_sampler["clip_ratio/region_mean"] > 0 and by_sampler["sampling/importance_sampling_ratio/max"] == 1


def test_chosen_modules_keep_more_bits(tmp_path):
    config = replace(MOVING, quantize_for_rollouts=True, rollout_precision={"lm_head": 8, "transformer.h.0": 0})
    old = make_trainer(tmp_path, config).model_old
    assert old.lm_head.bits == 8 and old.layers[1].mlp.c_fc.bits == 4 and "scales" not in old.layers[0].mlp.c_fc
    with pytest.raises(ConfigError, match="no module 'nowhere'"):
        make_trainer(tmp_path, replace(config, rollout_precision={"nowhere": 8}))


def overflowing_demo(path):
    """The demo's model in float16 with one row group of a matrix at +6e4 and -6e4, on two inputs that are always 0: full
    precision is finite, its 4-bit copy is NaN, because the range of that group is more than float16 holds."""
    from mlx_grpo import save_arrays

    model, tokenizer = load_model(CONFIG.model_name)
    block = model.layers[1].mlp
    fc, proj = np.array(block.c_fc.weight), np.array(block.c_proj.weight)
    fc[:2] = 0                                       # relu(0)^2 = 0: these two channels never speak
    proj[0, 0], proj[0, 1] = 6e4, -6e4
    block.c_fc.weight, block.c_proj.weight = mx.array(fc), mx.array(proj)
    path.mkdir()
    save_arrays(path / "model.safetensors", dict(tree_flatten(model.parameters())))
    (path / "config.json").write_text((model.source_path / "config.json").read_text())
    tokenizer.save_pretrained(path)
    return str(path)


def test_an_overflow_of_quantisation_heals_and_without_healing_stops(tmp_path, capsys):
    config = replace(MOVING, model_name=overflowing_demo(tmp_path / "model"), dtype="float16", quantize_for_rollouts=True,
                     rollout_bits=[4, 0], max_steps=2, learning_rate=1e-5, log_jsonl=True)
    trainer = make_trainer(tmp_path / "run", config)
    metrics = trainer.train()
    assert metrics["rollout_bits"] == 0 and metrics["healed"] == 1 and math.isfinite(metrics["loss"])
    assert all(np.isfinite(w).all() for w in weights(trainer).values())
    assert capsys.readouterr().err.count("rollouts go on with full bits") == 1
    with pytest.raises(UserError, match="not finite on a probe"):
        make_trainer(tmp_path / "off", replace(config, self_healing=False))


def test_a_gap_beyond_its_limit_redoes_the_step_one_rung_up_and_calm_syncs_step_down(tmp_path):
    config = replace(MOVING, quantize_for_rollouts=True, rollout_bits=[2, 8], max_logp_gap=0.02, update_every=1, calm_syncs=2,
                     learning_rate=1e-6)
    trainer = make_trainer(tmp_path, config)
    bits = [m["rollout_bits"] for m in steps(trainer, 4)]
    assert bits[0] == 8 and trainer.healed >= 1 and trainer.step_count == 4
    assert trainer.healed > 1                          # it stepped back down after two calm syncs, and climbed again
    stopped = make_trainer(tmp_path, replace(config, rollout_bits=2))
    before = weights(stopped)
    with pytest.raises(UserError, match="max_logp_gap"):
        steps(stopped, 1)
    assert largest_difference(before, weights(stopped)) == 0 and stopped.step_count == 0


def test_a_failure_at_full_precision_saves_the_last_good_state_and_what_failed(tmp_path):
    from mlx.utils import tree_map
    from mlx_grpo import TrainerCallback

    class Poison(TrainerCallback):
        def on_gradients(self, trainer, gradients):
            return tree_map(lambda g: g * (math.nan if trainer.step_count == 2 else 1), gradients)

    trainer = make_trainer(tmp_path, replace(MOVING, log_jsonl=True), callbacks=[Poison()])
    with pytest.raises(UserError, match="gradient norm is nan.*step 3"):
        trainer.train()
    assert json.loads((tmp_path / "failure.json").read_text())["step"] == 3
    saved = mx.load(str(tmp_path / "checkpoint-2/model.safetensors"))
    assert all(np.isfinite(np.array(a)).all() for a in saved.values())


def test_a_loss_of_ones_own_is_used_and_checked(tmp_path):
    file = tmp_path / "my_loss.py"
    file.write_text("import mlx.core as mx\n"
                    "def plain(t):\n    return t.A * t.logprobs\n"
                    "def coupled(t):\n    return t.A * t.logprobs - t.logprobs.mean()\n"
                    "def wrong():\n    return 0\n")
    same = steps(make_trainer(tmp_path, replace(MOVING, loss_type=f"{file}:plain")), 2)
    built_in = steps(make_trainer(tmp_path, replace(MOVING, loss_type="dapo")), 2)
    assert [m["grad_norm"] for m in same] == pytest.approx([m["grad_norm"] for m in built_in], rel=1e-3)
    with pytest.raises(ConfigError, match="when a batch is split"):
        make_trainer(tmp_path, replace(MOVING, loss_type=f"{file}:coupled"))
    with pytest.raises(ConfigError, match="TypeError"):
        make_trainer(tmp_path, replace(MOVING, loss_type=f"{file}:wrong"))


def test_distillation_moves_the_student_towards_its_teacher(tmp_path):
    config = replace(MOVING, objective="distill", teacher_model=CONFIG.model_name, learning_rate=3e-4, num_generations=8)
    student, tokenizer = load_model(CONFIG.model_name)
    rng = np.random.default_rng(0)
    student.update({"lm_head": {"weight": student.lm_head.weight + mx.array(rng.normal(scale=0.3, size=(300, 128)).astype(np.float32))}})
    trainer = MLXGRPOTrainer(student, tokenizer, config.rewards, config, load_problems(config)[0], run_dir=tmp_path)
    batches = lambda: trainer.scored_batches(trainer.generate_responses(trainer.train_dataset[:4]))
    distance = lambda: np.mean([-np.array(trainer.token_advantages(b, b.advantages)).sum() / b.mask.sum().item() for b in batches()])
    before = distance()
    steps(trainer, 12)
    assert before > 0.2 and distance() < 0.6 * before


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    from conftest import require
    from tiny_hf import save_tiny, save_tokenizer

    require("torch")
    save_tiny(tmp_path / "teacher", "qwen3")
    save_tokenizer(tmp_path / "teacher")
    config = replace(CONFIG, objective="distill", teacher_model=str(tmp_path / "teacher"))
    with pytest.raises(UserError, match="128 tokens and .* 300.*one vocabulary"):
        make_trainer(tmp_path, config)
