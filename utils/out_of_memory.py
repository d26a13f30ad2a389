"""
Out of memory is death, not an exception: MLX ends the process (a segmentation fault or an abort), or Linux does
(SIGKILL). So the next start reads what the dead run was doing (run_state.py), and takes smaller parts where memory is
the likely cause:

  died in           smaller from now on            at least
  scoring, update   max_tokens_per_microbatch / 2  the longest completion
  rollout           rollout_batch_size / 2         a group of num_generations rows

Both options say how the same numbers are computed, not which. A death that something else explains, or nothing does
(kill -9, a battery), changes neither, and the resumed run is the same to the last bit.
"""

import sys
from dataclasses import replace

from mlx_grpo import pass_budget
from mlx_grpo.run_guard import in_use
from mlx_grpo.run_state import ALLOCATION, machine, read_crash, read_state

SAME_PLACE = 3                        # deaths in one phase of one step that count as memory without other evidence
NEARLY = 0.9                          # share of the memory limit that a killed process had reached
IN_TRAINING, IN_SAMPLING = ("max_tokens_per_microbatch", "tokens", "least_tokens"), ("rollout_batch_size", "rows", "group")
HALVED = {  # phase -> the option, and which of the noted sizes are its value so far and its least
    "scoring": IN_TRAINING, "update": IN_TRAINING, "rollout": IN_SAMPLING, "evaluate": IN_SAMPLING}


def died(record):
    """Whether the last process of a run ended without having said how."""
    return record is not None and record["ended"] in (None, ALLOCATION)


def evidence(record, crash, now, deaths):
    """Why memory is the likely cause of a death, in words, or None. record: the dead run's last note; crash: the first
    line of its crash.txt; now: machine() of today; deaths: how many in a row there were in this place."""
    before = record["machine"]
    if record["ended"] == ALLOCATION:
        return "an allocation failed"
    if crash:
        return f"it ended with {crash.removeprefix('Fatal Python error: ')!r}"
    if before["boot"] != now["boot"]:
        return None                                           # the machine was switched off
    if now["oom_kills"] is not None and now["oom_kills"] > before["oom_kills"]:
        return "Linux ended a process for want of memory meanwhile"
    if now["oom_kills"] is None and record["memory"] > NEARLY * record["memory_limit"]:
        return f"it had used {record['memory'] / 1e9:.1f} GB of the {record['memory_limit'] / 1e9:.1f} GB there are"
    return f"it died there {deaths} times in a row" if deaths >= SAME_PLACE else None


def after_death(run_dir, config, say=True):
    """(the configuration that the next process of a run should use, what it passes on to RunState.kept_in). Says what
    the last process died of and what is lowered for it; limits stay lowered until run_state.json is removed."""
    record = None if in_use(run_dir) else read_state(run_dir)
    if record is None:
        return config, {}
    limits, deaths = record.get("limits", {}), {}
    if died(record):
        place = {"phase": record["phase"], "step": record["step"]}
        before = record.get("deaths", {})
        deaths = place | {"count": 1 + (before["count"] if place.items() <= before.items() else 0)}
        cause = evidence(record, read_crash(run_dir), machine(), deaths["count"])
        lowered = halved(record) if cause else {}
        say and print(f"the last process died in phase {place['phase']!r} of step {place['step']}: {told(cause, lowered, record)}",
              file=sys.stderr)
        limits, deaths = limits | lowered, {} if lowered else deaths
    used = {name: value for name, value in limits.items() if not 0 < vars(config)[name] <= value}
    return replace(config, **used), {"limits": limits, "deaths": deaths}


def told(cause, lowered, record):
    """The rest of the line about a death."""
    if not cause:
        return "nothing says that memory was short, so the run goes on as it was"
    if record["phase"] not in HALVED:
        return f"{cause}; no option makes that phase smaller"
    if not lowered:
        return f"{cause}; {HALVED[record['phase']][0]} is as small as it gets: lower max_new_tokens or max_prompt_length"
    option, value = next(iter(lowered.items()))
    return f"{cause}; {option} is {value} from now on: the same numbers, computed in smaller parts"


def halved(record):
    """{option: half of what was used} for the phase of a death, {} where there is nothing to halve."""
    if record["phase"] not in HALVED:
        return {}
    option, size, least = HALVED[record["phase"]]
    value = max(record[size] // 2, record[least])
    return {option: value} if value < record[size] else {}


def rollout_shape(config, problems, num_generations):
    """What a note says before sampling: rows decoded together, rows of a group, and most tokens of a completion."""
    rows = min(max(config.rollout_batch_size, num_generations), len(problems) * num_generations)
    return {"rows": rows, "group": num_generations, "new_tokens": config.max_new_tokens}


def batches_shape(config, batches):
    """training_shape of the Batches of a step."""
    return training_shape(config, max(len(b.mask) for b in batches), max(b.prompts.shape[1] for b in batches),
                          max(b.mask.shape[1] for b in batches))


def training_shape(config, rows, prompt, completion):
    """What a note says before scoring and training: rows of a Batch, the least tokens of a pass (a completion whose prompt
    is computed apart) and the most. prompt, completion: tokens of the longest ones."""
    most = rows * (prompt + completion)
    return {"rows": rows, "least_tokens": completion, "tokens": max(min(pass_budget(config) or most, most), completion)}
