"""
Reads the files of training runs for utils/report.py: config.json, metrics.jsonl, completions.jsonl and, where there is
one, eval_completions.jsonl. Nothing of a run is changed, and the texts of its completions are never all in memory.
"""

import base64
import hashlib
import json
import math
import zlib
from collections import deque
from itertools import zip_longest
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.health import explanation

MAX_POINTS = 4000          # steps of a run in the page; longer runs are thinned to every 2nd, 3rd, ... step
PAIRED = {"train": 24, "eval": 200}    # problems whose first and last completions come first, for before and after
COLUMNS = {"step", "prompt", "answer", "completion", "rewards", "reward", "advantage", "length", "ended", "correct",
           "token_ids", "token_texts", "token_logprobs"}       # of a completion; others are its extras


def parse(line, where):
    """The object on one line of a JSONL file. Raises UserError naming `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); remove the line if the run was broken off there") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(f'{where}: expected an object with a whole number as "step", got {line[:60]!r}; remove the line')
    return row


def whole_lines(file, start=0):
    """(offset, line) of the lines that end in a newline, from byte `start`: the last one may not be written out yet."""
    with open(file, "rb") as handle:
        handle.seek(start)
        for line in handle:
            if not line.endswith(b"\n"):
                return
            yield start, line
            start += len(line)


def number(x, digits=6):
    """A float with so many significant digits; None where x is no number or not finite."""
    return float(f"{x:.{digits}g}") if isinstance(x, (int, float)) and math.isfinite(x) else None


class Rows:
    """Where the rows of a completions file lie, by group; read again from where it stopped when the file has grown.

    groups: (step, problem) -> byte offsets. problems: shared by all files, digest of prompt and answer -> number."""

    def __init__(self, file, split, problems):
        self.file, self.split, self.problems = Path(file), split, problems
        self.forget()

    def forget(self):
        self.identity, self.offset, self.lines, self.last_step, self.groups = None, 0, 0, -math.inf, {}

    def update(self):
        """Index what was added since the last time, or everything where the file was replaced."""
        if not self.file.exists():
            return self.forget()
        status = self.file.stat()
        if status.st_ino != self.identity or status.st_size < self.offset:
            self.forget()
            self.identity = status.st_ino
        for offset, line in whole_lines(self.file, self.offset):
            self.lines += 1
            row = parse(line, f"{self.file} line {self.lines}")
            if row["step"] < self.last_step:      # the run was started again from an earlier step
                self.groups = {key: rows for key, rows in self.groups.items() if key[0] < row["step"]}
            self.last_step, self.offset = row["step"], offset + len(line)
            text = json.dumps([row.get("prompt"), row.get("answer")])
            problem = self.problems.setdefault(hashlib.sha256(text.encode()).digest(), len(self.problems))
            self.groups.setdefault((row["step"], problem), []).append(offset)

    def read(self, offsets):
        """The rows at these offsets. Raises UserError where the file was replaced since `update`."""
        with open(self.file, "rb") as handle:
            for offset in offsets:
                handle.seek(offset)
                yield parse(handle.readline(), f"{self.file} byte {offset} (has it changed since? then run this again)")


class Run:
    """One run directory. `name` is what the page calls it. Raises UserError where it holds no run."""

    def __init__(self, directory, name, problems):
        self.directory, self.name = Path(directory), name
        self.metrics_file = self.directory / "metrics.jsonl"
        if not self.metrics_file.is_file():
            raise UserError(f"no run in {directory} (looked for metrics.jsonl); give a directory that `train` wrote")
        self.completions = [Rows(self.directory / "completions.jsonl", "train", problems),
                            Rows(self.directory / "eval_completions.jsonl", "eval", problems)]
        for file in (self.directory / "config.json", *(rows.file for rows in self.completions)):
            if file.is_dir():
                raise UserError(f"{file} is a directory where a run has a file; remove it")

    def signature(self):
        """Changes when one of the run's files does."""
        files = [self.directory / "config.json", self.metrics_file, *(rows.file for rows in self.completions)]
        return [(f.stat().st_ino, f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else None for f in files]

    def record(self):
        """The object in config.json; {} where there is none."""
        file = self.directory / "config.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}); mend or remove it") from error
        return record if isinstance(record, dict) else {}

    def metrics(self):
        """The metrics of each step, oldest first; of a step that was done again after a restart, only the last ones."""
        rows = {}
        for i, (_, line) in enumerate(whole_lines(self.metrics_file), 1):
            row = parse(line, f"{self.metrics_file} line {i}")
            for step in [step for step in reversed(rows) if step >= row["step"]]:
                del rows[step]
            rows[row["step"]] = row
        return list(rows.values())

    def summary(self):
        """What the page shows of the run besides completions: name, record, steps, metrics as columns, warnings."""
        rows = self.metrics()
        thinned = max(1, math.ceil(len(rows) / MAX_POINTS))
        kept = [row for i, row in enumerate(rows)
                if i % thinned == 0 or i == len(rows) - 1 or any("exact_match" in key for key in row)]
        plain = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
        keys = dict.fromkeys(key for row in kept for key, value in row.items() if plain(value) and key != "step")
        columns = {key: [number(row[key]) if plain(row.get(key)) else None for row in kept] for key in keys}
        return {"name": self.name, "record": self.record(), "steps": [row["step"] for row in kept], "thinned": thinned,
                "metrics": columns, "warnings": health_warnings(rows),
                "seconds": number(sum(number(row.get("step_time")) or 0 for row in rows)),
                "logged": sum(len(offsets) for rows in self.completions for offsets in rows.groups.values())}

    def groups(self):
        """(rows, step, problem, offsets) of every group, the ones most worth keeping first: the first and the last of
        problems met more than once, then groups spread evenly over the steps."""
        pairs, by_step = [], {}
        for rows in self.completions:
            met = {}
            for (step, problem), offsets in rows.groups.items():
                met.setdefault(problem, []).append((rows, step, problem, offsets))
                by_step.setdefault(step, []).append((rows, step, problem, offsets))
            pairs += [group for groups in [g for g in met.values() if len(g) > 1][:PAIRED[rows.split]]
                      for group in (groups[0], groups[-1])]
        rounds = zip_longest(*(by_step[step] for step in spread(sorted(by_step))))
        everything = pairs + [group for turn in rounds for group in turn if group]
        return list({(rows.split, step, problem): (rows, step, problem, offsets)
                     for rows, step, problem, offsets in everything}.values())


def spread(items):
    """The items in the order first, last, middle, quarters, ...: wherever one stops, the whole is covered evenly.
    [0, 1, 2, 3, 4] -> [0, 4, 2, 1, 3]."""
    order, gaps = dict.fromkeys([0, len(items) - 1] if items else []), deque([(0, len(items) - 1)])
    while gaps:
        low, high = gaps.popleft()
        middle = (low + high) // 2
        if low < middle < high:
            order[middle] = None
            gaps += [(low, middle), (middle, high)]
    return [items[i] for i in order]


def health_warnings(rows):
    """[{text, first, last, count}] of what the trainer warned of: the metrics named health/* that are true, a text, or a
    number other than 0, those of the health monitor with its advice; and the entries of "warnings", which a callback may
    add. The same warning at several steps is one entry."""
    found = {}
    for row in rows:
        warnings = row.get("warnings") or []
        texts = [warning_text(w) for w in (warnings if isinstance(warnings, list) else [warnings])]
        for key, value in row.items():
            if key.startswith("health/") and value:
                name = key.removeprefix("health/")
                texts.append(explanation(key) or (f"{name}: {value}" if isinstance(value, str) else name))
        for text in dict.fromkeys(texts):
            entry = found.setdefault(text, {"text": text, "first": row["step"], "last": row["step"], "count": 0})
            entry["last"], entry["count"] = row["step"], entry["count"] + 1
    return list(found.values())


def warning_text(warning):
    """A warning as one text: itself, the "message" or "text" of an object, or the object as JSON."""
    if isinstance(warning, dict):
        warning = warning.get("message") or warning.get("text") or warning
    return warning if isinstance(warning, str) else json.dumps(warning, ensure_ascii=False)


def pack(text):
    """Text as base64 of gzip, which holds no character that HTML knows."""
    return base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), wbits=31)).decode("ascii")


def completion_entry(run, split, problem, row):
    """A completion as the page's script reads it: [run, split, step, problem, completion, rewards, reward, advantage,
    length, ended, extras or None, [[text, log-prob], ...] or None]."""
    rewards, texts, logprobs = (row.get(name) or [] for name in ("rewards", "token_texts", "token_logprobs"))
    rewards = {name: number(value) for name, value in rewards.items()} if isinstance(rewards, dict) else {}
    extras = {key: value for key, value in row.items() if key not in COLUMNS and value is not None}
    tokens = [[t, number(p, 4)] for t, p in zip(texts, logprobs)] if len(texts) == len(logprobs) else []
    return [run, split, row["step"], problem, row.get("completion") or "", rewards,
            number(row.get("reward") if split == "train" else row.get("correct")), number(row.get("advantage")),
            row.get("length"), row.get("ended"), extras or None, tokens or None]


def pack_completions(runs, max_rows, max_chars):
    """(text, rows kept): a sample of the runs' completions, packed, at most `max_chars` long. Inside are lines of JSON:
    an object for each new problem, a list for each completion (completion_entry)."""
    stream, parts, packed, kept, misses, seen = zlib.compressobj(wbits=31), [], 0, 0, 0, set()
    turns = zip_longest(*([(i, *group) for group in run.groups()] for i, run in enumerate(runs)))
    for run, rows, step, problem, offsets in (group for turn in turns for group in turn if group):
        offsets = offsets[:max_rows - kept]
        if not offsets or misses == 20:      # full; or nearly, and no small group was found that fits
            break
        lines = []
        for row in rows.read(offsets):
            if problem not in seen and not lines:
                lines.append({"problem": problem, "prompt": row.get("prompt"), "answer": row.get("answer")})
            lines.append(completion_entry(run, rows.split, problem, row))
        text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
        trial = stream.copy()
        piece = trial.compress(text.encode("utf-8", "replace")) + trial.flush(zlib.Z_SYNC_FLUSH)
        if (packed + len(piece) + 100) * 4 / 3 > max_chars:
            misses += 1
            continue
        stream, packed, kept = trial, packed + len(piece), kept + len(offsets)
        parts.append(piece)
        seen.add(problem)
    return base64.b64encode(b"".join(parts) + stream.flush()).decode("ascii"), kept
