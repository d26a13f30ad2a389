"""
report_to: what a run logs, in Weights & Biases, Trackio or TensorBoard as well (docs/trackers.md).

A tracker gets the lines of metrics.jsonl under their names, and the completions of one prompt as a table. A step is sent
once: the run's trackers.json notes how far each tracker is, so that a resumed run goes on in the same run of the tracker.
"""

import importlib.util
import json
import os
import secrets
import time
from dataclasses import asdict

from mlx_grpo import ConfigError, TrainerCallback, UserError, nearest, read_metrics

PROJECT = "mlx-grpo"         # for $WANDB_PROJECT and $TRACKIO_PROJECT
COLUMNS = ["step", "prompt", "answer", "completion", "reward", "advantage"]


class Tracker(TrainerCallback):
    """Sends the steps of a run; a subclass says how to `open`, `send` and `close`. `name` is also the package's."""

    name, run = "", None
    rewinds = False         # whether steps after the one that is resumed from are replaced, rather than left out

    def on_train_begin(self, trainer):
        trainer.run_dir.mkdir(parents=True, exist_ok=True)
        self.file, self.table, self.ended = trainer.run_dir / "trackers.json", None, False
        noted = self.notes().get(self.name) if trainer.step_count else None          # a run from the start is a new one
        self.id, self.sent = (noted["id"], noted["step"]) if noted else (secrets.token_hex(4), -1)
        if self.rewinds:
            self.sent = min(self.sent, trainer.step_count)
        self.open(trainer, resumed=noted is not None)
        for row in read_metrics(trainer.run_dir) if trainer.step_count and trainer.log.run_dir else []:
            self.step(row)                                                           # what an end before its time left out

    def on_rollouts(self, trainer, rollouts, rewards, advantages):
        period, step = trainer.args.logging_steps, trainer.step_count
        if period and (step % period == 0 or step == trainer.total_steps):
            self.table = table(step, rollouts[0], rewards, advantages[0])

    def on_evaluate(self, trainer, metrics):
        if trainer.step_count == 0:                                                  # later ones come with their step
            self.step({"step": 0, **metrics})

    def on_step_end(self, trainer, metrics):
        self.step(metrics)
        self.table = None

    def on_train_end(self, trainer):
        self.ended = True

    def on_close(self, trainer):
        if self.run:
            self.close()
            self.run = None

    # -- what a step is made of

    def step(self, metrics):
        """Send a step, unless it was sent, and note it."""
        if metrics["step"] > self.sent:
            self.send(metrics["step"], {k: v for k, v in metrics.items() if k != "step" and v is not None}, self.table)
            self.sent = metrics["step"]
            text = json.dumps(self.notes() | {self.name: {"id": self.id, "step": self.sent}})
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self.file)

    def notes(self):
        """{tracker: {"id", "step"}} of the run so far."""
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}


class Wandb(Tracker):
    name = "wandb"

    def open(self, trainer, resumed):
        import wandb

        try:
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=trainer.run_dir.name, id=self.id,
                                  dir=str(trainer.run_dir), config=asdict(trainer.args), allow_val_change=True,
                                  resume="allow" if resumed else None)
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"wandb: {reason}; or set WANDB_MODE=offline now, and `wandb sync` later") from error

    def send(self, step, metrics, completions):
        import wandb

        if completions:
            metrics["completions"] = wandb.Table(columns=COLUMNS, data=completions)
        self.run.log(metrics, step=step, commit=True)

    def close(self):
        self.run.finish(exit_code=0 if self.ended else 1)


class Trackio(Tracker):
    name = "trackio"

    def open(self, trainer, resumed):
        import trackio

        try:         # a run is found again by its name alone, which has to be its own
            self.run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), config=asdict(trainer.args), embed=False,
                                    name=f"{trainer.run_dir.name}-{self.id}", resume="allow" if resumed else "never")
        except (ValueError, OSError) as error:
            raise UserError(f"trackio: {error}") from error

    def send(self, step, metrics, completions):
        import trackio

        if completions:
            metrics["completions"] = trackio.Table(columns=COLUMNS, data=completions)
        self.run.log(metrics, step=step)

    def close(self):
        self.run.finish()


class TensorBoard(Tracker):
    name, rewinds = "tensorboard", True

    def open(self, trainer, resumed):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.run = EventFileWriter(str(trainer.run_dir / "tensorboard"))
        first = trainer.step_count + 1 if trainer.step_count else 0
        self.event(first, session_log=SessionLog(status=SessionLog.START))          # takes back what was logged from there on
        if not resumed:
            self.event(trainer.step_count, summary=text_summary("config", markdown(["option", "value"], asdict(trainer.args).items())))

    def event(self, step, **content):
        from tensorboard.compat.proto.event_pb2 import Event

        self.run.add_event(Event(wall_time=time.time(), step=step, **content))

    def send(self, step, metrics, completions):
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in metrics.items() if isinstance(v, (int, float))])
        for tag, text in [(k, v) for k, v in metrics.items() if isinstance(v, str)]:
            summary.MergeFrom(text_summary(tag, text))
        if completions:
            summary.MergeFrom(text_summary("completions", markdown(COLUMNS, completions)))
        self.event(step, summary=summary)
        self.run.flush()                                                            # a kill leaves whole steps

    def close(self):
        self.run.close()


TRACKERS = {kind.name: kind for kind in (Wandb, Trackio, TensorBoard)}


def find_trackers(report_to):
    """[Tracker] of "wandb,tensorboard", not opened yet. Raises ConfigError for an unknown name and a missing package."""
    names = [name.strip() for name in report_to.split(",")] if report_to.strip() else []
    for name in names:
        if name not in TRACKERS or names.count(name) > 1:
            raise ConfigError(f"report_to = {report_to!r}: expected some of {', '.join(TRACKERS)}, each once, with commas"
                              + nearest(name, TRACKERS))
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:      # a folder of that name, such as wandb leaves, is no package
            raise ConfigError(f"report_to = {report_to!r} needs the package {name}: pip install {name}")
    return [TRACKERS[name]() for name in names]


def table(step, rollout, rewards, advantages):
    """Rows of COLUMNS, one for each completion of a rollout; its rewards are the first of rewards (B,); advantages: (G,)."""
    prompt = rollout.problem.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    number = lambda x: float(x) if x == x else None                                 # NaN: not scorable
    return [[step, prompt, rollout.problem.answer, text, number(reward), float(advantage)]
            for text, reward, advantage in zip(rollout.texts, rewards.reshape(-1), advantages)]


def markdown(columns, rows):
    """A Markdown table in which any text shows as it is."""
    escape = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "&#124;", "\n": "<br>", **{c: "\\" + c for c in "\\`*_[]#"}})
    line = lambda cells: "| " + " | ".join(str(cell).translate(escape) for cell in cells) + " |"
    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])


def text_summary(tag, text):
    from tensorboard.plugins.text.summary_v2 import text_pb

    return text_pb(tag, text)
