"""Memory: MLX's limits as the options set them, the peak of each phase, and none that grows over a run."""

import os
import subprocess
import sys

import mlx.core as mx
import mlx_grpo
import pytest
from conftest import ROOT
from mlx_grpo import ConfigError, MLXGRPOConfig, MLXGRPOTrainer, backend, load_model, load_problems
from tiny_models import QUICK, tiny_qwen2

GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_qwen2(tmp_path_factory.mktemp("models") / "tiny")


def trainer_of(model, tmp_path, **options):
    config = MLXGRPOConfig(**QUICK | {"model_name": model, "dataset": str(ROOT / "data/word_problems.jsonl")} | options)
    train, held_out = load_problems(config)
    return MLXGRPOTrainer(*load_model(model), config.rewards, config, train, held_out, run_dir=tmp_path)


@pytest.fixture
def mac(monkeypatch):
    """{limit: bytes} as they are set on a Mac whose Metal recommends 12 GB of 16."""
    found = {}
    for limit in ("cache", "wired"):
        monkeypatch.setattr(mx, f"set_{limit}_limit", lambda size, limit=limit: found.update({limit: size}))
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * GB, "memory_size": 16 * GB})
    monkeypatch.setattr(backend, "memory_limit_bytes", lambda: 12 * GB)
    return found


def test_a_mac_wires_what_metal_recommends_and_caches_an_eighth(mac):
    backend.set_limits()
    assert mac == {"wired": 12 * GB, "cache": 12 * GB // 8}
    backend.set_limits(0.5, 8.0)
    assert mac == {"wired": 8 * GB, "cache": GB // 2}
    backend.set_limits(0.0, 0.0)
    assert mac == {"wired": 0, "cache": 0}


def test_wiring_more_than_metal_allows_is_refused_with_the_command_that_allows_it(mac):
    with pytest.raises(ConfigError, match=r"wired_limit_gb is 14 .* at most 12.0 GB; .* sysctl iogpu.wired_limit_mb=13352$"):
        backend.set_limits(wired_gb=14.0)      # 14e9 / 2^20 = 13351.4


def test_the_cpu_keeps_its_own_cache_unless_a_limit_is_given(monkeypatch):
    set_to = []
    monkeypatch.setattr(mx, "set_cache_limit", set_to.append)
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    backend.set_limits()
    backend.set_limits(0.25)
    assert set_to == [GB // 4]


def test_without_a_compiler_the_run_says_so_once_and_gives_the_same_numbers(model, tmp_path):
    """By an empty PATH, in a process of its own, as MLX looks for g++ once; two trainers, one line."""
    script = ("import sys; sys.path.insert(0, 'tests'); import test_memory as t; from pathlib import Path\n"
              "for name, use in (('a', True), ('b', True), ('c', False)):\n"
              "    run = t.trainer_of(sys.argv[1], Path(sys.argv[2], name), use_compile=use, log_jsonl=False)\n"
              "    print(run.step()['grad_norm'])\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", script, model, tmp_path], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PATH": str(empty), "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no g++") == 1 and "goes on uncompiled" in done.stderr
    assert len(set(done.stdout.split())) == 1


def test_each_phase_has_its_peak_and_the_run_the_greatest(model, tmp_path):
    run = trainer_of(model, tmp_path, kl_coeff=0.1, max_new_tokens=8, max_completion_length=32, learning_rate=0.0)
    first = run.step()
    phases = {name: first[f"memory/{name}_peak_gb"] for name in ("rollout", "scoring", "update")}
    assert all(value > 0 for value in phases.values()) and first["peak_gb"] >= max(phases.values())
    held = mx.zeros(10**7)                   # 40 MB that the next step finds in memory
    mx.eval(held)
    second = run.step()
    assert 1 <= first["memory/pass_shapes"] <= second["memory/pass_shapes"] <= 6
    assert all(second[f"memory/{name}_peak_gb"] >= value / 2 + 0.04 for name, value in phases.items())
    held = None
    third = run.step()
    assert third["peak_gb"] >= second["peak_gb"] and third["memory/rollout_peak_gb"] < second["memory/rollout_peak_gb"]


def resident():
    """Bytes of this process in physical memory."""
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.soak)])
def test_memory_doesnt_grow_over_a_run(model, tmp_path, count):
    """MLX's arrays at equal places but for 64 KB, which the CPU's tables of angles take; resident memory, which holds
    Python's and the allocator's leftovers, by less than 8 MB over the last three quarters."""
    run = trainer_of(model, tmp_path, update_every=2, max_train_samples=4, kl_coeff=0.1)
    active, held = [], []
    for _ in range(count):
        run.step()
        active.append(mx.get_active_memory())
        held.append(resident())
    quarter = count // 4
    assert max(active[quarter:]) <= max(active[:quarter]) + 2**16
    assert max(held[-quarter:]) - max(held[:quarter]) < 8e6
