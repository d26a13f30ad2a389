"""
The live view of a run: below its lines, on a terminal, a few that are drawn anew as it goes on. Whatever is printed while
it is shown, warnings too, goes above it and stays.
"""

import sys
import time
from collections import deque

from mlx_grpo.hooks import TrainerCallback

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
WIDTH, RECENT = 40, 5        # characters of a curve; steps over which tokens a second are averaged


def sparkline(values, width=WIDTH, bars=BARS):
    """A curve of `width` characters at most, lowest to highest value; each is the mean of its share of the values.
    [] -> "", [1, 2, 3] -> "▁▅█", equal values -> "▁▁▁"."""
    count = min(width, len(values))
    parts = [values[i * len(values) // count:(i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0), max(means, default=0)
    return "".join(bars[int((m - low) / (high - low) * (len(bars) - 1) + 0.5) if high > low else 0] for m in means)


def duration(seconds):
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def one_line(text):
    """Text without line breaks and without anything that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


class LiveView(TrainerCallback):
    """Progress, time left, curves of reward and exact match, tokens a second, memory, warnings and the last sample. Shows
    nothing where standard output is no terminal, or one that can't move its cursor (TERM=dumb)."""

    def __init__(self):
        self.live, self.rewards, self.exact, self.warnings, self.sample = None, [], [], {}, None
        self.metrics, self.speeds, self.tokens = {}, deque(maxlen=RECENT), 0
        self.step = self.total = self.first = 0
        self.began = self.updated = time.monotonic()

    def on_train_begin(self, trainer):
        from rich.console import Console
        from rich.live import Live

        from mlx_grpo.run_files import read_metrics

        console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
        if not sys.stdout.isatty() or console.is_dumb_terminal:
            return
        self.step = self.first = trainer.step_count
        self.total, self.tokens, self.began = trainer.total_steps, trainer.num_tokens, time.monotonic()
        if trainer.log.run_dir and trainer.step_count:       # a resumed run's curves begin where the run began
            for row in read_metrics(trainer.run_dir):
                self.take(row)
        self.live = Live(self, console=console, refresh_per_second=2, transient=True,
                         redirect_stderr=sys.stderr.isatty())        # a file that takes standard error keeps it
        self.live.start()

    def on_rollouts(self, trainer, rollouts, rewards, advantages):
        first = rollouts[0]
        prompt = first.problem.prompt if isinstance(first.problem.prompt, str) else first.problem.prompt[-1]["content"]
        self.sample = rewards.reshape(-1)[0], prompt, first.texts[0]

    def on_evaluate(self, trainer, metrics):
        if trainer.step_count == 0:          # later ones come with their step
            self.take(metrics)

    def on_step_end(self, trainer, metrics):
        self.speeds.append((trainer.num_tokens - self.tokens, metrics["step_time"]))
        self.metrics, self.step, self.tokens, self.updated = metrics, metrics["step"], trainer.num_tokens, time.monotonic()
        self.take(metrics)

    def on_close(self, trainer):
        """Leave the terminal as it was, with what was printed half a line of."""
        if self.live:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            self.live.stop()
            self.live = None

    def take(self, metrics):
        """What the curves and the list of warnings need of a step's metrics."""
        if metrics.get("reward") is not None:
            self.rewards.append(metrics["reward"])
        if "eval/exact_match" in metrics:
            self.exact.append(metrics["eval/exact_match"])
        self.warnings |= {key.removeprefix("health/"): None for key in metrics if key.startswith("health/")}

    # -- drawn by a thread of rich's, from what the callbacks noted

    def time_left(self):
        """Seconds, from the pace of this process so far; None before its first step and where there is no last one."""
        from mlx_grpo.run_files import ENDLESS

        if self.step == self.first or self.total >= ENDLESS:
            return None
        pace = (self.updated - self.began) / (self.step - self.first)
        return pace * (self.total - self.step) - (time.monotonic() - self.updated)

    def lines(self, bars=BARS):
        """[(label, text)] of the view, without the bar."""
        m, found = self.metrics, []
        for label, values in (("reward", self.rewards), ("exact match", self.exact)):
            if values:
                found.append((label, f"{values[-1]:<8.3f} {sparkline(values, bars=bars)}"))
        if seconds := sum(s for _, s in self.speeds):
            found.append(("tokens/s", f"{sum(tokens for tokens, _ in self.speeds) / seconds:,.0f}"))
        if m:
            shares = [f"{name} {m[key]:.0%}" for name in ("device", "system", "swap") if (key := f"machine/{name}_share") in m]
            found.append(("memory", ", ".join([f"peak {m['peak_gb']:.1f} GB", *shares])))
        if self.warnings:
            found.append(("warnings", ", ".join(self.warnings)))
        if self.sample:
            reward, prompt, completion = self.sample
            found.append(("last sample", f"{reward:.2f}  {one_line(prompt)[-60:]} -> {one_line(completion)}"))
        return found

    def __rich_console__(self, console, options):
        from rich.table import Table
        from rich.text import Text

        from mlx_grpo.run_files import ENDLESS

        left, plain = self.time_left(), options.ascii_only
        head = f"step {self.step}" + (f"/{self.total}" if self.total < ENDLESS else "")
        if self.total < ENDLESS:
            done = int(WIDTH * self.step / max(self.total, 1))
            head += "  " + ("#" if plain else "━") * done + ("." if plain else "─") * (WIDTH - done)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_row("training", head + (f"  {duration(left)} left" if left is not None else ""))
        for label, text in self.lines(ASCII_BARS if plain else BARS):
            table.add_row(label, Text(text, style="yellow" if label == "warnings" else ""))
        yield table
