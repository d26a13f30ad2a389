"""utils/report.py: what is read of a run, what the page holds, and that it is whole, bounded and harmless. The page
itself runs in tests/test_report_browser.py."""

import base64
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import ROOT
from mlx_grpo import Problem, Rollout, RunLog, UserError, completion_metrics, score_metrics
from mlx_grpo.report import run_names, write_report
from mlx_grpo.report_curves import CHARTS, charts_for, curves_png, curves_svg, smooth, ticks
from mlx_grpo.report_data import Rows, Run, health_warnings, spread
from report_fixtures import HOSTILE, make_run

SCRIPT = ROOT / "utils" / "report.py"


def unpacked(page, name):
    packed = re.search(rf'<script type="application/octet-stream" id="{name}">(.*?)</script>', page)[1]
    return gzip.decompress(base64.b64decode(packed)).decode()


def report(run_dirs, output, **options):
    """(page, data, problems by number, completions) of a report."""
    write_report(run_dirs, output, say=lambda text: None, **options)
    page = output.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in unpacked(page, "texts").split("\n") if line]
    problems = {line["problem"]: line for line in lines if isinstance(line, dict)}
    return page, json.loads(unpacked(page, "data")), problems, [line for line in lines if isinstance(line, list)]


def write_metrics(directory, rows, tail=""):
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return directory


def summary(directory):
    return Run(directory, "x", {}).summary()


# ---- reading ---------------------------------------------------------------------------------------------------------

def test_what_the_trainer_logs_comes_back_whole(tmp_path):
    """The rows are written by the trainer's own RunLog: a changed key or shape there fails here."""
    problem = Problem([{"role": "user", "content": "1 + 2?"}], "3", {})
    rollout = Rollout(problem, [1, 2], [[5, 6], [7]], [[-0.5, -1], [-2]], [[1, 1], [1]], [True, False], ["3 ü", "4"])
    scores, rewards, advantages = np.array([[2.0, np.nan], [0.0, 0.5]]), np.array([[2.0, 0.5]]), np.array([[0.7, -0.7]])
    log = RunLog(tmp_path)
    log.completions(1, [rollout], scores, ["correctness", "int"], rewards, advantages, {"note": ["yes", None]})
    log.metrics({"step": 1, **score_metrics(scores, rewards, ["correctness", "int"]), **completion_metrics([rollout])})
    _, data, problems, completions = report([tmp_path], tmp_path / "r.html")
    assert completions == [
        [0, "train", 1, 0, "3 ü", {"correctness": 2.0, "int": None}, 2.0, 0.7, 2, True, {"note": "yes"}, None],
        [0, "train", 1, 0, "4", {"correctness": 0.0, "int": 0.5}, 0.5, -0.7, 1, False, None, None]]
    assert problems == {0: {"problem": 0, "prompt": problem.prompt, "answer": "3"}}
    assert data["runs"][0]["metrics"]["rewards/correctness/mean"] == [1.0]
    assert data["runs"][0]["metrics"]["completions/mean_length"] == [1.5]


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path):
    run = write_metrics(tmp_path, [{"step": 0, "reward": 1.0}, {"step": 1, "reward": 2.0}], tail='{"step": 2, "rew')
    assert summary(run)["steps"] == [0, 1]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"reward": 1}', '{"step": null}'])
def test_a_broken_line_is_named(tmp_path, line):
    with pytest.raises(UserError, match="metrics.jsonl line 2"):
        summary(write_metrics(tmp_path, [{"step": 0}], tail=line + '\n{"step": 1}\n'))


def test_after_a_restart_only_what_was_logged_last_counts(tmp_path):
    again = [{"step": s, "reward": 10 * s} for s in (2, 3)]
    run = write_metrics(tmp_path, [{"step": s, "reward": s} for s in (0, 1, 2, 3)] + again)
    assert summary(run)["steps"] == [0, 1, 2, 3]
    assert summary(run)["metrics"]["reward"] == [0, 1, 20, 30]
    rows = [{"step": step, "prompt": "p", "completion": f"{step} {turn}"}
            for turn, steps in enumerate([(1, 2, 3), (2, 3)]) for step in steps]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [c[4] for c in report([run], tmp_path / "r.html")[3]] == ["1 0", "3 1", "2 1"]


def test_unknown_keys_nulls_and_values_that_are_not_finite_are_tolerated(tmp_path):
    run = write_metrics(tmp_path, [
        {"step": 0, "reward": None, "kl": float("nan"), "new/one": 3, "flag": True, "text": "a"},
        {"step": 1, "reward": 1.23456789, "kl": float("inf"), "list": [1]}])
    row = {"step": 1, "prompt": "p", "rewards": None, "reward": float("nan"), "token_texts": ["a"]}
    (run / "completions.jsonl").write_text('{"step": 1}\n' + json.dumps(row) + "\n")
    _, data, problems, completions = report([run], tmp_path / "r.html")
    assert data["runs"][0]["metrics"] == {"reward": [None, 1.23457], "kl": [None, None], "new/one": [3, None]}
    assert [chart["title"] for chart in data["more"]] == ["new/one"]
    assert len(completions) == 2 and completions[1][5:7] == [{}, None] and completions[1][-1] is None


def test_no_run_no_configuration_and_no_steps(tmp_path):
    with pytest.raises(UserError, match="looked for metrics.jsonl"):
        write_report([tmp_path / "nowhere"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    _, data, _, completions = report([write_metrics(tmp_path / "empty", [])], tmp_path / "r.html")
    assert data["runs"][0]["steps"] == [] and completions == [] and data["charts"] == []
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not JSON"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")


def test_only_the_new_part_of_a_file_is_read_again(tmp_path):
    run = make_run(tmp_path / "run", steps=6)
    file, lines = run / "completions.jsonl", (run / "completions.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:40]) + lines[40][:30])
    rows = Rows(file, "train", {})
    rows.update()
    seen, known = rows.offset, dict(rows.groups)
    with open(file, "a") as handle:
        handle.write(lines[40][30:] + "".join(lines[41:]))
    rows.update()
    fresh = Rows(file, "train", {})
    fresh.update()
    assert rows.groups == fresh.groups and known.items() != fresh.groups.items()
    assert seen == len("".join(lines[:40]).encode()) and rows.lines == len(lines)
    for kept in (lines[:8], lines[8:] + lines[-8:] * 9):
        (tmp_path / "other").write_text("".join(kept))
        os.replace(tmp_path / "other", file)                 # what a resumed run does
        rows.update()
        assert sum(map(len, rows.groups.values())) == len(kept)


def test_long_runs_are_thinned_and_keep_their_evaluations(tmp_path):
    rows = [{"step": s, "reward": s} | ({"eval/exact_match": s / 9001} if s % 1001 == 0 else {}) for s in range(9001)]
    found = summary(write_metrics(tmp_path, rows))
    assert found["thinned"] == 3 and len(found["steps"]) < 3100 and found["steps"][-1] == 9000
    evaluations = [v for v in found["metrics"]["eval/exact_match"] if v is not None]
    assert evaluations == pytest.approx([s / 9001 for s in range(0, 9001, 1001)], abs=1e-5)


def test_warnings_are_counted_and_told_once():
    rows = [{"step": 1, "warnings": ["a", "a"], "health/nan": False, "health/dead": 0}, {"step": 2, "warnings": None},
            {"step": 5, "warnings": ["a", {"code": "x", "message": "b"}], "health/dead": 3, "health/note": "hot"}]
    assert health_warnings(rows) == [
        {"text": "a", "first": 1, "last": 5, "count": 2}, {"text": "b", "first": 5, "last": 5, "count": 1},
        {"text": "dead", "first": 5, "last": 5, "count": 1}, {"text": "note: hot", "first": 5, "last": 5, "count": 1}]


# ---- the sample of completions ---------------------------------------------------------------------------------------

def test_a_sample_is_spread_evenly_and_keeps_firsts_and_lasts(tmp_path):
    assert spread([0, 1, 2, 3, 4]) == [0, 4, 2, 1, 3] and spread([]) == [] and spread([7]) == [7]
    assert sorted(spread(list(range(37)))) == list(range(37))
    run = make_run(tmp_path / "run", steps=200, prompts=1, generations=4, problems=150)      # 50 come again
    _, data, _, completions = report([run], tmp_path / "r.html", max_completions=400)
    assert len(completions) == 400 and data["runs"][0]["logged"] == 800
    steps = np.array(sorted({c[2] for c in completions}))
    assert steps[0] == 1 and steps[-1] == 200 and np.diff(steps).max() <= 8
    for problem in range(1, 25):             # the first that come again: steps 1 and 151, 2 and 152, ...
        assert {problem, problem + 150} <= set(steps)
    groups = {}
    for c in completions:
        groups[c[2], c[3]] = groups.get((c[2], c[3]), 0) + 1
    assert set(groups.values()) == {4}       # whole groups: an advantage means nothing without the others


def test_the_page_stays_below_its_size(tmp_path):
    """Texts that hardly compress; a single completion larger than the page is left out, not the rest."""
    run, rng = write_metrics(tmp_path / "run", [{"step": 1}]), np.random.default_rng(0)
    with open(run / "completions.jsonl", "w") as file:
        for step in range(400):
            text = base64.b64encode(rng.bytes(400_000 if step == 0 else 3000)).decode()
            file.write(json.dumps({"step": step, "prompt": f"p{step}", "completion": text}) + "\n")
    _, _, _, completions = report([run], tmp_path / "r.html", max_mb=0.5)
    assert 400_000 < (tmp_path / "r.html").stat().st_size <= 500_000
    assert 50 < len(completions) < 400 and 0 not in {c[2] for c in completions}
    assert len(report([run], tmp_path / "r.html", max_mb=4)[3]) == 400
    assert report([run], tmp_path / "r.html", max_mb=4, max_completions=0)[3] == []


def test_runs_share_a_small_page_and_their_problems(tmp_path):
    runs = [make_run(tmp_path / name, steps=20, seed=seed) for seed, name in enumerate("ab")]
    _, data, problems, completions = report(runs, tmp_path / "r.html", max_completions=320)
    assert [sum(c[0] == run for c in completions) for run in (0, 1)] == [160, 160]
    assert len(problems) <= 12 and {c[3] for c in completions if c[0] == 0} == {c[3] for c in completions if c[0] == 1}
    assert [run["name"] for run in data["runs"]] == ["a", "b"]


def test_held_out_completions_and_token_log_probs_are_taken_along(tmp_path):
    run = make_run(tmp_path / "run", steps=4, tokens=True, evaluations=True)
    completions = report([run], tmp_path / "r.html")[3]
    held_out, train = [[c for c in completions if c[1] == split] for split in ("eval", "train")]
    assert len(held_out) == 40 and {c[6] for c in held_out} == {0.0, 1.0} and {c[2] for c in held_out} == {0, 4}
    texts, logprobs = zip(*train[0][11])
    assert "".join(texts) == train[0][4] and all(p <= 0 for p in logprobs)


# ---- the page --------------------------------------------------------------------------------------------------------

def test_names_are_as_short_as_tells_them_apart(tmp_path):
    assert run_names(["a/x", "b/x", "b/y"]) == ["a/x", "b/x", "y"]
    with pytest.raises(UserError, match="given twice"):
        run_names(["a/x", "a/../a/x"])


def test_nothing_of_a_run_reaches_the_page_as_html(tmp_path):
    run = make_run(tmp_path / "a<b>&", steps=3, hostile=True, model_name=HOSTILE)
    page, data, problems, completions = report([run], tmp_path / "r.html")
    template = (ROOT / "utils" / "report_template.html").read_text(encoding="utf-8")
    assert "owned" not in page and "<title>a&lt;b&gt;&amp;</title>" in page
    assert page.count("<script") == template.count("<script") and page.count("</script") == template.count("</script")
    assert "@@" not in page
    assert completions[0][4].endswith(HOSTILE) and problems[0]["prompt"][1]["content"].endswith(HOSTILE)
    assert data["runs"][0]["record"]["config"]["model_name"] == HOSTILE


def test_the_page_is_one_file_that_may_load_nothing(tmp_path):
    page = report([make_run(tmp_path / "run", steps=3)], tmp_path / "r.html")[0]
    links = re.findall(r'\b(?:src|href|action)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert "data:," in links and all(link.startswith(("#", "data:,")) for link in links)
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        digest = hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1].encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_every_metric_is_drawn_once_and_known_ones_under_their_names():
    keys = ["reward", "reward_std", "rewards/a/mean", "rewards/b/mean", "rewards/a/std", "eval/exact_match", "kl",
            "entropy", "completions/mean_length", "completions/min_length", "completions/max_length",
            "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean", "peak_gb", "rollout_s",
            "step_time", "my/own"]
    charts, more = charts_for(keys)
    series = {chart["title"]: chart["series"] for chart in charts}
    assert series["Reward by function"] == {"a": "rewards/a/mean", "b": "rewards/b/mean"}
    assert series["Exact match"] == {"held out": "eval/exact_match"} and series["Memory"] == {"peak": "peak_gb"}
    assert series["Time by phase"] == {"rollout": "rollout_s"}
    assert [chart["title"] for chart in more] == ["rewards/a/std", "my/own"]
    assert charts_for(["step_time"])[0][0]["series"] == {"step": "step_time"}       # sft logs no phases
    wanted = {"Reward by function", "Exact match", "KL to the reference", "Entropy", "Completion length",
              "Clip fraction", "Sampler-trainer gap", "Memory", "Time by phase"}
    assert wanted <= {chart["title"] for chart in CHARTS}


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write"):
        write_report([run], tmp_path / "file" / "r.html")
    report([run], tmp_path / "new" / "r.html")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.html"]


def test_follow_writes_anew_when_the_run_goes_on(tmp_path):
    run, page = make_run(tmp_path / "run", steps=3), tmp_path / "r.html"
    steps = lambda: json.loads(unpacked(page.read_text(encoding="utf-8"), "data"))["runs"][0]["steps"]
    def wait(test):
        for _ in range(300):
            if page.exists() and test():
                return
            time.sleep(0.1)
        raise AssertionError("not within 30 s")
    command = [sys.executable, SCRIPT, run, "-o", page, "--follow", "--interval", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        wait(lambda: steps() == [0, 1, 2, 3])
        assert json.loads(unpacked(page.read_text(encoding="utf-8"), "data"))["refresh"] == 0.1
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "reward": 1}\n')
        wait(lambda: steps() == [0, 1, 2, 3, 4])
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert json.loads(unpacked(page.read_text(encoding="utf-8"), "data"))["refresh"] == 0     # nothing more to wait for
    assert process.stdout.read().decode().count("r.html: ") == 3


def test_the_command_tells_a_mistake_in_one_line(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path)
    for arguments in (["nowhere"], [make_run(tmp_path / "run", steps=2), "--max-mb", "0"]):
        process = run(*arguments)
        assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert run("run", "--svg", "c.svg").stdout == "c.svg\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.svg", "run"]
    assert run("run").stdout.startswith("report.html: ")


# ---- pictures --------------------------------------------------------------------------------------------------------

def test_the_svg_is_well_formed_with_a_curve_for_every_metric(tmp_path):
    run = summary(make_run(tmp_path / "run", steps=60)) | {"name": "a <b>"}
    text = curves_svg([run])
    root = ElementTree.fromstring(text)
    assert root.find("{*}title").text == "a <b>" and "prefers-color-scheme: dark" in text
    shown = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "title"]
    assert shown == ["Exact match", "Reward", "Reward by function", "Completion length", "Entropy",
                     "KL to the reference"]
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    curves = [p for p in paths if p.get("stroke") and p.get("class") is None and "L" in p.get("d")]
    assert len(curves) == 2 + 1 + 2 + 2 + 1 + 1
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+),", curves[2].get("d"))]
    assert xs == sorted(xs) and len(xs) == 60
    both = ElementTree.fromstring(curves_svg([run, run | {"name": "b"}]))
    assert [node.text for node in both.iter() if node.text in ("a <b>", "b")] == 5 * ["a <b>", "b"]
    with pytest.raises(UserError, match="no metrics to draw"):
        curves_svg([run | {"metrics": {"kl": [0.0]}, "steps": [1]}])


def test_ticks_are_round_and_smoothing_keeps_the_level():
    assert ticks(0, 0.8) == [0, 0.2, 0.4, 0.6, 0.8] and ticks(-3, 4) == [-2, 0, 2, 4]
    assert smooth([0, 3, 0]) == [0, 3, 0] and smooth([0, 3, 0] * 20)[30] == 1


def test_a_png_without_matplotlib_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        curves_png([summary(make_run(tmp_path / "run", steps=3))])
