"""Proves a converted nanochat: its logits against nanochat's own where they are stored, and against plain torch."""

import importlib.util

import mlx.core as mx
import numpy as np

from mlx_grpo.nanochat_checkpoint import has_vocabulary_rows
from mlx_grpo.nanochat_model import MODEL_TYPE, Model, ModelArgs

LOGIT_LIMIT = 1e-3            # a right port measures below 1e-4 in float32, any wrong constant 0.2 or more
SAMPLE_TEXT = "The quick brown fox counts: 1, 22, 333. Ünïcode 😀\n\tdef f(x): return x ** 2"


def model_classes(config):
    """(Model, ModelArgs) for a converted directory's config: mlx-lm's own for generation 1, ours for the rest."""
    if config["model_type"] == MODEL_TYPE:
        return Model, ModelArgs
    from mlx_lm.models import nanochat
    return nanochat.Model, nanochat.ModelArgs


def load_as_stored(directory):
    """(model, config) as it is used: its dtype, its quantisation."""
    from mlx_lm.utils import load_model
    return load_model(directory, model_config={"model_file": None}, get_model_classes=model_classes)


def load_exact(directory, config):
    """The model with the stored weights in float32, quantised ones dequantised: what it computes, without what its
    arithmetic rounds."""
    model_class, args_class = model_classes(config)
    model, stored = model_class(args_class.from_dict(config)), mx.load(str(directory / "model.safetensors"))
    quantization, weights = config.get("quantization"), {}
    for name in [name for name in stored if not name.endswith((".scales", ".biases"))]:
        value = stored.pop(name)
        if quantization and name.replace(".weight", ".scales") in stored:
            scales, biases = (stored.pop(name.replace(".weight", part)) for part in (".scales", ".biases"))
            value = mx.dequantize(value, scales, biases, quantization["group_size"], quantization["bits"])
        weights[name] = value.astype(mx.float32)
        mx.eval(weights[name])
    model.load_weights(list(weights.items()), strict=True)
    return model


def probe_batches(encoding, arch, seed=0):
    """Token batches (B, T): a text, two random rows, and one row longer than the shortest window."""
    draw = np.random.default_rng(seed)
    windows = [window for window in arch["attention_windows"] if window is not None]
    long = min(windows) + 44 if windows else 100
    text = encoding.encode_ordinary(SAMPLE_TEXT)
    return [np.array([text]), *(draw.integers(0, encoding.n_vocab, shape) for shape in ((2, 40), (1, long)))]


def mlx_logits(model, batches):
    return [np.array(model(mx.array(ids.astype(np.int32))).astype(mx.float32)) for ids in batches]


def differences(logits, reference):
    """Largest and mean absolute difference, the share of positions with the same best token, and their number."""
    gaps = [np.abs(a - b) for a, b in zip(logits, reference, strict=True)]
    same = np.concatenate([(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in zip(logits, reference, strict=True)])
    return {"max": float(np.max([gap.max() for gap in gaps])),           # NaN where any is, unlike max()
            "mean": float(sum(gap.sum(dtype=np.float64) for gap in gaps) / sum(gap.size for gap in gaps)),
            "same_best_token": float(same.mean()), "positions": int(same.size)}


def stored_reference(folder):
    """(batches, positions, logits) that nanochat itself left in <checkpoint>/reference/reference.npz, or None."""
    path = folder / "reference" / "reference.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        numbers = sorted(int(name.removeprefix("ids_")) for name in stored if name.startswith("ids_"))
        return tuple([stored[f"{part}_{n}"] for n in numbers] for part in ("ids", "pos", "logits"))


def torch_is_there():
    return importlib.util.find_spec("torch") is not None


def can_verify(folder, reduced):
    """Whether there is something to compare with: torch, or nanochat's stored logits if the output is plain float32."""
    return torch_is_there() or not reduced and stored_reference(folder) is not None


def rounded_parameter(tensors, config, dtype, is_quantised):
    """A function, nanochat's name -> float32 torch tensor, rounded as the conversion rounded it."""
    from mlx_grpo.nanochat_torch import as_torch
    quantization = config.get("quantization")

    def parameter(name):
        stored = tensors[name]
        data = stored.numpy(last=config["vocab_size"] if has_vocabulary_rows(name) else None)
        value = mx.array(data).view(mx.bfloat16) if stored.dtype == "bfloat16" else mx.array(data)
        value = value.astype(dtype)
        if quantization and is_quantised(name, data.shape):
            group_size, bits = quantization["group_size"], quantization["bits"]
            value = mx.dequantize(*mx.quantize(value, group_size, bits), group_size, bits)
        return as_torch(np.array(value.astype(mx.float32)), "float32")

    return parameter


def verify(directory, config, arch, tensors, encoding, folder, dtype, is_quantised):
    """Compare a converted directory with torch, and with nanochat's stored logits where the checkpoint has some.

    Returns a record of the measured differences with "passed". What counts is exact arithmetic: the stored weights in
    float32, on the CPU (the GPUs of some machines round float32 products to 10 bits), against torch on the checkpoint's
    weights rounded alike. For a half-precision or quantised model the record also has what its rounding costs."""
    reduced = dtype != mx.float32 or "quantization" in config
    batches, reference, record = probe_batches(encoding, arch), stored_reference(folder), {"limit": LOGIT_LIMIT}
    default_device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        model = load_exact(directory, config)
        exact = mlx_logits(model, batches)
        if reference and not reduced:
            ids, positions, logits = reference
            mine = [full[:, pos] for full, pos in zip(mlx_logits(model, ids), positions, strict=True)]
            record["nanochat"] = differences(mine, logits)
    finally:
        mx.set_default_device(default_device)
    del model
    mx.clear_cache()                      # the two models are never in memory together
    if torch_is_there():
        from mlx_grpo.nanochat_torch import torch_logits
        expected = torch_logits(batches, rounded_parameter(tensors, config, dtype, is_quantised), arch)
        record["torch"] = differences(exact, expected)
        if reduced:
            plain = rounded_parameter(tensors, {**config, "quantization": None}, mx.float32, is_quantised)
            full = torch_logits(batches, plain, arch)
            record["rounding"] = differences(mlx_logits(load_as_stored(directory)[0], batches), full)
    compared = [record[name]["max"] for name in ("nanochat", "torch") if name in record]
    record["passed"] = bool(compared) and all(gap < LOGIT_LIMIT for gap in compared)
    return record
