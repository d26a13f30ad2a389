"""`mlx_grpo.py plan`: what a run will do and hold, before it is started."""

import contextlib
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from mlx_grpo import (
    UserError, add_config_arguments, backend, compute_dtype, count_steps, find_rewards, fitting_problems, load_config,
    load_problems, load_tokenizer, render_prompt, shipped_path)
from mlx_grpo.files import check_output_file, human_bytes
from mlx_grpo.memory_limit import memory_limit_bytes, memory_limits
from mlx_grpo.plan_account import Account, on_a_mac, work_of
from mlx_grpo.plan_fit import fitted


def add_arguments(parser):
    add_config_arguments(parser)
    parser.add_argument("--memory", type=float, metavar="GB", help="plan for a Mac with so much memory, not for this machine")
    parser.add_argument("--no-measure", action="store_true", help="estimate only: no trial run, which takes about one step")
    parser.add_argument("--fit", metavar="PATH", help="write a TOML with the settings changed until the run fits")


def run(args):
    """Every option with its value and source, the problems and steps, and what the run will hold in memory.

    Phase by phase: the model's weights, moments and copies, and what sampling, scoring and training add to them. Where the
    model is on this machine, a trial run measures the phases at a few rows and the time of a step; else, and with --memory,
    they are estimated from the model's shapes, without a download. Says whether the run fits, and which settings make it.

    examples:
      mlx_grpo.py plan --config configs/prod.toml
      mlx_grpo.py plan --config configs/prod.toml --memory 24 --fit prod-24gb.toml
    """
    config, sources = load_config(args.config, args.set)
    if args.memory is not None and not 0 < args.memory < 1e6:                # NaN neither
        raise UserError(f"--memory must be a number of GB above 0 and below a million, got {args.memory:g}")
    if args.fit:
        check_output_file("--fit", args.fit)
    find_rewards(config.rewards, config.reward_options)
    for name, value in asdict(config).items():
        shown = value if not isinstance(value, str) or len(value) < 60 else value[:57] + "..."
        print(f"{name:28} {shown!r:44} {sources[name]}")
    machine = Machine(args.memory)
    config = on_a_mac(config) if args.memory else config
    work = print_work(config)
    account = Account(config, work)
    measure = not args.no_measure and not args.memory and is_here(config) and may_try(account, machine)
    if measure:
        from mlx_grpo.plan_measure import measure as measured

        found, work = measured(config, work)
        account.correct({phase: row["bytes"] for phase, row in found.items()})
    print_account(account, measure)
    if measure:
        print_time(found, config, work)
    print_verdict(account, config, machine, args.fit, args.config, sources)
    return 0


# ---- the machine -----------------------------------------------------------------------------------------------------

class Machine:
    """What memory there is: physical, and `limit`, what a run may take of it. memory_gb: of a Mac that is not here."""

    def __init__(self, memory_gb=None):
        if memory_gb:
            self.metal, self.physical = True, memory_gb * 1e9
            self.limit = self.physical * (2 / 3 if memory_gb <= 36 else 3 / 4)      # Metal's recommended working set
        else:
            self.metal = mx.metal.is_available()
            self.physical, self.limit = memory_limits()["physical memory"], memory_limit_bytes()

    def wired_line(self, needed):
        """The command that lets Metal wire what a run needs, where that would help: macOS keeps an eighth for itself."""
        size = 1.05 * needed
        return backend.sysctl_line(size) if self.metal and self.limit < needed and size <= self.physical * 7 / 8 else None


def is_here(config):
    """Whether the model's weights are on this machine."""
    path = local_directory(config.model_name)
    return path is not None and any(path.glob("*.safetensors"))


def local_directory(name):
    """A model's directory here, that of the hub's cache included; None without one."""
    path = Path(shipped_path(name)).expanduser()
    if path.is_dir():
        return path
    if name.count("/") != 1 or name.startswith((".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def may_try(account, machine):
    """Whether a trial run is sure to fit; it takes about half of the rows, or whole passes where they are apart from their
    prompt."""
    if account.lying + 2.5 * account.more["gradients"] >= 0.8 * machine.limit:
        print("\nno trial run: the weights and moments alone fill this machine")
        return False
    if account.work["way"] == "before" and account.peaks["passes"] > machine.limit:
        print("\nno trial run: a training pass is estimated not to fit")
        return False
    return True


# ---- what is printed -------------------------------------------------------------------------------------------------

def print_work(config):
    """Problems, steps and tokens; returns work_of the run. Without the data or the tokenizer here, prompts are as long as
    max_prompt_length allows."""
    path, longest = local_directory(config.model_name), config.max_prompt_length
    offline = config.dataset.count("/") == 1 and not Path(shipped_path(config.dataset)).exists() and path is None
    problems, held_out = ([], []) if offline else load_problems(config)
    if path is not None and problems:
        tokenizer = load_tokenizer(str(path), loader=config.model_loader, trust_remote_code=config.trust_remote_code)
        problems = fitting_problems(problems, tokenizer, config)
        with contextlib.redirect_stderr(io.StringIO()):
            held_out = fitting_problems(held_out, tokenizer, config) if held_out else []
        longest = max(len(render_prompt(tokenizer, p, config)) for p in problems)
    count = len(problems) or config.max_train_samples
    if count or config.max_steps:
        steps = count_steps(config, count)
        print(f"\n{f'{len(problems)} problems, {len(held_out)} held out' if problems else 'data not read'}; {steps} steps of "
              f"{config.prompts_per_step} prompts x {config.num_generations} = "
              f"{steps * config.prompts_per_step * config.num_generations} completions of at most {config.max_new_tokens} tokens")
    print(f"prompts of at most {longest} tokens; a step samples at most "
          f"{config.prompts_per_step * config.num_generations * config.max_new_tokens:,} tokens")
    return work_of(config, longest, min(config.eval_samples, len(held_out)) if problems else None)


def print_account(account, measured):
    gb = lambda name, n, note="": print(f"{name:28} {n / 1e9:8.2f} GB{note}")
    config, more = account.config, account.more
    print()
    for name, n in account.state.items():
        n and gb(name, n)
    gb("gradients", more["gradients"] * account.gradient_copies, ", float32" + ", of a pass and their sum" * (account.gradient_copies > 1))
    for phase, parts in account.parts.items():
        if parts:
            print(f"{phase + ' peak':28} {account.peaks[phase] / 1e9:8.2f} GB: all of the above" + (
                "" if phase in ("passes", "update") else " but gradients") + "".join(
                f", {part} {n / 1e9:.2f}" for part, n in parts.items()) + (" (estimates)" if parts and measured else ""))
    gb("together", account.peak, f" at the peak ({'measured in a trial run' if measured else 'estimated'}, "
       f"{str(compute_dtype(config)).split('.')[-1]}); {more['trained'] / 1e6:.1f}M of {more['total'] / 1e6:.1f}M parameters are trained")
    gb("a checkpoint", more["checkpoint"], " on disk")


def print_time(found, config, work):
    """Seconds of a step of full length, from the trial."""
    training = found["passes"]["seconds"] * work["passes"]
    rollouts = found["rollout"]["seconds"] * config.max_new_tokens * work["prompts"] / work["rollout_prompts"] / config.minibatches
    print(f"{'time of a step':28} {training + rollouts:8.1f} s at full length on this machine: rollouts {rollouts:.1f}, "
          f"training {training:.1f}")


def print_verdict(account, config, machine, path, given, sources):
    """Whether it fits, what to change, and with --fit a file with the changes."""
    limit = f"{human_bytes(machine.limit)} of {human_bytes(machine.physical)}"
    changes, after = fitted(account, machine.limit) if account.peak > machine.limit else ({}, account.peak)
    if account.peak <= machine.limit:
        print(f"fits: {human_bytes(account.peak)} of the {limit} that a run may take")
    else:
        print(f"doesn't fit: {human_bytes(account.peak)}, and a run may take {limit}; most of it is held in {account.largest!r}")
        if line := machine.wired_line(account.peak):
            print(f"it would, with more memory for Metal until the next start: {line}")
        told = ", ".join(f"{name} = {json.dumps(value)}" for name, value in changes.items())
        print(f"fits with {told}: {human_bytes(after)}" if after <= machine.limit else
              f"even {told} needs {human_bytes(after)}: take a smaller model, or a quantised one (utils/convert_model.py -q) with "
              "adapters")
    if path:
        write_fit(path, given, {n: vars(config)[n] for n, s in sources.items() if s != "default"} | changes, changes, after)


def write_fit(path, given, options, changes, peak):
    from mlx_grpo.make_docs import toml

    if Path(path).exists():
        raise UserError(f"{path} exists; give --fit another name")
    lines = [f"# {given or 'the defaults'}, with what was changed until it fits marked: about {human_bytes(peak)} (plan --fit)."]
    lines += [f"{name} = {toml(value)}" + "    # changed" * (name in changes) for name, value in options.items()]
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    print(f"wrote {path}")


def planned(config, work, measured=True):
    """Peak bytes of a run: measured by a trial run, or estimated."""
    account = Account(config, work)
    if measured:
        from mlx_grpo.plan_measure import measure

        account.correct({phase: row["bytes"] for phase, row in measure(config, work)[0].items()})
    return account.peak


def warning(config, longest_prompt, eval_count):
    """One line where the estimate is above what this machine has, else None. Cheap: shapes only."""
    try:
        account = Account(config, work_of(config, longest_prompt, eval_count))
    except UserError:                                     # a model whose shapes can't be told without its weights
        return None
    machine = Machine()
    if account.peak <= machine.limit:
        return None
    return (f"warning: this run needs about {human_bytes(account.peak)} in {account.largest!r} and may take "
            f"{human_bytes(machine.limit)} here; `mlx_grpo.py plan --fit new.toml` finds settings that fit")
