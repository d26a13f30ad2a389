"""
What the report draws: the charts and which metrics belong to them; and the main curves as a small SVG or, with
matplotlib, a PNG for a README.
"""

import io
import math
from html import escape

from mlx_grpo import UserError

# series: label -> metric; a "*" in the metric stands for any name, which becomes the label. band: "around" a metric, by
# another (mean and spread), or "between" two. zero: the axis starts at 0. total: the series are parts of it,
# and "other" is the rest.
CHARTS = [
    {"title": "Reward", "note": "weighted sum, mean ± standard deviation",
     "series": {"mean": "reward"}, "band": ["around", "reward", "reward_std"]},
    {"title": "Reward by function", "note": "mean of each function, before weighting",
     "series": {"*": "rewards/*/mean"}},
    {"title": "Exact match", "note": "share of problems answered right", "zero": True,
     "series": {"held out": "eval/exact_match", "training subset": "eval_train/exact_match"}},
    {"title": "Groups without a signal", "note": "share of groups with equal rewards, which teach nothing",
     "zero": True, "series": {"share": "frac_reward_zero_std"}},
    {"title": "Completion length", "note": "tokens; the band is shortest to longest", "zero": True,
     "series": {"mean": "completions/mean_length", "mean of ended": "completions/mean_terminated_length"},
     "band": ["between", "completions/min_length", "completions/max_length"]},
    {"title": "Cut at the length limit", "note": "share of completions without an end token", "zero": True,
     "series": {"share": "completions/clipped_ratio"}},
    {"title": "KL to the reference", "note": "nats per token; 0 where kl_coeff is 0", "zero": True,
     "series": {"kl": "kl"}},
    {"title": "Entropy", "note": "nats per token; near 0 nothing new is tried",
     "zero": True, "series": {"entropy": "entropy"}},
    {"title": "Clip fraction", "note": "share of tokens whose ratio was clipped", "zero": True,
     "series": {"either": "clip_ratio/region_mean", "low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"}},
    {"title": "Sampler-trainer gap", "note": "of a token's log-prob, sampled against trained, nats",
     "zero": True, "series": {"mean": "sampling/sampling_logp_difference/mean",
                              "max": "sampling/sampling_logp_difference/max"}},
    {"title": "Gradient norm", "note": "before clipping", "zero": True, "series": {"norm": "grad_norm"}},
    {"title": "Loss", "note": "near 0 on policy whatever is learnt: watch the reward", "series": {"loss": "loss"}},
    {"title": "Learning rate", "note": "of the update", "zero": True, "series": {"rate": "learning_rate"}},
    {"title": "Memory", "note": "GB", "zero": True, "series": {"*": "*_gb"}},
    {"title": "Memory in use", "note": "share of the device's limit, of the system's memory, of its swap", "zero": True,
     "series": {"*": "machine/*_share"}},
    {"title": "Time by phase", "note": "seconds of a step", "zero": True, "series": {"*": "*_s"}, "total": "step_time"},
    {"title": "Health", "note": "the trainer's warnings, steps so far at which each held", "series": {"*": "health/*"}},
]
README = ["Exact match", "Reward", "Reward by function", "Completion length", "Entropy", "KL to the reference"]
COLORS = ["#2f6db5", "#c4622d", "#2e8b67", "#8a5fb0", "#a98a1f", "#b8435a", "#3f8fa3", "#777f8c"]


def matching(pattern, keys):
    """{label: key} of the keys that fit a metric with one "*", which stands for the label."""
    head, _, tail = pattern.partition("*")
    return {key[len(head):len(key) - len(tail)]: key for key in keys
            if key.startswith(head) and key.endswith(tail) and len(key) > len(head) + len(tail)}


def charts_for(keys):
    """(charts, more) for these metrics: the known charts that have a metric, and one chart for each metric in none."""
    keys = list(keys)
    charts, used = [], set()
    for chart in CHARTS:
        series = {}
        for label, metric in chart["series"].items():
            series |= matching(metric, keys) if "*" in metric else {label: metric} if metric in keys else {}
        wanted = [*chart.get("band", [])[1:], *([chart["total"]] if "total" in chart else [])]
        if "total" in chart and chart["total"] in keys and not series:
            series = {"step": chart["total"]}
        used |= set(series.values()) | set(wanted)
        if series:
            band = chart.get("band") if all(key in keys for key in chart.get("band", [])[1:]) else None
            charts.append(chart | {"series": series, "band": band, "named": "*" in chart["series"]})
    more = [{"title": key, "note": "", "series": {key: key}} for key in keys if key not in used | {"epoch"}]
    return charts, more


# ---- pictures for a README -------------------------------------------------------------------------------------------

def smooth(values):
    """The mean of each value and its neighbours, a twenty-fifth of the run together; short runs stay as they are.
    smooth([0, 3, 0] * 20) is about 1 everywhere, smooth([0, 3, 0]) is [0, 3, 0]."""
    reach = len(values) // 50
    near = [values[max(0, i - reach):i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]


def ticks(low, high, count=5):
    """About `count` round numbers from low to high: ticks(0, 0.8) -> [0, 0.2, 0.4, 0.6, 0.8]."""
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    size = next(m * scale for m in (1, 2, 5, 10) if m * scale >= raw * 0.999)
    return [round(i * size, 12) for i in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def panels(runs, count=6):
    """[(chart, [(label, color number, [(step, value)], the same smoothed)])] of at most `count` charts for a README. A
    line is a metric, or, of several runs, a run with the chart's first metric. What is 0 throughout is left out. Raises
    UserError where nothing is left."""
    keys = dict.fromkeys(key for run in runs for key in run["metrics"])
    charts = {chart["title"]: chart for chart in charts_for(keys)[0]}
    found = []
    for chart in [charts[title] for title in README if title in charts]:
        series = list(chart["series"].items())
        wanted = [(label, runs[0], key) for label, key in series]
        if len(runs) > 1:
            wanted = [] if chart["named"] else [(run["name"], run, series[0][1]) for run in runs]
        lines = []
        for i, (label, run, key) in enumerate(wanted):
            points = [(step, v) for step, v in zip(run["steps"], run["metrics"].get(key, [])) if v is not None]
            if any(v for _, v in points):
                smoothed = list(zip([step for step, _ in points], smooth([v for _, v in points])))
                lines.append((label, i % len(COLORS), points, smoothed))
        if lines:
            found.append((chart, lines))
    if not found:
        raise UserError("the runs have no metrics to draw yet (looked for " + ", ".join(README) + ")")
    return found[:count]


def limits(chart, lines):
    """(first step, last step, lowest, highest value) of a panel, never empty."""
    points = [point for _, _, raw, _ in lines for point in raw]
    steps, values = zip(*points)
    low, high = min(values), max(values)
    low = min(low, 0) if chart.get("zero") else low
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1
    return min(steps), max(max(steps), min(steps) + 1), low - margin * (low != 0), high + margin


WIDTH, HEIGHT, LEFT = 320, 210, 42       # of a panel and the margin of its axis, in pixels
SVG_STYLE = """text { font: 11px system-ui, sans-serif; fill: #57606a }
.title { font-size: 13px; font-weight: 600; fill: #1f2328 }
path { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.raw { opacity: .25; stroke-width: 1 }
.grid { stroke: #d0d7de; stroke-width: .5 }
rect { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 } .title { fill: #f0f6fc } .grid { stroke: #3d444d } rect { fill: #0d1117 }
}"""


def svg_legend(lines, left, top):
    """(elements, rows): a swatch and a name for each line, as many to a row as fit; none for a single line."""
    parts, x, row = [], 0, 0
    for label, color, _, _ in lines if len(lines) > 1 else []:
        width = 28 + 6.2 * len(label)
        if x and x + width > WIDTH - LEFT:
            x, row = 0, row + 1
        parts += [f'<path stroke="{COLORS[color]}" d="M{left + x:.1f},{top + 14 * row - 4}h10"/>',
                  f'<text x="{left + x + 14:.1f}" y="{top + 14 * row}">{escape(label)}</text>']
        x += width
    return parts, row + 1 if parts else 0


def svg_panel(chart, lines, left, top):
    """One chart as SVG elements, its corner at (left, top)."""
    first, last, low, high = limits(chart, lines)
    legend, rows = svg_legend(lines, left + LEFT, top + 33)
    upper, lower = top + 30 + 14 * rows, top + HEIGHT - 26
    x = lambda step: left + LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 16)
    y = lambda value: lower - (value - low) / (high - low) * (lower - upper)
    path = lambda points: "M" + "L".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    parts = [f'<text class="title" x="{left + LEFT}" y="{top + 16}">{escape(chart["title"])}</text>', *legend]
    for value in ticks(low, high):
        parts += [f'<path class="grid" d="M{x(first):.1f},{y(value):.1f}H{x(last):.1f}"/>',
                  f'<text x="{left + LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>']
    for step in [step for step in ticks(first, last) if step == int(step)]:
        parts.append(f'<text x="{x(step):.1f}" y="{top + HEIGHT - 8}" text-anchor="middle">{step:g}</text>')
    for _, color, raw, smoothed in lines:
        if raw != smoothed:
            parts.append(f'<path class="raw" stroke="{COLORS[color]}" d="{path(raw)}"/>')
        parts.append(f'<path stroke="{COLORS[color]}" d="{path(smoothed)}"/>')
    return parts


def curves_svg(runs):
    """The curves of runs (Run.summary) as an SVG text that follows the reader's light or dark mode."""
    shown = panels(runs)
    columns = min(3, len(shown))
    width, height = columns * WIDTH, math.ceil(len(shown) / columns) * HEIGHT
    parts = [part for i, (chart, lines) in enumerate(shown)
             for part in svg_panel(chart, lines, i % columns * WIDTH, i // columns * HEIGHT)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    title = escape(", ".join(run["name"] for run in runs))
    return "\n".join([head, f"<title>{title}</title>", f"<style>{SVG_STYLE}</style>",
                      '<rect width="100%" height="100%"/>', *parts, "</svg>", ""])


def curves_png(runs):
    """The same curves as the bytes of a PNG. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png needs matplotlib: pip install matplotlib (--svg needs nothing)") from error
    shown = panels(runs)
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
    for axes, (chart, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, shown):
        for label, color, raw, smoothed in lines:
            axes.plot(*zip(*smoothed), color=COLORS[color], label=label, linewidth=1.5)
            if raw != smoothed:
                axes.plot(*zip(*raw), color=COLORS[color], alpha=0.25, linewidth=0.8)
        axes.set_title(chart["title"], fontsize=10, loc="left")
        axes.set_ylim(*limits(chart, lines)[2:])
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(fontsize=7, frameon=False)
    for axes in list(figure.axes)[len(shown):]:
        axes.remove()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()
