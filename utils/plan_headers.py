"""
Write the planned peak into the header of each shipped configuration, and the table of models into docs/memory.md.

    python utils/plan_headers.py      # after a configuration was changed

The peak is plan's estimate for a Mac (bfloat16, prompts as long as max_prompt_length allows), as `plan --memory` gives it.
"""

import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from mlx_grpo import MLXGRPOConfig, count_parameters, load_config, run_command
from mlx_grpo.command_line import Parser
from mlx_grpo.help_text import help_of
from mlx_grpo.plan_account import KNOWN, Account, model_config, on_a_mac, shapes_of, work_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LINE = re.compile(r"^# Planned peak: .*\n", re.MULTILINE)
PAGE = CONFIGS.parent / "docs/memory.md"
TABLE = re.compile(r"(<!-- planned -->).*?(<!-- /planned -->)", re.DOTALL)
MACS = 8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512
WORK = {"num_generations": 16, "batch_size": 1, "max_prompt_length": 256, "max_new_tokens": 512, "update_every": 1, "rollout_batch_size": 32,
        "max_tokens_per_microbatch": 2048, "gradient_checkpointing": True}       # what docs/memory.md says of its table
LORA = {"fine_tune_type": "lora", "lora_rank": 16}
WAYS = {"LoRA on 4 bits": (LORA, {"quantization": {"group_size": 64, "bits": 4}}), "LoRA": (LORA, {}), "full": ({}, {})}


def peak(path):
    """Bytes that a shipped configuration takes on a Mac."""
    config = on_a_mac(load_config(path)[0])
    return Account(config, work_of(config, config.max_prompt_length)).peak


def header(path):
    """The line of a configuration that states its peak, and the smallest Mac that allows it."""
    needed = peak(path)
    return f"# Planned peak: {needed / 1e9:.1f} GB in bfloat16, for a Mac with {smallest_mac(needed)} GB (`plan --memory`)."


def smallest_mac(needed):
    """The least memory in GB, of MACS, that allows a run of so many bytes; None where none does."""
    from mlx_grpo.plan import Machine

    return next((gb for gb in MACS if Machine(gb).limit >= needed), None)


def table_row(name):
    """A model's line of docs/memory.md: the peak in GB and the smallest Mac, for each of WAYS."""
    found = model_config(name)
    with tempfile.TemporaryDirectory() as folder:
        cells = []
        for options, quantization in WAYS.values():
            Path(folder, "config.json").write_text(json.dumps(found | quantization))
            config = MLXGRPOConfig(model_name=folder, dtype="bfloat16", **WORK | options)
            needed = Account(config, work_of(config, config.max_prompt_length)).peak
            mac = smallest_mac(needed)
            cells.append(f"{needed / 1e9:.1f} | {mac or 'none'}")
        parameters = count_parameters(shapes_of(replace(config, model_name=name)))
    return f"| {name.rpartition('/')[2]} | {parameters / 1e9:.2f} | {' | '.join(cells)} |"


def table():
    """The table of docs/memory.md."""
    titles = " | ".join(f"{way}, GB | Mac" for way in WAYS)
    names = [name for name in json.loads(KNOWN.read_text()) if not name.startswith("models/")]
    return "\n".join([f"| model | billion parameters | {titles} |", "|---|---|" + "---|---|" * len(WAYS), *map(table_row, names)])


def with_table(text):
    """The text of docs/memory.md with the table as it is now between its markers."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table()}\n{found[2]}", text)


def main():
    Parser(**help_of(__doc__)).parse_args()
    for path in sorted(CONFIGS.glob("*.toml")):
        text, line = path.read_text(encoding="utf-8"), header(path)
        head, rest = re.match(r"((?:#[^\n]*\n)+)(.*)", LINE.sub("", text), re.DOTALL).groups()
        text = head + line + "\n" + rest
        path.write_text(text, encoding="utf-8")
        print(f"{path.name:28} {line}")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE.name)
    return 0


if __name__ == "__main__":
    run_command(main)
