"""
GRPO fine-tuning of language models on MLX, in one file (DeepSeekMath, arXiv 2402.03300).

One training step                                           done by                  paper
  sample G completions per prompt from model_old            sample_completions       4.1.1
  score every completion                                    score_completions        4.1.2
  A_i = (r_i - mean r) / (std r + eps), inside each group   group_advantages         4.1.2
  maximise min(ratio A, clip(ratio) A) - kl_coeff KL        grpo_loss                Eq. 3, 4
  every update_every steps: model_old <- model              MLXGRPOTrainer.sync_old  Alg. 1
Different from the paper: rewards are rules, not a learned model.

    python mlx_grpo.py --config configs/prod.toml --set num_generations=16
    python mlx_grpo.py eval --config configs/prod.toml --set model_name=outputs/run/checkpoint-500
    python mlx_grpo.py {train,sft,eval,rewards,preview,plan,report,sweep,push,completion} --help

Shape letters: P prompts, G completions per prompt, B = P*G rows, L prompt tokens, T completion tokens, V vocabulary,
C hidden width. Token ids that were sampled are trained on as they are: text is decoded for rewards and people, and
never encoded back.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import math
import os
import random
import re
import sys
import time
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import partial, wraps
from pathlib import Path

HERE = Path(__file__).resolve().parent
# This file is also the package of its tools: `mlx_grpo.files` is utils/files.py in a clone, mlx_grpo_utils/ in a wheel.
__path__ = [str(next(d for d in (HERE / "mlx_grpo_utils", HERE / "utils") if d.is_dir()))]
sys.modules.setdefault("mlx_grpo", sys.modules[__name__])   # one module, whether run or imported

from mlx_grpo import linux_blas  # noqa: E402, F401  before mlx.core; see there

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

from mlx_grpo import backend, cpu_ops  # noqa: E402

R1_SYSTEM_PROMPT = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


class ConfigError(UserError):
    """An option that is unknown, of the wrong type, out of range or contradictory."""


def run_command(main):
    """Run a script's `main` and exit with what it returns: a UserError becomes one line on standard error and exit
    code 2; any other error is our bug and keeps its traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print("error: " + " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


# ---- configuration ---------------------------------------------------------------------------------------------------

def opt(default, help, *, low=None, high=None, above=None, choices=None):
    """A configuration field: its default, meaning with unit, and range (low and high included, above excluded)."""
    metadata = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MLXGRPOConfig:
    """All options. A step is one optimizer update over batch_size * gradient_accumulation_steps prompts with
    num_generations completions each, all sampled before any is trained on; every period counts steps, 0 = never."""

    # model
    model_name: str = opt("Qwen/Qwen2.5-1.5B-Instruct", "directory or hub id of the model to train")
    model_loader: str = opt("auto", '"auto", a name from LOADERS, or "my_loader.py:MyLoader"')
    trust_remote_code: bool = opt(False, "run Python code that a model directory brings along")
    dtype: str = opt("auto", "dtype of the forward and backward pass; auto: float32 on CPU, bfloat16 on Metal and CUDA "
                     "(trained weights and moments are float32 in any case)",
                     choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = opt(0, "of the prompt order, every sampled token and the data splits", low=0, high=2**63 - 1)
    recipe: str = opt("", "named settings from RECIPES, below what the file and --set say",
                      choices=("", "deepseekmath", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "nanochat"))
    # where the run lives
    output_dir: str = opt("outputs", "directory of runs")
    run_name: str = opt("run", "the run's directory below output_dir; {n} becomes the next free number")
    # data
    dataset: str = opt("openai/gsm8k", "hub id, local .jsonl/.csv/.parquet file, synthetic:<task> or reasoning_gym:<task>")
    datasets: list[dict] = opt([], 'several instead, with options of their own: [{ dataset = "a.jsonl", weight = 2.0 }, ...]')
    dataset_config: str = opt("main", "configuration of a hub data set; empty = its default")
    dataset_split: str = opt("train", "split of a hub data set to train on")
    eval_split: str = opt("test", "split of a hub data set to evaluate on; empty = hold out eval_fraction instead")
    eval_fraction: float = opt(0.1, "share of the rows held out where there is no evaluation split", low=0, high=0.9)
    prompt_column: str = opt("question", "column of the prompt: text, or a list of chat messages")
    answer_column: str = opt("answer", 'column of the gold answer (after "#### " where that marker occurs)')
    solution_column: str = opt("", "column of the demonstration for sft; empty = the answer column's worked solution")
    dataset_options: dict = opt({}, "options of a synthetic or reasoning_gym task, as a TOML table")
    curriculum: dict = opt({}, 'raise an option of such a task as reward rises: { option = "digits", levels = [1, 2, 3], '
                           'raise_at = 0.8, window = 20 }')
    prompt_format: str = opt("chat", "a text prompt becomes a chat message, or stays text without a chat template",
                             choices=("chat", "text"))
    system_prompt: str = opt(R1_SYSTEM_PROMPT, "system message before the prompt; empty = none")
    chat_template_kwargs: dict = opt({}, "passed to the chat template, {enable_thinking = false} for instance")
    shuffle: bool = opt(True, "visit the prompts in a seeded random order, a new one each epoch")
    max_train_samples: int = opt(0, "use at most this many training rows; 0 = all (2000 of a task that is made)", low=0)
    few_shot: int | str = opt(0, "examples before each prompt: so many training rows, or all rows of a file", low=0)
    augment: list[str] = opt([], 'change rows as they are drawn: ["my_aug.py:function"], function(row, rng) -> row')
    max_prompt_length: int = opt(512, "tokens; longer prompts are dropped and counted", low=1)
    watch: str = opt("", "JSONL file whose rows are trained on as they are appended; dataset is then evaluated on only")
    watch_idle: float = opt(0.0, "seconds of waiting without a new row after which such a run ends; 0 = never", low=0)
    watch_target: float = opt(0.0, "least value of save_best's metric that such a run promotes; 0 = any that is better")
    # rollouts
    num_generations: int = opt(64, "G, completions per prompt", low=2)
    max_new_tokens: int = opt(512, "sampling limit of a completion, tokens; at most max_completion_length", low=1)
    max_completion_length: int = opt(1024, "Dr. GRPO's divisor and the overlong limit, tokens", low=1)
    temperature: float = opt(0.7, "divides the logits, when sampling and when scoring alike", above=0)
    top_p: float = opt(1.0, "sample from the smallest set of tokens with this probability; 1 = all", above=0, high=1)
    top_k: int = opt(0, "sample from this many best tokens; 0 = all", low=0)
    min_p: float = opt(0.0, "sample from tokens with this share of the best one's probability; 0 = all", low=0, high=1)
    repetition_penalty: float = opt(1.0, "divides the logits of tokens already in the context; 1 = off", above=0)
    stop: list[str] = opt([], 'texts that end a completion, ["</answer>"] for instance')
    response_prefix: str = opt("", "put before every completion: not sampled, not trained, seen by the rewards")
    rollout_batch_size: int = opt(256, "rows decoded together; others wait until one of them ends. It bounds the memory of keys "
                                  "and values, and changes no result", low=1)
    kv_bits: int = opt(0, "bits of the keys and values of rollouts; 0 = the compute dtype", choices=(0, 2, 3, 4, 6, 8))
    quantize_for_rollouts: bool | str = opt(False, 'sample from a quantised copy; "auto" = only up to 20 layers',
                                            choices=(True, False, "auto"))
    rollout_bits: int | list[int] = opt(4, "bits of the quantised copy: 2, 3, 4, 6 or 8; a list is a ladder to climb "
                                        "when rollouts fail, 0 = full precision: [4, 8, 0]")
    rollout_group_size: int = opt(64, "weights that share a scale in the quantised copy", choices=(32, 64, 128))
    rollout_precision: dict = opt({}, 'bits of chosen modules in the quantised copy, by the start of their path, 0 = not '
                                  'quantised: {lm_head = 8, "model.layers.0" = 0} (utils/sensitivity.py writes one)')
    self_healing: bool = opt(True, "a batch that is not finite or beyond min_ess or max_logp_gap is discarded, and redone "
                             "one rung up the ladder; off: the run stops")
    min_ess: float = opt(0.0, "least effective sample size of the sampler's tokens, as a share; 0 = any", low=0, high=1)
    max_logp_gap: float = opt(0.0, "greatest mean difference of sampler's and trainer's log-probs, nats; 0 = any", low=0)
    calm_syncs: int = opt(5, "copies into model_old without trouble before the ladder is stepped back down", low=1)
    dynamic_sampling: bool = opt(False, "replace groups whose rewards are all equal by further prompts (DAPO)")
    max_gen_batches: int = opt(10, "rounds of dynamic sampling, then the step goes on with fewer groups", low=1)
    update_every: int = opt(10, "steps between copies of model into model_old", low=1)
    # rewards
    rewards: list[str] = opt(["correctness", "int", "strict_format", "soft_format", "xmlcount"],
                             'names from REWARDS, or "my_rewards.py:function"')
    reward_options: dict = opt({}, "a table of options for each reward that takes some: { repetition = { ngram = 4 } }")
    reward_weights: list[float] = opt([], "one for each reward; empty = all 1")
    reward_workers: int = opt(0, "threads that score each group while others decode; 0 = the whole step afterwards", low=0)
    on_reward_error: str = opt("stop", "an exception, wrong length or non-finite value: stop the run, or skip the row",
                               choices=("stop", "skip"))
    max_reward_errors: int = opt(100, "skipped rows after which the run stops all the same", low=0)
    advantage: str = opt("group", "group: r - mean over std; rloo: r - mean of the others; gdpo: each reward normalised, "
                         "then summed", choices=("group", "rloo", "gdpo"))
    scale_rewards: str = opt("group", "what divides a group advantage: the std of its group, of the batch, or nothing",
                             choices=("group", "batch", "none"))
    normalize_advantages: bool = opt(False, "rloo: whiten over the batch")
    overlong_cache: int = opt(0, "soft overlong punishment (DAPO): a reward that falls from 0 to -1 over the last this many "
                              "tokens before max_completion_length; 0 = off", low=0)
    # objective
    objective: str = opt("grpo", "grpo, or distill: towards teacher_model on the student's own completions",
                         choices=("grpo", "distill"))
    teacher_model: str = opt("", "distill: directory or hub id of the teacher; it must share the vocabulary")
    distill_task_coeff: float = opt(0.0, "distill: weight of the rewards' advantage beside the teacher's", low=0)
    loss_type: str = opt("grpo", 'a name from LOSSES, or "my_loss.py:function"')
    importance_sampling_level: str = opt("token", "the ratio of a token, or of a whole sequence (GSPO)",
                                         choices=("token", "sequence"))
    num_iterations: int = opt(1, "passes over each rollout batch", low=1)
    minibatches: int = opt(1, "steps that share one rollout batch, each with prompts of its own", low=1)
    clip_eps: float = opt(0.2, "the ratio is clipped below at 1 - clip_eps", low=0, high=1)
    clip_eps_high: float = opt(-1.0, "the ratio is clipped above at 1 + clip_eps_high; -1 = clip_eps; cispo: the bound "
                               "itself", low=-1)
    delta: float = opt(0.0, "bound of the ratio in the unclipped branch; 0 = none", low=0)
    sapo_temperature_pos: float = opt(1.0, "sapo: of the gate for positive advantages", above=0)
    sapo_temperature_neg: float = opt(1.05, "sapo: of the gate for negative advantages", above=0)
    kl_coeff: float = opt(0.0, "weight of the KL to the reference model; 0 = no reference model", low=0)
    kl_estimator: str = opt("k3_corrected", "k1, k2, k3 (DeepSeekMath Eq. 4), or k3 times the ratio, unbiased off policy",
                            choices=("k1", "k2", "k3", "k3_corrected"))
    kl_in: str = opt("loss", "the KL term is part of the loss, or (k1, summed over the row) of the reward",
                     choices=("loss", "reward"))
    ref_sync_steps: int = opt(0, "steps between moves of the reference towards the policy; 0 = never", low=0)
    ref_sync_mix: float = opt(0.6, "share of the policy in such a move (TR-DPO, 2404.09656)", above=0, high=1)
    entropy_coef: float = opt(0.0, "weight of the entropy bonus", low=0)
    entropy_adaptive: bool = opt(False, "move entropy_coef by entropy_step towards entropy_target (Skywork-OR1, 2505.22312)")
    entropy_target: float = opt(0.2, "nats per token", low=0)
    entropy_step: float = opt(0.005, "change of an adaptive entropy_coef at each step; it stays within [0, 1]", above=0, high=1)
    top_entropy_quantile: float = opt(1.0, "train only this share of tokens, those of highest entropy; 1 = all", above=0, high=1)
    off_policy_threshold: float = opt(0.0, "rows with negative advantage that drifted by more nats per token are masked; "
                                      "0 = none", low=0)
    mask_truncated_completions: bool = opt(False, "completions without an end token contribute no tokens (DAPO)")
    old_logprobs: str = opt("auto", "sampler: as recorded; proximal: the model before the rollout batch's first update, and "
                            "sampler_correction for the rest; auto: proximal when rollouts are quantised",
                            choices=("auto", "sampler", "proximal"))
    sampler_correction: str = opt("sequence_mask", "proximal: how pi_old / pi_sampler weighs tokens (TIS, MIS)",
                                  choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"))
    sampler_clip_min: float = opt(0.0, "lower limit of that weight", low=0)
    sampler_clip_max: float = opt(3.0, "upper limit of that weight", above=0)
    # what is trained, and how
    fine_tune_type: str = opt("full", "all weights, or low-rank adapters on a frozen base (which may be quantised)",
                              choices=("full", "lora", "dora"))
    lora_rank: int = opt(8, "rank of the adapters", low=1)
    lora_scale: float = opt(20.0, "factor of the adapters' product, as mlx-lm means it", low=0)
    lora_alpha: float = opt(0.0, "PEFT's way to say it: lora_scale = lora_alpha / lora_rank; 0 = lora_scale counts", low=0)
    lora_dropout: float = opt(0.0, "in the trained pass; the old log-probs are scored with the same mask", low=0, high=0.99)
    lora_layers: int = opt(-1, "adapted blocks, counted from the last; -1 = all (mlx-lm's num_layers)", low=-1)
    lora_keys: list[str] = opt([], 'adapted modules, ["self_attn.q_proj"] for instance; empty = all linear ones in a block')
    prefix_sharing: str = opt("auto", "compute the prompt of a group once for all of its completions; auto: where the model "
                              "allows it and it saves a fifth of the tokens", choices=("auto", "on", "off"))
    max_tokens_per_microbatch: int = opt(-1, "padded tokens of a forward and backward pass, rows of like length together; 0 = "
                                         "no limit; -1 = 2048 on a GPU and 256 on a CPU. A prompt whose group doesn't fit has a pass "
                                         "of its own, of any length. Changes memory, not results", low=-1)
    gradient_checkpointing: bool = opt(False, "recompute each block in the backward pass: less memory, a third more time")
    batch_size: int = opt(1, "prompts in one forward and backward pass", low=1)
    gradient_accumulation_steps: int = opt(4, "such passes in one step", low=1)
    num_epochs: int = opt(1, "passes over the training prompts", low=1)
    max_steps: int = opt(0, "stop after this many steps; 0 = num_epochs decides", low=0)
    optimizer: str = opt("adamw", 'adam, adamw, adafactor, lion, muon (matrices; AdamW for the rest), or "my_opt.py:Class"')
    optimizer_dtype: str = opt("float32", "of trained weights and moments; bfloat16 (stochastic rounding) halves them",
                               choices=("float32", "bfloat16"))
    learning_rate: float = opt(1e-6, "peak learning rate", low=0)
    matrix_learning_rate: float = opt(0.0, "peak for matrices; 0 = learning_rate", low=0)
    embedding_learning_rate: float = opt(0.0, "peak for embeddings; 0 = learning_rate", low=0)
    head_learning_rate: float = opt(0.0, "peak for the output head; 0 = learning_rate", low=0)
    lr_scheduler_type: str = opt("cosine", "shape after the warmup",
                                 choices=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup_ratio: float = opt(0.1, "share of the steps with a rising learning rate (none for constant)", low=0, high=1)
    max_grad_norm: float = opt(0.1, "gradients are scaled down to this norm; 0 = never", low=0)
    adam_beta1: float = opt(0.9, "decay of Adam's first moment", low=0, high=0.999999)
    adam_beta2: float = opt(0.999, "decay of Adam's second moment", low=0, high=0.9999999)
    weight_decay: float = opt(0.0, "decoupled decay of matrices and head (adamw, lion, adafactor, muon)", low=0)
    decay_all: bool = opt(False, "weight decay on norms, biases and embeddings as well")
    use_compile: bool | str = opt("auto", 'compile the loss and its gradient; "auto" = on Metal and CUDA',
                                  choices=(True, False, "auto"))
    cache_limit_gb: float = opt(-1.0, "freed memory that MLX keeps for reuse, GB; -1 = an eighth of all (CPU: 0.03)", low=-1)
    wired_limit_gb: float = opt(-1.0, "Metal: memory kept from being swapped out, GB; -1 = what it recommends", low=-1)
    # log, evaluation, checkpoints
    logging_steps: int = opt(1, "steps between lines on the terminal", low=0)
    log_jsonl: bool = opt(True, "write metrics.jsonl and completions.jsonl")
    log_token_details: int = opt(4, "completions a step whose tokens and log-probs are logged, for the report", low=0)
    callbacks: list[str] = opt([], '"my_hooks.py:EarlyStop": your own code at the events of a run (docs/hooks.md)')
    live: bool = opt(True, "on a terminal, a view below the lines that is drawn anew: curves, time left, the last sample")
    report_to: str = opt("", "trackers that get the log too, with commas: wandb, trackio, tensorboard (docs/trackers.md)")
    health: dict = opt({}, "thresholds of the warnings in docs/health.md, false = off: { entropy = 0.05, swap = false }")
    save_total_limit: int = opt(0, "whole checkpoints to keep, beside the last and the best; 0 = all", low=0)
    save_best: str = opt("", 'metric whose best value so far saves a checkpoint, "eval/exact_match" for instance; empty = none')
    max_bad_steps: int = opt(0, "batches that are not finite at full precision and are left out, before the run stops", low=0)
    save_steps: int = opt(100, "steps between checkpoints; the last step always saves one", low=0)
    save_in_background: bool = opt(False, "write checkpoints in a thread while training goes on; their arrays stay in memory "
                                   "until then")
    eval_steps: int = opt(50, "steps between evaluations on held-out problems (and at step 0 and the end)", low=0)
    eval_samples: int = opt(200, "held-out problems in an evaluation; 0 = no evaluation", low=0)
    eval_every_updates: int = opt(25, "steps between evaluations on a fixed subset of the training problems", low=0)
    eval_subset_size: int = opt(200, "problems in that subset", low=0)
    eval_max_new_tokens: int = opt(128, "sampling limit in evaluations, tokens", low=1)
    eval_temperature: float = opt(0.0, "of the completions in evaluations; 0 = greedy", low=0)

    def __post_init__(self):
        """Every value against its field, then the rules that span options (check_objective). Raises ConfigError."""
        for name in OPTIONS:
            object.__setattr__(self, name, check_option(name, vars(self)[name], "MLXGRPOConfig"))
        for name in ("model_name", "output_dir", "run_name", "dataset", "prompt_column", "dataset_split", "rewards"):
            if not vars(self)[name]:
                raise ConfigError(f"{name} is empty; the default is {vars(MLXGRPOConfig).get(name) or ['correctness']!r}")
        if Path(self.run_name).is_absolute() or ".." in Path(self.run_name).parts:
            raise ConfigError(f"run_name is {self.run_name!r}, which leaves output_dir; name the place in output_dir")
        check_objective(self)
        from mlx_grpo.health import check_thresholds
        from mlx_grpo.optimizers import check_optimizer

        check_optimizer(self)
        check_thresholds(self.health)
        if self.max_new_tokens > self.max_completion_length:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens} but max_completion_length is "
                              f"{self.max_completion_length}; lower the first or raise the second")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ConfigError(f"reward_weights has {len(self.reward_weights)} values for {len(self.rewards)} rewards; "
                              "give one each, or none")
        adapters = {n: getattr(self, n) for n in OPTIONS if n.startswith("lora_")}
        changed = [n for n, value in adapters.items() if value != option_default(n)]
        if self.fine_tune_type == "full" and changed:
            raise ConfigError(f'{changed[0]} is set but fine_tune_type is "full"; set fine_tune_type = "lora" or remove it')
        if self.lora_alpha and "lora_scale" in changed:
            raise ConfigError(f"lora_alpha and lora_scale are both set; lora_alpha = {self.lora_alpha:g} with lora_rank = "
                              f"{self.lora_rank} means lora_scale = {self.lora_alpha / self.lora_rank:g}: keep one")
        if self.lora_dropout and (self.gradient_checkpointing or self.use_compile is True):
            raise ConfigError("lora_dropout needs the same random mask in every pass, so it goes neither with "
                              "gradient_checkpointing nor with use_compile = true; turn one of them off")
        if self.reward_weights and not any(self.reward_weights):
            raise ConfigError("reward_weights are all 0, so every advantage would be 0; weigh at least one reward")
        if -1 < self.clip_eps_high < 0:
            raise ConfigError(f"clip_eps_high is {self.clip_eps_high}; use -1 for the same as clip_eps, or at least 0")
        from mlx_grpo.sources import check_data
        check_data(self)

    @property
    def bits_ladder(self):
        """Bits of the quantised copy, rung by rung; [0] without quantised rollouts."""
        bits = [self.rollout_bits] if isinstance(self.rollout_bits, int) else self.rollout_bits
        return bits if self.quantize_for_rollouts else [0]

    @property
    def prompts_per_step(self):
        return self.batch_size * self.gradient_accumulation_steps


def check_objective(config):
    """Contradictions between the options of sampling and objective. Raises ConfigError."""
    c = config
    ladder = [c.rollout_bits] if isinstance(c.rollout_bits, int) else c.rollout_bits
    rules = [
        (c.loss_type not in LOSSES and ".py:" not in c.loss_type, f"loss_type must be one of {', '.join(LOSSES)}, or "
         f"file.py:function, got {c.loss_type!r}{nearest(c.loss_type, LOSSES)}"),
        (c.loss_type == "cispo" and c.clip_eps_high <= 0, "loss_type cispo clips the ratio at clip_eps_high itself; set it, "
         "clip_eps_high = 5.0 for instance"),
        (c.loss_type in ("cispo", "sapo", "vespo", "rloo") and c.delta, f"delta has no place in loss_type {c.loss_type!r}; "
         "remove one of them"),
        (c.loss_type in ("vespo", "rloo") and c.importance_sampling_level == "sequence",
         f"loss_type {c.loss_type!r} has a ratio of its own; remove importance_sampling_level"),
        (c.delta and c.delta <= 1 + (c.clip_eps if c.clip_eps_high < 0 else c.clip_eps_high),
         f"delta is {c.delta}, inside the clip range; use more than 1 + clip_eps_high (INTELLECT-2: 4), or 0"),
        (c.kl_in == "reward" and c.advantage == "gdpo", "kl_in = \"reward\" changes the sum of the rewards, which "
         "advantage gdpo never forms; use kl_in = \"loss\""),
        (c.kl_in == "reward" and c.kl_estimator not in ("k1", option_default("kl_estimator")),
         f"the KL in the reward is k1, and kl_estimator is {c.kl_estimator!r}; remove it"),
        (c.ref_sync_steps and not c.kl_coeff, "ref_sync_steps needs a reference model: set kl_coeff above 0"),
        (c.ref_sync_steps and c.fine_tune_type != "full", "ref_sync_steps moves the reference's weights, and with adapters "
         "the reference is the base itself; remove it"),
        (c.normalize_advantages and c.advantage != "rloo", "normalize_advantages belongs to advantage rloo; for others see "
         "scale_rewards"),
        (c.advantage != "group" and c.scale_rewards != "group", f"scale_rewards belongs to advantage group, and advantage is "
         f"{c.advantage!r}; remove one of them"),
        ((c.objective == "distill") != bool(c.teacher_model), "objective distill and teacher_model belong together: set both "
         "or neither"),
        (c.objective == "grpo" and c.distill_task_coeff, "distill_task_coeff needs objective = \"distill\""),
        (c.objective == "distill" and c.dynamic_sampling, "dynamic_sampling drops groups whose rewards are equal, which "
         "distill learns from; turn one of them off"),
        (c.overlong_cache > c.max_completion_length, f"overlong_cache is {c.overlong_cache}, more than max_completion_length"),
        (not ladder or any(b not in (0, 2, 3, 4, 6, 8) for b in ladder) or ladder[0] == 0,
         f"rollout_bits must be 2, 3, 4, 6 or 8, or a ladder of these that may end in 0, got {c.rollout_bits!r}"),
        (any(b not in (0, 2, 3, 4, 6, 8) for b in c.rollout_precision.values()),
         f"rollout_precision gives bits of 0, 2, 3, 4, 6 or 8, got {c.rollout_precision!r}"),
        (c.entropy_adaptive and c.lora_dropout, "entropy_adaptive and lora_dropout don't go together; turn one of them off"),
        (c.sampler_clip_min >= c.sampler_clip_max, f"sampler_clip_min {c.sampler_clip_min} is not below sampler_clip_max"),
        (c.lora_dropout and c.old_logprobs == "proximal", "lora_dropout scores the old log-probs itself; leave old_logprobs"),
        (c.watch and not c.max_steps and c.lr_scheduler_type != "constant", "watch has no last step that lr_scheduler_type = "
         f"{c.lr_scheduler_type!r} could lead to; set lr_scheduler_type = \"constant\", or max_steps"),
        (any(not text for text in c.stop), "stop holds an empty text, which ends every completion; remove it"),
    ]
    for broken, message in rules:
        if broken:
            raise ConfigError(message)


def options_without_effect(config, sources):
    """Lines naming options that were set, and can't have an effect in this combination."""
    c, updates = config, config.num_iterations * config.minibatches
    moved = updates > 1 or c.update_every > 1
    inert = {
        "clip_eps": not moved and "one update for each rollout, on policy: the ratio is 1",
        "clip_eps_high": not moved and c.loss_type != "cispo" and "one update for each rollout, on policy: the ratio is 1",
        "delta": not moved and "one update for each rollout, on policy: the ratio is 1",
        "importance_sampling_level": not moved and "one update for each rollout, on policy: the ratio is 1",
        "off_policy_threshold": not moved and not c.quantize_for_rollouts and "rollouts are always fresh",
        "kl_estimator": not c.kl_coeff and "kl_coeff is 0",
        "kl_in": not c.kl_coeff and "kl_coeff is 0",
        "ref_sync_mix": not c.ref_sync_steps and "ref_sync_steps is 0",
        "rollout_bits": not c.quantize_for_rollouts and "quantize_for_rollouts is false",
        "rollout_group_size": not c.quantize_for_rollouts and "quantize_for_rollouts is false",
        "rollout_precision": not c.quantize_for_rollouts and "quantize_for_rollouts is false",
        "calm_syncs": len(c.bits_ladder) == 1 and "rollout_bits is no ladder",
        "self_healing": len(c.bits_ladder) == 1 and "rollout_bits is no ladder: what fails stops the run in any case",
        "sampler_correction": old_logprobs_kind(c) == "sampler" and "old log-probs are the sampler's",
        "sampler_clip_min": old_logprobs_kind(c) == "sampler" and "old log-probs are the sampler's",
        "sampler_clip_max": old_logprobs_kind(c) == "sampler" and "old log-probs are the sampler's",
        "entropy_target": not c.entropy_adaptive and "entropy_adaptive is false",
        "entropy_step": not c.entropy_adaptive and "entropy_adaptive is false",
        "max_gen_batches": not c.dynamic_sampling and "dynamic_sampling is false",
        "sapo_temperature_pos": c.loss_type != "sapo" and "loss_type is not sapo",
        "sapo_temperature_neg": c.loss_type != "sapo" and "loss_type is not sapo",
        "max_reward_errors": c.on_reward_error == "stop" and 'on_reward_error is "stop"',
        "warmup_ratio": c.lr_scheduler_type == "constant" and "lr_scheduler_type is constant",
        "num_epochs": (c.max_steps and "max_steps decides") or (c.watch and "each row of watch is trained on once"),
        "watch_idle": not c.watch and "watch names no file",
        "watch_target": not c.watch and "watch names no file",
    }
    return [f"{name} has no effect: {why}" for name, why in inert.items() if why and sources[name] != "default"]


def old_logprobs_kind(config):
    """"sampler" or "proximal": where the old log-probs come from."""
    if config.old_logprobs == "auto":
        return "proximal" if (config.quantize_for_rollouts or config.kv_bits) and not config.lora_dropout else "sampler"
    return config.old_logprobs


RECIPES = {  # each with its source
    "deepseekmath": {"loss_type": "grpo", "kl_coeff": 0.04, "kl_estimator": "k3", "num_generations": 64},         # 2402.03300
    "dapo": {"loss_type": "dapo", "clip_eps": 0.2, "clip_eps_high": 0.28, "dynamic_sampling": True, "num_generations": 16,
             "mask_truncated_completions": True, "kl_coeff": 0.0},                                                # 2503.14476
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "kl_coeff": 0.0},                                # 2503.20783
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "clip_eps": 3e-4, "clip_eps_high": 4e-4,
             "minibatches": 4, "kl_coeff": 0.0},                                                                  # 2507.18071
    "cispo": {"loss_type": "cispo", "clip_eps_high": 5.0, "scale_rewards": "batch"},                              # 2506.13585
    "rloo": {"loss_type": "rloo", "advantage": "rloo", "kl_coeff": 0.05, "kl_in": "reward"},                      # 2402.14740
    "nanochat": {"loss_type": "dapo", "scale_rewards": "none", "kl_coeff": 0.0, "num_generations": 16, "temperature": 1.0,
                 "update_every": 1},                                               # nanochat's scripts/chat_rl.py
}
OPTIONS = {f.name: f for f in fields(MLXGRPOConfig)}


def recipe_options(values):
    """The options of the recipe that `values` names, those left out that they set themselves."""
    recipe = values.get("recipe")
    return {n: v for n, v in RECIPES[recipe].items() if n not in values} if recipe in list(RECIPES) else {}


def with_recipe(plain_init):
    """An __init__ that adds the recipe's options, so that they count wherever a configuration is made."""
    @wraps(plain_init)
    def init(self, **values):
        plain_init(self, **recipe_options(values) | values)

    return init


MLXGRPOConfig.__init__ = with_recipe(MLXGRPOConfig.__init__)
from mlx_grpo.other_names import OTHER_NAMES  # noqa: E402


def option_default(name):
    f = OPTIONS[name]
    return f.default if f.default is not MISSING else f.default_factory()


KINDS = {  # annotation -> (types, in words)
    "str": (str, "a text"), "int": (int, "a whole number"), "float": (float, "a number"), "bool": (bool, "true or false"),
    "list[str]": (list, 'a list of texts, ["a", "b"]'), "list[float]": (list, "a list of numbers, [1.0, 0.5]"),
    "list[dict]": (list, "a list of tables, [{ name = value }]"), "int | str": ((int, str), "a whole number or a text"),
    "int | list[int]": ((int, list), "a whole number or a list of them"),
    "dict": (dict, "a table, { name = value }"), "bool | str": ((bool, str), "true, false or a text"),
}


def nearest(name, known):
    """"; did you mean 'x'?" for the closest known name, or the empty string."""
    near = get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_option(name, value, source):
    """One option from TOML, --set or Python against its field; returns the value. Raises ConfigError naming `source`."""
    if name not in OPTIONS:
        ours = OTHER_NAMES.get(name.rpartition(".")[2])      # verl's are dotted: actor_rollout_ref.actor.clip_ratio
        hint = f"; here it is called {ours!r}" if ours in OPTIONS else nearest(name, OPTIONS)
        raise ConfigError(f"{source}: unknown option {name!r}{hint or '; `plan` lists them all'}")
    kind, rule = OPTIONS[name].type, OPTIONS[name].metadata
    types, words = KINDS[kind]
    if kind in ("float", "list[float]"):
        as_float = lambda v: float(v) if type(v) is int and abs(v) < 2**1000 else v
        value = [as_float(v) for v in value] if isinstance(value, list) else as_float(value)
    wrong = not isinstance(value, types) or (type(value) is bool and "bool" not in kind)
    wrong = wrong or (kind.startswith("list") and any(type(v) is not KINDS[kind[5:-1]][0] for v in value))
    if wrong:
        raise ConfigError(f"{source}: {name} must be {words}, got {value!r}")
    if rule["choices"] and value not in rule["choices"]:
        known = [v if isinstance(v, str) else json.dumps(v) for v in rule["choices"]]
        raise ConfigError(f"{source}: {name} must be one of {', '.join(map(json.dumps, rule['choices']))}, got {value!r}"
                          + nearest(value, known))
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, float) and not math.isfinite(v):
            raise ConfigError(f"{source}: {name} must be finite, got {v}")
        if type(v) is int and rule["high"] is None and v >= 2**31:
            raise ConfigError(f"{source}: {name} must be below 2^31, got {v}")
        for bound, bad, words in (("low", lambda b: v < b, "at least"), ("high", lambda b: v > b, "at most"),
                                  ("above", lambda b: v <= b, "above")):
            if rule[bound] is not None and not isinstance(v, str) and bad(rule[bound]):
                raise ConfigError(f"{source}: {name} must be {words} {rule[bound]}, got {v}")
    return value


def parse_set(text):
    """("key", value) of one --set key=value; the value is TOML, or plain text where it isn't. Raises ConfigError."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected key=value, --set seed=1 for instance")
    if key in OPTIONS and OPTIONS[key].type == "str" and not raw.strip().startswith(('"', "'")):
        return key, raw
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except ValueError:
        return key, raw
    return key, parsed["value"] if len(parsed) == 1 else raw


def load_config(path=None, sets=()):
    """(config, sources): defaults, then the TOML file (flat, or its table [mlx_grpo]), then --set key=value strings.

    path: a file, else $MLX_GRPO_CONFIG, else none. sources: option -> "default", the file's name, or "--set".
    Raises ConfigError, naming the source, for a file that can't be read and for any bad option."""
    remedy = "check --config" if path else "check $MLX_GRPO_CONFIG"
    path = path or os.environ.get("MLX_GRPO_CONFIG")
    values, sources = {}, dict.fromkeys(OPTIONS, "default")
    if path:
        try:
            with open(path, "rb") as file:
                table = tomllib.load(file)
        except OSError as error:
            raise ConfigError(f"{path}: can't read the configuration: {error.strerror}; {remedy}") from error
        except ValueError as error:      # TOML's own errors, and text that is not UTF-8
            raise ConfigError(f"{path}: not TOML: {error}; {remedy}") from error
        if isinstance(table.get("mlx_grpo"), dict):
            if others := [k for k in table if k != "mlx_grpo"]:
                raise ConfigError(f"{path}: {others[0]!r} stands outside the table [mlx_grpo]; move it inside")
            table = table["mlx_grpo"]
        for name, value in table.items():
            values[name], sources[name] = check_option(name, value, path), str(path)
    for text in sets:
        name, value = parse_set(text)
        values[name], sources[name] = check_option(name, value, f"--set {text}".replace("\n", "\\n")), "--set"
    for name in recipe_options(values):
        sources[name] = f"recipe {values['recipe']}"
    try:
        return MLXGRPOConfig(**values), sources
    except ConfigError as error:         # options that contradict each other: say where those that it names come from
        origins = [sources[name] for name in OPTIONS if re.search(rf"\b{name}\b", str(error))]
        raise ConfigError(f"{' and '.join(dict.fromkeys(o for o in origins if o != 'default'))}: {error}") from error


def load_symbol(spec, what):
    """The object named by "file.py:name"; the file is run. Raises ConfigError where either doesn't exist."""
    path, _, name = spec.rpartition(":")
    file = Path(path).expanduser()
    if not path.endswith(".py") or not file.is_file():
        raise ConfigError(f"{what} {spec!r}: expected file.py:name, and there is no file {path or spec!r}")
    module_spec = importlib.util.spec_from_file_location(f"user_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module     # dataclasses and pickles of the user's file look themselves up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:   # the user's code may raise anything, and a script may end itself
        raise ConfigError(f"{what} {spec!r}: running {file} raised {type(error).__name__}: {error}; mend the file") from error
    if name not in vars(module):
        raise ConfigError(f"{what} {spec!r}: {file} defines no {name!r}{nearest(name, vars(module)) or '; write file.py:name'}")
    return vars(module)[name]


# ---- tokenizer and models --------------------------------------------------------------------------------------------

from mlx_grpo import nanochat_tokenizer as nanochat  # noqa: E402  after UserError, which it raises


class TiktokenTokenizerWrapper:
    """nanochat's tokenizer (a tiktoken.Encoding) with the methods that mlx-lm and the trainer use of a Hugging Face one.

    Text is always ordinary text: "<|bos|>" typed by a user is seven characters, not a token. Special tokens come from
    `apply_chat_template`, from `allowed_special`, or as the one BOS that `add_special_tokens` puts in front."""
    bos_token, eos_token, pad_token, unk_token = nanochat.BOS, nanochat.EOS, nanochat.EOS, None
    chat_template = nanochat.CHAT_TEMPLATE
    has_chat_template = True
    name_or_path = "nanochat"

    def __init__(self, encoding):
        self.encoding = encoding
        self.special_ids = nanochat.special_token_ids(encoding, encoding.name)       # text -> id
        self.bos_token_id, self.eos_token_id = self.special_ids[self.bos_token], self.special_ids[self.eos_token]
        self.pad_token_id, self.vocab_size = self.eos_token_id, encoding.n_vocab
        self.eos_token_ids = {self.eos_token_id, self.bos_token_id}      # nanochat's engine stops at either
        self.all_special_tokens = sorted(self.special_ids, key=self.special_ids.get)
        self.all_special_ids = [self.special_ids[token] for token in self.all_special_tokens]
        self.allowed_special = frozenset(self.special_ids)
        self.tokens = nanochat.token_spellings(encoding)
        self.vocab = {token: number for number, token in enumerate(self.tokens)}

    @classmethod
    def from_directory(cls, directory):
        """From tokenizer.json where there is one, else from tokenizer.pkl, which is read without running anything in it."""
        return cls(nanochat.read_encoding(directory))

    def __len__(self):
        return self.vocab_size

    def token_bytes(self, token):
        return self.encoding.decode_single_token_bytes(token)

    def get_vocab(self):
        """Token -> id, tokens spelt as in tokenizer.json."""
        return dict(self.vocab)

    def convert_tokens_to_ids(self, tokens):
        """The id of a token spelt as in tokenizer.json, None for an unknown one; a list gives a list."""
        return self.vocab.get(tokens) if isinstance(tokens, str) else [self.vocab.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids):
        return self.tokens[ids] if isinstance(ids, int) else [self.tokens[int(number)] for number in ids]

    def encode(self, text, add_special_tokens=True, allowed_special=()):
        """Token ids; `add_special_tokens` puts BOS in front. allowed_special: names of special tokens, or "all", that
        `text` may spell. Text from `apply_chat_template(tokenize=False)` gives the exact ids of its conversation."""
        if isinstance(text, nanochat.RenderedChat):
            ids = list(text.ids)
            return ids if ids[0] == self.bos_token_id or not add_special_tokens else [self.bos_token_id, *ids]
        if allowed_special:
            names = self.allowed_special if allowed_special == "all" else set(allowed_special)
            ids = self.encoding.encode(text, allowed_special=names, disallowed_special=())
        else:
            ids = self.encoding.encode_ordinary(text)
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def decode(self, ids, skip_special_tokens=False):
        ids = [ids] if isinstance(ids, int) else [int(number) for number in ids]
        return self.encoding.decode([n for n in ids if not skip_special_tokens or n not in self.all_special_ids])

    def batch_decode(self, sequences, skip_special_tokens=False):
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=True, continue_final_message=False,
                            return_dict=False, tools=None, enable_thinking=False, **unknown):
        """Token ids of a conversation in nanochat's format, or its text. UserError for an option the format doesn't have."""
        for name, value in {"return_dict": return_dict, "tools": tools, "enable_thinking": enable_thinking, **unknown}.items():
            if value or name in unknown:
                raise UserError(f"nanochat's chat format has no {name} (got {value!r}); leave the option away")
        pieces = nanochat.conversation_pieces(messages)
        if continue_final_message:
            if messages[-1]["role"] != "assistant" or add_generation_prompt:
                raise UserError("continue_final_message needs an assistant message at the end, and no generation prompt")
            pieces = pieces[:-1]
        if add_generation_prompt:
            pieces.append(("special", "<|assistant_start|>", 0))
        ids, _ = nanochat.pieces_to_ids(pieces, self.encoding)
        return ids if tokenize else nanochat.RenderedChat(pieces, ids)

    def render_conversation(self, messages, max_tokens=nanochat.MAX_CONVERSATION_TOKENS):
        """(ids, mask) for training: mask is 1 on what the assistant says and on its end token, 0 elsewhere."""
        ids, mask = nanochat.pieces_to_ids(nanochat.conversation_pieces(messages), self.encoding)
        return ids[:max_tokens], mask[:max_tokens]

    @property
    def detokenizer(self):
        """A new streaming detokenizer, which never gives half a character."""
        return nanochat.ByteDetokenizer(self)

    def save_pretrained(self, directory):
        """tokenizer.json and its companions for transformers and mlx-lm, tokenizer.pkl for nanochat."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        nanochat.write_tokenizer(self.encoding, directory)


def shipped_path(path):
    """The path as given, or, where there is none, the one beside this file: data/... works from any directory."""
    return Path(path) if Path(path).exists() or not (HERE / path).exists() else HERE / path


def cast_floats(tree, dtype):
    """The tree with its floating-point arrays in `dtype` (a name or an mx.Dtype); the others, and equal ones, shared."""
    dtype = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    return tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, tree)


def is_quantized(model):
    return any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))


def count_parameters(model):
    from mlx_lm.utils import get_total_parameters

    return get_total_parameters(model)


def frozen_copy(model, *, bits=0, group_size=64, precision=None):
    """A second model with the same weights, not trained. The arrays are shared, so that it costs memory only once
    `model` has moved; with bits, its matrices are quantised, those whose path starts with a key of `precision` to its
    bits (0 = not). Raises UserError for a weight that is not finite."""
    weights = model.parameters()
    twin = copy.deepcopy(model, {id(array): array for _, array in tree_flatten(weights)})
    copied = dict(tree_flatten(twin.parameters()))
    for name, array in tree_flatten(weights):
        assert copied[name].shape == array.shape, f"{name} was not copied"
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            raise UserError(f"{name} holds NaN or infinity, so no rollout can be sampled from it; "
                            "lower learning_rate or max_grad_norm and resume from the last checkpoint")
    if bits:
        def quantised(path, module):
            chosen = [value for start, value in (precision or {}).items() if path == start or path.startswith(start + ".")]
            if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size or chosen[-1:] == [0]:
                return False
            return {"bits": chosen[-1] if chosen else bits, "group_size": group_size}

        if unknown := [key for key in precision or {} if not any(f"{n}.".startswith(f"{key}.") for n, _ in twin.named_modules())]:
            raise ConfigError(f"rollout_precision: the model has no module {unknown[0]!r}")
        nn.quantize(twin, group_size, bits, class_predicate=quantised)
        mx.eval(twin.parameters())
    twin.freeze()
    return twin


from mlx_grpo.model_loading import (  # noqa: E402
    LOADERS, BaseModelLoader, CustomModelLoader, NanoChatLoader, check_end_token, find_loader, load_adapted_model, load_model,
    load_tokenizer, resolve_model)


# ---- problems --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    """One row of a data set. prompt: text, or chat messages. answer: gold answer, or None. solution: demonstration for
    sft, or None. columns: every column of the row, `answer` replaced by the gold answer; rewards get them by name.
    source, level: of `datasets` and `curriculum`. examples: (question, answer) pairs shown in the prompt (few_shot)."""

    prompt: str | list
    answer: str | None
    columns: dict
    solution: str | None = None
    source: str = ""
    level: int = 0
    examples: tuple = ()


def extract_hash_answer(text: str) -> str | None:
    """The number after GSM8K's final marker, commas removed: "... #### 1,234" -> "1234"; None without a marker."""
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else None


def extract_xml_answer(text: str) -> str | None:
    """The text of the last <answer>...</answer>, stripped; None without such a pair."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))      # the last one that is closed
    return text[start + len("<answer>"):text.find("</answer>", start)].strip() if start >= 0 else None


from mlx_grpo.chat_template import rendered  # noqa: E402
from mlx_grpo.problems import (  # noqa: E402
    as_problems, hub_rows, is_right, load_problems, make_problem, read_rows, worked_solution)


def render_prompt(tokenizer, problem, config):
    """Token ids of a prompt: through the chat template with a generation prompt; without a template, the contents
    one after the other as text."""
    if isinstance(problem.prompt, str):
        return list(tokenizer.encode(problem.prompt))
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode("\n\n".join(m["content"] for m in problem.prompt) + "\n"))
    return rendered(tokenizer, problem.prompt, **config.chat_template_kwargs)


def fitting_problems(problems, tokenizer, config):
    """Those whose prompt has at most max_prompt_length tokens; the number of dropped ones is printed. Raises UserError
    when none is left."""
    kept = [p for p in problems if len(render_prompt(tokenizer, p, config)) <= config.max_prompt_length]
    if len(kept) < len(problems):
        print(f"{len(problems) - len(kept)} of {len(problems)} prompts are longer than max_prompt_length "
              f"({config.max_prompt_length} tokens) and are left out", file=sys.stderr)
    if problems and not kept:
        raise UserError(f"all prompts are longer than max_prompt_length = {config.max_prompt_length}; raise it")
    return kept


# ---- rewards ---------------------------------------------------------------------------------------------------------

def completion_text(completion):
    """A completion as text: itself, or the content of the last chat message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def extract_answer(text):
    """The XML answer, else the text after "####", else None."""
    answer = extract_xml_answer(text)
    return extract_hash_answer(text) if answer is None else answer


def as_number(text):
    """"$1,000.50" -> Fraction; None for what isn't one number (a sign, digits, grouping commas, a fraction, %)."""
    text = text.strip().lstrip("$").rstrip("%.").strip().replace("\u2212", "-")       # the typographic minus
    if len(text) > 64 or not re.fullmatch(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?(/\d+)?", text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):     # "", "/2", "1.5/2", "1/0"
        return None


def same_answer(given, gold):
    """Whether two answers agree: as numbers where both are ("1,000" = "1000.0"), else as text without case."""
    if given is None or gold is None:
        return False
    a, b = as_number(given), as_number(gold)
    return a == b if a is not None and b is not None else given.strip().casefold() == gold.strip().casefold()


def correctness_reward_func(prompts, completions, answer, **_):
    """2.0 where the extracted answer equals the gold one (1,000 = 1000.0), else 0.0."""
    return [2.0 * same_answer(extract_answer(completion_text(c)), gold) for c, gold in zip(completions, answer)]


def int_reward_func(completions, **_):
    """0.5 where the extracted answer (XML, else after ####) is an integer, else 0.0."""
    integer = lambda text: text is not None and re.fullmatch(r"[-+]?(\d{1,3}(,\d{3})+|\d+)", text) is not None
    return [0.5 * integer(extract_answer(completion_text(c))) for c in completions]


TEXT = r"((?!</?(reasoning|answer)>).)*"     # anything but one of the four tags


def strict_format_reward_func(completions, **_):
    """0.5 where the whole completion is <reasoning>...</reasoning> then <answer>...</answer>, else 0.0."""
    whole = re.compile(rf"\s*<reasoning>{TEXT}</reasoning>\s*<answer>{TEXT}</answer>\s*", re.DOTALL)
    return [0.5 * (whole.fullmatch(completion_text(c)) is not None) for c in completions]


def soft_format_reward_func(completions, **_):
    """0.5 where the completion contains reasoning tags followed by answer tags, else 0.0."""
    inside = re.compile(rf"<reasoning>{TEXT}</reasoning>\s*<answer>{TEXT}</answer>", re.DOTALL)
    return [0.5 * (inside.search(completion_text(c)) is not None) for c in completions]


def xmlcount_reward_func(completions, **_):
    """0.125 for each of the four tags that occurs exactly once, minus 0.001 for each character after </answer>; at
    least 0.0, at most 0.5."""
    def score(text):
        tags = sum(0.125 * (text.count(tag) == 1) for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
        return max(0.0, tags - 0.001 * len(text.rpartition("</answer>")[2]) * ("</answer>" in text))
    return [score(completion_text(c)) for c in completions]


from mlx_grpo.more_rewards import MORE_REWARDS, Maker, bind_options  # noqa: E402
from mlx_grpo.reward_workers import RewardWorkers  # noqa: E402
from mlx_grpo.scorer import RewardError, Scorer  # noqa: E402
from mlx_grpo.gym_tasks import reasoning_gym_reward_func  # noqa: E402

REWARDS = {
    "correctness": correctness_reward_func,
    "int": int_reward_func,
    "strict_format": strict_format_reward_func,
    "soft_format": soft_format_reward_func,
    "xmlcount": xmlcount_reward_func,
    **MORE_REWARDS,         # these have options: utils/more_rewards.py
    "reasoning_gym": reasoning_gym_reward_func,
}


def find_rewards(specs, options=None):
    """{name: function} of names in REWARDS ("judge:style" is a judge named style), "file.py:function" specs, or callables,
    with their options (`reward_options`) bound; such a dictionary is returned as it is. Raises ConfigError."""
    if isinstance(specs, dict):
        return specs
    found, options = {}, options or {}
    for spec in specs:
        text = spec if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)      # partials have none
        kind, _, name = text.removesuffix("_reward_func").rpartition(":")
        if callable(spec):
            function = spec
        elif kind:
            function = REWARDS[kind] if isinstance(REWARDS.get(kind), Maker) else load_symbol(spec, "reward")
        elif name in REWARDS:
            function = REWARDS[name]
        else:
            raise ConfigError(f"rewards: there is no {spec!r}{nearest(spec, REWARDS)} (known: {', '.join(REWARDS)}; "
                              "your own: file.py:function)")
        if name in found:
            raise ConfigError(f"rewards: {name!r} is named twice; remove one")
        found[name] = bind_options(spec, name, function, options.get(name, {}))
    if unused := [name for name in options if name not in found]:
        raise ConfigError(f"reward_options: {unused[0]!r} is none of the rewards ({', '.join(found)})"
                          + nearest(unused[0], found))
    return found


# ---- rollouts --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rollout:
    """G completions of one prompt, as sampled.

    prompt_ids: L token ids, a response_prefix among them. For each of the G completions: completion_ids, T_i sampled ids
    with the end token; logprobs, T_i log-probs of these ids under the distribution they were drawn from (nats);
    env_mask, T_i numbers, 1 = sampled, 0 = put there by an environment, not trained; ended, whether it stopped by
    itself; texts, decoded without special tokens and with the prefix, for rewards and people; kept, the tokens that
    could be drawn at each position where sampling is truncated (Batch.kept), or None. inputs: what else the prompt
    holds (images), opaque."""

    problem: Problem
    prompt_ids: list
    completion_ids: list
    logprobs: list
    env_mask: list
    ended: list
    texts: list
    kept: list | None = None
    inputs: object = None


TRAIN, EVAL = 0, 1      # separate random streams


def row_uniforms(seed, step, prompt, row, length, stream=TRAIN):
    """(length,) float32 in (0, 1), one for each token position: Philox with key (seed, step) and counter (prompt, row),
    so a row draws the same numbers whoever shares its batch, whatever the order, and after a resume. prompt is the
    place in the step, row the place in the group."""
    raw = np.random.Philox(key=[seed, step], counter=[0, row, prompt, stream]).random_raw(length)
    return (((raw >> np.uint64(41)).astype(np.float64) + 0.5) * 2.0**-23).astype(np.float32)


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from: the logits after the repetition penalty, divided by the
    temperature (0 = the best token), cut to the top_k best, then to the smallest set with probability top_p, then to
    those with at least min_p of the best one's probability, and renormalised. stop: texts that end a completion."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple = ()
    max_new_tokens: int = 256

    @property
    def truncated(self):
        return bool(self.temperature and (self.top_k or self.top_p < 1 or self.min_p))


def draw(logits, uniforms, sampling, seen=None):
    """One token for each row by inverting the cumulative distribution at its uniform number.

    logits (B, V), uniforms (B,), seen (B, V) booleans for the repetition penalty. Returns tokens (B,), log-probs (B,) in
    nats under the distribution drawn from, and what could be drawn: (B, top_k) ids with -1 behind for a top_k of at most
    KEPT_IDS, else (B, V) booleans, or None where that is everything."""
    logits = logits.astype(mx.float32)     # bf16 log-softmax is off by 1e-2 nats, the size of a real log-ratio
    if seen is not None:
        logits = penalised(logits, seen, sampling.repetition_penalty)
    z = logits / sampling.temperature if sampling.temperature not in (0, 1) else logits
    z = z - z.max(axis=-1, keepdims=True)
    if not sampling.temperature:
        tokens = mx.argmax(z, axis=-1)
        return tokens, mx.take_along_axis(z, tokens[:, None], axis=-1)[:, 0] - mx.log(backend.exp(z).sum(axis=-1)), None
    if not sampling.truncated:
        tokens, total = invert(backend.exp(z), uniforms)
        return tokens, mx.take_along_axis(z, tokens[:, None], axis=-1)[:, 0] - mx.log(total), None
    order = mx.argsort(-z, axis=-1)
    z = mx.take_along_axis(z, order, axis=-1)                                  # best first
    weights, rank, inside = backend.exp(z), mx.arange(z.shape[-1]), mx.ones(z.shape, dtype=mx.bool_)
    if sampling.top_k:
        inside = mx.broadcast_to(rank < sampling.top_k, z.shape)
    if sampling.top_p < 1:
        so_far = mx.cumsum(mx.where(inside, weights, 0), axis=-1)
        inside = inside & (so_far - weights < sampling.top_p * so_far[:, -1:])
    if sampling.min_p:
        inside = inside & (weights >= sampling.min_p * weights[:, :1])
    weights = mx.where(inside | (rank == 0), weights, 0)
    places, total = invert(weights, uniforms)
    logprobs = mx.take_along_axis(z, places[:, None], axis=-1)[:, 0] - mx.log(total)
    tokens = mx.take_along_axis(order, places[:, None], axis=-1)[:, 0]
    if 0 < sampling.top_k <= KEPT_IDS:
        return tokens, logprobs, mx.where(weights > 0, order.astype(mx.int32), -1)[:, :sampling.top_k]
    kept = mx.put_along_axis(mx.zeros(z.shape, dtype=mx.bool_), order, weights > 0, axis=-1)
    return tokens, logprobs, kept


def invert(weights, uniforms, width=128):
    """(the first place where the running sum of the weights reaches uniform * total (B,), total (B,)), weights (B, V): found
    in two steps, first the block of `width` tokens and then the token in it, so that V is summed up and not scanned."""
    B, V = weights.shape
    weights = mx.pad(weights, [(0, 0), (0, -V % width)]) if V % width else weights
    sums = mx.cumsum(weights.reshape(B, -1, width).sum(axis=-1), axis=-1)      # (B, V / width)
    target = uniforms[:, None] * sums[:, -1:]                                  # below the total, as uniforms are below 1
    block = mx.argmax(sums >= target, axis=-1)[:, None].astype(mx.int32)
    inside = mx.take_along_axis(weights, block * width + mx.arange(width), axis=-1)    # (B, width)
    before = mx.where(block > 0, mx.take_along_axis(sums, mx.maximum(block - 1, 0), axis=1), 0)
    running = mx.where(inside > 0, before + mx.cumsum(inside, axis=-1), -1)    # never a token without weight
    last = width - 1 - mx.argmax(inside[:, ::-1] > 0, axis=-1)                 # where rounding leaves the sum below the target
    place = mx.where(running.max(axis=-1) >= target[:, 0], mx.argmax(running >= target, axis=-1), last)
    return block[:, 0] * width + place, sums[:, -1]


KEPT_IDS = 64      # kept sets of up to this size are recorded as ids, larger ones as a bit for each token


def prefill(model, prompt_ids, kv_bits=0, chunk=512):
    """(cache, logits (1, V)) after one prompt of L tokens, in pieces of `chunk`; kv_bits: then quantised."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    cache = make_prompt_cache(model)
    tokens = mx.array([prompt_ids])
    for start in range(0, len(prompt_ids), chunk):
        logits = model(tokens[:, start:start + chunk], cache=cache)[:, -1]
        mx.eval([c.state for c in cache])      # not the logits: only those of the last piece are needed
    mx.eval(logits)
    if kv_bits and (odd := [type(layer).__name__ for layer in cache if type(layer) is not KVCache]):
        raise ConfigError(f"kv_bits is {kv_bits}, and this model keeps a {odd[0]}, which can't be quantised; set kv_bits = 0")
    if not kv_bits:
        return cache, logits
    widths = cache[0].keys.shape[-1], cache[0].values.shape[-1]
    group_size = next((size for size in (64, 32) if not any(width % size for width in widths)), None)
    if not group_size:
        raise ConfigError(f"kv_bits is {kv_bits}, and heads of width {widths[0]} have no groups of 32 to quantise; set kv_bits = 0")
    return [layer.to_quantized(group_size, kv_bits) for layer in cache], logits


def map_cache(function, *caches):
    """A cache whose arrays (rows first) are function(arrays of the given caches); other state from the first one."""
    on_arrays = lambda first, *rest: function(first, *rest) if isinstance(first, mx.array) else first
    made = type(caches[0]).from_state(tree_map(on_arrays, caches[0].state, *[c.state for c in caches[1:]]))
    if hasattr(caches[0], "bits"):              # mlx-lm's quantised cache leaves these out of its state
        made.bits, made.group_size = caches[0].bits, caches[0].group_size
    return made


def pick_rows(layer, rows):
    """A cache of the given rows (an array of indices); a batch cache also loses padding that no row needs any more."""
    if hasattr(layer, "filter"):
        layer.filter(rows)
        return layer
    return map_cache(lambda a: a[rows], layer)


def stack_caches(caches, counts, mixed):
    """The caches of some prefilled prompts as one, each prompt `counts` times in a row. mixed: prompts have different
    lengths or rows join later, so mlx-lm's batch caches are used, padded on the left. Raises UserError for a cache
    without one."""
    if mixed and (odd := [layer for layer in caches[0] if not hasattr(layer, "merge")]):
        raise UserError(f"prompts of different lengths can't share a batch in a {type(odd[0]).__name__}; set "
                        "rollout_batch_size to num_generations")
    join = (lambda layer: type(layer[0]).merge(list(layer))) if mixed else (
        lambda layer: map_cache(lambda *arrays: mx.concatenate(arrays, axis=0), *layer))
    rows = mx.array(np.repeat(np.arange(len(counts)), counts))
    return [pick_rows(join(layer), rows) for layer in zip(*caches)]


class Decoder:
    """Decodes rows of several prompts together, at most `at_once`: rows that have ended leave the batch, waiting ones
    enter it, both once an eighth of the rows has ended. Each prompt is prefilled when its first row enters; the next
    token is queued before the last one is read. prompts: [ids]; uniforms (B, max_new_tokens), num_generations rows for
    each prompt; stopped(ids) -> whether a stop text occurs.

    Row by row: ids and logprobs (T_i,), the end token included; kept, the kept sets (T_i, ...); ended, whether it ended
    by itself."""

    def __init__(self, model, prompts, uniforms, sampling, *, end_ids, at_once, stopped=None, kv_bits=0):
        self.model, self.prompts, self.uniforms, self.sampling = model, prompts, uniforms, sampling
        self.end_ids, self.stopped, self.kv_bits = end_ids, stopped, kv_bits
        B = len(uniforms)
        self.G = B // len(prompts)
        self.ids, self.logprobs, self.kept = ([[] for _ in range(B)] for _ in range(3))
        self.ended, self.waiting, self.at_once = [False] * B, list(range(B)), at_once
        self.prefilled = {}              # prompt -> (cache, logits), while rows of it wait
        lengths = set(map(len, prompts))
        self.mixed = not kv_bits and (len(lengths) > 1 or B > at_once)
        self.rows, self.cache, self.state = np.zeros(0, dtype=int), None, None

    def run(self, finished=lambda row: None):
        """Decode every row; finished(row) is called as soon as one is done."""
        while self.waiting or len(self.rows):
            if not len(self.rows):
                self.admit(np.zeros(0, dtype=bool))
            position = np.array([len(self.ids[row]) for row in self.rows])
            last = position + 1 >= self.sampling.max_new_tokens                     # rows that end here at the latest
            tokens, taken, sets, seen = self.state
            if not last.all():                             # queue the next token before this one is read
                with cpu_ops.queue_layers():
                    logits = self.model(tokens[:, None], cache=self.cache)[:, -1]
                queued = self.next_tokens(logits, np.minimum(position + 1, self.sampling.max_new_tokens - 1), seen)
            read_sets, done = pack_sets(sets), self.done
            for i, (row, token, logprob) in enumerate(zip(self.rows.tolist(), tokens.tolist(), taken.tolist())):
                if done[i]:
                    continue
                self.ids[row].append(token)
                self.logprobs[row].append(logprob)
                if read_sets is not None:
                    self.kept[row].append(read_sets[i])
                self.ended[row] = token in self.end_ids or (self.stopped is not None and self.stopped(self.ids[row]))
                if self.ended[row] or last[i]:
                    done[i] = True
                    finished(row)
            if last.all():
                done[:] = True
            if done.all():
                self.rows = self.rows[:0]
                continue
            self.state = queued
            if done.sum() * 8 >= len(done):                # moving the cache costs about one token for all of its rows
                self.admit(~done)

    def next_tokens(self, logits, position, seen):
        """Draw a token for each row and start computing it; the state of the next turn."""
        uniforms = mx.array(self.uniforms[self.rows, position])
        tokens, taken, sets = draw(logits, uniforms, self.sampling, seen)
        if seen is not None:
            seen = mx.put_along_axis(seen, tokens[:, None], mx.array(True), axis=-1)
        mx.async_eval(tokens, taken)
        return tokens, taken, sets, seen

    def admit(self, stay):
        """Keep the rows of the batch that `stay`, and fill up with waiting ones."""
        fresh = self.entering(self.at_once - int(stay.sum()))
        kept = self.rows[stay]
        if len(kept):
            keep = mx.array(np.flatnonzero(stay))
            self.state = [None if a is None else a[keep] for a in self.state]
            if len(kept) < len(stay):
                self.cache = [pick_rows(layer, keep) for layer in self.cache]
        if fresh:
            prompts = list(dict.fromkeys(row // self.G for row in fresh))
            counts = [sum(row // self.G == p for row in fresh) for p in prompts]
            caches, logits = zip(*[self.prefilled[p] for p in prompts])
            cache = stack_caches(caches, counts, self.mixed)
            self.prefilled = {p: self.prefilled[p] for p in prompts[-1:] if self.waiting and self.waiting[0] // self.G == p}
            self.rows = np.array(fresh)
            logits = mx.concatenate(logits)[mx.array(np.repeat(np.arange(len(prompts)), counts))]
            seen = seen_tokens([self.prompts[row // self.G] for row in fresh], logits.shape[-1], self.sampling)
            state = self.next_tokens(logits, np.zeros(len(fresh), dtype=int), seen)
            if len(kept):
                for layer, other in zip(self.cache, cache):
                    layer.extend(other)
                state = [None if a is None else mx.concatenate([a, b]) for a, b in zip(self.state, state)]
            else:
                self.cache = cache
            self.state = state
        self.rows, self.done = np.concatenate([kept, np.array(fresh, dtype=int)]), np.zeros(len(kept) + len(fresh), dtype=bool)

    def entering(self, room):
        """The waiting rows that may enter now, their prompts prefilled: as many as there is room for, and none in the middle
        of a batch that can't take rows of other lengths."""
        if not self.mixed and len(self.rows):
            return []
        fresh = self.waiting[:room]
        if not self.mixed and fresh:                       # one length at a time
            length = len(self.prompts[fresh[0] // self.G])
            fresh = [row for row in fresh if len(self.prompts[row // self.G]) == length]
        self.waiting = [row for row in self.waiting if row not in set(fresh)]
        for p in dict.fromkeys(row // self.G for row in fresh):
            if p not in self.prefilled:
                self.prefilled[p] = prefill(self.model, self.prompts[p], self.kv_bits)
        return fresh


def pack_sets(sets):
    """Kept sets as NumPy: ids as they are, booleans packed into bits; None for None."""
    if sets is None:
        return None
    sets = np.array(sets)
    return np.packbits(sets, axis=-1) if sets.dtype == bool else sets


def train_sampling(config):
    """The Sampling of training rollouts."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty,
                    tuple(config.stop), config.max_new_tokens)


def sample_completions(model, tokenizer, problems, config, sampling, *, num_generations, step, stream=TRAIN, first_prompt=0,
                       finished=None):
    """A Rollout of num_generations completions for each problem, at most rollout_batch_size rows decoded together.
    first_prompt: place of the first problem in the step. finished(place, rollout) is called as soon as a problem's
    completions are done. Raises NotFinite for a log-prob that is not finite."""
    prefix, G = tokenizer.encode(config.response_prefix, add_special_tokens=False) if config.response_prefix else [], num_generations
    prompts = [render_prompt(tokenizer, p, config) + list(prefix) for p in problems]
    uniforms = np.stack([row_uniforms(config.seed, step, first_prompt + p, g, sampling.max_new_tokens, stream)
                         for p in range(len(problems)) for g in range(G)])
    decoder = Decoder(model, prompts, uniforms, sampling, end_ids=tokenizer.eos_token_ids, at_once=config.rollout_batch_size,
                      stopped=stop_test(tokenizer, sampling.stop) if sampling.stop else None, kv_bits=config.kv_bits)
    rollouts, left = [None] * len(problems), [G] * len(problems)

    def row_done(row):
        p = row // G
        left[p] -= 1
        if not left[p]:
            group = slice(p * G, (p + 1) * G)
            kept = [np.stack(sets) for sets in decoder.kept[group]] if sampling.truncated else None
            rollouts[p] = make_rollout(tokenizer, problems[p], prompts[p], decoder.ids[group], decoder.logprobs[group],
                                       ended=decoder.ended[group], kept=kept, prefix=config.response_prefix)
            if finished:
                finished(p, rollouts[p])

    decoder.run(row_done)
    return rollouts


def seen_tokens(prompts, vocab_size, sampling):
    """(B, V) booleans of the tokens in each row's prompt, or None where there is no repetition penalty."""
    if sampling.repetition_penalty == 1:
        return None
    seen = np.zeros((len(prompts), vocab_size), dtype=bool)
    for row, ids in zip(seen, prompts):
        row[list(ids)] = True
    return mx.array(seen)


def stop_test(tokenizer, stop):
    """A function of sampled ids: whether the last of them completes one of the stop texts."""
    window = max(len(text.encode()) for text in stop) + 1     # a token is at least one byte
    return lambda ids: any(text in tokenizer.decode(ids[-window:]) for text in stop)


class NotFinite(UserError):
    """A log-prob, gap or gradient that is not finite or beyond its limit: the batch can't be trained on."""


def make_rollout(tokenizer, problem, prompt_ids, completion_ids, logprobs, *, env_mask=None, inputs=None, ended=None,
                 kept=None, prefix=""):
    """A Rollout with what follows from the ids: which completions ended (by an end token, unless given), their texts."""
    if not all(np.isfinite(row).all() for row in logprobs):
        raise NotFinite(f"the sampler gave a log-prob that is not finite for {problem.prompt!r}; with quantised rollouts "
                        "raise rollout_bits or set quantize_for_rollouts = false, else lower learning_rate and resume")
    at_end = [bool(ids) and ids[-1] in tokenizer.eos_token_ids for ids in completion_ids]
    texts = [prefix + tokenizer.decode(ids[:-1] if over else ids, skip_special_tokens=True)
             for ids, over in zip(completion_ids, at_end)]
    return Rollout(problem, prompt_ids, completion_ids, logprobs, env_mask or [[1] * len(ids) for ids in completion_ids],
                   at_end if ended is None else ended, texts, kept, inputs)


# ---- advantages and batches ------------------------------------------------------------------------------------------

def nan_mean_std(x, axis=None):
    """(mean, std with ddof 1) of the entries that are not NaN, dimensions kept; NaN where there are too few."""
    known = ~np.isnan(x)
    count = known.sum(axis=axis, keepdims=True)
    mean = np.where(known, x, 0).sum(axis=axis, keepdims=True) / np.where(count > 0, count, np.nan)
    squares = (np.where(known, x - mean, 0) ** 2).sum(axis=axis, keepdims=True)
    return mean, np.sqrt(squares / np.where(count > 1, count - 1, np.nan))


def group_advantages(rewards, scale="group", eps=1e-4):
    """A_i = (r_i - mean of its group) / (std + eps), with the std of the group, of the batch, or no divisor ("none").

    rewards (P, G) float64, NaN = not scorable. Means and stds leave NaN out, std has ddof 1; a group with one scorable
    row, and a NaN row, get 0. Returns (P, G) float64. (DeepSeekMath 4.1.2; "none": Dr. GRPO, arXiv 2503.20783.)"""
    rewards = np.asarray(rewards, dtype=np.float64)
    mean, std = nan_mean_std(rewards, axis=1)
    if scale == "none":
        return np.nan_to_num(rewards - mean)
    if scale == "batch":
        std = nan_mean_std(rewards)[1]
    return np.nan_to_num((rewards - mean) / (std + eps))


def rloo_advantages(rewards, whiten=False, eps=1e-4):
    """A_i = r_i minus the mean of the others in its group; whiten: then by the batch's mean and std. (P, G), NaN = not
    scorable. (Back to Basics, arXiv 2402.14740.)"""
    rewards = np.asarray(rewards, dtype=np.float64)
    known = ~np.isnan(rewards)
    count = known.sum(axis=1, keepdims=True)
    others = (np.where(known, rewards, 0).sum(axis=1, keepdims=True) - rewards) / np.where(count > 1, count - 1, np.nan)
    advantages = rewards - others
    if whiten:
        mean, std = nan_mean_std(advantages)
        advantages = (advantages - mean) / (std + eps)
    return np.nan_to_num(advantages)


def gdpo_advantages(scores, weights, eps=1e-4):
    """Each reward normalised inside its group, then summed by weight, then normalised over the batch. scores (P, G, K)
    with NaN = does not apply. Returns (P, G). (GDPO, arXiv 2601.05242.)"""
    mean, std = nan_mean_std(np.asarray(scores, dtype=np.float64), axis=1)
    normalised = (scores - mean) / (std + eps)
    sums = weighted_rewards(normalised.reshape(-1, scores.shape[-1]), weights).reshape(scores.shape[:2])
    mean, std = nan_mean_std(sums)
    return np.nan_to_num((sums - mean) / (std + eps))


def weighted_rewards(scores, weights):
    """(B,) sums of weight * score over the functions that apply; NaN where none does. scores (B, K) with NaN."""
    return np.where(np.isnan(scores).all(axis=1), np.nan, np.nansum(scores * weights, axis=1))


@dataclass(frozen=True)
class Batch:
    """Rows to train on. prompts (P, L), padded on the right; prompt_lengths (P,); prompt_of (B,): the prompt of each row.
    completion_ids, mask, old_logprobs, sampler_logprobs, ref_logprobs, is_weights (B, T), padded on the right with 0;
    mask 1 = trained token. advantages (B, 1), or (B, T) for credit by token. kept: the tokens that could be sampled at
    each position, (B, T, K) ids with -1 behind, or (B, T, ceil(V/8)) bits as uint8; K = 0: all. first_seen (B, V):
    where in prompt and completion each token occurs first (the repetition penalty needs it); (B, 0) without one."""

    prompts: mx.array
    prompt_lengths: mx.array
    prompt_of: mx.array
    completion_ids: mx.array
    mask: mx.array
    old_logprobs: mx.array
    sampler_logprobs: mx.array
    ref_logprobs: mx.array
    is_weights: mx.array
    advantages: mx.array
    kept: mx.array
    first_seen: mx.array


def bucket(n, least=16):
    """n rounded up so that only few widths occur: to a multiple of `least`, beyond 8 of them to four widths an octave."""
    size = max(least, 2 ** max(n.bit_length() - 3, 0))
    return -(-n // size) * size


def right_pad(rows, width, dtype, fill=0):
    """Rows of numbers, or of equally wide vectors, as one array (B, width, ...)."""
    rows = [np.asarray(row, dtype=dtype) for row in rows]
    padded = np.full((len(rows), width, *rows[0].shape[1:]), fill, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = row
    return mx.array(padded)


def pad_batch(rollouts, advantages=None, *, mask_truncated=False, least=16, vocab_size=0):
    """The rows of some rollouts as a Batch; advantages (P, G). Widths are rounded up by bucket(). old_logprobs are the
    sampler's; ref_logprobs start as zeros, is_weights as ones. vocab_size: where given, first_seen is filled in."""
    rows = [(r, i) for r in rollouts for i in range(len(r.completion_ids))]
    completions = [r.completion_ids[i] for r, i in rows]
    masks = [np.array(r.env_mask[i]) * (r.ended[i] or not mask_truncated) for r, i in rows]
    T = bucket(max(map(len, completions)), least)
    logprobs = right_pad([r.logprobs[i] for r, i in rows], T, np.float32)
    first_seen = np.full((len(rows), vocab_size), np.iinfo(np.int32).max, dtype=np.int32)
    for i, (r, _) in enumerate(rows) if vocab_size else ():
        full = [*r.prompt_ids, *completions[i]]
        first_seen[i, full[::-1]] = np.arange(len(full))[::-1]     # the earliest position is written last
    kept = [r.kept[i] for r, i in rows if r.kept is not None]
    advantages = np.zeros(len(rows)) if advantages is None else np.asarray(advantages)
    return Batch(
        prompts=right_pad([r.prompt_ids for r in rollouts], bucket(max(len(r.prompt_ids) for r in rollouts), least), np.int32),
        prompt_lengths=mx.array([len(r.prompt_ids) for r in rollouts]),
        prompt_of=mx.array([p for p, r in enumerate(rollouts) for _ in r.completion_ids]),
        completion_ids=right_pad(completions, T, np.int32),
        mask=right_pad(masks, T, np.float32),
        old_logprobs=logprobs, sampler_logprobs=logprobs,
        ref_logprobs=mx.zeros((len(rows), T)), is_weights=mx.ones((len(rows), T)),
        advantages=mx.array(advantages.astype(np.float32).reshape(-1, 1)),
        kept=right_pad(kept, T, kept[0].dtype, fill=0 if kept[0].dtype == np.uint8 else -1) if kept
        else mx.zeros((len(rows), T, 0), dtype=mx.int32),
        first_seen=mx.array(first_seen),
    )


from mlx_grpo.passes import pass_budget, pass_tokens, plan_passes, take_rows, trained_lengths  # noqa: E402


# ---- log-probs and loss ----------------------------------------------------------------------------------------------

from mlx_grpo.split_model import SplitModel  # noqa: E402


def penalised(logits, seen, penalty):
    """Logits of tokens already in the context divided (or, where negative, multiplied) by the repetition penalty, as in
    CTRL (arXiv 1909.05858) and transformers. seen: (..., V) booleans."""
    return mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def restrict(z, kept):
    """Logits (n, V) with -inf outside of the kept sets (Batch.kept), or, for sets of ids, only their logits (n, K).
    Their logsumexp is the normaliser of the distribution that was sampled from."""
    if kept.dtype == mx.uint8:
        v = mx.arange(z.shape[-1])
        inside = (kept[:, v // 8] >> (7 - v % 8).astype(mx.uint8)) & 1
        return mx.where(inside > 0, z, -mx.inf)
    inside = mx.take_along_axis(z, mx.maximum(kept, 0), axis=-1)
    return mx.where(kept >= 0, inside, -mx.inf)


HEAD_CHUNK = 2**25      # logits that are held at once, in tokens times vocabulary: 128 MB in float32


def completion_logprobs(split, batch, temperature, repetition_penalty=1.0, entropy_gradient=False, way="each", states=None,
                        pieces=None):
    """Log-probs of the completion tokens and entropies, under the distribution that they were sampled from: at the
    sampling temperature, with the repetition penalty, renormalised over the kept sets; from one forward pass.

    Only completion positions are projected onto the vocabulary, in chunks of at most HEAD_CHUNK logits, which the
    backward pass computes again: memory is chunk x V, not B x T x V. split: a SplitModel. way: how the prompts are computed
    (plan_passes); "before": states are their prompt_states. pieces: takes the arrays of chunks, for evaluate_pieces. Returns
    (logprobs, entropy), both (B, T) float32, nats; entropy carries a gradient only if asked. Where mask is 0 both are those
    of a wrong token: mask them."""
    B, T = batch.completion_ids.shape
    states = split.prompt_states(batch.prompts, batch.prompt_lengths) if way == "within" else states
    hidden = split.completion_hidden(batch.prompts, batch.prompt_lengths, batch.prompt_of, batch.completion_ids, states)
    position = batch.prompt_lengths[batch.prompt_of][:, None] + mx.arange(T)                # of completion token t
    flat = lambda x: x.reshape(B * T, *x.shape[2:])
    rows = mx.broadcast_to(mx.arange(B)[:, None], (B, T))
    hidden, *arrays = [flat(x) for x in (hidden, batch.completion_ids, batch.mask, batch.kept, position, rows)]

    def logits(some, weights, hidden):
        """(of the taken tokens (n,), of all that could be drawn (n, V), or (n, K)), divided by the temperature, for the
        slice `some` of all positions."""
        ids, mask, kept, position, rows = (x[some] for x in arrays)
        split.model.update(weights)
        z = split.head(hidden[None])[0].astype(mx.float32)
        if batch.first_seen.shape[-1]:
            z = penalised(z, batch.first_seen[rows] < position[:, None], repetition_penalty)
        z = z / temperature if temperature != 1 else z
        taken = mx.take_along_axis(z, ids[:, None], axis=-1)[:, 0]
        if kept.shape[-1]:
            z = mx.where(mask[:, None] > 0, mx.maximum(restrict(z, kept), -1e30), 0)        # padding has no kept set
        return taken, z                                                 # -1e30: 0 times -inf would not be a number

    size = max(1, HEAD_CHUNK // split.vocab_size) if split.name else B * T
    chunks = [slice(start, min(start + size, B * T)) for start in range(0, B * T, size)]
    head = token_logprobs(logits, chunks, entropy_gradient, [] if pieces is None else pieces)
    return tuple(x.reshape(B, T) for x in head(split.head_weights(), hidden)[:2])


def token_logprobs(logits, chunks, entropy_gradient, pieces):
    """A function of (head weights, hidden (N, C)) -> (log-probs (N,), entropies (N,), ...) for logits(slice, weights,
    hidden (n, C)) -> (taken (n,), z (n, V)), with a gradient of its own: one exponential a logit forward and none backward
    where a single chunk holds all positions, else logits and one exponential again.

    d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy)."""
    hold = len(chunks) == 1

    def exponentials(z):
        best = z.max(axis=-1, keepdims=True)
        e = backend.exp(z - best)
        total = backend.sum_last(e)
        return e, total, best + mx.log(total)                                               # (n, V), (n, 1), (n, 1)

    @mx.custom_function
    def forward(weights, hidden):
        found = []
        for some in chunks:
            taken, z = logits(some, weights, hidden[some])
            e, total, normaliser = exponentials(z)
            entropy = normaliser - backend.sum_last(e * z) / total
            held = () if not hold else (z,) if entropy_gradient else (e, total)
            found.append((taken - normaliser[:, 0], entropy[:, 0], *held))
            pieces.append(found[-1][:2])
        return tuple(mx.concatenate(parts) for parts in zip(*found))

    @forward.vjp
    def backward(primals, cotangents, outputs):
        (weights, hidden), sums, slopes = primals, None, []
        flat = tree_flatten(weights)
        for some in chunks:
            if hold and not entropy_gradient:
                e, total = outputs[2:]
            else:
                z = outputs[2] if hold else logits(some, weights, hidden[some])[1]
                e, total, normaliser = exponentials(z)
            slope = -cotangents[0][some, None]
            if entropy_gradient:
                slope = slope - cotangents[1][some, None] * (z - normaliser + outputs[1][some, None])
            of_flat = lambda hidden, *arrays: logits(some, tree_unflatten([(k, a) for (k, _), a in zip(flat, arrays)]), hidden)
            of_hidden, *of_weights = mx.vjp(of_flat, [hidden[some], *(a for _, a in flat)], [cotangents[0][some], e * (slope / total)])[1]
            slopes.append(of_hidden)
            sums = of_weights if sums is None else [a + b for a, b in zip(sums, of_weights)]
            pieces.append((of_hidden, *sums))
        return tree_unflatten([(k, a) for (k, _), a in zip(flat, sums)]), mx.concatenate(slopes)

    return forward


def evaluate_pieces(pieces):
    """Evaluates the arrays of one chunk after another and empties the list. MLX allocates what is queued, about a hundred
    operations ahead of what is computed: at once, the logits of many chunks would be held."""
    while pieces:
        mx.eval(pieces.pop(0))


def importance_weights(old_logprobs, sampler_logprobs, mask, mode, clip_min, clip_max):
    """Sampler correction pi_old / pi_sampler, (B, T), without gradient: by token or sequence, truncated to the limits
    (TIS, arXiv 1606.02647) or 0 outside of them (MIS, IcePop)."""
    gap = mx.where(mask > 0, old_logprobs - sampler_logprobs, 0)
    gap = mx.where(mx.isnan(gap), 0, gap)
    level, _, how = mode.partition("_")
    weights = guarded_exp(gap if level == "token" else mx.broadcast_to(gap.sum(axis=1, keepdims=True), gap.shape))
    if how == "truncate":
        return mx.clip(weights, clip_min, clip_max)
    return mx.where((weights >= clip_min) & (weights <= clip_max), weights, 0)


def guarded_exp(x):
    """exp with its argument held in [-20, 20], so that one wild token can't overflow the loss."""
    return mx.exp(mx.clip(x, -20, 20))


@dataclass(frozen=True)
class Terms:
    """What a per-token objective is made of. logprobs, log_ratio, mask: (B, T); ratio: (B, T), or (B, 1) at sequence
    level; A: (B, 1) or (B, T); is_weights: (B, T), or None. The rest are the options of the same name."""

    logprobs: mx.array
    log_ratio: mx.array
    ratio: mx.array
    A: mx.array
    mask: mx.array
    clip_eps: float
    clip_eps_high: float
    delta: float | None = None
    sapo_tau: tuple = (1.0, 1.05)
    is_weights: mx.array | None = None


def clipped(t):
    """min(rho A, clip(rho) A) (PPO); delta bounds the unclipped branch as well (INTELLECT-2, arXiv 2505.07291)."""
    free = t.ratio if t.delta is None else mx.minimum(t.ratio, t.delta)
    return mx.minimum(free * t.A, mx.clip(t.ratio, 1 - t.clip_eps, 1 + t.clip_eps_high) * t.A)


def cispo(t):
    """The weight is clipped, at clip_eps_high itself, and not the update: no token loses its gradient (2506.13585)."""
    return mx.stop_gradient(mx.minimum(t.ratio, t.clip_eps_high)) * t.A * t.logprobs


def sapo(t):
    """A soft gate in place of the clip (arXiv 2511.20347)."""
    tau = mx.where(t.A > 0, *t.sapo_tau)
    return 4 / tau * mx.sigmoid(tau * (t.ratio - 1)) * t.A


def vespo(t):
    """Gamma-shaped sequence weights (arXiv 2602.10693); the sampler correction enters w and is not applied again."""
    w = (mx.clip(t.log_ratio, -20, 20) * t.mask).sum(axis=1, keepdims=True)
    if t.is_weights is not None:
        w = w + mx.clip(mx.log(t.is_weights), math.log(1e-8), 20).sum(axis=1, keepdims=True)
    w = mx.clip(w, math.log(1e-8), 20)
    k, lam = mx.where(t.A >= 0, 2.0, 3.0), mx.where(t.A >= 0, 3.0, 2.0)
    phi = mx.exp(lam + k * w - lam * mx.exp(w))
    return mx.stop_gradient(mx.where(mx.isfinite(phi), phi, 0)) * t.A * t.logprobs


# What each token counts, from the mask (B, T); N rows and M trained tokens in the whole step: splitting changes nothing.
def row_means(mask, N, M, max_tokens):
    return mask / mx.maximum(mask.sum(axis=1, keepdims=True), 1) / N


def token_mean(mask, N, M, max_tokens):
    return mask / mx.maximum(M, 1)


def row_sums(mask, N, M, max_tokens):
    return mask / N


def constant(mask, N, M, max_tokens):
    return mask / (N * max_tokens)


LOSSES = {  # loss_type: (objective of a token, what the token counts)
    "grpo": (clipped, row_means),       # DeepSeekMath, 2402.03300
    "bnpo": (clipped, token_mean),      # over the whole step; TRL's is over the micro-batch
    "dapo": (clipped, token_mean),      # 2503.14476
    "dr_grpo": (clipped, constant),     # 2503.20783
    "luspo": (clipped, row_sums),       # 2602.05261
    "cispo": (cispo, token_mean),
    "sapo": (sapo, row_means),
    "vespo": (vespo, token_mean),
    "rloo": (clipped, row_means),       # with the ratio of whole sequences, 2402.14740
}

RATIOS = {  # importance_sampling_level: log_ratio (B, T) -> ratio
    "token": lambda log_ratio, mask: guarded_exp(log_ratio),
    "sequence": lambda log_ratio, mask: guarded_exp(log_ratio.sum(1, keepdims=True) / mx.maximum(mask.sum(1, keepdims=True), 1)),
    "sequence_sum": lambda log_ratio, mask: guarded_exp(log_ratio.sum(1, keepdims=True)),
}

KL_ESTIMATORS = {  # d = log(pi_ref / pi_theta) (B, T), ratio -> KL term of a token (Schulman 2020)
    "k1": lambda d, ratio: -d,
    "k2": lambda d, ratio: d * d / 2,
    "k3": lambda d, ratio: guarded_exp(d) - mx.clip(d, -20, 20) - 1,
    "k3_corrected": lambda d, ratio: (guarded_exp(d) - mx.clip(d, -20, 20) - 1) * ratio,   # unbiased off policy, 2512.02556
}


def find_loss(loss_type):
    """(objective, token weights) of a name in LOSSES, or of "file.py:function": a function of Terms, with the token mean
    unless it has an attribute `weights` that names one of LOSSES. Raises ConfigError."""
    if loss_type in LOSSES:
        return LOSSES[loss_type]
    function = load_symbol(loss_type, "loss_type")
    weights = vars(function).get("weights", "dapo") if callable(function) else None
    if weights not in LOSSES:
        raise ConfigError(f"loss_type {loss_type!r}: expected a function of Terms whose attribute `weights`, if any, is one of "
                          f"{', '.join(LOSSES)}")
    return function, LOSSES[weights][1]


def check_loss(loss_type):
    """Raises ConfigError for a user's loss that fails, or whose value changes when a batch is split: rows that look at
    each other would make the update depend on batch_size."""
    objective, _ = find_loss(loss_type)
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32) * 0.3
    old, logprobs, mask = mx.array(x[0]) - 1, mx.array(x[1]) - 1, mx.array((np.arange(5) < [[5], [3], [2], [4]]).astype(np.float32))
    def value(rows):
        log_ratio = (logprobs - old)[rows] * mask[rows]
        A = mx.array(x[2, :, :1])[rows]
        return mx.broadcast_to(objective(Terms(logprobs[rows], log_ratio, mx.exp(log_ratio), A, mask[rows], 0.2, 0.2)), mask[rows].shape)
    try:
        whole, parts = value(slice(0, 4)), mx.concatenate([value(slice(0, 1)), value(slice(1, 4))])
        same = mx.allclose(whole * mask, parts * mask, atol=1e-5).item()
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"loss_type {loss_type!r}: {type(error).__name__}: {error}; it takes Terms and returns (B, T) or "
                          "(B, 1)") from error
    if not same:
        raise ConfigError(f"loss_type {loss_type!r} gives other values when a batch is split, so the update would depend on "
                          "batch_size; a row may only look at itself")


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, *, loss_type, clip_eps, clip_eps_high, kl_coeff,
              max_tokens=None, kl_estimator="k3", level="token", delta=None, sapo_tau=(1.0, 1.05), is_weights=None,
              sampler_logprobs=None, off_policy_threshold=None, entropy=None, entropy_threshold=None, entropy_coef=None,
              num_rows=None, num_tokens=None, num_entropy_tokens=None):
    """Negated GRPO objective (DeepSeekMath Eq. 3, with the KL estimators of KL_ESTIMATORS), in all its variants.

    logprobs, old_logprobs, ref_logprobs, sampler_logprobs, is_weights, entropy: (B, T), nats; only logprobs and, for the
    bonus, entropy carry a gradient. advantages: (B,), (B, 1) or (B, T). mask: (B, T), 1 on trained tokens, 0 on padding
    and injected tokens. max_tokens: Dr. GRPO's divisor. num_rows, num_tokens, num_entropy_tokens: of the whole step
    where this is a part of it (default: this batch); the parts' values add up.
    Returns (loss, metrics): a scalar to minimise; scalars that add up over parts to means over the step's tokens, but
    for clip_ratio/low_min and /high_max, the least and greatest rate of a row."""
    objective, weigh = find_loss(loss_type)
    N = mask.shape[0] if num_rows is None else num_rows
    M = mask.sum() if num_tokens is None else num_tokens
    A = advantages[:, None] if advantages.ndim == 1 else advantages            # (B, 1) or (B, T)
    log_ratio = mx.where(mask > 0, logprobs - mx.stop_gradient(old_logprobs), 0)
    ratio = RATIOS["sequence_sum" if loss_type == "rloo" else level](log_ratio, mask)       # pi_theta / pi_old
    logprobs = mx.where(mask > 0, logprobs, 0)
    gain = objective(Terms(logprobs, log_ratio, ratio, A, mask, clip_eps, clip_eps_high, delta, sapo_tau, is_weights))
    gain = mx.broadcast_to(gain, mask.shape)
    if off_policy_threshold is not None:                    # whole rows that drifted: DeepSeek-V3.2, 2512.02556
        behind = mx.where(mask > 0, (old_logprobs if sampler_logprobs is None else sampler_logprobs) - logprobs, 0)
        drift = mx.stop_gradient(behind).sum(1, keepdims=True) / mx.maximum(mask.sum(1, keepdims=True), 1)
        gain = gain * ((A >= 0) | (drift <= off_policy_threshold))
    sharp = mask
    if entropy_threshold is not None:                       # only the forking tokens: beyond the 80/20 rule, 2506.01939
        sharp = mask * (mx.stop_gradient(entropy) >= entropy_threshold)
        gain = gain * (sharp > 0)
    if is_weights is not None and objective is not vespo:
        gain = gain * is_weights
    kl = mx.zeros_like(gain)
    if kl_coeff:
        kl = KL_ESTIMATORS[kl_estimator](mx.where(mask > 0, ref_logprobs - logprobs, 0), ratio)
    loss = -(weigh(mask, N, M, max_tokens) * mx.where(mask > 0, gain - kl_coeff * kl, 0)).sum()
    if entropy_coef is not None:
        K = sharp.sum() if num_entropy_tokens is None else num_entropy_tokens
        loss = loss - entropy_coef * (mx.where(sharp > 0, entropy, 0)).sum() / mx.maximum(K, 1)
    return loss, clip_metrics(ratio if delta is None else mx.minimum(ratio, delta), A, mask, clip_eps, clip_eps_high, M) | {
        "kl": mx.where(mask > 0, kl, 0).sum() / mx.maximum(M, 1)}


def clip_metrics(ratio, A, mask, clip_eps, clip_eps_high, M):
    """Shares of tokens whose ratio is outside of the clip range on the side where that stops the gradient."""
    low, high = (ratio < 1 - clip_eps) & (A < 0), (ratio > 1 + clip_eps_high) & (A > 0)
    mean = lambda x: (x * mask).sum() / mx.maximum(M, 1)
    rate = lambda x: (x * mask).sum(1) / mx.maximum(mask.sum(1), 1)            # (B,)
    return {"clip_ratio/low_mean": mean(low), "clip_ratio/high_mean": mean(high), "clip_ratio/region_mean": mean(low | high),
            "clip_ratio/low_min": rate(low).min(), "clip_ratio/high_max": rate(high).max()}


# ---- trainer ---------------------------------------------------------------------------------------------------------

from mlx_grpo.distributed import find_world, launched  # noqa: E402
from mlx_grpo.hooks import (  # noqa: E402
    TrainerCallback, all_callbacks, check_rollouts, closes_callbacks, configured_callbacks, restore, states)
from mlx_grpo.step_metrics import (  # noqa: E402
    completion_metrics, finish_metrics, finite_or_none, gap_metrics, merge_metrics, score_metrics)
from mlx_grpo.learner import Learner, checkpointed_blocks, clip_gradients, lora_parameters, prepare_trainable  # noqa: E402


def learning_rate_at(step, total, config):
    """The learning rate of step 1..total: linear warmup over warmup_ratio * total steps, then lr_scheduler_type."""
    kind = config.lr_scheduler_type
    warmup = 0 if kind == "constant" else math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    if kind in ("constant", "constant_with_warmup"):
        return config.learning_rate
    progress = (step - 1 - warmup) / max(total - warmup, 1)      # 0 at the first step after the warmup
    return config.learning_rate * (0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress)


def count_steps(config, num_problems):
    """Steps of a run: max_steps, or as many as num_epochs passes over the problems fill (at least one)."""
    return config.max_steps or max(1, num_problems * config.num_epochs * config.num_iterations // config.prompts_per_step)


from mlx_grpo.prompt_stream import PromptStream, prompt_order  # noqa: E402


class MLXGRPOTrainer:
    """GRPO on a model: owns model, model_old (sampled from), ref_model (KL anchor), the learner and the step.

    model, tokenizer: as load_model returns them. reward_funcs: names from REWARDS, "file.py:function", or callables
    under TRL's signature. train_dataset, eval_dataset: Problems, or rows (dictionaries) with args.prompt_column and
    args.answer_column. rollout_func(trainer, problems) -> [Rollout] replaces the sampler. teacher: a model to distil
    from (default: args.teacher_model). callbacks: TrainerCallbacks; None = args.callbacks. run_dir: where checkpoints and
    logs go; None = output_dir/run_name."""

    def __init__(self, model, tokenizer, reward_funcs, args, train_dataset, eval_dataset=None, *, rollout_func=None,
                 teacher=None, callbacks=None, run_dir=None):
        self.args, self.tokenizer, self.world = args, tokenizer, find_world()
        self.callbacks = all_callbacks(args, callbacks)
        check_loss(args.loss_type)
        self.scorer = Scorer(find_rewards(reward_funcs, args.reward_options), args.reward_weights, args.on_reward_error,
                             args.max_reward_errors)
        self.train_dataset = fitting_problems(as_problems(train_dataset, args), tokenizer, args)
        self.eval_dataset = fitting_problems(as_problems(eval_dataset or [], args, self.train_dataset), tokenizer, args)
        fits = lambda problem: len(render_prompt(tokenizer, problem, args)) <= args.max_prompt_length
        self.stream, self.curriculum = PromptStream(self.train_dataset, args, fits), {}
        self.rollout_func = rollout_func
        self.run_dir = Path(run_dir or Path(args.output_dir) / args.run_name)
        self.dtype = compute_dtype(args)
        self.model = model
        self.learner = Learner(model, args, self.dtype)
        self.split = SplitModel(model)
        if args.prefix_sharing == "on" and self.split.why_not:
            raise ConfigError(f'prefix_sharing is "on", and {args.model_name} can\'t share prompts: {self.split.why_not}; set "auto"')
        self.sampling = train_sampling(args)
        self.update_every = args.update_every
        self.quantize_rollouts = (len(model.layers) <= 20 if args.quantize_for_rollouts == "auto"
                                  else args.quantize_for_rollouts)
        self.ladder = args.bits_ladder if self.quantize_rollouts else [0]     # bits of rollouts, rung by rung
        self.rung, self.calm_syncs, self.healed = 0, 0, 0
        self.model_old = None
        self.ref_model = frozen_copy(model) if args.kl_coeff else None
        self.ref_split = SplitModel(self.ref_model) if args.kl_coeff else None
        self.teacher_split = SplitModel(teacher or load_teacher(args, model)) if args.objective == "distill" else None
        self.step_count, self.num_tokens, self.prompts_drawn = 0, 0, 0
        self.window, self.window_metrics = [], {}       # what is left of the rollout batch: the Batches of each step to come
        self.shapes = []                                # [B, T, P, L, way] of all passes so far: each is compiled once
        self.entropy_coef = args.entropy_coef
        self.total_steps = count_steps(args, len(self.train_dataset))
        self.compiled = backend.compiles(args.use_compile)
        backend.set_limits(args.cache_limit_gb, args.wired_limit_gb)
        self.gradients = self.learner.gradients_of(self.compute_grpo_loss, self.prompt_states, self.compiled)
        self.signalled, self.interrupted, self.save_s, self.best, self.bad_steps = None, None, 0.0, None, 0
        self.samples = {}       # step -> (prompt, completion) of the first held-out problem
        self.log, self.phase = RunLog(self.run_dir if args.log_jsonl and self.world.first else None), RunState()
        self.writer = Writer(args.save_in_background)
        self.sync_old()

    # -- one step, as the table in the module docstring

    def step(self, problems=None):
        """One optimizer update; returns its metrics. Samples a new rollout batch when the last one is used up: of
        `problems`, or of the next ones in the run's order. Raises UserError where even healing doesn't help."""
        started = time.perf_counter()
        self.phase("step", step=self.step_count + 1)
        while True:
            drawn, fresh = self.prompts_drawn, not self.window
            try:
                pending = self.fill_window(problems) if fresh else None                        # 1-3. sample, score, advantages
                rate = learning_rate_at(self.step_count + 1, self.total_steps, self.args)
                self.phase("update", **batches_shape(self.args, self.window[0]))
                update = self.update_policy(self.window[0], rate)                              # 4. loss, gradient, update
                break
            except NotFinite as error:
                self.world.not_finite(error)
                after, failed, self.window = self.prompts_drawn, self.window[0] if self.window else [], []
                self.prompts_drawn = drawn if fresh else after       # the same prompts again, unless they are left out
                if self.heal(error, failed):
                    self.prompts_drawn = after
        self.phase("sync")
        self.window.pop(0)
        self.step_count += 1
        if pending:
            self.curriculum, raised = self.stream.advanced(self.curriculum)
            self.log.lines(self.step_count, raised)
            self.log.completions(self.step_count, *pending, self.token_details(pending[0]))
            self.notify("on_rollouts", pending[0], *pending[3:5])
        if self.step_count % self.update_every == 0:                                           # 5. model_old <- model
            self.sync_old(calm=True)
        if self.args.ref_sync_steps and self.step_count % self.args.ref_sync_steps == 0:
            mix_weights(self.ref_model, self.model, self.args.ref_sync_mix)
        metrics = {"step": self.step_count, "epoch": self.prompts_drawn / len(self.train_dataset), "learning_rate": rate,
                   **self.window_metrics, **update, "num_tokens": self.num_tokens}
        if self.quantize_rollouts:
            metrics |= {"rollout_bits": self.ladder[self.rung], "healed": self.healed}
        return metrics | {"rollout_s": self.window_metrics["rollout_s"] if fresh else 0.0,
                          "step_time": time.perf_counter() - started, "memory/pass_shapes": len(self.shapes),
                          **self.phase.peaks_gb()}

    def fill_window(self, problems=None):
        """Sample a rollout batch for minibatches * num_iterations steps, score it, and put the Batches of these steps into
        self.window and the metrics into self.window_metrics. Returns what completions.jsonl is to hold of it."""
        started, args = time.perf_counter(), self.args
        rollouts, scores, extras, reward_metrics = self.collect(problems)
        rollout_s = time.perf_counter() - started
        shape = (len(rollouts), -1)                                                            # (P, G)
        rewards = self.total_rewards(rollouts, scores)
        if np.isnan(rewards).all():
            raise RewardError("every reward function returned None for every completion of this step, so there is nothing "
                              "to learn from; see `mlx_grpo.py rewards`")
        self.phase("scoring", **training_shape(args, min(args.batch_size, shape[0]) * args.num_generations,
                                               max(len(r.prompt_ids) for r in rollouts),
                                               max(len(ids) for r in rollouts for ids in r.completion_ids)))
        batches = self.scored_batches(rollouts)
        if not any(b.mask.sum().item() for b in batches):
            print(f"step {self.step_count + 1}: no completion has a token to train on (all of them ran out of tokens, and "
                  "mask_truncated_completions is on): no gradient; raise max_new_tokens", file=sys.stderr)
        if args.kl_coeff and args.kl_in == "reward":                                           # r - kl_coeff * sum of k1
            kl = [((b.old_logprobs - b.ref_logprobs) * b.mask).sum(axis=1) for b in batches]
            rewards = rewards - args.kl_coeff * np.concatenate([np.array(rows) for rows in kl])
        if args.advantage == "gdpo":
            advantages = gdpo_advantages(scores.reshape(*shape, scores.shape[-1]), self.scorer.weights)
        elif args.advantage == "rloo":
            advantages = rloo_advantages(rewards.reshape(shape), args.normalize_advantages)
        else:
            advantages = group_advantages(rewards.reshape(shape), args.scale_rewards)
        rows = iter(np.array_split(advantages.astype(np.float32).reshape(-1, 1), np.cumsum([len(b.mask) for b in batches])[:-1]))
        batches = [replace(b, advantages=self.token_advantages(b, mx.array(next(rows)))) for b in batches]
        passes = -(-len(batches) // args.minibatches)                                          # Batches in one step
        steps = [batches[i:i + passes] for i in range(0, len(batches), passes)]
        self.window = steps * args.num_iterations
        self.num_tokens += sum(len(r.prompt_ids) + len(ids) for r in rollouts for ids in r.completion_ids)
        names = list(self.scorer.functions)
        self.window_metrics = {**reward_metrics, **score_metrics(scores, rewards.reshape(shape), names),
                               **self.stream.metrics(rollouts, rewards, self.curriculum),
                               **completion_metrics(rollouts), "rollout_s": rollout_s}
        return rollouts, scores, names, rewards, advantages, extras

    def token_details(self, rollouts):
        """[(texts, log-probs)] of the tokens of the first log_token_details completions, for the report."""
        rows = [(ids, logprobs) for r in rollouts for ids, logprobs in zip(r.completion_ids, r.logprobs)]
        return [([self.tokenizer.decode([i]) for i in ids], logprobs) for ids, logprobs in rows[:self.args.log_token_details]]

    def collect(self, problems=None):
        """(rollouts, scores (B, K), extras, metrics) of one rollout batch. With dynamic_sampling, groups whose rewards are
        all equal are replaced by further prompts, up to max_gen_batches rounds (DAPO, arXiv 2503.14476)."""
        args = self.args
        wanted = args.prompts_per_step * args.minibatches if problems is None else len(problems)
        kept, rounds, dropped, sampled, self.stream.seen = [], 0, 0, 0, {}
        while True:
            problems = self.next_problems(wanted - len(kept)) if problems is None else problems
            self.phase("rollout", **rollout_shape(args, problems, args.num_generations))
            mine, first = self.world.share(problems)
            with RewardWorkers(self.scorer, args.reward_workers, problems, self.trainer_state(), self.world) as workers:
                rollouts = self.generate_responses(mine, sampled + first, workers.finished) if mine else []
                self.phase("rewards", rows=len(mine) * args.num_generations)
                rollouts, scores, extras, metrics = workers.score(rollouts)
            groups = scores.reshape(len(rollouts), -1, scores.shape[-1])
            totals = self.total_rewards(rollouts, scores).reshape(len(rollouts), -1)
            self.stream.observe(rollouts, scores, totals.reshape(-1), list(self.scorer.functions))
            G, rounds, sampled = totals.shape[1], rounds + 1, sampled + len(rollouts)
            flat = [not np.ptp(t[~np.isnan(t)]) > 1e-8 if (~np.isnan(t)).sum() > 1 else True for t in totals]
            found = [(r, g, {k: v[i * G:(i + 1) * G] for k, v in extras.items()}) for i, (r, g) in enumerate(zip(rollouts, groups))]
            if not args.dynamic_sampling:
                kept = found
                break
            dropped += sum(flat)
            kept += [group for group, is_flat in zip(found, flat) if not is_flat]
            if len(kept) >= wanted or rounds == args.max_gen_batches:
                break
            problems = None
        if args.dynamic_sampling:
            metrics |= {"dynamic_sampling/rounds": rounds, "dynamic_sampling/dropped_groups": dropped}
            if len(kept) < wanted:
                print(f"dynamic sampling: {len(kept)} of {wanted} groups have different rewards after {rounds} rounds; going "
                      "on with fewer (max_gen_batches)", file=sys.stderr)
                kept = kept or found                          # all equal: a step without a gradient
        columns = set().union(*(extra for _, _, extra in kept))
        extras = {k: [v for r, _, extra in kept for v in extra.get(k, [None] * len(r.completion_ids))] for k in columns}
        return [r for r, _, _ in kept], np.concatenate([g for _, g, _ in kept]), extras, metrics

    def next_problems(self, count):
        """The next `count` problems in the run's order."""
        problems = self.stream.take(self.prompts_drawn, count, self.curriculum)
        self.prompts_drawn += count
        return problems

    def generate_responses(self, batch, first_prompt=0, finished=None):
        """[Rollout] of num_generations completions for each Problem in `batch`, sampled from model_old. first_prompt: how
        many prompts of this step have been sampled before, so that each has random numbers of its own. finished: as in
        sample_completions."""
        if self.rollout_func:
            return check_rollouts(self.rollout_func(self, batch), batch, self.args.num_generations)
        return sample_completions(self.model_old, self.tokenizer, batch, self.args, self.sampling, step=self.step_count + 1,
                                  num_generations=self.args.num_generations, first_prompt=first_prompt, finished=finished)

    def total_rewards(self, rollouts, scores):
        """(B,) weighted sums of the scores, with the soft overlong punishment; NaN = not scorable."""
        rewards = weighted_rewards(scores, self.scorer.weights)
        if self.args.overlong_cache:
            lengths = np.array([len(ids) for r in rollouts for ids in r.completion_ids])
            rewards = rewards + overlong_punishment(lengths, self.args.max_completion_length, self.args.overlong_cache)
        return rewards

    def scored_batches(self, rollouts):
        """The rollouts as Batches of batch_size prompts, with reference, proximal old log-probs and sampler correction
        where the objective needs them, all by the weights before the rollout batch's first update."""
        args, batches = self.args, []
        vocab_size = vocabulary_of(self.model) if args.repetition_penalty != 1 else 0
        for i in range(0, len(rollouts), args.batch_size):
            batch = pad_batch(rollouts[i:i + args.batch_size], mask_truncated=args.mask_truncated_completions, vocab_size=vocab_size)
            if self.ref_model:
                batch = replace(batch, ref_logprobs=self.score(self.ref_split, batch)[0])
            if old_logprobs_kind(args) == "proximal":
                old = self.score(self.split, batch)[0]
                batch = replace(batch, old_logprobs=old)
                if args.sampler_correction != "none":
                    batch = replace(batch, is_weights=importance_weights(
                        old, batch.sampler_logprobs, batch.mask, args.sampler_correction, args.sampler_clip_min, args.sampler_clip_max))
            mx.eval(vars(batch))
            batches.append(batch)
        return batches

    def passes(self, batch, rows=None, split=None):
        """plan_passes for `rows` (default: all) of a Batch, through `split` (default: the trained model)."""
        sharing = self.args.prefix_sharing if (split or self.split).shares_prompts else "off"
        return plan_passes(batch, list(range(len(batch.mask))) if rows is None else rows, pass_budget(self.args), sharing)

    def part(self, batch, rows, way):
        """The Batch of one pass."""
        part = take_rows(batch, rows, bucket(len(rows), 1) - len(rows) if self.compiled else 0)
        if (shape := [*part.mask.shape, *part.prompts.shape, way]) not in self.shapes:
            self.shapes.append(shape)
        return part

    def score(self, split, batch):
        """(log-probs, entropies) of a Batch by another model, or by this one as it is now, without gradient: (B, T), 0 under
        the mask."""
        found, pieces = np.zeros((2, *batch.mask.shape), dtype=np.float32), []
        for way, passes in self.passes(batch, self.world.rows(len(batch.mask)), split):
            states = None
            for rows in passes:
                part = self.part(batch, rows, way)
                if way == "before" and not states:
                    states = split.prompt_states(part.prompts, part.prompt_lengths)
                scored = completion_logprobs(split, part, self.sampling.temperature, self.sampling.repetition_penalty, way=way,
                                             states=states, pieces=pieces)
                evaluate_pieces(pieces)
                width = min(part.mask.shape[1], found.shape[2])
                found[:, rows, :width] = np.stack([np.array(x)[:len(rows), :width] for x in scored])
        return tuple(mx.where(batch.mask > 0, x, 0) for x in self.world.sum(mx.array(found)))

    def token_advantages(self, batch, advantages):
        """The advantages (B, 1) of a Batch; when distilling, (B, T): log p_teacher - log p_student of the sampled token (the
        sampled negative reverse KL), plus distill_task_coeff times the rewards' advantage."""
        if not self.teacher_split:
            return advantages
        gap = self.score(self.teacher_split, batch)[0] - batch.old_logprobs
        return mx.where(batch.mask > 0, gap, 0) + self.args.distill_task_coeff * advantages

    def compute_grpo_loss(self, batch, num_rows=None, num_tokens=None, entropy_threshold=None, num_entropy_tokens=None,
                          entropy_coef=None, way="each", states=None, pieces=None):
        """(loss, metrics) of a Batch under the current model; the other arguments are those of the whole step (grpo_loss),
        and those of completion_logprobs."""
        args = self.args
        bonus = bool(args.entropy_coef or args.entropy_adaptive)
        with self.dropout_mask():
            logprobs, entropy = completion_logprobs(self.split, batch, self.sampling.temperature,
                                                    self.sampling.repetition_penalty, bonus, way, states, pieces)
        num_tokens = batch.mask.sum() if num_tokens is None else num_tokens
        corrected = old_logprobs_kind(args) == "proximal" and args.sampler_correction != "none"
        loss, metrics = grpo_loss(
            logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages, batch.mask, loss_type=args.loss_type,
            clip_eps=args.clip_eps, clip_eps_high=args.clip_eps if args.clip_eps_high < 0 else args.clip_eps_high,
            delta=args.delta or None, sapo_tau=(args.sapo_temperature_pos, args.sapo_temperature_neg),
            level=args.importance_sampling_level, kl_coeff=args.kl_coeff if args.kl_in == "loss" else 0.0,
            kl_estimator=args.kl_estimator, max_tokens=args.max_completion_length,
            is_weights=batch.is_weights if corrected else None, sampler_logprobs=batch.sampler_logprobs,
            off_policy_threshold=args.off_policy_threshold or None, entropy=entropy,
            entropy_threshold=entropy_threshold if args.top_entropy_quantile < 1 else None,
            entropy_coef=entropy_coef if bonus else None, num_rows=num_rows, num_tokens=num_tokens,
            num_entropy_tokens=num_entropy_tokens)
        if args.kl_coeff and args.kl_in == "reward":
            metrics["kl"] = ((logprobs - batch.ref_logprobs) * batch.mask).sum() / mx.maximum(num_tokens, 1)
        return loss, metrics | gap_metrics(mx.stop_gradient(logprobs), mx.stop_gradient(entropy), batch, num_tokens)

    def update_policy(self, batches, learning_rate):
        """Gradients of the whole step, pass by pass, then one update. Divisors are those of the whole step, so how it is
        split changes nothing. Rows without advantage cost nothing where nothing else needs them. Returns metrics."""
        totals = (mx.array(sum(len(b.mask) for b in batches)), sum(b.mask.sum() for b in batches), *self.entropy_totals(batches))
        rows, share = self.rows_that_count(batches)
        rows, loss, gradients, parts = self.world.groups(batches, rows), 0.0, None, []
        for batch, chosen in zip(batches, rows):
            for way, passes in self.passes(batch, chosen):
                each = (self.part(batch, rows, way) for rows in passes)
                each = self.under_dropout(each, way) if self.args.lora_dropout else each
                value, metrics, gradients = self.gradients(each, *totals, way=way, into=gradients)
                loss, parts = loss + value, parts + metrics
        loss, parts, gradients = self.world.total(loss, parts, gradients, self.learner.master)
        metrics = finish_metrics(merge_metrics(parts), share)
        self.check_health(loss, metrics)
        norm = self.learner.update(self.hooked(gradients), learning_rate)
        if self.args.entropy_adaptive:
            step = self.args.entropy_step if metrics["entropy"] <= self.args.entropy_target else -self.args.entropy_step
            metrics["entropy_coef"], self.entropy_coef = self.entropy_coef, min(max(self.entropy_coef + step, 0.0), 1.0)
        return {"loss": loss, "grad_norm": norm, **metrics}

    def entropy_totals(self, batches):
        """(threshold of the top-entropy mask, number of its tokens, coefficient of the entropy bonus) of the whole step;
        the first from a forward pass of its own, where that mask is on."""
        tokens = sum(b.mask.sum() for b in batches)
        if self.args.top_entropy_quantile == 1:
            return mx.array(-math.inf), tokens, mx.array(self.entropy_coef)
        entropies = np.concatenate([np.array(self.score(self.split, b)[1])[np.array(b.mask) > 0] for b in batches])
        threshold = np.quantile(entropies, 1 - self.args.top_entropy_quantile) if len(entropies) else 0.0
        return mx.array(float(threshold)), mx.array(float((entropies >= threshold).sum())), mx.array(self.entropy_coef)

    def rows_that_count(self, batches):
        """(for each Batch the rows with an advantage, their share of the trained tokens); all rows where a KL or entropy
        term needs them, and at least one row."""
        args, everything = self.args, [list(range(len(b.mask))) for b in batches]
        if args.entropy_coef or args.entropy_adaptive or (args.kl_coeff and args.kl_in == "loss"):
            return everything, 1.0
        rows = [np.flatnonzero(np.abs(np.array(b.advantages)).max(axis=1) > 0).tolist() for b in batches]
        rows = rows if any(rows) else [[0], *([] for _ in batches[1:])]
        tokens = lambda rows: float(sum(np.array(b.mask)[chosen].sum() for b, chosen in zip(batches, rows)))
        return rows, max(tokens(rows), 1) / max(tokens(everything), 1)

    def hooked(self, gradients):
        """The gradients after every callback's on_gradients."""
        for callback in self.callbacks:
            gradients = callback.on_gradients(self, gradients)
        return gradients

    @contextlib.contextmanager
    def dropout_mask(self, model=None):
        """Adapter dropout for one scoring pass, with the mask of this step: the old log-probs are scored under it too,
        so that the ratio is 1 until the policy moves."""
        model = model or self.model
        if not self.args.lora_dropout:
            yield
            return
        model.train()
        mx.random.seed(hash((self.args.seed, self.step_count)) % 2**63)
        try:
            yield
        finally:
            model.eval()

    def prompt_states(self, prompts, prompt_lengths, split=None):
        """SplitModel.prompt_states of the trained model, with this step's dropout."""
        split = split or self.split
        with self.dropout_mask(split.model):
            return split.prompt_states(prompts, prompt_lengths)

    def under_dropout(self, batches, way):
        """The Batches with the old log-probs of this step's mask, by the sampler's weights."""
        split, states = SplitModel(self.model_old), None
        for batch in batches:
            if way == "before" and not states:
                states = self.prompt_states(batch.prompts, batch.prompt_lengths, split)
            with self.dropout_mask(self.model_old):
                old = completion_logprobs(split, batch, self.sampling.temperature, self.sampling.repetition_penalty, way=way,
                                          states=states)[0]
                batch = replace(batch, old_logprobs=mx.where(batch.mask > 0, old, 0))
                mx.eval(batch.old_logprobs)
            yield batch

    def sync_old(self, calm=False):
        """model_old <- model. No copy where every step syncs and rollouts are not quantised; a copy shares its arrays with
        the model until that moves. Every tensor is checked to be copied and finite, and the copy on a probe; one that
        fails twice climbs the ladder. calm: a sync in the course of training, which may step back down."""
        if self.update_every == 1 and not self.quantize_rollouts:
            self.model_old = self.model
            return
        self.calm_syncs += calm
        if self.rung and self.calm_syncs >= self.args.calm_syncs:
            self.rung, self.calm_syncs = self.rung - 1, 0
        probe = mx.array([render_prompt(self.tokenizer, self.train_dataset[0], self.args)])
        while True:
            for _ in range(2):
                self.model_old = None             # frees the old copy before the new one is made
                self.model_old = frozen_copy(self.model, bits=self.ladder[self.rung], group_size=self.args.rollout_group_size,
                                             precision=self.args.rollout_precision)
                if mx.isfinite(self.model_old(probe)).all().item():
                    return
            self.heal(NotFinite(f"the copy for rollouts ({self.ladder[self.rung] or 'full precision'} bits) gives logits that "
                                "are not finite on a probe"), resync=False)

    def heal(self, error, batches=(), resync=True):
        """Climb one rung of the ladder after a failed batch; where there is none left, say true if the batch is to be left
        out (max_bad_steps), else raise the error. batches: those that failed, kept for a post-mortem."""
        if not self.args.self_healing or self.rung + 1 == len(self.ladder):
            self.save_failure(error, batches)
            self.bad_steps += 1
            if resync and self.bad_steps <= self.args.max_bad_steps:
                print(f"step {self.step_count + 1}: {error}; the batch is left out ({self.bad_steps} of max_bad_steps)", file=sys.stderr)
                return True
            raise UserError(f"{error} (step {self.step_count + 1}; learning rate {self.args.learning_rate:g}, kl_coeff "
                            f"{self.args.kl_coeff:g}; see {self.run_dir / 'failure.json'})") from error
        self.rung, self.calm_syncs, self.healed = self.rung + 1, 0, self.healed + 1
        print(f"step {self.step_count + 1}: {error}; rollouts go on with {self.ladder[self.rung] or 'full'} bits", file=sys.stderr)
        if resync:
            self.sync_old()
        return False

    def save_failure(self, error, batches=()):
        """What failed, beside the last good state, which is the model as it is: a failed update is never applied."""
        if not self.log.run_dir:
            return
        save_post_mortem(self, error, batches, self.last_problems())
        if self.step_count and self.bad_steps >= self.args.max_bad_steps and all(mx.isfinite(a).all().item() for _, a in tree_flatten(self.learner.master)):
            self.save_checkpoint(self.run_dir / f"checkpoint-{self.step_count}")

    def last_problems(self):
        return self.stream.take(self.prompts_drawn, self.args.prompts_per_step, self.curriculum)

    def check_health(self, loss, metrics):
        """Raises NotFinite for a batch that must not be trained on."""
        ess, gap = metrics["sampling/effective_sample_size"], metrics["sampling/sampling_logp_difference/mean"]
        if not math.isfinite(loss) or not math.isfinite(gap):
            raise NotFinite(f"the loss is {loss} and the sampler-trainer gap {gap}")
        if self.args.min_ess and ess < self.args.min_ess:
            raise NotFinite(f"the effective sample size of the rollouts is {ess:.3f}, below min_ess = {self.args.min_ess}")
        if self.args.max_logp_gap and gap > self.args.max_logp_gap:
            raise NotFinite(f"sampler and trainer differ by {gap:.3f} nats, above max_logp_gap = {self.args.max_logp_gap}")

    # -- the run around the steps

    @closes_callbacks
    def train(self):
        """Steps until total_steps, with evaluations, checkpoints and logs at their periods; returns the last metrics."""
        args, metrics = self.args, {}
        self.notify("on_train_begin")
        if self.step_count == 0 and (scores := self.evaluate(at_start=True)):
            self.log.metrics({"step": 0, **scores})
            print(step_of(0, self.total_steps) + " | " + " | ".join(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)
        stop = False
        while self.step_count < self.total_steps and not stop and not self.interrupted:
            metrics = self.step()
            self.writer.check()
            last = self.step_count == self.total_steps
            metrics |= {"save_s": self.save_s, **self.writer.times()} | self.evaluate(last)
            self.save_s = 0.0
            self.phase("log")
            stop = self.world.stop(self, self.notify("on_step_end", metrics))
            self.log.metrics(metrics)
            if args.logging_steps and (self.step_count % args.logging_steps == 0 or last):
                self.log.line(metrics, self.total_steps)
            best = self.is_best(metrics)
            if last or stop or best or self.interrupted or (args.save_steps and self.step_count % args.save_steps == 0):
                self.save_run(best)
        self.writer.wait()
        self.notify("on_train_end")
        return metrics

    def is_best(self, metrics):
        """Whether save_best's metric is there and higher than ever; remembers it."""
        value = metrics.get(self.args.save_best)
        if value is None or (self.best is not None and value <= self.best):
            return False
        self.best = value
        return True

    def save_run(self, best=False):
        """checkpoint-N of the run, the links that lead to it, and older ones removed beyond save_total_limit."""
        if not self.world.first:
            return
        started, path = time.perf_counter(), self.run_dir / f"checkpoint-{self.step_count}"
        write = self.checkpoint_writer(path)

        def save():
            self.phase("save")
            write()
            self.phase("links")
            point_to(self.run_dir, "checkpoint-last", path)
            if best:
                point_to(self.run_dir, "checkpoint-best", path)
            if self.args.save_total_limit:
                prune(self.run_dir, self.args.save_total_limit)

        self.writer.start(save, done=lambda: self.notify("on_save", path))
        self.save_s = time.perf_counter() - started

    def evaluate(self, at_end=False, at_start=False):
        """Exact match on the held-out problems and on the fixed training subset, where this step's number is due."""
        args, found = self.args, {}
        due = lambda period: at_start or (period and (at_end or self.step_count % period == 0))
        subset = self.train_dataset[:args.eval_subset_size] if args.eval_every_updates else []
        for name, problems, period in (("eval", self.eval_dataset, args.eval_steps), ("eval_train", subset, args.eval_every_updates)):
            if problems and period and due(period):
                self.phase("evaluate", **rollout_shape(args, problems, 1))
                scores, texts = evaluate(self.model, self.tokenizer, problems, args)
                if name == "eval":
                    self.samples[self.step_count] = problems[0].prompt, texts[0]
                    self.log.evaluation(self.step_count, problems, texts)
                found |= {f"{name}/{key}": value for key, value in scores.items()}
        if found:
            self.notify("on_evaluate", found)
        return found

    def trainer_state(self):
        """What reward functions may know of the run: global_step, max_steps, epoch (TRL's names)."""
        epoch = self.prompts_drawn / len(self.train_dataset)
        return argparse.Namespace(global_step=self.step_count, max_steps=self.total_steps, epoch=epoch)

    def notify(self, event, *args):
        """Call every callback's method of that name; true if any of them returns true."""
        return any([getattr(callback, event)(self, *args) for callback in self.callbacks])

    STATE = ("shapes", "step_count", "num_tokens", "prompts_drawn", "rung", "calm_syncs", "healed", "entropy_coef", "window_metrics", "best",
             "bad_steps", "curriculum")

    def save_checkpoint(self, path):
        """A directory that mlx_lm and transformers open, with the optimizer and all of the trainer's state beside it, what
        is left of a rollout batch among it; written under a temporary name and renamed. Raises UserError."""
        self.writer.wait()
        self.checkpoint_writer(path)()
        self.notify("on_save", path)

    def checkpoint_writer(self, path):
        """A function that saves a checkpoint of the run as it is now, whenever it is called: MLX arrays don't change."""
        state = {name: vars(self)[name] for name in self.STATE}
        state |= {"step": self.step_count, "total_steps": self.total_steps, "reward_errors": self.scorer.errors,
                  "config": asdict(self.args), "callbacks": states(self.callbacks)}
        steps, arrays = [[id(b) for b in batches] for batches in self.window], {}
        order = list(dict.fromkeys(i for ids in steps for i in ids))       # a Batch may serve several steps: stored once
        for batch in (b for batches in self.window for b in batches):
            arrays |= {f"{order.index(id(batch))}.{name}": a for name, a in vars(batch).items() if a.size}
        state["window"] = [[order.index(i) for i in ids] for ids in steps]
        stale = self.model_old is not self.model and (self.step_count % self.update_every != 0 or self.rung)
        files = arrays_of(self.learner) | ({WINDOW: arrays} if arrays else {})
        files |= {OLD_POLICY: dict(tree_flatten(self.model_old.parameters()))} if stale else {}
        files |= {REFERENCE: dict(tree_flatten(self.ref_model.parameters()))} if self.args.ref_sync_steps else {}
        return partial(save_checkpoint, path, self.learner, self.tokenizer, json.dumps(state), files, self.phase)

    def load_checkpoint(self, path):
        """Continue from a checkpoint of this run: weights, moments, model_old, step, what is left of the rollout batch."""
        path = Path(path)
        if trouble := check_manifest(path):
            raise UserError(f"{path} is not a whole checkpoint: {trouble}; --resume auto takes the newest whole one")
        check_same_run(json.loads((path / "trainer_state.json").read_text())["config"], asdict(self.args), path)
        state = load_checkpoint(path, self.learner)
        for name in self.STATE:
            setattr(self, name, state[name])
        self.scorer.errors = state["reward_errors"]
        restore(self.callbacks, state["callbacks"])
        arrays = mx.load(str(path / WINDOW)) if (path / WINDOW).exists() else {}
        count = 1 + max((i for ids in state["window"] for i in ids), default=-1)
        batches = [read_batch({k.partition(".")[2]: a for k, a in arrays.items() if k.startswith(f"{i}.")}) for i in range(count)]
        self.window = [[batches[i] for i in ids] for ids in state["window"]]
        self.sync_old()
        for file, model in ((OLD_POLICY, self.model_old), (REFERENCE, self.ref_model)):
            if (path / file).exists():
                model.load_weights(str(path / file))
                mx.eval(model.parameters())
        self.log.cut_after(self.step_count)


def read_batch(arrays):
    """A Batch from stored arrays; empty ones are not stored."""
    rows = arrays["mask"].shape
    empty = {"kept": mx.zeros((*rows, 0), dtype=mx.int32), "first_seen": mx.zeros((rows[0], 0), dtype=mx.int32)}
    return Batch(**(empty | arrays))


def mix_weights(target, source, share):
    """target <- share * source + (1 - share) * target, in place of target's weights."""
    target.update(tree_map(lambda t, s: share * s + (1 - share) * t, target.parameters(), source.parameters()))
    mx.eval(target.parameters())


def load_teacher(config, student):
    """The teacher model of objective distill, in the compute dtype. Raises UserError where its vocabulary is another."""
    teacher, _ = load_model(config.teacher_model, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
    sizes = vocabulary_of(teacher), vocabulary_of(student)
    if sizes[0] != sizes[1]:
        raise UserError(f"teacher_model {config.teacher_model} has {sizes[0]} tokens and {config.model_name} {sizes[1]}; "
                        "distillation needs one vocabulary")
    teacher.update(cast_floats(teacher.parameters(), compute_dtype(config)))
    teacher.freeze()
    return teacher


def overlong_punishment(lengths, longest, cache):
    """DAPO's: 0 up to longest - cache tokens, then falling to -1 at longest, -1 beyond (arXiv 2503.14476)."""
    return np.clip((longest - cache - lengths) / cache, -1, 0)


def compute_dtype(config):
    """The mx.Dtype of forward and backward passes: config.dtype, or what suits the device."""
    if config.dtype != "auto":
        return getattr(mx, config.dtype)
    return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16


# ---- supervised warm start -------------------------------------------------------------------------------------------

def sft_batch(tokenizer, problems, config):
    """Prompts with their demonstrations and the end token as a Batch; cut at max_completion_length."""
    rollouts = []
    for problem in problems:
        ids = tokenizer.encode(problem.solution, add_special_tokens=False)[:config.max_completion_length - 1]
        ids = [*ids, tokenizer.eos_token_id]
        rollouts.append(Rollout(problem, render_prompt(tokenizer, problem, config), [ids], [[0.0] * len(ids)],
                                [[1] * len(ids)], [True], [problem.solution]))
    return pad_batch(rollouts, np.zeros((len(problems), 1)))


def sft_loss(logprobs, mask, num_tokens):
    """Mean negative log-likelihood of the demonstrations' tokens, nats; (B, T). num_tokens: of the whole step."""
    return -(logprobs * mask).sum() / num_tokens


class SFTTrainer(MLXGRPOTrainer):
    """The warm start: the same problems, order, batches, schedule, evaluations and checkpoints, with sft_loss on each
    problem's demonstration. A step is batch_size * gradient_accumulation_steps problems."""

    def __init__(self, model, tokenizer, args, train_dataset, eval_dataset=None, **options):
        train_dataset = as_problems(train_dataset, args)
        if missing := [p for p in train_dataset if p.solution is None]:
            raise UserError(f"sft needs a demonstration, and {missing[0].prompt!r} has none; set solution_column to the "
                            "column that holds it")
        args = replace(args, kl_coeff=0.0, kl_in="loss", ref_sync_steps=0, quantize_for_rollouts=False, update_every=1,
                       num_iterations=1, objective="grpo", teacher_model="", distill_task_coeff=0.0)
        super().__init__(model, tokenizer, args.rewards, args, train_dataset, eval_dataset, **options)
        self.gradients = self.learner.gradients_of(self.compute_sft_loss, self.prompt_states, self.compiled)
        self.stream.rising = False

    def compute_sft_loss(self, batch, num_tokens, way="each", states=None, pieces=None):
        logprobs, _ = completion_logprobs(self.split, batch, 1.0, way=way, states=states, pieces=pieces)
        return sft_loss(logprobs, batch.mask, num_tokens), {}

    def step(self, problems=None):
        problems = problems or self.next_problems(self.args.prompts_per_step)
        started, step, size = time.perf_counter(), self.step_count + 1, self.args.batch_size
        batches = [sft_batch(self.tokenizer, problems[i:i + size], self.args) for i in range(0, len(problems), size)]
        num_tokens = sum(b.mask.sum() for b in batches)
        loss, gradients, rows = 0.0, None, self.world.groups(batches, [list(range(len(b.mask))) for b in batches])
        for batch, mine in zip(batches, rows):
            for way, passes in self.passes(batch, mine):
                each = (self.part(batch, rows, way) for rows in passes)
                value, _, gradients = self.gradients(each, num_tokens, way=way, into=gradients)
                loss += value
        loss, _, gradients = self.world.total(loss, [], gradients, self.learner.master)
        learning_rate = learning_rate_at(step, self.total_steps, self.args)
        norm = self.learner.update(self.hooked(gradients), learning_rate)
        self.step_count, self.num_tokens = step, self.num_tokens + sum(b.mask.size for b in batches)
        return {"step": step, "epoch": step * self.args.prompts_per_step / len(self.train_dataset),
                "learning_rate": learning_rate, "loss": loss, "grad_norm": norm, "num_tokens": self.num_tokens,
                "step_time": time.perf_counter() - started, "memory/pass_shapes": len(self.shapes), **self.phase.peaks_gb()}


# ---- evaluation, checkpoints, run log --------------------------------------------------------------------------------

from mlx_grpo.announce import announce, print_summary  # noqa: E402
from mlx_grpo.eval_rollouts import eval_rollouts, evaluate, right_answers  # noqa: E402
from mlx_grpo.background_save import Writer  # noqa: E402
from mlx_grpo.manifest import check_manifest  # noqa: E402
from mlx_grpo.run_files import (  # noqa: E402
    OLD_POLICY, REFERENCE, WINDOW, RunLog, arrays_of, load_checkpoint, read_metrics, save_arrays, save_checkpoint, save_tokenizer,
    save_weights, step_of, versions)
from mlx_grpo.out_of_memory import batches_shape, rollout_shape, training_shape  # noqa: E402
from mlx_grpo.post_mortem import save_post_mortem  # noqa: E402
from mlx_grpo.run_guard import (  # noqa: E402
    check_same_run, checkpoints_of, newest_valid, point_to, prune, run_lock_or_nothing, stop_on_signals, tidy)
from mlx_grpo.run_dir import write_run_config  # noqa: E402
from mlx_grpo.run_state import RunState  # noqa: E402

# ---- commands --------------------------------------------------------------------------------------------------------

def train_command(args):
    """Train by GRPO (or, as `sft`, on demonstrations): what the configuration says, from one command.

    examples:
      python mlx_grpo.py train --config configs/prod.toml --set num_generations=16
      python mlx_grpo.py sft --config configs/prod.toml --set run_name=warm-start
      python mlx_grpo.py train --config configs/prod.toml --resume
    """
    with find_world() as world:
        return start_training(args, world)


def start_training(args, world):
    from mlx_grpo.files import check_free_space

    config, sources = load_config(args.config, args.set)
    if args.supervise and world.size == 1:
        from mlx_grpo.supervise import supervise

        return supervise(args, config)
    rewards = find_rewards(config.rewards, config.reward_options)    # a typo is told before the model is loaded
    callbacks = configured_callbacks(config)
    if config.watch and args.command == "sft":
        raise ConfigError("sft trains on the demonstrations of a data set; leave watch to `train`")
    run_dir, checkpoint, config, memory = world.start(config, args.resume, args.supervise)
    train, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
    check_end_token(model, tokenizer, config)          # here: a benchmark's model never ends on purpose
    options = {"run_dir": run_dir, "callbacks": callbacks}
    if args.command == "sft":
        trainer = SFTTrainer(model, tokenizer, config, train, held_out, **options)
    elif config.watch:
        from mlx_grpo.watch import WatchTrainer

        trainer = WatchTrainer(model, tokenizer, rewards, config, train, held_out, **options)
    else:
        trainer = MLXGRPOTrainer(model, tokenizer, rewards, config, train, held_out, **options)
    with (world.on_first(run_lock_or_nothing, run_dir, lambda: trainer.step_count or trainer.bad_steps),
          world.on_first(trainer.phase.kept_in, run_dir, memory), trainer.writer):
        if checkpoint:
            trainer.load_checkpoint(checkpoint)
        else:
            trainer.log.cut_after(-1)                  # what a run left that ended before its first checkpoint
        if world.first:
            tidy(run_dir)
            check_free_space(run_dir, trainer.learner.checkpoint_bytes(), "a checkpoint")
            write_run_config(run_dir, config, sources, args.command)
            announce(trainer, config, sources, args.command)
        world.check_ready(trainer)
        started = time.perf_counter()
        with stop_on_signals(trainer):
            trainer.train()
        if trainer.interrupted:
            saved = f"saved checkpoint-{trainer.step_count}; go on" if trainer.step_count else "nothing to save yet; start again"
            world.first and print(f"stopped in {run_dir}: {saved} with the same command and --resume", file=sys.stderr)
            return 128 + trainer.interrupted
        print_summary(trainer, time.perf_counter() - started)
    return 0


def vocabulary_of(model):
    return model(mx.array([[0]])).shape[-1]


def add_config_arguments(parser):
    parser.add_argument("--config", metavar="PATH", help="TOML file (default: $MLX_GRPO_CONFIG, else the defaults)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="set one option; may be repeated")


def add_train_arguments(parser):
    add_config_arguments(parser)
    parser.add_argument("--resume", nargs="?", const="auto", metavar="auto|PATH",
                        help="continue from the newest checkpoint of the run, or from a given one")
    parser.add_argument("--watch", dest="set", action="append", type="watch={}".format, metavar="FILE",
                        help="train on the rows of a JSONL file as they are appended (docs/incremental.md)")
    parser.add_argument("--watch-idle", dest="set", action="append", type="watch_idle={}".format, metavar="SECONDS",
                        help="with --watch: end after so long without a new row")
    parser.add_argument("--supervise", action="store_true", help="start again after a death (docs/reliability.md)")


COMMANDS = {   # name: (module with add_arguments(parser) and run_command's function, or None for train_command; help)
    "train": (None, "train by GRPO (the default command)"),
    "sft": (None, "supervised warm start on the data's demonstrations"),
    "eval": ("evaluation", "exact match, pass@k, maj@k of a model; two models compared"),
    "rewards": ("reward_check", "list and explain the reward functions"),
    "preview": ("preview", "the first prompts as the model reads them"),
    "plan": ("plan", "options with their sources, parameters and memory"),
    "report": ("report", "a run, or several, as one HTML page"),
    "sweep": ("sweep", "a grid or random search over options"),
    "push": ("push", "a checkpoint to the Hugging Face hub, with a model card"),
    "completion": ("completion", "completion of this command line for bash, zsh or fish"),
}

from mlx_grpo.command_line import make_parser  # noqa: E402


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        argv.insert(0, "train")
    args = make_parser(argv[0]).parse_args(argv)
    if args.function is not train_command and launched() > 1:
        raise UserError(f"{args.command} runs in one process; mlx.launch is for train and sft")
    return args.function(args)


def console():
    """The installed command `mlx-grpo`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")      # a completion may hold what the terminal can't show
    run_command(main)


if __name__ == "__main__":
    console()
