"""
Hooks into a run, for people who want their own code around ours (docs/hooks.md). Part of mlx_grpo, which gives these
names out again.
"""

from contextlib import ExitStack
from functools import wraps

from mlx_grpo import ConfigError, UserError, load_symbol


class TrainerCallback:
    """Override what you need. `trainer` is the MLXGRPOTrainer; `metrics` is the dictionary that becomes a line of
    metrics.jsonl and may be added to (numbers, texts, lists). What is raised here stops the run with its traceback.

    state: what a resumed run needs to go on as an unbroken one would, anything that JSON holds; None = nothing. It is kept
    in every checkpoint and given back before on_train_begin of the resumed run."""

    state = None

    def on_train_begin(self, trainer):
        """Before the first step, also of a run that is resumed: trainer.step_count steps are done."""

    def on_rollouts(self, trainer, rollouts, rewards, advantages):
        """After a step that sampled. rollouts: [Rollout], P of them; rewards (B,) float64, weighted, NaN = not scorable;
        advantages (P, G). Steps that reuse a rollout batch (num_iterations, minibatches) don't call it."""

    def on_gradients(self, trainer, gradients):
        """The step's gradients (a tree of float32 arrays) before clipping; return them, changed or not."""
        return gradients

    def on_step_end(self, trainer, metrics):
        """After the update and the evaluation that was due, before both are logged. Return True to save and stop."""

    def on_evaluate(self, trainer, metrics):
        """After an evaluation; `metrics` holds its values alone. The one before the first step has step_count 0."""

    def on_save(self, trainer, path):
        """After a checkpoint was written to the directory `path`, whole."""

    def on_train_end(self, trainer):
        """After the last step, however the run ended, unless by an exception."""

    def on_close(self, trainer):
        """At the very end, after an exception too: files and connections are closed here."""


def find_callbacks(specs):
    """[TrainerCallback] of "file.py:name" specs, where the name is a class to be made without arguments or an object, or
    of objects, which are kept as they are. Raises ConfigError."""
    found = []
    for spec in specs:
        callback = load_symbol(spec, "callback") if isinstance(spec, str) else spec
        if isinstance(callback, type) and issubclass(callback, TrainerCallback):
            try:
                callback = callback()
            except TypeError as error:
                raise ConfigError(f"callback {spec!r}: {error}; make an object of it in the file and name that") from error
        if not isinstance(callback, TrainerCallback):
            kind = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise ConfigError(f"callback {spec!r}: {kind} is no TrainerCallback (from mlx_grpo import TrainerCallback)")
        found.append(callback)
    return found


def configured_callbacks(config):
    """The callbacks that a configuration names, and a look whether its trackers are there too, before anything is loaded.
    Raises ConfigError."""
    from mlx_grpo.trackers import find_trackers

    find_trackers(config.report_to)
    return find_callbacks(config.callbacks)


def all_callbacks(config, given=None):
    """A run's callbacks in their order: the health monitor, whose warnings the others see, then those `given`, or, where
    that is None, the configuration's, then, in the process that writes, what shows and sends on all that these have found.
    Raises ConfigError."""
    from mlx_grpo import find_world
    from mlx_grpo.health import HealthMonitor
    from mlx_grpo.live import LiveView
    from mlx_grpo.trackers import find_trackers

    own = find_callbacks(config.callbacks if given is None else given)
    shown = [*find_trackers(config.report_to), *[LiveView()] * config.live] if find_world().first else []
    return [HealthMonitor(config.health), *own, *shown]


def closes_callbacks(train):
    """A trainer's `train`, after which, however it ends, every callback's on_close is called, the last callback's first."""
    @wraps(train)
    def closing(trainer):
        with ExitStack() as stack:                     # closes the others too where one raises
            for callback in trainer.callbacks:
                stack.callback(callback.on_close, trainer)
            return train(trainer)

    return closing


def states(callbacks):
    """[[class name, state]] of the callbacks that have one."""
    return [[type(callback).__name__, callback.state] for callback in callbacks if callback.state is not None]


def restore(callbacks, saved):
    """Give the callbacks their states back: the first of a class gets the first one saved under its name, and so on. A
    callback that is new in this run keeps the state that it has."""
    for callback in callbacks:
        entry = next((entry for entry in saved if entry[0] == type(callback).__name__), None)
        if entry:
            callback.state = entry[1]
            saved = [other for other in saved if other is not entry]


def check_rollouts(rollouts, problems, num_generations):
    """The rollouts of a user's rollout_func, or a UserError that says what is wrong with them."""
    if len(rollouts) != len(problems):
        raise UserError(f"rollout_func returned {len(rollouts)} rollouts for {len(problems)} problems")
    for r in rollouts:
        lengths = [list(map(len, rows)) for rows in (r.completion_ids, r.logprobs, r.env_mask)]
        if len(r.completion_ids) != num_generations or lengths[0] != lengths[1] or lengths[0] != lengths[2]:
            raise UserError(f"rollout_func: {r.problem.prompt!r} needs {num_generations} completions whose ids, logprobs "
                            f"and env_mask have equal lengths; got lengths {lengths}")
    return rollouts
