"""
The health monitor: looks at each step's metrics and at the machine's memory, and warns of what ruins runs, with advice.
A warning is printed once, to standard error; every step at which it holds is counted in the metrics, as health/<name>.
docs/health.md explains the rules. The report reads them from here.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import mlx.core as mx

from mlx_grpo import ConfigError, nearest
from mlx_grpo.hooks import TrainerCallback

STEPS = 10       # of `health`: so many steps in a row, or that are averaged
KEPT = 4         # a trend compares the last STEPS steps with the first of at most KEPT * STEPS that are remembered
LEAST_GAP = 0.02                 # nats; a sampler-trainer gap below is rounding, whatever its trend
LEAST_GROWTH_GB = 0.05           # less is not worth a warning
FORMAT = re.compile(r"rewards/([^/]*(?:format|xml)[^/]*)/mean")
MACHINE = "machine/"             # starts the names of metrics that another machine or another run gives otherwise


@dataclass(frozen=True)
class Rule:
    """check(seen, threshold): what is wrong, with its numbers, or None. threshold: the default. machine: looks at this
    machine's memory, so that a repeated run may count otherwise."""

    threshold: float
    title: str
    advice: str
    check: Callable
    machine: bool = False


class Seen:
    """The metrics of this step, `now`, and of the steps before, as far as the rules need them: `history`, name -> values.
    Values that are None or missing are passed over."""

    def __init__(self, now, history, steps):
        self.now, self.history, self.steps = now, history, steps

    def in_a_row(self, key):
        """The last `steps` values; [] while there are fewer."""
        values = self.history.get(key, [])
        return values[-self.steps:] if len(values) >= self.steps else []

    def then_and_now(self, key):
        """(first, last) `steps` values of those kept; None while there are fewer than twice as many."""
        values = self.history.get(key, [])
        return (values[:self.steps], values[-self.steps:]) if len(values) >= 2 * self.steps else None

    def means(self, key):
        """(mean then, mean now), or None as above."""
        parts = self.then_and_now(key)
        return parts and tuple(map(mean, parts))


def mean(values):
    return sum(values) / len(values)


# ---- the checks: (what was seen, threshold) -> what is wrong, or None

def truncated(seen, least):
    share = seen.now.get("completions/clipped_ratio")
    if share is not None and share >= least:
        return f"{share:.0%} of this step's completions"


def no_spread(seen, least):
    shares = seen.in_a_row("frac_reward_zero_std")
    if shares and min(shares) >= least:
        return f"{min(shares):.0%} of the groups or more, {seen.steps} rollout batches in a row"


def no_format(seen, most):
    names = [key for key in seen.now if FORMAT.fullmatch(key)]
    rows = [seen.in_a_row(name) for name in names]
    if rows and all(values and max(map(abs, values)) <= most for values in rows):
        return f"{', '.join(FORMAT.fullmatch(name)[1] for name in names)}: {seen.steps} steps in a row"


def low(key, unit=""):
    def check(seen, least):
        values = seen.in_a_row(key)
        if values and max(values) < least:
            return f"{values[-1]:.3g}{unit}; below {least:g} for {seen.steps} steps"
    return check


def high(key, unit=""):
    def check(seen, most):
        values = seen.in_a_row(key)
        if values and min(values) > most:
            return f"{values[-1]:.3g}{unit}; above {most:g} for {seen.steps} steps"
    return check


def running_away(seen, factor):
    lengths, rewards = seen.means("completions/mean_length"), seen.means("reward")
    if lengths and rewards and lengths[1] >= factor * lengths[0] and rewards[1] <= rewards[0]:
        return f"{lengths[0]:.0f} tokens, now {lengths[1]:.0f}; reward {rewards[0]:.3g}, now {rewards[1]:.3g}"


def gap_growing(seen, factor):
    gaps = seen.means("sampling/sampling_logp_difference/mean")
    if gaps and gaps[1] >= LEAST_GAP and gaps[1] >= factor * gaps[0]:
        return f"{gaps[0]:.3g} nats, now {gaps[1]:.3g}"


def reward_hacking(seen, drop):
    best = seen.now.get("best")          # at the best evaluation: (exact match, mean reward)
    if best and seen.now["exact_match"] <= best[0] - drop and seen.now["recent_reward"] > best[1]:
        return (f"exact match {best[0]:.2f}, now {seen.now['exact_match']:.2f}; reward {best[1]:.3g}, now "
                f"{seen.now['recent_reward']:.3g}")


def in_use(key):
    def check(seen, most):
        share = seen.now.get(key)
        if share is not None and share > most:
            return f"{share:.0%}"
    return check


def growing(seen, share):
    parts = seen.then_and_now("machine/active_gb")
    if parts and min(parts[1]) > max((1 + share) * max(parts[0]), max(parts[0]) + LEAST_GROWTH_GB):
        return f"{max(parts[0]):.2f} GB, now {min(parts[1]):.2f} and never less in {seen.steps} steps"


RULES = {
    "truncated": Rule(
        1.0, "completions are cut at the length limit",
        "raise max_new_tokens, ask for shorter answers, or check that the model can end (its end token, `stop`)", truncated),
    "no_spread": Rule(
        1.0, "the rewards in each group are all equal, so nothing is learnt",
        "if they are at their best, the task is learnt; else raise temperature or num_generations, take easier problems, "
        "add a reward with steps between 0 and 1, or set dynamic_sampling", no_spread),
    "no_format": Rule(
        0.0, "every format reward is 0",
        "say the format in system_prompt, show it by `sft` first, or remove those rewards", no_format),
    "entropy": Rule(
        0.02, "entropy has collapsed: every completion of a prompt is the same",
        "if exact match is where you want it, stop; else lower learning_rate, raise temperature or clip_eps_high, or set "
        "entropy_coef", low("entropy", " nats per token")),
    "kl": Rule(
        0.3, "the policy has drifted far from the reference",
        "lower learning_rate or raise kl_coeff", high("kl", " nats per token")),
    "ratio": Rule(
        0.3, "many tokens are clipped: the policy has drifted from the one that was sampled",
        "lower learning_rate, num_iterations, minibatches or update_every", high("clip_ratio/region_mean")),
    "length": Rule(
        2.0, "completions grow while the reward does not",
        'set overlong_cache, or loss_type = "dr_grpo", which doesn\'t favour long ones; look at some in the report',
        running_away),
    "reward_hacking": Rule(
        0.1, "the reward rises while exact match falls",
        "the rewards can be had without the right answer: read the best rated completions in the report, and go back to "
        "checkpoint-best or an earlier one", reward_hacking),
    "gap": Rule(
        2.0, "the sampler's log-probs and the trainer's come apart",
        "lower update_every, raise rollout_bits, or let the weights correct it (old_logprobs, sampler_correction)",
        gap_growing),
    "device_memory": Rule(
        0.9, "the device's memory is nearly full (peak, of its limit)",
        "lower batch_size, rollout_batch_size or max_new_tokens, or set gradient_checkpointing; `plan` counts",
        in_use("machine/device_share"), True),
    "system_memory": Rule(
        0.85, "the system's memory is nearly full",
        "close other programs, or lower batch_size and rollout_batch_size; the system may end the run",
        in_use("machine/system_share"), True),
    "swap": Rule(
        0.3, "the system is swapping, which makes steps many times slower",
        "close other programs, or lower batch_size and rollout_batch_size", in_use("machine/swap_share"), True),
    "memory_growth": Rule(
        0.1, "memory held between steps keeps growing",
        "a callback, reward or rollout_func may keep arrays of earlier steps: let it keep plain numbers; resuming the run "
        "frees it", growing, True),
}
THRESHOLDS = {"steps": STEPS} | {name: rule.threshold for name, rule in RULES.items()}
REMEMBERED = re.compile(r"reward|frac_reward_zero_std|entropy|kl|clip_ratio/region_mean|completions/mean_length|"
                        r"sampling/sampling_logp_difference/mean|machine/active_gb|" + FORMAT.pattern)


def metric_name(name):
    """The metric that counts a rule's steps; those of the machine are told apart, since they differ between machines."""
    return f"health/{MACHINE if RULES[name].machine else ''}{name}"


def explanation(metric):
    """Title and advice of the rule that a health/... metric counts; None where it is no rule's."""
    return next((f"{rule.title}: {rule.advice}" for name, rule in RULES.items() if metric_name(name) == metric), None)


def check_thresholds(given):
    """Raises ConfigError for a key or value of the option `health` that is none."""
    for name, value in given.items():
        if name not in THRESHOLDS:
            raise ConfigError(f"health has no threshold {name!r}{nearest(name, THRESHOLDS)}; there are "
                              f"{', '.join(THRESHOLDS)}")
        if name == "steps":
            if type(value) is not int or value < 1:
                raise ConfigError(f"health: steps must be a whole number of at least 1, got {value!r}")
        elif value is not False and (type(value) not in (int, float) or not 0 <= value < float("inf")):
            raise ConfigError(f"health: {name} must be a number of at least 0, or false to turn the warning off, got "
                              f"{value!r}")


# ---- the machine -----------------------------------------------------------------------------------------------------

def linux_memory(meminfo):
    """(share of memory in use, share of swap in use) from the text of /proc/meminfo; 0 where there is no swap."""
    kb = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", meminfo, re.M)}
    swap = 1 - kb["SwapFree"] / kb["SwapTotal"] if kb["SwapTotal"] else 0.0
    return 1 - kb["MemAvailable"] / kb["MemTotal"], swap


def mac_memory(vm_stat, total, swapusage):
    """The same from `vm_stat`, `sysctl -n hw.memsize` and `sysctl -n vm.swapusage`. macOS makes swap files as it needs
    them, so swap counts as a share of the memory. Free, inactive, speculative and purgeable pages are not in use."""
    page = int(re.search(r"page size of (\d+)", vm_stat)[1])
    pages = dict(re.findall(r"^Pages (\w+):\s+(\d+)\.", vm_stat, re.M))
    available = page * sum(int(pages[name]) for name in ("free", "inactive", "speculative", "purgeable"))
    used, unit = re.search(r"used = ([\d.]+)([KMG])", swapusage).groups()
    return 1 - available / int(total), float(used) * 1024 ** (" KMG".index(unit)) / int(total)


def container_memory(folder=Path("/sys/fs/cgroup")):
    """Share of a container's memory limit (cgroup v2) in use, file cache left out; 0 where there is no limit."""
    limit = (folder / "memory.max").read_text().strip() if (folder / "memory.max").exists() else "max"
    if limit == "max":
        return 0.0
    cache = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)[1]
    return (int((folder / "memory.current").read_text()) - int(cache)) / int(limit)


def system_memory():
    """(share of memory in use, share of swap in use) of this machine or container, or None where it can't be asked."""
    if sys.platform == "darwin":
        ask = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return mac_memory(ask("/usr/bin/vm_stat"), ask("/usr/sbin/sysctl", "-n", "hw.memsize"),
                          ask("/usr/sbin/sysctl", "-n", "vm.swapusage"))
    if not sys.platform.startswith("linux"):
        return None
    memory, swap = linux_memory(Path("/proc/meminfo").read_text())
    return max(memory, container_memory()), swap


def device_limit():
    """Bytes that the device should hold at most: what Metal recommends, a CUDA card's memory; None on the CPU, whose
    memory is the system's."""
    if mx.default_device() == mx.cpu:
        return None
    info = mx.device_info()
    names = ("max_recommended_working_set_size", "total_memory", "memory_size")
    return next((info[name] for name in names if info.get(name)), None)


def machine_readings(peak_gb):
    """Metrics of the machine after a step: GB that MLX's arrays hold, and shares of the device's limit that were reached,
    of the system's memory and of its swap in use."""
    readings = {"machine/active_gb": mx.get_active_memory() / 1e9}
    if limit := device_limit():
        readings["machine/device_share"] = peak_gb * 1e9 / limit
    if shares := system_memory():
        readings |= {"machine/system_share": shares[0], "machine/swap_share": shares[1]}
    return readings


# ---- the monitor -----------------------------------------------------------------------------------------------------

class HealthMonitor(TrainerCallback):
    """Checks every rule at the end of each step. thresholds: the option `health`. state: counts of each warning, what is
    remembered of the metrics, and exact match with mean reward at the best evaluation."""

    def __init__(self, thresholds):
        check_thresholds(thresholds)
        self.thresholds = THRESHOLDS | thresholds
        self.state, self.talks = {"counts": {}, "history": {}, "best": None}, True

    def on_train_begin(self, trainer):
        self.talks = trainer.world.first          # of several processes one prints

    def on_step_end(self, trainer, metrics):
        metrics |= machine_readings(metrics["peak_gb"])
        self.remember(metrics)
        seen = Seen(metrics | self.evaluation(metrics), self.state["history"], self.thresholds["steps"])
        for name, rule in RULES.items():
            threshold = self.thresholds[name]
            found = None if threshold is False else rule.check(seen, threshold)
            if found:
                self.warn(name, f"{rule.title} ({found}): {rule.advice}", metrics)

    def warn(self, name, text, metrics):
        """Count the warning in `metrics`; the first time, print it."""
        count = metrics[metric_name(name)] = self.state["counts"][name] = self.state["counts"].get(name, 0) + 1
        if count == 1 and self.talks:
            print(f"step {metrics['step']}: warning: {text} [health/{name}]", file=sys.stderr, flush=True)

    def remember(self, metrics):
        """Add the step to the history. A rollout batch that serves several steps has one spread of rewards."""
        for key, value in metrics.items():
            stale = key == "frac_reward_zero_std" and metrics.get("rollout_s") == 0
            if REMEMBERED.fullmatch(key) and value is not None and not stale:
                values = self.state["history"].setdefault(key, [])
                values.append(value)
                del values[:-KEPT * self.thresholds["steps"]]

    def evaluation(self, metrics):
        """Where this step was evaluated: its exact match, the mean reward of the last steps, and both at the best
        evaluation so far, which is brought up to date."""
        exact = metrics.get("eval/exact_match", metrics.get("eval_train/exact_match"))
        rewards = self.state["history"].get("reward")
        if exact is None or not rewards:
            return {}
        reward, best = mean(rewards[-self.thresholds["steps"]:]), self.state["best"]
        if best is None or exact >= best[0]:
            self.state["best"] = [exact, reward]
        return {"exact_match": exact, "recent_reward": reward, "best": best}
