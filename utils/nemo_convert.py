"""
The two conversions, as functions.

    import_hf(source, output, container="nemo2")    a Hugging Face model -> nemo2, bridge or nemo1
    export_hf(path, output)                         any of the three -> a Hugging Face directory

One tensor is held at a time. Both plan everything first (shapes, names, space on the disk), write into a hidden
directory and rename it at the end; both return a report: a dict with the counts, what was left out, and notes.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.files import check_free_space, human_bytes
from mlx_grpo.nemo_config import override, spec_from_hf
from mlx_grpo.nemo_config_out import head_copied, vocabulary_rows
from mlx_grpo.nemo_dist import DistWriter
from mlx_grpo.nemo_families import check_format
from mlx_grpo.nemo_files import read_json
from mlx_grpo.nemo_hf import TOKENIZER_FILES, HFSource, HFWriter, HubFolder, copy_tokenizer, fetch, tokenizer_length
from mlx_grpo.nemo_import_plan import import_plan
from mlx_grpo.nemo_job import resumable
from mlx_grpo.nemo_read import open_checkpoint, optional_json
from mlx_grpo.nemo_resolve import main_dtype, resolve, torch_dtype
from mlx_grpo.nemo_write import (bridge_state, configuration, dump_json, lightning_state, pack, write_bridge,
                                 write_nemo1, write_nemo2)

ITEM_OVERHEAD = 2000       # bytes that torch.save adds to an item, about
NO_PROGRESS = lambda done, total: None          # noqa: E731


@dataclass
class Source:
    """What goes beside the weights: config.json, generation_config.json or None, the tokenizer's folder, a name without
    a path."""
    hf_config: dict
    generation_config: dict
    tokenizer: object
    name: str


def fingerprint(files, **options):
    """What must be the same for --resume: the source's files (name, size, time) and the options."""
    options["overrides"] = options["overrides"] or {}
    stats = [[str(f.name), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files) if f.is_file()]
    return hashlib.sha256(json.dumps([stats, options], sort_keys=True, default=str).encode()).hexdigest()


def check_space(output, written, model):
    """Raises UserError where the disk lacks the bytes to be written; [a note] below three times the model, which
    NVIDIA's documents ask for (theirs keeps the download, a converted copy and a packed one)."""
    check_free_space(output, written + (64 << 20), f"writing {output}")
    parent = next(p for p in Path(output).absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    return [f"the disk has {human_bytes(free)} free, less than three times the model ({human_bytes(3 * model)}), as "
            "NVIDIA's documents ask; this conversion itself fits"] if free < 3 * model else []


def track(job, total, progress):
    """Report the bytes written so far, of about `total`, after each item."""
    done = 0

    def advance(nbytes):
        nonlocal done
        done += nbytes
        progress(min(done, total), total)
    job.progress = advance


# ---- Hugging Face -> NeMo ----

def import_hf(source, output, container="nemo2", dtype=None, overrides=None, resume=False, overwrite=False,
              progress=NO_PROGRESS):
    """Write the model `source` (a directory, org/name or hf://org/name) as a NeMo checkpoint at `output`.

    container: "nemo2" or "bridge" (a directory), "nemo1" (the .nemo file). dtype: "float32", "bfloat16", "float16" or
    None to keep each tensor's. overrides: {num_layers: ...} replacing values of config.json. progress(done_bytes,
    total_bytes). Returns the report.
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
    name = str(source).removeprefix("hf://")
    name = path.resolve().name if Path(name).is_dir() else name
    beside = Source(config, optional_json(folder, "generation_config.json"), folder, name)
    length = tokenizer_length(folder)
    settings = configuration(container, family, spec, length, beside.generation_config is not None)
    rows = vocabulary_rows(family, container, spec, length)[0]
    pieces, objects, dropped = import_plan(hf, family, spec, container, rows, head_copied(family, container, spec),
                                           torch_dtype(dtype))
    total = sum(math.prod(p.extent) * p.dtype.itemsize + ITEM_OVERHEAD for p in pieces) + len(objects) * ITEM_OVERHEAD
    copies = 2 if container == "nemo1" else 1                       # the archive is packed from its files
    notes = check_space(output, copies * total, total)
    mark = fingerprint(path.iterdir(), container=container, dtype=dtype, overrides=overrides, kind="import")
    packed = f"{output.name}.packed"
    with resumable(output, mark, resume, overwrite, packed if container == "nemo1" else ".") as job:
        track(job, copies * total, progress)
        weights = job.directory / {"nemo2": "weights", "bridge": "iter_0000000",
                                   "nemo1": "content/model_weights"}[container]
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
    return {"output": str(output), "format": container, "architecture": family.name,
            "tensors": len({p.key for p in pieces}), "bytes": total, "dtype": spec["params_dtype"],
            "parameters": sum(math.prod(s) for _, s in hf.tensors.values()), "tokenizer": copied, "left_out": dropped,
            "notes": notes}


# ---- NeMo -> Hugging Face ----

def export_hf(path, output, dtype=None, overrides=None, tokenizer=None, resume=False, overwrite=False,
              progress=NO_PROGRESS):
    """Write the NeMo checkpoint `path` as a Hugging Face directory `output`. tokenizer: a directory to take the
    tokenizer from, where the checkpoint has none. Other arguments as in import_hf. Returns the report."""
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
        checkpoint.notes.append("the checkpoint has no tokenizer, so none was written; --tokenizer DIR takes one from "
                                "a directory")
    return {"output": str(output), "format": "hf", "architecture": checkpoint.family.name, "tensors": len(planned),
            "parameters": sum(math.prod(shape) for _, shape in planned.values()), "bytes": total,
            "dtype": spec["params_dtype"], "tokenizer": copied, "left_out": checkpoint.store.skipped,
            "notes": checkpoint.notes}
