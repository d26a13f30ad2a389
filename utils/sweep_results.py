"""
What came out of a sweep: one table (Markdown and JSON), sorted by the sweep's metric, and the curves of its runs together.
Part of utils/sweep.py.
"""

import json
import math
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.report import open_runs, write_file, write_report
from mlx_grpo.report_curves import COLORS, curves_svg


def outcome(run_dir, metric, goal, pick):
    """{"steps", "value", "step"} of a run: its last logged step, and the metric's last or best value with its step; None
    where there is none. Step 0, before training, is never the best."""
    file = Path(run_dir) / "metrics.jsonl"
    rows = open_runs([run_dir])[0].metrics() if file.is_file() else []
    found = [(row[metric], row["step"]) for row in rows if row["step"] and isinstance(row.get(metric), (int, float))
             and math.isfinite(row[metric])]
    better = max if goal == "max" else min
    value, step = (found[-1] if pick == "last" else better(found, key=lambda pair: pair[0])) if found else (None, None)
    return {"steps": rows[-1]["step"] if rows else 0, "value": value, "step": step}


def ranked(runs, space, directory):
    """The runs with their outcomes: those with a value first, best first; then those without; failed ones last."""
    rows = [run | outcome(directory / run["name"], space.metric, space.goal, space.pick) for run in runs]
    sign = -1 if space.goal == "max" else 1
    return sorted(rows, key=lambda r: (r["status"] == "failed", r["value"] is None, sign * (r["value"] or 0), r["name"]))


def shown(value):
    """A value as a person reads it: 6 digits of a number, JSON of anything but a text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def label(values):
    return ", ".join(f"{name} = {shown(value)}" for name, value in values.items())


def table(rows, space):
    """The runs as a Markdown table, one line each; a failed one ends with its reason."""
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    metric = f"{space.metric} ({space.pick})"
    lines = [["run", *names, metric, "at step", "steps", "time", "status"]]
    for row in rows:
        values = [shown(row["values"][name]) if name in row["values"] else "" for name in names]
        value = ["" if row["value"] is None else f"{row['value']:.4g}", "" if row["step"] is None else str(row["step"])]
        status = row["status"] + (f": {row['reason']}" if row["reason"] else "")
        lines.append([row["name"], *values, *value, str(row["steps"]), f"{row['seconds']:.0f} s", status])
    lines.insert(1, ["---"] * len(lines[0]))
    cell = lambda text: " ".join(text.replace("|", "\\|").split())
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)


def write_results(runs, space, directory):
    """results.md, results.json and, where a run has logged something, curves.svg (the best ones) and report.html (all).
    Returns (the table, the files)."""
    rows = ranked(runs, space, directory)
    text = table(rows, space)
    files = [directory / "results.md", directory / "results.json"]
    write_file(files[0], f"# {directory.name}\n\nBest first by {space.metric} ({space.goal}, {space.pick}).\n\n{text}")
    write_file(files[1], json.dumps({"metric": space.metric, "goal": space.goal, "pick": space.pick, "runs": rows}, indent=2,
                                    ensure_ascii=False) + "\n")
    drawn = [row for row in rows if row["steps"]]
    if drawn:
        dirs = [directory / row["name"] for row in drawn]
        try:
            write_file(directory / "curves.svg", overlay(drawn[:len(COLORS)], directory))
            files.append(directory / "curves.svg")
        except UserError as error:                # runs of which nothing is above 0 have no picture; the table stands
            print(f"no curves.svg: {error}")
        write_report(dirs, directory / "report.html", say=lambda line: None)
        files.append(directory / "report.html")
    return text, files


def overlay(rows, directory):
    """The curves of these runs in one SVG, each named by its values."""
    summaries = [run.summary() for run in open_runs([directory / row["name"] for row in rows])]
    names = [f"{row['name']} {label(row['values'])}"[:44] for row in rows]
    return curves_svg([summary | {"name": name} for name, summary in zip(names, summaries)])
