"""
Write docs/configuration.md from the options' declarations in mlx_grpo.py.

    python utils/make_docs.py            # after an option was added or changed

What the declarations don't say stands here: the sections, ranges worth trying, and where the recipes come from.
"""

import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from mlx_grpo import LOADERS, LOSSES, OPTIONS, RECIPES, REWARDS, option_default, optimizers, run_command
from mlx_grpo.command_line import Parser
from mlx_grpo.files import check_output_file
from mlx_grpo.help_text import help_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Written by `python utils/make_docs.py` from the declarations in `mlx_grpo.py`: change those, not this page.

An option comes from the defaults, then from the recipe, then from the TOML file (`--config`, or `$MLX_GRPO_CONFIG`), then
from `--set key=value`: the last one wins. A file holds options at its top level or in a table `[mlx_grpo]`. An unknown
name, a wrong type, a value out of range and options that contradict each other stop the run with one line before anything
is written; the names that TRL, verl and mlx-lm-lora use are answered with ours. `python mlx_grpo.py plan` prints each
option's value and where it comes from, and what the run will hold in memory.

A step is one optimizer update over `batch_size * gradient_accumulation_steps` prompts with `num_generations` completions
each. Lengths are in tokens, periods in steps, log-probs and entropies in nats. Bounds: `[0, 1]` includes both ends,
`(0, 1]` leaves 0 out. *Try* names ranges that are worth trying and where they come from; where it is empty, the right
value follows from your data or your machine.
"""
SECTIONS = {  # first option -> title
    "model_name": "Model", "output_dir": "Where the run lives", "dataset": "Data", "num_generations": "Rollouts",
    "rewards": "Rewards and advantages", "objective": "Objective", "fine_tune_type": "What is trained",
    "batch_size": "Steps and optimizer", "logging_steps": "Log, evaluation, checkpoints",
}
TRY = {
    "num_generations": "8 to 64: nanochat and DAPO 16, DeepSeekMath 64; with few, most groups have equal rewards",
    "temperature": "0.7 to 1.0; DAPO and nanochat use 1.0",
    "top_p": "1 while training: truncation narrows what can be learnt",
    "min_p": "0.05 to 0.1 (2407.01082)", "repetition_penalty": "1 while training; 1.2 is CTRL's (1909.05858)",
    "max_completion_length": "at least the longest completion you want, plus overlong_cache",
    "rollout_bits": "4, or `[4, 8, 0]` for models of more than 20 layers",
    "max_gen_batches": "3 to 10; `frac_reward_zero_std` in the log says how many groups are lost",
    "update_every": "1 to 10; more is cheaper only with quantised rollouts, and staler always",
    "advantage": "gdpo with several rewards of different spread (2601.05242)",
    "scale_rewards": "none for Dr. GRPO (2503.20783); batch against noise from small groups (2508.08221)",
    "overlong_cache": "a fifth of max_completion_length (2503.14476: 4096 of 20480)",
    "num_iterations": "1 to 4; beyond 1 the clip range matters",
    "minibatches": "1 to 4; 2507.18071 (GSPO) uses 4",
    "clip_eps": "0.2 (token); 3e-4 at sequence level (2507.18071)",
    "clip_eps_high": "0.28 (2503.14476); 4e-4 at sequence level; 5 for cispo",
    "delta": "4 (2505.07291), with clip_eps at 0.2", "sapo_temperature_pos": "1.0 (2511.20347)",
    "sapo_temperature_neg": "1.05: above the positive one (2511.20347)",
    "kl_coeff": "0 to 0.05: DeepSeekMath 0.04, Dr. GRPO and DAPO 0; a reference model costs a second copy of the weights",
    "ref_sync_steps": "256 to 1024; TRL's default is 512", "ref_sync_mix": "0.6 (2404.09656)",
    "entropy_coef": "0 to 0.01", "entropy_target": "0.2 (2505.22312)", "entropy_step": "0.005 (2505.22312)",
    "top_entropy_quantile": "0.2: the forking tokens (2506.01939)",
    "sampler_clip_max": "2 to 5; TRL's default is 3", "sampler_clip_min": "0, or 0.5 to mask both sides (IcePop)",
    "lora_rank": "8 to 64", "lora_dropout": "0 to 0.1",
    "learning_rate": "1e-6 to 5e-6 for all weights, 1e-5 to 1e-4 for adapters and tiny models; a third of that for lion",
    "warmup_ratio": "0.03 to 0.1", "max_grad_norm": "0.1 to 1", "adam_beta2": "0.95 to 0.999", "weight_decay": "0 to 0.1",
    "eval_samples": "100 or more: with 200 problems the standard error of an exact match is up to 0.035",
    "eval_temperature": "0, so that two evaluations of one model agree",
}
REGISTRIES = {  # option -> names that the program knows, beside file.py:name
    "model_loader": ["auto", *LOADERS], "rewards": REWARDS, "loss_type": LOSSES, "optimizer": optimizers.NAMES}
SOURCES = {
    "deepseekmath": "[2402.03300](https://arxiv.org/abs/2402.03300), section 4.2",
    "dapo": "[2503.14476](https://arxiv.org/abs/2503.14476)", "dr_grpo": "[2503.20783](https://arxiv.org/abs/2503.20783)",
    "gspo": "[2507.18071](https://arxiv.org/abs/2507.18071)", "cispo": "[2506.13585](https://arxiv.org/abs/2506.13585)",
    "rloo": "[2402.14740](https://arxiv.org/abs/2402.14740)", "nanochat": "nanochat's `scripts/chat_rl.py`",
}


def toml(value):
    """A value as TOML writes it, which is how a user writes it."""
    if isinstance(value, dict):
        bare = lambda key: key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
        return "{ " + ", ".join(f"{bare(key)} = {toml(v)}" for key, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def cell(text):
    """Text as a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def allowed(option):
    """What a value may be: the choices, or the bounds as an interval; empty for any value of the type."""
    rule = option.metadata
    if known := REGISTRIES.get(option.name, rule["choices"]):
        more = ", or `\"file.py:name\"`" if option.name in REGISTRIES else ""
        return ", ".join(f"`{toml(choice)}`" for choice in known) + more
    if rule["above"] is not None:
        left = f"({rule['above']:g}"
    else:
        left = "(-∞" if rule["low"] is None else f"[{rule['low']:g}"
    high = rule["high"]
    right = "∞)" if high is None else "2^63 - 1]" if high == 2**63 - 1 else f"{high:.9g}]"
    return "" if (left, right) == ("(-∞", "∞)") else f"{left}, {right}"


def default_cell(value):
    """The default as TOML; a text of several lines shortened to its first."""
    if isinstance(value, str) and "\n" in value:
        return f"`{toml(value.partition(chr(10))[0])[:-1]} ...\"`"
    if isinstance(value, float) and value and abs(math.log10(abs(value))) > 4:
        return f"`{value:g}`"
    return f"`{toml(value)}`"


def option_row(name):
    option = OPTIONS[name]
    cells = [f"`{name}`", option.type, default_cell(option_default(name)), allowed(option), option.metadata["help"],
             TRY.get(name, "")]
    return "| " + " | ".join(map(cell, cells)) + " |"


def recipe_row(name):
    sets = ", ".join(f"`{option} = {toml(value)}`" for option, value in RECIPES[name].items())
    return f"| `{name}` | {sets} | {SOURCES[name]} |"


def page():
    """The whole page as text."""
    lines = [INTRODUCTION]
    for name in OPTIONS:
        if name in SECTIONS:
            lines += ["" if lines[-1].startswith("|") else None, f"## {SECTIONS[name]}\n",
                      "| option | type | default | range | meaning | try |", "|---|---|---|---|---|---|"]
        lines.append(option_row(name))
    lines += ["\n## Recipes\n", "`recipe = \"dapo\"` gives the settings of a published method at once. They count below the "
              "file and `--set`, so any of\nthem can be changed; `plan` and the first lines of a run say which are in "
              "force.\n", "| recipe | sets | source |", "|---|---|---|"]
    lines += [recipe_row(name) for name in RECIPES]
    return "\n".join(line for line in lines if line is not None) + "\n"


def main(argv=None):
    parser = Parser(**help_of(__doc__))
    parser.add_argument("-o", "--output", default=PAGE, type=Path, help="the page (default: docs/configuration.md)")
    output = parser.parse_args(argv).output
    check_output_file("--output", output)
    output.write_text(page(), encoding="utf-8")
    print(f"{output}: {len(OPTIONS)} options, {len(RECIPES)} recipes")
    return 0


if __name__ == "__main__":
    run_command(main)
