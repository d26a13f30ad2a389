"""`train --watch`: rows as they arrive, each trained on once, also over kills, and the gate before checkpoint-best."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import mlx_grpo
import pytest
from conftest import ROOT
from mlx_grpo import ConfigError, MLXGRPOConfig, TrainerCallback, UserError, load_model, load_problems, main, newest_valid, read_metrics
from mlx_grpo.synthetic import generate
from mlx_grpo.watch import WatchedRows, WatchTrainer
from test_trainer import CONFIG, numbers

ROWS = [{"question": row["question"], "answer": row["answer"]} for row in generate("chain", 40, seed=99)]
WATCH = replace(CONFIG, watch="rows.jsonl", watch_idle=0.01, max_steps=0, lr_scheduler_type="constant", learning_rate=1e-3,
                max_new_tokens=8, max_completion_length=8, save_best="reward", log_jsonl=True)      # four rows a step


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)


def append(rows, file="rows.jsonl"):
    with open(file, "a", encoding="utf-8") as out:
        out.writelines(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def make(run_dir, config=WATCH, **options):
    problems, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name)
    return WatchTrainer(model, tokenizer, config.rewards, config, problems, held_out, run_dir=run_dir, **options)


def asked(run_dir):
    """The questions in the order in which they were trained on, one for each group."""
    lines = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().split("\n") if line]
    return [line["prompt"][-1]["content"] for line in lines[::CONFIG.num_generations]]


def questions(rows):
    return [row["question"] for row in rows]


# ---- rows

def test_rows_are_trained_on_once_in_their_order_and_what_does_not_fill_a_step_waits(tmp_path, capsys):
    append(ROWS[:10])
    make(tmp_path / "run", replace(WATCH, logging_steps=1)).train()
    assert asked(tmp_path / "run") == questions(ROWS[:8])
    metrics = read_metrics(tmp_path / "run")
    assert [(m["watch/rows"], m["watch/waiting"]) for m in metrics] == [(4, 6), (8, 2)] and "epoch" not in metrics[0]
    told = capsys.readouterr().out
    assert "2 of 4 rows for step 3" in told and "step 2 |" in told and "min left" not in told
    assert (tmp_path / "run" / "checkpoint-last").resolve().name == "checkpoint-2"


def test_rows_that_come_while_it_runs_are_taken(tmp_path):
    """From a callback in the middle of a step's work, and from another thread while the trainer waits."""
    class Producer(TrainerCallback):
        def on_step_end(self, trainer, metrics):
            append(ROWS[4 * trainer.step_count:4 * trainer.step_count + 4] if trainer.step_count < 3 else [])

    append(ROWS[:2])
    threading.Timer(0.5, append, [ROWS[2:4]]).start()
    make(tmp_path / "run", replace(WATCH, watch_idle=3.0), callbacks=[Producer()]).train()
    assert asked(tmp_path / "run") == questions(ROWS[:12])


def test_a_file_that_is_not_there_yet_is_waited_for(tmp_path):
    rows = WatchedRows("rows.jsonl", lambda row, where: row)
    assert rows.read() == 0
    append(ROWS[:1])
    assert rows.read() == 1 and rows.problems == ROWS[:1]


def test_a_line_without_its_end_waits_and_is_read_once(tmp_path):
    rows = WatchedRows("rows.jsonl", lambda row, where: row)
    whole = json.dumps({"question": "ä\u2028b"}, ensure_ascii=False).encode() + b"\n"
    with open("rows.jsonl", "wb") as file:
        for cut in range(len(whole)):
            file.write(whole[cut:cut + 1])
            file.flush()
            assert rows.read() == (cut + 1 == len(whole))
    assert rows.problems == [{"question": "ä\u2028b"}] and rows.read() == 0


@pytest.mark.parametrize("line, words", [
    ('{"question": "2+2", "answ\n', "not JSON"), ("[1, 2]\n", "expected an object"), ('{"question": "2+2"}\n', "no 'answer'"),
    ('{"question": 7, "answer": "1"}\n', "must be text"), ("\udcff\n", "not JSON"), ('{"question": "\\ud800", "answer": "1"}\n', "not JSON"),
    ("[" * 100_000 + "\n", "not JSON"), (json.dumps({"question": "1+" * 400 + "1", "answer": "1"}) + "\n", "max_prompt_length"),
    (json.dumps({"question": [{"role": 1}], "answer": "1"}) + "\n", "role")])
def test_a_row_that_can_not_be_used_is_one_line_with_its_number_skipped_and_counted(line, words, tmp_path, capsys):
    append([ROWS[0], "\n"])
    with open("rows.jsonl", "ab") as file:
        file.write(line.encode("utf-8", "surrogateescape"))
    append(ROWS[1:4])
    make(tmp_path / "run").train()
    told = [text for text in capsys.readouterr().err.splitlines() if "skipped" in text]
    assert len(told) == 1 and words in told[0] and "rows.jsonl:3" in told[0] and "1 so far" in told[0]
    assert asked(tmp_path / "run") == questions(ROWS[:4]) and read_metrics(tmp_path / "run")[-1]["watch/skipped"] == 1


def test_a_row_that_the_gate_asks_too_is_skipped(tmp_path, capsys):
    config = replace(WATCH, eval_samples=3)
    held_out = load_problems(config)[1]
    append([{"question": held_out[1].prompt[-1]["content"], "answer": "1"}, *ROWS[:4]])
    make(tmp_path / "run", config).train()
    assert "held-out problem asks the same" in capsys.readouterr().err and asked(tmp_path / "run") == questions(ROWS[:4])


def test_rows_are_shown_few_shot_examples_of_the_data_set_and_the_gate_still_knows_its_questions(tmp_path, capsys):
    config = replace(WATCH, eval_samples=3, few_shot=2, max_prompt_length=1000)
    train, held_out = load_problems(config)
    append([{"question": held_out[1].prompt[-1]["content"], "answer": "1"}, *ROWS[:4]])
    trainer = make(tmp_path / "run", config)
    trainer.train()
    assert "held-out problem asks the same" in capsys.readouterr().err and asked(tmp_path / "run") == questions(ROWS[:4])
    pool = {p.columns["question"] for p in train}
    for row, problem in zip(ROWS, trainer.rows.problems, strict=False):
        shown = [m["content"] for m in problem.prompt if m["role"] == "user"]
        assert len(shown) == 3 and shown[2] == row["question"] and set(shown[:2]) <= pool - {row["question"]}


def test_examples_for_watched_rows_can_not_come_from_several_data_sets():
    with pytest.raises(ConfigError, match="name a file of examples"):
        replace(WATCH, dataset=MLXGRPOConfig.dataset, dataset_options={}, few_shot=2,
                datasets=[{"dataset": "synthetic:chain"}, {"dataset": "synthetic:sort"}])


def test_a_step_that_runs_out_of_rows_has_used_none(tmp_path):
    """Dynamic sampling draws further rows in the middle of a step; where there are none, the step is not made."""
    config = replace(WATCH, dynamic_sampling=True, max_gen_batches=3, rewards=["int"])           # all rewards equal
    append(ROWS[:14])
    trainer = make(tmp_path / "run", config)
    trainer.train()
    assert trainer.step_count == 1 and trainer.prompts_drawn == 12
    state = json.loads((tmp_path / "run/checkpoint-1/trainer_state.json").read_text())
    assert state["watched"]["rows"] == state["prompts_drawn"] == 12 and state["watched"]["lines"] == 12


# ---- resume

def test_a_resumed_run_goes_on_behind_the_rows_of_its_checkpoint(tmp_path, capsys):
    append([*ROWS[:3], "broken\n", *ROWS[3:9]])
    make(tmp_path / "run").train()
    capsys.readouterr()
    append(ROWS[9:12])
    again = make(tmp_path / "run")
    again.load_checkpoint(tmp_path / "run/checkpoint-2")
    again.train()
    assert asked(tmp_path / "run") == questions(ROWS[:12])
    assert capsys.readouterr().err == ""                                     # the broken line was told when it was read
    assert read_metrics(tmp_path / "run")[-1]["watch/skipped"] == 1


def test_a_file_that_was_changed_or_cut_is_refused(tmp_path):
    append(ROWS[:8])
    make(tmp_path / "run").train()
    for content in (json.dumps(ROWS[30]) + "\n", "".join(json.dumps(row) + "\n" for row in ROWS[8:20])):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(UserError, match="shorter|not the file"):
            make(tmp_path / "run").load_checkpoint(tmp_path / "run/checkpoint-2")
    rows = WatchedRows("rows.jsonl", lambda row, where: row)
    rows.read()
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(UserError, match="become shorter"):
        rows.read()
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="vanished"):
        rows.read()


def command(tmp_path, output, *more, **changes):
    values = {"output_dir": output, "run_name": "r", "max_steps": 0, "save_steps": 1, "eval_samples": 8, "eval_steps": 2, "batch_size": 2,
              "num_generations": 4, "max_train_samples": 16, "lr_scheduler_type": "constant", "learning_rate": 1e-3} | changes
    return [sys.executable, str(ROOT / "mlx_grpo.py"), "--config", str(ROOT / "configs/demo.toml"), "--watch", str(tmp_path / "rows.jsonl"),
            *sum((["--set", f"{k}={v}"] for k, v in values.items()), []), *more]


def finish(*args):
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def state_of(run):
    last = newest_valid(run)[0]
    logged = [numbers(m) for m in read_metrics(run)]
    return last.name, (last / "model.safetensors").read_bytes(), logged, (run / "completions.jsonl").read_text(), \
        (run / "checkpoint-best").resolve().name if (run / "checkpoint-best").exists() else None


@pytest.mark.soak
def test_killed_while_rows_arrive_it_resumes_to_the_bytes_of_an_unbroken_run(tmp_path):
    append(ROWS[:12])
    finish(*command(tmp_path, "whole", max_steps=6))                          # two rows a step
    (tmp_path / "rows.jsonl").unlink()
    rng, sent, hits = random.Random(1), 0, 0
    for _ in range(3):
        process = subprocess.Popen(command(tmp_path, "broken", "--resume", max_steps=6), stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True)
        append([json.dumps(ROWS[sent])[:20]])                                # the producer is in the middle of a line
        for line in process.stdout:
            if line.startswith("waiting"):
                break
        append([json.dumps(ROWS[sent])[20:] + "\n", *ROWS[sent + 1:sent + 3]])
        sent += 3
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        process.wait()
        hits += 1
    append(ROWS[sent:12])
    finish(*command(tmp_path, "broken", "--resume", max_steps=6))
    assert hits == 3 and state_of(tmp_path / "broken/r") == state_of(tmp_path / "whole/r")
    assert asked(tmp_path / "broken/r") == questions(ROWS[:12])


def test_a_signal_ends_the_wait_with_a_checkpoint(tmp_path):
    append(ROWS[:3])
    process = subprocess.Popen(command(tmp_path, "out", save_steps=0), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("waiting"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "saved checkpoint-1" in errors and "--resume" in errors
    append(ROWS[3:4])
    told = finish(*command(tmp_path, "out", "--resume", "--watch-idle", "0.1")).stdout
    assert "0 of 2 rows for step 3, which stay for --resume" in told and asked(tmp_path / "out/r") == questions(ROWS[:4])


# ---- the gate

def gated(tmp_path, monkeypatch, values, **changes):
    """A run whose evaluations give these exact matches, the first before training; the best checkpoint after each step."""
    given, best = iter(values), []
    monkeypatch.setattr(mlx_grpo, "evaluate", lambda *_: ({"exact_match": next(given)}, [""] * 3))

    class Look(TrainerCallback):
        def on_step_end(self, trainer, metrics):
            link = tmp_path / "run/checkpoint-best"
            best.append(link.resolve().name if link.exists() else None)

    append(ROWS[:4 * len(values)])
    make(tmp_path / "run", replace(WATCH, save_best="", eval_samples=3, eval_steps=1, **changes), callbacks=[Look()]).train()
    return best[1:]                                    # after step 1, 2, ...: seen when the next one ends


def test_only_a_better_model_is_promoted_and_the_first_is_measured_against_the_start(tmp_path, monkeypatch, capsys):
    assert gated(tmp_path, monkeypatch, [0.5, 0.4, 0.5, 0.6, 0.6, 0.55, 0.7, 0.1], max_steps=7) == [
        None, None, "checkpoint-3", "checkpoint-3", "checkpoint-3", "checkpoint-6"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gate:")]
    assert "0.4, best so far 0.5: not promoted" in told[0] and "checkpoint-best is now step 3" in told[2] and len(told) == 7
    assert (tmp_path / "run/checkpoint-best").resolve().name == "checkpoint-6"


def test_below_the_target_nothing_is_promoted(tmp_path, monkeypatch, capsys):
    assert gated(tmp_path, monkeypatch, [0.1, 0.4, 0.7, 0.8, 0.75], watch_target=0.75, max_steps=4) == [None, None, "checkpoint-3"]
    assert "target 0.75: not promoted" in capsys.readouterr().out


def test_a_kill_between_checkpoint_and_link_leaves_no_promotion_out(tmp_path, monkeypatch):
    gated(tmp_path, monkeypatch, [0.1, 0.4, 0.7], max_steps=2)
    (tmp_path / "run/checkpoint-best").unlink()
    again = make(tmp_path / "run", replace(WATCH, save_best="", eval_samples=3, eval_steps=1, max_steps=2))
    again.load_checkpoint(tmp_path / "run/checkpoint-2")
    assert again.best == 0.7 and (tmp_path / "run/checkpoint-best").resolve().name == "checkpoint-2"


# ---- what is refused

def test_what_can_not_be_watched_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no last step that lr_scheduler_type = 'cosine'"):
        MLXGRPOConfig(watch="rows.jsonl")
    with pytest.raises(ConfigError, match="there is no evaluation"):
        make(tmp_path / "run", replace(WATCH, save_best=""))
    with pytest.raises(UserError, match="no directory nowhere"):
        make(tmp_path / "run", replace(WATCH, watch="nowhere/rows.jsonl"))
    with pytest.raises(UserError, match="sft trains on"):
        main(["sft", "--config", str(ROOT / "configs/demo.toml"), "--watch", "rows.jsonl"])
    append(ROWS[:2])
    with pytest.raises(UserError, match="2 of 4 rows.*not one step"):
        make(tmp_path / "run").train()
    append(ROWS[2:4])
    make(tmp_path / "run").train()
    with pytest.raises(ConfigError, match="watch was 'rows.jsonl', is 'other.jsonl'"):
        make(tmp_path / "run", replace(WATCH, watch="other.jsonl")).load_checkpoint(tmp_path / "run/checkpoint-1")
