"""The health monitor: each warning by a scripted run, none without a reason, counted, and the same after a resume."""

import io
import json
import re
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
from conftest import ROOT
from mlx_grpo import ConfigError, MLXGRPOConfig, check_option, load_config, load_model, load_problems, main, read_metrics
from mlx_grpo import MLXGRPOTrainer, health
from mlx_grpo.health import RULES, THRESHOLDS, explanation, metric_name
from mlx_grpo.report import open_runs
from test_trainer import CONFIG, make_trainer, numbers

N = THRESHOLDS["steps"]
GAP, CUT, LENGTH = "sampling/sampling_logp_difference/mean", "completions/clipped_ratio", "completions/mean_length"
# A rule -> what each step of a run changes in the metrics of a healthy one; the first step at which the rule holds; how
# many steps it holds. Half of a script is just inside of the threshold, so that the edge is tested from both sides.
SCRIPTS = {
    "truncated": ([{CUT: 0.99}] * 3 + [{CUT: 1.0}] * 2, 4, 2),
    "no_spread": ([{"frac_reward_zero_std": 1.0}] * 9 + [{"frac_reward_zero_std": 0.9}]
                  + [{"frac_reward_zero_std": 1.0}] * 12, 20, 3),
    "no_format": ([{"rewards/strict_format/mean": 0.0}] * 11, 10, 2),
    "entropy": ([{"entropy": 0.02}] * 5 + [{"entropy": 0.019}] * 10, 15, 1),
    "kl": ([{"kl": 0.3}] * 5 + [{"kl": 0.31}] * 11, 15, 2),
    "ratio": ([{"clip_ratio/region_mean": 0.31}] * 9 + [{"clip_ratio/region_mean": 0.3}]
              + [{"clip_ratio/region_mean": 0.5}] * 10, 20, 1),
    "length": ([{LENGTH: 10.0, "reward": 0.5}] * 10 + [{LENGTH: 20.0, "reward": 0.5}] * 10, 20, 1),
    "reward_hacking": ([{"reward": 0.2, "eval/exact_match": 0.5}] + [{"reward": 0.9}] * 3
                       + [{"reward": 0.9, "eval/exact_match": 0.45}, {"reward": 0.9, "eval/exact_match": 0.35}], 6, 1),
    "gap": ([{GAP: 0.012}] * 10 + [{GAP: 0.025}] * 10, 20, 1),
    "device_memory": ([{"machine/device_share": 0.9}, {"machine/device_share": 0.91}], 2, 1),
    "system_memory": ([{"machine/system_share": 0.85}, {"machine/system_share": 0.86}], 2, 1),
    "swap": ([{"machine/swap_share": 0.3}, {"machine/swap_share": 0.31}], 2, 1),
    "memory_growth": ([{"machine/active_gb": 1 + 0.02 * i} for i in range(30)], 25, 6),
}
QUIET = [  # what comes close to a warning and is none
    [{LENGTH: 10.0 + i, "reward": 0.1 * i} for i in range(40)],                      # longer, and better for it
    [{GAP: 1e-6 * 1.5 ** i} for i in range(20)],                                     # rounding that grows is rounding
    [{"machine/active_gb": 0.01 * 1.02 ** i} for i in range(40)],                    # tiny arrays
    [{"machine/active_gb": 1 + i % 4} for i in range(40)],                           # a sawtooth is no leak
    [{"eval/exact_match": 0.5, "reward": 0.9}, {"eval/exact_match": 0.3, "reward": 0.2}],     # both fall
    [{"frac_reward_zero_std": 1.0, "rollout_s": 0.5 * (i % 4 == 0)} for i in range(36)],      # nine batches, four steps each
    [{"rewards/strict_format/mean": 0.0, "rewards/soft_format/mean": 0.1}] * 20,
    [{"reward": None, "entropy": None, CUT: None}] * 20,
]


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    monkeypatch.setattr(health, "system_memory", lambda: (0.5, 0.0))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The metrics of a real step, without the monitor's."""
    trainer = make_trainer(tmp_path_factory.mktemp("healthy"))
    metrics = trainer.step() | {CUT: 0.0, "frac_reward_zero_std": 0.2, "rewards/strict_format/mean": 0.4, "entropy": 0.5}
    assert not any(key.startswith(("health/", "machine/")) for key in metrics)
    return metrics


def script(trainer, healthy, changes, monkeypatch):
    """What a trainer's callbacks make of these steps: (metrics of each, standard error)."""
    rows, errors = [], io.StringIO()
    with redirect_stderr(errors):
        for step, change in enumerate(changes, 1):
            machine = {"machine/active_gb": 1.0} | {k: v for k, v in change.items() if k.startswith("machine/")}
            monkeypatch.setattr(health, "machine_readings", lambda peak_gb: machine)
            metrics = healthy | {"step": step} | change
            trainer.notify("on_step_end", metrics)
            rows.append(metrics)
    return rows, errors.getvalue()


def warned(rows):
    return {key for row in rows for key in row if key.startswith("health/")}


@pytest.mark.parametrize("name", RULES)
def test_a_warning_comes_once_with_advice_and_every_step_of_it_is_counted(name, healthy, tmp_path, monkeypatch):
    changes, first, times = SCRIPTS[name]
    rows, errors = script(make_trainer(tmp_path), healthy, changes, monkeypatch)
    assert warned(rows) == {metric_name(name)}
    found = {row["step"]: row[metric_name(name)] for row in rows if metric_name(name) in row}
    assert min(found) == first and list(found.values()) == list(range(1, times + 1))
    assert errors.startswith(f"step {first}: warning: {RULES[name].title} (") and errors.count("\n") == 1
    assert RULES[name].advice in errors and errors.endswith(f" [health/{name}]\n")


@pytest.mark.parametrize("changes", QUIET)
def test_what_comes_close_to_a_warning_is_none(changes, healthy, tmp_path, monkeypatch):
    rows, errors = script(make_trainer(tmp_path), healthy, changes, monkeypatch)
    assert warned(rows) == set() and errors == ""


@pytest.mark.parametrize("name", RULES)
def test_a_warning_can_be_turned_off_and_its_threshold_moved(name, healthy, tmp_path, monkeypatch):
    changes, first, times = SCRIPTS[name]
    off = make_trainer(tmp_path, replace(CONFIG, health={name: False}))
    assert warned(script(off, healthy, changes, monkeypatch)[0]) == set()
    if name == "no_format":                 # the only one whose edge is at 0
        strict, changes = {name: 0.1}, [{"rewards/strict_format/mean": 0.1}] * N
    elif name == "entropy":
        strict, changes = {name: 0.6}, [{}] * N
    else:
        strict, changes = {name: THRESHOLDS[name] * 0.98}, changes[:first]
    assert metric_name(name) in warned(script(make_trainer(tmp_path, replace(CONFIG, health=strict)), healthy, changes,
                                              monkeypatch)[0])


def test_steps_is_how_long_a_trouble_must_last(healthy, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, replace(CONFIG, health={"steps": 2}))
    rows, _ = script(trainer, healthy, [{"entropy": 0.001}] * 3, monkeypatch)
    assert [metric_name("entropy") in row for row in rows] == [False, True, True]


# ---- real runs

def errors_of(run):
    errors = io.StringIO()
    with redirect_stderr(errors):
        run()
    return errors.getvalue()


@pytest.mark.parametrize("name, changes", [
    ("truncated", {"max_new_tokens": 3}), ("no_spread", {"rewards": ["int"], "temperature": 0.01}),
    ("no_format", {"rewards": ["soft_format"], "max_new_tokens": 2, "health": {"steps": 2, "truncated": False}}),
    ("entropy", {"temperature": 0.01}), ("kl", {"learning_rate": 0.03, "kl_coeff": 1e-6, "update_every": 9}),
    ("ratio", {"learning_rate": 0.03, "update_every": 9, "clip_eps": 0.0})])
def test_real_runs_that_go_wrong_are_warned_of(name, changes, tmp_path):
    config = replace(CONFIG, **{"log_jsonl": True, "health": {"steps": 2}} | changes)
    errors = errors_of(lambda: make_trainer(tmp_path, config).train())
    assert errors.count(f"[health/{name}]") == 1
    assert any(metric_name(name) in row for row in read_metrics(tmp_path))


def test_memory_that_a_callback_keeps_is_noticed(tmp_path):
    import mlx.core as mx
    from mlx_grpo import TrainerCallback

    class Hoarder(TrainerCallback):
        kept = []

        def on_step_end(self, trainer, metrics):
            self.kept.append(mx.random.normal((4096, 4096)))     # 64 MB
            mx.eval(self.kept)

    trainer = make_trainer(tmp_path, replace(CONFIG, health={"steps": 2}), callbacks=[Hoarder()])
    assert "[health/memory_growth]" in errors_of(trainer.train)


@pytest.mark.parametrize("steps", [16, pytest.param(60, marks=pytest.mark.soak)])
def test_the_demo_has_no_warning(tmp_path, steps):
    config, _ = load_config(ROOT / "configs/demo.toml", [
        f"max_steps={steps}", "eval_samples=20", "eval_steps=8", f"model_name={ROOT / 'data/demo_model'}"])
    train, held_out = load_problems(config)
    trainer = MLXGRPOTrainer(*load_model(config.model_name), config.rewards, config, train, held_out, run_dir=tmp_path)
    assert errors_of(trainer.train) == ""
    rows = read_metrics(tmp_path)
    assert warned(rows) == set() and rows[-1]["eval/exact_match"] > 0.9
    assert all(0 < row["machine/active_gb"] < 1 and row["machine/system_share"] == 0.5 for row in rows[1:])


def test_a_resumed_run_counts_as_an_unbroken_one_and_doesnt_warn_again(tmp_path):
    config = replace(CONFIG, log_jsonl=True, max_steps=6, save_steps=3, temperature=0.01, max_new_tokens=3, num_iterations=2,
                     health={"steps": 2})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = errors_of(lambda: make_trainer(whole, config).train())
    errors_of(lambda: make_trainer(broken, replace(config, max_steps=4)).train())
    resumed = make_trainer(broken, replace(config, max_steps=6))
    resumed.load_checkpoint(broken / "checkpoint-3")
    assert errors_of(resumed.train) == "" and first.count("warning") >= 3
    rows = [[numbers(m) for m in read_metrics(run)] for run in (whole, broken)]
    assert rows[0] == rows[1] and rows[0][-1]["health/truncated"] == 6 and warned(rows[0]) > {"health/entropy"}


def test_thresholds_may_change_when_a_run_is_resumed(tmp_path):
    config = replace(CONFIG, max_steps=1)
    make_trainer(tmp_path, config).train()
    resumed = make_trainer(tmp_path, replace(config, health={"kl": 1}))
    resumed.load_checkpoint(tmp_path / "checkpoint-1")
    assert resumed.step_count == 1


# ---- the machine

MEMINFO = "MemTotal:  16000 kB\nMemFree:   100 kB\nMemAvailable:  4000 kB\nSwapTotal:  2000 kB\nSwapFree:  500 kB\n"
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                5000.
Pages active:                            200000.
Pages inactive:                           10000.
Pages speculative:                         1000.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                            384.
"Translation faults":                 987654321.
Pages occupied by compressor:            140000.
"""


def test_memory_is_read_as_linux_and_macos_tell_it():
    assert health.linux_memory(MEMINFO) == (0.75, 0.75)
    assert health.linux_memory(MEMINFO.replace("2000 kB", "0 kB").replace("500 kB", "0 kB")) == (0.75, 0.0)
    swapusage = "total = 3072.00M  used = 2048.00M  free = 1024.00M  (encrypted)\n"
    memory, swap = health.mac_memory(VM_STAT, f"{8 * 2**30}\n", swapusage)
    assert memory == 1 - 16384 * 16384 / (8 * 2**30) and swap == 0.25


def test_a_containers_limit_counts_without_its_file_cache(tmp_path):
    assert health.container_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert health.container_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 400\nactive_file 0\n")
    assert health.container_memory(tmp_path) == 0.5


def test_this_machine_can_be_read(monkeypatch):
    monkeypatch.undo()
    memory, swap = health.system_memory()
    assert 0 < memory < 1 and 0 <= swap <= 1


@pytest.mark.parametrize("info, share", [
    ({"max_recommended_working_set_size": 10_000_000_000, "memory_size": 16_000_000_000}, 0.8),       # Metal
    ({"total_memory": 80_000_000_000}, 0.1), ({"architecture": "?"}, None)])                           # CUDA, unknown
def test_a_devices_share_is_of_the_limit_that_it_names(info, share, monkeypatch):
    monkeypatch.setattr(health.mx, "default_device", lambda: health.mx.gpu)
    monkeypatch.setattr(health.mx, "device_info", lambda: info)
    assert health.machine_readings(8.0).get("machine/device_share") == share


# ---- options, page and report

@pytest.mark.parametrize("given, words", [
    ({"entropi": 1}, "no threshold 'entropi'; did you mean 'entropy'"), ({"kl": "much"}, "kl must be a number"),
    ({"swap": True}, "swap must be a number .* or false"), ({"swap": -0.1}, "at least 0"), ({"steps": 0}, "at least 1"),
    ({"steps": False}, "steps must be a whole number"), ({"kl": float("nan")}, "kl must be a number")])
def test_thresholds_are_checked(given, words):
    with pytest.raises(ConfigError, match=words):
        MLXGRPOConfig(health=given)


def test_thresholds_can_be_set_on_the_command_line():
    config, _ = load_config(None, ["health={entropy = 0.05, swap = false}"])
    assert config.health == {"entropy": 0.05, "swap": False} and check_option("health", {}, "x") == {}


def test_the_page_explains_every_rule_with_its_default():
    page = (ROOT / "docs/health.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", page, re.M))
    assert {name: float(value) for name, value in rows.items()} == {name: float(value) for name, value in THRESHOLDS.items()}
    assert all(f"`{metric_name(name)}`" in page for name in RULES)


def test_the_report_tells_the_advice_while_the_run_goes_on_and_after(tmp_path):
    config = replace(CONFIG, log_jsonl=True, max_new_tokens=3, max_steps=2)
    errors_of(lambda: make_trainer(tmp_path, config).train())
    (run,) = open_runs([tmp_path])
    found = {w["text"]: w for w in run.summary()["warnings"]}
    text = explanation("health/truncated")
    assert found[text] == {"text": text, "first": 1, "last": 2, "count": 2}
    assert RULES["truncated"].advice in text and explanation("health/mine") is None
    row = read_metrics(tmp_path)[-1] | {"step": 3, "health/machine/swap": 1}
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    texts = [w["text"] for w in run.summary()["warnings"]]       # as --follow reads it again
    assert explanation("health/machine/swap") in texts


def test_the_command_tells_a_wrong_threshold_in_one_line(capsys):
    with pytest.raises(ConfigError, match=r"--set: health has no threshold 'swop'; did you mean 'swap'"):
        main(["plan", "--set", "health={swop = 1}"])
