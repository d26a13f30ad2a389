"""`mlx_grpo.py rewards`: the reward functions, before a run is built on them."""

import inspect

from mlx_grpo import REWARDS, add_config_arguments, find_rewards, load_config


def add_arguments(parser):
    add_config_arguments(parser)


def run(args):
    """The reward functions, with what each gives; the configured ones are marked with their weight."""
    config, _ = load_config(args.config, args.set)
    chosen = find_rewards(config.rewards)
    weights = dict(zip(chosen, config.reward_weights or [1.0] * len(chosen)))
    for name, function in (REWARDS | chosen).items():
        used = f"weight {weights[name]:g}" if name in weights else "not used"
        summary = (inspect.getdoc(function) or "no description").partition("\n\n")[0]
        print(f"{name:16} {used:12} {' '.join(summary.split())}")
    return 0
