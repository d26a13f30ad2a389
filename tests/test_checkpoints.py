"""Checkpoints: opened by mlx-lm and transformers as they are, and a resumed run is the run that went on."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import require
from mlx.utils import tree_flatten
from mlx_grpo import MLXGRPOTrainer, UserError, load_model, load_problems, main, read_metrics
from test_trainer import CONFIG, largest_difference, make_trainer, numbers, weights
from tiny_hf import CHATML, save_tiny, save_tokenizer

RUN = replace(CONFIG, log_jsonl=True, max_steps=4, save_steps=2, learning_rate=1e-3)


def logged(run_dir):
    return [numbers(m) for m in read_metrics(run_dir)], (run_dir / "completions.jsonl").read_text()


@pytest.mark.parametrize("options", [
    {}, {"update_every": 3, "kl_coeff": 0.05}, {"update_every": 3, "quantize_for_rollouts": True},
    {"gradient_accumulation_steps": 1, "batch_size": 3, "lr_scheduler_type": "cosine", "dtype": "bfloat16"},
    {"optimizer": "muon", "weight_decay": 0.1},
    {"optimizer_dtype": "bfloat16", "dtype": "bfloat16", "optimizer": "muon", "update_every": 3},
], ids=["plain", "stale with reference", "stale and quantised", "bfloat16", "muon", "bfloat16 throughout"])
def test_a_resumed_run_is_byte_for_byte_the_run_that_went_on(tmp_path, options):
    config = replace(RUN, **options)
    whole = make_trainer(tmp_path / "whole", config)
    whole.train()
    broken = make_trainer(tmp_path / "broken", config)
    step = broken.step

    def dying():                     # at step 4, with step 3 logged, after the checkpoint of step 2
        if broken.step_count == 3:
            raise KeyboardInterrupt
        return step()

    broken.step = dying
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", config)
    resumed.load_checkpoint(tmp_path / "broken/checkpoint-2")
    resumed.train()
    assert largest_difference(weights(whole), weights(resumed)) == 0
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "whole/checkpoint-4" / name).read_bytes() == (tmp_path / "broken/checkpoint-4" / name).read_bytes()


def test_a_checkpoint_of_a_demo_model_opens_in_mlx_lm_with_the_same_logits_and_text(tmp_path):
    import mlx_lm

    trainer = make_trainer(tmp_path, RUN)
    trainer.train()
    path = tmp_path / "checkpoint-4"
    theirs, tokenizer = mlx_lm.load(str(path))
    ids = trainer.tokenizer.apply_chat_template([{"role": "user", "content": "3*7+2*9"}], add_generation_prompt=True)
    assert mx.array_equal(theirs(mx.array([ids])), trainer.model(mx.array([ids]))).item()
    assert tokenizer.encode("3*7", add_special_tokens=False) == trainer.tokenizer.encode("3*7", add_special_tokens=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "3*7+2*9"}], add_generation_prompt=True) == ids
    assert "<reasoning>" in mlx_lm.generate(theirs, tokenizer, ids, max_tokens=16)
    assert {p.name for p in path.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
                                                "special_tokens_map.json", "optimizer.safetensors", "trainer_state.json"}


@pytest.mark.parametrize("family", ["qwen2.5", "llama3", "qwen3"])
def test_a_checkpoint_opens_in_transformers_with_the_same_logits(tmp_path, family):
    torch, transformers = require("torch"), require("transformers")
    save_tiny(tmp_path / "base", family)
    save_tokenizer(tmp_path / "base", CHATML)
    config = replace(RUN, model_name=str(tmp_path / "base"), dataset="synthetic:arithmetic", max_steps=1)
    trainer = make_trainer(tmp_path / "run", config)
    trainer.train()
    path = tmp_path / "run/checkpoint-1"
    ids = np.array([[5, 17, 99, 3, 42, 8]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(trainer.model(mx.array(ids))), want, atol=1e-4)
    reopened, _ = load_model(path)
    np.testing.assert_allclose(np.array(reopened(mx.array(ids))), want, atol=1e-4)
    text = "three times 7"
    assert transformers.AutoTokenizer.from_pretrained(path).encode(text) == trainer.tokenizer.encode(text)


def test_large_checkpoints_are_sharded_and_load_again(tmp_path, monkeypatch):
    import mlx_lm.utils

    sharded = mlx_lm.utils.make_shards
    monkeypatch.setattr(mlx_lm.utils, "make_shards", lambda weights: [dict(list(weights.items())[i::3]) for i in range(3)])
    trainer = make_trainer(tmp_path, RUN)
    trainer.save_checkpoint(tmp_path / "checkpoint-0")
    monkeypatch.setattr(mlx_lm.utils, "make_shards", sharded)
    assert len(list((tmp_path / "checkpoint-0").glob("model-0000*-of-00003.safetensors"))) == 3
    again = make_trainer(tmp_path, RUN)
    again.model.update({"lm_head": {"weight": again.model.lm_head.weight * 0}})
    again.load_checkpoint(tmp_path / "checkpoint-0")
    assert largest_difference(weights(trainer), weights(again)) == 0


def test_a_failed_save_leaves_the_old_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, RUN)
    trainer.save_checkpoint(tmp_path / "checkpoint-0")
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-0").iterdir()}
    monkeypatch.setattr(mx, "save_safetensors", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises((OSError, UserError)):
        trainer.save_checkpoint(tmp_path / "checkpoint-0")
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint-0").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-0"]


def test_a_bfloat16_run_saves_float32_weights_and_says_so(tmp_path):
    trainer = make_trainer(tmp_path, replace(RUN, dtype="bfloat16"))
    trainer.save_checkpoint(tmp_path / "checkpoint-0")
    saved = mx.load(str(tmp_path / "checkpoint-0/model.safetensors"))
    assert {a.dtype for a in saved.values()} == {mx.float32}
    assert json.loads((tmp_path / "checkpoint-0/config.json").read_text())["torch_dtype"] == "float32"


def test_sft_checkpoints_continue_as_grpo(tmp_path):
    from mlx_grpo import SFTTrainer

    problems, _ = load_problems(replace(CONFIG, solution_column="solution"))
    model, tokenizer = load_model(CONFIG.model_name)
    warm = SFTTrainer(model, tokenizer, replace(CONFIG, learning_rate=1e-3, max_steps=6), problems, run_dir=tmp_path)
    losses = [warm.step(problems[:4])["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]
    warm.save_checkpoint(tmp_path / "checkpoint-6")
    model, tokenizer = load_model(tmp_path / "checkpoint-6")
    assert len(tree_flatten(model.parameters())) == len(weights(warm))
    MLXGRPOTrainer(model, tokenizer, CONFIG.rewards, CONFIG, problems, run_dir=tmp_path).step(problems[:4])


def test_the_command_resumes_where_it_stopped(tmp_path, capsys):
    command = ["--config", "configs/demo.toml", *sum((["--set", s] for s in (
        f"output_dir={tmp_path}", "run_name=r", "num_generations=2", "batch_size=2", "save_steps=1", "eval_samples=0",
        "max_train_samples=8")), [])]
    main([*command, "--set", "max_steps=2"])
    with pytest.raises(UserError, match="already holds a run.*--resume auto.*run_name"):
        main([*command, "--set", "max_steps=3"])
    main([*command, "--set", "max_steps=3", "--resume"])
    assert "resuming from" in capsys.readouterr().out
    assert [m["step"] for m in read_metrics(tmp_path / "r")] == [1, 2, 3]
