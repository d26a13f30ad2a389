"""NVIDIA's own small checkpoints (tests/fixtures/nemo, see the README there), unpacked once per run."""

import functools
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from conftest import FIXTURES, require

CHECKPOINTS = [   # folder, checkpoint in it
    ("falcon_new_arch", "nemo1_dist.nemo"), ("gemma_mqa", "nemo2"), ("gptneox_sequential", "mbridge"),
    ("llama32_rope_tied_bf16", "nemo2"), ("llama32_rope_tied_bf16", "mbridge"), ("llama3_gqa", "nemo2"),
    ("llama3_gqa", "mbridge"),
    ("llama_hf5_bridge060", "mbridge"), ("llama_nemo1", "nemo1_ckpt.nemo"), ("llama_nemo1", "nemo1_ckpt_te1.nemo"),
    ("llama_nemo1", "nemo1_dist.nemo"), ("llama_sharded", "mbridge_tp2pp1"), ("llama_sharded", "mbridge_per_layer"),
    ("llama_sharded", "nemo2_with_optimizer"), ("mistral_swa", "nemo2"), ("mixtral_moe4", "nemo2"),
    ("phi3_fused", "nemo2"),
    ("qwen2_bias", "nemo2"), ("qwen2_bias", "mbridge"), ("qwen3_qknorm", "nemo2"),
]
FOLDERS = sorted({folder for folder, _ in CHECKPOINTS})
UNPACKED = tempfile.TemporaryDirectory(prefix="nemo-fixtures-")


@functools.cache
def fixture(folder):
    """The unpacked folder of one model: hf/, checkpoints, reference_logits.npz. Not to be written to."""
    with tarfile.open(FIXTURES / "nemo" / f"{folder}.tar.xz") as archive:
        archive.extractall(UNPACKED.name, filter="data")
    return Path(UNPACKED.name) / folder


def tensors_of(path):
    """name -> tensor of a Hugging Face directory, by the safetensors library."""
    require("torch")
    from safetensors.torch import load_file
    return {name: tensor for file in sorted(Path(path).glob("*.safetensors")) for name,
            tensor in load_file(file).items()}


def same_tensors(a, b):
    """True where two Hugging Face directories hold the same names, shapes, dtypes and bits."""
    torch = require("torch")
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(a[n].reshape(-1).view(torch.uint8),
                                                                              b[n].reshape(-1).view(torch.uint8))
        for n in a)


def read_json(path):
    return json.loads(Path(path).read_text())


def reference(folder):
    """(input ids (B, T), transformers' logits (B, T, V)) stored with a fixture."""
    stored = np.load(fixture(folder) / "reference_logits.npz")
    return stored["input_ids"], stored["hf_logits"]


def transformers_logits(path, ids):
    """(B, T, V) in float32, eager attention."""
    torch, transformers = require("torch"), require("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
                                                              attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()
