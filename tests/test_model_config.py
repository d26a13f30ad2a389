"""utils/model_config.py and utils/checked_load.py against transformers: the same weights, the same logits."""

import copy
import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from conftest import require
from mlx.utils import tree_flatten
from tiny_hf import FAMILIES, edit_json, mlx_logits, random_tokens, save_tiny, torch_logits

from mlx_grpo import UserError
from mlx_grpo.checked_load import check_safetensors, load_checked
from mlx_grpo.model_config import config_notes, normalize_config, supported_architectures, unsupported_reason


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    torch_model = save_tiny(tmp_path, family)
    model, _, report = load_checked(tmp_path)
    tokens = random_tokens()
    difference = np.abs(mlx_logits(model, tokens) - torch_logits(torch_model, tokens)).max()
    assert difference < 1e-4, f"{family}: {difference}"
    assert not report.missing and not report.unexpected
    assert type(model).__module__.startswith("mlx_lm.models.")       # the checks leave no trace on the model


def test_without_normalisation_a_llama_of_transformers_5_is_wrong(tmp_path):
    """mlx_lm.load takes rope_theta 10000 where the config has 30000 and llama3 scaling, without a word."""
    from mlx_lm.utils import load_model
    torch_model = save_tiny(tmp_path, "llama3")
    tokens = random_tokens()
    plain = load_model(tmp_path)[0]
    assert np.abs(mlx_logits(plain, tokens) - torch_logits(torch_model, tokens)).max() > 1e-2


def test_the_config_given_is_left_alone_and_normalising_twice_changes_nothing(tmp_path):
    for family in FAMILIES:
        save_tiny(tmp_path / family, family)
        config = json.loads((tmp_path / family / "config.json").read_text())
        before = copy.deepcopy(config)
        once = normalize_config(config)
        assert config == before
        assert normalize_config(once) == once


def test_every_shared_architecture_reads_the_theta_of_transformers_5():
    """For each model type that transformers and mlx-lm both know and that mlx-lm can build from a saved config, the
    argument class ends up with the theta that was saved."""
    transformers = require("transformers")
    from mlx_lm.utils import _get_classes
    checked = 0
    for kind in sorted(set(supported_architectures()) & set(transformers.CONFIG_MAPPING)):
        config = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string())
        settings = config.get("rope_parameters")
        if not settings or "rope_theta" not in settings or unsupported_reason(config):
            continue
        settings["rope_theta"] = 12345.0
        config.pop("rope_theta", None)
        arguments = _get_classes(config)[1].from_dict(normalize_config(config))
        values = vars(arguments)
        found = {values[name] for name in ("rope_theta", "rotary_emb_base") if values.get(name) is not None}
        if found:
            assert found == {12345.0}, kind
            checked += 1
    assert checked > 40


def test_an_old_style_config_is_already_normal():
    config = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert normalize_config(config)["rope_theta"] == 500000.0
    assert normalize_config(config)["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", "factor": 8.0}
    assert normalize_config({"model_type": "llama", "rope_theta": 7.0})["rope_theta"] == 7.0


def test_the_text_part_of_a_multimodal_config_is_mended_too():
    rope = {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [2, 1, 1]}
    config = {"model_type": "qwen2_vl", "tie_word_embeddings": False,
              "text_config": {"model_type": "qwen2_vl_text", "rope_parameters": rope}}
    mended = normalize_config(config)["text_config"]
    assert (mended["rope_theta"], mended["rope_scaling"], mended["tie_word_embeddings"]) == (5.0, None, False)


def test_an_unknown_architecture_comes_back_unchanged():
    assert normalize_config({"model_type": "nobody", "rope_parameters": {"rope_theta": 1.0}}) == \
        {"model_type": "nobody", "rope_parameters": {"rope_theta": 1.0}}


@pytest.mark.parametrize("config, says", [
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "bert is encoder-only"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
    ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "Classification is a classifier"),
    ({"model_type": "qwen9"}, "the nearest it has: qwen"),
    ({"peft_type": "LORA"}, "no model_type"),
    ({"model_type": "llama"}, "lacks hidden_size"),
])
def test_what_mlx_lm_cannot_run_is_named_with_the_nearest_choice(config, says):
    assert says in unsupported_reason(config)


def test_a_rope_scaling_that_the_architecture_ignores_is_refused(tmp_path):
    """mlx-lm's Mixtral declares rope_scaling and never reads it; its Gemma 2 doesn't declare it."""
    for family in ("mixtral", "gemma2"):
        save_tiny(tmp_path / family, family, rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0))
        with pytest.raises(UserError, match="rope_scaling of type 'linear'.*doesn't apply"):
            load_checked(tmp_path / family)


def test_a_window_that_mlx_lm_does_not_apply_is_told(tmp_path):
    save_tiny(tmp_path, "mistral", sliding_window=64)
    assert "windows of 64 tokens" in config_notes(json.loads((tmp_path / "config.json").read_text()))[0]


# ---- weights ----

def rewrite(directory, change):
    """Pass a directory's weights through `change`."""
    path = directory / "model.safetensors"
    weights = change(dict(mx.load(str(path))))
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})


def test_a_gpt2_repack_with_other_names_and_extra_keys_loads_and_tells(tmp_path):
    """Some GPT-2 repacks carry attention masks and the "transformer." prefix, or lack the biases of their norms."""
    torch_model = save_tiny(tmp_path, "gpt2")
    with require("torch").no_grad():
        torch_model.transformer.h[0].ln_1.bias.zero_()
    rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if k != "transformer.h.0.ln_1.bias"}
            | {"transformer.h.0.attn.masked_bias": mx.array([-1e4])})
    model, _, report = load_checked(tmp_path)
    assert report.missing == ["model.h.0.ln_1.bias"]
    assert report.unexpected == ["model.h.0.attn.masked_bias"]
    assert "taken off" in report.renamed and len(report.lines()) == 3
    tokens = random_tokens()
    assert np.abs(mlx_logits(model, tokens) - torch_logits(torch_model, tokens)).max() < 1e-4


def test_a_model_saved_without_its_head_loads_where_the_head_is_tied(tmp_path):
    torch_model = save_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    rewrite(tmp_path, lambda w: {k.removeprefix("model."): v for k, v in w.items() if k != "lm_head.weight"})
    model, _, report = load_checked(tmp_path)
    assert report.renamed == "'model.' put in front"
    tokens = random_tokens()
    assert np.abs(mlx_logits(model, tokens) - torch_logits(torch_model, tokens)).max() < 1e-4


@pytest.mark.parametrize("lost, says", [
    ("model.layers.1.mlp.up_proj.weight", "would stay at random; the checkpoint is incomplete"),
    ("lm_head.weight", "set tie_word_embeddings to true"),
])
def test_a_missing_key_that_would_leave_a_layer_at_random_is_refused(lost, says, tmp_path):
    save_tiny(tmp_path, "qwen3")
    rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if k != lost})
    with pytest.raises(UserError, match=says):
        load_checked(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    save_tiny(tmp_path, "qwen3")
    edit_json(tmp_path / "config.json", intermediate_size=64)
    with pytest.raises(UserError, match=r"has shape \[32, 48\]"):
        load_checked(tmp_path)


def test_a_quantised_directory_loads_with_nothing_missing(tmp_path):
    from mlx_lm.utils import quantize_model, save_config, save_model
    save_tiny(tmp_path / "hf", "qwen3", hidden_size=64, intermediate_size=64)
    model, config, _ = load_checked(tmp_path / "hf")
    model, config = quantize_model(model, config, 32, 4)
    save_model(tmp_path / "q", model)
    save_config(config, tmp_path / "q" / "config.json")
    again, _, report = load_checked(tmp_path / "q")
    assert not report.lines()
    for (key, a), (_, b) in zip(tree_flatten(model.parameters()), tree_flatten(again.parameters()), strict=True):
        assert mx.array_equal(a, b), key


def test_the_end_tokens_are_those_of_the_generation_config(tmp_path):
    """Gemma 2's chat models name the end of a turn there only."""
    save_tiny(tmp_path, "gemma2")
    edit_json(tmp_path / "generation_config.json", eos_token_id=[1, 107])
    assert load_checked(tmp_path)[1]["eos_token_id"] == [1, 107]
    assert load_checked(tmp_path, changes={"eos_token_id": 5})[1]["eos_token_id"] == 5


@pytest.mark.parametrize("name, says", [("pytorch_model.bin", "only pytorch_model.bin"),
                                        ("notes.txt", "no weights; download again")])
def test_a_directory_without_safetensors_says_what_it_has(name, says, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=says):
        load_checked(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_tiny(tmp_path, "qwen3")
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors of 1 weight files is missing"):
        load_checked(tmp_path)


def safetensors(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize("content, says", [
    (b"abc", "not a whole safetensors"),
    (struct.pack("<Q", 1 << 60) + b"{}", "claims 1152921504606846976 bytes"),
    (safetensors(b"[1, 2"), "can't be read"),
    (safetensors(b"[" * 100000), "can't be read"),
    (safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"1234"), "doesn't fit its"),
    (safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}), "doesn't fit its bytes"),
    (safetensors({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "unknown dtype 'F99'"),
    (safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"), "the file has"),
    (safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                  "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "doesn't fit its bytes"),
    (safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12"), "the file has"),
])
def test_a_header_that_lies_is_refused_before_anything_is_read(content, says, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=says):
        check_safetensors(tmp_path / "x.safetensors")


def test_code_in_a_model_directory_does_not_run(tmp_path):
    save_tiny(tmp_path, "qwen3")
    (tmp_path / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_json(tmp_path / "config.json", model_file="model.py", auto_map={"AutoConfig": "model.X"})
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_checked(tmp_path)
    assert not (tmp_path / "ran").exists()
