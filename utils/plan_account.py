"""
What a run holds in memory, from its configuration and the shapes of its model: nothing is allocated or computed.

Weights, gradients, moments, copies, keys and values are exact. What the backward pass holds of each token is an estimate:
FACTORS times the outputs of a block's matrices, the attention's scores and the chunk of the head. A trial run
(plan_measure.py) replaces it by a measurement.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_grpo import (
    HEAD_CHUNK, UserError, backend, bucket, cast_floats, compute_dtype, count_parameters, old_logprobs_kind, pass_budget, pass_tokens,
    plan_passes, prepare_trainable, shipped_path)
from mlx_grpo import nanochat_model
from mlx_grpo.optimizers import make_optimizer

KNOWN = Path(__file__).with_name("plan_models.json")     # config.json of models that shipped configurations name
UPDATE = 2.5         # gradients, scaled gradients and what the optimizer holds at once, in units of the gradients
FACTORS = {"block": 2.2, "scores": 3.0, "head": 4.0}


# ---- the model, by its shapes ----------------------------------------------------------------------------------------

def model_config(name):
    """config.json of a model: of a directory, the hub's cache, or KNOWN. Raises UserError where none of them has it."""
    path = Path(shipped_path(name)).expanduser()
    if (path / "config.json").exists():
        return json.loads((path / "config.json").read_text())
    known = json.loads(KNOWN.read_text())
    if name in known:
        return known[name]
    if name.count("/") == 1 and not name.startswith((".", "~")):
        from huggingface_hub import try_to_load_from_cache

        if isinstance(found := try_to_load_from_cache(name, "config.json"), str):
            return json.loads(Path(found).read_text())
    raise UserError(f"{name} is neither a directory with a config.json, nor a model in the hub's cache, nor one of "
                    f"{', '.join(known)}: plan needs its shapes; download it, or give model_name a directory")


def shapes_of(config):
    """A model of the configuration's architecture whose arrays are never computed."""
    from mlx_lm.utils import _get_classes

    from mlx_grpo.model_config import unsupported_reason

    found = model_config(config.model_name)
    if found.get("model_type") == "nanochat_mlx":
        kind, arguments = nanochat_model.Model, nanochat_model.ModelArgs
    elif found.get("model_file"):
        raise UserError(f"{config.model_name} brings its own {found['model_file']}, whose shapes plan doesn't know")
    elif reason := unsupported_reason(found):
        raise UserError(f"{config.model_name}: {reason}")
    else:
        kind, arguments = _get_classes(found)
    model = kind(arguments.from_dict(found))
    if quantised := found.get("quantization"):
        given = {path: value for path, value in quantised.items() if isinstance(value, (dict, bool))}
        nn.quantize(model, quantised["group_size"], quantised["bits"],
                    class_predicate=lambda path, m: hasattr(m, "to_quantized") and given.get(path, True))
    model.update(cast_floats(model.parameters(), compute_dtype(config)))
    model.args_found = found
    return model


def on_a_mac(config):
    """The configuration with the values that "auto" has on a Mac, wherever this runs."""
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    given = config.max_tokens_per_microbatch
    return replace(config, dtype=dtype, max_tokens_per_microbatch=backend.PASS_TOKENS["gpu"] if given < 0 else given)


def size_of(tree):
    return sum(a.nbytes for _, a in tree_flatten(tree))


def bytes_of_state(model, config):
    """{what: bytes} that lie in memory all the time, and {"checkpoint", "trained", "total"}; model: as shapes_of gives
    it, which afterwards has its adapters."""
    dtype = compute_dtype(config)
    whole = count_parameters(model)
    prepare_trainable(model, config)
    model.update(cast_floats(model.parameters(), dtype))
    trained = model.trainable_parameters()
    count = sum(a.size for _, a in tree_flatten(trained))
    master = cast_floats(trained, getattr(mx, config.optimizer_dtype))
    optimizer = make_optimizer(config, master)
    optimizer.init(master)
    apart = getattr(mx, config.optimizer_dtype) != dtype
    bits = 0 if config.quantize_for_rollouts == "auto" and len(model.layers) > 20 else config.bits_ladder[0]
    state = {
        "weights to compute with": size_of(model.parameters()),
        "weights to train": size_of(master) if apart else 0,
        "moments": size_of(optimizer.state),
        "ref_model": size_of(trained) if config.kl_coeff else 0,
        "model_old": round(quantised_bytes(model, bits, config.rollout_group_size)) if bits
        else size_of(trained) if config.update_every > 1 else 0}
    return state, {"gradients": 4 * count, "trained": count, "total": whole, "checkpoint": size_of(master) + size_of(optimizer.state)}


def quantised_bytes(model, bits, group_size):
    """Of the quantised copy for rollouts: matrices at so many bits with a scale and a bias for each group."""
    total = 0
    for name, module in model.named_modules():
        for key, array in module.items():
            if isinstance(array, mx.array):
                fits = key == "weight" and hasattr(module, "to_quantized") and array.shape[-1] % group_size == 0
                total += array.size * (bits / 8 + 2 * array.itemsize / group_size) if fits else array.nbytes
    return total


class Account:
    """What a run holds: state {what: bytes} all the time, parts {phase: {what: bytes}} beside it, peaks {phase: bytes}."""

    def __init__(self, config, work):
        self.config, self.work, self.eval_count, self.factors = config, work, work["eval_count"], {}
        model = shapes_of(config)
        self.state, self.more = bytes_of_state(model, config)
        self.parts = phases(model, config, work)
        self.lying = sum(self.state.values())

    @property
    def peaks(self):
        gradients = self.more["gradients"] * self.gradient_copies
        found = {"update": self.lying + UPDATE * self.more["gradients"]}
        for phase, parts in self.parts.items():
            if phase != "update" and parts:
                found[phase] = self.lying + (gradients if phase == "passes" else 0) + sum(parts.values())
        return {phase: self.lying + (peak - self.lying) * self.factors.get(phase, 1.0) for phase, peak in found.items()}

    @property
    def gradient_copies(self):
        """Those of a pass, and their sum where there is more than one."""
        return min(self.work["passes"] + (self.work["way"] == "before"), 2)

    @property
    def largest(self):
        return max(self.peaks, key=self.peaks.get)

    @property
    def peak(self):
        return max(self.peaks.values())

    def correct(self, measured):
        """Take over measured peaks {phase: bytes}: what they hold beside the state replaces the estimate, in this account
        and, as a factor, in those of changed settings."""
        estimated = self.peaks
        self.factors = {phase: (size - self.lying) / (estimated[phase] - self.lying) for phase, size in measured.items()
                        if phase in estimated}


# ---- the work of a step ----------------------------------------------------------------------------------------------

def work_of(config, longest_prompt, eval_count=None):
    """How large the parts of a step are: tokens of a prompt and a completion; rows and prompts of its largest pass, how that
    computes them (way, of plan_passes) and how many passes are together in that; passes of a step; prompts whose rows are
    decoded together in training and evaluation."""
    L, T, G = longest_prompt, config.max_new_tokens, config.num_generations
    B = config.batch_size * G
    prompt_of, lengths = np.arange(B) // G, np.full(config.batch_size, L)
    step = SimpleNamespace(mask=np.ones((B, T)), prompt_of=prompt_of, prompt_lengths=lengths)
    ways = plan_passes(step, list(range(B)), pass_budget(config), config.prefix_sharing)
    tokens = lambda way, rows: pass_tokens(np.full(len(rows), T), lengths, prompt_of[rows], way)
    way, together = max(ways, key=lambda found: tokens(found[0], found[1][0]))
    largest = max(together, key=len)
    prompts = config.prompts_per_step * config.minibatches
    eval_count = config.eval_samples if eval_count is None else eval_count
    return {"prompt": L, "way": way, "completion": T, "pass_rows": len(largest), "pass_prompts": len(set(prompt_of[largest])),
            "passes": config.gradient_accumulation_steps * sum(len(found) for _, found in ways), "together": len(together),
            "prompts": prompts, "eval_count": eval_count,
            "rollout_prompts": min(prompts, max(1, -(-config.rollout_batch_size // G))),
            "eval_prompts": min(eval_count, config.rollout_batch_size) if config.eval_steps else 0}


# ---- each phase ------------------------------------------------------------------------------------------------------

def count_trained(model):
    return sum(a.size for _, a in tree_flatten(model.trainable_parameters()))


def cache_bytes(model, config, rows, tokens):
    """Of the keys and values of `rows` rows at `tokens` tokens each."""
    found = model.args_found.get("text_config") or model.args_found
    heads = found.get("num_key_value_heads") or found.get("n_kv_head") or found.get("num_attention_heads") or found.get("n_head")
    width = found.get("head_dim") or found.get("hidden_size", found.get("n_embd", 0)) // (found.get("num_attention_heads") or found["n_head"])
    size = config.kv_bits / 8 + 4 / 64 if config.kv_bits else compute_dtype(config).size
    return 2 * len(model.layers) * rows * tokens * heads * width * size


def block_width(model):
    """Numbers that a block computes for one token: the outputs of its matrices (of those experts that a token visits) and
    its norms."""
    experts = model.args_found.get("num_experts_per_tok") or 1
    block, total = model.layers[-1], 0
    for _, module in block.named_modules():
        weight = module.get("weight")
        if weight is not None:
            out = weight.shape[-2] * (experts if weight.ndim == 3 else 1) if weight.ndim > 1 else weight.shape[0]
            total += out
    return total


def phases(model, config, work):
    """{phase: {part: bytes}} beside the state: what rollouts, evaluation, scoring and updates hold at their peaks."""
    found = model.args_found.get("text_config") or model.args_found
    L, T, R = work["prompt"], work["completion"], work["pass_rows"]
    size, layers, V = compute_dtype(config).size, len(model.layers), found["vocab_size"]
    heads, width = found.get("num_attention_heads") or found["n_head"], found.get("hidden_size") or found["n_embd"]
    run = {"each": R, "within": work["pass_prompts"], "before": 0}[work["way"]]         # prompts in a pass
    states = 4 * cache_bytes(model, replace(config, kv_bits=0), 1, bucket(L))           # with two gradients, in float32
    context = bucket(L) + bucket(T)

    def block(prompts, rows):
        """What a block computes, and what the whole trunk holds for the backward pass."""
        tokens = prompts * bucket(L) + rows * bucket(T)
        scores = rows * context ** 2 if work["way"] == "each" else rows * bucket(T) * context + prompts * bucket(L) ** 2
        one = FACTORS["block"] * tokens * block_width(model) * size + FACTORS["scores"] * heads * size * scores
        return one, layers * tokens * width * size + 2 * one if config.gradient_checkpointing else layers * one

    one, held = block(run, R)
    logits = FACTORS["head"] * 4 * min(R * bucket(T) * V, max(HEAD_CHUNK, V))
    grow = lambda n: math.ceil(n / 256) * 256
    kv = lambda rows, new: {"keys and values": 1.2 * cache_bytes(model, config, rows, L + grow(new)),
                            "logits": size * V * max(2 * min(L, 512), 4 * rows)}
    scored = config.kl_coeff or old_logprobs_kind(config) == "proximal" or config.objective == "distill"
    return {
        "rollout": kv(work["rollout_prompts"] * config.num_generations, T),
        "evaluate": kv(work["eval_prompts"], config.eval_max_new_tokens) if work["eval_prompts"] else {},
        "scoring": {"activations": 2 * one, "logits": logits} if scored else {},
        "passes": {"activations": max(held, block(1, 0)[1]) if work["way"] == "before" else held, "logits": logits}
        | ({"keys and values of a prompt": states} if work["way"] == "before" else {}),
        "update": {"optimizer": (UPDATE - 1) * 4 * count_trained(model)}}
