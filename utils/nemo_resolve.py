"""
What an open checkpoint is as a Hugging Face model: its spec, config.json and export steps, decided from the
checkpoint's configuration, its tensors and, where they don't contradict it, the source's config.json that our own
checkpoints keep.
"""

import math

from mlx_grpo import UserError
from mlx_grpo.nemo_config import DTYPES, hf_from_spec, override, spec_from_hf
from mlx_grpo.nemo_config_in import from_megatron, from_nemo1
from mlx_grpo.nemo_export_plan import MegatronTensors, export_plan
from mlx_grpo.nemo_hf import token_ids, tokenizer_length
from mlx_grpo.nemo_layout import EMBEDDING, HEAD
from mlx_grpo.nemo_write import configuration


def torch_dtype(name):
    """The torch dtype of a name such as "bfloat16"; None for None or "auto"."""
    if name in (None, "auto"):
        return None
    if name not in DTYPES:
        raise UserError(f"--dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    import torch
    return getattr(torch, name)


def main_dtype(tensors, where):
    """The name of the dtype that most bytes have."""
    counts = {}
    for dtype, shape in tensors:
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape) * dtype.itemsize
    name = str(max(counts, key=counts.get)).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{where} has {name} weights; choose a dtype with --dtype ({', '.join(DTYPES)})")
    return name


def read_back(checkpoint, family, spec):
    """The spec that a checkpoint written from `spec` would give: what a container can't say is lost here as well."""
    spec = spec | {"params_dtype": spec["params_dtype"] or checkpoint.spec["params_dtype"] or "float32"}
    settings = configuration(checkpoint.container, family, spec, tokenizer_length(checkpoint.tokenizer),
                             checkpoint.generation_config is not None)
    if checkpoint.container == "nemo1":
        return from_nemo1(settings)[1]
    return from_megatron(settings, checkpoint.container)[1]


def source_spec(checkpoint):
    """(the spec of the checkpoint's hf_config.json, the values in which the checkpoint contradicts it) or (None, ())
    without a usable one."""
    if checkpoint.hf_config is None:
        return None, ()
    try:
        family, spec = spec_from_hf(checkpoint.hf_config)
        expected = read_back(checkpoint, family, spec)
    except UserError as error:
        checkpoint.notes.append(f"hf_config.json was not used: {error}")
        return None, ()
    if family.name != checkpoint.family.name:
        checkpoint.notes.append(f"hf_config.json was not used: it is of a {family.name} model")
        return None, ()
    own = ("vocab_size", "params_dtype", "share_embeddings_and_output_weights")        # decided by the tensors
    changed = sorted(k for k in expected if k not in own and expected[k] != checkpoint.spec.get(k))
    return spec, changed


def decide_vocabulary(checkpoint, tensors, kept, overrides):
    """Rows of the vocabulary; the rest of the stored rows is padding. Raises UserError where the configuration asks for
    more rows than there are. An explicit size is believed; one guessed from the tokenizer or the source only if the
    rows behind are zero."""
    rows = tensors.shape(EMBEDDING)[0]
    stated = overrides.get("vocab_size", checkpoint.spec["vocab_size"])
    guessed = kept["vocab_size"] if kept else None
    if guessed is None and checkpoint.container == "nemo2" and checkpoint.family.traits.get("padded_rows"):
        guessed = tokenizer_length(checkpoint.tokenizer)
    size = stated or guessed or rows
    if size > rows:
        if stated:
            raise UserError(f"{checkpoint.path}: vocab_size is {size}, but the embedding has only {rows} rows")
        return rows
    if size < rows:
        zero = tensors.rows_are_zero(size)
        if not stated and not zero:
            checkpoint.notes.append(f"all {rows} rows of the embedding were kept: those from {size} on are not zero, "
                                    "so they may be used; --model-config vocab_size=N cuts them")
            return rows
        checkpoint.notes.append(f"{rows - size} padding rows of the vocabulary were left out" +
                                ("" if zero else " (they are not zero)"))
    return size


def decide_tied(checkpoint, tensors, kept):
    """Whether the head is the embedding: it isn't stored, or stored as an equal copy where NVIDIA's importers write
    one."""
    shared, head = checkpoint.spec["share_embeddings_and_output_weights"], tensors.has(HEAD)
    if not head:
        return bool(shared or checkpoint.family.traits.get("always_tied"))
    if not shared and checkpoint.container not in checkpoint.family.head_copies:
        return False
    equal = tensors.head_equals_embedding()
    if shared and not equal:
        checkpoint.notes.append("the configuration ties the head to the embedding, but a different one is stored: kept")
    return equal and (shared or kept is None or kept["share_embeddings_and_output_weights"])


def hf_config(checkpoint, spec, kept, changed, tied, overrides):
    """config.json: the source's own where the checkpoint doesn't contradict it, else one from the checkpoint's
    values."""
    ids = token_ids(checkpoint.tokenizer, checkpoint.generation_config)
    config = hf_from_spec(checkpoint.family, spec, ids)
    if kept is None:
        return config
    source = dict(checkpoint.hf_config)
    if changed or overrides:
        if changed:
            checkpoint.notes.append(f"the checkpoint differs from its hf_config.json in {', '.join(changed)}; the "
                                    "checkpoint's values were taken")
        source.pop("rope_parameters", None)
        source |= {k: v for k, v in config.items() if k not in ids}
    source["dtype" if "dtype" in source else "torch_dtype"] = spec["params_dtype"]
    if tied != kept["share_embeddings_and_output_weights"]:
        source["tie_word_embeddings"] = tied
    if source.get("vocab_size") != spec["vocab_size"]:
        source["vocab_size"] = spec["vocab_size"]
    return source


def resolve(checkpoint, overrides=None, dtype=None):
    """(tensors, spec, config.json, export steps) of an open checkpoint: everything its export needs, nothing written
    yet."""
    tensors, overrides = MegatronTensors(checkpoint.store), overrides or {}
    kept, changed = source_spec(checkpoint)
    spec = dict(checkpoint.spec)
    if kept is not None:
        spec |= {k: v for k, v in kept.items() if k not in changed}
    spec |= {"vocab_size": decide_vocabulary(checkpoint, tensors, kept, overrides),
             "share_embeddings_and_output_weights": decide_tied(checkpoint, tensors, kept)}
    spec = override(spec, overrides)
    stored = main_dtype(tensors.store.tensors.values(), checkpoint.path) if dtype is None else dtype
    if checkpoint.spec["params_dtype"] not in (None, stored) and dtype is None:
        checkpoint.notes.append(f"the configuration says {checkpoint.spec['params_dtype']}, the tensors are {stored}; "
                                "they were taken as they are")
    spec["params_dtype"] = stored
    tied = spec["share_embeddings_and_output_weights"]
    offset = 1 if (checkpoint.family.name, checkpoint.container) == ("gemma", "nemo1") else 0
    steps = export_plan(tensors, checkpoint.family, spec, tied, offset, torch_dtype(dtype))
    return tensors, spec, hf_config(checkpoint, spec, kept, changed, tied, overrides), steps
