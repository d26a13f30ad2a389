"""Puts an adapter into its base's weights by mlx-lm's own fusing, and proves on logits that nothing else changed."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_grpo import nanochat_model
from mlx_grpo.adapter_files import base_of, load_onto
from mlx_grpo.checked_load import check_files, load_checked, register_nanochat
from mlx_grpo.files import atomic_directory, check_free_space
from mlx_grpo.model_check import check_sequences, compare_distributions, compare_logits, mlx_logits
from mlx_grpo.model_files import copy_tokenizer, open_tokenizer, write_card

FLOAT32_LIMIT = 1e-4       # largest difference of logits, relative to the largest logit (at least 1)
ROUNDINGS = 8              # the same in 16 bits: this many of the type's steps, since each weight is rounded once


@dataclass(frozen=True)
class Fusion:
    """How a fused model differs from base + adapter: largest difference of logits, mean KL in nats per token, and the
    KL that the adapter itself makes (base + adapter against base). `limit` is None where the result is quantised."""
    difference: float
    limit: float | None
    kl: float
    adapter_kl: float

    @property
    def passed(self):
        return self.kl < float("inf") if self.limit is None else self.difference <= self.limit      # NaN fails

    def lines(self):
        yield f"logits before and after: largest difference {self.difference:.2e}" + \
            ("" if self.limit is None else f" (limit {self.limit:.1e}): {'equal' if self.passed else 'NOT EQUAL'}")
        yield f"KL before and after: {self.kl:.2e} nats per token; the adapter moves the base by {self.adapter_kl:.2e}"


class NotEqual(Exception):
    """What would be written computes something else, so nothing is. Holds the lines that tell by how much."""


def fuse(base, adapter, output, *, base_name, dequantize=False, trust_remote_code=False):
    """Write the model directory `base` with the adapter of the mlx-lm directory `adapter` fused in to the new directory
    `output`. A quantised base stays quantised, as it was, unless `dequantize`. Returns (Fusion, [selected modules
    without weights]); raises NotEqual, and writes nothing, where a float result differs by more than rounding."""
    check_files(base)
    size = sum(file.stat().st_size for file in base.glob("model*.safetensors"))
    check_free_space(output, size * (8 if dequantize else 1), "the fused model")
    model, config, _ = load_checked(base, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(base, config, None, trust_remote_code)
    sequences = check_sequences(tokenizer, config.get("vocab_size") or config["text_config"]["vocab_size"])
    plain = logits(model, sequences)
    _, adapted, bare = load_onto(model, adapter)
    before = logits(model, sequences)
    fuse_modules(model, adapted, dequantize)
    if dequantize:
        from mlx_lm.utils import dequantize_model
        model = dequantize_model(model)
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    with atomic_directory(output) as work:
        written = write_model(model, config, work, trust_remote_code)
        fusion = compare(plain, before, logits(written, sequences), sequences, written)
        if not fusion.passed:
            raise NotEqual(*fusion.lines())
        copy_tokenizer(base, work, trust_remote_code)
        write_card(base, work, Path(output).name, base_name)
        report = {"base": base_name, "adapter": str(adapter), "dequantized": dequantize,
                  "logits_difference": fusion.difference, "limit": fusion.limit, "kl": fusion.kl,
                  "adapter_kl": fusion.adapter_kl}
        (work / "fused.json").write_text(json.dumps(report, indent=2) + "\n")
    return fusion, bare


def fuse_modules(model, adapted, dequantize):
    """Replace each of the `adapted` modules by mlx-lm's fused one, in the base's own type (DoRA's comes in float32)."""
    fused = {}
    for name, module in adapted.items():
        kinds = [a.dtype for a in base_of(module).values() if is_float(a)]
        fused[name] = module.fuse(dequantize=dequantize)
        for key, array in fused[name].items():
            if is_float(array) and kinds:
                fused[name][key] = array.astype(kinds[0])
    model.update_modules(tree_unflatten(list(fused.items())))


def write_model(model, config, work, trust_remote_code):
    """Write weights and config to `work`; returns the model as plain mlx-lm opens it from there (nanochat's later
    generations by our own class, of which it gets a copy)."""
    from mlx_lm.utils import load_model, save_config, save_model
    save_model(work, model, donate_model=True)
    save_config(dict(config), work / "config.json")
    changes = {}
    if register_nanochat(config):
        shutil.copyfile(nanochat_model.__file__, work / config["model_file"])
        changes = {"model_file": None}
    return load_model(work, model_config=changes, trust_remote_code=trust_remote_code)[0]


def compare(plain, before, after, sequences, written):
    """The Fusion from the logits (L, V) per sequence of the base, base + adapter, and the `written` model."""
    found = compare_logits(after, before)
    largest = max(1.0, *(float(abs(a).max()) for a in before))
    kinds = {a.dtype for module in written.modules() for a in module.values() if is_float(a)}
    step = max(mx.finfo(kind).eps for kind in kinds)
    limit = largest * (FLOAT32_LIMIT if kinds == {mx.float32} else ROUNDINGS * step)
    quantized = any("scales" in module for module in written.modules())
    distance = lambda a, b: compare_distributions(b, a, sequences)["kl"]
    return Fusion(found["max"], None if quantized else limit, distance(before, after), distance(before, plain))


def logits(model, sequences):
    """Logits (L, V) of each sequence with activations in float32, so that only the weights' rounding shows."""
    with float32_activations(model):
        return mlx_logits(model, sequences)


@contextlib.contextmanager
def float32_activations(model):
    """Within the block embeddings give float32, and MLX computes on in the wider type. Costs a float32 copy of them."""
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))]
    kept = [(module, key, array) for module in embeddings for key, array in module.items() if is_float(array)]
    for module, key, array in kept:
        module[key] = array.astype(mx.float32)
    try:
        yield
    finally:
        for module, key, array in kept:
            module[key] = array


def is_float(value):
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
