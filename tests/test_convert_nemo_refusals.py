"""Damaged, hostile and unsupported input: one line that says what and why, exit code 2, nothing left on the disk."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import tarfile

import pytest
from conftest import require
from nemo_fixtures import fixture, read_json, tensors_of

from mlx_grpo import convert_nemo, run_command
from mlx_grpo.nemo_convert import import_hf
from mlx_grpo.nemo_families import FAMILIES

torch = require("torch")
require("yaml")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A nemo2 checkpoint, a bridge one, an archive and the source they came from."""
    directory = tmp_path_factory.mktemp("pristine")
    hf = directory / "hf"
    shutil.copytree(fixture("llama3_gqa") / "hf", hf)
    for name, container in (("nemo2", "nemo2"), ("bridge", "bridge"), ("model.nemo", "nemo1")):
        import_hf(hf, directory / name, container)
    return directory


@pytest.fixture
def copy(pristine, tmp_path):
    def make(name):
        target = tmp_path / name
        (shutil.copytree if (pristine / name).is_dir() else shutil.copy)(pristine / name, target)
        return target
    return make


def refused(tokens, capsys, tmp_path):
    """The one line of a command that must fail with exit code 2 and leave nothing, not even a hidden directory."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        run_command(lambda: convert_nemo.main([str(t) for t in tokens]))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    assert sorted(tmp_path.iterdir()) == before
    return message


def refuse_export(path, capsys, tmp_path):
    return refused(["export", "--path", path, "--output", tmp_path / "out"], capsys, tmp_path)


def refuse_import(path, capsys, tmp_path, *more):
    return refused(["import", "--source", path, "--output", tmp_path / "out", *more], capsys, tmp_path)


def edit_index(weights, change):
    """Rewrite a .metadata with torch's own classes after `change(metadata)`."""
    metadata = pickle.loads((weights / ".metadata").read_bytes())
    change(metadata)
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))


class Payload:
    """Runs a command when unpickled by anything but a restricted reader."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---- damage ----

def test_a_truncated_piece_file(copy, capsys, tmp_path):
    path = copy("nemo2")
    file = path / "weights" / "__0_1.distcp"
    os.truncate(file, file.stat().st_size - 100)
    assert "cut short" in refuse_export(path, capsys, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 200, 5000, -1])
def test_a_truncated_source(copy, capsys, tmp_path, kept):
    path = copy("hf")
    file = path / "model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    assert "cut short" in refuse_import(path, capsys, tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_archive(copy, capsys, tmp_path, part):
    path = copy("model.nemo")
    os.truncate(path, int(path.stat().st_size * part))
    refuse_export(path, capsys, tmp_path)


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_index(copy, capsys, tmp_path, name, part):
    path = copy("nemo2")
    file = path / "weights" / name
    os.truncate(file, int(file.stat().st_size * part))
    refuse_export(path, capsys, tmp_path)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "metadata.json"])
def test_a_missing_file_of_the_weights(copy, capsys, tmp_path, file):
    path = copy("nemo2")
    (path / "weights" / file).unlink()
    assert f"{file} is missing" in refuse_export(path, capsys, tmp_path)


def test_a_missing_shard_of_the_source(copy, capsys, tmp_path):
    path = copy("hf")
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    names = {name: first for name in tensors_of(path)}
    (path / "model.safetensors").rename(path / first)
    for weight_map, message in ((names | {"lm_head.weight": second}, f"{second} is missing"),
                                (names | {"extra.weight": first}, "extra.weight is listed in the index but in no file"),
                                ({"lm_head.weight": f"../hf/{first}"}, "bare file names")):
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert message in refuse_import(path, capsys, tmp_path)


def test_a_shape_that_contradicts_the_configuration(copy, capsys, tmp_path):
    path = copy("hf")
    config = read_json(path / "config.json")
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    said = refuse_import(path, capsys, tmp_path)
    assert "mlp.gate_proj.weight has shape [112, 64], the configuration says [96, 64]" in said
    path = copy("nemo2")
    model = path / "context" / "model.yaml"
    model.write_text(model.read_text().replace("ffn_hidden_size: 112", "ffn_hidden_size: 96"))
    said = refuse_export(path, capsys, tmp_path)
    assert "linear_fc1.weight has shape [2, 224, 64], the configuration says [2, 192, 64]" in said


def test_a_tensor_too_many_or_too_few(copy, capsys, tmp_path):
    from safetensors.torch import save_file
    path, tensors = copy("hf"), None
    tensors = tensors_of(path)
    save_file(tensors | {"model.layers.0.extra": torch.ones(3)}, path / "model.safetensors")
    assert "model.layers.0.extra" in refuse_import(path, capsys, tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    assert "has no tensor model.layers.1.mlp.up_proj.weight" in refuse_import(path, capsys, tmp_path)
    path = copy("nemo2")
    model = path / "context" / "model.yaml"
    text = model.read_text()
    model.write_text(text.replace("num_layers: 2", "num_layers: 1"))
    refuse_export(path, capsys, tmp_path)
    model.write_text(text.replace("models.llama", "model.llama").replace("llama.LlamaConfig", "qwen2.Qwen2Config"))
    assert "linear_qkv.bias" in refuse_export(path, capsys, tmp_path)


def test_quantised_weights(copy, capsys, tmp_path):
    from safetensors.torch import save_file
    path = copy("hf")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors_of(path).items()}, path / "model.safetensors")
    assert "quantised" in refuse_import(path, capsys, tmp_path)


# ---- hostile ----

def test_a_pickle_that_would_run_a_command(copy, capsys, tmp_path):
    marker = tmp_path / "ran"
    for payload in (Payload(os.system, f"touch {marker}"), Payload(eval, "1"), Payload(getattr, "x", "y")):
        path = copy("nemo2") if not (tmp_path / "nemo2").exists() else tmp_path / "nemo2"
        (path / "weights" / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": payload}))
        assert "refused" in refuse_export(path, capsys, tmp_path)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    with tarfile.open(copy("model.nemo")) as archive:
        archive.extractall(unpacked, filter="data")
    shutil.rmtree(unpacked / "model_weights")
    torch.save({"model.embedding.word_embeddings.weight": Payload(os.system, f"touch {marker}")},
               unpacked / "model_weights.ckpt")
    assert "refused" in refuse_export(unpacked, capsys, tmp_path)
    assert not marker.exists()


def test_a_dotted_global_and_a_pickled_library_function(copy, capsys, tmp_path):
    path = copy("nemo2")
    for module, name in ((b"torch", b"serialization.os.system"), (b"torch", b"load"), (b"functools", b"partial"),
                         (b"torch.storage", b"_load_from_bytes")):
        code = b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."
        (path / "weights" / ".metadata").write_bytes(code)
        assert name.decode() in refuse_export(path, capsys, tmp_path)


def test_a_pickle_whose_numbers_would_take_all_memory(copy, capsys, tmp_path):
    path = copy("nemo2")
    for code in (b"\x80\x04r\xff\xff\xff\x7f.", b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
                 b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x."):
        (path / "weights" / ".metadata").write_bytes(code)
        refuse_export(path, capsys, tmp_path)


def archive_with(path, *members):
    """A .nemo whose config is real and whose other members are (name, type, link target or bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                archive.addfile(info)
    return path


@pytest.mark.parametrize("name,kind,content,message", [
    ("../../evil.txt", tarfile.REGTYPE, b"x", "escape"), ("/etc/evil", tarfile.REGTYPE, b"x", "escape"),
    ("./a/../../evil", tarfile.REGTYPE, b"x", "escape"), ("model_weights.ckpt", tarfile.SYMTYPE, "/etc/passwd", "link"),
    ("model_weights.ckpt", tarfile.LNKTYPE, "model_config.yaml", "link"), ("pipe", tarfile.FIFOTYPE, "", "device"),
    ("./model_config.yaml", tarfile.REGTYPE, b"x", "twice")])
def test_an_archive_that_escapes_or_links(name, kind, content, message, capsys, tmp_path):
    path = archive_with(tmp_path / "bad.nemo", ("./model_config.yaml", tarfile.REGTYPE, b"num_layers: 2\n"),
                        (name, kind, content))
    assert message in refuse_export(path, capsys, tmp_path)


def test_an_index_whose_boxes_or_places_are_wrong(copy, capsys, tmp_path):
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    path, key = copy("nemo2"), "module.decoder.layers.mlp.linear_fc2.weight"
    original = (path / "weights" / ".metadata").read_bytes()

    def first(metadata):
        return next(i for i in metadata.storage_data if i.fqn == key)

    def place(metadata, **changes):
        info = metadata.storage_data[first(metadata)]
        metadata.storage_data[first(metadata)] = _StorageInfo(*(changes.get(n, getattr(info, n))
                                                                for n in ("relative_path", "offset", "length")))

    def boxes(metadata, change):
        entry = metadata.state_dict_metadata[key]
        change(entry.chunks)

    def overlap(chunks):
        chunks[1] = ChunkStorageMetadata(chunks[0].offsets, chunks[1].sizes)

    wrong = {
        "is cut short": lambda m: place(m, offset=1 << 40),
        "too few": lambda m: place(m, length=64),
        "overlap": lambda m: place(m, offset=max(0, m.storage_data[first(m)].offset - 50)),
        "bare file name": lambda m: place(m, relative_path="../weights/__0_0.distcp"),
        "is missing": lambda m: place(m, relative_path="nothing.distcp"),
        "whole numbers": lambda m: place(m, offset=-1),
        "two pieces overlap": lambda m: boxes(m, overlap),
        "don't add up": lambda m: boxes(m, lambda c: c.pop()),
        "lies outside": lambda m: boxes(m, lambda c: c.__setitem__(0,
                                                                   ChunkStorageMetadata(torch.Size([9, 0, 0]),
                                                                                        c[0].sizes))),
        "at (0, 0, 0) is missing": lambda m: m.storage_data.pop(first(m)),
            "outside the tensor ()": lambda m: setattr(m.state_dict_metadata[key], "size", torch.Size([])),
            "without elements": lambda m: (setattr(m.state_dict_metadata[key], "size", torch.Size([2, 64, 0])),
                                           boxes(m, list.clear)),
    }
    for message, change in wrong.items():          # a message each
        (path / "weights" / ".metadata").write_bytes(original)
        edit_index(path / "weights", change)
        assert message in refuse_export(path, capsys, tmp_path), message


def test_an_item_that_isnt_the_tensor_of_the_index(copy, capsys, tmp_path):
    path = copy("nemo2")
    data = bytearray((path / "weights" / "__0_0.distcp").read_bytes())
    data[:] = bytes(len(data))
    (path / "weights" / "__0_0.distcp").write_bytes(data)
    assert "damaged" in refuse_export(path, capsys, tmp_path)


def test_a_link_among_the_weights(copy, capsys, tmp_path):
    path = copy("nemo2")
    file = path / "weights" / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refuse_export(path, capsys, tmp_path)


def test_configurations_that_explode(copy, capsys, tmp_path):
    path = copy("nemo2")
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nconfig: {c: *b}\n"
    (path / "context" / "model.yaml").write_text(bomb)
    assert "aliases" in refuse_export(path, capsys, tmp_path)
    (path / "context" / "model.yaml").write_text("config: !!python/object/apply:os.system ['true']\n")
    assert "not valid YAML" in refuse_export(path, capsys, tmp_path)
    (path / "context" / "model.yaml").write_text("config: " + "[" * 20000)
    refuse_export(path, capsys, tmp_path)
    path = copy("hf")
    (path / "config.json").write_text("[" * 100000)
    assert "not valid JSON" in refuse_import(path, capsys, tmp_path)
    (path / "config.json").write_text('{"a":' * 100 + "1" + "}" * 100)
    assert "nested too deeply" in refuse_import(path, capsys, tmp_path)


# ---- not supported, by name and reason ----

@pytest.mark.parametrize("change,message", [
    ({"model_type": "qwen"}, "first-generation Qwen"), ({"model_type": "gpt2"}, "no settled mapping"),
    ({"model_type": "qwen3_moe"}, "other than Mixtral"), ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn'"), ({"hidden_act": "relu"}, "'relu'"),
    ({"quantization_config": {"bits": 4}}, "quantised"), ({"num_key_value_heads": 3}, "can't be shared"),
    ({"hidden_size": None}, "hidden_size is None"), ({"model_type": None}, "no model_type"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification")])
def test_models_that_megatron_cant_hold(copy, capsys, tmp_path, change, message):
    path = copy("hf")
    (path / "config.json").write_text(json.dumps(read_json(path / "config.json") | change))
    said = refuse_import(path, capsys, tmp_path)
    assert message in said
    if "model_type" in change and change["model_type"]:
        assert all(name in said for name in FAMILIES)       # the list of those that are


@pytest.mark.parametrize("folder,change,message", [
    ("gptneox_sequential", {"use_parallel_residual": True}, "parallel residual"), ("gptneox_sequential",
                                                                                   {"use_parallel_residual": ...},
                                                                                   "parallel residual"),
    ("falcon_new_arch", {"alibi": True}, "alibi"), ("falcon_new_arch", {"num_ln_in_parallel_attn": 1},
                                                    "one layer norm"),
    ("qwen2_bias", {"use_sliding_window": True}, "use_sliding_window"),
    ("phi3_fused", {"rope_scaling": {"type": "longrope", "long_factor": [1], "short_factor": [1]}}, "'longrope'"),
    ("mistral_swa", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "only settled for Llama")])
def test_variants_of_supported_families_that_arent(capsys, tmp_path, folder, change, message):
    path = tmp_path / "hf"
    shutil.copytree(fixture(folder) / "hf", path)
    config = {k: v for k, v in (read_json(path / "config.json") | change).items() if v is not ...}
    (path / "config.json").write_text(json.dumps(config))
    assert message in refuse_import(path, capsys, tmp_path)


def test_checkpoints_of_other_kinds(copy, capsys, tmp_path):
    path = copy("nemo2")
    (path / "weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "'zarr'" in refuse_export(path, capsys, tmp_path)
    (tmp_path / "nemo2-unfinished").write_text("")
    assert "unfinished" in refuse_export(path, capsys, tmp_path)
    assert "no NeMo checkpoint" in refuse_export(copy("hf"), capsys, tmp_path)
    assert "doesn't exist" in refuse_export(tmp_path / "nothing", capsys, tmp_path)
    path = copy("bridge") / "iter_0000000" / "run_config.yaml"
    text = path.read_text()
    path.write_text(text.replace("rotary_interleaved: false", "rotary_interleaved: true"))
    assert "rotary_interleaved" in refuse_export(tmp_path / "bridge", capsys, tmp_path)
    path.write_text(text.replace("gpt_provider.GPTModelProvider", "deepseek.DeepSeekV3ModelProvider"))
    assert "DeepSeekV3ModelProvider" in refuse_export(tmp_path / "bridge", capsys, tmp_path)
    old = archive_with(tmp_path / "old.nemo", ("./model_config.yaml", tarfile.REGTYPE, b"mcore_gpt: false\n"))
    assert "before Megatron-core" in refuse_export(old, capsys, tmp_path)
    ranks = archive_with(tmp_path / "ranks.nemo", ("./model_config.yaml", tarfile.REGTYPE, b"mcore_gpt: true\n"),
                         ("./mp_rank_00/model_weights.ckpt", tarfile.REGTYPE, b"x"))
    assert "rank by rank" in refuse_export(ranks, capsys, tmp_path)
    import gzip
    (tmp_path / "zipped.nemo").write_bytes(gzip.compress(old.read_bytes()))
    assert "gzip" in refuse_export(tmp_path / "zipped.nemo", capsys, tmp_path)


def test_an_adapter_that_wasnt_merged(copy, capsys, tmp_path):
    path = copy("nemo2")

    def rename(metadata):
        key = "module.decoder.layers.mlp.linear_fc2.weight"
        adapter = key.replace("linear_fc2", "linear_fc2.adapter.linear_in")
        metadata.state_dict_metadata[adapter] = metadata.state_dict_metadata.pop(key)
        for index in [i for i in metadata.storage_data if i.fqn == key]:
            metadata.storage_data[dataclasses.replace(index, fqn=adapter)] = metadata.storage_data.pop(index)
    edit_index(path / "weights", rename)
    assert "PEFT adapter" in refuse_export(path, capsys, tmp_path)


def test_places_that_cant_be_used(copy, capsys, tmp_path):
    hf = copy("hf")
    (tmp_path / "file").write_text("x")
    said = refused(["import", "--source", hf, "--output", tmp_path / "file" / "model"], capsys, tmp_path)
    assert "can't write in" in said and "permissions" in said
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    assert "already exists" in refused(["import", "--source", hf, "--output", tmp_path / "taken"], capsys, tmp_path)
    assert ".nemo" in refused(["import", "--source", hf, "--output", tmp_path / "m", "--format", "nemo1"], capsys,
                              tmp_path)
    assert "org/name" in refused(["import", "--source", tmp_path / "nowhere", "--output", tmp_path / "m"], capsys,
                                 tmp_path)


def test_a_disk_without_room_is_found_before_anything_is_written(copy, capsys, tmp_path, monkeypatch):
    import collections
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**5))
    assert "free some space" in refuse_import(copy("hf"), capsys, tmp_path)
    assert "free some space" in refuse_export(copy("nemo2"), capsys, tmp_path)
