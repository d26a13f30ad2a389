"""plan: exact state from shapes alone, what fits and which settings make it fit, the command for Metal's limit, the
headers of the shipped configurations, and (seeds) its peak against the trainer's on drawn configurations."""

import tomllib

import mlx.core as mx
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from mlx_grpo import (
    MLXGRPOConfig, MLXGRPOTrainer, UserError, load_config, load_model, load_problems, main, plan, plan_account, plan_headers)
from mlx_grpo.plan_account import Account, shapes_of, work_of
from mlx_grpo.plan_fit import fitted
from tiny_models import QUICK, sets, tiny_qwen2

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
DATA = str(ROOT / "data/word_problems.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen2(tmp_path_factory.mktemp("models") / "tiny")


def config_of(model, **changes):
    return MLXGRPOConfig(**QUICK | {"model_name": model, "dataset": DATA} | changes)


def size(tree):
    return sum(a.nbytes for _, a in tree_flatten(tree))


@pytest.mark.parametrize("changes", [
    {}, {"fine_tune_type": "lora"}, {"optimizer": "adafactor", "dtype": "bfloat16"}, {"optimizer": "muon", "optimizer_dtype": "bfloat16"},
    {"kl_coeff": 0.1, "update_every": 2}, {"quantize_for_rollouts": True, "rollout_group_size": 32, "update_every": 2}])
def test_the_state_is_that_of_the_trainer_to_the_byte(model, tmp_path, changes):
    config = config_of(model, **changes)
    train, _ = load_problems(config)
    trainer = MLXGRPOTrainer(*load_model(model), config.rewards, config, train, run_dir=tmp_path)
    account = Account(config, work_of(config, 20))
    learner, state = trainer.learner, account.state
    assert state["weights to compute with"] == size(trainer.model.parameters())
    assert state["moments"] == size(learner.optimizer.state)
    assert state["weights to train"] == (size(learner.master) if learner.master_dtype != learner.dtype else 0)
    assert account.more["gradients"] == 4 * sum(a.size for _, a in tree_flatten(learner.master))
    assert account.more["checkpoint"] == learner.checkpoint_bytes()
    assert state["ref_model"] == (size(trainer.ref_model.parameters()) if config.kl_coeff else 0)
    if trainer.model_old is not trainer.model:
        assert state["model_old"] == size(trainer.model_old.parameters())


def test_shapes_take_no_memory():
    """1.5 billion parameters, of a model that isn't here."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    config = MLXGRPOConfig(model_name="Qwen/Qwen2.5-1.5B-Instruct", dtype="bfloat16")
    account = Account(config, work_of(config, 200))
    assert mx.get_peak_memory() - before < 10**6
    assert account.more["trained"] == 1_543_714_304               # 1.54B, as its card says; twice that in float32
    assert account.state["moments"] == pytest.approx(8 * 1_543_714_304, abs=100)


def test_keys_and_values_are_those_of_the_cache(model):
    """(rows, heads, tokens, width) twice for each layer, in mlx-lm's steps of 256 tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    config = config_of(model)
    made, _ = load_model(model)
    cache = make_prompt_cache(made)
    made(mx.zeros((3, 10), dtype=mx.int32), cache=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache)
    assert plan_account.cache_bytes(shapes_of(config), config, 3, 256) == held


def test_settings_that_change_no_result_are_tried_first():
    config = MLXGRPOConfig(model_name="Qwen/Qwen2.5-0.5B-Instruct", dtype="bfloat16", num_generations=16, update_every=1,
                           max_tokens_per_microbatch=4096)
    account = Account(config, work_of(config, 200))
    changes, peak = fitted(account, account.peak * 0.9)
    assert changes.keys() <= {"max_tokens_per_microbatch", "rollout_batch_size", "gradient_checkpointing"} and changes
    assert peak <= account.peak * 0.9
    changes, peak = fitted(account, 6e9)
    assert changes["fine_tune_type"] == "lora" and peak <= 6e9


def test_fit_writes_a_configuration_that_fits_and_trains_the_same_problems(tmp_path, capsys):
    new = tmp_path / "new.toml"
    assert main(["plan", "--config", "configs/nanochat_d32.toml", "--memory", "32", "--fit", str(new)]) == 0
    text = capsys.readouterr().out
    assert "doesn't fit" in text and "fits with" in text
    given, made = (tomllib.loads(path.read_text()) for path in (ROOT / "configs/nanochat_d32.toml", new))
    assert given.items() <= {**made, **{k: given[k] for k in given if made[k] != given[k]}}.items() and made != given
    assert main(["plan", "--config", str(new), "--memory", "32"]) == 0
    assert "\nfits: " in capsys.readouterr().out
    with pytest.raises(UserError, match="exists; give --fit another name"):
        main(["plan", "--config", str(new), "--memory", "32", "--fit", str(new)])


@pytest.mark.parametrize("needed, line", [
    (10.0e9, None),                                                    # fits: Metal allows two thirds of 16 GB
    (12.0e9, "sudo sysctl iogpu.wired_limit_mb=12017"),                # 1.05 * 12e9 / 2^20 = 12016.3
    (14.0e9, None)])                                                   # macOS itself needs the rest
def test_the_command_for_metals_limit_is_printed_where_it_helps(needed, line):
    assert plan.Machine(16).wired_line(needed) == line


def test_a_mac_here_is_read_from_its_readings(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(plan, "memory_limits", lambda: {"physical memory": 64e9})
    monkeypatch.setattr(plan, "memory_limit_bytes", lambda: 48e9)
    assert plan.Machine().wired_line(50e9) == "sudo sysctl iogpu.wired_limit_mb=50068"      # 52.5e9 / 2^20 = 50067.9
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert plan.Machine().wired_line(50e9) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_of_a_shipped_configuration_states_its_planned_peak(path):
    """Written by utils/plan_headers.py; shapes, options and estimates together give this number."""
    assert plan_headers.header(path) in path.read_text()


def test_the_table_of_models_is_what_plan_says():
    text = plan_headers.PAGE.read_text()
    assert plan_headers.with_table(text) == text and text.count("\n| Qwen") >= 8


def test_nanochat_d32_fits_a_mac_of_16_gb_with_adapters_only():
    whole, adapters = (plan_headers.peak(ROOT / f"configs/nanochat_d32{name}.toml") for name in ("", "_lora"))
    assert adapters < plan.Machine(16).limit < plan.Machine(48).limit < whole


def test_train_warns_in_one_line_before_a_run_that_does_not_fit(model, tmp_path, monkeypatch, capsys):
    options = sets(**QUICK | {"model_name": model, "dataset": DATA, "output_dir": str(tmp_path), "max_steps": 1, "eval_samples": 0})
    monkeypatch.setattr(plan, "memory_limit_bytes", lambda: 300_000)
    main(["train", *options, "--set", "run_name=short"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "plan --fit" in line]
    assert len(lines) == 1 and "may take 300.0 kB here" in lines[0]
    monkeypatch.setattr(plan, "memory_limit_bytes", lambda: 10**12)
    main(["train", *options, "--set", "run_name=enough"])
    assert "plan --fit" not in capsys.readouterr().err


def test_a_model_without_shapes_is_one_line():
    config = MLXGRPOConfig(model_name="nobody/has-this")
    with pytest.raises(UserError, match="plan needs its shapes"):
        Account(config, work_of(config, 20))


def test_plan_measures_a_model_that_is_here(model, capsys):
    assert main(["plan", *sets(**QUICK | {"model_name": model, "dataset": DATA})]) == 0
    text = capsys.readouterr().out
    assert "measured in a trial run" in text and "time of a step" in text and "\nfits: " in text


@pytest.mark.seeds
def test_plan_is_within_15_percent_of_the_trainers_peak():
    """Ten configurations of a seed that nothing was tuned on."""
    from benchmarks.plan_accuracy import compare

    for options, planned, measured in compare(seed=11, count=10):
        assert planned == pytest.approx(measured, rel=0.15), options
