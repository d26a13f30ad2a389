"""Commands: each of them from start to end on a tiny model, as a function and as a process, and every way in which a
run is refused before anything is written."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import ROOT
from mlx_grpo import COMMANDS, HEAD_CHUNK, OPTIONS, REWARDS, UserError, load_model, main, read_metrics, same_answer
from test_trainer import numbers
from tiny_models import QUICK, sets, tiny_qwen2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen2(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def first_run(model, tmp_path_factory):
    """(directory of runs, run directory) of a finished run of four steps that saved and evaluated every second one."""
    output = tmp_path_factory.mktemp("outputs")
    assert main(["train", *options(model, output, run_name="first", max_steps=4, save_steps=2, eval_steps=2)]) == 0
    return output, output / "first"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty directory: relative paths are found in the project, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)


def options(model, output, **changes):
    return sets(**QUICK | {"model_name": model, "output_dir": str(output), "run_name": "run"} | changes)


def refusal(*argv):
    with pytest.raises(UserError) as caught:
        main([str(a) for a in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def process(*argv, cwd, **environment):
    """The script as users start it, in another working directory."""
    return subprocess.run([sys.executable, str(ROOT / "mlx_grpo.py"), *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True,
                          env=os.environ | environment, timeout=120)


def weights(directory):
    return mx.load(str(directory / "model.safetensors"))


# ---- train

def test_a_run_leaves_its_configuration_log_report_and_checkpoints(first_run):
    _, run = first_run
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "completions.jsonl", "eval_completions.jsonl", "report.html",
                                               "run_state.json", "checkpoint-2", "checkpoint-4", "checkpoint-last", ".lock"}
    record = json.loads((run / "config.json").read_text())
    assert record["config"].keys() == OPTIONS.keys() == record["sources"].keys()
    assert record["config"]["max_steps"] == 4 and record["sources"]["max_steps"] == "--set"
    assert record["sources"]["kl_coeff"] == "default" and record["seed"] == 0 and record["command"] == "train"
    assert {"python", "mlx", "mlx-lm", "numpy"} <= record["versions"].keys()
    assert record["device"].startswith("Device(")
    assert record["git"] is None or len(record["git"]) >= 7


def test_the_metrics_hold_one_object_a_step_and_evaluations_at_their_steps(first_run):
    _, run = first_run
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert [m["step"] for m in metrics if "eval/exact_match" in m] == [0, 2, 4]
    needed = {"reward", "reward_std", "frac_reward_zero_std", "loss", "kl", "entropy", "grad_norm", "learning_rate",
              "epoch",
              "num_tokens", "step_time", "completions/mean_length", "clip_ratio/region_mean"}
    needed |= {f"rewards/{name}/mean" for name in ("correctness", "even_share")}
    assert all(needed <= m.keys() for m in metrics[1:])
    assert all(m["reward_std"] > 0 and m["grad_norm"] > 0 for m in metrics[1:])
    assert [m["num_tokens"] for m in metrics[1:]] == sorted(m["num_tokens"] for m in metrics[1:])


def test_every_completion_is_logged_with_its_rewards_and_advantage(first_run):
    _, run = first_run
    rows = lines_of(run / "completions.jsonl")
    assert len(rows) == 4 * 2 * QUICK["num_generations"]
    for row in rows:
        assert row["rewards"].keys() == {"correctness", "even_share"} and row["reward"] == sum(row["rewards"].values())
        assert {"step", "prompt", "completion", "advantage", "answer", "length", "ended"} <= row.keys()


def test_training_is_the_command_where_none_is_named(model, tmp_path, capsys):
    assert main(options(model, tmp_path, max_steps=1, eval_samples=0)) == 0
    told = capsys.readouterr().out
    assert "1 steps of 2 prompts x 4" in told and "step 1/1 | reward " in told and str(tmp_path / "run") in told


def test_the_smoke_test_trains_a_small_qwen_on_word_problems_with_checkpoints_and_resume(model, tmp_path):
    """The line of the README, as a process from another directory; then the same run in two parts."""
    line = ["--config", ROOT / "configs" / "smoke_test.toml",
            *sets(model_name=model, dataset="data/word_problems.jsonl")]
    whole = process(*line, *sets(output_dir="whole"), cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "whole" / "smoke-1"
    assert "exact match on 8 held-out problems" in whole.stdout
    assert (run / "checkpoint-4" / "trainer_state.json").exists()
    assert [m["step"] for m in read_metrics(run) if "eval/exact_match" in m] == [0, 2, 4]
    assert [m["step"] for m in read_metrics(run) if "eval_train/exact_match" in m] == [0, 4]
    again = process(*line, *sets(output_dir="whole"), "--resume", run / "checkpoint-2", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [p.name for p in (tmp_path / "whole").iterdir()] == ["smoke-1"]             # the numbered run itself went on
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 4]
    assert len(lines_of(run / "completions.jsonl")) == 4 * 2 * 4


def test_a_resumed_run_ends_with_the_weights_and_the_log_of_an_unbroken_one(first_run, model, tmp_path):
    _, unbroken = first_run
    common = dict(run_name="run", save_steps=2, eval_steps=2)
    main(["train", *options(model, tmp_path, **common, max_steps=2)])
    main(["train", *options(model, tmp_path, **common, max_steps=4), "--resume"])
    resumed = tmp_path / "run"
    a, b = weights(unbroken / "checkpoint-4"), weights(resumed / "checkpoint-4")
    assert a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)
    assert list(map(numbers, read_metrics(unbroken))) == list(map(numbers, read_metrics(resumed)))
    assert lines_of(unbroken / "completions.jsonl") == lines_of(resumed / "completions.jsonl")


# ---- which run

def test_a_directory_that_holds_a_run_is_refused_with_the_two_ways_out(first_run, model):
    output, run = first_run
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    message = refusal(*options(model, output, run_name="first"))
    assert str(run) in message and "--resume auto" in message and "run_name" in message
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_numbered_runs_take_the_next_free_number_and_resume_goes_on_with_the_last(model, tmp_path, capsys):
    quick = options(model, tmp_path, run_name="demo-{n}", max_steps=1, eval_samples=0)
    names = lambda: sorted(p.name for p in tmp_path.glob("demo-*"))
    main(quick)
    main(quick)
    assert names() == ["demo-1", "demo-2"]
    main([*options(model, tmp_path, run_name="demo-{n}", max_steps=2, eval_samples=0), "--resume", "auto"])
    assert names() == ["demo-1", "demo-2"] and (tmp_path / "demo-2" / "checkpoint-2").is_dir()
    assert "resuming from" in capsys.readouterr().out
    main(quick)
    assert names()[-1] == "demo-3"
    assert json.loads((tmp_path / "demo-3" / "config.json").read_text())["config"]["run_name"] == "demo-3"


def test_resume_auto_with_nothing_there_starts_fresh_and_says_so(model, tmp_path, capsys):
    assert main([*options(model, tmp_path, max_steps=1), "--resume", "auto"]) == 0
    assert f"no checkpoint in {tmp_path / 'run'}: starting fresh" in capsys.readouterr().out
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [0, 1]


def test_resume_auto_after_a_run_without_checkpoint_leaves_nothing_of_its_log(model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 0, "old": 1}\n{"step": 1, "old": 1}\n')
    main([*options(model, tmp_path, max_steps=1), "--resume", "auto"])
    assert [m["step"] for m in read_metrics(run)] == [0, 1] and not any("old" in m for m in read_metrics(run))


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_resuming_from_a_path_without_checkpoint_is_an_error(place, model, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refusal(*options(model, tmp_path / "out"), "--resume", place)
    assert f"no checkpoint in {place}" in message and "--resume auto" in message
    assert not (tmp_path / "out").exists()


def test_a_run_directory_can_be_resumed_as_well_as_one_of_its_checkpoints(first_run, model, tmp_path, capsys):
    _, run = first_run
    main([*options(model, tmp_path, max_steps=5, eval_samples=0), "--resume", str(run)])
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [5]   # from its newest, in this run's directory
    assert "other" in refusal(*options(model, tmp_path), "--resume", run / "checkpoint-2").replace("another", "other")


# ---- refused before anything is written

@pytest.mark.parametrize("argv, words", [
    (["--set", "num_generation=4"], "did you mean 'num_generations'?"), (["--set", "seed=x"], "whole number"),
    (["--config", "missing.toml"], "missing.toml: can't read"), (["--set", "beta=0.1"], "'kl_coeff'"),
    (["--set", "max_new_tokens=2000"], "max_completion_length"),
    (["--set", 'rewards=["corectness"]'], "did you mean 'correctness'"),
    (["--set", "dataset=missing.jsonl"], "missing.jsonl"), 
    (["--set", "dataset=synthetic:chian"], "did you mean 'chain'"),
    (["--set", "dataset=data/word_problems.jsonl", "--set", "answer_column=anwser"], "no 'anwser'"),
    (["--set", "dataset=data/word_problems.jsonl", "--set", "model_name=./nowhere"], "no such directory"),
    (["--set", "dataset=data/word_problems.jsonl", "--set", "model_loader=nanochta"], "did you mean 'nanochat'"),
    (["--set", "max_prompt_length=3", "--set", "solution_column=solution"], "max_prompt_length"),
])
def test_what_is_refused_is_told_in_one_line_and_leaves_nothing(argv, words, model, tmp_path):
    base = ["--set", "output_dir=out", "--set", f"model_name={model}", "--set", "dataset=synthetic:chain"]
    for command in ("train", "sft"):
        assert words in refusal(command, *base, *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_that_can_not_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another output_dir" in refusal(*options(model, tmp_path / "file"))


def test_an_unknown_command_is_answered_with_the_nearest():
    assert refusal("evla").startswith("unknown command 'evla'; did you mean 'eval'?")
    assert refusal("outputs/run").startswith("unknown command")


@pytest.mark.parametrize("argv", [["--set", "num_generation=4"], ["report", "nowhere"], ["evla"],
                                  ["eval", "--config", "missing.toml"],
                                  ["--resume", "nowhere"], ["--sett", "a=1"], ["report"]])
def test_a_process_that_is_refused_exits_with_2_and_one_line(argv, tmp_path):
    run = process(*argv, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if "error: " in line] == run.stderr.splitlines()[-1:]
    assert list(tmp_path.iterdir()) == []


def test_a_bug_keeps_its_traceback_and_exits_with_1(model, tmp_path):
    (tmp_path / "mine.py").write_text("import mlx_grpo\nmlx_grpo.MLXGRPOTrainer.collect = None\n"
                                      "def f(completions): return []\n")
    run = process(*options(model, tmp_path, rewards=["mine.py:f"], eval_samples=0), cwd=tmp_path)
    assert run.returncode == 1 and "Traceback" in run.stderr and "TypeError" in run.stderr


def test_a_users_reward_runs_from_their_directory_and_its_error_ends_the_run_in_one_line(model, tmp_path):
    (tmp_path / "mine.py").write_text("def brevity(completions, **kwargs):\n"
                                      "    return [-len(c[0]['content']) / 10 for c in completions]\n"
                                      "def broken(completions):\n    return 1 / 0\n")
    assert main(options(model, "out", rewards=["mine.py:brevity"], eval_samples=0)) == 0
    metrics = read_metrics(tmp_path / "out" / "run")
    assert all(m["rewards/brevity/mean"] < 0 and m["reward_std"] > 0 for m in metrics if m["step"])
    bad = process(*options(model, "out2", rewards=["mine.py:broken"], eval_samples=0), cwd=tmp_path)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "'broken' raised ZeroDivisionError" in bad.stderr


# ---- sft, eval, rewards, plan, report

def test_training_goes_through_a_loader_of_the_users_own(model, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("from mlx_grpo import BaseModelLoader\n"
                                      "class Loud(BaseModelLoader):\n"
                                      "    def load_model(self, path, config):\n"
                                      "        print('loaded by mine')\n"
                                      "        return super().load_model(path, config)\n")
    main(options(model, tmp_path / "out", model_loader="mine.py:Loud", max_steps=1))
    assert "loaded by mine" in capsys.readouterr().out
    assert (tmp_path / "out" / "run" / "checkpoint-1").is_dir()
    assert "'Loud'" in refusal(*options(model, tmp_path / "out", model_loader="mine.py:Luod", run_name="b"))


def test_sft_learns_the_demonstrations_and_its_checkpoint_goes_into_training(model, tmp_path, capsys):
    base = dict(dataset="data/questions.jsonl", eval_fraction=0.1, max_train_samples=2, max_completion_length=600,
                max_prompt_length=1000)
    main(["sft", *options(model, tmp_path, **base, run_name="warm", max_steps=12, learning_rate=5e-3)])
    losses = [m["loss"] for m in read_metrics(tmp_path / "warm") if m["step"]]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    warm = tmp_path / "warm" / "checkpoint-12"
    assert json.loads((tmp_path / "warm" / "config.json").read_text())["command"] == "sft"
    main(["train", *options(str(warm), tmp_path, **base, run_name="next", max_steps=1)])
    assert (tmp_path / "next" / "checkpoint-1").is_dir()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 12/12")]
    assert f"loss {losses[-1]:.4f}" in told[0]


def test_sft_without_demonstrations_says_where_they_would_stand(model, tmp_path):
    assert "solution_column" in refusal("sft", *options(model, tmp_path, dataset="synthetic:chain"))


def test_eval_gives_the_exact_match_that_training_logged(first_run, capsys):
    _, run = first_run
    logged = read_metrics(run)[-1]
    for _ in range(2):
        assert main(["eval", *options(str(run / "checkpoint-4"), "unused"), "--output", "scores.json"]) == 0
    told = capsys.readouterr().out
    scores = json.loads(open("scores.json", encoding="utf-8").read())
    value = {name: metric["value"] for name, metric in scores["metrics"].items()}
    assert value["exact_match"] == logged["eval/exact_match"] and value["mean_length"] == logged["eval/mean_length"]
    assert f"exact match {value['exact_match']:.3f} on 4 held-out problems" in told and len(scores["problems"]) == 4
    assert not os.path.exists("unused")


def test_eval_counts_numerically_equal_answers(tmp_path, capsys, monkeypatch):
    """The demo's model, which knows the task's format: its completions are compared here by hand."""
    main(["eval", *sets(model_name="data/demo_model", dataset="synthetic:chain", system_prompt="", eval_samples=40,
                        eval_max_new_tokens=16, max_train_samples=10), "--output", "scores.json"])
    rows = json.loads(open("scores.json", encoding="utf-8").read())
    by_hand = [same_answer(r["completion"].rpartition("<answer>")[2].partition("</answer>")[0], r["answer"])
               for r in rows["problems"]]
    assert [r["correct"] for r in rows["problems"]] == by_hand
    assert rows["metrics"]["exact_match"]["value"] == pytest.approx(sum(by_hand) / 40)
    assert all("<answer>" in r["completion"] for r in rows["problems"])


def test_eval_without_held_out_problems_or_with_an_output_nowhere_is_refused(model, tmp_path):
    assert "eval_samples" in refusal("eval", *options(model, tmp_path, eval_samples=0))
    assert "no directory nowhere" in refusal("eval", *options(model, tmp_path), "--output", "nowhere/scores.json")


def test_rewards_lists_and_explains_them_with_their_weights(tmp_path, capsys):
    (tmp_path / "mine.py").write_text('def brevity(completions):\n'
                                      '    """Minus the length.\n\n    More."""\n    return []\n')
    main(["rewards", *sets(rewards=["correctness", "mine.py:brevity"], reward_weights=[2, 0.5])])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows.keys() == {*REWARDS, "brevity"}
    assert "weight 2 " in rows["correctness"]
    assert "weight 0.5" in rows["brevity"] and "Minus the length." in rows["brevity"]
    assert all("not used" in rows[name] for name in REWARDS if name != "correctness")
    assert all(len(line) > 60 for name, line in rows.items() if name in REWARDS)


def test_plan_prints_every_option_with_its_source_and_what_the_run_needs(model, tmp_path, capsys):
    def plan(**changes):
        main(["plan", "--no-measure", *options(model, tmp_path, **changes)])
        return capsys.readouterr().out

    text = plan()
    for name in OPTIONS:
        line = next(line for line in text.splitlines() if line.split(" ")[0] == name)
        assert line.endswith("--set") == (name in {*QUICK, "model_name", "output_dir", "run_name"})
    assert "12 problems, 4 held out; 2 steps of 2 prompts x 4 = 16 completions of at most 6 tokens" in text
    assert "; 6 steps of 2 prompts" in plan(max_steps=0) and "; 18 steps" in plan(max_steps=0, num_epochs=3)
    line = lambda text, name: next(row for row in text.splitlines() if row.startswith(name))
    big = plan(num_generations=64, max_new_tokens=400, max_completion_length=400, batch_size=10, max_tokens_per_microbatch=0)
    assert line(big, "passes").endswith(f"logits {4 * 4 * min(10 * 64 * 400 * 264, HEAD_CHUNK) / 1e9:.2f}")
    assert not (tmp_path / "run").exists()
    ladder = plan(quantize_for_rollouts=True, rollout_bits=[4, 8, 0], update_every=10)      # the first rung counts
    assert line(ladder, "model_old") == line(plan(quantize_for_rollouts="auto"), "model_old")


def test_report_writes_one_page_of_the_run(first_run, tmp_path, capsys):
    _, run = first_run
    assert main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().lstrip().startswith("<!doctype html>")
    assert (run / "report.html").exists()                  # written at the end of training


def test_report_of_what_is_no_run_is_refused(tmp_path):
    assert "metrics.jsonl" in refusal("report", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("not json\n")
    assert "metrics.jsonl" in refusal("report", tmp_path)


# ---- as a process

def test_every_command_has_help_that_says_what_it_does(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as done:
            main([name, "--help"])
        assert done.value.code == 0 and len(capsys.readouterr().out) > 100


def test_the_environment_variable_names_the_configuration_of_a_process(tmp_path):
    (tmp_path / "mine.toml").write_text('rewards = ["int"]\nreward_weights = [3]\n')
    run = process("rewards", cwd=tmp_path, MLX_GRPO_CONFIG="mine.toml")
    assert run.returncode == 0 and "weight 3" in run.stdout


def test_a_checkpoint_loads_as_a_model_that_has_moved(first_run, model):
    _, run = first_run
    trained, tokenizer = load_model(run / "checkpoint-4")
    start, _ = load_model(model)
    tokens = mx.array([tokenizer.encode("What is 2 + 2?")])
    assert mx.abs(trained(tokens) - start(tokens)).max().item() > 1e-3
