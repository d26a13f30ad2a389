"""
Two results of `mlx_grpo.py eval` on the same problems: is B better than A? Paired tests, and the problems won and lost.
"""

import json

import numpy as np

from mlx_grpo import UserError
from mlx_grpo.eval_stats import bootstrap_interval, sign_flip_p

SHOWN = 20      # problems won, and lost, on the page


def check_comparable(a, b):
    """Raises UserError, in one line, where two results have other settings or other problems."""
    differing = [f"{name} is {a['settings'].get(name)!r} and {b['settings'].get(name)!r}"
                 for name in a["settings"] | b["settings"] if a["settings"].get(name) != b["settings"].get(name)]
    if differing:
        raise UserError(f"{a['model']} and {b['model']} were evaluated differently: {'; '.join(differing)}; evaluate one "
                        "of them again with the other's settings")
    asked = [[json.dumps([row["prompt"], row["answer"]]) for row in result["problems"]] for result in (a, b)]
    if asked[0] != asked[1]:
        same = len(set(asked[0]) & set(asked[1]))
        raise UserError(f"{a['model']} and {b['model']} were asked different problems ({len(asked[0])} and {len(asked[1])}, "
                        f"{same} of them the same" + (", in another order" if same == len(asked[0]) == len(asked[1]) else "")
                        + "); evaluate both on the same data, seed and max_prompt_length")


def compare(a, b):
    """The comparison of two results: what --output writes as JSON. differences: metric -> A, B, B - A with the interval of a
    paired bootstrap and, where there is an exact test, its p (McNemar's for exact_match, the permutation test for avg@N).
    won, lost: places of the problems that only B, only A, got right; won_samples, lost_samples: with more, fewer right
    samples. a, b: the results themselves."""
    from mlx_grpo.evaluation import problem_metrics

    check_comparable(a, b)
    rows, ks = list(zip(a["problems"], b["problems"])), sorted(set(a["k"]) & set(b["k"]))
    tables = [[problem_metrics(row, ks) for row in result["problems"]] for result in (a, b)]
    names = [name for name in tables[0][0] if not np.isnan([x[name] - y[name] for x, y in zip(*tables)]).all()]
    values = [np.array([[problem[name] for name in names] for problem in table]) for table in tables]
    both = np.where(np.isnan(values[0] - values[1]), np.nan, 1.0)             # problems that a metric applies to twice
    lows, highs = bootstrap_interval(values[1] - values[0], a["settings"]["seed"])
    mean = lambda x: np.nanmean(x * both, axis=0)
    columns = zip(names, mean(values[0]), mean(values[1]), mean(values[1] - values[0]), lows, highs)
    keys = ("a", "b", "difference", "low", "high")
    differences = {name: dict(zip(keys, map(float, numbers))) for name, *numbers in columns}
    gains = [int(bool(y["correct"])) - int(bool(x["correct"])) for x, y in rows]
    right = lambda row: sum(bool(s["correct"]) for s in row.get("samples", []))
    sample_gains = [right(y) - right(x) for x, y in rows]
    n = a["settings"]["samples"]
    for name, counts in (("exact_match", gains), (f"avg@{n}", sample_gains)):
        if name in differences:
            differences[name]["p"] = sign_flip_p(counts)
    places = lambda counts, sign: [i for i, count in enumerate(counts) if count * sign > 0]
    found = {"models": [a["model"], b["model"]], "settings": a["settings"], "differences": differences,
             "won": places(gains, 1), "lost": places(gains, -1)}
    if n:
        found |= {"won_samples": places(sample_gains, 1), "lost_samples": places(sample_gains, -1)}
    if "categories" in a:
        found["categories"] = by_category(rows, tables, [name for name in ("exact_match", f"avg@{n}") if name in names])
    return found | {"a": a, "b": b}


def by_category(rows, tables, names):
    """{category: {"problems", metric: {"a", "b"}}} by A's categories."""
    found = {}
    for category in sorted({x["category"] for x, _ in rows}):
        chosen = [i for i, (x, _) in enumerate(rows) if x["category"] == category]
        means = {name: {side: float(np.nanmean([table[i][name] for i in chosen])) for side, table in zip("ab", tables)}
                 for name in names}
        found[category] = {"problems": len(chosen), **means}
    return found


def comparison_lines(result):
    """What is printed: the verdict, the table, and the first problems won and lost."""
    lines = [f"A: {result['models'][0]}", f"B: {result['models'][1]}", "", *difference_table(result), "", verdict(result)]
    for name in ("won", "lost"):
        lines += [f"{name}: {one_line(result['a']['problems'][i]['prompt'], 100)}" for i in result[name][:3]]
    return lines


def difference_table(result):
    lines = ["| metric | A | B | B - A | 95% interval | p |", "|---|---|---|---|---|---|"]
    for name, d in result["differences"].items():
        p = f"{d['p']:.2g}" if "p" in d else ""
        change = f"{d['difference']:+.3f} | {d['low']:+.3f} to {d['high']:+.3f}"
        lines.append(f"| {name} | {d['a']:.3f} | {d['b']:.3f} | {change} | {p} |")
    if categories := result.get("categories"):
        names = [name for name in next(iter(categories.values())) if name != "problems"]
        lines += ["", "| category | problems | " + " | ".join(f"{name} A | {name} B" for name in names) + " |",
                  "|---" * (2 + 2 * len(names)) + "|"]
        for category, part in categories.items():
            cells = [f"{part[name][side]:.3f}" for name in names for side in "ab"]
            lines.append(f"| {cell(category)} | {part['problems']} | " + " | ".join(cells) + " |")
    return lines


def verdict(result):
    """One sentence on exact match, or on the mean reward where there are no gold answers."""
    won, lost, total = len(result["won"]), len(result["lost"]), len(result["a"]["problems"])
    if "exact_match" not in result["differences"]:
        d = result["differences"]["reward"]
        return (f"mean reward {d['difference']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}) on {total} problems without gold "
                "answers")
    p = result["differences"]["exact_match"]["p"]
    return (f"greedy: B wins {won} and loses {lost} of {total} problems; McNemar's exact test p = {p:.2g}: "
            + ("no difference that could be told from chance" if p >= 0.05 else f"{'B' if won > lost else 'A'} is better"))


def comparison_page(result):
    """The comparison as a Markdown page."""
    a, b = result["models"]
    lines = ["# Comparison", "", f"A: `{a}`  ", f"B: `{b}`", "", *difference_table(result), "", verdict(result) + "."]
    for name, title in (("won", "Won by B"), ("lost", "Lost by B")):
        places = result[name]
        more = f", the first {SHOWN}" if len(places) > SHOWN else ""
        lines += ["", f"## {title}: {len(places)}{more}", ""]
        if places:
            lines += ["| problem | gold | A | B |", "|---|---|---|---|"]
        for i in places[:SHOWN]:
            a, b = result["a"]["problems"][i], result["b"]["problems"][i]
            texts = [one_line(row["completion"], 120, tail=True) for row in (a, b)]
            cells = [one_line(a["prompt"], 160), a["answer"], *texts]
            lines.append("| " + " | ".join(cell(text) for text in cells) + " |")
    return "\n".join(lines)


def cell(text):
    """Text as a cell of a Markdown table; tags are shown, not rendered."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def one_line(prompt, width, tail=False):
    """A prompt (text, or the last message) or completion on one line, cut in front (tail) or behind."""
    text = " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())
    if len(text) <= width:
        return text
    return "..." + text[3 - width:] if tail else text[:width - 3] + "..."
