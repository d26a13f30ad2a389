"""
Reward weights that change in the course of a run: first the format, then what stands in it.

    python examples/reward_schedule.py                  # the shipped model, offline
    python mlx_grpo.py --config my.toml --set 'callbacks=["examples/reward_schedule.py:FormatFirst"]'

The weights follow from the number of steps done and nothing else, so a resumed run has those of an unbroken one.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                       # runs from a plain clone, from any directory

from mlx_grpo import TrainerCallback, main, run_command    # noqa: E402

import numpy as np                                  # noqa: E402


class FormatFirst(TrainerCallback):
    """From `first` to `last` along a line over the first half of the run; a reward that isn't named keeps its weight."""
    first = {"strict_format": 2.0, "correctness": 0.5}
    last = {"strict_format": 0.2, "correctness": 2.0}

    def on_train_begin(self, trainer):
        self.configured = dict(zip(trainer.scorer.functions, trainer.scorer.weights))
        self.set_weights(trainer)

    def set_weights(self, trainer):
        progress = min(1.0, 2 * trainer.step_count / trainer.total_steps)
        weights = {name: self.first[name] + progress * (self.last[name] - self.first[name]) for name in self.first}
        weights = self.configured | {name: w for name, w in weights.items() if name in self.configured}
        trainer.scorer.weights = np.array(list(weights.values()))       # in the order of scorer.functions

    def on_step_end(self, trainer, metrics):
        metrics |= {f"reward_weight/{name}": float(w) for name, w in zip(trainer.scorer.functions, trainer.scorer.weights)}
        self.set_weights(trainer)                   # of the next step


if __name__ == "__main__":
    run_command(lambda: main(["--config", str(ROOT / "configs/demo.toml"), "--set", "run_name=reward-schedule-{n}",
                              "--set", f'callbacks=["{__file__}:FormatFirst"]', *sys.argv[1:]]))
