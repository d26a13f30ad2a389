"""
A metric of your own: how many different answers the completions of a group give, as a share of the group. It falls as the
policy becomes sure of itself; near 1/G nothing new is tried.

    python examples/custom_metric.py                    # trains the shipped model for 30 steps, offline
    python mlx_grpo.py --config my.toml --set 'callbacks=["examples/custom_metric.py:DistinctAnswers"]'

What is put into the step's metrics is in metrics.jsonl, and a curve in the report.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                       # runs from a plain clone, from any directory

from mlx_grpo import TrainerCallback, extract_answer, main, run_command    # noqa: E402


class DistinctAnswers(TrainerCallback):
    share = None                                    # of the last rollout batch

    def on_rollouts(self, trainer, rollouts, rewards, advantages):
        shares = [len({extract_answer(text) for text in r.texts}) / len(r.texts) for r in rollouts]
        self.share = sum(shares) / len(shares)

    def on_step_end(self, trainer, metrics):
        if self.share is not None:
            metrics["answers/distinct"] = self.share


if __name__ == "__main__":
    run_command(lambda: main(["--config", str(ROOT / "configs/demo.toml"), "--set", "run_name=custom-metric-{n}",
                              "--set", f'callbacks=["{__file__}:DistinctAnswers"]', *sys.argv[1:]]))
