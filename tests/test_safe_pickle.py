"""The readers of tokenizer.pkl and model_*.pt: right on real files; no file runs code, takes memory or breaks them."""

import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict

import pytest
import tiktoken
from conftest import FIXTURES, require
from mlx_grpo import UserError
from mlx_grpo.safe_pickle import read_tiktoken_pickle, read_torch_checkpoint

NANOCHAT = FIXTURES / "nanochat"
CHECKPOINTS = {"gen1": "model_000650.pt", "gen3": "model_000971.pt", "gen5": "model_003000.pt"}
LETTERS = {bytes([byte]): byte for byte in range(256)}
STATE = {"name": "rustbpe", "pat_str": r"\w+|\W", "mergeable_ranks": {**LETTERS, b"ab": 256},
         "special_tokens": {"<|bos|>": 257}}


class Runs:
    """Pickles as "call `function` with `arguments`": the classical payload."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Kept:
    """Pickles as tiktoken.core.Encoding with the given state."""

    def __init__(self, state):
        self.state = state


def encoding_pickle(state, protocol=4):
    buffer = io.BytesIO()
    pickler = pickle._Pickler(buffer, protocol)
    pickler.dispatch = {**pickler.dispatch, Kept: lambda self, kept: (
        self.save_global(tiktoken.Encoding), self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ), self.save(kept.state),
        self.write(pickle.BUILD))}
    pickler.dump(Kept(state))
    return buffer.getvalue()


def written(tmp_path, data, name="tokenizer.pkl"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def checkpoint_with(tmp_path, data_pkl, generation="gen5"):
    """A copy of a real checkpoint with another data.pkl."""
    path = tmp_path / "model_000001.pt"
    with zipfile.ZipFile(NANOCHAT / generation / CHECKPOINTS[generation]) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, data_pkl if name.endswith("/data.pkl") else old.read(name))
    return path


@pytest.mark.parametrize("generation", CHECKPOINTS)
def test_tokenizer_pickles_of_nanochat_are_read_as_pickle_reads_them(generation):
    """The fixtures were written by nanochat itself: opening them with pickle.load is safe here, and the reference."""
    path = NANOCHAT / generation / "tokenizer.pkl"
    mine, theirs = read_tiktoken_pickle(path), pickle.loads(path.read_bytes())
    assert mine.__getstate__() == theirs.__getstate__()


@pytest.mark.parametrize("generation", CHECKPOINTS)
def test_checkpoints_are_read_bit_for_bit_as_torch_reads_them(generation):
    torch = require("torch")
    path = NANOCHAT / generation / CHECKPOINTS[generation]
    mine, theirs = read_torch_checkpoint(path), torch.load(path, map_location="cpu", weights_only=True)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert (mine[name].dtype, mine[name].shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        assert (mine[name].numpy() == bits.numpy()).all()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function, name", [(os.system, f"{os.name}.system"), (eval, "eval"), (exec, "exec"),
                                            (io.open, "open"), (getattr, "getattr"), (pickle.loads, "_pickle.loads")])
def test_payloads_are_refused_by_name_and_do_not_run(tmp_path, monkeypatch, protocol, function, name):
    """os.system, eval and their like, in every protocol, alone, inside the Encoding's state, and in a checkpoint."""
    monkeypatch.chdir(tmp_path)
    argument = {"system": "touch owned", "open": "owned"}.get(name.split(".")[-1], "open('owned', 'w')")
    payload = Runs(function, argument, *(["w"] if function is io.open else []))
    files = [(read_tiktoken_pickle, written(tmp_path, pickle.dumps(payload, protocol))),
             (read_torch_checkpoint, checkpoint_with(tmp_path, pickle.dumps(OrderedDict(a=payload), protocol)))]
    if protocol >= 3:
        state = {**STATE, "mergeable_ranks": [payload]}
        files.append((read_tiktoken_pickle, written(tmp_path, encoding_pickle(state, protocol), "inside.pkl")))
    for read, path in files:
        with pytest.raises(UserError, match=rf"global \w*\.?{name.split('.')[-1]},") as refused:
            read(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "owned").exists()


def test_the_payloads_above_would_run_in_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs(os.system, "touch owned")))
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("program, reason", [
    (b"(S'touch owned'\nios\nsystem\n.", "os.system"),                                  # INST, protocol 0
    (b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch owned\x85R.", "os.system"),
    (b"\x80\x04ctiktoken.core\nEncoding\n)\x81(dS'name'\nS'cl100k_base'\nsb.", "instruction"),
    (b"\x80\x04ctiktoken.core\nEncoding\n)\x81S'cl100k_base'\nb.", "not the pickled"),   # the registry would download
    (b"\x80\x02\x82\x01.", "instruction"),                                              # EXT1: a global by number
    (b"\x80\x04ctiktoken.core\nEncoding\nctiktoken.core\nEncoding\nb.", "state for type"),
    (b"\x80\x04cmlx_grpo.safe_pickle\nEncodingState\n.", "safe_pickle.EncodingState"),
    (b"\x80\x04\x8c\x03a\nb\x8c\x04\x1b[2J\x93.", r"global a\\nb.\\x1b\[2J,"),      # no line end, no terminal code
    (b"\x80\x04ctiktoken.core\nEncoding.__init__.__globals__\n.", "__globals__"),
])
def test_other_ways_to_reach_a_global_are_closed(tmp_path, monkeypatch, program, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        read_tiktoken_pickle(written(tmp_path, program))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("program", [
    b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",                  # BINBYTES8 of a terabyte
    b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",                  # a frame of a terabyte
    b"\x80\x04Nr\xff\xff\xff\x7f.",                                       # LONG_BINPUT into slot 2 147 483 647
    b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",                   # BYTEARRAY8 of a terabyte
    b"\x80\x04}N" + b"q\x00h\x00\x86" * 60 + b"Ns.",                       # a key nested 2^60 deep: hashing never ends
])
def test_a_pickle_that_lies_about_sizes_takes_neither_memory_nor_time(tmp_path, program):
    import tracemalloc
    tracemalloc.start()
    with pytest.raises(UserError):
        read_tiktoken_pickle(written(tmp_path, program))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("change, reason", [
    ({"mergeable_ranks": {**LETTERS, b"ab": 258}}, "exactly 0 to 257"),
    ({"mergeable_ranks": {**LETTERS, b"ab": 257}}, "exactly 0 to 257"),
    ({"mergeable_ranks": {**{k: v for k, v in LETTERS.items() if v}, b"ab": 0, b"bc": 256}}, "0x00 for one"),
    ({"mergeable_ranks": {**LETTERS, b"abc": 256}}, "b'abc' can't be merged"),
    ({"mergeable_ranks": {**LETTERS, "ab": 256}}, "expected bytes: int"),
    ({"mergeable_ranks": {**LETTERS, b"ab": True}}, "expected bytes: int"),
    ({"special_tokens": [257]}, "special_tokens is a list"),
    ({"special_tokens": {b"<|bos|>": 257}}, "expected str: int"),
    ({"pat_str": "(unclosed"}, "pat_str"),
    ({"more": 1}, "fields"),
])
def test_a_tokenizer_that_is_no_vocabulary_is_refused_with_the_field(tmp_path, change, reason):
    read_tiktoken_pickle(written(tmp_path, encoding_pickle(STATE)))
    with pytest.raises(UserError, match=reason):
        read_tiktoken_pickle(written(tmp_path, encoding_pickle({**STATE, **change})))


def test_a_checkpoint_whose_sizes_do_not_fit_the_file_is_refused(tmp_path):
    torch = require("torch")
    path = tmp_path / "model_000001.pt"
    torch.save(OrderedDict(w=torch.zeros(4, 8)), path)
    with zipfile.ZipFile(path) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert read_torch_checkpoint(path)["w"].shape == (4, 8)
    for old, new, reason in [(b"K\x04K\x08\x86", b"K\x05K\x08\x86", "shape"), (b"K ", b"K!", "archive with that size"),
                             (b"FloatStorage", b"HalfStorage\x00"[:12], "global|damaged"),
                             (b"K\x08K\x01\x86", b"K\x01K\x04\x86", "not contiguous"), (b"cpu", b"gpu", None)]:
        assert program.count(old) == 1, old
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "changed.pt", "w") as changed:
            for name in archive.namelist():
                changed.writestr(name, program.replace(old, new) if name.endswith("data.pkl") else archive.read(name))
        if reason is None:
            read_torch_checkpoint(tmp_path / "changed.pt")
            continue
        with pytest.raises(UserError, match=reason):
            read_torch_checkpoint(tmp_path / "changed.pt")


def test_what_is_no_torch_checkpoint_is_refused_in_one_line(tmp_path):
    torch = require("torch")
    good = (NANOCHAT / "gen5" / CHECKPOINTS["gen5"]).read_bytes()
    torch.save(OrderedDict(w=torch.zeros(2)), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "squeezed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"x" * 1000)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "x")
    torch.save(OrderedDict(w=torch.zeros(2), n=3), tmp_path / "number.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    for name, data in {"empty.pt": b"", "text.pt": b"hello", "cut.pt": good[:-5000]}.items():
        (tmp_path / name).write_bytes(data)
    for name in [*sorted(path.name for path in tmp_path.iterdir()), "none.pt"]:
        with pytest.raises(UserError, match=name) as refused:
            read_torch_checkpoint(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_a_damaged_file_is_refused_and_never_a_traceback(tmp_path):
    """Bytes changed at random, 400 times in each file: read as something valid, or refused in one line."""
    draw, outcomes = random.Random(0), set()
    with zipfile.ZipFile(NANOCHAT / "gen5" / CHECKPOINTS["gen5"]) as archive:
        program = archive.read("model_003000/data.pkl")
    small = encoding_pickle({**STATE, "mergeable_ranks": {**LETTERS, b"ab": 256}, "name": "rustbpe" * 100})
    for _ in range(400):
        for data, read in ((small, read_tiktoken_pickle), (program, read_torch_checkpoint)):
            broken = bytearray(data)
            for _ in range(draw.randint(1, 3)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            tokenizer = read is read_tiktoken_pickle
            path = written(tmp_path, bytes(broken)) if tokenizer else checkpoint_with(tmp_path, bytes(broken))
            try:
                read(path)
                outcomes.add((read, "read"))
            except UserError as error:
                outcomes.add((read, "refused"))
                assert "\n" not in str(error)
    assert len(outcomes) == 4
