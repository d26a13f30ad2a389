"""
One self-contained HTML page from the files of one or more runs: curves, completions, before and after, health, options.

    python utils/report.py outputs/a -o report.html
    python utils/report.py outputs/a outputs/b -o report.html  # the runs together, and how they differ
    python utils/report.py outputs/a -o report.html --follow   # written anew while the run goes on
    python utils/report.py outputs/a --svg curves.svg          # the main curves for a README

The page opens from the disk, loads nothing and sends nothing. It is made from the run's files alone (docs/report.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

import base64                                                  # noqa: E402
import hashlib                                                 # noqa: E402
import json                                                    # noqa: E402
import os                                                      # noqa: E402
import re                                                      # noqa: E402
import time                                                    # noqa: E402
from html import escape                                        # noqa: E402

from mlx_grpo import UserError, run_command                    # noqa: E402
from mlx_grpo.command_line import Parser                       # noqa: E402
from mlx_grpo.files import human_bytes                         # noqa: E402
from mlx_grpo.help_text import help_of                      # noqa: E402
from mlx_grpo.report_curves import charts_for, curves_png, curves_svg    # noqa: E402
from mlx_grpo.report_data import Run, pack, pack_completions   # noqa: E402

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_COMPLETIONS, MAX_MB, INTERVAL = 8000, 12.0, 30


def run_names(run_dirs):
    """A short name for each directory: its last part, with as many of its parents as tell it from the others.
    ["a/x", "b/x", "b/y"] -> ["a/x", "b/x", "y"]. Raises UserError for a directory given twice."""
    paths = [Path(directory).resolve() for directory in run_dirs]
    if twice := [given for given, path in zip(run_dirs, paths) if paths.count(path) > 1]:
        raise UserError(f"{twice[0]} is given twice; name each run once")
    def tail(path, length):
        return "/".join(path.parts[-length:])
    def name(path):
        length = 1
        while any(tail(other, length) == tail(path, length) for other in paths if other != path):
            length += 1
        return tail(path, length)
    return [name(path) for path in paths]


def open_runs(run_dirs):
    problems = {}                      # shared, so that the same problem has one number in all runs
    return [Run(directory, name, problems) for directory, name in zip(run_dirs, run_names(run_dirs))]


def content_hash(template, tag):
    """What the page's Content-Security-Policy allows to run: its own script and style, whatever a completion holds."""
    content = re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def page(runs, refresh, max_completions, max_mb):
    """(HTML text, completions in it). refresh: seconds after which the open page loads itself again, 0 = never."""
    for run in runs:
        for rows in run.completions:
            rows.update()
    summaries = [run.summary() for run in runs]
    charts, more = charts_for(dict.fromkeys(key for run in summaries for key in run["metrics"]))
    data = pack(json.dumps({"runs": summaries, "charts": charts, "more": more, "refresh": refresh,
                            "written": time.strftime("%Y-%m-%d %H:%M")}, ensure_ascii=False, allow_nan=False))
    template = TEMPLATE.read_text(encoding="utf-8")
    room = int(max_mb * 1e6) - len(template.encode()) - len(data)
    completions, kept = pack_completions(runs, max_completions, room)
    parts = {"TITLE": escape(", ".join(run.name for run in runs)), "DATA": data, "COMPLETIONS": completions,
             "STYLE_HASH": content_hash(template, "style"), "SCRIPT_HASH": content_hash(template, "script")}
    return re.sub("@@([A-Z_]+)@@", lambda found: parts[found[1]], template), kept


def write_file(file, content):
    """Write text or bytes under a temporary name and rename it: a reader never sees half a page. Raises UserError."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        os.replace(temporary, file)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise UserError(f"can't write {file}: {error.strerror}; choose another place") from error


def write_report(run_dirs, output, follow=False, *, max_completions=MAX_COMPLETIONS, max_mb=MAX_MB, interval=INTERVAL,
                 say=print):
    """Write the page for these run directories to `output`. follow: again whenever a file has changed, looking every
    `interval` seconds, until Ctrl-C. say: gets a line about each page. Raises UserError where a directory holds no run,
    or a file can't be read or written."""
    runs = open_runs(run_dirs)
    def write(refresh):
        content, kept = page(runs, refresh, max_completions, max_mb)
        write_file(output, content)
        logged = sum(len(offsets) for run in runs for rows in run.completions for offsets in rows.groups.values())
        say(f"{output}: {human_bytes(len(content.encode()))}, {kept} of {logged} completions")
    if not follow:
        return write(0)
    seen = None
    try:
        while True:
            if (now := [run.signature() for run in runs]) != seen:
                write(interval)
                seen = now
            time.sleep(interval)
    except KeyboardInterrupt:
        write(0)


def add_arguments(parser):
    parser.add_argument("run", nargs="+", help="a run's directory; several are drawn together")
    parser.add_argument("-o", "--output", metavar="FILE",
                        help="the page (default: report.html, unless --svg or --png is given)")
    parser.add_argument("--follow", action="store_true", help="write it anew while the run goes on, until Ctrl-C")
    parser.add_argument("--interval", type=float, default=INTERVAL, metavar="S",
                        help=f"seconds between looks with --follow (default: {INTERVAL})")
    parser.add_argument("--completions", type=int, default=MAX_COMPLETIONS, metavar="N",
                        help=f"embed a sample of at most so many (default: {MAX_COMPLETIONS})")
    parser.add_argument("--max-mb", type=float, default=MAX_MB, metavar="MB",
                        help=f"size of the page at most (default: {MAX_MB:g})")
    parser.add_argument("--svg", metavar="FILE", help="write the main curves as an SVG")
    parser.add_argument("--png", metavar="FILE", help="write the main curves as a PNG (needs matplotlib)")


def run(args):
    """One self-contained HTML page from the files of one or more runs: curves, completions, before and after, health,
    options (docs/report.md).

    examples:
      python mlx_grpo.py report outputs/a -o report.html
      python mlx_grpo.py report outputs/a outputs/b -o report.html
      python mlx_grpo.py report outputs/a -o report.html --follow
    """
    if not (0 < args.interval < 1e6 and 0 < args.max_mb < 1e6 and args.completions >= 0):     # NaN is none of it
        raise UserError("--interval and --max-mb must be above 0 and below a million, --completions not below 0; "
                        f"got {args.interval}, {args.max_mb} and {args.completions}")
    summaries = [run.summary() for run in open_runs(args.run)] if args.svg or args.png else []
    if args.svg:
        write_file(args.svg, curves_svg(summaries))
        print(args.svg)
    if args.png:
        write_file(args.png, curves_png(summaries))
        print(args.png)
    if args.output or not summaries or args.follow:
        write_report(args.run, args.output or "report.html", args.follow, max_completions=args.completions,
                     max_mb=args.max_mb, interval=args.interval)
    return 0


def main():
    parser = Parser(**help_of(__doc__))
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
