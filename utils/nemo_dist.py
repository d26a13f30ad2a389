"""
torch_dist, the format of Megatron's distributed checkpoints, without Megatron: `.metadata` says which box of which
tensor lies where in the `.distcp` files; each item there is a torch.save zip of its own.

    DistStore(folder)      tensors of a checkpoint; read(key, offsets, sizes) pastes a box from the pieces that meet it
    CkptStore(folder)      the same for `model_weights.ckpt`, one torch.save of a flat dict
    DistWriter(job, ...)   writes one piece after the other; nothing of the size of a stacked tensor is ever built
"""

import io
import json
import math
import pickle
from collections import defaultdict

from mlx_grpo import UserError
from mlx_grpo.nemo_files import read_json
from mlx_grpo.nemo_pickle import TensorRef, TorchZip, metadata_names, read_pickle

# Beginnings of a checkpoint's keys that aren't the model.
SKIPPED = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", "common_state")
OBJECT = "._extra_state"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}
MAX_METADATA = 1 << 30


def counted(values):
    """A tuple of sizes or offsets from a pickle, checked to be whole numbers that a file can have."""
    values = tuple(values)
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in values):
        raise ValueError(f"sizes {values!r} are not whole numbers")
    return values


class DistStore:
    """The model's tensors of a torch_dist directory: `tensors` key -> (dtype, shape), `objects` the state keys,
    `skipped` the rest. All boxes, offsets and lengths are checked against each other and the files before anything is
    read."""

    def __init__(self, folder):
        self.folder, self.tensors, self.pieces, self.objects, self.skipped = folder, {}, {}, set(), []
        self.fp8 = []
        backend = read_json(folder, "metadata.json")
        if not isinstance(backend, dict) or backend.get("sharded_backend") != "torch_dist":
            name = backend.get("sharded_backend") if isinstance(backend, dict) else backend
            raise UserError(f"{folder} was saved with the backend {name!r}; only torch_dist is supported (NVIDIA's "
                            "convert_zarr_to_torch_dist.py converts zarr)")
        where = f"{folder}/.metadata"
        if folder.size(".metadata") > MAX_METADATA:
            raise UserError(f"{where} is too large")
        value = read_pickle(folder.view(".metadata").read(), metadata_names(), where)
        try:
            self.take(value.state)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{where} is not the index of a distributed checkpoint ({type(error).__name__}: "
                            f"{error})") from error
        check_files(folder, self.pieces)

    def take(self, state):
        """Fill the tables from the index's inert records."""
        storage = {}
        for index, info in state["storage_data"].items():
            offset = index.state.get("offset")
            place = info.state["relative_path"], *counted((info.state["offset"], info.state["length"]))
            storage[index.state["fqn"], None if offset is None else counted(offset)] = place
        for key, entry in state["state_dict_metadata"].items():
            if type(key) is not str:
                raise ValueError(f"key {key!r}")
            if key.startswith(SKIPPED):
                self.skipped.append(key)
            elif type(entry).__name__ == "BytesStorageMetadata":
                self.objects.add(key)
                if storage[key, None][2] > 4096:
                    self.fp8.append(key)
            else:
                self.add_tensor(key, entry, storage)

    def add_tensor(self, key, entry, storage):
        """Note one tensor and its pieces, each with its place. Raises UserError where they don't fit together."""
        properties = entry.state["properties"].state
        dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
        size, chunks = counted(entry.state["size"]), entry.state["chunks"]
        pieces = []
        for chunk in chunks:
            offsets, sizes = counted(chunk.state["offsets"]), counted(chunk.state["sizes"])
            if not len(offsets) == len(sizes) == len(size) or any(o + n > m for o, n, m in zip(offsets, sizes, size)):
                raise UserError(f"{self.folder}: a piece of {key} at {offsets} of {sizes} lies "
                                f"outside the tensor {size}")
            if (key, offsets) not in storage:
                raise UserError(f"{self.folder}: the piece of {key} at {offsets} is missing")
            name, start, length = storage[key, offsets]
            if length < math.prod(sizes) * dtype.itemsize:
                raise UserError(f"{self.folder}: the piece of {key} at {offsets} has {length} bytes, too few "
                                f"for {sizes}")
            pieces.append((offsets, sizes, name, start, length))
        check_cover(f"{self.folder}: {key}", size, pieces)
        self.tensors[key], self.pieces[key] = (dtype, size), pieces

    def read(self, key, offsets=None, sizes=None):
        """The box of tensor `key` at `offsets` of `sizes`, fresh; the whole tensor without them."""
        import torch
        dtype, size = self.tensors[key]
        offsets, sizes = offsets or (0,) * len(size), sizes or size
        target = None
        for at, extent, name, start, length in self.pieces[key]:
            low = [max(a, b) for a, b in zip(at, offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, extent, offsets, sizes)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            what = f"{self.folder}/{name} (the piece of {key} at {at})"
            item = TorchZip(self.folder.view(name, start, length), what)
            ref = item.value
            if type(ref) is not TensorRef or ref.size != extent or ref.dtype != dtype:
                raise UserError(f"{what} is not the tensor of shape {extent} that .metadata promises")
            part = item.read(ref, tuple(a - b for a, b in zip(low, at)), tuple(b - a for a, b in zip(low, high)))
            if tuple(part.shape) == tuple(sizes):
                return part
            target = torch.empty(sizes, dtype=dtype) if target is None else target
            target[tuple(slice(a - b, c - b) for a, b, c in zip(low, offsets, high))] = part
        return target


def check_cover(what, size, pieces):
    """Raises UserError unless the pieces (offsets, sizes, ...) cover the tensor exactly once. All lie inside it
    already."""
    if not size or any(n == 0 for n in size):
        raise UserError(f"{what} has the shape {size}, without elements")
    if sum(math.prod(piece[1]) for piece in pieces) != math.prod(size):
        raise UserError(f"{what}: the pieces don't add up to the shape {size}; one is missing or too many")
    import numpy
    low = numpy.array([piece[0] for piece in pieces], dtype=numpy.int64)
    high = low + numpy.array([piece[1] for piece in pieces], dtype=numpy.int64)
    for i in range(len(pieces) - 1):
        if numpy.all((low[i + 1:] < high[i]) & (low[i] < high[i + 1:]), axis=1).any():
            raise UserError(f"{what}: two pieces overlap")


def check_files(folder, pieces):
    """Raises UserError where an item's bytes aren't in its file, or two items share some."""
    spans = defaultdict(list)
    for key, parts in pieces.items():
        for _, _, name, start, length in parts:
            spans[name].append((start, length, key))
    for name, items in spans.items():
        if type(name) is not str:
            raise UserError(f"{folder}: {name!r} is not a file name")
        size, end = folder.size(name), 0
        for start, length, key in sorted(items):
            if start + length > size:
                raise UserError(f"{folder}/{name} is cut short: {key} needs byte {start + length}, the file has {size}")
            if start < end:
                raise UserError(f"{folder}/{name}: the bytes of {key} overlap another tensor's")
            end = start + length


class CkptStore:
    """`model_weights.ckpt` of a .nemo archive, with the interface of DistStore; each tensor is read where it lies."""

    def __init__(self, folder, name="model_weights.ckpt"):
        self.folder, self.skipped, self.fp8 = folder, [], []
        self.zip = TorchZip(folder.view(name), f"{folder}/{name}")
        table = self.zip.value
        if not isinstance(table, dict) or not all(type(key) is str for key in table):
            raise UserError(f"{folder}/{name} is not a flat dict of tensors")
        self.objects = {key for key in table if key.endswith(OBJECT)}
        self.refs = {key: ref for key, ref in dict.items(table) if key not in self.objects}
        for key, ref in self.refs.items():
            if type(ref) is not TensorRef:
                raise UserError(f"{folder}/{name}: {key} is not a tensor")
            self.zip.data_start(ref)
        self.tensors = {key: (ref.dtype, ref.size) for key, ref in self.refs.items()}

    def read(self, key, offsets=None, sizes=None):
        return self.zip.read(self.refs[key], offsets, sizes)


class DistWriter:
    """Writes a torch_dist directory through a Job (see nemo_job), in files `__0_<n>.distcp` of up to `file_bytes`."""

    def __init__(self, job, folder, total_bytes, file_bytes=4 << 30):
        self.job, self.folder = job, folder
        # two files at least, as NVIDIA's writer has them; large models in pieces of a few GB
        self.file_bytes = min(file_bytes, total_bytes // 2 + 1)
        self.written, self.storage, self.sizes = 0, {}, {}
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key, size, offsets, extent, dtype, make):
        """One piece of tensor `key`: make() gives the tensor of shape `extent`; not called where an earlier run wrote
        it."""
        def save(file):
            import torch
            tensor = make()
            if tuple(tensor.shape) != tuple(extent) or tensor.dtype != dtype:
                found = tuple(tensor.shape), tensor.dtype
                raise AssertionError(f"{key} at {offsets}: {found}, planned {extent} {dtype}")
            tensor = tensor.contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()                        # torch.save writes the whole storage behind a view
            torch.save(tensor, file)
        self.sizes.setdefault(key, (dtype, size, []))[2].append((offsets, extent))
        self.storage[key, offsets] = self.add(save)

    def put_object(self, key):
        """TransformerEngine's "no state": a list of one tensor with the bytes of a pickled None, accepted by each of
        its versions."""
        def save(file):
            import torch
            torch.save([torch.frombuffer(bytearray(pickle.dumps(None)), dtype=torch.uint8)], file)
        self.storage[key, None] = self.add(save)

    def add(self, save):
        name = f"__0_{self.written // self.file_bytes}.distcp"
        start, end = self.job.append(self.folder / name, save)
        self.written += end - start
        return name, start, end - start

    def finish(self, common, backend=BACKEND):
        """The index, common.pt and, last, metadata.json, which makes the directory a checkpoint."""
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (BytesStorageMetadata, ChunkStorageMetadata, Metadata,
                                                           MetadataIndex, StorageMeta, TensorProperties,
                                                           TensorStorageMetadata)
        common_properties = {"layout": torch.strided, "requires_grad": False, "pin_memory": False,
                             "memory_format": torch.contiguous_format}
        tensors = {key: TensorStorageMetadata(
            TensorProperties(dtype=dtype, **common_properties), torch.Size(size),
            [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in chunks])
            for key, (dtype, size, chunks) in self.sizes.items()}
        objects = {key: BytesStorageMetadata() for key, offset in self.storage if offset is None}
        storage = {MetadataIndex(fqn=key, offset=None if offset is None else torch.Size(offset)): _StorageInfo(*place)
                   for (key, offset), place in self.storage.items()}
        torch.save(common, self.folder / "common.pt")
        buffer = io.BytesIO()
        pickle.dump(Metadata(tensors | objects, None, storage, StorageMeta()), buffer, protocol=4)
        (self.folder / ".metadata").write_bytes(buffer.getvalue())
        (self.folder / "metadata.json").write_text(json.dumps(backend))
