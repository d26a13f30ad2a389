"""
Reading torch's files without running what is in them.

A checkpoint's pickles may name any function; here each name is looked up in a short list and everything else is
refused, on the pickle machine of safe_pickle.py. Nothing is imported or built for a file: its classes become inert
records, its tensors become TensorRef (where the bytes lie), and sizes are checked against the file before memory is
taken.

    read_pickle(data, metadata_names(), what)   the `.metadata` of a torch_dist checkpoint
    TorchZip(view, what).value                  what torch.save wrote, with TensorRef in place of tensors
    TorchZip(view, what).read(ref, ...)         a box of one tensor, only its bytes read where they lie together
"""

import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass

from mlx_grpo import UserError
from mlx_grpo.safe_pickle import Refusing


class View(io.RawIOBase):
    """Bytes [start, start + length) of an open binary file, as a read-only file of their own."""

    def __init__(self, file, start, length):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, position, whence=0):
        self.at = max(0, position + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer):
        n = max(0, min(len(buffer), self.length - self.at))
        self.file.seek(self.start + self.at)
        got = self.file.readinto(memoryview(buffer)[:n])
        self.at += got
        return got


class Record:
    """An inert stand-in for a class named in a pickle: keeps what it was given, does nothing."""

    def __init__(self, *args):
        self.args, self.state = args, None


class Table(dict):
    """A dict that takes no attributes (an OrderedDict's pickled `_metadata` is dropped)."""


def record(name):
    """A new class of stand-ins, for one file: a hostile one can't leave anything behind in it."""
    return type(name, (Record,), {})


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a torch.save zip: its shape and strides (elements) over the zip's entry `data/<key>`."""
    dtype: object
    key: str
    numel: int         # elements in the whole storage
    offset: int        # elements
    size: tuple
    stride: tuple


def rebuild_tensor(storage, offset, size, stride, *_):
    """torch._utils._rebuild_tensor_v2, checked: a box outside its storage raises ValueError."""
    import torch
    dtype, key, numel = storage
    if type(dtype) is not torch.dtype:
        raise ValueError("a storage of no known dtype")
    size, stride = tuple(size), tuple(stride)
    if not all(type(n) is int and n >= 0 for n in (numel, offset, *size, *stride)) or len(size) != len(stride):
        raise ValueError("tensor sizes aren't whole numbers")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    if math.prod(size) and last >= numel:
        raise ValueError("a tensor reaches beyond its storage")
    return TensorRef(dtype, str(key), numel, offset, size, stride)


def storage_dtypes():
    """torch's storage classes, as torch.save names them, and their dtypes."""
    import torch
    return {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16,
            "DoubleStorage": torch.float64, "IntStorage": torch.int32, "LongStorage": torch.int64,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}


def tensor_names():
    """The globals of a torch.save file that are accepted; BytesIO is how TransformerEngine 1.x kept its state
    (unread)."""
    names = {("torch", name): dtype for name, dtype in storage_dtypes().items()}
    names |= {("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor, ("collections", "OrderedDict"): Table,
              ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
              ("_io", "BytesIO"): record("BytesIO"), ("_codecs", "encode"): record("encode"),
              ("torch", "Size"): record("Size")}
    return names


def metadata_names():
    """The globals of a `.metadata`: DCP's records (also where Megatron put them) and torch's dtypes."""
    import torch
    dcp, old = "torch.distributed.checkpoint", "torch.distributed._shard.sharded_tensor.metadata"
    names = {(f"{dcp}.metadata", n): record(n) for n in
             ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
              "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")}
    names |= {(f"{dcp}.planner", n): record(n) for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")}
    names |= {(f"{dcp}.filesystem", "_StorageInfo"): record("_StorageInfo"),
              ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): record("MCoreSavePlan"),
              (old, "TensorProperties"): record("TensorProperties"),
              (old, "MEM_FORMAT_ENCODING"): record("MEM_FORMAT_ENCODING"),
              ("torch.serialization", "_get_layout"): record("_get_layout"), ("torch", "Size"): torch.Size,
              ("collections", "OrderedDict"): Table}
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
                 "float8_e4m3fn", "float8_e5m2"):
        names["torch", name] = getattr(torch, name)
    return names


class Reader(Refusing):
    """A pickle machine that knows only the given (module, name) pairs and the storages of a torch.save zip."""
    kind = "checkpoint"

    def __init__(self, data, names):
        super().__init__(io.BytesIO(data))
        self.known = names

    def set_items(self, values):
        """Keys are names, numbers or the index's records: hashing a cleverly nested tuple would take forever."""
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not (type(key) in (str, int) or isinstance(key, Record)) or not isinstance(self.stack[-1], dict):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as key of a {type(self.stack[-1]).__name__}")
            dict.__setitem__(self.stack[-1], key, value)

    def set_state(self, target, state):
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not Table:
            raise pickle.UnpicklingError(f"a state for {type(target).__name__}")

    def persistent_load(self, key):
        kind, dtype, name, _, numel = key
        if kind != "storage":
            raise pickle.UnpicklingError("a reference to something other than a storage")
        return dtype, name, numel


def read_pickle(data, names, what):
    """The value of the pickle `data` (bytes), built from `names` alone. Raises UserError for anything else, naming
    `what`."""
    return Reader(data, names).read_one(what)


class TorchZip:
    """One torch.save file (a zip of stored entries) in `view`, a seekable binary file."""

    def __init__(self, view, what, max_pickle=256 << 20):
        self.view, self.what, buffered = view, what, io.BufferedReader(view)
        try:
            with zipfile.ZipFile(buffered) as archive:
                self.entries = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
                pickle_info = self.entries.get("data.pkl")
                if pickle_info is None or pickle_info.file_size > max_pickle:
                    raise UserError(f"{what} is not a file of torch.save")
                if any(info.compress_type != zipfile.ZIP_STORED for info in self.entries.values()):
                    raise UserError(f"{what} has compressed entries, which torch.save never writes")
                if "byteorder" in self.entries and archive.read(self.entries["byteorder"]) != b"little":
                    raise UserError(f"{what} holds big-endian numbers, which are not supported")
                self.value = read_pickle(archive.read(pickle_info), tensor_names(), what)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
            raise UserError(f"{what} is damaged or cut short: {error}") from error
        buffered.detach()                                       # else it closes the view when it is collected

    def data_start(self, ref):
        """Where the storage's bytes begin in the view; raises UserError where they aren't all there."""
        info = self.entries.get(f"data/{ref.key}")
        if info is None or info.file_size != ref.numel * ref.dtype.itemsize:
            raise UserError(f"{self.what}: a tensor's bytes are missing or of the wrong size")
        self.view.seek(info.header_offset)
        header = self.view.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise UserError(f"{self.what} is damaged: a zip entry has no header")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.file_size > self.view.length:
            raise UserError(f"{self.what} is cut short")
        return start

    def read(self, ref, offsets=None, sizes=None):
        """The box of `ref` at `offsets` of `sizes` as a fresh contiguous tensor; the whole tensor without them."""
        import torch
        offsets, sizes = offsets or (0,) * len(ref.size), ref.size if sizes is None else tuple(sizes)
        start = self.data_start(ref)
        run = contiguous_run(ref, offsets, sizes)
        if run is not None:
            tensor = torch.empty(sizes, dtype=ref.dtype)
            fill(tensor, self.view, start + run * ref.dtype.itemsize, self.what)
            return tensor
        storage = torch.empty(ref.numel, dtype=ref.dtype)
        fill(storage, self.view, start, self.what)
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes))
        return storage.as_strided(ref.size, ref.stride, ref.offset)[box].contiguous()


def contiguous_run(ref, offsets, sizes):
    """The first element (in its storage) of a box whose elements lie together, in order; None where they don't."""
    expected = 1
    for n, stride in zip(reversed(ref.size), reversed(ref.stride)):
        if n != 1 and stride != expected:
            return None
        expected *= n
    started = False                        # behind the first axis that isn't a single index, all axes must be whole
    for n, whole in zip(sizes, ref.size):
        if started and n != whole:
            return None
        started = started or n != 1
    return ref.offset + sum(o * s for o, s in zip(offsets, ref.stride))


def tensor_bytes(tensor):
    """A contiguous CPU tensor's memory as a writable memoryview of bytes (any dtype, bit for bit)."""
    import torch
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(bytearray())


def fill(tensor, file, start, what):
    """Read the tensor's bytes from `start` of an open file into its own memory. Raises UserError where they end
    early."""
    target = tensor_bytes(tensor)
    file.seek(start)
    while len(target):
        got = file.readinto(target[:1 << 30])
        if not got:
            raise UserError(f"{what} is cut short")
        target = target[got:]
