"""
Stop when a metric no longer rises: EarlyStop ends the run, with a checkpoint, after `patience` values in a row that are
not better than the best one by `min_gain`.

    python examples/early_stop.py                       # the shipped model, offline: ends before its 30 steps are done
    python mlx_grpo.py --config my.toml --set 'callbacks=["examples/early_stop.py:EarlyStop"]'

The options name a class, which is made without arguments, or an object: other settings are a line in a file of your own,
patient = EarlyStop("eval/exact_match", patience=10), and callbacks = ["my_hooks.py:patient"].
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                       # runs from a plain clone, from any directory

from mlx_grpo import TrainerCallback, main, read_metrics, run_command    # noqa: E402


class EarlyStop(TrainerCallback):
    def __init__(self, metric="eval/exact_match", patience=2, min_gain=0.01):
        self.metric, self.patience, self.min_gain = metric, patience, min_gain

    def on_train_begin(self, trainer):
        """A resumed run counts on from what it has logged."""
        self.best, self.waited = -math.inf, 0
        if (trainer.run_dir / "metrics.jsonl").exists():
            for metrics in read_metrics(trainer.run_dir):
                if metrics["step"]:                 # the evaluation before the first step doesn't count
                    self.look(metrics)

    def look(self, metrics):
        value = metrics.get(self.metric)
        if value is not None:
            better = value > self.best + self.min_gain
            self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)

    def on_step_end(self, trainer, metrics):
        self.look(metrics)
        if self.waited >= self.patience:
            print(f"{self.metric} has not risen above {self.best:.3f} in {self.waited} evaluations: stopping")
        return self.waited >= self.patience


if __name__ == "__main__":
    run_command(lambda: main(["--config", str(ROOT / "configs/demo.toml"), "--set", "run_name=early-stop-{n}",
                              "--set", "eval_steps=5", "--set", f'callbacks=["{__file__}:EarlyStop"]', *sys.argv[1:]]))
