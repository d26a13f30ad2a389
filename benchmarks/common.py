"""
What the benchmarks share: random models, the processes of peers.py taking turns, and results as JSON.

A measurement is a dictionary of rows; each row is a peer with its options. store() writes it to
benchmarks/results/NAME.json with machine and versions, and write_figures.py makes tables of it.
"""

import argparse
import json
import os
import platform
import random
import statistics
import string
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))   # runs from a plain clone, from any directory

from benchmarks.peers import OUT_OF_MEMORY  # noqa: E402
from mlx_grpo import UserError, linux_blas  # noqa: E402
from mlx_grpo.run_dir import git_revision  # noqa: E402

import mlx.core as mx  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
SHAPES = {  # name: config.json of a random model
    "tiny": dict(model_type="qwen3", hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16),
    "7m": dict(model_type="qwen3", hidden_size=256, num_hidden_layers=6, intermediate_size=768, num_attention_heads=4,
               num_key_value_heads=2, head_dim=64),
    "100m": dict(model_type="qwen3", hidden_size=768, num_hidden_layers=14, intermediate_size=2304, num_attention_heads=12,
                 num_key_value_heads=4, head_dim=64),
    "qwen2.5-0.5b": dict(model_type="qwen2", hidden_size=896, num_hidden_layers=24, intermediate_size=4864,
                         num_attention_heads=14, num_key_value_heads=2),
}


def random_model(directory, name="7m", vocab_size=8192, dtype="float32", ends_early=False, shape=None):
    """Write a random model of SHAPES (or of `shape`, a config.json to be called `name`) with a tokenizer of bytes; returns
    its path. Its end token lies behind the vocabulary, so completions run to their limit in every program; ends_early: the last ids of the vocabulary end it instead, so
    that lengths differ, with a mean of about 128 tokens whatever the limit."""
    import importlib

    from mlx.utils import tree_map
    from mlx_lm.utils import save_model

    path = Path(directory, f"{name}-{vocab_size}-{dtype}" + "-ends" * ends_early)
    if path.exists():
        return str(path)
    shape = shape or SHAPES[name]
    ends = vocab_size // 128 if ends_early else 0
    config = {**shape, "architectures": [shape["model_type"].capitalize() + "ForCausalLM"],
              "vocab_size": vocab_size, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 8192,
              "tie_word_embeddings": shape.get("tie_word_embeddings", True), "torch_dtype": dtype, "bos_token_id": 1, "pad_token_id": 0,
              "eos_token_id": list(range(vocab_size - ends, vocab_size)) if ends else vocab_size}
    code = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = code.Model(code.ModelArgs.from_dict(config))
    model.update(tree_map(lambda a: a.astype(getattr(mx, dtype)), model.parameters()))
    path.mkdir(parents=True)
    save_model(path, model)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(path, vocab_size)
    return str(path)


def save_tokenizer(path, vocab_size):
    """A tokenizer of bytes without merges, filled up to vocab_size, and </s> behind that as vocab_size."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    names += [f"w{i}" for i in range(len(names), vocab_size)] + ["</s>"]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(path)


def random_prompts(lengths):
    """A text for each length, of so many tokens of save_tokenizer's."""
    rng = random.Random(0)
    return ["".join(rng.choices(string.ascii_lowercase, k=n)) for n in lengths]


def work(model, *, prompts=2, prompt_tokens=64, G=8, max_tokens=128, dtype="float32", kl=0.0, threads=None, **more):
    """The options of a peer. prompts: how many, each of prompt_tokens; or a list of lengths."""
    lengths = [prompt_tokens] * prompts if isinstance(prompts, int) else prompts
    return {"model": model, "prompts": random_prompts(lengths), "G": G, "max_tokens": max_tokens, "dtype": dtype, "kl": kl,
            "learning_rate": 1e-5, "threads": threads or cores(), **more}


# ---- processes -------------------------------------------------------------------------------------------------------

class OutOfMemory(Exception):
    """A peer went beyond its option limit_gb."""


class Peer:
    """One process of peers.py. python: its interpreter."""

    def __init__(self, name, options, python=None):
        self.name = name
        self.log = tempfile.TemporaryFile("w+")
        threads = str(options["threads"])
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [str(python or sys.executable), str(ROOT / "benchmarks/peers.py"), name, json.dumps(options)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, cwd=ROOT)
        self.about = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.log.seek(0)
        text = self.log.read()
        self.log.close()
        if code == OUT_OF_MEMORY:
            raise OutOfMemory(self.name)
        raise UserError(f"the peer {self.name} ended with {code}:\n{text[-4000:]}")

    def turn(self):
        """One piece of work; returns its figures."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def alternate(peers, rounds, warmup=1, turns=None):
    """{name: row} of peers {name: Peer} that take turns, ours, theirs, ours, theirs... warmup: turns that don't count.
    turns: {name: fewer rounds}. Prints a line for each turn, and closes the peers."""
    found = {name: [] for name in peers}
    blas = {peer.about["blas"] for peer in peers.values() if "blas" in peer.about}
    if len(blas) > 1:
        raise UserError(f"the MLX peers have different BLAS libraries: {blas}; install scipy-openblas32 for all of them")
    for i in range(warmup + rounds):
        for name, peer in peers.items():
            if i < warmup + min(rounds, (turns or {}).get(name, rounds)):
                figures = peer.turn()
                turn = "warm-up" if i < warmup else f"{i - warmup + 1}/{rounds}"
                speed = figures["tokens"] / figures["seconds"]
                print(f"  {name:44}{turn:8}{figures['seconds']:9.2f} s{speed:9.1f} tokens/s", flush=True)
                found[name] += [figures] * (i >= warmup)
    rows = {name: row(turns) | {"versions": peers[name].about["versions"]} for name, turns in found.items()}
    for peer in peers.values():
        peer.close()
    return rows


def row(turns):
    """The figures of some turns: all seconds, medians, greatest memory. best_s: the least median of three turns in a row."""
    seconds = [t["seconds"] for t in turns]
    threes = [seconds[i:i + 3] for i in range(0, len(seconds), 3)]
    threes = [part for part in threes if len(part) == 3] or [seconds]
    middle = lambda key: statistics.median(t[key] for t in turns)
    found = {"seconds": seconds, "median_s": statistics.median(seconds), "best_s": min(map(statistics.median, threes)),
             "tokens": middle("tokens"), "tokens_per_s": statistics.median(t["tokens"] / t["seconds"] for t in turns),
             "resident_gb": max(t["resident_gb"] for t in turns)}
    for key in ("rollout_s", "gap"):
        if key in turns[0]:
            found[key] = middle(key)
    peaks = [t["peak_gb"] for t in turns if t["peak_gb"] is not None]
    return found | ({"peak_gb": max(peaks)} if peaks else {})


# ---- machine and results ---------------------------------------------------------------------------------------------

def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def device():
    return "cpu" if mx.default_device() == mx.cpu else "metal" if mx.metal.is_available() else "cuda"


def machine():
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    chip = names[0] if device() == "cpu" and names else mx.device_info().get("device_name") or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {"system": platform.system(), "architecture": platform.machine(), "chip": chip, "cores": cores(),
            "memory_gb": round(memory, 1), "device": device(), "blas": linux_blas.BLAS}


def store(name, rows, settings, folder=RESULTS):
    """Write a measurement to folder/name.json; returns the path."""
    versions = {}
    for found in rows.values() if isinstance(rows, dict) else rows:
        versions |= found.pop("versions", {})
    record = {"name": name, "date": date.today().isoformat(), "git": git_revision(), "machine": machine(),
              "versions": versions, "settings": settings, "rows": rows}
    path = Path(folder, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(record), indent=1) + "\n")
    print(f"{name}: {path}", flush=True)
    return path


def rounded(value):
    """Floats to five significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def bench_parser(doc, rounds):
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of each that count (default {rounds})")
    parser.add_argument("--threads", type=int, default=cores(), help="of BLAS and torch (default: the cores)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one turn: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default benchmarks/results)")
    return parser
