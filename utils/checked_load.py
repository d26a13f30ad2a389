"""Opening a Hugging Face or mlx-lm model directory so that nothing is wrong in silence.

mlx_lm.load fails on any unknown key and, told to be relaxed, leaves whatever is missing at random. `load_checked`
builds the model from the normalised config (utils/model_config.py), lists every missing and every unexpected key, and
refuses where a missing key would leave a layer at random, where a shape differs, where a shard of the index isn't there
and where a safetensors header doesn't fit its file. No file of the directory runs code without trust_remote_code.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_grpo import UserError
from mlx_grpo.model_config import normalize_config, unsupported_reason

ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
             "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4}
HEADER_LIMIT = 100_000_000      # bytes; the safetensors library's own limit
PREFIXES = ("transformer.", "model.")   # of a model saved with, or without, its head


@dataclass
class KeyReport:
    """How the names of a checkpoint met those of the architecture."""
    missing: list = field(default_factory=list)      # of the architecture, at the constant it starts with (0 or 1)
    unexpected: list = field(default_factory=list)   # of the checkpoint, not used
    renamed: str = ""                                # what was done to the names, empty for nothing

    def lines(self):
        """Lines for people; empty where every name matched."""
        return ([f"names: {self.renamed}"] if self.renamed else []) + \
            [f"missing, kept at its initial constant: {key}" for key in self.missing] + \
            [f"unexpected, not used: {key}" for key in self.unexpected]


def check_safetensors(path):
    """Check a safetensors header against its file: every tensor's dtype, size and place, no overlap, no rest. Returns
    {name: (dtype, shape)}. Raises UserError; reads the header only."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; put the weights' file there, or download it again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise UserError(f"{path}: not a whole safetensors file: its header claims {length} bytes, "
                            f"the file has {size}; download it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                   for name, entry in header.items()}
        spans = sorted((begin, end, name) for name, (_, _, begin, end) in tensors.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header can't be read ({error}); download the file again") from error
    place = 0
    for begin, end, name in spans:
        dtype, shape = tensors[name][:2]
        if not isinstance(dtype, str) or dtype not in ITEM_BITS:
            raise UserError(f"{path}: tensor {name!r} has the unknown dtype {dtype!r}; the file is damaged or newer than "
                            "this program")
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        if not whole or begin != place or (end - begin) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
            raise UserError(f"{path}: tensor {name!r} {dtype}{list(shape)} doesn't fit its bytes {begin}-{end}; "
                            "the file is damaged or was tampered with")
        place = end
    if 8 + length + place != size:
        raise UserError(f"{path}: the header describes {8 + length + place} bytes, the file has {size}; "
                        "download it again")
    return {name: entry[:2] for name, entry in tensors.items()}


def is_mlx(path):
    """Whether mlx-lm wrote the weights in a directory: its names and layouts may differ from transformers'."""
    for file in sorted(Path(path).glob("model*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return header.get("__metadata__", {}).get("format") == "mlx"
    return False


def check_files(path):
    """Check that `path` holds a whole model in safetensors. Returns {tensor name: (dtype, shape)}. Raises UserError."""
    path = Path(path)
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").exists()
        what = "an adapter: give its base model, and the adapter as such" if adapter else "not a model directory"
        raise UserError(f"{path} has no config.json; it is {what}")
    files = sorted(path.glob("model*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        plain = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
        if not plain or any(Path(name).name != name for name in weight_map.values()):
            strange = weight_map if not plain else next(name for name in weight_map.values() if Path(name).name != name)
            raise UserError(f"{index}: weight_map must name a file in this directory for each tensor, got "
                            f"{str(strange)[:100]!r}; download the index again")
        wanted = set(weight_map.values())
        lost = sorted(wanted - {file.name for file in files})
        if lost:
            raise UserError(f"{path} is incomplete: {', '.join(lost)} of {len(wanted)} weight files "
                            f"{'is' if len(lost) == 1 else 'are'} missing; download again")
    if not files:
        others = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors", "*.h5", "*.msgpack")
                  for file in sorted(path.glob(pattern))]
        remedy = f" (only {', '.join(others[:3])}); open it with transformers, whose save_pretrained writes safetensors"
        raise UserError(f"{path} has no model*.safetensors" + (remedy if others else ": no weights; download again"))
    return {name: entry for file in files for name, entry in check_safetensors(file).items()}


def read_json(path):
    """The dictionary in a JSON file. Raises UserError where it isn't one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def load_checked(path, *, changes=None, lazy=False, trust_remote_code=False):
    """(model, config, KeyReport) of a model directory. The config is that of config.json with the end tokens of
    generation_config.json, as mlx-lm reads it, then `changes`, normalised, plus what loading added to it.

    Names are met as follows: exact; else with "transformer." or "model." taken off, or "model." put on, where that
    leaves fewer keys missing. A key that is still missing is accepted where the layer starts at a constant (a bias of
    zeros, a norm's ones), and refused where it starts at random. Raises UserError. With `lazy` the weights stay in
    their files until they are used."""
    from mlx_lm.utils import load_config, load_model
    path = Path(path)
    tensors = check_files(path)
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            read_json(path / name)
    config = load_config(path) | (changes or {})
    own_file = register_nanochat(config)
    if own_file:
        config["model_file"] = None         # the project's own class, not the directory's
    reason = unsupported_reason(config)
    if reason:
        raise UserError(f"{path}: {reason}")
    if config.get("model_file") and not trust_remote_code:
        raise UserError(f"{path} brings its own model code ({config['model_file']}), which would run here; "
                        "read it, then add --trust-remote-code")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in ("awq", "gptq") and not any(name.endswith(".qweight") for name in tensors):
        raise UserError(f"{path}: config.json says that the weights are quantised by {method}, and none is (no .qweight); "
                        "remove quantization_config, or take the weights that belong to it")
    report = KeyReport()
    model, config = load_model(path, lazy=lazy, strict=False, model_config=normalize_config(config),
                               get_model_classes=lambda config: checked_classes(config, path, report),
                               trust_remote_code=trust_remote_code)
    if type(model).__name__ == "Checked":
        model.__class__ = type(model).__mro__[1]      # the checks are done: an ordinary model from here on
    return model, config | ({"model_file": own_file} if own_file else {}), report


def register_nanochat(config):
    """Let mlx-lm find our model of nanochat's later generations where `config` is of one. Returns the name of the model
    file that lies beside such weights, for those who open them without this project; None for other models."""
    from mlx_grpo import nanochat_model
    if config.get("model_type") != nanochat_model.MODEL_TYPE:
        return None
    sys.modules[f"mlx_lm.models.{nanochat_model.MODEL_TYPE}"] = nanochat_model
    return Path(config.get("model_file") or f"{nanochat_model.MODEL_TYPE}.py").name


def checked_classes(config, path, report):
    """mlx-lm's model class for `config`, with `sanitize` and `load_weights` that fill `report`, and its ModelArgs."""
    from mlx_lm.utils import _get_classes
    Model, ModelArgs = _get_classes(config)

    class Checked(Model):
        def __init__(self, args):
            try:
                super().__init__(args)
            except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
                raise UserError(f"{path}: mlx-lm can't build the {config['model_type']} that config.json describes "
                                f"({type(error).__name__}: {error}); use the configuration that the model's authors "
                                "published") from error
            self._trial = lambda: Model(args)     # sanitize may change its model, so trials have their own

        def sanitize(self, weights):
            names, report.renamed = best_names(self._trial, weights)
            del self._trial
            weights = {names[key]: value for key, value in weights.items()}
            return super().sanitize(weights) if hasattr(Model, "sanitize") else weights

        def load_weights(self, weights, strict=True):
            current = dict(tree_flatten(self.parameters()))
            given = dict(weights)
            report.missing = sorted(set(current) - set(given))
            report.unexpected = sorted(set(given) - set(current))
            refuse_bad_keys(path, config["model_type"], current, given, report.missing)
            return super().load_weights([(key, given[key]) for key in given if key in current], strict=False)

    return Checked, ModelArgs


def best_names(make_model, weights):
    """({old name: new name}, what was done) of the naming under which the architecture misses the fewest keys; its own
    where no other is better."""
    best, how = {key: key for key in weights}, ""
    fewest = count_missing(make_model(), weights)
    for description, names in renamings(weights) if fewest else ():
        missing = count_missing(make_model(), {names[key]: value for key, value in weights.items()})
        if missing < fewest:
            best, how, fewest = names, description, missing
    return best, how


def count_missing(model, weights):
    """How many parameters of a fresh `model` the weights would leave unset."""
    try:
        given = model.sanitize(dict(weights)) if hasattr(model, "sanitize") else weights
    except KeyError:            # a sanitize that takes its names for granted
        return math.inf
    return len({key for key, _ in tree_flatten(model.parameters())} - set(given))


def renamings(weights):
    """(description, {old name: new name}) of the ways in which savers shift a checkpoint's names."""
    for prefix in PREFIXES:
        if sum(key.startswith(prefix) for key in weights) * 2 > len(weights):
            yield f"{prefix!r} taken off", {key: key.removeprefix(prefix) for key in weights}
    yield "'model.' put in front", {key: key if key.startswith("lm_head") else f"model.{key}" for key in weights}


def refuse_bad_keys(path, kind, current, given, missing):
    """Raises UserError where a tensor has another shape than the architecture's, or a missing one starts at random."""
    for key in sorted(set(current) & set(given)):
        if current[key].shape != given[key].shape:
            raise UserError(f"{path}: {key} has shape {list(given[key].shape)}, and mlx-lm's {kind} makes it "
                            f"{list(current[key].shape)} from config.json; the two belong to different models, or to a "
                            "variant that mlx-lm doesn't build")
        if mx.issubdtype(current[key].dtype, mx.floating) and not mx.issubdtype(given[key].dtype, mx.floating):
            raise UserError(f"{path}: {key} holds {str(given[key].dtype).split('.')[-1]} where {kind} has floats; the file "
                            "is damaged, or quantised in a way that config.json doesn't tell")
    random = [key for key in missing if not constant(current[key])]
    if random:
        more = f" and {len(random) - 4} more" if len(random) > 4 else ""
        tied = "; if its embedding serves as the head, set tie_word_embeddings to true in config.json" \
            if random == ["lm_head.weight"] else "; the checkpoint is incomplete or belongs to another architecture"
        raise UserError(f"{path}: no weights for {', '.join(random[:4])}{more}, which would stay at random{tied}")


def constant(array):
    """Whether all elements are the same (an initial bias or norm weight), so that nothing random is in it. An array of
    more than 2^24 elements is neither, and isn't computed."""
    return array.size == 0 or array.size <= 1 << 24 and bool(mx.all(array == array.reshape(-1)[0]).item())
