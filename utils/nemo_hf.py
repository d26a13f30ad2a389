"""
A Hugging Face model directory, read and written tensor by tensor.

    HFSource(path)   names, dtypes, shapes of model.safetensors (or its shards, or pytorch_model.bin); read(name, rows)
    HFWriter(job, tensors, ...)   the same files, written in one pass in the order of `tensors`
    fetch(source)    a local directory for a path, `hf://org/name` or `org/name`

Files are read by seek and readinto, never mapped: mapped pages count as resident memory.
"""

import json
import math
from pathlib import Path

from mlx_grpo import UserError
from mlx_grpo.files import check_free_space
from mlx_grpo.hub_files import hub_trouble
from mlx_grpo.nemo_files import Folder, read_json
from mlx_grpo.nemo_pickle import TensorRef, TorchZip, View, fill, tensor_bytes

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PATTERNS = ["*.json", "*.jinja", "*.txt", "model*.safetensors", "pytorch_model*.bin", "*.model"]
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "chat_template.json",
                   "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "spiece.model",
                   "tekken.json")


def fetch(source):
    """The local directory of a model: a path, or a Hub id (optionally with hf://) that is downloaded into the Hub's
    cache. Raises UserError naming the login, the licence page or the connection that is missing."""
    name = str(source).removeprefix("hf://")
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise UserError(f"{source}: no such directory, and not a Hub id of the form org/name")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, HTTPError
    try:
        try:
            files = [file for file in snapshot_download(name, allow_patterns=PATTERNS, dry_run=True)]
            safe = any(file.filename.endswith(".safetensors") for file in files)
            patterns = [p for p in PATTERNS if not (safe and p.endswith(".bin"))]
            wanted = [file for file in files if not (safe and file.filename.endswith(".bin"))]
            check_free_space(constants.HF_HUB_CACHE, sum(f.file_size or 0 for f in wanted if f.will_download),
                             f"downloading {name}")
        except DryRunError:                # the hub can't be reached: what is cached will do
            patterns = PATTERNS
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HTTPError, OSError) as error:
        raise UserError(f"{name}: {hub_trouble(error)}") from error


def read_header(path):
    """name -> (dtype, shape, first byte) of one safetensors file, all checked against the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise UserError(f"{path} is damaged or cut short: its header doesn't fit into {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = sorted((*e["data_offsets"], name, e["dtype"], tuple(e["shape"])) for name, e in header.items())
        for start, end, name, dtype, shape in entries:
            if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
                raise ValueError(f"the entry of {name}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header can't be read ({error})") from error
    import torch
    tensors, end_before = {}, 0
    for start, end, name, dtype, shape in entries:
        if dtype not in DTYPE_NAMES:
            raise UserError(f"{path}: {name} has dtype {dtype}; quantised weights can't be converted, take the "
                            "unquantised model")
        dtype = getattr(torch, DTYPE_NAMES[dtype])
        if start != end_before or end - start != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path} is damaged: {name} has bytes {start} to {end}, which don't fit its shape "
                            f"{list(shape)}")
        if 8 + length + end > size:
            raise UserError(f"{path} is cut short: {name} ends at byte {8 + length + end}, the file has {size}")
        tensors[name], end_before = (dtype, shape, 8 + length + start), end
    return tensors


class HFSource:
    """The weights of a model directory: `tensors` name -> (dtype, shape). Raises UserError for missing shards and
    damaged files."""

    def __init__(self, path):
        self.path, self.tensors, self.places, self.zips, self.files = Path(path), {}, {}, {}, {}
        for name in self.weight_files():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file} is missing: {name} is listed in the index")
            if name.endswith(".bin"):
                self.add_bin(name, file)
                continue
            for key, (dtype, shape, start) in read_header(file).items():
                self.tensors[key], self.places[key] = (dtype, shape), (name, start)
        missing = sorted(set(self.listed) - set(self.tensors))
        if missing:
            raise UserError(f"{self.path}: {missing[0]} is listed in the index but in no file ({len(missing)} missing)")

    def weight_files(self):
        """Names of the weight files, from the index where there is one; sets `listed`, the tensors the index names."""
        self.listed = ()
        for single in ("model.safetensors", "pytorch_model.bin"):
            if (self.path / f"{single}.index.json").is_file():
                index = read_json(HubFolder(self.path), f"{single}.index.json")
                self.listed = index.get("weight_map") if isinstance(index, dict) else None
                names = self.listed.values() if isinstance(self.listed, dict) else [None]
                if not all(type(name) is str and "/" not in name for name in names):
                    raise UserError(f"{self.path}/{single}.index.json has no weight_map of bare file names")
                return sorted(set(names))
            if (self.path / single).is_file():
                return [single]
        raise UserError(f"{self.path} has no weights (looked for model.safetensors, pytorch_model.bin, their indexes)")

    def open(self, name):
        if name not in self.files:
            self.files[name] = open(self.path / name, "rb", buffering=0)
        return self.files[name]

    def add_bin(self, name, file):
        self.zips[name] = TorchZip(View(self.open(name), 0, file.stat().st_size), str(file))
        table = self.zips[name].value
        if not isinstance(table, dict) or not all(type(k) is str and type(v) is TensorRef for k, v in table.items()):
            raise UserError(f"{file} is not a flat dict of tensors")
        for key, ref in dict.items(table):
            self.zips[name].data_start(ref)
            self.tensors[key], self.places[key] = (ref.dtype, ref.size), (name, ref)

    def read(self, name, rows=None):
        """A tensor, or its rows [start, stop) alone, as a fresh tensor."""
        import torch
        dtype, shape = self.tensors[name]
        file, place = self.places[name]
        start, stop = rows or (0, shape[0] if shape else 1)
        sizes = (stop - start, *shape[1:])
        if file in self.zips:
            return self.zips[file].read(place, (start,) + (0,) * (len(shape) - 1), sizes)
        tensor = torch.empty(sizes, dtype=dtype)
        begin = place + start * math.prod(shape[1:]) * dtype.itemsize
        fill(tensor, self.open(file), begin, f"{self.path / file} ({name})")
        return tensor

    def close(self):
        for file in self.files.values():
            file.close()


class HubFolder(Folder):
    """A Hub snapshot, whose files are links into the cache's blobs: links are followed."""

    def size(self, name):
        if not (self.path / name).is_file():
            raise UserError(f"{self.path / name} is missing")
        return (self.path / name).stat().st_size


def shards_of(tensors, shard_bytes=SHARD_BYTES):
    """[(file name, {name: (dtype, shape)})]: the tensors in order, in one file or in several of up to `shard_bytes`."""
    shards, used = [{}], 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name], used = (dtype, shape), used + nbytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{i + 1:05}-of-{len(shards):05}.safetensors", shard) for i, shard in enumerate(shards)]


class HFWriter:
    """Writes safetensors files through a Job, one tensor after the other in the order planned."""

    def __init__(self, job, tensors, shard_bytes=SHARD_BYTES):
        self.job, self.shards = job, shards_of(tensors, shard_bytes)
        self.file_of = {name: file for file, shard in self.shards for name in shard}
        self.headed = set()

    def header(self, file):
        """The safetensors header of one shard: its length in 8 bytes, then JSON padded to a multiple of 8."""
        names = {str(v).removeprefix("torch."): k for k, v in DTYPE_NAMES.items()}
        entries, at = {"__metadata__": {"format": "pt"}}, 0
        for name, (dtype, shape) in dict(self.shards)[file].items():
            end = at + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": names[str(dtype).removeprefix("torch.")], "shape": list(shape),
                             "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def put(self, names, make):
        """The next tensors, all of one step: make() gives them, in the order of `names`; not called where they are
        written."""
        for file in dict.fromkeys(self.file_of[name] for name in names):
            if file not in self.headed:
                self.headed.add(file)
                self.job.append(self.job.directory / file, lambda out, file=file: out.write(self.header(file)))
        made = []

        def save(out, index):
            if not made:
                made.extend(make())
            dtype, shape = dict(self.shards)[self.file_of[names[index]]][names[index]]
            tensor = made[index].contiguous()
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise AssertionError(f"{names[index]}: {tuple(tensor.shape)} {tensor.dtype}, planned {shape} {dtype}")
            out.write(tensor_bytes(tensor))
        for index, name in enumerate(names):
            self.job.append(self.job.directory / self.file_of[name], lambda out, index=index: save(out, index))

    def finish(self):
        """The index of the shards, where there are several."""
        if len(self.shards) > 1:
            sizes = [math.prod(shape) * dtype.itemsize for _, shard in self.shards for dtype, shape in shard.values()]
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": self.file_of}
            (self.job.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_tokenizer(folder):
    """(number of distinct ids of vocabulary and added tokens, {text of an added token: its id}) of tokenizer.json."""
    tokenizer = read_json(folder, "tokenizer.json")
    try:
        vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
        ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        return len(ids | set(added.values())), added
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/tokenizer.json is not a tokenizer ({type(error).__name__}: {error})") from error


def tokenizer_length(folder):
    """Number of distinct ids in tokenizer.json; None without one."""
    return read_tokenizer(folder)[0] if folder is not None and folder.has("tokenizer.json") else None


def copy_tokenizer(folder, directory):
    """Copy a tokenizer's files, verbatim, into `directory`; returns their names."""
    names = [name for name in TOKENIZER_FILES if folder is not None and folder.has(name)]
    for name in names:
        directory.mkdir(parents=True, exist_ok=True)
        folder.size(name)
        (directory / name).write_bytes(folder.view(name).read())
    return names


def token_ids(folder, generation_config):
    """{bos_token_id, eos_token_id, pad_token_id}: from generation_config.json, else from the tokenizer's own names of
    those tokens; None where neither says, so that no default of transformers steps in."""
    names = ("bos_token", "eos_token", "pad_token")
    given = {f"{name}_id": (generation_config or {}).get(f"{name}_id") for name in names}
    if folder is None or any(value is not None for value in given.values()):
        return given
    if folder.has("tokenizer_config.json") and folder.has("tokenizer.json"):
        known, config = read_tokenizer(folder)[1], read_json(folder, "tokenizer_config.json")
        for name in names:
            token = config.get(name) if isinstance(config, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            given[f"{name}_id"] = known.get(token) if isinstance(token, str) else None
    return given
