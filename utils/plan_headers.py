"""
Write the planned peak into the header of each shipped configuration.

    python utils/plan_headers.py      # after a configuration was changed

The peak is plan's estimate for a Mac (bfloat16, prompts as long as max_prompt_length allows), as `plan --memory` gives it.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from mlx_grpo import load_config, run_command
from mlx_grpo.command_line import Parser
from mlx_grpo.help_text import help_of
from mlx_grpo.plan_account import Account, work_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LINE = re.compile(r"^# Planned peak: .*$", re.MULTILINE)
MACS = 8, 16, 24, 32, 36, 48, 64, 96, 128


def peak(path):
    """Bytes that a shipped configuration takes on a Mac."""
    config, _ = load_config(path)
    config = replace(config, dtype="bfloat16") if config.dtype == "auto" else config
    return Account(config, work_of(config, config.max_prompt_length)).peak


def header(path):
    """The line of a configuration that states its peak, and the smallest Mac that allows it."""
    from mlx_grpo.plan import Machine

    needed = peak(path)
    mac = next(f"a Mac with {gb} GB" for gb in MACS if Machine(gb).limit >= needed)
    return f"# Planned peak: {needed / 1e9:.1f} GB in bfloat16, for {mac} (`plan --memory`)."


def main():
    Parser(**help_of(__doc__)).parse_args()
    for path in sorted(CONFIGS.glob("*.toml")):
        text, line = path.read_text(encoding="utf-8"), header(path)
        if LINE.search(text):
            text = LINE.sub(lambda _: line, text)
        else:
            head, rest = re.match(r"((?:#.*\n)+)(.*)", text, re.DOTALL).groups()
            text = head + line + "\n" + rest
        path.write_text(text, encoding="utf-8")
        print(f"{path.name:28} {line}")
    return 0


if __name__ == "__main__":
    run_command(main)
