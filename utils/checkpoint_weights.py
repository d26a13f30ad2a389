"""
The tensors of a checkpoint of any format, one piece after the other, so that nothing of the model's size is in memory.

    with open_weights(found) as weights: weights.tensors, weights.pieces(name)

safetensors are read with NumPy alone; NeMo's and PyTorch's files need torch, and run nothing (utils/nemo_pickle.py).
"""

import importlib.util
import json
import math
import zipfile
from pathlib import Path

import numpy as np

from mlx_grpo import UserError
from mlx_grpo.checked_load import check_files, check_safetensors, read_json

PIECE = 1 << 22              # elements at a time
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
               "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1", "F8_E4M3": "u1",
               "F8_E5M2": "u1", "F8_E8M0": "u1", "C64": "<u8", "F4": "u1"}
FLOATS = {"F64", "F32", "F16", "BF16"}


class NeedsTorch(UserError):
    """The format can't be looked into without PyTorch: neither valid nor invalid."""


def open_weights(found):
    """The weights of a Found: `tensors` name -> (type as safetensors spells it, shape), `pieces(name)` its elements as
    flat arrays, `close()`. Raises UserError where a header, an index or a size doesn't fit; NeedsTorch."""
    path = found.path
    if found.format == "mlx" and (path / "adapters.safetensors").is_file():
        return SafetensorsWeights([path / "adapters.safetensors"])
    if found.format in ("mlx", "hf") and any(path.glob("model*.safetensors")):
        index = path / "model.safetensors.index.json"
        listed = read_index(index) if index.is_file() else set()
        check_files(path)
        weights = SafetensorsWeights(sorted(path.glob("model*.safetensors")))
        lost = sorted(listed - set(weights.tensors))
        if lost:
            raise UserError(f"{lost[0]} is listed in {index.name} but in no file ({len(lost)} missing)")
        return weights
    if found.format == "hf" and (path / "weights.npz").is_file():
        return NpzWeights(path / "weights.npz")
    if found.format == "mlx":
        raise UserError("no weights (looked for model*.safetensors and adapters.safetensors)")
    missing = [name for name in ("torch", "yaml") if not importlib.util.find_spec(name)]
    if missing:
        raise NeedsTorch(f"not looked into: needs {' and '.join(missing)} (pip install torch pyyaml)")
    if found.format == "hf":
        return BinWeights(found.path)
    return NemoWeights(found)


class SafetensorsWeights:
    def __init__(self, files):
        self.tensors, self.places, self.open_files = {}, {}, {}
        for file in files:
            entries = check_safetensors(file)
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            self.tensors |= entries
            self.places |= {name: (file, 8 + length + header[name]["data_offsets"][0],
                                   8 + length + header[name]["data_offsets"][1]) for name in entries}

    def pieces(self, name):
        """Flat arrays of the elements in order; BF16 widened to float32, and types that NumPy lacks as their bits."""
        kind, (file, start, end) = self.tensors[name][0], self.places[name]
        dtype = np.dtype(NUMPY_TYPES[kind])
        if file not in self.open_files:
            self.open_files[file] = open(file, "rb", buffering=0)
        stream = self.open_files[file]
        for at in range(start, end, PIECE * dtype.itemsize):
            stream.seek(at)
            raw = stream.read(min(PIECE * dtype.itemsize, end - at))
            if len(raw) < min(PIECE * dtype.itemsize, end - at):
                raise UserError(f"{file}: cut short while it was read")
            array = np.frombuffer(raw, dtype)
            yield (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array

    def close(self):
        for file in self.open_files.values():
            file.close()


class NpzWeights:
    """weights.npz, as early MLX models have it: stored arrays, whose headers have to fit the file."""

    def __init__(self, path):
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
            self.tensors = {info.filename.removesuffix(".npy"): self.header(info) for info in self.zip.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, SyntaxError) as error:
            raise UserError(f"{path} is damaged or not an .npz file: {error}") from error

    def header(self, info):
        """(type, shape) of a member, checked against its size."""
        with self.zip.open(info) as member:
            shape, fortran, dtype = read_npy_header(member)
            fits = math.prod(shape) * dtype.itemsize == info.file_size - member.tell()
        if not fits or dtype.hasobject or info.compress_type != zipfile.ZIP_STORED or fortran and len(shape) > 1:
            raise ValueError(f"{info.filename} is compressed, of Python objects, in Fortran's order, or of "
                             "another size than its header says")
        return torch_like(dtype.name), shape

    def pieces(self, name):
        try:
            with self.zip.open(f"{name}.npy") as member:
                dtype = read_npy_header(member)[2]
                while raw := member.read(PIECE * dtype.itemsize):
                    yield np.frombuffer(raw, dtype)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise UserError(f"{self.path}: {name} is damaged: {error}") from error

    def close(self):
        self.zip.close()


def read_npy_header(member):
    """(shape, whether in Fortran's order, dtype) from the beginning of a .npy file."""
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if not read:
        raise ValueError(f"an .npy file of version {version}")
    return read(member)


def read_index(path):
    """The tensor names that model.safetensors.index.json lists. Raises UserError where it isn't such an index."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) and "/" not in name for name in table.values()):
        raise UserError(f"{path} has no weight_map of bare file names")
    return set(table)


def nemo_store(found):
    """The tensor store of a NeMo checkpoint; its configuration must be readable."""
    from mlx_grpo.nemo_dist import CkptStore, DistStore
    from mlx_grpo.nemo_files import Folder, open_tar, read_json, read_yaml
    path = found.path
    folder = open_tar(path) if path.is_file() else Folder(path)
    if found.format == "nemo2":
        context = Folder(path / "context")
        read_yaml(context, "model.yaml") if context.has("model.yaml") else read_json(context, "io.json")
        return DistStore(folder.sub("weights"))
    if found.format == "bridge":
        read_yaml(folder, "run_config.yaml")
        return DistStore(folder)
    if any(name.startswith(("mp_rank_", "tp_rank_")) for name in folder.folders()):
        raise UserError("saved rank by rank (mp_rank_*, tp_rank_*), which isn't supported; load and save it once with "
                        "NeMo at tensor_model_parallel_size=1")
    read_yaml(folder, "model_config.yaml")
    return CkptStore(folder) if folder.has("model_weights.ckpt") else DistStore(folder.sub("model_weights"))


def torch_like(name):
    """"float32" -> "F32", "bfloat16" -> "BF16", "int64" -> "I64": a dtype's name as safetensors spells it."""
    bits = "".join(c for c in name if c.isdigit())
    special = {"bool": "BOOL", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    return special.get(name) or name[0].upper() + bits


class TorchWeights:
    """The interface of SafetensorsWeights over a source with `tensors` and torch tensors; `rows` reads some of them."""

    def __init__(self, source):
        self.source = source
        self.tensors = {name: (torch_like(str(dtype).removeprefix("torch.")), tuple(shape))
                        for name, (dtype, shape) in source.tensors.items()}

    def pieces(self, name):
        """As SafetensorsWeights.pieces; in bands of whole rows."""
        import torch
        shape = self.tensors[name][1]
        rows = shape[0] if shape else 1
        band = max(1, PIECE // max(1, math.prod(shape[1:])))
        for row in range(0, rows, band):
            tensor = self.rows(name, shape, row, min(rows, row + band)) if shape else self.source.read(name)
            if tensor.dtype is torch.bfloat16:
                tensor = tensor.float()
            yield (tensor.view(torch.uint8) if "float8" in str(tensor.dtype) else tensor).reshape(-1).numpy()


class NemoWeights(TorchWeights):
    def __init__(self, found):
        super().__init__(nemo_store(found))

    def rows(self, name, shape, start, stop):
        return self.source.read(name, (start, *[0] * (len(shape) - 1)), (stop - start, *shape[1:]))

    def close(self):
        self.source.folder.close()


class BinWeights(TorchWeights):
    """pytorch_model.bin, alone or in shards."""

    def __init__(self, path):
        from mlx_grpo.nemo_hf import HFSource
        super().__init__(HFSource(path))

    def rows(self, name, shape, start, stop):
        return self.source.read(name, (start, stop))

    def close(self):
        self.source.close()


def count_parameters(found, tensors):
    """How many weights the model has: a quantised matrix counts its weights, not the words they are packed in, and not
    the scales. None where the config doesn't say how many bits."""
    quantised = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    quantised = {name for name in quantised if tensors.get(f"{name}.weight", ("",))[0] == "U32"}
    table = read_json(Path(found.path) / "config.json").get("quantization") if quantised else {}
    total = 0
    for name, (_, shape) in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer in quantised and leaf == "weight":
            own = table.get(layer) if isinstance(table, dict) else None
            settings = own if isinstance(own, dict) else table
            bits = settings.get("bits") if isinstance(settings, dict) else None
            if type(bits) is not int or not 2 <= bits <= 8:
                return None
            total += math.prod(shape) * 32 // bits
        elif layer not in quantised or leaf not in ("scales", "biases"):
            total += math.prod(shape)
    return total
