"""
Reads nanochat's two pickles without ever running what is in them: tokenizer.pkl and the checkpoint model_<step>.pt.

A pickle is a program. This one runs on pickle's own pure Python machine with most instructions taken out: only the
opcodes and the globals that real files use are known, every global is answered by an inert stand-in, and nothing else
can be called. The machine reads from a file already in memory or from a member of a zip whose sizes were checked, and
keeps its memo in a dict, so that a header that lies about a size takes no memory.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from mlx_grpo import UserError

# What a damaged pickle raises on pickle's Python machine; a refusal is a UserError and passes through.
DAMAGED = (pickle.UnpicklingError, EOFError, struct.error, TypeError, ValueError, IndexError, KeyError, AttributeError)
MAX_PICKLE_BYTES = 1 << 28          # a real tokenizer.pkl has about 1 MB, the data.pkl of a checkpoint 100 kB

# Opcodes that build plain values, call an allow-listed global or finish one; a payload's own global is reached, and
# named, before anything is called with it. Left out: extension codes, bytearrays and out-of-band buffers.
OPCODES = """PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
             GLOBAL STACK_GLOBAL INST OBJ NEWOBJ NEWOBJ_EX REDUCE BUILD BINPERSID
             EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS LIST EMPTY_DICT SETITEM SETITEMS
             NONE NEWTRUE NEWFALSE INT LONG LONG1 LONG4 BININT BININT1 BININT2 BINFLOAT
             UNICODE BINUNICODE SHORT_BINUNICODE STRING BINSTRING SHORT_BINSTRING
             BINBYTES SHORT_BINBYTES BINBYTES8""".split()


class Instructions(dict):
    """Opcode byte -> its handler on pickle's Python machine, for OPCODES only; any other one is a UserError."""

    def __init__(self):
        opcodes = [getattr(pickle, name)[0] for name in OPCODES]
        super().__init__({opcode: pickle._Unpickler.dispatch[opcode] for opcode in opcodes})

    def __missing__(self, opcode):
        raise UserError(f"its byte {bytes([opcode])!r} is an instruction that no such file has")


class Refusing(pickle._Unpickler):
    """pickle's Python machine with an allow-list `known`: (module, name) -> stand-in, and the opcodes in `dispatch`."""
    known = {}
    kind = "file"
    dispatch = Instructions()

    def set_items(self, values):
        """Keys are strings or bytes: hashing a cleverly nested tuple would take forever."""
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, bytes) or not isinstance(self.stack[-1], dict):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as key of a {type(self.stack[-1]).__name__}")
            self.stack[-1][key] = value

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems

    def load_build(self):
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module, name):
        if (module, name) not in self.known:
            allowed = ", ".join(f"{m}.{n}" for m, n in self.known)
            wanted = ascii(f"{module}.{name}")[1:-1][:200]          # ascii: a name may hold line ends or terminal codes
            raise UserError(f"it refers to the global {wanted}, and a {self.kind} refers to nothing but {allowed}; "
                            "it could run code when opened elsewhere: don't use it")
        return self.known[module, name]

    def read_one(self, path):
        """The one object in the stream. Raises UserError, naming `path`, for anything refused or damaged."""
        try:
            return self.load()
        except UserError as error:
            raise UserError(f"{path}: refused, {error}") from error
        except DAMAGED as error:
            detail = ascii(str(error))[1:-1][:200] or type(error).__name__
            raise UserError(f"{path}: not a {self.kind}, or a damaged one ({detail}); download it again") from error


# ---- tokenizer.pkl -------------------------------------------------------------------------------------------------

class EncodingState:
    """Stands in for tiktoken.core.Encoding and keeps its state. The real class would resolve a *string* state through
    tiktoken's registry, which downloads."""
    state = None


class TokenizerUnpickler(Refusing):
    known = {("tiktoken.core", "Encoding"): EncodingState}
    kind = "tokenizer.pkl"

    def set_state(self, target, state):
        if type(target) is not EncodingState:
            raise pickle.UnpicklingError(f"a state for {type(target).__name__}")
        target.state = state


def read_tiktoken_pickle(path):
    """The `tiktoken.Encoding` in nanochat's tokenizer.pkl, validated; nothing in the file runs, nothing is downloaded.

    Raises UserError, naming the file and the offending global or field."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}")
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes is not the size of a tokenizer.pkl (1 MB or so)")
    loaded = TokenizerUnpickler(BytesIO(path.read_bytes())).read_one(path)
    if type(loaded) is not EncodingState or type(loaded.state) is not dict:
        raise UserError(f"{path}: holds {type(loaded).__name__}, not the pickled tiktoken.Encoding of nanochat")
    return build_encoding(loaded.state, path)


def build_encoding(state, source):
    """A tiktoken.Encoding from {name, pat_str, mergeable_ranks, special_tokens}. UserError naming `source` where they
    are no vocabulary: wrong types, ids that aren't exactly 0..n-1, a missing byte, a token that no merge can make."""
    import tiktoken
    if set(state) != {"name", "pat_str", "mergeable_ranks", "special_tokens"}:
        raise UserError(f"{source}: the Encoding has the fields {sorted(map(ascii, state))}, expected mergeable_ranks, "
                        "name, pat_str and special_tokens")
    ranks, special_tokens = state["mergeable_ranks"], state["special_tokens"]
    for name, value, kind in [("name", state["name"], str), ("pat_str", state["pat_str"], str),
                              ("mergeable_ranks", ranks, dict), ("special_tokens", special_tokens, dict)]:
        if type(value) is not kind:
            raise UserError(f"{source}: {name} is a {type(value).__name__}, expected a {kind.__name__}")
    for name, table, kind in [("mergeable_ranks", ranks, bytes), ("special_tokens", special_tokens, str)]:
        for token, rank in table.items():
            if type(token) is not kind or type(rank) is not int or not token:
                raise UserError(f"{source}: {name} has the entry {token!a}: {type(rank).__name__}, "
                                f"expected {kind.__name__}: int")
    ids = sorted([*ranks.values(), *special_tokens.values()])
    if ids != list(range(len(ids))):
        raise UserError(f"{source}: the {len(ids)} token ids are not exactly 0 to {len(ids) - 1}")
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise UserError(f"{source}: {len(missing)} of the 256 single bytes are no tokens, {missing[0]:#04x} for one")
    for token in ranks:
        if len(token) > 1 and not any(token[:cut] in ranks and token[cut:] in ranks for cut in range(1, len(token))):
            raise UserError(f"{source}: the token {token!r} can't be merged from two others")
    try:
        return tiktoken.Encoding(state["name"], pat_str=state["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=special_tokens)
    except ValueError as error:
        raise UserError(f"{source}: pat_str is no pattern that tiktoken compiles ({str(error)[:200]!a})") from error


# ---- model_<step>.pt ------------------------------------------------------------------------------------------------

STORAGE_DTYPES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}
NUMPY_DTYPES = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the checkpoint: bytes [start, start + nbytes) of `path`, contiguous, little-endian."""
    path: Path
    dtype: str          # float32, bfloat16 or float16
    shape: tuple
    start: int

    @property
    def nbytes(self):
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def numpy(self, first=0, last=None):
        """Rows first:last read from the file; bfloat16 as its uint16 bits."""
        first, last, _ = slice(first, last).indices(self.shape[0])
        shape = (max(last - first, 0), *self.shape[1:])
        kind, row_items = np.dtype(NUMPY_DTYPES[self.dtype]), math.prod(self.shape[1:])
        data = np.fromfile(self.path, kind, math.prod(shape), offset=self.start + first * row_items * kind.itemsize)
        return data.reshape(shape)


@dataclass(frozen=True)
class Storage:
    dtype: str
    key: str
    items: int


class CheckpointUnpickler(Refusing):
    kind = "nanochat checkpoint"

    def __init__(self, file, path, members):
        """members: storage key -> (start, nbytes) in the file at `path`."""
        super().__init__(file)
        self.path, self.members = path, members
        # Stand-ins are made per file: one file can't leave anything behind in them for the next.
        self.known = {("collections", "OrderedDict"): OrderedDict,
                      ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: self.tensor(*arguments),
                      **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()}}

    def persistent_load(self, key):
        kinds = [type(part) for part in key] if type(key) is tuple else []
        if kinds != [str, str, str, str, int] or key[1] not in ITEM_BYTES:
            raise pickle.UnpicklingError("a reference to something other than a storage of floats")
        _, dtype, name, _, items = key
        if name not in self.members or items * ITEM_BYTES[dtype] != self.members[name][1]:
            raise pickle.UnpicklingError(f"storage {name:.20} of {items} {dtype} is not in the archive with that size")
        return Storage(dtype, name, items)

    def tensor(self, storage, offset, shape, stride, requires_grad, hooks, metadata=None):
        """torch._utils._rebuild_tensor_v2: what it says is checked against the archive; no data is read."""
        if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
            raise pickle.UnpicklingError("a tensor without storage, shape or stride")
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)):
            raise pickle.UnpicklingError("a tensor whose offset, shape or stride is not made of whole numbers")
        contiguous = tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))
        if any(have != want for have, want, n in zip(stride, contiguous, shape, strict=True) if n > 1):
            raise pickle.UnpicklingError(f"a tensor of shape {shape} that is not contiguous (stride {stride})")
        if offset + math.prod(shape) > storage.items:
            raise pickle.UnpicklingError(f"a tensor of shape {shape} in a storage of {storage.items} items")
        start = self.members[storage.key][0] + offset * ITEM_BYTES[storage.dtype]
        return StoredTensor(self.path, storage.dtype, shape, start)

    def set_state(self, target, state):
        if type(target) is not OrderedDict:      # torch hangs version numbers on its OrderedDict: not needed
            raise pickle.UnpicklingError(f"a state for {type(target).__name__}")


def stored_members(archive, path):
    """name -> (start, nbytes) of every member of an uncompressed zip, checked to lie inside the file."""
    size, members = path.stat().st_size, {}
    with open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise UserError(f"{path}: {info.filename!a:.200} is compressed, which torch.save never does")
            file.seek(max(info.header_offset, 0))
            header = file.read(30)
            if info.header_offset < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise UserError(f"{path}: damaged at {info.filename!a:.200}; download it again")
            name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
            start = info.header_offset + 30 + name_bytes + extra_bytes
            if start + info.file_size > size:
                raise UserError(f"{path}: {info.filename!a:.200} says {info.file_size} bytes, more than the file has; "
                                "download it again")
            members[info.filename] = (start, info.file_size)
    return members


def read_torch_checkpoint(path):
    """name -> StoredTensor of a flat state dict saved with torch.save, in the file's order, without torch and without
    running anything in it. Data is read only by `StoredTensor.numpy()`.

    Raises UserError naming the file and the reason: not a zip, a refused global, sizes that don't fit the file."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = stored_members(archive, path)
    except OSError as error:
        raise UserError(f"{path}: can't read the checkpoint: {error.strerror}; give the folder of "
                        "model_<step>.pt") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{path}: not a zip as torch.save writes since version 1.6 ({str(error)[:100]!a}); save it "
                        "again with a newer torch, or download it again") from error
    pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise UserError(f"{path}: a zip, but no torch checkpoint (it has {len(pickles)} files named data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    order = members.get(prefix + "byteorder")
    start, nbytes = members[pickles[0]]
    if nbytes > MAX_PICKLE_BYTES:
        raise UserError(f"{path}: its data.pkl has {nbytes} bytes, too many for a nanochat checkpoint")
    with open(path, "rb") as file:
        if order:
            file.seek(order[0])
            if file.read(order[1]) != b"little":
                raise UserError(f"{path}: saved on a big-endian machine, which isn't supported")
        file.seek(start)
        program = BytesIO(file.read(nbytes))
    folder = prefix + "data/"
    storages = {name.removeprefix(folder): place for name, place in members.items() if name.startswith(folder)}
    loaded = CheckpointUnpickler(program, path, storages).read_one(path)
    if type(loaded) not in (OrderedDict, dict) or not loaded:
        raise UserError(f"{path}: holds {type(loaded).__name__}, expected the state dict (name -> tensor) of nanochat")
    for name, value in loaded.items():
        if type(name) is not str or type(value) is not StoredTensor:
            raise UserError(f"{path}: {name!a:.60} is a {type(value).__name__}, expected a tensor: no nanochat model")
    return dict(loaded)
