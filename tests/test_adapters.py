"""Adapters between mlx-lm and PEFT, and fusing: the logits of PEFT in torch and of mlx-lm on the same tiny models."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ROOT, require
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_hf import edit_json, mlx_logits, random_tokens, save_tiny, save_tokenizer, torch_logits
from tiny_models import QUICK, sets, tiny_qwen2

from mlx_grpo import UserError, adapter_fuse
from mlx_grpo.adapter_files import reach
from mlx_grpo.adapter_fuse import NotEqual, fuse
from mlx_grpo.adapters import main
from mlx_grpo.checked_load import load_checked
from mlx_grpo.convert_model import convert
from mlx_grpo.convert_model import parse as convert_options
from mlx_grpo.model_check import in_float32
from mlx_grpo.model_check import mlx_logits as model_check_logits
from mlx_grpo.peft_config import is_target
from mlx_grpo.peft_files import targets_of

TOKENS = random_tokens(2, 24)
FAMILIES = ["llama3", "qwen2.5", "qwen3", "mistral", "phi3", "gemma2", "gemma3", "stablelm", "mixtral", "qwen3_moe"]
ATTENTION = ["self_attn.q_proj", "self_attn.o_proj"]
DENSE = {"phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
         "mixtral": ATTENTION, "qwen3_moe": ATTENTION}
ALL = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(directory, its torch model) of a tiny Llama with an untied head and 32-multiples everywhere, for quantising."""
    directory = tmp_path_factory.mktemp("base")
    model = save_tiny(directory, "llama3", intermediate_size=64)
    save_tokenizer(directory)
    return directory, model


def save_mlx(directory, base, kind="lora", keys=None, num_layers=2, rank=4, scale=3.0, dtype=mx.float32, size=0.1):
    """An adapter with random weights, made of mlx-lm's own layers and written the way its trainer does."""
    model = load_checked(base)[0]
    parameters = {"rank": rank, "scale": scale, "dropout": 0.05} | ({"keys": keys} if keys else {})
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    generator = np.random.default_rng(7)
    arrays = {name: a * mx.array(generator.uniform(0.5, 1.5, a.shape).astype(np.float32)) if name.endswith(".m") else
              mx.array(generator.normal(0, size, a.shape).astype(np.float32)).astype(dtype)
              for name, a in tree_flatten(model.trainable_parameters())}
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": kind, "model": str(base), "num_layers": num_layers, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def save_peft(directory, family, base=None, seed=0, **options):
    """(PEFT model in torch with random adapter weights, its base's directory, the directory save_pretrained wrote)."""
    torch, peft = require("torch"), require("peft")
    base = base or directory / "base"
    model = save_tiny(base, family) if not (base / "config.json").exists() else load_torch(base)
    options = dict(r=4, lora_alpha=6, task_type="CAUSAL_LM") | options
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(torch.rand_like(weight) + 0.5)
            elif "lora_" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(directory / "peft")
    return model.eval(), base, directory / "peft"


def load_torch(directory):
    torch, transformers = require("torch"), require("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def adapted_logits(base, adapter):
    model = mlx_lm.utils.load_adapters(load_checked(base)[0], str(adapter))
    model.eval()
    return mlx_logits(model, TOKENS)


def peft_logits(base, adapter, model=None):
    return torch_logits(require("peft").PeftModel.from_pretrained(model or load_torch(base), adapter).eval(), TOKENS)


def plain_logits(base):
    return mlx_logits(load_checked(base)[0], TOKENS)


def equal(ours, theirs):
    return np.abs(ours - theirs).max() <= 1e-4


def run(*arguments):
    return main([str(a) for a in arguments])


def peft_refusal(tmp_path, peft, match, base=None, **changes):
    """The UserError's text for a PEFT directory with `changes` in its configuration; nothing may be left."""
    edit_json(peft / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=match):
        run("from-peft", "--adapter", peft, "--output", tmp_path / "mlx", *(["--model", base] if base else []))
    assert not (tmp_path / "mlx").exists() and not list(tmp_path.glob(".mlx*"))


# ---- mlx-lm to PEFT --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlx_adapter_gives_the_same_logits_through_peft(tmp_path, family, kind):
    model = save_tiny(tmp_path / "base", family)
    keys = DENSE.get(family, ALL)
    save_mlx(tmp_path / "mlx", tmp_path / "base", kind, keys)
    run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    ours, plain = adapted_logits(tmp_path / "base", tmp_path / "mlx"), torch_logits(model, TOKENS)
    assert not equal(ours, plain)                       # the adapter does something
    assert equal(ours, peft_logits(tmp_path / "base", tmp_path / "peft", model))


@pytest.mark.parametrize("keys, num_layers, targets, layers", [
    (["self_attn.q_proj"], 3, ["q_proj"], None),
    (["self_attn.q_proj", "mlp.up_proj"], 2, ["q_proj", "up_proj"], [1, 2]),
    (["self_attn.q_proj"], 0, ["q_proj"], None),        # mlx-lm's slice [-0:] is every layer
    (None, -1, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"], None),
    (["lm_head", "self_attn.q_proj"], 1, ["lm_head", "model.layers.2.self_attn.q_proj"], None),
    (["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj"], 1,
     ["model.layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj"], None)])
def test_peft_targets_exactly_the_modules_that_mlx_lm_adapts(tmp_path, base, keys, num_layers, targets, layers):
    save_mlx(tmp_path / "mlx", base[0], keys=keys, num_layers=num_layers)
    run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["target_modules"], config["layers_to_transform"]) == (targets, layers)
    model = require("peft").PeftModel.from_pretrained(load_torch(base[0]), tmp_path / "peft")
    theirs = {n.split(".lora_A")[0].removeprefix(PREFIX) for n, _ in model.named_parameters() if ".lora_A" in n}
    stored = mx.load(str(tmp_path / "mlx/adapters.safetensors"))
    assert theirs == {n.removesuffix(".lora_a") for n in stored if n.endswith(".lora_a")}
    assert equal(adapted_logits(base[0], tmp_path / "mlx"), torch_logits(model.eval(), TOKENS))


def test_there_and_back_the_weights_are_the_same_bits(tmp_path, base):
    for kind in ("lora", "dora"):
        save_mlx(tmp_path / kind, base[0], kind, ALL, scale=0.3, dtype=mx.bfloat16)
        run("to-peft", "--adapter", tmp_path / kind, "--output", tmp_path / f"{kind}-peft")
        run("from-peft", "--adapter", tmp_path / f"{kind}-peft", "--output", tmp_path / f"{kind}-back")
        before, after = (mx.load(str(tmp_path / d / "adapters.safetensors")) for d in (kind, f"{kind}-back"))
        assert before.keys() == after.keys()
        assert all(before[k].dtype == after[k].dtype and mx.array_equal(before[k], after[k]) for k in before)
        config = json.loads((tmp_path / f"{kind}-back/adapter_config.json").read_text())
        assert config["fine_tune_type"] == kind and config["num_layers"] == 2 and config["model"] == str(base[0])
        parameters = config["lora_parameters"]
        assert parameters["scale"] == pytest.approx(0.3, rel=1e-12) and parameters["rank"] == 4
        assert parameters["dropout"] == 0.05 and sorted(parameters["keys"]) == sorted(ALL)


def test_selected_modules_without_weights_are_told_and_left_out(tmp_path, base, capsys):
    """Adapters of older mlx-lm: q and v trained, no keys configured; today's default is every linear layer."""
    save_mlx(tmp_path / "mlx", base[0], keys=["self_attn.q_proj", "self_attn.v_proj"])
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    del config["lora_parameters"]["keys"]
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps(config))
    run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    assert "10 modules" in capsys.readouterr().out      # 2 layers of k, o, gate, up, down
    assert equal(adapted_logits(base[0], tmp_path / "mlx"), peft_logits(base[0], tmp_path / "peft"))


def test_what_peft_cant_hold_is_refused_by_name(tmp_path, base):
    def refused(directory, match, **options):
        save_mlx(tmp_path / directory, options.pop("base", base[0]), **options)
        with pytest.raises(UserError, match=match):
            run("to-peft", "--adapter", tmp_path / directory, "--output", tmp_path / "peft")
        assert not (tmp_path / "peft").exists()

    save_tiny(tmp_path / "moe", "qwen3_moe")
    save_tiny(tmp_path / "gpt2", "gpt2")
    moe = tmp_path / "moe"
    refused("experts", r"switch_mlp\.up_proj is a LoRASwitchLinear", base=moe, keys=["mlp.switch_mlp.up_proj"])
    refused("router", r"mlp\.gate: it isn't known to be the same module", base=moe, keys=["mlp.gate"])
    refused("embedding", r"model\.embed_tokens is a LoRAEmbedding", keys=["model.embed_tokens"])
    refused("conv1d", "model_type 'gpt2'", base=tmp_path / "gpt2", keys=["attn.c_attn"])


@pytest.mark.parametrize("change, match", [
    (dict(fine_tune_type="full"), "holds whole weights"),
    (dict(fine_tune_type="ia3"), "fine_tune_type 'ia3'"),
    (dict(num_layers=None), "num_layers must be"),
    (dict(lora_parameters=...), "lora_parameters .* is missing"),
    (dict(lora_parameters=dict(rank=4, alpha=8, dropout=0)), "'alpha', which mlx-lm ignores"),
    (dict(lora_parameters=dict(rank=4, dropout=0)), "scale must be a number, got None"),
    (dict(lora_parameters=dict(rank=8, scale=3.0, dropout=0, keys=["self_attn.q_proj"])), "doesn't fit this base"),
    (dict(lora_parameters=dict(rank=4, scale=3.0, dropout=0, keys=["mlp.up_proj"])), "doesn't fit this base model"),
    (dict(lora_parameters=dict(rank=4, scale=3.0, dropout=0, keys="q_proj")), "keys must be a list"),
    (dict(model=...), "names no base model")])
def test_a_wrong_mlx_configuration_is_refused(tmp_path, base, change, match):
    save_mlx(tmp_path / "mlx", base[0], keys=["self_attn.q_proj"])
    edit_json(tmp_path / "mlx/adapter_config.json", **change)
    with pytest.raises(UserError, match=match):
        run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_half_adapted_module_and_a_damaged_file_are_refused(tmp_path, base):
    save_mlx(tmp_path / "mlx", base[0], keys=["self_attn.q_proj"])
    file = tmp_path / "mlx/adapters.safetensors"
    arrays = dict(mx.load(str(file)))
    del arrays["model.layers.2.self_attn.q_proj.lora_b"]
    mx.save_safetensors(str(file), arrays)
    with pytest.raises(UserError, match="model.layers.2.self_attn.q_proj has no lora_b"):
        run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="download it again|damaged"):
        run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")


def test_the_original_of_a_converted_base_is_named_to_peft(tmp_path, base, capsys):
    quantise = ["--hf-path", str(base[0]), "-q", "--group-size", "32", "--output-dir", str(tmp_path / "q")]
    convert(convert_options(quantise))
    save_mlx(tmp_path / "mlx", tmp_path / "q", "lora", ALL)
    run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == str(base[0])
    assert "trained on 4-bit weights" in capsys.readouterr().out
    ours, theirs = adapted_logits(base[0], tmp_path / "mlx"), peft_logits(base[0], tmp_path / "peft")
    assert equal(ours, theirs)                          # both on the float base


# ---- PEFT to mlx-lm --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_adapter_gives_the_same_logits_through_mlx_lm(tmp_path, family, use_dora):
    targets = [key.split(".")[-1] for key in DENSE.get(family, ALL)]
    model, base, peft = save_peft(tmp_path, family, target_modules=targets, use_dora=use_dora)
    run("from-peft", "--adapter", peft, "--model", base, "--output", tmp_path / "mlx")
    ours = adapted_logits(base, tmp_path / "mlx")
    assert not equal(ours, plain_logits(base))
    assert equal(ours, torch_logits(model, TOKENS))


@pytest.mark.parametrize("options", [
    dict(target_modules="all-linear"),
    dict(target_modules=r"model\.layers\.[02]\..*(q|down)_proj"),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=1, layers_pattern="layers"),
    dict(target_modules=["q_proj", "lm_head"]),
    dict(target_modules="all-linear", exclude_modules=["k_proj", "model.layers.0.mlp.up_proj"]),
    dict(target_modules=["q_proj", "up_proj"], use_rslora=True),
    dict(target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 7, r"0.*q_proj": 2}),
    dict(target_modules=["q_proj", "up_proj", "k_proj"],
         alpha_pattern={"up_proj": 11, "^model.layers.1.self_attn.k_proj": 2}),
    dict(target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3}, alpha_pattern={"q_proj": 0.7},
         use_rslora=True),
    dict(target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3}, alpha_pattern={"q_proj": 0.7},
         use_dora=True),
    dict(target_modules=["q_proj"], lora_alpha=0),
    dict(target_modules=["q_proj"], init_lora_weights="gaussian", lora_dropout=0.2)])
def test_every_way_to_say_which_modules_and_how_strongly(tmp_path, base, options):
    model, _, peft = save_peft(tmp_path, "llama3", base[0], **options)
    run("from-peft", "--adapter", peft, "--output", tmp_path / "mlx")       # the base as PEFT names it
    assert equal(adapted_logits(base[0], tmp_path / "mlx"), torch_logits(model, TOKENS))
    parameters = json.loads((tmp_path / "mlx/adapter_config.json").read_text())["lora_parameters"]
    assert parameters["dropout"] == options.get("lora_dropout", 0.0)


def test_a_pickled_adapter_is_read_without_running_it(tmp_path, base):
    torch = require("torch")
    model, _, peft = save_peft(tmp_path, "llama3", base[0], target_modules=["q_proj"])
    from safetensors.torch import load_file
    tensors = load_file(peft / "adapter_model.safetensors")
    (peft / "adapter_model.safetensors").unlink()
    torch.save({name: t.to(torch.bfloat16) for name, t in tensors.items()}, peft / "adapter_model.bin")
    run("from-peft", "--adapter", peft, "--output", tmp_path / "mlx")
    ours = mx.load(str(tmp_path / "mlx/adapters.safetensors"))
    name = "model.layers.0.self_attn.q_proj"
    assert ours[f"{name}.lora_a"].dtype == mx.bfloat16
    theirs = tensors[f"{PREFIX}{name}.lora_A.weight"].to(torch.bfloat16).float().numpy().T
    assert np.array_equal(np.array(ours[f"{name}.lora_a"].astype(mx.float32)), theirs)

    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")
    torch.save({"x": Payload()}, peft / "adapter_model.bin")
    with pytest.raises(UserError, match="not a plain file of tensors"):
        run("from-peft", "--adapter", peft, "--output", tmp_path / "other")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("change, match", [
    (dict(modules_to_save=["lm_head"]), "modules_to_save .*whole layers"),
    (dict(bias="lora_only"), 'bias is "lora_only"'),
    (dict(lora_bias=True), "lora_bias"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out is true"),
    (dict(target_parameters=["mlp.experts.gate_up_proj"]), "target_parameters .*experts"),
    (dict(layer_replication=[[0, 2]]), "layer_replication"),
    (dict(trainable_token_indices=[1]), "trainable_token_indices"),
    (dict(init_lora_weights="pissa"), "init_lora_weights .*changed the base"),
    (dict(use_qalora=True), "use_qalora"),
    (dict(an_option_of_tomorrow=3), "an_option_of_tomorrow is 3"),
    (dict(peft_type="LOHA"), "peft_type 'LOHA'"),
    (dict(task_type="SEQ_CLS"), "SEQ_CLS"),
    (dict(r="4"), "r must be a whole number"),
    (dict(target_modules=5), "target_modules must be a name or names"),
    (dict(target_modules="(q_proj"), "isn't a regular expression"),
    (dict(target_modules=["k_proj"]), "for model.layers.0.self_attn.q_proj, which its target_modules leave out"),
    (dict(target_modules=["q_proj", "k_proj"]), "targets model.layers.0.self_attn.k_proj and has no weights"),
    (dict(rank_pattern={"q_proj": 5}), "rank 4 in the weights and 5"),
    (dict(use_dora=True), "where dora .* needs lora_a, lora_b, m")])
def test_what_mlx_lm_cant_hold_is_refused_by_name(tmp_path, base, change, match):
    peft = save_peft(tmp_path, "llama3", base[0], target_modules=["q_proj"])[2]
    peft_refusal(tmp_path, peft, match, **change)


@pytest.mark.parametrize("rename, match", [
    (lambda n: n.replace("layers.0", "layers.9"), "layers.9.* no linear layer"),
    (lambda n: n.replace("lora_A.weight", "lora_A.default.weight"), "lora_A.default.weight"),
    (lambda n: n.replace("q_proj.lora_A.weight", "q_proj.base_layer.weight"), "base_layer.* whole weights, other than"),
    (lambda n: n.replace("lora_A.weight", "lora_embedding_A"), "tied head"),
    (lambda n: n.removeprefix(PREFIX), "can't be brought over"),
    (lambda n: n.replace("q_proj", "k_proj"), "k_proj.lora_b has shape")])
def test_unexpected_tensors_are_refused_by_name(tmp_path, base, rename, match):
    from safetensors.torch import load_file, save_file
    peft = save_peft(tmp_path, "llama3", base[0], target_modules=["q_proj"])[2]
    file = peft / "adapter_model.safetensors"
    save_file({rename(name): t for name, t in load_file(file).items()}, file)
    peft_refusal(tmp_path, peft, match)


def test_peft_adapters_of_other_layouts_are_refused(tmp_path, base):
    gpt2 = save_peft(tmp_path / "a", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    peft_refusal(tmp_path, gpt2[2], "fan_in_fan_out", gpt2[1])
    embedding = save_peft(tmp_path / "b", "llama3", base[0], target_modules=["q_proj", "embed_tokens"])
    peft_refusal(tmp_path, embedding[2], "embed", base[0])
    qwen = save_peft(tmp_path / "c", "qwen3", target_modules=["q_proj"])
    peft_refusal(tmp_path, qwen[2], "belongs to another base", base[0])     # q_proj is (64, 32) there
    router = save_peft(tmp_path / "d", "stablelm", target_modules=["q_proj"])
    peft_refusal(tmp_path, router[2], "names no base model", base_model_name_or_path="")


def test_module_choice_is_pefts_own():
    """is_target against PEFT's own function, over configurations and names."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
    inner = ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_up_proj")
    names = [f"model.layers.{i}.{name}" for i in range(12) for name in inner] + ["lm_head"]
    for options in (dict(target_modules=["q_proj"]),
                    dict(target_modules=["up_proj", "lm_head"], layers_to_transform=[1, 11]),
                    dict(target_modules=r".*\.1\d?\..*proj"),
                    dict(target_modules=["self_attn.q_proj"], layers_to_transform=0),
                    dict(target_modules=["model.layers.3.mlp.up_proj", "q_proj"], layers_to_transform=[2]),
                    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
                    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="h"),
                    dict(target_modules=["up_proj"], layers_to_transform=[]),
                    dict(target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.[0-5]\..*"),
                    dict(target_modules=["q_proj", "up_proj"], exclude_modules=["mlp.up_proj"])):
        config = LoraConfig(**options)
        theirs = [check_target_module_exists(config, name) for name in names]
        theirs = [bool(found) and not isinstance(found, _ExcludedModule) for found in theirs]
        assert [bool(is_target(name, options, ROOT)) for name in names] == theirs, options


def test_reach_and_targets_by_hand():
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (2, 3) for p in "qv"]
    assert reach(names, 4) == (2, ["self_attn.q_proj", "self_attn.v_proj"])
    assert reach(names, 5) == (5, sorted(names))                         # not the last two
    assert reach(names[:3], 4) == (4, sorted(names[:3]))                 # not the same in both
    assert reach([*names, "lm_head"], 4) == (2, ["self_attn.q_proj", "self_attn.v_proj", "lm_head"])
    assert reach(["lm_head"], 4) == (4, ["lm_head"])
    everything = {f"model.layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "qv"}
    assert targets_of(set(names), everything) == (["q_proj", "v_proj"], [2, 3])
    assert targets_of(everything, everything) == (["q_proj", "v_proj"], None)
    assert targets_of(set(names[:3]), everything) == (sorted(names[:3]), None)


def test_verify_compares_with_peft_and_leaves_nothing_that_differs(tmp_path, base, monkeypatch, capsys):
    save_mlx(tmp_path / "mlx", base[0], "dora", ALL)
    there = ["to-peft", "--adapter", tmp_path / "mlx", "--output"]
    back = ["from-peft", "--adapter", tmp_path / "peft", "--output"]
    assert run(*there, tmp_path / "peft", "--verify") == 0 and "equal" in capsys.readouterr().out
    assert run(*back, tmp_path / "back", "--verify") == 0 and "equal" in capsys.readouterr().out
    q = quantized(base[0], tmp_path / "q")
    with pytest.raises(UserError, match="float original as --model"):
        run(*there, tmp_path / "other", "--model", q, "--verify")
    from mlx_grpo import peft_files
    right = peft_files.rank_and_scale       # a scale that is a little off, as a bug's
    monkeypatch.setattr(peft_files, "rank_and_scale", lambda *a: (right(*a)[0], right(*a)[1] * 1.01))
    assert run(*back, tmp_path / "other", "--verify") == 1 and "NOT EQUAL" in capsys.readouterr().err
    assert not list(tmp_path.glob("*other*")) and not list(tmp_path.glob(".*other*"))


# ---- fuse ------------------------------------------------------------------------------------------------------------

def quantized(base, directory, **options):
    model, config, _ = load_checked(base)
    model, config = mlx_lm.utils.quantize_model(model, config, options.get("group_size", 32), options.get("bits", 4))
    mlx_lm.utils.save(directory, base, model, mlx_lm.utils.load_tokenizer(base), config)
    return directory


def in_dtype(base, directory, dtype):
    model, config, _ = load_checked(base)
    model.set_dtype(dtype)
    mlx_lm.utils.save(directory, base, model, mlx_lm.utils.load_tokenizer(base), config)
    return directory


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fused_model_computes_what_base_and_adapter_do(tmp_path, base, kind, capsys):
    save_mlx(tmp_path / "mlx", base[0], kind, ALL)
    assert run("fuse", "--model", base[0], "--adapter", tmp_path / "mlx", "--output", tmp_path / "fused") == 0
    assert "equal" in capsys.readouterr().out
    model, tokenizer = mlx_lm.load(str(tmp_path / "fused"))
    assert equal(mlx_logits(model, TOKENS), adapted_logits(base[0], tmp_path / "mlx"))
    assert equal(torch_logits(load_torch(tmp_path / "fused"), TOKENS), mlx_logits(model, TOKENS))
    assert tokenizer.encode("7+5") and {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    report = json.loads((tmp_path / "fused/fused.json").read_text())
    assert report["logits_difference"] <= report["limit"] and report["adapter_kl"] > 0.01


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_16_bit_fuse_keeps_its_type_and_is_equal_but_for_rounding(tmp_path, base, kind):
    for dtype in (mx.bfloat16, mx.float16):
        half, out = in_dtype(base[0], tmp_path / f"{dtype}", dtype), tmp_path / f"fused-{dtype}"
        save_mlx(tmp_path / f"mlx-{dtype}", half, kind, ALL)
        assert run("fuse", "--model", half, "--adapter", tmp_path / f"mlx-{dtype}", "--output", out) == 0
        assert {a.dtype for a in mx.load(str(out / "model.safetensors")).values()} == {dtype}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fusing_into_a_quantised_base_keeps_it_quantised_and_tells_the_kl(tmp_path, base, kind, capsys):
    q = quantized(base[0], tmp_path / "q", bits=8)
    save_mlx(tmp_path / "mlx", q, kind, ALL)
    assert run("fuse", "--adapter", tmp_path / "mlx", "--output", tmp_path / "fused") == 0      # into the base it names
    before, after = mx.load(str(q / "model.safetensors")), mx.load(str(tmp_path / "fused/model.safetensors"))
    kinds = lambda arrays: {name: (a.dtype, a.shape) for name, a in arrays.items()}
    assert kinds(before) == kinds(after)
    changed = {n.rsplit(".", 1)[0] for n in before if not mx.array_equal(before[n], after[n])}
    assert changed == {f"model.layers.{i}.{key}" for i in (1, 2) for key in ALL}
    report = json.loads((tmp_path / "fused/fused.json").read_text())
    assert report["limit"] is None and 0 < report["kl"] < 0.1 * report["adapter_kl"]
    assert f"{report['kl']:.2e} nats per token" in capsys.readouterr().out
    assert mlx_lm.load(str(tmp_path / "fused"))


def test_only_the_rounding_of_weights_shows_where_logits_are_compared(base, tmp_path):
    """Activations in 16 bits would hide an adapter of a few thousandths behind their own rounding."""
    half = in_dtype(base[0], tmp_path / "half", mx.bfloat16)
    model, exact = load_checked(half)[0], in_float32(load_checked(half)[0])
    ours, theirs = adapter_fuse.logits(model, TOKENS), model_check_logits(exact, TOKENS)
    assert max(np.abs(a - b).max() for a, b in zip(ours, theirs)) < 1e-4
    native = model_check_logits(model, TOKENS)          # in bfloat16 again
    assert max(np.abs(a - b).max() for a, b in zip(native, theirs)) > 1e-2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dequantizing_while_fusing_is_exact(tmp_path, base, kind):
    q = quantized(base[0], tmp_path / "q")
    save_mlx(tmp_path / "mlx", q, kind, ALL)
    assert run("fuse", "--model", q, "--adapter", tmp_path / "mlx", "--output", tmp_path / "fused", "--dequantize") == 0
    assert "quantization" not in json.loads((tmp_path / "fused/config.json").read_text())
    assert equal(plain_logits(tmp_path / "fused"), adapted_logits(q, tmp_path / "mlx"))
    assert equal(torch_logits(load_torch(tmp_path / "fused"), TOKENS), adapted_logits(q, tmp_path / "mlx"))
    with pytest.raises(UserError, match="isn't quantised"):
        run("fuse", "--model", base[0], "--adapter", tmp_path / "mlx", "--output", tmp_path / "other", "--dequantize")


def test_rounding_that_undoes_the_adapter_is_warned_of(tmp_path, base, capsys):
    q = quantized(base[0], tmp_path / "q", bits=2)
    save_mlx(tmp_path / "mlx", q, keys=["self_attn.q_proj"], size=0.02)
    assert run("fuse", "--adapter", tmp_path / "mlx", "--output", tmp_path / "fused") == 0
    assert "undoes much of what the adapter does; fuse with --dequantize" in capsys.readouterr().err


def test_a_fuse_that_computes_something_else_leaves_nothing(tmp_path, base, monkeypatch, capsys):
    """A module whose fused weight forgets the scale, as a bug in fusing would."""
    from mlx_lm.tuner.lora import LoRALinear
    save_mlx(tmp_path / "mlx", base[0], keys=ALL)
    right = LoRALinear.fuse

    def wrong(self, dequantize=False):
        self.scale = 1.01 * self.scale
        return right(self, dequantize)
    monkeypatch.setattr(LoRALinear, "fuse", wrong)
    assert run("fuse", "--model", base[0], "--adapter", tmp_path / "mlx", "--output", tmp_path / "fused") == 1
    assert "NOT EQUAL" in capsys.readouterr().err
    assert not list(tmp_path.glob("*fused*")) and not list(tmp_path.glob(".*fused*"))
    with pytest.raises(NotEqual):
        fuse(base[0], tmp_path / "mlx", tmp_path / "fused", base_name="x")


def test_modules_without_weights_keep_their_quantised_bits(tmp_path, base, capsys):
    q = quantized(base[0], tmp_path / "q")
    save_mlx(tmp_path / "mlx", q, keys=["self_attn.q_proj"])
    edit_json(tmp_path / "mlx/adapter_config.json", lora_parameters=dict(rank=4, scale=3.0, dropout=0.0))
    assert run("fuse", "--adapter", tmp_path / "mlx", "--output", tmp_path / "fused") == 0
    assert "12 modules" in capsys.readouterr().out
    before, after = mx.load(str(q / "model.safetensors")), mx.load(str(tmp_path / "fused/model.safetensors"))
    changed = {n.rsplit(".", 1)[0] for n in before if not mx.array_equal(before[n], after[n])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj" for i in (1, 2)}


def test_experts_and_embeddings_fuse_too(tmp_path):
    """What PEFT can't hold is still fused by mlx-lm."""
    save_tiny(tmp_path / "moe", "qwen3_moe")
    save_tokenizer(tmp_path / "moe")
    save_mlx(tmp_path / "mlx", tmp_path / "moe", keys=["mlp.switch_mlp.up_proj", "mlp.gate", "model.embed_tokens"])
    assert run("fuse", "--adapter", tmp_path / "mlx", "--output", tmp_path / "fused") == 0
    assert equal(plain_logits(tmp_path / "fused"), adapted_logits(tmp_path / "moe", tmp_path / "mlx"))


# ---- mlx-lm's own tools ----------------------------------------------------------------------------------------------

def own_tool(*arguments):
    done = subprocess.run([sys.executable, "-m", "mlx_lm", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mlx_lm_loads_generates_and_fuses_what_from_peft_writes(tmp_path, base):
    options = dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2])
    model, _, peft = save_peft(tmp_path, "llama3", base[0], **options)
    convert(convert_options(["--hf-path", str(base[0]), "--dtype", "float32", "--output-dir", str(tmp_path / "base")]))
    run("from-peft", "--adapter", peft, "--model", tmp_path / "base", "--output", tmp_path / "mlx")
    ours = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "mlx"))[0]
    assert equal(mlx_logits(ours, TOKENS), torch_logits(model, TOKENS))
    adapted = ["--model", tmp_path / "base", "--adapter-path", tmp_path / "mlx"]
    own_tool("fuse", *adapted, "--save-path", tmp_path / "fused")
    assert equal(mlx_logits(mlx_lm.load(str(tmp_path / "fused"))[0], TOKENS), torch_logits(model, TOKENS))
    own_tool("generate", *adapted, "--prompt", "7+5", "--max-tokens", "3")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_our_trainer_writes_goes_to_peft_and_fuses_by_us_and_by_mlx_lm(tmp_path, kind, monkeypatch):
    import mlx_lm.fuse

    from mlx_grpo import main as train
    model = tiny_qwen2(tmp_path / "base")
    assert train(["train", *sets(**QUICK | dict(
        model_name=model, output_dir=str(tmp_path), run_name="run", fine_tune_type=kind, lora_rank=4, lora_layers=1,
        lora_alpha=12.0, save_steps=2, eval_samples=0, learning_rate=1e-2))]) == 0
    checkpoint = tmp_path / "run/checkpoint-2"
    ours = adapted_logits(model, checkpoint)
    assert not equal(ours, plain_logits(model))         # it has learned something
    run("to-peft", "--adapter", checkpoint, "--output", tmp_path / "peft")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["lora_alpha"] == 12
    assert equal(ours, peft_logits(model, tmp_path / "peft"))
    assert run("fuse", "--adapter", checkpoint, "--output", tmp_path / "fused") == 0
    monkeypatch.setattr(sys, "argv", ["fuse", "--model", model, "--adapter-path", str(checkpoint),
                                      "--save-path", str(tmp_path / "theirs")])
    mlx_lm.fuse.main()
    for directory in ("fused", "theirs"):
        assert equal(mlx_logits(mlx_lm.load(str(tmp_path / directory))[0], TOKENS), ours)


def test_an_unmerged_conversion_goes_on_training_in_peft(tmp_path, base):
    """TRL's way: is_trainable, a step of torch's Adam lowers the loss, what it saves comes back with equal logits."""
    torch, peft = require("torch"), require("peft")
    save_mlx(tmp_path / "mlx", base[0], "lora", ALL)
    run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(load_torch(base[0]), tmp_path / "peft", is_trainable=True).eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids, losses = torch.tensor(TOKENS), []
    for _ in range(2):
        losses.append(model(ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    model.save_pretrained(tmp_path / "more")
    run("from-peft", "--adapter", tmp_path / "more", "--output", tmp_path / "back")
    assert equal(adapted_logits(base[0], tmp_path / "back"), torch_logits(model, TOKENS))


# ---- commands --------------------------------------------------------------------------------------------------------

def test_inspect_tells_both_kinds(tmp_path, base, capsys):
    save_mlx(tmp_path / "mlx", base[0], "dora", ["self_attn.q_proj"])
    run("inspect", tmp_path / "mlx")
    out = capsys.readouterr().out
    assert "mlx-lm, base" in out and "num_layers 2" in out
    assert "model.layers.2.self_attn.q_proj.lora_a  F32 [32, 4]" in out
    run("to-peft", "--adapter", tmp_path / "mlx", "--output", tmp_path / "peft")
    edit_json(tmp_path / "peft/adapter_config.json", bias="all")
    with pytest.raises(UserError, match='bias is "all"'):
        run("inspect", tmp_path / "peft")               # what it holds first, then why it can't be brought over
    out = capsys.readouterr().out
    assert "PEFT, base" in out and "lora_alpha 12" in out and "q_proj.lora_A.weight  F32 [4, 32]" in out


def test_the_script_runs_from_anywhere_and_a_mistake_is_one_line(tmp_path, base):
    save_mlx(tmp_path / "mlx", base[0], keys=["self_attn.q_proj"])
    (tmp_path / "peft").mkdir()
    process = lambda output: subprocess.run([sys.executable, ROOT / "utils/adapters.py", "to-peft", "--adapter", "mlx",
                                             "--output", output], cwd=tmp_path, capture_output=True, text=True)
    done = process("peft")
    assert done.returncode == 0 and "wrote peft: lora, rank 4, scale 3, 2 modules" in done.stdout, done.stderr
    again = process("peft")                             # no longer empty
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "already exists" in again.stderr
