"""Adapters and quantised bases: what is trained, what is copied, what a checkpoint of them is."""

import gc
import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_grpo import ConfigError, Learner, MLXGRPOConfig, MLXGRPOTrainer, UserError, load_model, load_problems
from test_trainer import CONFIG, largest_difference, make_trainer, numbers, steps, weights

LORA = replace(CONFIG, fine_tune_type="lora", lora_rank=4, lora_scale=2.0, learning_rate=1e-2)


@pytest.fixture(scope="module")
def quantised_demo(tmp_path_factory):
    """The demo's model with 4-bit matrices, as a directory."""
    from mlx_grpo import save_arrays

    path = tmp_path_factory.mktemp("models") / "demo-4bit"
    model, tokenizer = load_model(CONFIG.model_name)
    nn.quantize(model, 64, 4)
    path.mkdir()
    save_arrays(path / "model.safetensors", dict(tree_flatten(model.parameters())))
    config = json.loads((model.source_path / "config.json").read_text()) | {"quantization": {"group_size": 64, "bits": 4}}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_the_adapters_are_trained_and_the_base_stays(tmp_path, kind):
    trainer = make_trainer(tmp_path, replace(LORA, fine_tune_type=kind))
    names = {name.rpartition(".")[2] for name in weights(trainer)}
    assert names == {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    base = lambda: {k: np.array(v) for k, v in tree_flatten(trainer.model.parameters()) if k not in weights(trainer)}
    before, adapters = base(), weights(trainer)
    steps(trainer, 2)
    assert largest_difference(before, base()) == 0 and largest_difference(adapters, weights(trainer)) > 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_new_adapters_change_no_logit_and_the_kl_to_the_base_is_exactly_zero(tmp_path, kind):
    plain, _ = load_model(CONFIG.model_name)
    trainer = make_trainer(tmp_path, replace(LORA, fine_tune_type=kind, kl_coeff=0.1))
    ids = mx.array([[5, 6, 7, 8]])
    np.testing.assert_allclose(np.array(trainer.model(ids)), np.array(plain(ids)), atol=0 if kind == "lora" else 1e-4)
    first, second = steps(trainer, 2)
    assert first["kl"] == 0 and second["kl"] > 0


def test_reference_and_stale_policy_share_the_base_weights_in_memory(tmp_path):
    gc.collect()
    before = mx.get_active_memory()
    trainer = make_trainer(tmp_path, replace(LORA, kl_coeff=0.1, update_every=3))
    steps(trainer, 2)                               # the policy has moved, so that copies of what moved exist
    assert trainer.ref_model is not trainer.model and trainer.model_old is not trainer.model
    base = sum(a.nbytes for _, a in tree_flatten(trainer.model.parameters()))
    gc.collect()
    assert base < mx.get_active_memory() - before < 1.3 * base     # three models, one set of base weights


def test_a_quantised_base_trains_by_adapters_and_is_refused_without(tmp_path, quantised_demo):
    config = replace(LORA, model_name=str(quantised_demo))
    trainer = make_trainer(tmp_path, config)
    assert all(np.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in steps(trainer, 2))
    assert any(name.endswith("scales") for name, _ in tree_flatten(trainer.model.parameters()))
    with pytest.raises(UserError, match='fine_tune_type = "lora"'):
        make_trainer(tmp_path, replace(CONFIG, model_name=str(quantised_demo)))


@pytest.mark.parametrize("kind, quantised", [("lora", False), ("dora", False), ("lora", True)])
def test_mlx_lm_opens_our_adapters_with_the_same_logits(tmp_path, quantised_demo, kind, quantised):
    import mlx_lm

    model_name = str(quantised_demo) if quantised else CONFIG.model_name
    trainer = make_trainer(tmp_path, replace(LORA, fine_tune_type=kind, model_name=model_name, lora_layers=2))
    steps(trainer, 2)
    trainer.save_checkpoint(tmp_path / "checkpoint-2")
    ids = mx.array([[5, 6, 7, 8]])
    theirs, _ = mlx_lm.load(model_name, adapter_path=str(tmp_path / "checkpoint-2"))
    np.testing.assert_allclose(np.array(theirs(ids)), np.array(trainer.model(ids)), atol=1e-5)
    ours, _ = load_model(tmp_path / "checkpoint-2")
    np.testing.assert_allclose(np.array(ours(ids)), np.array(trainer.model(ids)), atol=1e-5)
    assert not (tmp_path / "checkpoint-2/model.safetensors").exists()


def test_a_resumed_adapter_run_is_the_run_that_went_on(tmp_path):
    config = replace(LORA, kl_coeff=0.05, update_every=3, max_steps=4, save_steps=2, log_jsonl=True)
    whole = make_trainer(tmp_path / "whole", config)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", config)
    resumed.load_checkpoint(tmp_path / "whole/checkpoint-2")
    resumed.train()
    assert largest_difference(weights(whole), weights(resumed)) == 0


def test_an_adapter_checkpoint_does_not_resume_a_full_run(tmp_path):
    trainer = make_trainer(tmp_path, LORA)
    trainer.save_checkpoint(tmp_path / "checkpoint-0")
    with pytest.raises(UserError, match="fine_tune_type was 'lora', is 'full'"):
        make_trainer(tmp_path, CONFIG).load_checkpoint(tmp_path / "checkpoint-0")


def test_alpha_is_peft_s_and_scale_is_mlx_lm_s(tmp_path):
    by_alpha = make_trainer(tmp_path, replace(CONFIG, fine_tune_type="lora", lora_rank=4, lora_alpha=8.0))
    assert by_alpha.model.layers[0].attn.c_q.scale == 2.0
    assert "scale 2 = alpha 8 / rank" in by_alpha.learner.description()
    with pytest.raises(ConfigError, match="keep one"):
        MLXGRPOConfig(fine_tune_type="lora", lora_alpha=8.0, lora_scale=3.0)


def test_keys_and_layers_choose_what_is_adapted(tmp_path):
    trainer = make_trainer(tmp_path, replace(LORA, lora_keys=["attn.c_q"], lora_layers=2))
    assert {n.split(".lora")[0] for n in weights(trainer)} == {f"transformer.h.{i}.attn.c_q" for i in (2, 3)}
    for wrong, text in (({"lora_keys": ["attn.c_x"]}, "no module 'attn.c_x'"), ({"lora_layers": 9}, "has 4 blocks")):
        with pytest.raises(ConfigError, match=text):
            make_trainer(tmp_path, replace(LORA, **wrong))
    with pytest.raises(ConfigError, match='fine_tune_type is "full"'):
        MLXGRPOConfig(lora_rank=4)


@pytest.mark.parametrize("way, options", [
    ("each", {"prefix_sharing": "off"}), ("within", {"prefix_sharing": "on", "max_tokens_per_microbatch": 0}),
    ("before", {"prefix_sharing": "on", "max_tokens_per_microbatch": 40})])
def test_dropout_has_the_same_mask_in_old_and_new_so_that_the_ratio_starts_at_one(tmp_path, way, options):
    config = replace(LORA, lora_dropout=0.5, clip_eps=0.0, learning_rate=0.05, **options)
    trainer = make_trainer(tmp_path, config)
    first = steps(trainer, 2)
    assert way in {shape[-1] for shape in trainer.shapes}
    assert max(m["clip_ratio/region_mean"] for m in first) == 0          # on policy: nothing to clip, dropout or not
    without = make_trainer(tmp_path, replace(config, lora_dropout=0.0))
    assert numbers(steps(without, 2)[1]) != numbers(first[1])


def test_gradient_checkpointing_gives_equal_gradients(tmp_path):
    results = []
    for on in (False, True):
        trainer = make_trainer(tmp_path, replace(CONFIG, gradient_checkpointing=on, learning_rate=1e-3))
        results.append((numbers(steps(trainer, 1)[0]), weights(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5, abs=1e-7)
    assert largest_difference(results[0][1], results[1][1]) < 1e-6
    from mlx_lm.models.nanochat import TransformerBlock
    assert TransformerBlock.__call__.__name__ == "__call__"              # the class is as it was


def test_the_start_line_says_what_is_trained_and_what_it_weighs(tmp_path):
    text = make_trainer(tmp_path, LORA).learner.description()
    model, _ = load_model(CONFIG.model_name)
    total = sum(a.size for _, a in tree_flatten(model.parameters()))
    trained = sum(a.size for a in weights(make_trainer(tmp_path, LORA)).values())
    assert f"LoRA (rank 4, scale 2): {trained:,} of" in text and f"gradients {4 * trained / 1e3:.1f} kB" in text
    full = Learner(model, CONFIG, mx.float32).description()
    assert f"all weights: {total:,} of {total:,} parameters" in full


def test_gradients_can_be_changed_before_clipping(tmp_path):
    from mlx.utils import tree_map
    from mlx_grpo import TrainerCallback

    class Nothing(TrainerCallback):
        def on_gradients(self, trainer, gradients):
            return tree_map(mx.zeros_like, gradients)

    trainer = make_trainer(tmp_path, callbacks=[Nothing()])
    assert steps(trainer, 1)[0]["grad_norm"] == 0


@pytest.mark.seeds
@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_adapters_lift_the_demo(tmp_path, quantised_demo, kind):
    from mlx_grpo import load_config, read_metrics
    from conftest import ROOT

    model = str(quantised_demo) if kind == "qlora" else CONFIG.model_name
    config, _ = load_config(ROOT / "configs/demo.toml", [
        f"model_name={model}", f"output_dir={tmp_path}", "run_name=r", f"fine_tune_type={kind.removeprefix('q')}",
        "lora_rank=16", "lora_scale=2.0", "learning_rate=1e-3", "max_steps=60"])
    problems, held_out = load_problems(config)
    MLXGRPOTrainer(*load_model(model), config.rewards, config, problems, held_out).train()
    scores = [m["eval/exact_match"] for m in read_metrics(tmp_path / "r") if "eval/exact_match" in m]
    assert scores[0] <= 0.10 and scores[-1] >= 0.9
