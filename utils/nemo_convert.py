"""
The two conversions, as functions.

    import_hf(source, output, container="nemo2")    a Hugging Face model -> nemo2, bridge or nemo1
    export_hf(path, output)                         any of the three -> a Hugging Face directory

One tensor is held at a time. Both plan everything first (shapes, names, space on the disk), write into a hidden directory and
rename it at the end; both return a report: a dict with the counts, what was left out, and notes.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.files import check_free_space, human_bytes
from mlx_grpo.nemo_config import (DTYPES, from_megatron, from_nemo1, head_copied, hf_from_spec, override, spec_from_hf,
                                  vocabulary_rows)
from mlx_grpo.nemo_dist import DistWriter
from mlx_grpo.nemo_families import check_format
from mlx_grpo.nemo_files import read_json
from mlx_grpo.nemo_hf import (HFSource, HFWriter, HubFolder, TOKENIZER_FILES, copy_tokenizer, fetch, token_ids, tokenizer_length)
from mlx_grpo.nemo_job import resumable
from mlx_grpo.nemo_read import open_checkpoint, optional_json
from mlx_grpo.nemo_weights import (MegatronTensors, export_plan, head_equals_embedding, import_plan, rows_are_zero)
from mlx_grpo.nemo_write import (bridge_state, configuration, dump_json, lightning_state, pack, write_bridge, write_nemo1, write_nemo2)

ITEM_OVERHEAD = 2000       # bytes that torch.save adds to an item, about
NO_PROGRESS = lambda done, total: None          # noqa: E731


@dataclass
class Source:
    """What goes beside the weights: config.json, generation_config.json or None, the tokenizer's folder, a name without a path."""
    hf_config: dict
    generation_config: dict
    tokenizer: object
    name: str


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


def fingerprint(files, **options):
    """What must be the same for --resume: the source's files (name, size, time) and the options."""
    options["overrides"] = options["overrides"] or {}
    stats = [[str(f.name), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files) if f.is_file()]
    return hashlib.sha256(json.dumps([stats, options], sort_keys=True, default=str).encode()).hexdigest()


def check_space(output, written, model):
    """Raises UserError where the disk lacks the bytes to be written; [a note] below three times the model, which NVIDIA's documents
    ask for (theirs keeps the download, a converted copy and a packed one)."""
    check_free_space(output, written + (64 << 20), f"writing {output}")
    parent = next(p for p in Path(output).absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    return [f"the disk has {human_bytes(free)} free, less than three times the model ({human_bytes(3 * model)}), as NVIDIA's documents "
            "ask; this conversion itself fits"] if free < 3 * model else []


def track(job, total, progress):
    """Report the bytes written so far, of about `total`, after each item."""
    done = 0

    def advance(nbytes):
        nonlocal done
        done += nbytes
        progress(min(done, total), total)
    job.progress = advance


# ---- Hugging Face -> NeMo ----

def import_hf(source, output, container="nemo2", dtype=None, overrides=None, resume=False, overwrite=False, progress=NO_PROGRESS):
    """Write the model `source` (a directory, org/name or hf://org/name) as a NeMo checkpoint at `output`.

    container: "nemo2" or "bridge" (a directory), "nemo1" (the .nemo file). dtype: "float32", "bfloat16", "float16" or None to keep
    each tensor's. overrides: {num_layers: ...} replacing values of config.json. progress(done_bytes, total_bytes). Returns the report.
    """
    output = Path(output)
    if container == "nemo1" and output.suffix != ".nemo":
        raise UserError(f"--format nemo1 writes one file: give --output a name that ends in .nemo, not {output.name!r}")
    path = fetch(source)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json; it is not a Hugging Face model")
    folder = HubFolder(path)
    config = read_json(folder, "config.json")
    family, spec = spec_from_hf(config)
    spec = override(spec, overrides or {})
    check_format(family, container)
    hf = HFSource(path)
    spec["params_dtype"] = dtype or main_dtype(hf.tensors.values(), path)
    name = str(source).removeprefix("hf://") if not Path(str(source).removeprefix("hf://")).is_dir() else path.resolve().name
    beside = Source(config, optional_json(folder, "generation_config.json"), folder, name)
    length = tokenizer_length(folder)
    settings = configuration(container, family, spec, length, beside.generation_config is not None)
    rows = vocabulary_rows(family, container, spec, length)[0]
    pieces, objects, dropped = import_plan(hf, family, spec, container, rows, head_copied(family, container, spec), torch_dtype(dtype))
    total = sum(math.prod(p.extent) * p.dtype.itemsize + ITEM_OVERHEAD for p in pieces) + len(objects) * ITEM_OVERHEAD
    copies = 2 if container == "nemo1" else 1                       # the archive is packed from its files
    notes = check_space(output, copies * total, total)
    mark = fingerprint(path.iterdir(), container=container, dtype=dtype, overrides=overrides, kind="import")
    packed = f"{output.name}.packed"
    with resumable(output, mark, resume, overwrite, packed if container == "nemo1" else ".") as job:
        track(job, copies * total, progress)
        weights = job.directory / {"nemo2": "weights", "bridge": "iter_0000000", "nemo1": "content/model_weights"}[container]
        writer = DistWriter(job, weights, total)
        for key in objects:
            writer.put_object(key)
        for piece in pieces:
            writer.put(piece.key, piece.size, piece.offsets, piece.extent, piece.dtype, piece.make)
        job.flush()
        if container == "nemo2":
            write_nemo2(job.directory, family, settings, beside)
            writer.finish(lightning_state())
        elif container == "bridge":
            write_bridge(job.directory, settings, beside, output.name)
            writer.finish(bridge_state())
        else:
            write_nemo1(job.directory / "content", settings, beside)
            writer.finish({})
            job.close()
            pack(job.directory / "content", job.directory / packed, job.progress)
    hf.close()
    progress(copies * total, copies * total)
    copied = [n for n in TOKENIZER_FILES if folder.has(n)]
    notes += [] if copied else ["the source has no tokenizer files, so none were copied"]
    return {"output": str(output), "format": container, "architecture": family.name, "tensors": len({p.key for p in pieces}),
            "parameters": sum(math.prod(s) for _, s in hf.tensors.values()), "bytes": total, "dtype": spec["params_dtype"],
            "tokenizer": copied, "left_out": dropped, "notes": notes}


# ---- NeMo -> Hugging Face ----

def read_back(checkpoint, family, spec):
    """The spec that a checkpoint written from `spec` would give: what a container can't say is lost here as well."""
    spec = spec | {"params_dtype": spec["params_dtype"] or checkpoint.spec["params_dtype"] or "float32"}
    settings = configuration(checkpoint.container, family, spec, tokenizer_length(checkpoint.tokenizer), checkpoint.generation_config is not None)
    return from_nemo1(settings)[1] if checkpoint.container == "nemo1" else from_megatron(settings, checkpoint.container)[1]


def source_spec(checkpoint):
    """(the spec of the checkpoint's hf_config.json, the values in which the checkpoint contradicts it) or (None, ()) without a usable one."""
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
    """Rows of the vocabulary; the rest of the stored rows is padding. Raises UserError where the configuration asks for more rows
    than there are. An explicit size is believed; one guessed from the tokenizer or the source only if the rows behind are zero."""
    rows = tensors.shape("embedding.word_embeddings.weight")[0]
    stated = overrides.get("vocab_size", checkpoint.spec["vocab_size"])
    guessed = kept["vocab_size"] if kept else None
    if guessed is None and checkpoint.container == "nemo2" and checkpoint.family.traits.get("padded_rows"):
        guessed = tokenizer_length(checkpoint.tokenizer)
    size = stated or guessed or rows
    if size > rows:
        if stated:
            raise UserError(f"{checkpoint.path}: the configuration has vocab_size {size}, the embedding only {rows} rows")
        return rows
    if size < rows:
        zero = rows_are_zero(tensors, size)
        if not stated and not zero:
            checkpoint.notes.append(f"all {rows} rows of the embedding were kept: those from {size} on are not zero, so they may be used; "
                                    "--model-config vocab_size=N cuts them")
            return rows
        checkpoint.notes.append(f"{rows - size} padding rows of the vocabulary were left out" + ("" if zero else " (they are not zero)"))
    return size


def decide_tied(checkpoint, tensors, kept):
    """Whether the head is the embedding: it isn't stored, or stored as an equal copy where NVIDIA's importers write one."""
    shared, head = checkpoint.spec["share_embeddings_and_output_weights"], tensors.has("output_layer.weight")
    if not head:
        return True if shared or checkpoint.family.traits.get("always_tied") else False
    if not shared and checkpoint.container not in checkpoint.family.head_copies:
        return False
    equal = head_equals_embedding(tensors)
    if shared and not equal:
        checkpoint.notes.append("the configuration shares the embedding with the head, but the stored head differs: it was kept")
    return equal and (shared or kept is None or kept["share_embeddings_and_output_weights"])


def hf_config(checkpoint, spec, kept, changed, tied, overrides):
    """config.json: the source's own where the checkpoint doesn't contradict it, else one from the checkpoint's values."""
    ids = token_ids(checkpoint.tokenizer, checkpoint.generation_config)
    config = hf_from_spec(checkpoint.family, spec, ids)
    if kept is None:
        return config
    source = dict(checkpoint.hf_config)
    if changed or overrides:
        if changed:
            checkpoint.notes.append(f"the checkpoint differs from its hf_config.json in {', '.join(changed)}; the checkpoint's values were taken")
        source.pop("rope_parameters", None)
        source |= {k: v for k, v in config.items() if k not in ids}
    source["dtype" if "dtype" in source else "torch_dtype"] = spec["params_dtype"]
    if tied != kept["share_embeddings_and_output_weights"]:
        source["tie_word_embeddings"] = tied
    if source.get("vocab_size") != spec["vocab_size"]:
        source["vocab_size"] = spec["vocab_size"]
    return source


def resolve(checkpoint, overrides=None, dtype=None):
    """(tensors, spec, config.json, export steps) of an open checkpoint: everything its export needs, nothing written yet."""
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
        checkpoint.notes.append(f"the configuration says {checkpoint.spec['params_dtype']}, the tensors are {stored}; they were taken as they are")
    spec["params_dtype"] = stored
    tied = spec["share_embeddings_and_output_weights"]
    offset = 1 if (checkpoint.family.name, checkpoint.container) == ("gemma", "nemo1") else 0
    steps = export_plan(tensors, checkpoint.family, spec, tied, offset, torch_dtype(dtype))
    return tensors, spec, hf_config(checkpoint, spec, kept, changed, tied, overrides), steps


def export_hf(path, output, dtype=None, overrides=None, tokenizer=None, resume=False, overwrite=False, progress=NO_PROGRESS):
    """Write the NeMo checkpoint `path` as a Hugging Face directory `output`. tokenizer: a directory to take the tokenizer from, where
    the checkpoint has none. Other arguments as in import_hf. Returns the report."""
    output, checkpoint = Path(output), open_checkpoint(path)
    if tokenizer is not None:
        if not Path(tokenizer).is_dir():
            raise UserError(f"--tokenizer {tokenizer}: no such directory")
        checkpoint.tokenizer = HubFolder(tokenizer)
    tensors, spec, config, steps = resolve(checkpoint, overrides, dtype)
    planned = {name: (step.dtype, shape) for step in steps for name, shape in zip(step.names, step.shapes)}
    total = sum(math.prod(shape) * kind.itemsize for kind, shape in planned.values())
    checkpoint.notes += check_space(output, total, total)
    base = checkpoint.path
    files = [base] if base.is_file() else [p for p in base.rglob("*") if p.is_file()]
    mark = fingerprint(files, dtype=dtype, overrides=overrides, tokenizer=tokenizer, kind="export")
    with resumable(output, mark, resume, overwrite) as job:
        track(job, total, progress)
        writer = HFWriter(job, planned)
        for step in steps:
            writer.put(step.names, step.make)
        job.flush()
        writer.finish()
        copied = copy_tokenizer(checkpoint.tokenizer, job.directory)
        if checkpoint.generation_config is not None:
            dump_json(checkpoint.generation_config, job.directory / "generation_config.json")
        dump_json(config, job.directory / "config.json")
    checkpoint.close()
    progress(total, total)
    if not copied:
        checkpoint.notes.append("the checkpoint has no tokenizer, so none was written; --tokenizer DIR takes one from a directory")
    return {"output": str(output), "format": "hf", "architecture": checkpoint.family.name, "tensors": len(planned),
            "parameters": sum(math.prod(shape) for _, shape in planned.values()), "bytes": total, "dtype": spec["params_dtype"],
            "tokenizer": copied, "left_out": checkpoint.store.skipped, "notes": checkpoint.notes}
