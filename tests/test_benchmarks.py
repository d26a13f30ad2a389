"""Benchmarks: the documents say what was measured, the peers take turns at the same work, and every script runs."""

import importlib
import json
import sys

import pytest
from conftest import ROOT

from benchmarks import common, peers, write_figures
from mlx_grpo import UserError

SCRIPTS = ("run", "grpo_step", "rollouts", "training_memory", "ablation", "scaling", "quantised_rollouts", "check_device",
           "write_figures")
MACHINE = {"chip": "a chip", "cores": 2, "memory_gb": 8.0, "system": "Linux", "architecture": "x86_64", "device": "cpu",
           "blas": "openblas"}


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return importlib.import_module(f"benchmarks.{name}").main()


def record(rows, **settings):
    return {"date": "2026-01-02", "machine": MACHINE, "versions": {"mlx": "1.0"}, "settings": settings, "rows": rows}


def turn(seconds, **more):
    return {"seconds": seconds, "tokens": 10, "resident_gb": 1.0, "peak_gb": 0.5} | more


STEP = {"median_s": 2.0, "best_s": 1.5, "rollout_s": 1.0, "peak_gb": 0.25, "resident_gb": 1.0, "tokens_per_s": 100.0,
        "tokens": 64, "gap": 0.01}
RECORDS = {  # one for every file of FIGURES
    "grpo_step": record({"ours": STEP, "TRL": {k: v for k, v in STEP.items() if k != "peak_gb"} | {"median_s": 5.0}},
                        shape="7m", dtype="float32", prompts=2, num_generations=8, max_tokens=128),
    "rollouts": record({"same prompt, ours": STEP, "same prompt, BatchGenerator": STEP | {"tokens_per_s": 50.0},
                        "limits": {"matmul_gflops": 50.0, "read_gb_s": 10.0, "exp_ns": 15.0, "matmul_tokens_per_s": 4000.0,
                                   "read_tokens_per_s": 9000.0}}),
    "training_memory": record([{"vocab": 8192, "rows": 16, "tokens": 128, "ours_gb": 1.0, "ours_s": 3.0, "full_gb": 4.0,
                                "full_s": 2.0},
                               {"vocab": 151936, "rows": 16, "tokens": 512, "ours_gb": 2.0, "ours_s": 9.0, "full_gb": None,
                                "full_s": None}], limit_gb=16.0),
    "shared_prefix": record({"prefix sharing": STEP, "plain": STEP | {"median_s": 6.0}}),
    "ablation": record({"as shipped": STEP | {"changed": {}}, "off": STEP | {"changed": {"prefix_sharing": "off"}}}),
    "scaling": record([{"curve": curve, "group": g, "vocabulary": 8192 * g, "completion": 8 * g, **STEP}
                       for curve in ("group", "vocabulary", "completion") for g in (1, 2)]),
    "quantised_rollouts": record([{"shape": "7m", "bits": 0, "copy_gb": 0.03, **STEP},
                                  {"shape": "demo", "bits": 4, "before": 0.1, "after": 0.9, "step_s": 1.0}],
                                 num_generations=16, max_tokens=8),
}
RECORDS["grpo_step_cuda"] = RECORDS["grpo_step"]


@pytest.fixture
def clone(tmp_path):
    """A directory with results, and documents that hold every figure."""
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, value in RECORDS.items():
        (results / f"{name}.json").write_text(json.dumps(value))
    blocks = "".join(f"before\n<!-- figures:{name} -->\n<!-- /figures -->\nafter\n" for name in write_figures.FIGURES)
    (tmp_path / "docs/all.md").write_text(blocks)
    (tmp_path / "README.md").write_text("plain\n")
    return tmp_path


def test_the_documents_match_the_stored_results(monkeypatch):
    assert run("write_figures", monkeypatch, "--check") == 0


def test_every_figure_is_shown_in_a_document():
    text = "".join(p.read_text() for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert [name for name in write_figures.FIGURES if f"<!-- figures:{name} -->" not in text] == []


def test_figures_are_written_between_their_markers_and_a_changed_result_is_noticed(clone, monkeypatch, capsys):
    assert run("write_figures", monkeypatch, "--root", clone, "--check") == 1
    assert "docs/all.md doesn't match" in capsys.readouterr().err
    assert run("write_figures", monkeypatch, "--root", clone) == 0
    text = (clone / "docs/all.md").read_text()
    assert text.count("before\n") == text.count("after\n") == len(write_figures.FIGURES)
    assert "| TRL | 5 | 1.5 | 1 | 2.50x | – | 1 |" in text                     # 5 s are 2.5 times ours, 2 s
    assert "| same prompt | BatchGenerator | 50 | 2.00 | 0.25 |" in text       # 100 tokens/s are twice 50
    assert "| 151,936 | 16 x 512 | 2 | over 16 |" in text and "| 8,192 | 16 x 128 | 1 | 4 | 0.25 |" in text
    assert "3.00 times as fast" in text and "takes 2 s (0.25 GB) where TRL 5 s" in text
    assert (clone / "docs/scaling.svg").read_text().startswith("<svg")
    assert run("write_figures", monkeypatch, "--root", clone, "--check") == 0
    (clone / "benchmarks/results/shared_prefix.json").write_text(
        json.dumps(record({"prefix sharing": STEP, "plain": STEP | {"median_s": 8.0}})))
    assert run("write_figures", monkeypatch, "--root", clone, "--check") == 1


def test_a_figure_without_results_says_so_and_an_unknown_one_stops(clone, monkeypatch):
    (clone / "benchmarks/results/ablation.json").unlink()
    run("write_figures", monkeypatch, "--root", clone)
    assert "Not measured yet (`benchmarks/results/ablation.json`)." in (clone / "docs/all.md").read_text()
    (clone / "README.md").write_text("<!-- figures:speed -->\n<!-- /figures -->\n")
    with pytest.raises(SystemExit, match="figures:speed is unknown"):
        run("write_figures", monkeypatch, "--root", clone)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, monkeypatch, "--help")
    assert not end.value.code and f"benchmarks/{name}.py" in capsys.readouterr().out


def test_medians_memory_and_the_best_of_three():
    found = common.row([turn(s) for s in (9.0, 8.0, 10.0, 1.0, 3.0, 2.0, 0.1)] + [turn(4.0, peak_gb=2.0)])
    assert found["median_s"] == 3.5
    assert found["best_s"] == 2.0                    # medians of (9 8 10) and (1 3 2); two left over are no three
    assert found["peak_gb"] == 2.0
    assert common.row([turn(2.0, peak_gb=None)]).keys() & {"peak_gb", "gap", "rollout_s"} == set()


class FakePeer:
    def __init__(self, name, turns, blas=None):
        self.about, self.name, self.turns, self.closed = {"versions": {}, "blas": blas}, name, turns, False

    def turn(self):
        self.turns.append(self.name)
        return turn(1.0)

    def close(self):
        self.closed = True


def test_peers_take_turns():
    turns = []
    peers = {name: FakePeer(name, turns) for name in "abc"}
    rows = common.alternate(peers, 3, turns={"c": 1})
    assert turns == list("abc" "abc" "ab" "ab")              # the warm-up, then three, the last of them for c once
    assert [len(rows[name]["seconds"]) for name in "abc"] == [3, 3, 1]
    assert all(peer.closed for peer in peers.values())


def test_different_blas_libraries_are_refused():
    with pytest.raises(UserError, match="different BLAS"):
        common.alternate({"a": FakePeer("a", [], "openblas"), "b": FakePeer("b", [], None)}, 1)


def test_completions_run_to_the_limit_or_end_by_themselves(tmp_path):
    from mlx_grpo import load_model
    model, tokenizer = load_model(common.random_model(tmp_path, vocab_size=512))
    assert model.args.vocab_size == 512 and all(end >= 512 for end in tokenizer.eos_token_ids)
    assert [len(tokenizer.encode(text)) for text in common.random_prompts([5, 9])] == [5, 9]
    _, tokenizer = load_model(common.random_model(tmp_path, vocab_size=512, ends_early=True))
    assert sorted(i for i in tokenizer.eos_token_ids if i < 512) == [508, 509, 510, 511]         # 4 of 512


def test_a_step_is_measured_against_the_sequential_loop(tmp_path, monkeypatch):
    run("grpo_step", monkeypatch, "--quick", "--shape", "tiny", "--vocab", 512, "--peers", "ours", "sequential",
        "--threads", 1, "--out", tmp_path)
    found = json.loads((tmp_path / "grpo_step.json").read_text())
    assert list(found["rows"]) == ["ours", "sequential"] and found["versions"]["mlx"]
    for row in found["rows"].values():
        assert row["tokens"] == 2 * 2 * 4 and len(row["seconds"]) == 1
        assert row["peak_gb"] > 0.0001 and row["resident_gb"] > row["peak_gb"]         # 30 thousand float32 weights


def test_a_peer_that_fails_or_needs_too_much_memory_says_so(tmp_path):
    options = common.work(common.random_model(tmp_path, "tiny", 512), prompts=1, prompt_tokens=8, G=2, max_tokens=4,
                          threads=1)
    with pytest.raises(UserError, match="(?s)the peer ours ended with 1.*advantage must be one of"):
        common.Peer("ours", options | {"options": {"advantage": "none"}})
    with pytest.raises(common.OutOfMemory):
        common.Peer("full_logits", options | {"limit_gb": 1e-6}).turn()


def test_every_peer_of_the_scripts_exists():
    from benchmarks.grpo_step import PEERS
    assert {peer for peer, _, _ in PEERS.values()} <= set(peers.PEERS)
