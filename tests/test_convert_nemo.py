"""Conversion of every fixture, both ways: weights bit for bit, logits as stored, configuration and tokenizer kept."""

import filecmp
import json
import shutil

import numpy as np
import pytest
from conftest import require
from nemo_fixtures import (CHECKPOINTS, FOLDERS, fixture, read_json, reference, same_tensors, tensors_of,
                           transformers_logits)

from mlx_grpo import UserError
from mlx_grpo.nemo_convert import export_hf, import_hf
from mlx_grpo.nemo_families import FAMILIES, WHY_NOT

torch = require("torch")
require("yaml")

# what NVIDIA's importers drop, so that no reader can give it back (and what a reader says more than the source)
LOST = {
    ("mistral_swa", "nemo2"): {"max_position_embeddings"}, ("mixtral_moe4", "nemo2"): {"router_aux_loss_coef"},
    ("qwen3_qknorm", "nemo2"): {"max_position_embeddings"},
}
# defaults said or not said
NEVER_KEPT = {"pad_token_id", "bos_token_id", "eos_token_id", "rope_scaling", "tie_word_embeddings"}


def export(path, tmp_path, **options):
    output = tmp_path / "exported"
    export_hf(path, output, **options)
    return output


@pytest.mark.parametrize("folder,checkpoint", CHECKPOINTS)
def test_every_checkpoint_of_nvidias_exports_bit_for_bit_with_the_stored_logits(folder, checkpoint, tmp_path):
    output = export(fixture(folder) / checkpoint, tmp_path)
    assert same_tensors(output, fixture(folder) / "hf")
    source, config = read_json(fixture(folder) / "hf" / "config.json"), read_json(output / "config.json")
    for name in set(source) - LOST.get((folder, checkpoint), set()) - NEVER_KEPT - {"rope_parameters", "dtype",
                                                                                    "transformers_version"}:
        assert config[name] == source[name], name
    if "tie_word_embeddings" in source:
        assert config["tie_word_embeddings"] == source["tie_word_embeddings"]
    ids, logits = reference(folder)
    assert np.abs(transformers_logits(output, ids) - logits).max() < 1e-4


@pytest.mark.parametrize("container", ["nemo2", "bridge", "nemo1"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_round_trip_gives_back_every_file_of_the_source(folder, container, tmp_path):
    """Weights, config.json, generation_config.json and the tokenizer's files, byte for byte."""
    hf = fixture(folder) / "hf"
    family = FAMILIES[read_json(hf / "config.json")["model_type"]]
    target = tmp_path / ("model.nemo" if container == "nemo1" else "model")
    if (family.name, container) in WHY_NOT:
        with pytest.raises(UserError, match=f"{family.name} can't be written as {container}: .*; use --format"):
            import_hf(hf, target, container)
        return
    if (folder, container) == ("llama32_rope_tied_bf16", "nemo1"):     # factor 32, and NeMo 1 has 8 in its code
        with pytest.raises(UserError, match="NeMo 1 fixes rope scaling"):
            import_hf(hf, target, container)
        return
    import_hf(hf, target, container)
    output = export(target, tmp_path)
    assert same_tensors(output, hf)
    assert {p.name for p in output.iterdir()} == {p.name for p in hf.iterdir()}
    for path in hf.iterdir():
        assert path.name == "model.safetensors" or filecmp.cmp(path, output / path.name, shallow=False), path.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_checkpoint_of_ours_without_the_sources_config_computes_the_same(folder, tmp_path):
    """hf_config.json only restores what no container can say: without it the tensors and logits are the same."""
    hf = fixture(folder) / "hf"
    name = read_json(hf / "config.json")["model_type"]
    container = next(c for c in ("nemo2", "bridge", "nemo1") if (name, c) not in WHY_NOT)
    target = tmp_path / ("model.nemo" if container == "nemo1" else "model")
    import_hf(hf, target, container)
    if container == "nemo1":
        shutil.unpack_archive(target, tmp_path / "unpacked", "tar")
        target = tmp_path / "unpacked"
    for path in target.rglob("hf_config.json"):
        path.unlink()
    output = export(target, tmp_path)
    assert same_tensors(output, hf)
    ids, logits = reference(folder)
    assert np.abs(transformers_logits(output, ids) - logits).max() < 1e-4


# mlx-lm has no Falcon, and its NeoX takes the FFN for 4 x hidden, which the fixture's isn't
@pytest.mark.parametrize("folder", [f for f in FOLDERS if f not in ("falcon_new_arch", "gptneox_sequential")])
def test_an_exported_model_runs_in_mlx_lm(folder, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    checkpoint = next(c for f, c in CHECKPOINTS if f == folder)
    output = export(fixture(folder) / checkpoint, tmp_path)
    model, _ = load_model(output)
    ids, logits = reference(folder)
    if folder == "mistral_swa":                 # mlx-lm's Mistral has no window: equal within its 8 keys
        ids, logits = ids[:, :8], logits[:, :8]
    model.set_dtype(mx.float32)
    ours = np.array(model(mx.array(ids)).astype(mx.float32))
    assert np.abs(ours - logits).max() < 1e-3


@pytest.mark.parametrize("container", ["nemo2", "bridge", "nemo1"])
def test_dtype_converts_and_nothing_else_does(container, tmp_path):
    hf = fixture("llama_nemo1") / "hf"
    target = tmp_path / ("m.nemo" if container == "nemo1" else "m")
    import_hf(hf, target, container, dtype="bfloat16")
    output = export(target, tmp_path)
    source, ours = tensors_of(hf), tensors_of(output)
    assert all(torch.equal(ours[n], source[n].to(torch.bfloat16)) for n in source)
    assert read_json(output / "config.json")["torch_dtype"] == "bfloat16"


def test_an_override_replaces_the_configuration_and_the_tensors_must_agree(tmp_path):
    hf = fixture("llama3_gqa") / "hf"
    import_hf(hf, tmp_path / "a", overrides={"rotary_base": 10000.0, "seq_length": 4096})
    config = read_json(export(tmp_path / "a", tmp_path) / "config.json")
    assert (config["rope_theta"], config["max_position_embeddings"]) == (10000.0, 4096)
    for overrides, message in (({"num_layers": 1}, "more|has .* tensors"), ({"num_layers": 3}, "has no tensor "
                                                                                               "model.layers.2"),
                               ({"hidden_size": 32}, "has shape"), ({"ffn_hidden_size": 64}, "has shape"),
                               ({"num_layer": 2}, "did you mean 'num_layers'"), ({"num_layers": "two"},
                                                                                 "must be like")):
        with pytest.raises(UserError, match=message):
            import_hf(hf, tmp_path / "b", overrides=overrides)
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".*"))


def test_a_source_in_shards_and_one_in_torchs_own_format_convert_the_same(tmp_path):
    from safetensors.torch import save_file
    hf, tensors = fixture("llama3_gqa") / "hf", tensors_of(fixture("llama3_gqa") / "hf")
    sharded, pickled = tmp_path / "sharded", tmp_path / "pickled"
    for directory in (sharded, pickled):
        shutil.copytree(hf, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, sharded / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    # a view with gaps
    tensors["model.norm.weight"] = torch.stack([tensors["model.norm.weight"]] * 2, 1)[:, 0]
    torch.save(tensors, pickled / "pytorch_model.bin")
    for directory in (sharded, pickled):
        import_hf(directory, tmp_path / f"{directory.name}-nemo")
        export_hf(tmp_path / f"{directory.name}-nemo", tmp_path / f"{directory.name}-back")
        assert same_tensors(tmp_path / f"{directory.name}-back", hf)


def test_a_large_export_is_written_in_shards_with_an_index(tmp_path, monkeypatch):
    from mlx_grpo import nemo_hf
    monkeypatch.setattr(nemo_hf.HFWriter.__init__, "__defaults__", (100_000,))
    output = export(fixture("llama3_gqa") / "nemo2", tmp_path)
    shards = sorted(p.name for p in output.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert set(read_json(output / "model.safetensors.index.json")["weight_map"]) == set(tensors_of(output))
    assert same_tensors(output, fixture("llama3_gqa") / "hf")
    ids, logits = reference("llama3_gqa")
    assert np.abs(transformers_logits(output, ids) - logits).max() < 1e-4


def test_large_checkpoints_are_spread_over_files(tmp_path, monkeypatch):
    from mlx_grpo import nemo_dist
    monkeypatch.setattr(nemo_dist.DistWriter.__init__, "__defaults__", (50_000,))
    import_hf(fixture("llama3_gqa") / "hf", tmp_path / "a")
    assert len(list((tmp_path / "a" / "weights").glob("__0_*.distcp"))) > 4
    assert same_tensors(export(tmp_path / "a", tmp_path), fixture("llama3_gqa") / "hf")


def test_a_tied_head_stored_beside_its_embedding_is_dropped_only_if_equal(tmp_path):
    from safetensors.torch import save_file
    hf, other = fixture("llama32_rope_tied_bf16") / "hf", tmp_path / "hf"
    shutil.copytree(hf, other)
    tensors = tensors_of(hf)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, other / "model.safetensors")
    report = import_hf(other, tmp_path / "a")
    assert report["left_out"] == ["lm_head.weight (equal to the tied embedding)"]
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        import_hf(other, tmp_path / "b")


def test_a_config_that_says_otherwise_than_the_checkpoint_loses(tmp_path):
    """hf_config.json is of the source: where the checkpoint was changed since, the checkpoint's value is taken, and
    that is said."""
    import_hf(fixture("llama3_gqa") / "hf", tmp_path / "a")
    path = tmp_path / "a" / "context" / "model.yaml"
    path.write_text(path.read_text().replace("seq_length: 256", "seq_length: 512"))
    report = export_hf(tmp_path / "a", tmp_path / "b")
    config = read_json(tmp_path / "b" / "config.json")
    assert config["max_position_embeddings"] == 512 and config["eos_token_id"] == 1 and config["pretraining_tp"] == 1
    assert any("seq_length" in note for note in report["notes"])


def test_the_tokenizer_of_an_archive_without_one_comes_from_a_directory(tmp_path):
    report = export_hf(fixture("llama_nemo1") / "nemo1_dist.nemo", tmp_path / "a")
    assert not (tmp_path / "a" / "tokenizer.json").exists() and "--tokenizer" in report["notes"][-1]
    export_hf(fixture("llama_nemo1") / "nemo1_dist.nemo", tmp_path / "b", tokenizer=fixture("llama_nemo1") / "hf")
    assert filecmp.cmp(tmp_path / "b" / "tokenizer.json", fixture("llama_nemo1") / "hf" / "tokenizer.json",
                       shallow=False)
