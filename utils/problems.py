"""
Data sets as Problems: hub data sets, local .jsonl, .csv and .parquet files, synthetic tasks; training and held-out split.
Part of mlx_grpo, which gives all of these names out again.
"""

import csv
import io
import json
import random
import re
from pathlib import Path

from mlx_grpo import Problem, UserError, extract_hash_answer, shipped_path


def worked_solution(answer_text):
    """A GSM8K answer as a demonstration in the XML format: its steps without <<...>> marks, then its number."""
    steps, _, number = answer_text.rpartition("####")
    steps = re.sub(r"<<[^>]*>>", "", steps).strip()
    return f"<reasoning>\n{steps}\n</reasoning>\n<answer>\n{number.strip().replace(',', '')}\n</answer>"


def check_messages(messages, where, column):
    """Chat messages as a list of {"role", "content"}. Raises UserError where an item is something else."""
    fits = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
    if not all(map(fits, messages)):
        raise UserError(f"{where}: {column!r} is a list, so each item must have a role and a content, both text")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def parse_row(line, where):
    """The value on one line of a JSONL file. Raises UserError naming `where`."""
    try:
        row = json.loads(line)
        if "\\u" in line:                                   # "\\ud83d" alone is half a character, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend or remove the line") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error.object[error.start]!a} is half a character (a lone surrogate); mend the "
                        "line") from error
    except (ValueError, RecursionError) as error:           # a number of thousands of digits, thousands of brackets
        raise UserError(f"{where}: not JSON that can be read ({error}); mend or remove the line") from error
    return row


def make_problem(row, config, where):
    """A Problem from one row (a dictionary). Raises UserError naming `where` and the missing column."""
    for option in ("prompt_column", "answer_column", "solution_column"):
        column = vars(config)[option]
        if column and row.get(column) in (None, "", []):
            raise UserError(f"{where}: no {column!r} (the row has {', '.join(map(repr, row)) or 'nothing'}); mend the row, or "
                            f"set {option} to the right column" + ' ("" = no gold answers)' * (option == "answer_column"))
    prompt, answer = row[config.prompt_column], row.get(config.answer_column)
    if isinstance(prompt, list):
        prompt = check_messages(prompt, where, config.prompt_column)
        if config.prompt_format == "text":
            raise UserError(f'{where}: {config.prompt_column!r} holds chat messages; set prompt_format = "chat"')
    elif isinstance(prompt, str):
        prompt = prompt if config.prompt_format == "text" else [{"role": "user", "content": prompt}]
    else:
        raise UserError(f"{where}: {config.prompt_column!r} must be text or a list of chat messages, got {prompt!r}")
    if config.system_prompt and isinstance(prompt, str):
        prompt = f"{config.system_prompt}\n\n{prompt}"
    elif config.system_prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    text = None if answer is None else str(answer)
    marked = text is not None and "####" in text
    gold = extract_hash_answer(text) if marked else text
    solution = str(row[config.solution_column]) if config.solution_column else worked_solution(text) if marked else None
    return Problem(prompt, gold, {**row, "answer": gold}, solution)


def read_rows(path):
    """[(row, "file:line")] of a .jsonl, .csv or .parquet file. Raises UserError naming file and line."""
    path = shipped_path(path)
    try:
        if path.suffix == ".parquet":
            import pyarrow.lib
            import pyarrow.parquet

            try:
                table = pyarrow.parquet.read_table(path)
            except pyarrow.lib.ArrowInvalid as error:
                raise UserError(f"{path}: not a parquet file: {error}; check dataset") from error
            return [(row, f"{path} row {i + 1}") for i, row in enumerate(table.to_pylist())]
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: can't read the data: {error.strerror or error}; check dataset") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}; save it as UTF-8") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows, line = [], 2
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{line}: the row has not as many fields as the header "
                                    f"({len(reader.fieldnames)}); quote fields that hold a comma")
                rows.append((row, f"{path}:{line}"))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not CSV: {error}; mend or remove the line") from error
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):       # not splitlines: JSON text may hold other line separators
        if line.strip():
            row = parse_row(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise UserError(f'{path}:{number}: expected an object with columns, {{"question": ..., "answer": ...}}, got '
                                f"{type(row).__name__}; mend or remove the line")
            rows.append((row, f"{path}:{number}"))
    return rows


def hub_rows(name, config_name, split):
    """Rows of one split of a data set of the hub, or of a local directory in its layout. Raises UserError."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data = load_dataset(name, config_name or None, split=split)
    except (ConnectionError, FileNotFoundError, ValueError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"dataset {name!r} (dataset_config {config_name!r}, split {split!r}): {reason}; check these names "
                        '(dataset_config = "" is its default, eval_split = "" holds out a share of the rows), or name a local '
                        ".jsonl, .csv or .parquet file") from error
    return [(dict(row), f"{name} {split} row {i}") for i, row in enumerate(data)]


def load_problems(config):
    """(training problems, held-out problems) as `config` describes them, in the data's order or, with shuffle, a seeded
    one. Held-out problems are those of eval_split for a hub data set, else a seeded share of the rows; one that asks
    what a training problem asks is left out. Raises UserError, for a data set without rows too."""
    order = random.Random(f"split {config.seed}")
    name, held_out = config.dataset, []
    if name.startswith("synthetic:"):
        from mlx_grpo.synthetic import generate

        count = config.max_train_samples or 2000
        made = generate(name.removeprefix("synthetic:"), count + 2 * config.eval_samples, config.seed,
                        options=config.dataset_options)
        rows = [(row, f"{name} row {i}") for i, row in enumerate(made)]
        rows, held_out = rows[:count], rows[count:]
    elif Path(name).suffix in (".jsonl", ".csv", ".parquet"):
        rows = read_rows(name)
    else:
        name = str(shipped_path(name))
        rows = hub_rows(name, config.dataset_config, config.dataset_split)
        if config.eval_split and config.eval_samples:
            held_out = hub_rows(name, config.dataset_config, config.eval_split)
    if not held_out and config.eval_samples and config.eval_fraction:
        chosen = set(order.sample(range(len(rows)), int(len(rows) * config.eval_fraction)))
        rows, held_out = [r for i, r in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]
    if config.shuffle:
        order.shuffle(rows)
        order.shuffle(held_out)
    problems = [make_problem(row, config, where) for row, where in rows[:config.max_train_samples or None]]
    if not problems:
        raise UserError(f"dataset {name!r} has no training rows; name one that has, or lower eval_fraction")
    asked = {json.dumps(p.prompt) for p in problems}
    held_out = [make_problem(row, config, where) for row, where in held_out]
    return problems, [p for p in held_out if json.dumps(p.prompt) not in asked][:config.eval_samples]
