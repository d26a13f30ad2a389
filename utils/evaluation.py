"""`mlx_grpo.py eval`: how good a model is on problems, with intervals, and whether another one is better."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_grpo import (
    Scorer, UserError, add_config_arguments, as_number, cast_floats, compute_dtype, eval_rollouts, extract_answer,
    find_rewards, fitting_problems, load_config, load_model, load_problems, nearest, resolve_model, right_answers,
    train_sampling, versions, weighted_rewards)
from mlx_grpo.eval_compare import check_comparable, compare, comparison_lines, comparison_page
from mlx_grpo.eval_stats import bootstrap_interval, majority_at_k, pass_at_k
from mlx_grpo.files import check_output_file

MOST_SAMPLES = 1000       # C(n, k) has to fit a float64


def add_arguments(parser):
    add_config_arguments(parser)
    parser.add_argument("--split", choices=("eval", "train", "all"), default="eval",
                        help="the held-out problems, the training problems, or every row of the data (default: eval)")
    parser.add_argument("--limit", metavar="N", type=int, default=0, help="only the first N of them")
    parser.add_argument("--samples", metavar="N", type=int, default=0,
                        help="sample N completions for each problem, beside the greedy one: avg@N, pass@k, maj@k")
    parser.add_argument("--k", metavar="1,4,8", help="the k of pass@k and maj@k (default: 2, 4, 8, ... and N)")
    parser.add_argument("--temperature", metavar="T", type=float,
                        help="of the N completions (default: the option temperature)")
    parser.add_argument("--category", metavar="COLUMN", help="a breakdown by this column of the data")
    parser.add_argument("--correct", metavar="REWARD:LEAST",
                        help="right is where this reward function gives at least LEAST (default: equal to the gold answer)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"),
                        help="two models, or results written with --output: is B better?")
    parser.add_argument("--output", metavar="FILE", action="append", default=[],
                        help="write the result to a .json file (with every completion) or a .md file; may be repeated")


def run(args):
    """Exact match (greedy), avg@N, pass@k, maj@k and mean rewards of a model, with 95% intervals; or of two, compared.

    examples:
      python mlx_grpo.py eval --config run.toml --samples 8 --k 1,8 --output scores.json
      python mlx_grpo.py eval --config run.toml --compare base_model outputs/run/checkpoint-500
      python mlx_grpo.py eval --compare before.json after.json --output comparison.md
    """
    for path in args.output:
        check_output_file("--output", path)
        if Path(path).suffix not in (".json", ".md"):
            raise UserError(f"--output {path}: the name must end in .json or .md")
    config, _ = load_config(args.config, args.set)
    settings = settings_of(config, args)
    if args.compare:
        result = compare(*compared_results(config, args, settings))
        lines, page = comparison_lines(result), comparison_page(result)
    else:
        result = evaluate_model(config, args, settings)
        lines, page = result_lines(result), result_page(result)
    for path in args.output:
        text = json.dumps(result, indent=2, ensure_ascii=False) if path.endswith(".json") else page
        Path(path).write_text(text + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def settings_of(config, args):
    """What two results must share to be compared, beside their problems. Raises UserError for arguments that contradict."""
    rewards, n = find_rewards(config.rewards, config.reward_options), args.samples
    if not 0 <= n <= MOST_SAMPLES:
        raise UserError(f"--samples {n}: use 1 to {MOST_SAMPLES}, or leave it out for the greedy completion alone")
    if n == 0 and (args.k or args.temperature is not None):
        raise UserError(f"--{'k' if args.k else 'temperature'} is about sampled completions; say how many with --samples N")
    if args.temperature is not None and not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0, or all samples are the same")
    if args.limit < 0:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    name, _, least = (args.correct or "").partition(":")
    if args.correct and (name not in rewards or not is_number(least)):
        raise UserError(f"--correct {args.correct}: expected REWARD:LEAST, with a number and one of {', '.join(rewards)}"
                        + nearest(name, rewards))
    sampling = train_sampling(replace(config, temperature=args.temperature or config.temperature))
    shared = {"seed": config.seed, "rewards": list(rewards), "reward_weights": config.reward_weights,
              "reward_options": config.reward_options, "correct": args.correct,
              "eval_temperature": config.eval_temperature, "eval_max_new_tokens": config.eval_max_new_tokens,
              "stop": config.stop, "response_prefix": config.response_prefix, "samples": n}
    drawn = {name: vars(sampling)[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    return shared | (drawn if n else {})


def is_number(text):
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def ks_of(args):
    """The k of pass@k and maj@k: as asked for, or the powers of 2 up to N, and N (k = 1 is avg@N)."""
    if not args.k:
        return sorted({2**i for i in range(1, args.samples.bit_length())} | {args.samples}) if args.samples else []
    if not all(part.strip().isdigit() and 1 <= int(part) <= args.samples for part in args.k.split(",")):
        raise UserError(f"--k {args.k}: expected whole numbers from 1 to --samples ({args.samples}), 1,4,8 for instance")
    return sorted({int(part) for part in args.k.split(",")})


def compared_results(config, args, settings):
    """The two results of --compare: read, or made now. What can be refused is refused before a model is run."""
    is_file = [name.endswith(".json") for name in args.compare]
    if all(is_file) and (args.samples or args.category or args.correct or args.limit):
        raise UserError("--compare of two result files takes everything from the files; leave the other options out")
    known = [read_result(name) if file else None for name, file in zip(args.compare, is_file)]
    for name, result in zip(args.compare, known):
        if result is None:
            resolve_model(name, config.trust_remote_code)
        elif not all(is_file):
            check_comparable(result, {"model": "this evaluation", "settings": settings, "problems": result["problems"]})
    return [result or evaluate_model(replace(config, model_name=name), args, settings)
            for name, result in zip(args.compare, known)]


def read_result(path):
    """A result as --output wrote it. Raises UserError."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't read this result: {error}") from error
    parts = {"model": str, "settings": dict, "k": list, "problems": list}
    if not isinstance(result, dict) or not all(isinstance(result.get(name), kind) for name, kind in parts.items()):
        raise UserError(f"{path}: not a result of `mlx_grpo.py eval --output FILE.json`")
    return result


def chosen_problems(config, args):
    """The problems of --split and --limit. Raises UserError where there are none, or they have no such --category."""
    if args.split == "all":
        problems = load_problems(replace(config, eval_samples=0))[0]
    else:
        problems = load_problems(config)[args.split == "eval"]
    if not problems:
        raise UserError(f"dataset {config.dataset!r} gives no held-out problems; set eval_split or eval_fraction, "
                        "eval_samples, or say --split all")
    problems = problems[:args.limit or None]
    columns = {column for p in problems for column in p.columns}
    if args.category and args.category not in columns:
        raise UserError(f"--category {args.category}: no such column in the data ({', '.join(sorted(columns))})"
                        + nearest(args.category, columns))
    return problems


def evaluate_model(config, args, settings):
    """The result of one model: what --output writes as JSON. metrics: name -> value and interval; categories: the same for
    each; problems: for each one the greedy completion and the samples, with answers, lengths and rewards."""
    ks, problems = ks_of(args), chosen_problems(config, args)
    model, tokenizer = load_model(config.model_name, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
    model.update(cast_floats(model.parameters(), compute_dtype(config)))
    problems = fitting_problems(problems, tokenizer, config)
    greedy = in_pieces(model, tokenizer, problems, config, None, 1)
    sampling = replace(train_sampling(config), temperature=args.temperature or config.temperature,
                       max_new_tokens=config.eval_max_new_tokens)
    sampled = in_pieces(model, tokenizer, problems, config, sampling, args.samples) if args.samples else []
    category = lambda p: {"category": str(p.columns.get(args.category))} if args.category else {}
    rows = [{"prompt": p.prompt, "answer": p.answer} | category(p) for p in problems]
    for row, (completion,) in zip(rows, judged(greedy, config, args.correct)):
        row |= completion
    for row, completions in zip(rows, judged(sampled, config, args.correct)):
        row["samples"] = completions
    result = {"model": config.model_name, "dataset": config.dataset, "split": args.split, "settings": settings, "k": ks,
              "versions": versions(), "device": str(mx.default_device()), "metrics": summary(rows, ks, config.seed)}
    if args.category:
        names = sorted({row["category"] for row in rows})
        groups = {name: [row for row in rows if row["category"] == name] for name in names}
        result["categories"] = {name: {"problems": len(group), "metrics": summary(group, ks, config.seed)}
                                for name, group in groups.items()}
    return result | {"problems": rows}


def in_pieces(model, tokenizer, problems, config, sampling, num_generations):
    """Rollouts of all problems, some at a time, with a count on the terminal; in how many pieces changes nothing."""
    rollouts, size = [], max(1, 4 * config.rollout_batch_size // num_generations)
    for start in range(0, len(problems), size):
        rollouts += eval_rollouts(model, tokenizer, problems[start:start + size], config, sampling,
                                  num_generations=num_generations, first_prompt=start)
        if sys.stderr.isatty():
            end = "\n" if len(rollouts) == len(problems) else ""
            print(f"\r{config.model_name}: {len(rollouts)}/{len(problems)} problems x {num_generations}", end=end,
                  file=sys.stderr)
    return rollouts


def judged(rollouts, config, correct):
    """For each rollout the records of its completions: text, extracted answer, whether it is right (None without a gold
    answer), length in tokens, whether it ended by itself, rewards."""
    if not rollouts:
        return []
    functions = find_rewards(config.rewards, config.reward_options)
    scorer = Scorer(functions, config.reward_weights, config.on_reward_error, config.max_reward_errors)
    scores, _, _ = scorer(rollouts, argparse.Namespace(global_step=0, max_steps=0, epoch=0.0))
    totals, found, row = weighted_rewards(scores, scorer.weights), [], 0
    number = lambda x: None if np.isnan(x) else float(x)
    for r in rollouts:
        exact, records = right_answers(r), []
        for i, text in enumerate(r.texts):
            rewards = dict(zip(functions, map(number, scores[row])))
            if correct:
                name, _, least = correct.partition(":")
                right = rewards[name] is not None and rewards[name] >= float(least)
            else:
                right = None if r.problem.answer is None else exact[i]
            records.append({"completion": text, "extracted": extract_answer(text), "correct": right,
                            "length": len(r.completion_ids[i]), "ended": r.ended[i], "rewards": rewards, "reward": number(totals[row])})
            row += 1
        found.append(records)
    return found


def problem_metrics(row, ks):
    """{metric: value} of one problem, NaN where it does not apply."""
    number = lambda x: np.nan if x is None else float(x)

    def means(rows, get):
        values = [number(get(row)) for row in rows]
        return np.nan if np.isnan(values).all() else float(np.nanmean(values))

    found, samples, n = {"exact_match": number(row["correct"])}, row.get("samples", []), len(row.get("samples", []))
    if samples:
        known = samples[0]["correct"] is not None
        right, votes = [bool(s["correct"]) for s in samples], [vote_of(s["extracted"]) for s in samples]
        found[f"avg@{n}"] = sum(right) / n if known else np.nan
        found |= {f"pass@{k}": pass_at_k(n, sum(right), k) if known else np.nan for k in ks}
        found |= {f"maj@{k}": majority_at_k(votes, right, k) if known else np.nan for k in ks}
    for rows, mark in (([row], ""), (samples, f"@{n}")):
        if rows:
            found |= {f"rewards/{name}{mark}": means(rows, lambda r: r["rewards"][name]) for name in row["rewards"]}
            found |= {f"reward{mark}": means(rows, lambda r: r["reward"]),
                      f"mean_length{mark}": means(rows, lambda r: r["length"]),
                      f"clipped_ratio{mark}": means(rows, lambda r: not r["ended"])}
    return found


def vote_of(answer):
    """Equal for answers that are the same to same_answer; None for no answer."""
    if answer is None:
        return None
    number = as_number(answer)
    return answer.strip().casefold() if number is None else number


def summary(rows, ks, seed):
    """{metric: {"value", "low", "high"}} over problems; metrics that apply to none are left out."""
    table = [problem_metrics(row, ks) for row in rows]
    names = [name for name in table[0] if not np.isnan([problem[name] for problem in table]).all()]
    values = np.array([[problem[name] for name in names] for problem in table])                 # (P, M)
    lows, highs = bootstrap_interval(values, seed)
    return {name: {"value": float(v), "low": float(low), "high": float(high)}
            for name, v, low, high in zip(names, np.nanmean(values, axis=0), lows, highs)}


def result_lines(result):
    """What is printed: a sentence, then the table of result_page where there is more to say."""
    metrics, problems = result["metrics"], result["problems"]
    kind = {"eval": "held-out problems", "train": "training problems", "all": "problems"}[result["split"]]
    value = lambda name: metrics[name]["value"]
    exact = f"exact match {value('exact_match'):.3f}" if "exact_match" in metrics else "no gold answers, so no exact match,"
    return [f"{result['model']}: {exact} on {len(problems)} {kind}, {value('mean_length'):.0f} tokens on average, "
            f"{value('clipped_ratio'):.0%} cut at {result['settings']['eval_max_new_tokens']}", "", *metric_table(result)]


def metric_table(result):
    """Markdown lines: every metric with its interval, then the right answers by category."""
    lines = ["| metric | value | 95% interval |", "|---|---|---|"]
    lines += [f"| {name} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} |" for name, m in result["metrics"].items()]
    if categories := result.get("categories"):
        most = max(result["k"], default=0)
        names = [name for name in ("exact_match", f"avg@{result['settings']['samples']}", f"pass@{most}", f"maj@{most}")
                 if name in result["metrics"]] or ["reward"]
        lines += ["", "| category | problems | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
        for category, part in categories.items():
            cells = [part["metrics"].get(name) for name in names]
            shown = [f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f})" if m else "" for m in cells]
            lines.append(f"| {category.replace('|', chr(92) + '|')} | {part['problems']} | " + " | ".join(shown) + " |")
    return lines


def result_page(result):
    """The result as a Markdown page."""
    given = {name: value for name, value in result["settings"].items() if value not in (None, "", [], {})}
    settings = ", ".join(f"`{name} = {value!r}`" for name, value in given.items())
    head, _, *table = result_lines(result)
    return "\n".join([f"# Evaluation of {result['model']}", "", head + ".", "", *table, "",
                      f"Data: `{result['dataset']}`, {settings}.", "Intervals: percentile bootstrap over problems."])
