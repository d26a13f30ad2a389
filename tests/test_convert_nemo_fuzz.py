"""Random damage to each file of a checkpoint and a source: converted, or refused in one line with nothing left."""

import json
import random
import shutil

import pytest
from conftest import require
from nemo_fixtures import fixture

from mlx_grpo import UserError
from mlx_grpo.nemo_convert import export_hf, import_hf

require("torch")
require("yaml")

FILES = [   # folder, what in it, file to damage (None: the archive itself)
    *(("llama3_gqa", "nemo2", file) for file in (
        "context/model.yaml", "context/io.json", "context/nemo_tokenizer/tokenizer.json", "weights/.metadata",
        "weights/metadata.json", "weights/common.pt", "weights/__0_0.distcp")),
    ("llama_hf5_bridge060", "mbridge", "iter_0000000/run_config.yaml"), ("falcon_new_arch", "nemo1_dist.nemo", None),
    ("llama_nemo1", "nemo1_ckpt.nemo", None),
    *(("qwen2_bias", "hf", file) for file in (
        "config.json", "tokenizer.json", "generation_config.json", "model.safetensors")),
]
VALUES = (None, -1, 0, 3, "x", [], {}, [1], 1e300, True, {"a": 1}, 10**9)


def damaged(data, name, draw):
    """The bytes with one value of JSON or YAML replaced, or with some bytes flipped, cut, doubled or inserted."""
    kind = draw.choice(("value", "flip", "flip", "cut", "double", "insert"))
    at = draw.randrange(min(len(data), draw.choice((3000, len(data)))))
    if kind == "value" and name.endswith(".json"):
        table = json.loads(data)
        table[draw.choice(list(table))] = draw.choice(VALUES)
        return json.dumps(table).encode()
    if kind == "value" and name.endswith(".yaml"):
        lines = data.decode().split("\n")
        i = draw.choice([i for i, line in enumerate(lines) if ":" in line])
        lines[i] = f"{lines[i].split(':')[0]}: {json.dumps(draw.choice(VALUES))}"
        return "\n".join(lines).encode()
    if kind == "cut":
        return data[:at]
    if kind == "double":
        return data[:at] + data[at:at + 50] + data[at:]
    if kind == "insert":
        return data[:at] + draw.choice((b"null", b"[", b"{", b"1e999", b"NaN", b"'", b'"')) + data[at:]
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        data[min(len(data) - 1, at + draw.randrange(200))] = draw.randrange(256)
    return bytes(data)


def survive(folder, name, file, seed, tmp_path):
    """True where the damaged input was converted all the same, False where it was refused."""
    draw, source, work = random.Random(f"{folder}{name}{file}{seed}"), fixture(folder) / name, tmp_path / str(seed)
    target = work / source.name
    work.mkdir()
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    path = target / file if file else target
    path.write_bytes(damaged(path.read_bytes(), path.name, draw))
    try:
        (import_hf if name == "hf" else export_hf)(target, work / "out")
        return True
    except UserError as error:
        assert "\n" not in str(error), error
        assert [p.name for p in work.iterdir()] == [target.name]
        return False
    finally:
        shutil.rmtree(work)


@pytest.mark.parametrize("folder,name,file", FILES)
def test_random_damage_is_refused_or_harmless(folder, name, file, tmp_path):
    for seed in range(8):
        survive(folder, name, file, seed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("folder,name,file", FILES)
def test_much_random_damage_is_refused_or_harmless(folder, name, file, tmp_path):
    refused = sum(not survive(folder, name, file, seed, tmp_path) for seed in range(100, 400))
    assert refused or name == "hf" or file in ("context/nemo_tokenizer/tokenizer.json", "weights/common.pt")
