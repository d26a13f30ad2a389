"""Every option does something: for each one a changed value, and something seen that differs from before.

A row of TABLE is: option -> (what is looked at, changed value, the options that both sides share). What is looked at
is a function of the configuration; most train the tiny model for a few steps and return one part of what came out."""

import json
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx_grpo
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from mlx_grpo import (OPTIONS, MLXGRPOConfig, MLXGRPOTrainer, PromptStream, UserError, fitting_problems, is_quantized, load_model,
                      load_problems,
                      main, option_default, render_prompt)
from tiny_hf import CHATML
from tiny_models import EVEN_SHARE, QUICK, sets, tiny_qwen2

THINKING = CHATML.replace("assistant\n", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}")
MY_LOADER = """
from mlx_grpo import BaseModelLoader
class MyLoader(BaseModelLoader):
    def load_model(self, path, config):
        model, config = super().load_model(path, config)
        model.made_by = "my loader"
        return model, config
"""
BROKEN = "def broken(completions):\n    return [1 / 0] * len(completions)\n"
NAMES = "import threading\n\ndef thread(completions, log_extra):\n    log_extra('thread', [threading.current_thread().name] * len(completions))\n    return [0.0] * len(completions)\n"
STOPS = """
from mlx_grpo import TrainerCallback
class Stops(TrainerCallback):
    def on_step_end(self, trainer, metrics):
        return True
"""
LOUDER = "def louder(row, rng):\n    return row | {'question': row['question'] + '!' * rng.randint(1, 9)}\n"
ROWS = [{"question": f"{i}+{i}", "task": f"twice {i}", "answer": str(2 * i), "gold": f"={2 * i}", "demo": "double"}
        for i in range(20)]
MOVING = dict(max_steps=3, update_every=3, learning_rate=0.02)      # the policy leaves the one that it samples from


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with what the options name: three models, a loader, a reward, data."""
    directory = tmp_path_factory.mktemp("files")
    tiny_qwen2(directory / "tiny", chat_template=THINKING)
    tiny_qwen2(directory / "other", seed=1)
    custom = Path(tiny_qwen2(directory / "custom", model_file="model.py"))
    (custom / "model.py").write_text("from mlx_lm.models.qwen2 import Model, ModelArgs\n")
    (directory / "my_loader.py").write_text(MY_LOADER)
    (directory / "broken.py").write_text(BROKEN)
    (directory / "my_aug.py").write_text(LOUDER)
    (directory / "stops.py").write_text(STOPS)
    (directory / "names.py").write_text(NAMES)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    return directory


@pytest.fixture(autouse=True)
def in_files(files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)


# ---- what is looked at

def trained(config):
    """A run in a directory of its own: the trainer, its log, its files and what it did how often."""
    train, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name)
    run_dir = Path(tempfile.mkdtemp(dir="."))
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((mlx_grpo, "draw"), (mx, "compile"), (mx, "checkpoint")):
            count_calls(patch, owner, name, counts)
        evaluated, evaluate = [], mlx_grpo.evaluate
        patch.setattr(mlx_grpo, "evaluate", lambda m, t, problems, c: evaluated.append(len(problems))
                      or evaluate(m, t, problems, c))
        trainer = MLXGRPOTrainer(model, tokenizer, config.rewards, config, train, held_out, run_dir=run_dir)
        trainer.train()
    read = lambda name: [json.loads(line) for line in (run_dir / name).read_text().split("\n")
                         if line] if (run_dir / name).exists() else []
    return SimpleNamespace(trainer=trainer, metrics=read("metrics.jsonl"), completions=read("completions.jsonl"),
                           counts=counts,
                           files=sorted(p.name for p in run_dir.iterdir()), evaluated=evaluated)


def count_calls(patch, owner, name, counts):
    original = getattr(owner, name)

    def counting(*args, **kwargs):
        counts[name] += 1
        return original(*args, **kwargs)

    patch.setattr(owner, name, counting)


def of_run(look):
    """Look at a finished run; rows that share their options share the run."""
    return lambda config: look(finished(config))


RUNS = {}       # repr of a configuration -> its run


def finished(config):
    """The run of a configuration, trained once."""
    if repr(config) not in RUNS:
        RUNS[repr(config)] = trained(config)
    return RUNS[repr(config)]


def logged(*keys):
    """These metrics, step by step."""
    return of_run(lambda run: [[m.get(key) for key in keys] for m in run.metrics if m["step"]])


def weights_of(trainer):
    found = sorted(tree_flatten(trainer.learner.master))
    return sha256(b"".join(np.array(a.astype(mx.float32)).tobytes() for _, a in found)).hexdigest()


def loaded(config):
    try:
        model, _ = load_model(config.model_name, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
    except UserError as error:
        return str(error)
    return vars(model).get("made_by", "loaded")


def limits_set(config):
    """MLX's limits, as a trainer on a Mac sets them."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("set_cache_limit", "set_wired_limit"):
            patch.setattr(mx, name, lambda size, name=name: found.update({name: size}))
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * 10**9})
        train, _ = load_problems(config)
        MLXGRPOTrainer(*load_model(config.model_name), config.rewards, config, train, run_dir=Path(tempfile.mkdtemp(dir=".")))
    return found


def hub(config):
    """The problems of a hub data set that holds two configurations and three splits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_grpo.problems.hub_rows", lambda name, part, split: [
            ({"question": f"{part} {split} {i}", "answer": str(i)}, f"row {i}") for i in range(10)])
        return problems(config)


def problems(config):
    return [[(p.prompt, p.answer, p.solution) for p in part] for part in load_problems(config)]


def prompts(config):
    """Token ids of the prompts that are short enough."""
    _, tokenizer = load_model(config.model_name)
    return [render_prompt(tokenizer, p, config) for p in fitting_problems(load_problems(config)[0], tokenizer, config)]


def rewritten(config):
    """The first prompts of a run, as they are drawn."""
    return [p.prompt for p in PromptStream(load_problems(config)[0], config).take(0, 4, {})]


def places(config):
    """The directories that a run by the command leaves, relative to the working directory."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        quick = {n: v for n, v in vars(config).items() if n in {*QUICK, "output_dir", "run_name"}}
        main(sets(**quick | {"model_name": str(Path(mlx_grpo.__file__).parent / "data" / "demo_model")}))
        return sorted(str(p.relative_to(directory)) for p in Path(directory).glob("*/*"))


def watched(look):
    """Look at (run directory, seconds waited) of a run by the command that watches a file; the clock is a made one."""
    def run(config):
        changed = {n: v for n, v in vars(config).items() if v != option_default(n) and n not in ("max_steps", "output_dir")}
        waits = []
        with tempfile.TemporaryDirectory(dir=".") as directory, pytest.MonkeyPatch.context() as patch:
            patch.setattr("mlx_grpo.watch.time", SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits)))
            main(sets(**changed, output_dir=directory))
            return look(Path(directory) / "run", round(sum(waits)))
    return run


def first_prompts(run_dir, _):
    return [json.loads(line)["prompt"] for line in (run_dir / "completions.jsonl").read_text().split("\n") if line][:4]


def outcome(config):
    try:
        return finished(config).trainer.step_count
    except UserError as error:
        return str(error)


def tries(config):
    """How many batches a run samples before it is given up."""
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch, mlx_grpo, "sample_completions", counts)
        assert "min_ess" in outcome(config)
    return counts["sample_completions"]


def printed(config):
    """How many lines of steps a run prints."""
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: lines.append(" ".join(map(str, text))))
        trained(config)
    return [line.split(" |")[0] for line in lines if line.startswith("step") and "loss" in line]


sampled = of_run(lambda run: [r["completion"] for r in run.completions])
moved = of_run(lambda run: weights_of(run.trainer))
rows_per_step = of_run(lambda run: Counter(r["step"] for r in run.completions))
step_count = of_run(lambda run: run.trainer.step_count)
old_policy = of_run(lambda run: [(name, a.shape) for name, a in tree_flatten(run.trainer.model_old.parameters())])
trainable = of_run(lambda run: sum(a.size for _, a in tree_flatten(run.trainer.learner.master)))
advantages = of_run(lambda run: [r["advantage"] for r in run.completions])
rates = logged("learning_rate")
LOCAL = dict(dataset="rows.jsonl", eval_samples=100)
HUB = dict(dataset="some/data", eval_samples=100)
LORA = dict(fine_tune_type="lora")
EVAL = dict(eval_samples=4)
WATCH = dict(watch="rows.jsonl", watch_idle=1.0, save_best="reward")
ROUGH = dict(quantize_for_rollouts=True, rollout_group_size=32, rollout_bits=2)     # samples far from the policy
HEALING = ROUGH | dict(rollout_bits=[2, 0], max_logp_gap=1e-3)
FLAT = dict(rewards=["correctness"])                                                # every reward 0
DISTILL = dict(objective="distill", teacher_model="other")
PROXIMAL = MOVING | dict(old_logprobs="proximal")
TOGETHER = {"objective": DISTILL, "datasets": {"dataset": OPTIONS["dataset"].default}}     # what is refused unless it is changed along

TABLE = {
    "model_name": (sampled, "other", {}),
    "model_loader": (loaded, "my_loader.py:MyLoader", {}),
    "trust_remote_code": (loaded, True, {"model_name": "custom"}),
    "dtype": (of_run(lambda run: run.trainer.model.norm.weight.dtype if "norm" in run.trainer.model
                     else run.trainer.model.model.norm.weight.dtype), "bfloat16", {"dtype": "float32"}),
    "recipe": (advantages, "dr_grpo", {}),
    "seed": (sampled, 1, {"shuffle": False, "dataset": "rows.jsonl", "eval_samples": 0}),
    "output_dir": (places, "elsewhere", {}), "run_name": (places, "mine", {}),
    "dataset": (problems, "synthetic:reverse", EVAL),
    "dataset_config": (hub, "socratic", HUB), "dataset_split": (hub, "validation", HUB),
    "eval_split": (hub, "validation", HUB),
    "eval_fraction": (problems, 0.5, LOCAL),
    "prompt_column": (problems, "task", LOCAL), "answer_column": (problems, "gold", LOCAL),
    "solution_column": (problems, "demo", LOCAL),
    "dataset_options": (problems, {"length": 3}, {"dataset": "synthetic:chain"}),
    "prompt_format": (prompts, "text", LOCAL), "system_prompt": (prompts, "Add the numbers.", LOCAL),
    "chat_template_kwargs": (prompts, {"enable_thinking": True}, LOCAL),
    "watch": (watched(first_prompts), "rows.jsonl", WATCH | {"watch": "others.jsonl"}),
    "watch_idle": (watched(lambda run, waited: waited), 3.0, WATCH),
    "watch_target": (watched(lambda run, _: (run / "checkpoint-best").exists()), 1e6, WATCH),
    "datasets": (problems, [{"dataset": "rows.jsonl"}, {"dataset": "synthetic:reverse", "weight": 2.0}], EVAL),
    "curriculum": (problems, {"option": "length", "levels": [3, 4], "raise_at": 0.8}, {"dataset": "synthetic:chain"}),
    "few_shot": (problems, 2, LOCAL), "augment": (rewritten, ["my_aug.py:louder"], LOCAL),
    "shuffle": (problems, False, LOCAL), "max_train_samples": (problems, 3, LOCAL),
    "max_prompt_length": (prompts, 38, LOCAL),
    "num_generations": (rows_per_step, 3, {}),
    "max_new_tokens": (logged("completions/max_length"), 3, {}),
    "max_completion_length": (logged("grad_norm"), 16, {"loss_type": "dr_grpo"}),
    "temperature": (sampled, 2.0, {}),
    "rollout_batch_size": (of_run(lambda run: run.counts["draw"]), 4, {}),
    "kv_bits": (logged("sampling/sampling_logp_difference/max"), 4, {"model_name": str(ROOT / "data/demo_model")}),
    "quantize_for_rollouts": (of_run(lambda run: is_quantized(run.trainer.model_old)), True,
                              {"rollout_group_size": 32}),
    "rollout_bits": (old_policy, 8, {"quantize_for_rollouts": True, "rollout_group_size": 32}),
    "rollout_group_size": (old_policy, 32, {"quantize_for_rollouts": True}),
    "rollout_precision": (old_policy, {"model.layers.0": 0}, ROUGH),
    "self_healing": (outcome, False, HEALING), "calm_syncs": (logged("healed"), 1, HEALING | {"max_steps": 3}),
    "min_ess": (outcome, 0.9999, ROUGH), "max_logp_gap": (outcome, 1e-3, ROUGH),
    "max_bad_steps": (tries, 2, ROUGH | {"min_ess": 0.9999}),
    "dynamic_sampling": (logged("epoch"), True, FLAT | {"max_gen_batches": 2}),
    "max_gen_batches": (logged("dynamic_sampling/rounds"), 3, FLAT | {"dynamic_sampling": True, "max_gen_batches": 2}),
    "update_every": (sampled, 3, {"max_steps": 3, "learning_rate": 0.02}),
    "top_p": (sampled, 0.1, {}), "top_k": (sampled, 2, {}), "min_p": (sampled, 0.9, {}),
    "repetition_penalty": (sampled, 9.0, {}),
    "stop": (sampled, ["a", "e", "i", "\ufffd"], {}), "response_prefix": (sampled, "<reasoning>", {}),
    "advantage": (advantages, "rloo", {}), "normalize_advantages": (advantages, True, {"advantage": "rloo"}),
    "overlong_cache": (logged("reward"), 6, {}),
    "objective": (moved, "distill", {}), "teacher_model": (moved, "tiny", DISTILL),
    "distill_task_coeff": (moved, 1.0, DISTILL),
    "off_policy_threshold": (moved, 1e-3, MOVING), "old_logprobs": (moved, "proximal", MOVING),
    "sampler_correction": (moved, "token_truncate", PROXIMAL), "sampler_clip_min": (moved, 0.99, PROXIMAL),
    "sampler_clip_max": (moved, 1.01, PROXIMAL | {"sampler_correction": "token_truncate"}),
    "importance_sampling_level": (logged("clip_ratio/low_mean", "loss"), "sequence", MOVING),
    "num_iterations": (moved, 2, {"max_steps": 2}), "minibatches": (moved, 2, {"max_steps": 2}),
    "delta": (moved, 1.21, MOVING | {"learning_rate": 0.2}),
    "sapo_temperature_pos": (moved, 3.0, MOVING | {"loss_type": "sapo"}),
    "sapo_temperature_neg": (moved, 3.0, MOVING | {"loss_type": "sapo"}),
    "kl_in": (logged("reward", "loss"), "reward", MOVING | {"kl_coeff": 0.5, "kl_estimator": "k1"}),
    "ref_sync_steps": (logged("kl"), 1, MOVING | {"kl_coeff": 0.5}),
    "ref_sync_mix": (logged("kl"), 0.1, MOVING | {"kl_coeff": 0.5, "ref_sync_steps": 1}),
    "entropy_coef": (moved, 0.5, {}), "entropy_adaptive": (moved, True, {"max_steps": 3, "entropy_target": 20.0}),
    "top_entropy_quantile": (moved, 0.3, {}),
    "entropy_target": (moved, 20.0, {"max_steps": 3, "entropy_adaptive": True}),
    "entropy_step": (moved, 0.5, {"max_steps": 3, "entropy_adaptive": True, "entropy_target": 20.0}),
    "rewards": (of_run(lambda run: run.completions[0]["rewards"].keys()), ["int", EVEN_SHARE], {}),
    "reward_options": (logged("reward"), {"even_share": {"odd": True}}, {}),
    "reward_weights": (logged("reward"), [1.0, 3.0], {}),
    "on_reward_error": (outcome, "skip", {"rewards": ["broken.py:broken", EVEN_SHARE]}),
    "max_reward_errors": (outcome, 3, {"rewards": ["broken.py:broken", EVEN_SHARE], "on_reward_error": "skip"}),
    "reward_workers": (of_run(lambda run: run.completions[0]["thread"]), 1, {"rewards": ["names.py:thread", EVEN_SHARE]}),
    "scale_rewards": (of_run(lambda run: [r["advantage"] for r in run.completions]), "none", {}),
    "loss_type": (logged("grad_norm"), "dr_grpo", {}),
    "clip_eps": (logged("clip_ratio/low_mean", "loss"), 0.01, MOVING),
    "clip_eps_high": (logged("clip_ratio/high_mean", "loss"), 0.01, MOVING | {"clip_eps": 0.5}),
    "kl_coeff": (logged("kl"), 0.5, MOVING), "kl_estimator": (logged("kl"), "k3", MOVING | {"kl_coeff": 0.5}),
    "mask_truncated_completions": (logged("grad_norm"), True, {}),
    "fine_tune_type": (trainable, "lora", {}),
    "lora_rank": (trainable, 2, LORA), "lora_scale": (moved, 1.0, LORA), "lora_alpha": (moved, 8.0, LORA),
    "lora_dropout": (moved, 0.5, LORA), "lora_layers": (trainable, 1, LORA),
    "lora_keys": (trainable, ["self_attn.q_proj"], LORA),
    "prefix_sharing": (of_run(lambda run: run.trainer.shapes), "off", {}),
    "max_tokens_per_microbatch": (of_run(lambda run: run.trainer.shapes), 30, {}),
    "gradient_checkpointing": (of_run(lambda run: run.counts["checkpoint"] > 0), True, {}),
    "batch_size": (rows_per_step, 3, {}), "gradient_accumulation_steps": (rows_per_step, 3, {}),
    "num_epochs": (step_count, 2, {"max_steps": 0, "max_train_samples": 2}), "max_steps": (step_count, 2, {}),
    "optimizer": (moved, "lion", {}), "optimizer_dtype": (moved, "bfloat16", {}),
    "learning_rate": (moved, 0.01, {}), "matrix_learning_rate": (moved, 0.01, {}),
    "embedding_learning_rate": (moved, 0.01, {}),
    "head_learning_rate": (moved, 0.01, {"model_name": "untied"}),
    "lr_scheduler_type": (rates, "linear", {"max_steps": 3, "lr_scheduler_type": "constant_with_warmup"}),
    "warmup_ratio": (rates, 0.7, {"max_steps": 3, "lr_scheduler_type": "linear"}),
    "max_grad_norm": (moved, 1e-9, {}), "adam_beta1": (moved, 0.5, {"max_steps": 3}),
    "adam_beta2": (moved, 0.5, {"max_steps": 3}),
    "weight_decay": (moved, 0.9, {}), "decay_all": (moved, True, {"weight_decay": 0.9}),
    "use_compile": (of_run(lambda run: run.counts["compile"] > 0), True, {"use_compile": False, "max_steps": 1}),
    "cache_limit_gb": (limits_set, 0.5, {}), "wired_limit_gb": (limits_set, 4.0, {}),
    "logging_steps": (printed, 2, {"max_steps": 3}), "log_jsonl": (of_run(lambda run: run.files), False, {}),
    "callbacks": (step_count, ["stops.py:Stops"], {"max_steps": 3}),
    "log_token_details": (of_run(lambda run: sum("token_texts" in r for r in run.completions)), 1, {}),
    "report_to": (of_run(lambda run: (run.trainer.run_dir / "tensorboard").exists()), "tensorboard", {}),
    "live": (of_run(lambda run: [type(c).__name__ for c in run.trainer.callbacks]), False, {}),
    "health": (logged("health/truncated"), {"truncated": False}, {"max_new_tokens": 1}),
    "save_steps": (of_run(lambda run: run.files), 1, {"max_steps": 2}),
    "save_total_limit": (of_run(lambda run: run.files), 1, {"max_steps": 4, "save_steps": 1}),
    "save_in_background": (of_run(lambda run: ["save_background_s" in m for m in run.metrics]), True, {"max_steps": 2, "save_steps": 1}),
    "save_best": (of_run(lambda run: run.files), "reward", {"max_steps": 2}),
    "eval_steps": (of_run(lambda run: [m["step"] for m in run.metrics if "eval/exact_match" in m]), 2,
                   EVAL | {"max_steps": 3}),
    "eval_samples": (of_run(lambda run: run.evaluated), 2, EVAL),
    "eval_every_updates": (of_run(lambda run: [m["step"] for m in run.metrics if "eval_train/exact_match" in m]), 2,
                           {"max_steps": 3}),
    "eval_subset_size": (of_run(lambda run: run.evaluated), 3, {"eval_every_updates": 1}),
    "eval_max_new_tokens": (of_run(lambda run: [m.get("eval/mean_length") for m in run.metrics]), 3, EVAL),
    "eval_temperature": (of_run(lambda run: run.trainer.samples[0]), 2.0, EVAL),
}


def make_config(**changes):
    data = {"dataset": str(ROOT / "data" / "word_problems.jsonl")}
    return MLXGRPOConfig(**QUICK | data | {"model_name": "tiny", "max_steps": 1, "eval_samples": 0} | changes)


def test_the_table_names_every_option():
    assert TABLE.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", TABLE)
def test_the_option_changes_something_that_can_be_seen(name, files):
    look, value, shared = TABLE[name]
    if shared.get("model_name") == "untied" and not (files / "untied").exists():
        tiny_qwen2(files / "untied", tie_word_embeddings=False)
    before, after = make_config(**shared), make_config(**shared | TOGETHER.get(name, {}) | {name: value})
    assert vars(before)[name] != vars(after)[name], "the changed value is the shared one"
    assert look(before) != look(after)


@pytest.mark.parametrize("name", ["model_name", "learning_rate", "reward_weights", "eval_temperature", "kl_coeff"])
def test_a_run_that_is_repeated_gives_the_same(name):
    """So what differs above differs because of the option."""
    look, _, shared = TABLE[name]
    first = look(make_config(**shared))
    RUNS.clear()
    assert look(make_config(**shared)) == first
