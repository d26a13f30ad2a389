"""Sizes and storage forms that the fixtures don't have: random models, one layer, the forms of other writers, old
Falcon."""

import json

import numpy as np
import pytest
from conftest import require
from nemo_fixtures import fixture, same_tensors, tensors_of, transformers_logits

from mlx_grpo import UserError, nemo_families, nemo_resolve
from mlx_grpo.nemo_convert import export_hf, import_hf
from mlx_grpo.nemo_dist import DistStore, DistWriter
from mlx_grpo.nemo_families import FAMILIES, WHY_NOT
from mlx_grpo.nemo_files import Folder
from mlx_grpo.nemo_job import Job
from mlx_grpo.nemo_read import open_checkpoint
from mlx_grpo.nemo_layout import qkv_merge, qkv_split

torch = require("torch")
transformers = require("transformers")
yaml = require("yaml")

BASE = dict(vocab_size=101, hidden_size=36, intermediate_size=28, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=64)
MODELS = {   # sizes that no fixture has: 1 < G < H, V no multiple of anything, one layer, tied and not
    "llama": ("llama", BASE | dict(head_dim=10)), "llama one layer, tied": ("llama", BASE |
                                                                            dict(num_hidden_layers=1,
                                                                                 tie_word_embeddings=True)),
    "llama, linear rope": ("llama", BASE | dict(rope_parameters=dict(rope_type="linear", rope_theta=5000.0,
                                                                     factor=3.0))),
    "llama 3.1": ("llama", BASE | dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0,
                                                            low_freq_factor=1.0,
                                                           high_freq_factor=4.0,
                                                           original_max_position_embeddings=8192))),
    "mistral": ("mistral", BASE | dict(head_dim=14, sliding_window=5)),
    "mistral without window": ("mistral", BASE | dict(sliding_window=None)),
    "mixtral": ("mixtral", BASE | dict(num_local_experts=3, num_experts_per_tok=2)),
    "qwen2 tied": ("qwen2", BASE | dict(tie_word_embeddings=True)), "qwen3": ("qwen3", BASE | dict(head_dim=22)),
    "gemma": ("gemma", BASE | dict(head_dim=18)), "phi3 grouped": ("phi3", BASE |
                                                                   dict(pad_token_id=0, sliding_window=6)),
    "falcon new": ("falcon", dict(vocab_size=101, hidden_size=36, num_hidden_layers=2, num_attention_heads=6,
                                  num_kv_heads=2,
                                  new_decoder_architecture=True, alibi=False, ffn_hidden_size=52)),
    "falcon new, tied": ("falcon", dict(vocab_size=101, hidden_size=36, num_hidden_layers=1, num_attention_heads=6,
                                        num_kv_heads=3,
                                        new_decoder_architecture=True, alibi=False, tie_word_embeddings=True)),
    "falcon old, multi-query": ("falcon", dict(vocab_size=101, hidden_size=36, num_hidden_layers=2,
                                               num_attention_heads=6, multi_query=True,
                                               parallel_attn=True, new_decoder_architecture=False, alibi=False)),
    "falcon old, biases, sequential": ("falcon", dict(vocab_size=101, hidden_size=36, num_hidden_layers=2,
                                                      num_attention_heads=6, bias=True,
                                                      multi_query=False, parallel_attn=False,
                                                      new_decoder_architecture=False, alibi=False)),
    "gpt_neox": ("gpt_neox", dict(vocab_size=101, hidden_size=36, intermediate_size=28, num_hidden_layers=3,
                                  num_attention_heads=6,
                                  use_parallel_residual=False, hidden_act="gelu")),
}


def make_model(name, directory):
    kind, settings = MODELS[name]
    torch.manual_seed(len(name))
    config = transformers.CONFIG_MAPPING[kind](**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name,container", [(name, container) for name, (kind, _) in MODELS.items()
                                            for container in ("nemo2", "bridge", "nemo1")
                                            if (kind, container) not in WHY_NOT])
def test_models_of_other_sizes_come_back_bit_for_bit_and_compute_the_same(name, container, tmp_path):
    kind = MODELS[name][0]
    hf = make_model(name, tmp_path / "hf")
    target = tmp_path / ("m.nemo" if container == "nemo1" else "m")
    import_hf(hf, target, container)
    checkpoint = open_checkpoint(target)
    checkpoint.hf_config = None                               # the container's own words must do
    export_hf(target, tmp_path / "back")
    assert same_tensors(tmp_path / "back", hf)
    _, spec, config, _ = nemo_resolve.resolve(checkpoint)
    (tmp_path / "back" / "config.json").write_text(json.dumps(config))
    ids = np.random.default_rng(0).integers(0, 101, (2, 12))
    assert np.array_equal(transformers_logits(tmp_path / "back", ids), transformers_logits(hf, ids))
    assert config["tie_word_embeddings"] == bool(MODELS[name][1].get("tie_word_embeddings",
                                                                     kind in ("gemma", "falcon")))


def test_the_query_groups_lie_as_nvidias_script_builds_them():
    """Independent of the reshapes: group by group, its query heads, its key head, its value head."""
    H, G, D = 6, 2, 5
    q, k, v = torch.randn(H * D, 7), torch.randn(G * D, 7), torch.randn(G * D, 7)
    rows = []
    for g in range(G):
        rows += [q[h * D:(h + 1) * D] for h in range(g * H // G, (g + 1) * H // G)]
        rows += [k[g * D:(g + 1) * D], v[g * D:(g + 1) * D]]
    merged = qkv_merge(q, k, v, H, G, D)
    assert torch.equal(merged, torch.cat(rows))
    assert all(torch.equal(a, b) for a, b in zip(qkv_split(merged, H, G, D), (q, k, v)))
    bias = torch.randn(H * D), torch.randn(G * D), torch.randn(G * D)
    assert all(torch.equal(a, b) for a, b in zip(qkv_split(qkv_merge(*bias, H, G, D), H, G, D), bias))


# ---- other writers' forms of the same model ----

def rewrite(folder, target, rename):
    """Save a fixture's nemo2 checkpoint again with tensors from rename(key, tensor) -> {key: tensor}."""
    source = fixture(folder) / "nemo2"
    import shutil
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("weights"))
    store, job = DistStore(Folder(source / "weights")), Job(target, None, [])
    job.flush = lambda: None
    writer = DistWriter(job, target / "weights", 10**6)
    for key in store.tensors:
        for name, tensor in rename(key, store.read(key)).items():
            writer.put(name, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape), tensor.dtype,
                       lambda tensor=tensor: tensor)
    writer.finish({})
    job.close()
    return target


def per_layer(key, tensor):
    if ".layers." not in key:
        return {key: tensor}
    return {key.replace(".layers.", f".layers.{i}."): part for i, part in enumerate(tensor)}


def halves(key, tensor):
    if not key.endswith("linear_fc1.weight"):
        return {key: tensor}
    gate, up = tensor.chunk(2, dim=-2)
    return {f"{key}_w": gate, f"{key}_v": up}


def experts_apart(key, tensor):
    """singleton_local_shards: each expert of each layer under its own name, halves apart."""
    out = {}
    for name, part in per_layer(key, tensor).items():
        if ".experts.experts." in name:
            for e, expert in enumerate(part):
                out |= halves(name.replace(".experts.experts.", f".experts.experts.{e}."), expert)
        else:
            out |= halves(name, part)
    return out


@pytest.mark.parametrize("folder,rename", [
    ("llama3_gqa", per_layer), ("llama3_gqa", halves), ("qwen2_bias", per_layer), ("mixtral_moe4", per_layer),
    ("mixtral_moe4", halves),
    ("mixtral_moe4", experts_apart), ("gemma_mqa", lambda key, tensor: {key: tensor})])
def test_other_ways_to_store_the_same_tensors_are_read(folder, rename, tmp_path):
    path = rewrite(folder, tmp_path / "m", rename)
    export_hf(path, tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", fixture(folder) / "hf")


@pytest.mark.parametrize("prefix", ["model.", "model.module."])
def test_a_nemo1_directory_with_one_pickle_and_experts_by_name(prefix, tmp_path):
    """The unstacked state dict of a Mixtral, as NeMo 1's script saves it: local_experts, layer by layer."""
    source = DistStore(Folder(fixture("mixtral_moe4") / "nemo2" / "weights"))
    state = {}
    for key in source.tensors:
        for name, part in per_layer(key, source.read(key)).items():
            name = prefix + name.removeprefix("module.")
            if ".experts.experts." in name:
                state |= {name.replace("experts.experts.", f"experts.local_experts.{e}."): expert for e,
                          expert in enumerate(part)}
            else:
                state[name] = part[:320] if part.shape[0] == 384 else part
    state[f"{prefix}output_layer._extra_state"] = None
    import_hf(fixture("mixtral_moe4") / "hf", tmp_path / "m.nemo", "nemo1")
    import tarfile
    with tarfile.open(tmp_path / "m.nemo") as archive:
        archive.extractall(tmp_path / "m", filter="data")
    import shutil
    shutil.rmtree(tmp_path / "m" / "model_weights")
    torch.save(state, tmp_path / "m" / "model_weights.ckpt")
    export_hf(tmp_path / "m", tmp_path / "hf")
    assert same_tensors(tmp_path / "hf", fixture("mixtral_moe4") / "hf")


def test_gemma_from_nemo1_loses_the_one_that_its_script_adds(tmp_path, monkeypatch):
    monkeypatch.setattr(nemo_families, "WHY_NOT", {})
    hf, plus_one = tmp_path / "hf", tmp_path / "plus"
    from safetensors.torch import save_file
    import shutil
    shutil.copytree(fixture("gemma_mqa") / "hf", hf)
    tensors = {n: torch.randn_like(t).mul(0.5).to(torch.bfloat16).float() if "norm" in n else t for n,
               t in tensors_of(hf).items()}
    save_file(tensors, hf / "model.safetensors")
    shutil.copytree(hf, plus_one)
    save_file({n: t + 1 if "norm" in n else t for n, t in tensors.items()}, plus_one / "model.safetensors")
    import_hf(plus_one, tmp_path / "m.nemo", "nemo1")
    shutil.unpack_archive(tmp_path / "m.nemo", tmp_path / "m", "tar")
    config = yaml.safe_load((tmp_path / "m" / "model_config.yaml").read_text()) | {"activation": "geglu"}
    (tmp_path / "m" / "model_config.yaml").write_text(yaml.safe_dump(config))
    report = export_hf(tmp_path / "m", tmp_path / "back")
    assert same_tensors(tmp_path / "back", hf) and any("weight + 1" in note for note in report["notes"])


def test_windows_mean_what_their_writer_meant(tmp_path):
    """[W, 0] in NeMo 2 and Bridge 0.3, [W - 1, 0] in newer Bridge: the mistral fixture's 8 in each."""
    import_hf(fixture("mistral_swa") / "hf", tmp_path / "m", "bridge")
    path = tmp_path / "m" / "iter_0000000" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["model"]["window_size"] == [8, 0] and open_checkpoint(tmp_path / "m").spec["sliding_window"] == 8
    del config["model"]["async_tensor_model_parallel_allreduce"]
    config["model"]["window_size"] = [7, 0]
    path.write_text(yaml.safe_dump(config))
    assert open_checkpoint(tmp_path / "m").spec["sliding_window"] == 8


def test_padding_rows_go_if_they_are_zero_and_stay_if_they_may_be_used(tmp_path):
    def used(key, tensor):
        tensor = tensor.clone()
        if tensor.shape[0] == 384:
            tensor[350] = 1
        return {key: tensor}
    path = rewrite("mixtral_moe4", tmp_path / "m", used)
    report = export_hf(path, tmp_path / "hf")
    assert tensors_of(tmp_path / "hf")["lm_head.weight"].shape[0] == 384 and any("may be used" in note
                                                                                 for note in report["notes"])
    report = export_hf(path, tmp_path / "cut", overrides={"vocab_size": 320})
    assert tensors_of(tmp_path / "cut")["lm_head.weight"].shape[0] == 320 and any("not zero" in note
                                                                                  for note in report["notes"])
    with pytest.raises(UserError, match="has only 384 rows"):
        export_hf(path, tmp_path / "more", overrides={"vocab_size": 500})


def test_a_nemo2_directory_without_model_yaml_is_read_from_io_json(tmp_path):
    import shutil
    for folder in ("llama3_gqa", "llama32_rope_tied_bf16", "mixtral_moe4", "mistral_swa", "qwen2_bias", "qwen3_qknorm",
                   "gemma_mqa", "phi3_fused"):
        path = tmp_path / folder
        shutil.copytree(fixture(folder) / "nemo2", path)
        expected = open_checkpoint(path).spec
        (path / "context" / "model.yaml").unlink()
        assert open_checkpoint(path).spec == expected, folder
        export_hf(path, tmp_path / f"{folder}-hf")
        assert same_tensors(tmp_path / f"{folder}-hf", fixture(folder) / "hf")


@pytest.mark.parametrize("name,expected", [
    ("qwen2.Qwen2Config", {"layernorm_epsilon": 1e-6, "rotary_base": 1e6}),
    ("mixtral.MixtralConfig8x7B", {"rotary_base": 1e6}), ("mistral.MistralConfig7B", {"sliding_window": 4096}),
    ("gemma.GemmaConfig7B", {"kv_channels": 256, "seq_length": 8192}),
    ("llama.Llama31Config8B", {"rope": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}})])
def test_an_argument_that_io_json_leaves_out_is_its_class_default(name, expected):
    from mlx_grpo.nemo_config_in import from_megatron
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4}
    _, spec = from_megatron({"_target_": f"nemo.collections.llm.gpt.model.{name}"} | sizes, "nemo2")
    assert expected.items() <= spec.items()


def test_every_family_says_all_it_needs():
    """A table with a row twice, a name twice or an unknown letter would lose tensors."""
    for family in FAMILIES.values():
        rows = [*family.outer, *family.layer]
        assert len({row[0] for row in rows}) == len(rows), family.name
        names = [n for row in rows for n in ((row[1],) if isinstance(row[1], str) else row[1])]
        assert len(set(names)) == len(names)
        assert set("".join(row[3] for row in rows)) <= set("VCAQDIFE ")
