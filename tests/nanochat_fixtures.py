"""What the nanochat tests share: the checkpoints in fixtures/nanochat, and random ones of the other generations."""

import json
import math
from collections import OrderedDict
from pathlib import Path

import convert_nanochat
import mlx.core as mx
import numpy as np
from conftest import FIXTURES, require
from mlx_grpo import nanochat_checkpoint as checkpoint
from mlx_grpo import nanochat_folders, nanochat_verify

STORED = ("gen1", "gen3", "gen5")
TINY = {"sequence_len": 256, "vocab_size": 600, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64}


def folder(generation):
    return FIXTURES / "nanochat" / generation


def reference(generation):
    """nanochat's own inputs and outputs: name -> array."""
    with np.load(folder(generation) / "reference" / "reference.npz") as stored:
        return dict(stored)


def conversations(generation):
    return json.loads((folder(generation) / "reference" / "conversations.json").read_text())


def tokenizer_cases(generation):
    return json.loads((folder(generation) / "reference" / "tokenizer_cases.json").read_text())


def converted(source, output, **options):
    """The record of a conversion of the checkpoint in folder `source`."""
    return convert_nanochat.convert(nanochat_folders.find_checkpoint(source), output, **options)


def load(directory):
    model, config = nanochat_verify.load_as_stored(directory)
    return model, config


def random_checkpoint(target, generation, step=1, pattern="SSSL", sizes=TINY, dtype="float32", padded=640, seed=0):
    """A checkpoint of generation 1..5 with random weights in every tensor, and the 600 tokens of gen3's tokenizer."""
    torch = require("torch")
    draw = torch.Generator().manual_seed(seed)
    config = {**sizes, **({"window_pattern": pattern} if generation > 1 else {})}
    tensors = OrderedDict()
    for name, shape in checkpoint.expected_shapes(checkpoint.GENERATIONS[generation], config, padded).items():
        spread = 1 / math.sqrt(shape[-1]) if len(shape) > 1 and not checkpoint.has_vocabulary_rows(name) else 0.5
        tensors[name] = torch.randn(shape, generator=draw) * spread
        if checkpoint.has_vocabulary_rows(name) and name != "lm_head.weight":
            tensors[name] = tensors[name].to(getattr(torch, dtype))
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, target / f"model_{step:06d}.pt")
    (target / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}))
    (target / "tokenizer.pkl").write_bytes((folder("gen3") / "tokenizer.pkl").read_bytes())
    return tensors


def mean_loss(model, ids):
    """Mean next-token cross entropy, as nanochat's training computes it."""
    logits = model(ids[:, :-1]).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -mx.take_along_axis(logprobs, ids[:, 1:, None], axis=-1).mean()
