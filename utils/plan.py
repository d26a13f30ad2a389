"""`mlx_grpo.py plan`: what a run will do and hold, before it is started."""

from dataclasses import asdict

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_grpo import (
    HEAD_CHUNK, add_config_arguments, compute_dtype, count_parameters, count_steps, find_rewards, fitting_problems, load_config,
    load_model, load_problems, prepare_trainable, vocabulary_of)


def add_arguments(parser):
    add_config_arguments(parser)


def run(args):
    """Every option with its value and source, the problems and steps, and what the run will hold in memory.

    examples:
      python mlx_grpo.py plan --config configs/prod.toml
      python mlx_grpo.py plan --config configs/prod.toml --set num_generations=16
    """
    config, sources = load_config(args.config, args.set)
    find_rewards(config.rewards, config.reward_options)
    for name, value in asdict(config).items():
        shown = value if not isinstance(value, str) or len(value) < 60 else value[:57] + "..."
        print(f"{name:28} {shown!r:44} {sources[name]}")
    problems, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
    problems = fitting_problems(problems, tokenizer, config)
    total, steps = count_parameters(model), count_steps(config, len(problems))
    print(f"\n{len(problems)} problems, {len(held_out)} held out; {steps} steps of {config.prompts_per_step} prompts x "
          f"{config.num_generations} = {steps * config.prompts_per_step * config.num_generations} completions of at most "
          f"{config.max_new_tokens} tokens")
    prepare_trainable(model, config)
    trained = sum(a.size for _, a in tree_flatten(model.trainable_parameters()))
    held = {name for name, _ in tree_flatten(model.trainable_parameters())}
    frozen = sum(a.nbytes for name, a in tree_flatten(model.parameters()) if name not in held)
    size, stored = 4 if compute_dtype(config) == mx.float32 else 2, 4 if config.optimizer_dtype == "float32" else 2
    bits = 0 if config.quantize_for_rollouts == "auto" and len(model.layers) > 20 else config.bits_ladder[0]
    rows = {"frozen base": frozen, f"weights, {config.optimizer_dtype}": stored * trained,
            "weights to compute with": 0 if size == stored else size * trained,
            "gradients": 4 * trained, "moments": 2 * stored * trained,
            "ref_model": size * trained if config.kl_coeff else 0,
            "model_old": (bits / 8 + 4 / config.rollout_group_size) * total if bits
            else size * trained if config.update_every > 1 else 0,
            "logits of a pass": 3 * 4 * min(config.batch_size * config.num_generations * config.max_new_tokens * vocabulary_of(model),
                                            HEAD_CHUNK)}
    print()
    for name, n in rows.items():
        print(f"{name:28} {n / 1e9:8.2f} GB")
    print(f"{'together':28} {sum(rows.values()) / 1e9:8.2f} GB, without activations and KV cache; {trained / 1e6:.1f}M of "
          f"{total / 1e6:.1f}M parameters are trained")
    return 0
