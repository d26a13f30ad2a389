"""What a model directory or checkpoint holds, from its configuration and headers alone: no weight is loaded."""

import math
from pathlib import Path

from mlx_grpo.nemo_config import spec_from_hf
from mlx_grpo.nemo_files import read_json
from mlx_grpo.nemo_hf import TOKENIZER_FILES, HFSource, HubFolder, tokenizer_length
from mlx_grpo.nemo_layout import EMBEDDING
from mlx_grpo.nemo_read import open_checkpoint

FORMAT_NAMES = {"nemo2": "NeMo 2 directory", "bridge": "Megatron-Bridge directory", "nemo1": "NeMo 1 archive",
                "hf": "Hugging Face directory"}


def inspect(path):
    """A dict of what is at `path` (a NeMo checkpoint or a Hugging Face directory). Raises UserError where it is
    neither."""
    path = Path(path)
    if (path / "config.json").is_file() and not (path / "context").is_dir():
        return inspect_hf(path)
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.store.tensors
    rows = next((shape[0] for key, (_, shape) in tensors.items() if key.endswith(EMBEDDING)), None)
    padded = checkpoint.container == "nemo2" and checkpoint.family.traits.get("padded_rows")
    guessed = tokenizer_length(checkpoint.tokenizer) if padded else None
    found = describe(checkpoint.container, checkpoint.family, checkpoint.spec, tensors, checkpoint.tokenizer)
    found |= {"path": str(checkpoint.path), "vocabulary": checkpoint.spec["vocab_size"] or guessed or rows,
              "embedding_rows": rows,
              "training_step": checkpoint.step, "left_out_on_export": len(checkpoint.store.skipped),
              "notes": checkpoint.notes}
    checkpoint.close()
    return found


def inspect_hf(path):
    folder, source = HubFolder(path), HFSource(path)
    family, spec = spec_from_hf(read_json(folder, "config.json"))
    return describe("hf", family, spec, source.tensors, folder) | {"path": str(path), "vocabulary": spec["vocab_size"],
                                                                   "training_step": None, "notes": []}


def describe(container, family, spec, tensors, tokenizer):
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in tensors.values()})
    files = [name for name in TOKENIZER_FILES if tokenizer is not None and tokenizer.has(name)]
    found = {"format": container, "architecture": family.name, "layers": spec["num_layers"],
             "hidden_size": spec["hidden_size"],
             "ffn_hidden_size": spec["ffn_hidden_size"], "attention_heads": spec["num_attention_heads"],
             "query_groups": spec["num_query_groups"], "head_size": spec["kv_channels"],
             "max_positions": spec["seq_length"],
             "rope": {"theta": spec["rotary_base"]} | spec["rope"], "dtype": ", ".join(dtypes),
             "parameters": sum(math.prod(shape) for _, shape in tensors.values()), "tensors": len(tensors),
             "bytes": sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values()),
             "tokenizer": {"files": files, "length": tokenizer_length(tokenizer)} if files else None}
    for name in ("sliding_window", "num_moe_experts", "moe_router_topk"):
        if spec.get(name):
            found[name] = spec[name]
    return found


def lines(found):
    """The dict of `inspect` for people, one line per value."""
    from mlx_grpo.files import human_bytes
    yield f"{found['path']}"
    for key, value in found.items():
        if key in ("path", "notes") or value is None and key != "tokenizer":
            continue
        if key == "format":
            value = f"{FORMAT_NAMES[value]} ({value})"
        elif key == "bytes":
            value = human_bytes(value)
        elif key == "parameters":
            value = f"{value:,}"
        elif key == "tokenizer":
            value = ", ".join([f"{value['length'] or 'unknown number of'} ids", *value["files"]]) if value else "none"
        elif key == "rope":
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        yield f"  {key.replace('_', ' '):20} {value}"
    for note in found["notes"]:
        yield f"  note: {note}"
