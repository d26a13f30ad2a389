"""
The measured figures into README.md and docs/*.md, from benchmarks/results/*.json.

    python benchmarks/write_figures.py            # writes what stands between <!-- figures:NAME --> and <!-- /figures -->
    python benchmarks/write_figures.py --check    # writes nothing; exit code 1 where a document doesn't match

NAME is a table or sentence of FIGURES; one whose measurement isn't stored yet says so. Also draws docs/scaling.svg. Needs
nothing but the standard library, apart from the drawing, which is utils/report_curves.py's.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
BLOCK = re.compile(r"<!-- figures:(\w+) -->\n(.*?)<!-- /figures -->", re.S)


def load(folder=RESULTS):
    """{name: record} of the stored measurements."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))}


def table(head, rows):
    """Markdown lines; the first column to the left, the others to the right."""
    return ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def number(value, digits=3):
    """To three significant digits, 12345 as 12,345; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e" in text or abs(value) >= 10**digits else text


def measured(record):
    """One line: when, on what, with which versions."""
    m, v = record["machine"], record["versions"]
    device = {"cpu": f"{m['cores']} cores", "metal": "Metal", "cuda": "CUDA"}[m["device"]]
    names = {"mlx": "MLX", "mlx-lm": "mlx-lm", "mlx-lm-lora": "mlx-lm-lora", "trl": "TRL", "torch": "torch"}
    return (f"{record['date']}, {m['chip']}, {device}, {m['memory_gb']:.0f} GB, {m['system']} {m['architecture']}; "
            + ", ".join(f"{names[p]} {v[p]}" for p in names if p in v)
            + (f"; BLAS {m['blas']}" if m["blas"] else "") + ".")


# ---- the figures: each takes the stored record and returns lines -----------------------------------------------------

def grpo_step(record):
    rows, found = record["rows"], []
    for name, r in rows.items():
        ratio = "" if name == "ours" else f"{r['median_s'] / rows['ours']['median_s']:.2f}x"
        found.append([name, number(r["median_s"]), number(r["best_s"]), number(r["rollout_s"]), ratio,
                      number(r.get("peak_gb")), number(r["resident_gb"])])
    return [*table(["", "median, s", "best median of three, s", "of it rollouts, s", "time of ours", "MLX or CUDA peak, GB",
                    "resident, GB"], found), "", measured(record)]


def rollouts(record):
    rows, found = record["rows"], []
    for name, r in rows.items():
        if name != "limits":
            work, _, who = name.partition(", ")
            ratio = rows[f"{work}, ours"]["tokens_per_s"] / r["tokens_per_s"]
            found.append([work, who, number(r["tokens_per_s"]), "" if who == "ours" else f"{ratio:.2f}",
                          number(r["peak_gb"])])
    limits = rows["limits"]
    return [*table(["", "", "tokens/s", "ours over it", "peak, GB"], found), "",
            f"The machine: {number(limits['matmul_gflops'])} GFLOP/s in float32 matmuls, {number(limits['read_gb_s'])} GB/s "
            f"read, {number(limits['exp_ns'])} ns an exponential. For this model and batch that bounds decoding at "
            f"{number(limits['matmul_tokens_per_s'])} tokens/s (matmuls alone) and {number(limits['read_tokens_per_s'])} "
            "(reading weights, keys and values).", "", measured(record)]


def training_memory(record):
    limit = f"over {record['settings']['limit_gb']:.0f}"
    found = [[f"{r['vocab']:,}", f"{r['rows']} x {r['tokens']}", number(r["ours_gb"]),
              limit if r["full_gb"] is None else number(r["full_gb"]),
              "" if r["full_gb"] is None else f"{r['ours_gb'] / r['full_gb']:.2f}"]
             for r in record["rows"]]
    head = ["vocabulary", "rows x tokens", "ours, GB", "full logits, GB", "ours over full"]
    return [*table(head, found), "", measured(record)]


def shared_prefix(record):
    rows = record["rows"]
    plain, shared = rows["plain"], rows["prefix sharing"]
    found = [[name, number(r["median_s"]), number(r["peak_gb"])] for name, r in rows.items()]
    return [*table(["training", "seconds a step", "peak, GB"], found), "",
            f"{plain['median_s'] / shared['median_s']:.2f} times as fast. " + measured(record)]


def ablation(record):
    rows = record["rows"]
    base, found = rows["as shipped"], []
    for name, r in rows.items():
        options = "<br>".join(f"`{key} = {json.dumps(value)}`" for key, value in r["changed"].items())
        found.append([name, options, number(r["median_s"]), f"{r['median_s'] / base['median_s']:.2f}",
                      number(r["rollout_s"]), number(r["median_s"] - r["rollout_s"]), number(r["peak_gb"])])
    return [*table(["", "changed", "s a step", "of the first", "rollouts, s", "training, s", "peak, GB"], found), "",
            measured(record)]


def scaling(record):
    found = [[r["curve"], r["group"], f"{r['vocabulary']:,}", r["completion"], number(r["median_s"]), number(r["rollout_s"]),
              number(r["peak_gb"])] for r in record["rows"]]
    return ["![seconds and memory by group size, vocabulary and completion length](scaling.svg)", "",
            *table(["varied", "G", "vocabulary", "tokens", "s a step", "of it rollouts, s", "peak, GB"], found), "",
            measured(record)]


def quantised_rollouts(record):
    bits = lambda r: r["bits"] or "full"
    s = record["settings"]
    speed = [[r["shape"], bits(r), number(r["copy_gb"]), number(r["tokens_per_s"]), number(r["peak_gb"]), number(r["gap"])]
             for r in record["rows"] if r["shape"] != "demo"]
    demo = [[bits(r), f"{r['before']:.3f}", f"{r['after']:.3f}", number(r["step_s"])]
            for r in record["rows"] if r["shape"] == "demo"]
    return [f"{s['num_generations']} completions of {s['max_tokens']} tokens of one prompt, random models of about 7 and 100 "
            "million parameters.", "",
            *table(["model", "bits", "weights sampled from, GB", "tokens/s", "peak, GB", "gap, nats"], speed), "",
            *(table(["the demo, bits", "exact match before", "after", "s a step"], demo) + [""] if demo else []),
            measured(record)]


def headline(record):
    """The README's sentence."""
    rows, ours = record["rows"], record["rows"]["ours"]
    s = record["settings"]
    others = ", ".join(f"{name} {number(r['median_s'])} s" + (f" ({number(r['peak_gb'])} GB)" if "peak_gb" in r else "")
                       for name, r in rows.items() if name != "ours")
    return [f"A GRPO step of {s['prompts']} prompts x {s['num_generations']} completions x {s['max_tokens']} tokens takes "
            f"{number(ours['median_s'])} s ({number(ours['peak_gb'])} GB) where {others} ({s['shape'].upper()} parameters, "
            f"{s['dtype']}, {record['machine']['chip']}, {record['machine']['cores']} cores)."]


FIGURES = {  # NAME: (file in benchmarks/results, function)
    "headline": ("grpo_step", headline), "grpo_step": ("grpo_step", grpo_step),
    "grpo_step_cuda": ("grpo_step_cuda", grpo_step),
    "rollouts": ("rollouts", rollouts), "training_memory": ("training_memory", training_memory),
    "shared_prefix": ("shared_prefix", shared_prefix), "ablation": ("ablation", ablation), "scaling": ("scaling", scaling),
    "quantised_rollouts": ("quantised_rollouts", quantised_rollouts),
}


def lines_of(name, records):
    file, render = FIGURES[name]
    return render(records[file]) if file in records else [f"Not measured yet (`benchmarks/results/{file}.json`)."]


def filled(text, records):
    """A document with its figures as stored; raises SystemExit for a name that isn't known."""
    def block(match):
        if match[1] not in FIGURES:
            sys.exit(f"error: figures:{match[1]} is unknown; there are {', '.join(FIGURES)}")
        return f"<!-- figures:{match[1]} -->\n" + "\n".join(lines_of(match[1], records)) + "\n<!-- /figures -->"
    return BLOCK.sub(block, text)


def drawing(record):
    """The curves as an SVG: a row for each curve, seconds and memory."""
    sys.path.insert(0, str(ROOT))
    from mlx_grpo.report_curves import HEIGHT, SVG_STYLE, WIDTH, svg_panel

    parts, curves = [], list(dict.fromkeys(r["curve"] for r in record["rows"]))
    for row, curve in enumerate(curves):
        points = [r for r in record["rows"] if r["curve"] == curve]
        line = lambda value: [(r[curve] / (1000 if curve == "vocabulary" else 1), value(r)) for r in points]   # noqa: B023
        unit = {"group": "G", "vocabulary": "vocabulary, thousands", "completion": "completion, tokens"}[curve]
        times = [("step", 0, line(lambda r: r["median_s"])), ("rollouts", 1, line(lambda r: r["rollout_s"]))]
        memory = [("peak", 2, line(lambda r: r["peak_gb"]))]
        for column, (what, lines) in enumerate((("seconds", times), ("GB", memory))):
            parts += svg_panel({"title": f"{what} by {unit}", "zero": True}, [(*drawn, drawn[2]) for drawn in lines],
                               column * WIDTH, row * HEIGHT)
    width, height = 2 * WIDTH, len(curves) * HEIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([head, "<title>Scaling of a GRPO step</title>", f"<style>{SVG_STYLE}</style>",
                      '<rect width="100%" height="100%"/>', *parts, "</svg>", ""])


def documents(root=ROOT, results=None):
    """{path: the text it should have} of README.md, docs/*.md and the drawing."""
    records = load(results or Path(root, "benchmarks/results"))
    paths = [Path(root, "README.md"), *sorted(Path(root, "docs").glob("*.md"))]
    found = {path: filled(path.read_text(encoding="utf-8"), records) for path in paths}
    if "scaling" in records:
        found[Path(root, "docs/scaling.svg")] = drawing(records["scaling"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    o = parser.parse_args()
    stale = [(path, text) for path, text in documents(o.root).items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path, text in stale:
        if o.check:
            print(f"{path.relative_to(o.root)} doesn't match benchmarks/results; run python benchmarks/write_figures.py",
                  file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(o.root)}")
    return 1 if o.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
