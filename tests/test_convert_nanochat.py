"""convert_nanochat.py: every generation and layout, what it writes, what it refuses, and the way back."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import convert_nanochat
import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, require
from fake_hub import fake_hub
from mlx.utils import tree_flatten
from mlx_grpo import UserError, nanochat_folders, nanochat_verify
from mlx_grpo import nanochat_checkpoint as checkpoint
from mlx_grpo.nanochat_tokenizer import SPECIAL_TOKENS, encoding_from_json
from mlx_grpo.safe_pickle import read_tiktoken_pickle, read_torch_checkpoint
from nanochat_fixtures import (STORED, TINY, conversations, converted, folder, load, random_checkpoint, reference,
                               tokenizer_cases)

HOSTILE = pickle.dumps({"payload": type("P", (), {"__reduce__": lambda self: (os.system, ("touch owned",))})()})


def run(*arguments, python=("-P",), **options):
    """convert_nanochat.py as a command: (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, *python, str(ROOT / "convert_nanochat.py"), *map(str, arguments)],
                          capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


def texts_in(directory):
    return {path.name: path.read_text() for path in directory.iterdir() if path.suffix in (".json", ".jinja", ".py")}


# ---- what comes out -------------------------------------------------------------------------------------------------

def test_the_command_converts_verifies_and_records(tmp_path):
    require("torch")
    code, out, err = run("--cache-dir", folder("gen5"), "--output-dir", tmp_path / "out")
    assert code == 0 and err == ""
    assert "generation 5" in out and "against torch" in out and "against nanochat's own stored logits" in out
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    model = folder("gen5") / "model_003000.pt"
    assert record["source"]["files"][model.name] == {"sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
                                                     "bytes": model.stat().st_size}
    assert (record["source"]["step"], record["source"]["generation"], record["dtype"]) == (3000, 5, "float32")
    assert record["mapping"]["value_embeds.3.weight"] == {
        "to": "transformer.h.3.value_embed.weight", "shape": [777, 32], "stored_shape": [832, 32],
        "stored_dtype": "bfloat16", "quantized": False}
    assert record["verification"]["passed"] and record["verification"]["nanochat"]["max"] < 1e-4
    assert record["verification"]["torch"]["positions"] > 250      # past the short window of 128
    assert record["meta"] == json.loads((folder("gen5") / "meta_003000.json").read_text())


@pytest.mark.parametrize("generation", STORED)
def test_the_output_is_complete_and_holds_no_path_of_this_machine(tmp_path, generation):
    converted(folder(generation), tmp_path / "out")
    ours = {"nanochat_mlx.py"} if generation != "gen1" else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "tokenizer.pkl", "generation_config.json", "conversion.json"} | ours
    assert not any(str(place) in text for text in texts_in(tmp_path / "out").values()
                   for place in (tmp_path, ROOT, Path.home()))
    ids = conversations(generation)["special_tokens"]
    for name in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "out" / name).read_text())
        assert config["eos_token_id"] == [ids["<|assistant_end|>"], ids["<|bos|>"]]
        assert (config["bos_token_id"], config["pad_token_id"]) == (ids["<|bos|>"], ids["<|assistant_end|>"])


def test_configs_have_the_constants_of_their_generation():
    """The table of docs/nanochat.md at sequence_len 2048 (window of the first layer), from nanochat's history."""
    table = {1: (None, 10000, 1, 0, 0, 0, None), 2: (1024, 10000, 1, 0, 0, 0, None),
             3: (1024, 10000, 1, 32, 2, 0, None), 4: (768, 100000, 1.15, 12, 3, 0, None),
             5: (512, 100000, 1.2, 12, 3, 24, 10)}
    sizes = {**TINY, "sequence_len": 2048, "n_layer": 20}
    for number, row in table.items():
        pattern = {} if number == 1 else {"window_pattern": "ssSL"}
        arch = checkpoint.architecture(checkpoint.GENERATIONS[number], {**sizes, **pattern})
        names = ("rope_theta", "qk_scale", "value_gate_channels", "value_gate_scale", "smear_channels", "backout_layer")
        assert (arch["attention_windows"][0], *(arch[name] for name in names)) == row
        if number > 1:
            assert arch["attention_windows"][3::4] == [2048] * 5 and arch["attention_windows"][-1] == 2048
            assert set(checkpoint.architecture(checkpoint.GENERATIONS[number], sizes)["attention_windows"]) == {2048}
        assert arch["value_embed_layers"] == (list(range(1, 20, 2)) if number > 2 else [])


@pytest.mark.parametrize("generation, changes", [
    (2, {}), (4, {}), *[(n, {"n_layer": 3, "n_kv_head": 4, "sequence_len": 300}) for n in (1, 2, 3, 4, 5)]])
def test_every_generation_equals_plain_torch(tmp_path, generation, changes):
    """Generations 2 and 4 have no stored reference: the rendering that reproduces 1, 3 and 5 is theirs too."""
    require("torch")
    random_checkpoint(tmp_path / "in", generation, sizes={**TINY, **changes}, dtype="bfloat16")
    record = converted(tmp_path / "in", tmp_path / "out", verify=True)
    assert record["source"]["generation"] == generation
    gap = record["verification"]["torch"]["max"]      # mlx-lm's generation 1 has eps 1e-5 in its norms, not 2^-23
    assert gap < (1e-3 if generation == 1 else 5e-5) and record["verification"]["passed"]


@pytest.mark.parametrize("generation", STORED)
def test_the_torch_rendering_is_nanochat(generation):
    """So that what --verify compares with has itself been compared with nanochat's own logits."""
    require("torch")
    from mlx_grpo.nanochat_torch import torch_logits
    files = nanochat_folders.find_checkpoint(folder(generation))
    _, meta, tensors, _, _, arch = convert_nanochat.read_source(files, None)
    parameter = nanochat_verify.rounded_parameter(tensors, {"vocab_size": arch["vocab_size"]}, mx.float32, None)
    stored = reference(generation)
    logits = torch_logits([stored[f"ids_{i}"] for i in range(4)], parameter, arch)
    assert max(np.abs(logits[i][:, stored[f"pos_{i}"]] - stored[f"logits_{i}"]).max() for i in range(4)) < 2e-5


@pytest.mark.parametrize("generation", STORED)
def test_transformers_opens_the_tokenizer_with_identical_ids_and_renderings(tmp_path, generation):
    transformers = require("transformers")
    converted(folder(generation), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for case in tokenizer_cases(generation):
        ids = tokenizer.encode(case["text"], add_special_tokens=False, split_special_tokens=True)
        assert ids == case["ids"], case["text"]
    data = conversations(generation)
    for conversation in data["conversations"]:
        messages = conversation["messages"]
        assert tokenizer.apply_chat_template(messages, return_dict=False) == conversation["ids"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == conversation["completion_ids"]
    assert tokenizer.encode("hi")[0] == data["special_tokens"]["<|bos|>"]
    assert len(tokenizer) == len(tokenizer.get_vocab())
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<|assistant_end|>",) * 2 + (None,)
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    original = read_tiktoken_pickle(folder(generation) / "tokenizer.pkl")
    assert encoding_from_json(tmp_path / "out" / "tokenizer.json").__getstate__() == original.__getstate__()
    assert read_tiktoken_pickle(tmp_path / "out" / "tokenizer.pkl").__getstate__() == original.__getstate__()


@pytest.mark.parametrize("generation", STORED)
def test_plain_mlx_lm_opens_the_output_and_asks_before_running_the_model_file(tmp_path, generation):
    import mlx_lm
    converted(folder(generation), tmp_path / "out")
    if generation != "gen1":                      # mlx-lm has the first generation's model itself
        with pytest.raises(ValueError, match="trust_remote_code"):
            mlx_lm.load(str(tmp_path / "out"))
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"), trust_remote_code=True)
    ids = reference(generation)["ids_1"].astype(np.int32)
    assert mx.array_equal(model(mx.array(ids)), load(tmp_path / "out")[0](mx.array(ids)))
    ends = conversations(generation)["special_tokens"]
    assert set(tokenizer.eos_token_ids) == {ends["<|assistant_end|>"], ends["<|bos|>"]}


def test_mlx_lm_can_quantise_the_output_itself(tmp_path):
    import mlx_lm
    converted(folder("gen5"), tmp_path / "out")
    mlx_lm.convert(str(tmp_path / "out"), str(tmp_path / "packed"), quantize=True, q_group_size=32,
                   trust_remote_code=True)
    assert (tmp_path / "packed" / "nanochat_mlx.py").is_file()
    model, _ = load(tmp_path / "packed")
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 777)


@pytest.mark.parametrize("options, packed", [
    ({"dtype": "float16"}, 0),
    *[({"dtype": dtype, "quantization": {"group_size": 32, "bits": bits, "mode": "affine"}}, 1)
      for dtype, bits in [("bfloat16", 3), ("float16", 4), ("float32", 8)]]])
def test_half_precision_and_quantised_outputs_are_verified_on_their_own_weights(tmp_path, options, packed):
    """Exactly the rounding that was asked for: the same weights in torch give the same logits."""
    require("torch")
    record = converted(folder("gen5"), tmp_path / "out", verify=True, **options)
    assert record["verification"]["torch"]["max"] < 1e-4 and record["verification"]["rounding"]["max"] < 15
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert ("lm_head.scales" in weights) == bool(packed) and "transformer.smear_gate.scales" not in weights
    assert {value.dtype for value in weights.values()} - {mx.uint32} == {getattr(mx, options["dtype"])}
    if options["dtype"] == "float16" and not packed:
        assert record["verification"]["rounding"]["max"] < 0.1


def test_weights_are_the_checkpoints_own_to_the_bit(tmp_path):
    torch = require("torch")
    converted(folder("gen5"), tmp_path / "out")
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name, tensor in torch.load(folder("gen5") / "model_003000.pt", weights_only=True).items():
        mine = np.array(weights.pop(checkpoint.mlx_name(name)))
        assert (mine == tensor.float().numpy()[:len(mine)]).all(), name
    assert not weights


def test_bands_narrower_than_a_tensor_give_the_same_file(tmp_path, monkeypatch):
    for name, band in (("whole", 1 << 30), ("bands", 1000)):
        monkeypatch.setattr(convert_nanochat, "BAND_BYTES", band)
        converted(folder("gen5"), tmp_path / name, dtype="bfloat16",
                  quantization={"group_size": 64, "bits": 4, "mode": "affine"})
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "bands/model.safetensors").read_bytes()


def test_compiled_checkpoints_lose_their_prefix(tmp_path):
    """`lstrip("_orig_mod.")` would eat letters of the names: resid_lambdas would become esid_lambdas."""
    torch = require("torch")
    tensors = random_checkpoint(tmp_path / "in", 5)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "in/model_000001.pt")
    converted(tmp_path / "in", tmp_path / "out")
    assert set(mx.load(str(tmp_path / "out/model.safetensors"))) == {checkpoint.mlx_name(name) for name in tensors}


def test_a_softcap_for_late_generation_3_is_kept_and_the_choice_is_said(tmp_path, capsys):
    converted(folder("gen3"), tmp_path / "default")
    assert "--logit-softcap 20" in capsys.readouterr().out
    converted(folder("gen3"), tmp_path / "late", logit_softcap=20.0)
    assert "--logit-softcap" not in capsys.readouterr().out
    ids = mx.array(reference("gen3")["ids_0"].astype(np.int32))
    early, late = (load(tmp_path / name)[0](ids) for name in ("default", "late"))
    assert np.allclose(20 * np.tanh(np.arctanh(np.array(early, dtype=np.float64) / 15) * 15 / 20), late, atol=1e-4)


def test_a_softcap_that_mlx_lms_own_model_lacks_takes_ours(tmp_path):
    converted(folder("gen1"), tmp_path / "out", logit_softcap=30.0)
    model, config = load(tmp_path / "out")
    assert config["model_type"] == "nanochat_mlx" and (tmp_path / "out" / "nanochat_mlx.py").is_file()
    stored, logits = reference("gen1")["logits_0"].astype(np.float64), model(mx.array(reference("gen1")["ids_0"]))
    assert np.allclose(30 * np.tanh(np.arctanh(stored / 15) * 15 / 30), logits, atol=1e-4)


# ---- verification ---------------------------------------------------------------------------------------------------

def test_a_failed_verification_exits_1_and_keeps_the_directory(tmp_path, capsys):
    """The stored logits were made with softcap 15; torch agrees with the wrong softcap, nanochat doesn't."""
    require("torch")
    code = convert_nanochat.main(["--cache-dir", str(folder("gen3")), "--output-dir", str(tmp_path / "out"),
                                  "--logit-softcap", "20"])
    assert code == 1 and "NOT verified" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["verification"]
    assert not record["passed"] and record["nanochat"]["max"] > 0.5 and record["torch"]["max"] < 1e-4
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_wrong_mapping_fails_against_torch(tmp_path, monkeypatch):
    require("torch")
    random_checkpoint(tmp_path / "in", 4)
    swap = {"transformer.h.0.attn.c_q.weight": "transformer.h.1.attn.c_q.weight",
            "transformer.h.1.attn.c_q.weight": "transformer.h.0.attn.c_q.weight"}
    plain = checkpoint.mlx_name
    monkeypatch.setattr(checkpoint, "mlx_name", lambda name: plain(swap.get(name, name)))
    record = converted(tmp_path / "in", tmp_path / "out", verify=True)
    assert not record["verification"]["passed"] and record["verification"]["torch"]["max"] > 0.1


def test_without_torch_it_converts_and_says_that_it_did_not_verify(tmp_path):
    """A folder with a `torch` that can't be imported stands in front of the real one."""
    hidden = tmp_path / "hidden"
    (hidden / "sitecustomize").mkdir(parents=True)
    (hidden / "sitecustomize/__init__.py").write_text(
        "import sys, importlib.util as u\nreal = u.find_spec\nsys.modules['torch'] = None\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n")
    options = {"python": (), "env": {**os.environ, "PYTHONPATH": str(hidden)}}
    checkpoint_only = shutil.copytree(folder("gen5"), tmp_path / "in", ignore=shutil.ignore_patterns("reference"))
    out = tmp_path / "out"
    code, said, err = run("--cache-dir", checkpoint_only, "--output-dir", out, **options)
    assert code == 0 and "not verified: torch isn't installed" in said, err
    assert json.loads((out / "conversion.json").read_text())["verification"] is None
    code, _, err = run("--cache-dir", checkpoint_only, "--output-dir", tmp_path / "b", "--verify", **options)
    assert code == 2 and "pip install torch" in err and not (tmp_path / "b").exists()
    code, said, _ = run("--cache-dir", folder("gen5"), "--output-dir", tmp_path / "c", "--verify", **options)
    assert code == 0 and "against nanochat's own stored logits" in said and "against torch" not in said
    code, _, err = run("--cache-dir", folder("gen5"), "--output-dir", tmp_path / "b", "--verify", "-q", **options)
    assert code == 2 and "pip install torch" in err and not (tmp_path / "b").exists()
    code, _, err = run("--to-pytorch", out, "--output-dir", tmp_path / "d", **options)
    assert code == 2 and "pip install torch" in err and not (tmp_path / "d").exists()


# ---- the way back ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("generation", STORED)
def test_the_way_back_is_unchanged_to_the_bit(tmp_path, generation):
    torch = require("torch")
    converted(folder(generation), tmp_path / "mlx")
    assert convert_nanochat.main(["--to-pytorch", str(tmp_path / "mlx"), "--output-dir", str(tmp_path / "back")]) == 0
    first, second = (nanochat_folders.find_checkpoint(root) for root in (folder(generation), tmp_path / "back"))
    before, after = (torch.load(files.model, weights_only=True) for files in (first, second))
    assert before.keys() == after.keys()
    vocab = checkpoint.read_meta(first.meta)["model_config"]["vocab_size"]
    for name, tensor in before.items():
        assert (after[name].shape, after[name].dtype) == (tensor.shape, tensor.dtype)
        real = slice(vocab) if checkpoint.has_vocabulary_rows(name) else slice(None)
        assert torch.equal(after[name][real], tensor[real]) and not (checkpoint.has_vocabulary_rows(name)
                                                                     and after[name][vocab:].any())
    meta, source = (json.loads(files.meta.read_text()) for files in (second, first))
    assert meta == source
    assert second.tokenizer.read_bytes() == first.tokenizer.read_bytes()


def test_a_trained_model_goes_home_with_its_step_and_comes_again(tmp_path):
    """Weights changed in MLX arrive in nanochat's file, and converting that file gives the trained model again."""
    require("torch")
    converted(folder("gen5"), tmp_path / "mlx")
    weights = mx.load(str(tmp_path / "mlx/model.safetensors"))
    trained = {name: value * 1.25 for name, value in weights.items()}
    shutil.copytree(tmp_path / "mlx", tmp_path / "trained")
    mx.save_safetensors(str(tmp_path / "trained/model.safetensors"), trained)
    (tmp_path / "trained/conversion.json").unlink()           # a checkpoint of the trainer: config and weights only
    convert_nanochat.main(["--to-pytorch", str(tmp_path / "trained"), "--output-dir", str(tmp_path / "back"),
                           "--step", "3100"])
    assert (tmp_path / "back/model_003100.pt").is_file() and (tmp_path / "back/meta_003100.json").is_file()
    converted(tmp_path / "back", tmp_path / "again", verify=True)
    again = mx.load(str(tmp_path / "again/model.safetensors"))
    for name, value in trained.items():
        rounded = "wte" in name or "value_embed" in name      # stored as bfloat16, as nanochat trains them
        assert mx.array_equal(again[name], value.astype(mx.bfloat16).astype(mx.float32) if rounded else value)


def test_what_cannot_go_back_is_refused(tmp_path):
    require("torch")
    converted(folder("gen5"), tmp_path / "packed", quantization={"group_size": 64, "bits": 4, "mode": "affine"})
    converted(folder("gen5"), tmp_path / "short")
    weights = mx.load(str(tmp_path / "short/model.safetensors"))
    mx.save_safetensors(str(tmp_path / "short/model.safetensors"), dict(list(weights.items())[1:]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    for name, reason in [("packed", "quantised"), ("short", "not nanochat's"), ("other", "convert_nanochat.py did not"),
                         ("none", "no readable config.json")]:
        with pytest.raises(UserError, match=reason):
            convert_nanochat.main(["--to-pytorch", str(tmp_path / name), "--output-dir", str(tmp_path / "back")])
        assert not (tmp_path / "back").exists()


# ---- finding a checkpoint -------------------------------------------------------------------------------------------

def empty_checkpoint(target, *steps, tokenizer=True):
    """Files with the right names: for choosing among them."""
    target.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (target / f"model_{step:06d}.pt").touch()
        (target / f"meta_{step:06d}.json").touch()
    if tokenizer:
        (target / "tokenizer.pkl").touch()
    return target


def found(root, **options):
    said = []
    return nanochat_folders.find_checkpoint(root, say=said.append, **options), " ".join(said)


def test_the_newest_step_is_the_largest_number_not_the_largest_name(tmp_path):
    empty_checkpoint(tmp_path, 999999, 1000000, 5)
    (tmp_path / "model_final.pt").touch()
    files, said = found(tmp_path)
    assert (files.step, files.model.name, files.meta.name) == (1000000, "model_1000000.pt", "meta_1000000.json")
    assert "3 checkpoints" in said and "1000000" in said and "--step" in said
    assert found(tmp_path, step=5) == (nanochat_folders.CheckpointFiles(
        tmp_path / "model_000005.pt", tmp_path / "meta_000005.json", tmp_path / "tokenizer.pkl", 5), "")
    with pytest.raises(UserError, match="--step 6: .* has the steps 5, 999999, 1000000"):
        found(tmp_path, step=6)


def test_nanochats_own_folders_give_the_last_phase_and_the_deepest_model(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.pkl").touch()
    empty_checkpoint(tmp_path / "base_checkpoints/d20", 21400, tokenizer=False)
    for tag in ("d4", "d12"):
        empty_checkpoint(tmp_path / "chatsft_checkpoints" / tag, 650, tokenizer=False)
    files, said = found(tmp_path)
    assert files.model == tmp_path / "chatsft_checkpoints/d12/model_000650.pt"
    assert files.tokenizer.samefile(tmp_path / "tokenizer/tokenizer.pkl")
    assert "chatsft_checkpoints" in said and "base_checkpoints" in said and "d12" in said
    assert found(tmp_path / "base_checkpoints")[0].step == 21400
    assert found(tmp_path / "base_checkpoints/d20")[0].tokenizer.name == "tokenizer.pkl"
    empty_checkpoint(tmp_path / "chatrl_checkpoints/mine", 100, tokenizer=False)
    empty_checkpoint(tmp_path / "chatrl_checkpoints/yours", 100, tokenizer=False)
    with pytest.raises(UserError, match="several models in .*mine, .*yours"):
        found(tmp_path)


def test_a_hub_cache_gives_the_snapshot_that_its_main_branch_names(tmp_path):
    repository = tmp_path / "models--sdobson--nanochat"
    old, new = "a" * 40, "b" * 40
    for revision in (old, new):
        blobs = empty_checkpoint(repository / "blobs" / revision, 650)
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for path in blobs.iterdir():
            (snapshot / path.name).symlink_to(path)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(old)
    (tmp_path / "models--Qwen--Qwen3-0.6B").mkdir()
    for root in (tmp_path, repository, repository / "snapshots" / old):
        assert found(root)[0].model == repository / "snapshots" / old / "model_000650.pt"
    (repository / "refs/main").write_text("c" * 40)
    assert found(tmp_path)[0].model.parent.name in (old, new)


def test_repo_downloads_one_checkpoint_and_needs_the_hub_only_once(tmp_path):
    """From a stand-in for the hub on localhost: two steps and an optimizer there, one step taken; then without it."""
    repository = shutil.copytree(folder("gen5"), tmp_path / "repository", ignore=shutil.ignore_patterns("reference"))
    for kind in ("model_003000.pt", "meta_003000.json"):
        shutil.copy(repository / kind, repository / kind.replace("003000", "000100"))
    with fake_hub({"me/nano": repository}, tmp_path / "hub", sizes={"model_000100.pt": 10**15}) as (_, environment):
        code, out, err = run("--repo", "me/nano", "--output-dir", tmp_path / "a", "--no-verify", env=environment)
        assert code == 0, err
        snapshot = next((tmp_path / "hub/hub/models--me--nano/snapshots").iterdir())
        assert {path.name for path in snapshot.iterdir()} == {"meta_003000.json", "model_003000.pt", "tokenizer.pkl"}
        assert json.loads((tmp_path / "a/conversion.json").read_text())["source"]["repo"] == "me/nano"
        for arguments, reason in [(["me/nano", "--step", 7], "no model_<step>.pt of step 7"),
                                  (["me/none"], "no such model"), (["gated/nano"], "gated")]:
            code, _, err = run("--repo", *arguments, "--output-dir", tmp_path / "b", env=environment)
            assert code == 2 and reason in err and err.count("\n") == 1, err
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    code, out, err = run("--repo", "me/nano", "--output-dir", tmp_path / "c", "--no-verify", env=offline)
    assert code == 0 and "using the copy in the cache" in out, err
    code, _, err = run("--repo", "me/other", "--output-dir", tmp_path / "d", env=offline)
    assert code == 2 and "the hub's cache doesn't have it" in err
    assert not any((tmp_path / name).exists() for name in "bd")


# ---- refusals -------------------------------------------------------------------------------------------------------

def edit_meta(folder, **changes):
    path = next(folder.glob("meta_*.json"))
    meta = json.loads(path.read_text())
    meta["model_config"] |= changes
    meta["model_config"] = {name: value for name, value in meta["model_config"].items() if value is not None}
    path.write_text(json.dumps(meta))


def drop(name):
    return lambda folder: edit_tensors(folder, lambda tensors, torch: tensors.pop(name))


def edit_tensors(folder, change):
    torch = require("torch")
    path = next(folder.glob("model_*.pt"))
    tensors = torch.load(path, weights_only=True)
    change(tensors, torch)
    torch.save(tensors, path)


def port(folder):
    for path in list(folder.glob("model_*.pt")):
        path.unlink()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()


REFUSALS = {
    "unknown parameter": (lambda f: edit_tensors(f, lambda t, torch: t.update(new=torch.zeros(2))), "1 unknown .new"),
    "missing parameter": (drop("lm_head.weight"), "1 missing .lm_head.weight"),
    "missing lambda": (drop("backout_lambda"), "missing .backout_lambda"),
    "shape": (lambda f: edit_tensors(f, lambda t, torch: t.update(resid_lambdas=torch.zeros(5))), "resid_lambdas .5,."),
    "not finite": (lambda f: edit_tensors(f, lambda t, torch: t["resid_lambdas"].fill_(float("nan"))),
                   "resid_lambdas has numbers that are not finite"),
    "padding differs": (lambda f: edit_tensors(f, lambda t, torch: t.update({"lm_head.weight": torch.zeros(896, 64)})),
                        "lm_head.weight .896, 64., not .832, 64."),
    "experiment": (lambda f: edit_tensors(f, lambda t, torch: t.update(bigram_lambdas=torch.zeros(4))),
                   "bigram_lambdas belongs to one of nanochat's one-day experiments"),
    "integers": (lambda f: edit_tensors(f, lambda t, torch: t.update(n=torch.zeros(2, dtype=torch.int64))),
                 "global torch.LongStorage"),
    "few rows": (lambda f: edit_meta(f, vocab_size=900), "has 777 tokens, meta_003000.json says 900"),
    "no meta": (lambda f: next(f.glob("meta_*")).unlink(), "meta_003000.json is missing"),
    "meta is no JSON": (lambda f: next(f.glob("meta_*")).write_text("{"), "not JSON"),
    "no model_config": (lambda f: next(f.glob("meta_*")).write_text("{}"), "no model_config"),
    "new option": (lambda f: edit_meta(f, moe_experts=4), "unknown model_config entry 'moe_experts'"),
    "many layers": (lambda f: edit_meta(f, n_layer=2_000_000_000), "35 parameters for 2000000000 layers"),
    "negative size": (lambda f: edit_meta(f, n_layer=-1), "n_layer is -1"),
    "missing size": (lambda f: edit_meta(f, n_head=None), "n_head is None"),
    "window letter": (lambda f: edit_meta(f, window_pattern="SSXL"), "window_pattern 'SSXL'"),
    "odd heads": (lambda f: edit_meta(f, n_head=5), "don't divide into heads"),
    "no tokenizer": (lambda f: (f / "tokenizer.pkl").unlink(), "no tokenizer at .*--tokenizer"),
    "hostile tokenizer": (lambda f: (f / "tokenizer.pkl").write_bytes(HOSTILE), "refused, .*global posix.system"),
    "hostile model": (lambda f: next(f.glob("model_*")).write_bytes(HOSTILE), "not a zip"),
    "cut model": (lambda f: (p := next(f.glob("model_*"))).write_bytes(p.read_bytes()[:9000]), "not a zip"),
    "nothing": (lambda f: next(f.glob("model_*")).unlink(), "no nanochat checkpoint .model_<step>.pt."),
    "transformers port": (port, "Transformers or MLX model"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_that_is_not_right_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, name):
    change, reason = REFUSALS[name]
    source = shutil.copytree(folder("gen5"), tmp_path / "in")
    change(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason) as refused:
        convert_nanochat.main(["--cache-dir", str(source), "--output-dir", str(tmp_path / "out")])
    assert "\n" not in str(refused.value) and str(source) in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]       # no output, no payload's file


def test_numbers_too_large_for_a_dtype_are_refused(tmp_path):
    random_checkpoint(tmp_path / "in", 1)
    edit_tensors(tmp_path / "in", lambda tensors, torch: tensors["lm_head.weight"].fill_(70000.0))
    with pytest.raises(UserError, match="lm_head.weight has numbers that are not finite as float16"):
        converted(tmp_path / "in", tmp_path / "out", dtype="float16")
    converted(tmp_path / "in", tmp_path / "out", dtype="bfloat16")


def test_generations_are_never_taken_for_each_other(tmp_path):
    """A generation 3 file loads leniently into generation 1's model, with logits wrong by 9."""
    for number, name in [(5, "smear_lambda"), (4, "x0_lambdas"), (3, "value_embeds.1.weight"), (2, "resid_lambdas")]:
        random_checkpoint(tmp_path / f"{number}", number)
        edit_tensors(tmp_path / f"{number}", lambda tensors, torch: tensors.pop(name))
        with pytest.raises(UserError, match="its parameters aren't"):
            converted(tmp_path / f"{number}", tmp_path / "out")
    random_checkpoint(tmp_path / "windows", 1)
    edit_meta(tmp_path / "windows", window_pattern="SL")
    with pytest.raises(UserError, match="no windows"):
        converted(tmp_path / "windows", tmp_path / "out")


@pytest.mark.parametrize("arguments, reason", [
    (["--bits", "4"], "need -q"), (["--logit-softcap", "-3"], "positive"), (["--logit-softcap", "nan"], "positive"),
    (["--to-pytorch", "x", "-q"], "--quantize has no meaning"), (["--to-pytorch", "x", "--no-verify"], "--verify"),
    (["--to-pytorch", "x", "--cache-dir", "y"], "--cache-dir has no meaning"), (["--step", "-1"], "0 or more"),
    (["--cache-dir", "nowhere"], "no such directory"), (["--repo", "not/a/name"], "not a name that the hub"),
    (["--cache-dir", str(folder("gen5")), "--tokenizer", str(folder("gen3") / "tokenizer.pkl")], "has 600 tokens"),
])
def test_options_that_make_no_sense_are_refused_by_name(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        convert_nanochat.main(arguments)
    assert not list(tmp_path.iterdir())


def test_without_a_hub_cache_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no hub cache at .*--cache-dir.*--repo"):
        convert_nanochat.main([])


def test_an_output_directory_in_use_and_a_full_disk_are_refused_before_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        converted(folder("gen5"), tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs about 1.3 MB"):
        converted(folder("gen5"), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(convert_nanochat, "write_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(folder("gen5"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_file_passes_through_memory_in_bands(tmp_path):
    """95 MB of checkpoint; what conversion takes beside the interpreter and its libraries doesn't grow with it."""
    sizes = {**TINY, "n_embd": 512, "n_layer": 8, "vocab_size": 600}
    random_checkpoint(tmp_path / "in", 1, sizes=sizes)
    size = (tmp_path / "in/model_000001.pt").stat().st_size
    program = ("import sys, convert_nanochat\nfrom benchmarks.nanochat_memory import peak_bytes\n"
               "before = peak_bytes()\nconvert_nanochat.main(sys.argv[1:])\nprint('grown', peak_bytes() - before)")
    done = subprocess.run([sys.executable, "-c", program, "--cache-dir", str(tmp_path / "in"), "--no-verify",
                           "--output-dir", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT)
    grown = int(done.stdout.split("grown")[1])
    assert size > 90e6 and grown < size * 0.6, (grown, size, done.stderr)


def test_the_checkpoint_readers_agree_on_every_fixture():
    for generation in STORED:
        files = nanochat_folders.find_checkpoint(folder(generation))
        tensors = read_torch_checkpoint(files.model)
        number = checkpoint.classify(tensors, files.model).number
        assert f"gen{number}" == generation


# ---- training -------------------------------------------------------------------------------------------------------

def test_the_newest_generation_trains_with_grpo_and_goes_home(tmp_path):
    """Three GRPO steps from the converted checkpoint to a checkpoint of the run and back to nanochat's format. The
    reward is the share of even token ids: nothing the model knows, so every group has a spread. The prompts are longer
    than both windows (128 and 256 tokens)."""
    require("torch")
    from mlx_grpo import MLXGRPOConfig, MLXGRPOTrainer, load_model, load_problems

    def even_reward(completion_ids, **_):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    converted(folder("gen5"), tmp_path / "mlx")
    config = MLXGRPOConfig(
        model_name=str(tmp_path / "mlx"), dataset="synthetic:chain", system_prompt="Be brief. " * 60,
        max_train_samples=8, num_generations=4, batch_size=2, max_steps=3, max_new_tokens=12, max_completion_length=12,
        learning_rate=1e-3, lr_scheduler_type="constant", temperature=1.0, kl_coeff=0.1, update_every=1, eval_samples=0,
        save_steps=0, log_jsonl=False)
    problems, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name)
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    trainer = MLXGRPOTrainer(model, tokenizer, [even_reward], config, problems, held_out, run_dir=tmp_path / "run")
    for step in range(3):
        metrics = trainer.step(problems[2 * step:2 * step + 2])
        assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0 and metrics["reward_std"] > 0
        # What was sampled through the caches has the probability that the training pass gives it.
        assert metrics["sampling/sampling_logp_difference/max"] < 1e-3
    trainer.save_checkpoint(tmp_path / "run/step-3")
    weights = mx.load(str(tmp_path / "run/step-3/model.safetensors"))
    assert weights.keys() == before.keys()
    assert all((before[name] != np.array(value)).any() for name, value in weights.items())     # nothing stood still
    convert_nanochat.main(["--to-pytorch", str(tmp_path / "run/step-3"), "--output-dir", str(tmp_path / "home")])
    record = converted(tmp_path / "home", tmp_path / "again", verify=True)
    assert record["verification"]["passed"] and record["source"]["generation"] == 5
    kept = mx.load(str(tmp_path / "again/model.safetensors"))
    assert mx.array_equal(kept["lm_head.weight"], weights["lm_head.weight"])
