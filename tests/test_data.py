"""Data: every source gives the same problems, nothing held out is trained on, a bad row is named by file and line."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from mlx_grpo import (R1_SYSTEM_PROMPT, MLXGRPOConfig, UserError, as_problems, extract_hash_answer, fitting_problems,
                      load_problems, make_problem, read_rows, render_prompt, worked_solution)

ROWS = [{"question": f"What is {i} + {i + 1}?",
         "answer": f"It is {i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}.\n#### {2 * i + 1}",
         "level": i % 3} for i in range(40)]
CONFIG = MLXGRPOConfig(eval_samples=200)


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_csv(path, rows=ROWS):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_parquet(path, rows=ROWS):
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def load(dataset, **options):
    return load_problems(replace(CONFIG, dataset=dataset, **options))


def refusal(dataset, **options):
    with pytest.raises(UserError) as caught:
        load(dataset, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def questions(problems):
    return [p.columns["question"] for p in problems]


# ---- sources

@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_every_file_format_gives_the_same_problems(write, tmp_path):
    suffix = write.__name__.removeprefix("write_")
    train, held_out = load(write(tmp_path / f"data.{suffix}"))
    assert len(train) == 36 and len(held_out) == 4
    assert sorted(questions(train + held_out)) == sorted(r["question"] for r in ROWS)
    for p in train:
        i = next(i for i, r in enumerate(ROWS) if r["question"] == p.columns["question"])
        assert p.prompt == [{"role": "system", "content": R1_SYSTEM_PROMPT},
                            {"role": "user", "content": ROWS[i]["question"]}]
        assert p.answer == p.columns["answer"] == str(2 * i + 1)
        assert str(p.columns["level"]) == str(i % 3)                              # other columns are kept for rewards
        assert p.solution == (f"<reasoning>\nIt is {i} + {i + 1} = {2 * i + 1}.\n</reasoning>\n"
                              f"<answer>\n{2 * i + 1}\n</answer>")
    assert questions(train) == questions(load(str(write_jsonl(tmp_path / "same.jsonl")))[0])


GSM8K = """
import json, sys
from dataclasses import replace
from mlx_grpo import MLXGRPOConfig, UserError, load_problems
train, held_out = load_problems(replace(MLXGRPOConfig(), dataset=sys.argv[1], eval_samples=3, max_train_samples=5))
small, _ = load_problems(replace(MLXGRPOConfig(), dataset=sys.argv[1], dataset_config="socratic", eval_samples=0))
print(json.dumps([[[p.prompt, p.answer, p.solution] for p in part] for part in (train, held_out, small)]))
for wrong in ({"dataset": "openai/gsm8k"}, {"dataset_config": "mian"}, {"eval_split": "validation"},
              {"dataset": "nowhere"}):
    try:
        load_problems(replace(MLXGRPOConfig(), **{"dataset": sys.argv[1]} | wrong))
    except UserError as error:
        print(error)
"""


def test_gsm8k_comes_through_the_datasets_library_with_its_configurations_and_splits(tmp_path):
    """The real load_dataset call on files in the layout of openai/gsm8k, in a process that the hub is shut to."""
    for name in ("main", "socratic"):
        (tmp_path / "gsm8k" / name).mkdir(parents=True)
        rows = [{"question": r["question"] if name == "main" else "Why? " + r["question"], "answer": r["answer"]}
                for r in ROWS]
        write_parquet(tmp_path / "gsm8k" / name / "train-00000-of-00001.parquet", rows[:30])
        write_parquet(tmp_path / "gsm8k" / name / "test-00000-of-00001.parquet",
                      rows[28:])       # two are in train as well
    (tmp_path / "gsm8k" / "README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        f"  - split: test\n    path: {name}/test-*\n"
        for name in ("main", "socratic")) + "---\n")
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"),
                                "PYTHONPATH": str(ROOT), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run([sys.executable, "-c", GSM8K, "gsm8k"], cwd=tmp_path, env=environment, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    train, held_out, small = json.loads(lines[0])
    assert len(train) == 5 and len(held_out) == 3 and len(small) == 30
    in_train, in_test = {r["question"] for r in ROWS[:30]}, {r["question"] for r in ROWS[28:]}
    assert {p[0][1]["content"] for p in train} <= in_train and {p[0][1]["content"] for p in held_out} <= in_test
    assert not {p[0][1]["content"] for p in train} & {p[0][1]["content"] for p in held_out}
    assert small[0][0][1]["content"].startswith("Why? ")
    assert train[0][0][0] == {"role": "system", "content": R1_SYSTEM_PROMPT}
    assert all(p[1].isdigit() and p[2].endswith(f"<answer>\n{p[1]}\n</answer>") for p in train)
    assert len(lines) == 5        # the hub out of reach, a wrong configuration, split, directory: one line each
    for line, word in zip(lines[1:], ("'openai/gsm8k'", "'mian'", "'validation'", "'nowhere'")):
        assert line.startswith("dataset '") and word in line and ".jsonl" in line


def test_synthetic_problems_come_from_the_seed_alone():
    options = dict(dataset="synthetic:chain", dataset_options={"length": 3}, max_train_samples=20, eval_samples=10)
    train, held_out = load_problems(replace(CONFIG, **options))
    assert len(train) == 20 and len(held_out) == 10
    assert [p.answer for p in train] == [p.answer for p in load_problems(replace(CONFIG, **options))[0]]
    assert questions(train) != questions(load_problems(replace(CONFIG, **options, seed=1))[0])
    assert all(q.count("*") + q.count("+") == 3 for q in questions(train))
    assert not set(questions(train)) & set(questions(held_out))
    with pytest.raises(UserError, match="did you mean 'chain'"):
        load("synthetic:chian")


def test_the_shipped_word_problems_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, held_out = load("data/word_problems.jsonl")
    assert len(train) + len(held_out) >= 300 and len(held_out) >= 30


# ---- columns and prompts

def test_columns_can_have_other_names(tmp_path):
    rows = [{"task": f"Name {i}", "gold": i, "demo": f"It is {i}", "extra": "x"} for i in range(4)]
    for write in (write_jsonl, write_csv, write_parquet):
        path = write(tmp_path / f"data.{write.__name__.removeprefix('write_')}", rows)
        train, _ = load(path, prompt_column="task", answer_column="gold", solution_column="demo", shuffle=False,
                        eval_samples=0)
        assert [(p.prompt[1]["content"], p.answer, p.solution, p.columns["extra"]) for p in train] == [
            (f"Name {i}", str(i), f"It is {i}", "x") for i in range(4)]


def test_an_empty_answer_column_means_that_there_are_no_gold_answers(tmp_path):
    train, _ = load(write_jsonl(tmp_path / "a.jsonl", [{"question": "Sing."}]), answer_column="", eval_samples=0)
    assert train[0].answer is None and train[0].solution is None


def test_chat_messages_are_kept_and_get_the_system_prompt_only_where_they_have_none():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
             {"role": "user", "content": "2+2?"}]
    problem = make_problem({"question": turns, "answer": "4"}, CONFIG, "here")
    assert problem.prompt == [{"role": "system", "content": R1_SYSTEM_PROMPT}, *turns]
    own = [{"role": "system", "content": "Be brief."}, *turns]
    assert make_problem({"question": own, "answer": "4"}, CONFIG, "here").prompt == own
    assert make_problem({"question": turns, "answer": "4"}, replace(CONFIG, system_prompt=""), "here").prompt == turns


def test_text_prompts_stay_text_where_asked():
    row = {"question": "2+2=", "answer": "4"}
    assert make_problem(row, replace(CONFIG, prompt_format="text", system_prompt=""), "here").prompt == "2+2="
    assert make_problem(row, replace(CONFIG, prompt_format="text", system_prompt="Add."),
                        "here").prompt == "Add.\n\n2+2="
    with pytest.raises(UserError, match="here: 'question' holds chat messages"):
        make_problem({"question": [{"role": "user", "content": "x"}], "answer": "4"},
                     replace(CONFIG, prompt_format="text"), "here")


@pytest.mark.parametrize("text, answer", [("so 3.\n#### 1,234", "1234"), ("#### 1 #### 2", "2"), ("no marker", None),
                                          ("####", "")])
def test_the_answer_stands_after_the_last_marker(text, answer):
    assert extract_hash_answer(text) == answer


def test_a_worked_solution_is_a_demonstration_in_the_xml_format():
    assert worked_solution("2+3=<<2+3=5>>5 pens.\n#### 1,005") == (
        "<reasoning>\n2+3=5 pens.\n</reasoning>\n<answer>\n1005\n</answer>")


# ---- splits

def test_held_out_rows_are_never_trained_on_whatever_the_seed_and_the_number_of_rows(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS + ROWS[:10])        # ten rows stand in it twice
    for options in ({}, {"seed": 1}, {"max_train_samples": 7}, {"shuffle": False}, {"eval_fraction": 0.5}):
        train, held_out = load(path, **options)
        assert held_out and not set(questions(train)) & set(questions(held_out)), options


def test_the_held_out_rows_do_not_depend_on_how_many_are_trained_on(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    assert questions(load(path)[1]) == questions(load(path, eval_samples=4)[1])
    assert questions(load(path)[1]) == questions(load(path, max_train_samples=5)[1])
    assert questions(load(path)[1]) != questions(load(path, seed=5)[1])


def test_the_numbers_of_problems_are_as_asked(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    for options, sizes in (({"max_train_samples": 5}, (5, 4)), ({"eval_samples": 2}, (36, 2)),
                           ({"eval_samples": 0}, (40, 0)),
                           ({"eval_fraction": 0.25}, (30, 10)), ({"eval_fraction": 0}, (40, 0))):
        assert tuple(map(len, load(path, **options))) == sizes, options


def test_without_shuffle_the_rows_come_in_their_order(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl")
    ordered = questions(load(path, shuffle=False, eval_samples=0)[0])
    shuffled = questions(load(path, eval_samples=0)[0])
    assert ordered == [r["question"] for r in ROWS] != shuffled and sorted(ordered) == sorted(shuffled)


# ---- bad rows

@pytest.mark.parametrize("line, words", [
    ('{"question": "q"}', ["no 'answer'", "answer_column"]), ('{"answer": "1"}', ["no 'question'", "prompt_column"]),
    ('{"question": "", "answer": "1"}', ["no 'question'"]), ('{"question": "q", "answer": null}', ["no 'answer'"]),
    ("{}", ["no 'question'", "nothing"]), ('{"question": "q", ', ["not JSON"]), ("[1, 2]", ["an object", "list"]),
    ("7", ["int"]),
    ('{"question": 5, "answer": "1"}', ["must be text or a list of chat messages", "5"]),
    ('{"question": [{"role": "user"}], "answer": "1"}', ["role and a content"]),
    ('{"question": [{"role": "user", "content": null}], "answer": "1"}', ["role and a content"]),
    ('{"question": ["hello"], "answer": "1"}', ["role and a content"])])
def test_a_bad_json_line_is_named(line, words, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n\n' + line + "\n")
    message = refusal(str(path), eval_samples=0)
    assert message.startswith(f"{path}:3: ") and all(word in message for word in words)


def test_a_bad_csv_row_is_named_by_the_line_that_it_starts_on(tmp_path):
    path = tmp_path / "data.csv"
    for bad, word in (("only one", "fields"), ("a,b,c", "fields"), (",5", "no 'question'"), ('"open,5', "not CSV")):
        path.write_text('question,answer\n"two\nlines",4\n' + bad + "\n")
        message = refusal(str(path), eval_samples=0)
        assert message.startswith(f"{path}:4: ") and word in message
    path.write_text('question,answer\n"two\nlines, a comma",4\n')
    assert load(str(path), eval_samples=0, system_prompt="")[0][0].prompt[0]["content"] == "two\nlines, a comma"


def test_a_bad_parquet_row_is_named(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [{"question": "q", "answer": "1"},
                                                     {"question": "r", "answer": None}])
    assert refusal(path, eval_samples=0).startswith(f"{path} row 2: no 'answer'")
    (tmp_path / "text.parquet").write_text("not parquet at all")
    assert "not a parquet file" in refusal(str(tmp_path / "text.parquet"))


def test_line_separators_inside_json_text_do_not_split_a_row(tmp_path):
    text = "one\u2028two\u0085three\x0bfour"
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": text, "answer": "1"}])
    assert read_rows(path)[0][0]["question"] == text


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    for name, text in (("a.csv", "question,answer\nq,1\n"), ("a.jsonl", '{"question": "q", "answer": "1"}\n')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_rows(tmp_path / name)[0][0]["question"] == "q"


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.csv", "missing.parquet"])
def test_a_missing_file_is_named(name):
    assert refusal(name).startswith(f"{name}: can't read the data")


def test_a_file_that_is_not_text_and_one_without_rows_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\xff"}')
    assert "not UTF-8" in refusal(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("\n")
    assert "no training rows" in refusal(str(tmp_path / "a.jsonl"))


def test_rows_given_from_python_are_checked_too():
    assert as_problems([{"question": "q", "answer": "1"}], CONFIG)[0].answer == "1"
    with pytest.raises(UserError, match="row 1: no 'question'"):
        as_problems([{"question": "q", "answer": "1"}, {"answer": "1"}], CONFIG)


# ---- long prompts

class Letters:
    """A tokenizer of one token for each letter, with a chat template or without."""

    def __init__(self, has_chat_template):
        self.has_chat_template = has_chat_template

    def encode(self, text):
        return list(text.encode())

    def apply_chat_template(self, messages, add_generation_prompt, thinking=True):
        assert add_generation_prompt
        return [0 if thinking else 1, *"".join(m["content"] for m in messages).encode()]


def test_long_prompts_are_dropped_whole_and_counted(capsys):
    config = replace(CONFIG, system_prompt="", max_prompt_length=21)
    problems = as_problems([{"question": "x" * n, "answer": "1"} for n in (10, 20, 21, 400)], config)
    kept = fitting_problems(problems, Letters(True), config)
    assert [len(p.columns["question"]) for p in kept] == [10, 20]
    assert "2 of 4 prompts" in capsys.readouterr().err
    assert kept == fitting_problems(kept, Letters(True), config) and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="max_prompt_length = 5; raise it"):
        fitting_problems(problems, Letters(True), replace(config, max_prompt_length=5))


def test_a_prompt_goes_through_the_chat_template_with_its_options_or_as_text():
    config = replace(CONFIG, system_prompt="S", chat_template_kwargs={"thinking": False})
    chat = make_problem({"question": "q", "answer": "1"}, config, "here")
    text = make_problem({"question": "q", "answer": "1"}, replace(config, prompt_format="text"), "here")
    assert render_prompt(Letters(True), chat, config) == [1, *b"Sq"]
    assert render_prompt(Letters(False), chat, config) == list(b"S\n\nq\n")
    assert render_prompt(Letters(True), text, config) == list(b"S\n\nq")
