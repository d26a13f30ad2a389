"""`mlx_grpo.py rewards`: the reward functions, before a run is built on them."""

import inspect
import json
from dataclasses import asdict

import numpy as np

from mlx_grpo import (
    REWARDS, UserError, add_config_arguments, find_rewards, fitting_problems, load_config, load_model, load_problems,
    sample_completions, train_sampling)
from mlx_grpo.reward_findings import Row, test_function, total_of
from mlx_grpo.reward_probes import Probe, probes_for, read_completions, word_ids


def add_arguments(parser):
    parser.add_argument("action", nargs="?", choices=["test"], help="try the configured functions; without it: list them")
    add_config_arguments(parser)
    parser.add_argument("--rows", type=int, metavar="N", help="test: data rows to make completions for (default: 8)")
    parser.add_argument("--completions", metavar="FILE", help="test: further completions; .jsonl objects with `completion` "
                        "and the columns of their row (or a run's completions.jsonl), else one a line, tried on every row")
    parser.add_argument("--sample", type=int, metavar="N", help="test: sample N completions a row from the configured model")
    parser.add_argument("--gold", metavar="TEMPLATE", help="test: the right form, 'The answer is {answer}.' for instance")
    parser.add_argument("--allow", action="append", metavar="NAME:CODE", help="test: a flag that is meant to be; repeatable")
    parser.add_argument("--json", action="store_true", default=None, help="test: the result as JSON")


def run(args):
    """List the reward functions with what each gives, or try them out before a run is built on them.

    `rewards test` calls the configured functions on the gold answers of some data rows and on wrong, empty, cut and
    hostile completions, prints what each gives, and flags those that raise, are constant, reward nothing, miss the gold
    answer or pay a wrong one, are random, or depend on other rows. Exit code: 0 clean, 1 flags, 2 wrong input.

    examples:
      python mlx_grpo.py rewards
      python mlx_grpo.py rewards test --config configs/demo.toml
      python mlx_grpo.py rewards test --config configs/demo.toml --sample 8
      python mlx_grpo.py rewards test --config my.toml --completions outputs/run/completions.jsonl --json
    """
    config, _ = load_config(args.config, args.set)
    functions = find_rewards(config.rewards, config.reward_options)
    weights = dict(zip(functions, config.reward_weights or [1.0] * len(functions)))
    if args.action == "test":
        return test(args, config, functions, weights)
    for option in ("rows", "completions", "sample", "gold", "allow", "json"):
        if vars(args)[option] is not None:
            raise UserError(f"--{option} belongs to `rewards test`; write: mlx_grpo.py rewards test --{option} ...")
    for name, function in (REWARDS | functions).items():
        used = f"weight {weights[name]:g}" if name in weights else "not used"
        summary = (inspect.getdoc(function) or "no description").partition("\n\n")[0]
        print(f"{name:16} {used:12} {' '.join(summary.split())}")
    return 0


def test(args, config, functions, weights):
    """`rewards test`: the exit code."""
    for option, least in (("rows", 1), ("sample", 2)):
        if vars(args)[option] is not None and vars(args)[option] < least:
            raise UserError(f"--{option} is {vars(args)[option]}; use at least {least}")
    if args.gold and "{answer}" not in args.gold:
        raise UserError(f"--gold {args.gold!r} has no {{answer}}, where the gold answer is to stand")
    for entry in args.allow or []:
        if entry.partition(":")[0] not in {*functions, "total"}:
            raise UserError(f"--allow {entry}: expected NAME:CODE with one of {', '.join(functions)}, total")
    rows = make_rows(args, config)
    tested = [test_function(name, function, rows) for name, function in functions.items()]
    tested.append(total_of(tested, list(weights.values()), rows))
    for entry in tested:
        entry.flags = [flag for flag in entry.flags if f"{entry.name}:{flag[0]}" not in (args.allow or [])]
    if args.json:
        print(json.dumps(as_json(tested, rows), indent=2))
    else:
        print_tables(tested, rows)
    return int(any(entry.flags for entry in tested))


def make_rows(args, config):
    """[Row] to score: made, given and sampled completions of the first data rows."""
    problems = load_problems(config)[0]
    model, encode = None, word_ids
    if args.sample:
        model, tokenizer = load_model(config.model_name, loader=config.model_loader,
                                      trust_remote_code=config.trust_remote_code)
        problems = fitting_problems(problems, tokenizer, config)
        encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False))
    problems = problems[:args.rows or 8]
    answers = [p.answer for p in problems]
    pairs = [(p, probe) for i, p in enumerate(problems)
             for probe in probes_for(p, answers[i + 1:] + answers[:i], config, args.gold)]
    for problem, probe in read_completions(args.completions, config) if args.completions else []:
        pairs += [(p, probe) for p in ([problem] if problem else problems)]
    places = {}
    row = lambda p, probe, ids: Row(p, places.setdefault(json.dumps([p.prompt, p.answer]), len(places)), probe, ids)
    rows = [row(p, probe, encode(probe.text)) for p, probe in pairs]
    if args.sample:
        rollouts = sample_completions(model, tokenizer, problems, config, train_sampling(config),
                                      num_generations=args.sample, step=0)
        rows += [row(r.problem, Probe("sampled", text), ids)
                 for r in rollouts for ids, text in zip(r.completion_ids, r.texts)]
    return rows


def by_kind(values, rows):
    """{kind: [values that are numbers]}, in the order of the rows."""
    found = {}
    for value, row in zip(values, rows):
        found.setdefault(row.probe.kind, [])
        if not np.isnan(value):
            found[row.probe.kind].append(float(value))
    return found


def spread(values, rows, kind=None):
    """(mean standard deviation, share of rows without any) inside the groups, each the completions of one data row."""
    groups = {}
    for value, row in zip(values, rows):
        if not np.isnan(value) and kind in (None, row.probe.kind):
            groups.setdefault(row.number, []).append(value)
    groups = [g for g in groups.values() if len(g) > 1]
    if not groups:
        return None, None
    return float(np.mean([np.std(g, ddof=1) for g in groups])), float(np.mean([np.ptp(g) < 1e-8 for g in groups]))


def as_json(tested, rows):
    """Everything that the tables show."""
    found = {}
    for entry in tested:
        known = entry.values[~np.isnan(entry.values)]
        kinds = {kind: {"mean": float(np.mean(v)), "min": min(v), "max": max(v), "n": len(v)} if v else {"n": 0}
                 for kind, v in by_kind(entry.values, rows).items()}
        std, flat = spread(entry.values, rows)
        about = {k: v for k, v in asdict(entry).items() if k in ("none", "failed", "seconds")}
        found[entry.name] = about | {
            "min": float(known.min()) if len(known) else None, "max": float(known.max()) if len(known) else None,
            "spread": std, "flat_groups": flat, "kinds": kinds,
            "flags": [{"code": code, "text": text} for code, text in entry.flags]}
        if any(row.probe.kind == "sampled" for row in rows):
            found[entry.name] |= dict(zip(("sampled_spread", "sampled_flat_groups"), spread(entry.values, rows, "sampled")))
    return {"completions": len(rows), "rows": len({row.number for row in rows}), "functions": found,
            "flags": sum(len(entry.flags) for entry in tested)}


def number(value):
    return "-" if value is None else f"{value:.3g}"


def print_tables(tested, rows):
    """Mean value by kind of completion, what each function did, and the flags."""
    from rich.console import Console
    from rich.table import Table

    found, console = as_json(tested, rows), Console(soft_wrap=True)
    kinds = Table("completion", title=f"mean reward of {found['completions']} completions on {found['rows']} rows")
    about = Table("", title="what each function did")
    for entry in tested:
        kinds.add_column(entry.name, justify="right")
        about.add_column(entry.name, justify="right")
    for kind in by_kind(tested[0].values, rows):
        kinds.add_row(kind, *(number(f["kinds"][kind].get("mean")) for f in found["functions"].values()))
    lines = [("least", "min"), ("most", "max"), ("spread in a row's group", "spread"),
             ("groups without spread", "flat_groups"), ("sampled: spread", "sampled_spread"), ("sampled: groups without", "sampled_flat_groups"),
             ("None", "none"), ("failed", "failed")]
    for label, key in lines:
        if key in found["functions"]["total"]:
            about.add_row(label, *(number(f[key]) for f in found["functions"].values()))
    about.add_row("ms a completion", *(number(1000 * f["seconds"] / len(rows)) for f in found["functions"].values()))
    console.print(kinds, about)
    for name, f in found["functions"].items():
        for flag in f["flags"]:
            print(f"{name}: {flag['code']}: {flag['text']}")
    print(f"{found['flags']} flags" if found["flags"] else "no flags")
