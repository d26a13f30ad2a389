"""
Opens a NeMo or Megatron-Bridge checkpoint of any of the three containers, as data: nothing of it is imported or executed.

    nemo2    DIR/weights, DIR/context                      bridge   DIR/iter_<n>, or an iter_<n> itself
    nemo1    FILE.nemo (an uncompressed tar), or the same unpacked
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.nemo_config import from_megatron, from_nemo1
from mlx_grpo.nemo_dist import CkptStore, DistStore
from mlx_grpo.nemo_files import Folder, open_tar, read_json, read_yaml
from mlx_grpo.nemo_pickle import TensorRef, TorchZip

SIDECAR, GENERATION = "hf_config.json", "hf_generation_config.json"     # what our own checkpoints keep of the source
NUMBER = re.compile(r"iter_(\d+)$")


@dataclass
class Checkpoint:
    """A checkpoint that is open for reading. `tokenizer` is a folder or None; `spec` as in nemo_config; `step` None if unknown."""
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
    raise UserError(f"{path} is no NeMo checkpoint (looked for weights/ and context/, iter_<n>/, run_config.yaml, model_config.yaml)")


def bridge_iterations(path):
    """The iter_<n> directories below `path`, oldest first."""
    found = [p for p in path.iterdir() if p.is_dir() and NUMBER.match(p.name)]
    return sorted(found, key=lambda p: int(NUMBER.match(p.name).group(1)))


def open_nemo2(path):
    """A NeMo 2 directory: model.yaml, checked against io.json; io.json with the classes' defaults where model.yaml is missing."""
    context, weights = Folder(path / "context"), Folder(path / "weights")
    if not (path / "context").is_dir():
        raise UserError(f"{path} has weights/ but no context/, which says what the model is")
    notes, passed = [], {}
    if context.has("io.json"):
        passed = fiddle_arguments(read_json(context, "io.json"), f"{path}/context/io.json")
    if context.has("model.yaml"):
        config = read_yaml(context, "model.yaml").get("config")
        if not isinstance(config, dict):
            raise UserError(f"{path}/context/model.yaml has no config")
        for name, value in passed.items():
            if name != "_target_" and isinstance(value, (int, float, bool, str)) and config.get(name, value) != value:
                if not isinstance(config[name], dict):
                    notes.append(f"model.yaml says {name} is {config[name]!r}, io.json {value!r}; model.yaml was taken")
    elif passed:
        config = passed
        notes.append("there is no model.yaml: values that io.json leaves out are the classes' defaults")
    else:
        raise UserError(f"{path}/context has neither model.yaml nor io.json, which say what the model is")
    family, spec = from_megatron(config, "nemo2")
    tokenizer = path / "context" / "nemo_tokenizer"
    artifacts = Folder(path / "context" / "artifacts")
    return finish(Checkpoint("nemo2", path, family, spec, DistStore(weights), Folder(tokenizer) if tokenizer.is_dir() else None,
                             optional_json(context, SIDECAR), optional_json(artifacts, "generation_config.json"), notes=notes))


def open_bridge(path):
    """One iter_<n> directory of Megatron-Bridge."""
    folder = Folder(path)
    model = read_yaml(folder, "run_config.yaml").get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path}/run_config.yaml has no model section")
    family, spec = from_megatron(model, "bridge")
    tokenizer = path / "tokenizer"
    return finish(Checkpoint("bridge", path, family, spec, DistStore(folder), Folder(tokenizer) if tokenizer.is_dir() else None,
                             optional_json(folder, SIDECAR), optional_json(folder, GENERATION)))


def open_nemo1(path, folder):
    """A NeMo 1 archive, in place, or its unpacked directory."""
    names = getattr(folder, "members", None)
    names = list(names) if names is not None else [p.name for p in Path(path).iterdir()]
    if any(re.match(r"(mp_rank|tp_rank)_\d+", name) for name in names):
        raise UserError(f"{path} was saved rank by rank (mp_rank_*, tp_rank_*), which is not supported: load and save it once with "
                        "NeMo at tensor_model_parallel_size=1")
    if not folder.has("model_config.yaml"):
        raise UserError(f"{path} has no model_config.yaml; it is not a NeMo 1 archive")
    family, spec = from_nemo1(read_yaml(folder, "model_config.yaml"))
    if folder.has("model_weights.ckpt"):
        store = CkptStore(folder)
    else:
        store = DistStore(folder.sub("model_weights"))
    tokenizer = folder.sub("tokenizer")
    has_tokenizer = any(name.startswith("tokenizer/") for name in names) or (Path(path) / "tokenizer").is_dir()
    notes = []
    if family.name == "gemma":
        notes.append("NeMo 1 keeps Gemma's norms as weight + 1: 1 was taken off, which gives the same function, rounded as NeMo 1 has it")
    return finish(Checkpoint("nemo1", Path(path), family, spec, store, tokenizer if has_tokenizer else None,
                             optional_json(folder, SIDECAR), optional_json(folder, GENERATION), notes=notes))


def finish(checkpoint):
    """Notes and the training step, from what the store found."""
    store = checkpoint.store
    if store.skipped:
        checkpoint.notes.append(f"left out, not part of the model: {len(store.skipped)} of the run's own entries (optimizer, random "
                                f"states), {store.skipped[0]} for one")
    if store.fp8:
        checkpoint.notes.append(f"{len(store.fp8)} FP8 state objects were left out, {store.fp8[0]} for one")
    checkpoint.step = training_step(store.folder)
    if checkpoint.step is None and checkpoint.container == "bridge" and NUMBER.match(checkpoint.path.name):
        checkpoint.step = int(NUMBER.match(checkpoint.path.name).group(1))
    return checkpoint


def optional_json(folder, name):
    if not folder.has(name):
        return None
    value = read_json(folder, name)
    if not isinstance(value, dict):
        raise UserError(f"{folder}/{name} is not a JSON object")
    return value


def training_step(folder):
    """global_step or iteration of common.pt; None where there is none or it can't be read safely (random states, argparse)."""
    if not folder.has("common.pt"):
        return None
    try:
        table = TorchZip(folder.view("common.pt"), f"{folder}/common.pt").value
    except UserError:
        return None
    if not isinstance(table, dict):
        return None
    step = table.get("global_step", table.get("iteration"))
    return step if type(step) is int and not isinstance(step, TensorRef) else None


def fiddle_arguments(graph, where):
    """The arguments of the model's config in a fiddle graph (io.json), as model.yaml would have them; classes stay names.

    Raises UserError where the graph isn't one. Lists and mappings are read; other objects become None.
    """
    try:
        objects = graph["objects"]
        node = next(o for o in objects.values() if "<root>.model.config" in (o.get("paths") or ()))
        return fiddle_value(node, objects, 0)
    except (KeyError, TypeError, AttributeError, StopIteration, IndexError) as error:
        raise UserError(f"{where} is not a context that NeMo saved ({type(error).__name__}: {error})") from error


def fiddle_value(node, objects, depth):
    if depth > 12:
        raise KeyError("nested too deeply")
    kind = node["type"]
    if kind == "leaf":
        return node["value"]
    if kind == "ref":
        return fiddle_value(objects[node["key"]], objects, depth + 1)
    if kind == "pyref":
        return {"_target_": f"{node['module']}.{node['name']}", "_call_": False}
    items = [(re.fullmatch(r"(?:Attr\(name|Key\(key|Index\(index)=(.*)\)", path).group(1).strip("'"), value) for path, value in node["items"]]
    if kind["name"] in ("Config", "Partial"):
        metadata = objects[node["metadata"]["key"]]
        target = next(value for path, value in metadata["items"] if "fn_or_cls" in path)
        return {"_target_": f"{target['module']}.{target['name']}"} | {k: fiddle_value(v, objects, depth + 1) for k, v in items}
    if kind["name"] in ("list", "tuple"):
        return [fiddle_value(v, objects, depth + 1) if isinstance(v, dict) else v for _, v in items]
    if kind["name"] == "dict":
        return {k: fiddle_value(v, objects, depth + 1) for k, v in items}
    return None
