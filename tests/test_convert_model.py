"""utils/convert_model.py: what it writes is what transformers computes, and every refusal is one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, require
from fake_hub import fake_hub
from mlx.utils import tree_flatten
from nanochat_fixtures import STORED, converted, folder
from tiny_hf import edit_json, mlx_logits, random_tokens, save_tiny, save_tokenizer, torch_logits

from mlx_grpo import UserError, convert_model, model_files
from mlx_grpo.convert_model import check_ahead, convert, parse, verify

CONVERTED = ["llama3", "qwen2.5", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "mixtral", "gemma3", "gpt_neox",
             "stablelm", "qwen3_moe"]
SCRIPT = str(ROOT / "utils" / "convert_model.py")


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen3 with matrices that groups of 32 and 64 divide, with its tokenizer."""
    path = tmp_path_factory.mktemp("hf") / "qwen3"
    save_tiny(path, "qwen3", hidden_size=64, intermediate_size=128, num_hidden_layers=8)
    save_tokenizer(path)
    return path


def run(source, target, *options):
    """Convert in this process; the options object."""
    given = parse(["--hf-path", str(source), "--output-dir", str(target), *options])
    check_ahead(given)
    convert(given, quiet)
    return given


# ---- results ----

@pytest.mark.parametrize("family", CONVERTED)
def test_a_converted_model_opened_by_plain_mlx_lm_has_the_logits_of_transformers(family, tmp_path):
    from mlx_lm.utils import load
    torch_model = save_tiny(tmp_path / "hf", family)
    save_tokenizer(tmp_path / "hf")
    options = run(tmp_path / "hf", tmp_path / "mlx", "--dtype", "float32")
    model, tokenizer = load(str(tmp_path / "mlx"))
    tokens = random_tokens()
    assert np.abs(mlx_logits(model, tokens) - torch_logits(torch_model, tokens)).max() < 1e-4
    theirs = require("transformers").AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.encode("7 + 5") == theirs.encode("7 + 5")
    assert verify(options, quiet)
    assert json.loads((tmp_path / "mlx" / "conversion.json").read_text())["verified"]["max"] < 1e-4


def test_verify_fails_and_keeps_the_directory_when_a_weight_is_off(qwen, tmp_path):
    options = run(qwen, tmp_path / "mlx")
    assert verify(options, quiet)
    path = str(tmp_path / "mlx" / "model.safetensors")
    weights = dict(mx.load(path))
    weights["model.layers.3.mlp.up_proj.weight"] = weights["model.layers.3.mlp.up_proj.weight"] * 1.01
    mx.eval(weights)
    mx.save_safetensors(path, weights, metadata={"format": "mlx"})
    assert not verify(options, quiet)
    assert (tmp_path / "mlx" / "config.json").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_the_type_of_every_weight(dtype, qwen, tmp_path):
    run(qwen, tmp_path / "mlx", "--dtype", dtype)
    weights = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    assert {str(weight.dtype) for weight in weights.values()} == {f"mlx.core.{dtype}"}
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["dtype"] == dtype


def test_weights_that_float16_cannot_hold_are_refused(tmp_path):
    save_tiny(tmp_path / "hf", "qwen3")
    save_tokenizer(tmp_path / "hf")
    path = str(tmp_path / "hf" / "model.safetensors")
    weights = dict(mx.load(path))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e6
    mx.eval(weights)
    mx.save_safetensors(path, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight holds numbers that float16 can't.*--dtype bfloat16"):
        run(tmp_path / "hf", tmp_path / "mlx")
    assert os.listdir(tmp_path) == ["hf"]
    run(tmp_path / "hf", tmp_path / "mlx", "--dtype", "bfloat16")


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantised_bits_and_groups_are_those_asked_for_and_more_bits_are_nearer(bits, qwen, tmp_path):
    options = run(qwen, tmp_path / "mlx", "-q", "--bits", str(bits), "--group-size", "32")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (bits, 32)
    assert verify(options, quiet)
    result = json.loads((tmp_path / "mlx" / "conversion.json").read_text())["verified"]
    low, high = {2: (0.3, 9), 3: (0.1, 3), 4: (0.02, 1), 6: (1e-4, 0.05), 8: (1e-6, 0.005)}[bits]
    assert low < result["kl"] < high, result


def test_a_recipe_gives_some_layers_more_bits(qwen, tmp_path):
    run(qwen, tmp_path / "mlx", "--quant-recipe", "mixed_3_6", "--group-size", "32")
    quantization = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    bits = {path: value["bits"] for path, value in quantization.items() if isinstance(value, dict)}
    assert set(bits.values()) == {3, 6} and bits["lm_head"] == 6 and bits["model.layers.0.mlp.down_proj"] == 6
    assert bits["model.layers.0.mlp.up_proj"] == 3


def test_dequantising_gives_the_quantised_model_as_floats(qwen, tmp_path):
    from mlx_lm.utils import load_model
    run(qwen, tmp_path / "q", "-q", "--bits", "4", "--dtype", "float32")
    options = run(tmp_path / "q", tmp_path / "d", "--dequantize", "--dtype", "float32")
    assert "quantization" not in json.loads((tmp_path / "d" / "config.json").read_text())
    tokens = random_tokens()
    quantized, floats = load_model(tmp_path / "q")[0], load_model(tmp_path / "d")[0]
    assert np.abs(mlx_logits(quantized, tokens) - mlx_logits(floats, tokens)).max() < 1e-4
    assert not any("scales" in name for name, _ in tree_flatten(floats.parameters()))
    assert verify(options, quiet)


@pytest.mark.parametrize("generation", STORED)
def test_a_nanochat_of_every_generation_is_quantised_and_opens_with_its_tokenizer(generation, tmp_path):
    from mlx_grpo import load_model
    converted(folder(generation), tmp_path / "mlx")
    options = run(tmp_path / "mlx", tmp_path / "q", "-q", "--bits", "8", "--dtype", "float32")
    assert verify(options, quiet)
    assert json.loads((tmp_path / "q" / "conversion.json").read_text())["verified"]["kl"] < 0.02
    model, tokenizer = load_model(str(tmp_path / "q"))
    assert tokenizer.encode("2 + 2") == load_model(str(tmp_path / "mlx"))[1].encode("2 + 2")
    assert any(name.endswith("scales") for name, _ in tree_flatten(model.parameters()))
    assert {p.name for p in (tmp_path / "q").glob("*.py")} == {p.name for p in (tmp_path / "mlx").glob("*.py")}


def test_an_mlx_directory_is_verified_against_itself_in_mlx(tmp_path):
    """mlx-lm keeps GPT-2's matrices transposed and under other names: transformers would read noise."""
    save_tiny(tmp_path / "hf", "gpt2")
    save_tokenizer(tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "a", "--dtype", "float32")
    options = run(tmp_path / "a", tmp_path / "b", "--dtype", "float32")
    assert verify(options, quiet)
    assert json.loads((tmp_path / "b" / "conversion.json").read_text())["verified"]["against"] == "its source in MLX"


def test_the_estimate_of_what_will_be_written_is_near_and_not_below(qwen, tmp_path):
    from mlx_grpo.checked_load import check_files
    for name, flags in {"f": [], "q": ["-q", "--bits", "4"], "d": ["--dequantize"]}.items():
        source = tmp_path / "q" if name == "d" else qwen
        options = run(source, tmp_path / name, *flags)
        estimate = convert_model.written_bytes(check_files(source), options) - 20_000_000
        written = (tmp_path / name / "model.safetensors").stat().st_size
        assert 0.8 * written < estimate < 2.6 * written, name


def test_the_end_token_is_written_everywhere_and_ends_generation(qwen, tmp_path):
    from mlx_lm.utils import load
    run(qwen, tmp_path / "mlx", "--eos-token", "<|im_end|>")
    read = lambda name: json.loads((tmp_path / "mlx" / name).read_text())
    assert read("tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert read("config.json")["eos_token_id"] == read("generation_config.json")["eos_token_id"] == 3
    tokenizer = load(str(tmp_path / "mlx"))[1]
    assert tokenizer.eos_token_ids == {3} and tokenizer.eos_token == "<|im_end|>"


def test_the_report_tells_renamed_missing_and_unexpected_keys(tmp_path):
    save_tiny(tmp_path / "hf", "gpt2")
    save_tokenizer(tmp_path / "hf")
    path = str(tmp_path / "hf" / "model.safetensors")
    weights = dict(mx.load(path)) | {"transformer.h.0.attn.masked_bias": mx.array([-1e4])}
    mx.eval(weights)
    mx.save_safetensors(path, weights, metadata={"format": "pt"})
    said = []
    convert(parse(["--hf-path", str(tmp_path / "hf"), "--output-dir", str(tmp_path / "mlx")]), said.append)
    assert "note: names: 'transformer.' taken off" in said
    assert "note: unexpected, not used: model.h.0.attn.masked_bias" in said
    report = json.loads((tmp_path / "mlx" / "conversion.json").read_text())
    assert report["unexpected"] == ["model.h.0.attn.masked_bias"] and report["missing"] == []


def test_a_licence_stays_in_the_card(qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "hf")
    (tmp_path / "hf" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [math]\n---\n# old\n")
    run(tmp_path / "hf", tmp_path / "mlx")
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert "license: apache-2.0" in card and "- mlx" in card and "- math" in card and "# old" not in card


# ---- refusals ----

@pytest.mark.parametrize("options, says", [
    (["-q", "--dequantize"], "exclude each other"),
    (["--bits", "4"], "--bits 4 has an effect with -q only"),
    (["--group-size", "32"], "--group-size 32 has an effect with -q only"),
    (["--quant-recipe", "mixed_3_6", "--bits", "4"], "sets the bits itself"),
    (["--eos-token", "<|nowhere|>"], r"'<\|nowhere\|>' isn't in the vocabulary.*<\|im_end\|>"),
    (["--dequantize"], "isn't quantised, so --dequantize has nothing to do"),
    (["-q", "--group-size", "128"], None),
    (["--revision", "main"], "--revision main has no meaning"),
])
def test_options_that_cannot_be_honoured_are_refused(options, says, qwen, tmp_path):
    if says is None:      # rows of 64 only: nothing to quantise in groups of 128 but the 128-wide ones
        run(qwen, tmp_path / "mlx", *options)
        return
    with pytest.raises(UserError, match=says):
        run(qwen, tmp_path / "mlx", *options)
    assert not list(tmp_path.iterdir())


def test_nothing_to_quantise_is_an_error(tmp_path):
    save_tiny(tmp_path / "hf", "llama3")
    save_tokenizer(tmp_path / "hf")
    with pytest.raises(UserError, match="no matrix .* multiple of 64; try --group-size 32"):
        run(tmp_path / "hf", tmp_path / "mlx", "-q")


def test_a_quantised_source_is_not_quantised_again(qwen, tmp_path):
    run(qwen, tmp_path / "q", "-q")
    with pytest.raises(UserError, match="is quantised already .4 bits in groups of 64"):
        run(tmp_path / "q", tmp_path / "qq", "-q", "--bits", "2")


def test_an_output_directory_in_use_is_refused_before_any_work(qwen, tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists and is not empty"):
        run(qwen, tmp_path / "mlx")
    assert os.listdir(tmp_path / "mlx") == ["mine.txt"]


def test_a_full_disk_is_noticed_beforehand(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match="the converted model needs about 20.* MB in .* which has 1.0 kB free"):
        run(qwen, tmp_path / "mlx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config, says", [
    ({"model_type": "bert", "architectures": ["BertModel"]}, "bert is encoder-only"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    ({"model_type": "lama"}, "nearest it has: llama"),
])
def test_models_that_mlx_lm_cannot_run_are_named(config, says, qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        run(tmp_path / "hf", tmp_path / "mlx")


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    save_tiny(tmp_path / "hf", "qwen3")
    with pytest.raises(UserError, match="has no tokenizer .tokenizer.json"):
        run(tmp_path / "hf", tmp_path / "mlx")


def test_a_tokenizer_with_code_of_its_own_does_not_run_it(qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "hf")
    (tmp_path / "hf" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    edit_json(tmp_path / "hf" / "tokenizer_config.json", tokenizer_class="T",
              auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    edit_json(tmp_path / "hf" / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    try:
        run(tmp_path / "hf", tmp_path / "mlx")
    except UserError:
        pass
    assert not (tmp_path / "ran").exists() and not (tmp_path / "mlx" / "evil.py").exists()


# ---- interruptions ----

@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_conversion_leaves_nothing(stop, code, qwen, tmp_path):
    """The signal comes when the weights are written and the tokenizer isn't."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from mlx_grpo import convert_model, run_command
def slow(*_):
    print("writing", flush=True)
    time.sleep(60)
convert_model.copy_tokenizer = slow
sys.argv = ["convert_model.py", "--hf-path", {str(qwen)!r}, "--output-dir", {str(tmp_path / "out")!r}]
run_command(convert_model.main)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], **pipes)
    assert process.stdout.readline() == "writing\n"
    assert [p.name.startswith(".out.") for p in tmp_path.iterdir()] == [True]
    process.send_signal(stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_crash_in_the_middle_leaves_nothing(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_model, "write_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(qwen, tmp_path / "mlx")
    assert not list(tmp_path.iterdir())


# ---- the program and the hub ----

def program(*arguments, environment=None, directory=None):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, cwd=directory, timeout=120)


def test_the_program_runs_from_any_directory_and_lists_its_architectures(tmp_path):
    listing = program("--list", directory=tmp_path)
    assert listing.returncode == 0 and "qwen3_moe" in listing.stdout and "Mixtral" in listing.stdout
    assert program(directory=tmp_path).returncode == 2


def test_tested_models_are_those_that_the_tests_test():
    spelt = lambda names: {re.sub(r"[-_ ]", "", name.lower()) for name in names}
    assert spelt(convert_model.TESTED) == spelt(CONVERTED)


def test_a_model_of_the_hub_is_downloaded_converted_and_found_again_offline(qwen, tmp_path):
    with fake_hub({"me/tiny": qwen}, tmp_path / "cache") as (_, environment):
        first = program("--hf-path", "me/tiny", "--output-dir", tmp_path / "a", environment=environment)
        assert first.returncode == 0, first.stderr
        assert json.loads((tmp_path / "a" / "conversion.json").read_text())["source"] == "me/tiny"
        for name, options, says in [("me/nothing", [], "no such model on 127.0.0.1"), ("gated/x", [], "gated on"),
                                    ("me/tiny", ["--revision", "v9"], "no revision 'v9'")]:
            refused = program("--hf-path", name, *options, "--output-dir", tmp_path / "b", environment=environment)
            assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr
            assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
    time.sleep(0.1)
    offline = program("--hf-path", "me/tiny", "--output-dir", tmp_path / "c", environment=environment)
    assert offline.returncode == 0, offline.stderr
    gone = program("--hf-path", "me/other", "--output-dir", tmp_path / "d", environment=environment)
    assert gone.returncode == 2 and "can't be reached" in gone.stderr


def test_a_download_that_does_not_fit_is_refused_before_it_starts(qwen, tmp_path):
    with fake_hub({"me/huge": qwen}, tmp_path / "cache", sizes={"model.safetensors": 10**18}) as (_, environment):
        refused = program("--hf-path", "me/huge", "--output-dir", tmp_path / "a", environment=environment)
    assert refused.returncode == 2 and "downloading me/huge needs about 1000000.0 TB" in refused.stderr


def test_an_upload_without_login_is_refused_beforehand(qwen, tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        run(qwen, tmp_path / "mlx", "--upload-repo", "me/x")


def test_an_upload_sends_the_whole_directory(qwen, tmp_path, monkeypatch):
    import huggingface_hub
    calls = []

    class Api:
        def create_repo(self, repo, exist_ok):
            calls.append(repo)

        def upload_folder(self, folder_path, repo_id):
            calls.append((folder_path, repo_id))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model_files.upload(tmp_path, "me/x")
    assert calls == ["me/x", (str(tmp_path), "me/x")]
