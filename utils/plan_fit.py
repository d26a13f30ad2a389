"""Settings changed until a run fits: first those that change no result, then those that do, none that isn't needed."""

from dataclasses import replace

from mlx_grpo import bucket, pass_budget
from mlx_grpo.plan_account import Account, work_of


def candidates(account):
    """Changes {option: value}, one after the other, in the order in which they are tried."""
    config, work = account.config, account.work
    least = bucket(work["completion"])
    tokens = pass_budget(config) or work["pass_rows"] * (bucket(work["prompt"]) + least)
    while tokens > least:
        tokens = max(tokens // 2, least)
        yield {"max_tokens_per_microbatch": tokens}
    rows = min(config.rollout_batch_size, max(work["prompts"] * config.num_generations, work["eval_prompts"]))
    while rows > 1:
        rows = max(rows // 2, 1)
        yield {"rollout_batch_size": rows}
    if not config.lora_dropout:
        yield {"gradient_checkpointing": True}
    yield {"update_every": 1}
    if config.fine_tune_type == "full":
        yield {"optimizer_dtype": "bfloat16"}
        if config.optimizer != "muon" and not config.ref_sync_steps:
            yield {"fine_tune_type": "lora"}


def with_changes(account, changes):
    """The Account of the changed configuration, corrected as the first one was."""
    config = replace(account.config, **changes)
    other = Account(config, work_of(config, account.work["prompt"], account.eval_count))
    other.factors = account.factors
    return other


def fitted(account, limit):
    """(changes, peak bytes with them): the fewest of candidates() in their order with which the peak is at most `limit`,
    or all that help."""
    changes, best = {}, account.peak
    for change in [*candidates(account)] * 3:      # again, as another phase may have become the largest
        name = next(iter(change))
        if best <= limit:
            break
        if changes.get(name, vars(account.config)[name]) == change[name]:
            continue
        peak = with_changes(account, changes | change).peak
        if peak < best:
            changes, best = changes | change, peak
    for name in list(changes):                    # what a later change has made needless
        fewer = {n: v for n, v in changes.items() if n != name}
        if best <= limit and (peak := with_changes(account, fewer).peak) <= limit:
            changes, best = fewer, peak
    return changes, best
