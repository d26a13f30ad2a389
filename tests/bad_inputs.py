"""A directory with good inputs for every command, the ways to spoil them, and what a refusal must look like."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from conftest import FIXTURES
from nemo_fixtures import fixture as nemo_fixture
from report_fixtures import make_run
from test_checkpoint_tools import save_run
from tiny_hf import save_adapter
from tiny_models import QUICK, tiny_qwen2

from mlx_grpo import adapters
from mlx_grpo.checked_load import load_checked

REWARD = "def length(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"


@dataclass(frozen=True)
class Bad:
    """One bad input: `line` is what stands after the command's name, every text of `says` must be in the one line of the
    refusal, and `spoil` are the functions that damage the good directory."""
    command: str
    kind: str
    line: str
    says: list
    spoil: list


# ---- good inputs -----------------------------------------------------------------------------------------------------

def toml(options):
    written = lambda v: "true" if v is True else "false" if v is False else json.dumps(v)
    return "".join(f"{name} = {written(value)}\n" for name, value in options.items())


def make_good(directory):
    """Everything that the commands of the table are given, small: each case copies what its line names."""
    tiny_qwen2(directory / "model", hidden_size=64)
    save_adapter(directory / "adapter", load_checked(directory / "model")[0], base="model")
    write_peft(directory)
    rows = [{"question": f"What is {n} + {n}?", "answer": f"twice {n} #### {2 * n}"} for n in range(1, 31)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "data.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    (directory / "reward.py").write_text(REWARD)
    options = QUICK | {"max_train_samples": 0, "model_name": "model", "dataset": "data.jsonl", "output_dir": "runs",
                       "rewards": ["correctness", "reward.py:length"]}
    (directory / "run.toml").write_text(toml(options))
    (directory / "prompts.txt").write_text("one\ntwo\n")
    make_run(directory / "logged", steps=6)
    for step in (10, 20, 30):
        save_run(directory / "kept" / f"checkpoint-{step}", step, shift=step / 100, time=1_000_000 + step)
    nanochat = directory / "nanochat"
    nanochat.mkdir()
    for name in ("model_000650.pt", "meta_000650.json", "tokenizer.pkl"):
        shutil.copy(FIXTURES / "nanochat" / "gen1" / name, nanochat)
    shutil.copytree(nemo_fixture("llama3_gqa") / "hf", directory / "hf")
    shutil.copytree(nemo_fixture("llama3_gqa") / "nemo2", directory / "nemo2")
    shutil.copy(nemo_fixture("llama_nemo1") / "nemo1_ckpt.nemo", directory / "one.nemo")
    return directory


def write_peft(directory):
    """The adapter in PEFT's form, made by our own command."""
    with contextlib.chdir(directory), contextlib.redirect_stdout(io.StringIO()):
        adapters.main(["to-peft", "--adapter", "adapter", "--output", "peft"])


def copy_good(good, target, command):
    """Copy what the command's cases name."""
    for name in GOOD.get(command.split()[0], RUN_GOOD):
        (shutil.copytree if (good / name).is_dir() else shutil.copy)(good / name, target / name)


MODEL = ("model", "data.jsonl")
RUN_GOOD = (*MODEL, "data.csv", "reward.py", "run.toml", "adapter")
GOOD = {"convert_nanochat": (*MODEL, "nanochat"), "report": (*MODEL, "logged"), "report.py": (*MODEL, "logged"),
        "checkpoints": (*MODEL, "kept"), "push": (*MODEL, "kept"), "convert_nemo": (*MODEL, "hf", "nemo2", "one.nemo"),
        "inference": (*MODEL, "adapter", "prompts.txt"), "adapters": (*MODEL, "adapter", "peft"),
        "convert_model": (*MODEL, "adapter"), "completion": (), "plan_headers": ()}


# ---- damage ----------------------------------------------------------------------------------------------------------

def replaced(path):
    """The path, free to be written anew, its directory made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


def write(name, content=""):
    return lambda: replaced(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name, **changes):
    """Change the top level of a JSON file; ... removes."""
    def spoil():
        table = json.loads(Path(name).read_text()) | changes
        replaced(name).write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))
    return spoil


def cut(name, size):
    """Keep the first `size` bytes; from the end where negative."""
    def spoil():
        content = Path(name).read_bytes()
        replaced(name).write_bytes(content[:size])
    return spoil


def drop(name):
    return lambda: replaced(name)


def folder(name):
    return lambda: replaced(name).mkdir()


def link(name, target):
    return lambda: replaced(name).symlink_to(target)


def line_of(name, number, text):
    """Replace line `number` (from 1) of a text file."""
    def spoil():
        lines = Path(name).read_text().split("\n")
        lines[number - 1] = text
        replaced(name).write_text("\n".join(lines))
    return spoil


def header(name, tensor, **changes):
    """Change a tensor's entry in the header of a safetensors file."""
    def spoil():
        content = Path(name).read_bytes()
        size = int.from_bytes(content[:8], "little")
        table = json.loads(content[8:8 + size])
        table[tensor] = table.get(tensor, {}) | changes
        new = json.dumps(table).encode()
        replaced(name).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size:])
    return spoil


def arrays(name, **changes):
    """Replace arrays of a safetensors file by (shape, value everywhere, dtype), or remove them (None); a dot in a name is
    written as __."""
    def spoil():
        found = dict(mx.load(str(name)))
        for key, value in changes.items():
            found[key.replace("__", ".")] = value and mx.full(value[0], float(value[1])).astype(getattr(mx, value[2]))
        mx.eval([array for array in found.values() if array is not None])
        replaced(name)
        mx.save_safetensors(str(name), {key: array for key, array in found.items() if array is not None}, {"format": "mlx"})
    return spoil


def environment(**variables):
    return lambda: os.environ.update(variables)


# ---- what a refusal is -----------------------------------------------------------------------------------------------

def tree(directory):
    """Everything below a directory: path -> mode and content."""
    found = {}
    for inside, names, files in os.walk(directory):
        for name in [*names, *files]:
            path = Path(inside) / name
            content = (os.readlink(path) if path.is_symlink() else
                       hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
            found[str(path.relative_to(directory))] = (path.lstat().st_mode, content)
    return found
