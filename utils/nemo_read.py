"""
Opens a NeMo or Megatron-Bridge checkpoint of any of the three containers, as data: nothing of it is imported or
executed.

    nemo2    DIR/weights, DIR/context                      bridge   DIR/iter_<n>, or an iter_<n> itself
    nemo1    FILE.nemo (an uncompressed tar), or the same unpacked
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.nemo_config_in import from_megatron, from_nemo1
from mlx_grpo.nemo_dist import CkptStore, DistStore
from mlx_grpo.nemo_fiddle import config_arguments
from mlx_grpo.nemo_files import Folder, open_tar, read_json, read_yaml
from mlx_grpo.nemo_pickle import TorchZip

SIDECAR, GENERATION = "hf_config.json", "hf_generation_config.json"     # what our own checkpoints keep of the source
NUMBER = re.compile(r"iter_(\d+)$")


@dataclass
class Checkpoint:
    """A checkpoint that is open for reading. `tokenizer` is a folder or None; `spec` as in nemo_config; `step` None if
    unknown."""
    container: str
    path: Path
    family: object
    spec: dict
    store: object
    tokenizer: object = None
    hf_config: dict = None
    generation_config: dict = None
    step: int = None
    notes: list = field(default_factory=list)

    def close(self):
        self.store.folder.close()


def open_checkpoint(path):
    """The Checkpoint at `path`. Raises UserError where there is none, or it is damaged, unsupported or unsafe."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} doesn't exist")
    if path.is_file():
        return open_nemo1(path, open_tar(path))
    if path.name.endswith("-unfinished") or Path(f"{path}-unfinished").exists():
        raise UserError(f"{path} is marked unfinished: NeMo was interrupted while saving it")
    folder = Folder(path)
    if folder.has("model_config.yaml"):
        return open_nemo1(path, folder)
    if (path / "weights").is_dir():
        return open_nemo2(path)
    if path.name == "weights" and (path.parent / "context").is_dir():
        return open_nemo2(path.parent)
    iterations = bridge_iterations(path)
    if folder.has("run_config.yaml") or iterations:
        return open_bridge(path if folder.has("run_config.yaml") else iterations[-1])
    raise UserError(f"{path} is no NeMo checkpoint (looked for weights/ and context/, iter_<n>/, run_config.yaml, "
                    "model_config.yaml)")


def bridge_iterations(path):
    """The iter_<n> directories below `path`, oldest first."""
    found = [p for p in path.iterdir() if p.is_dir() and NUMBER.match(p.name)]
    return sorted(found, key=lambda p: int(NUMBER.match(p.name).group(1)))


def open_nemo2(path):
    """A NeMo 2 directory: model.yaml, checked against io.json; io.json with the classes' defaults where model.yaml is
    missing."""
    context, weights = Folder(path / "context"), Folder(path / "weights")
    if not (path / "context").is_dir():
        raise UserError(f"{path} has weights/ but no context/, which says what the model is")
    notes, passed = [], {}
    if context.has("io.json"):
        passed = config_arguments(read_json(context, "io.json"), f"{path}/context/io.json")
    if context.has("model.yaml"):
        config = read_yaml(context, "model.yaml").get("config")
        if not isinstance(config, dict):
            raise UserError(f"{path}/context/model.yaml has no config")
        for name, value in passed.items():
            if name != "_target_" and isinstance(value, (int, float, bool, str)) and config.get(name, value) != value:
                if not isinstance(config[name], dict):          # an enum or function, which io.json has as a string
                    notes.append(f"model.yaml says {name} is {config[name]!r}, io.json {value!r}; model.yaml was taken")
    elif passed:
        config = passed
        notes.append("there is no model.yaml: values that io.json leaves out are the classes' defaults")
    else:
        raise UserError(f"{path}/context has neither model.yaml nor io.json, which say what the model is")
    family, spec = from_megatron(config, "nemo2")
    tokenizer = path / "context" / "nemo_tokenizer"
    artifacts = Folder(path / "context" / "artifacts")
    return finish(Checkpoint("nemo2", path, family, spec, DistStore(weights),
                             Folder(tokenizer) if tokenizer.is_dir() else None, optional_json(context, SIDECAR),
                             optional_json(artifacts, "generation_config.json"), notes=notes))


def open_bridge(path):
    """One iter_<n> directory of Megatron-Bridge."""
    folder = Folder(path)
    model = read_yaml(folder, "run_config.yaml").get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path}/run_config.yaml has no model section")
    family, spec = from_megatron(model, "bridge")
    tokenizer = path / "tokenizer"
    return finish(Checkpoint("bridge", path, family, spec, DistStore(folder),
                             Folder(tokenizer) if tokenizer.is_dir() else None, optional_json(folder, SIDECAR),
                             optional_json(folder, GENERATION)))


def open_nemo1(path, folder):
    """A NeMo 1 archive, in place, or its unpacked directory."""
    if any(re.match(r"(mp_rank|tp_rank)_\d+", name) for name in folder.folders()):
        raise UserError(f"{path} was saved rank by rank (mp_rank_*, tp_rank_*), which is not supported: load and save "
                        "it once with NeMo at tensor_model_parallel_size=1")
    if not folder.has("model_config.yaml"):
        raise UserError(f"{path} has no model_config.yaml; it is not a NeMo 1 archive")
    family, spec = from_nemo1(read_yaml(folder, "model_config.yaml"))
    if folder.has("model_weights.ckpt"):
        store = CkptStore(folder)
    else:
        store = DistStore(folder.sub("model_weights"))
    tokenizer = folder.sub("tokenizer") if "tokenizer" in folder.folders() else None
    notes = []
    if family.name == "gemma":
        notes.append("NeMo 1 keeps Gemma's norms as weight + 1: 1 was taken off, which gives the same function, "
                     "rounded as NeMo 1 has it")
    return finish(Checkpoint("nemo1", Path(path), family, spec, store, tokenizer, optional_json(folder, SIDECAR),
                             optional_json(folder, GENERATION), notes=notes))


def finish(checkpoint):
    """Notes and the training step, from what the store found."""
    store = checkpoint.store
    if store.skipped:
        checkpoint.notes.append(f"left out, not part of the model: {len(store.skipped)} of the run's own entries "
                                f"(optimizer, random states), {store.skipped[0]} for one")
    if store.fp8:
        checkpoint.notes.append(f"{len(store.fp8)} FP8 state objects were left out, {store.fp8[0]} for one")
    checkpoint.step = training_step(store.folder)
    if checkpoint.step is None and checkpoint.container == "bridge" and NUMBER.match(checkpoint.path.name):
        checkpoint.step = int(NUMBER.match(checkpoint.path.name).group(1))
    return checkpoint


def optional_json(folder, name):
    """A JSON object, None where the file isn't there."""
    if not folder.has(name):
        return None
    value = read_json(folder, name)
    if not isinstance(value, dict):
        raise UserError(f"{folder}/{name} is not a JSON object")
    return value


def training_step(folder):
    """global_step or iteration of common.pt; None where there is none or it can't be read safely (random states,
    argparse)."""
    if not folder.has("common.pt"):
        return None
    try:
        table = TorchZip(folder.view("common.pt"), f"{folder}/common.pt").value
    except UserError:
        return None
    if not isinstance(table, dict):
        return None
    step = table.get("global_step", table.get("iteration"))
    return step if type(step) is int else None
