"""
Data sets as Problems: hub data sets, local .jsonl, .csv and .parquet files, made tasks; training and held-out split.
Part of mlx_grpo, which gives all of these names out again.
"""

import csv
import io
import json
import random
import re
from dataclasses import replace
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


def build_prompt(row, config, where, examples=()):
    """The prompt of a row: text, or chat messages. examples: (question, answer text) pairs that stand before the question,
    as turns of the chat, or as text with a line between question and answer. Raises UserError naming `where`."""
    question = question_of(row[config.prompt_column], config, where)
    shots = [(question_of(shown, config, where), answer) for shown, answer in examples]
    if config.prompt_format == "text":
        system = [config.system_prompt] if config.system_prompt else []
        return "\n\n".join([*system, *(f"{shown}\n{answer}" for shown, answer in shots), question])
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    if question[0]["role"] == "system":
        system, question = question[:1], question[1:]
    turns = [m for shown, answer in shots for m in (*shown, {"role": "assistant", "content": answer})
             if m["role"] != "system"]
    return [*system, *turns, *question]


def question_of(value, config, where):
    """The value of the prompt column: text where prompt_format is "text", else chat messages. Raises UserError."""
    if isinstance(value, str):
        return value if config.prompt_format == "text" else [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{where}: {config.prompt_column!r} must be text or a list of chat messages, got {value!r}")
    messages = check_messages(value, where, config.prompt_column)
    if config.prompt_format == "text":
        raise UserError(f'{where}: {config.prompt_column!r} holds chat messages; set prompt_format = "chat"')
    return messages


def make_problem(row, config, where):
    """A Problem from one row (a dictionary). Raises UserError naming `where` and the missing column."""
    for option in ("prompt_column", "answer_column", "solution_column"):
        column = vars(config)[option]
        if column and row.get(column) in (None, "", []):
            raise UserError(f"{where}: no {column!r} (the row has {', '.join(map(repr, row)) or 'nothing'}); mend the row, "
                            f"or set {option} to the right column" + ' ("" = no gold answers)' * (option == "answer_column"))
    prompt, answer = build_prompt(row, config, where), row.get(config.answer_column)
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


def load_rows(config, options):
    """(training rows, held-out rows), each [(row, where)], of config.dataset with these dataset_options, in the data's order
    or, with shuffle, a seeded one. Raises UserError."""
    order = random.Random(f"split {config.seed}")
    name, held_out = config.dataset, []
    task = name.partition(":")[2]
    if name.startswith(("synthetic:", "reasoning_gym:")):
        count = config.max_train_samples or 2000
        total = count + 2 * config.eval_samples
        if name.startswith("synthetic:"):
            from mlx_grpo.synthetic import generate

            rows = [(row, f"{name} row {i}") for i, row in enumerate(generate(task, total, config.seed, options=options))]
        else:
            from mlx_grpo.gym_tasks import gym_rows

            rows = gym_rows(task, total, config.seed, options)
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
    if not rows:
        raise UserError(f"dataset {name!r} has no training rows; name one that has, or lower eval_fraction")
    return rows[:config.max_train_samples or None], held_out


def load_problems(config):
    """(training problems, held-out problems) as `config` describes them. Held-out problems are those of eval_split for a hub
    data set, else a seeded share of the rows; one that asks what a training problem asks is left out. Several data sets, and
    the levels of a curriculum, are mixed evenly. Raises UserError, for a data set without rows too."""
    from mlx_grpo.few_shot import with_examples
    from mlx_grpo.sources import sources_of

    parts = []
    for source in sources_of(config):
        for level, options in enumerate(source.levels):
            marks = {"data_source": source.name} if source.name else {}
            marks |= {"curriculum_level": level} if source.config.curriculum else {}
            make = lambda rows: [replace(make_problem(marks | row, source.config, where), source=source.name, level=level)
                                 for row, where in rows]
            parts.append((source.config, *map(make, load_rows(source.config, options))))
    asked = {json.dumps(p.prompt) for _, train, _ in parts for p in train}
    new = lambda problems: [p for p in problems if json.dumps(p.prompt) not in asked][:config.eval_samples]
    parts = [(with_examples(train, train, c), with_examples(new(held_out), train, c)) for c, train, held_out in parts]
    return evenly([train for train, _ in parts]), evenly([held_out for _, held_out in parts])[:config.eval_samples]


def evenly(lists):
    """One list of all items, in which every part of it holds its share of each."""
    placed = [((i + 0.5) / len(items), k, item) for k, items in enumerate(lists) for i, item in enumerate(items)]
    return [item for _, _, item in sorted(placed, key=lambda p: p[:2])]


def as_problems(dataset, config, pool=None):
    """The dataset with its rows made Problems; their few-shot examples are drawn from `pool`, or from the dataset itself."""
    from mlx_grpo.few_shot import with_examples

    made = [row if isinstance(row, Problem) else make_problem(row, config, f"row {i}") for i, row in enumerate(dataset)]
    places = [i for i, row in enumerate(dataset) if not isinstance(row, Problem)]
    if places:
        for i, problem in zip(places, with_examples([made[i] for i in places], made if pool is None else pool, config)):
            made[i] = problem
    return made


def is_right(problem, text):
    """Whether a completion is right: reasoning_gym's scorer gives it 1, or, for other data, its answer is the gold one."""
    from mlx_grpo import extract_answer, same_answer

    if entry := problem.columns.get("reasoning_gym"):
        from mlx_grpo.gym_tasks import score_answer

        return score_answer(extract_answer(text), entry) >= 1
    return same_answer(extract_answer(text), problem.answer)
