"""Vision-language models: conversion and inference against transformers, refusals, the terminal. Needs the extra."""

import json
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, require
from tiny_vision import QWEN, flatten_config, save_deepseek, save_image, save_qwen, small_deepseek_tower

from mlx_grpo import UserError, convert_vision_model, inference_vision, vision_config
from mlx_grpo.inference_engine import Sampling
from mlx_grpo.inference_vision import open_vision_session
from mlx_grpo.vision_engine import make_inputs, open_image, user_message
from mlx_grpo.vision_model import load_vision_model

pytestmark = pytest.mark.vision
torch = require("torch")
TOLERANCE = 1e-4        # on logits up to about 5, both sides in float32; reached: 5e-6


@pytest.fixture(scope="module", autouse=True)
def installed():
    """Not at import: the default group collects this file, too, and doesn't have the extra."""
    require("mlx_vlm")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a source of each Qwen family, its float32 conversion (NAME-mlx), and two images."""
    path = tmp_path_factory.mktemp("vision")
    for family in QWEN:
        save_qwen(path / family, family)
        convert("--hf-path", path / family, "--output-dir", path / f"{family}-mlx", "--dtype", "float32")
    save_image(path / "a.png")
    save_image(path / "b.png", (90, 40), seed=1)
    return path


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A directory with a DeepSeek-OCR as the hub has it (hf), its float32 conversion (mlx) and three images."""
    path = tmp_path_factory.mktemp("deepseek")
    with pytest.MonkeyPatch.context() as patch:
        small_deepseek_tower(patch)
        save_deepseek(path / "hf")
        convert("--hf-path", path / "hf", "--output-dir", path / "mlx", "--dtype", "float32")
        for n, size in enumerate([(52, 36), (90, 40), (700, 300)]):
            save_image(path / f"{n}.png", size, seed=n)
        yield path


def convert(*words):
    return convert_vision_model.convert(convert_vision_model.parse([str(w) for w in words]), say=lambda line: None)


def greedy(path, max_tokens=8):
    return open_vision_session(str(path), Sampling(temperature=0, max_tokens=max_tokens))


def text_of(session, images, prompt="What is this?"):
    names = [f"{n}.png" for n in range(len(images))]
    return "".join(session.stream([user_message(prompt, names)], images))


def our_logits(model, inputs):
    from mlx_grpo.vision_check import mlx_logits
    return mlx_logits(model, [inputs])[0]


def their_logits(path, inputs):
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = {key: torch.tensor(np.array(value)) for key, value in inputs.items()}
    tensors["mm_token_type_ids"] = (tensors["input_ids"] == 5).int()
    with torch.no_grad():
        return model(**tensors).logits[0].numpy(), model, tensors


# ---- against transformers --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("family", QWEN)
def test_logits_equal_transformers_with_images_of_different_sizes(place, family, count):
    session = greedy(place / f"{family}-mlx")
    images = [open_image(place / name) for name in ("a.png", "b.png")][:count]
    inputs = make_inputs(family, session.processor, [user_message("What is this?", "ab"[:count])], images)
    ours, (theirs, _, _) = our_logits(session.model, inputs), their_logits(place / family, inputs)
    assert np.abs(theirs).max() > 0.5 and ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE
    if count:
        blank = dict(inputs, pixel_values=mx.zeros_like(inputs["pixel_values"]))
        assert np.abs(our_logits(session.model, blank) - ours).max() > 100 * TOLERANCE      # the images matter


@pytest.mark.parametrize("family", QWEN)
def test_a_greedy_answer_to_two_images_is_that_of_transformers(place, family):
    session = greedy(place / f"{family}-mlx", 12)
    images = [open_image(place / name) for name in ("a.png", "b.png")]
    message = user_message("What changed?", ["a.png", "b.png"])
    inputs = make_inputs(family, session.processor, [message], images)
    _, model, tensors = their_logits(place / family, inputs)
    theirs = model.generate(**tensors, max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
    list(session.stream([message], images))
    assert session.sampled == theirs[0, tensors["input_ids"].shape[1]:].tolist()


@pytest.mark.parametrize("family", QWEN)
def test_pixels_and_grids_are_those_of_transformers_own_processor(place, family):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    settings = json.loads((place / family / "preprocessor_config.json").read_text())
    settings.pop("image_processor_type")
    images = [open_image(place / name) for name in ("a.png", "b.png")]
    theirs = Qwen2VLImageProcessorPil(**settings)(images=images, return_tensors="np")
    session = greedy(place / f"{family}-mlx")
    ours = make_inputs(family, session.processor, [user_message("?", "ab")], images)
    assert np.array_equal(np.array(ours["image_grid_thw"]), theirs["image_grid_thw"])
    assert np.abs(np.array(ours["pixel_values"]) - theirs["pixel_values"]).max() < 0.02  # a level of 255 over std 0.5


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_the_hubs_flat_config_gives_the_same_logits_as_the_nested_one(place, family, tmp_path):
    shutil.copytree(place / family, tmp_path / "flat")
    flatten_config(tmp_path / "flat")
    assert "text_config" not in json.loads((tmp_path / "flat" / "config.json").read_text())
    ids = mx.array([[1, 20, 30, 40, 2]])
    flat, nested = (load_vision_model(path)[0] for path in (tmp_path / "flat", place / family))
    assert mx.array_equal(flat.language_model(ids).logits, nested.language_model(ids).logits)


@pytest.mark.parametrize("family", QWEN)
def test_plain_mlx_vlm_opens_the_conversion_and_computes_the_same(place, family):
    from mlx_vlm.utils import load_model
    ids = mx.array([[1, 20, 30, 40, 2]])
    plain, ours = load_model(place / f"{family}-mlx"), load_vision_model(place / f"{family}-mlx")[0]
    assert mx.array_equal(plain.language_model(ids).logits, ours.language_model(ids).logits)


def test_a_tied_head_converts(tmp_path):
    model = save_qwen(tmp_path / "hf", "qwen2_vl")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "hf")
    convert("--hf-path", tmp_path / "hf", "--output-dir", tmp_path / "mlx", "--dtype", "float32")
    inputs = {"input_ids": mx.array([[1, 20, 30, 40, 2]])}
    ours = our_logits(load_vision_model(tmp_path / "mlx")[0], inputs)
    assert np.abs(ours - their_logits(tmp_path / "hf", inputs)[0]).max() < TOLERANCE


# ---- conversion ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", QWEN)
def test_quantising_takes_the_language_model_and_leaves_the_tower(place, family, tmp_path):
    convert("--hf-path", place / family, "--output-dir", tmp_path / "q", "-q", "--group-size", 32)
    names = set(mx.load(str(tmp_path / "q" / "model.safetensors")))
    packed = {name for name in names if name.endswith(".scales")}
    assert packed and all(name.startswith("language_model.") for name in packed)
    session = greedy(tmp_path / "q")
    assert session.model.vision_tower.blocks[0].attn.qkv.weight.dtype == mx.bfloat16
    assert text_of(session, [open_image(place / "a.png")])


def test_the_tower_is_quantised_when_asked_and_goes_back_to_floats(place, tmp_path):
    convert("--hf-path", place / "qwen2_vl", "--output-dir", tmp_path / "q", "-q", "--bits", 8, "--quantize-vision")
    packed = {name for name in mx.load(str(tmp_path / "q" / "model.safetensors")) if name.endswith(".scales")}
    assert any(name.startswith("vision_tower.") for name in packed)
    convert("--hf-path", tmp_path / "q", "--output-dir", tmp_path / "back", "--dequantize", "--dtype", "float32")
    back, source = (load_vision_model(path)[0] for path in (tmp_path / "back", place / "qwen2_vl"))
    ids = mx.array([[1, 20, 30, 40, 2]])
    difference = mx.abs(back.language_model(ids).logits - source.language_model(ids).logits).max().item()
    assert 0 < difference < 0.2


def test_verify_tells_the_difference_and_notices_a_wrong_conversion(place, tmp_path, capsys):
    words = ["--hf-path", str(place / "qwen2_vl"), "--output-dir", str(tmp_path / "out"), "--dtype", "float16"]
    options = convert_vision_model.parse(words)
    convert_vision_model.convert(options)
    assert convert_vision_model.verify(options)
    assert "against transformers" in capsys.readouterr().out
    file = tmp_path / "out" / "model.safetensors"
    weights = mx.load(str(file))
    name = "vision_tower.blocks.0.mlp.fc1.weight"
    mx.eval(weights)
    mx.save_safetensors(str(file), weights | {name: weights[name] * 2}, {"format": "mlx"})
    assert not convert_vision_model.verify(options)
    assert not json.loads((tmp_path / "out" / "conversion.json").read_text())["verified"]["passed"]


def test_a_missing_weight_is_refused_and_nothing_is_written(place, tmp_path):
    shutil.copytree(place / "qwen2_vl", tmp_path / "hf")
    weights = mx.load(str(tmp_path / "hf" / "model.safetensors"))
    mx.eval(weights)
    weights.pop("visual.blocks.0.norm1.bias")
    mx.save_safetensors(str(tmp_path / "hf" / "model.safetensors"), weights, {"format": "pt"})
    with pytest.raises(UserError, match="no weights for vision_tower.blocks.0.norm1.bias"):
        convert("--hf-path", tmp_path / "hf", "--output-dir", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gemma3"}, "'gemma3' isn't supported here"),
    ({"model_type": "llama", "vision_config": ...}, "llama has no vision part; for language models use"),
    ({"model_type": None}, "no model_type"),
    ({"text_config": {"rope_parameters": {"rope_type": "yarn", "mrope_section": [1]}}}, "type 'yarn'"),
    ({"text_config": {"rope_parameters": {}}}, "no mrope_section"),
    ({"text_config": {"hidden_act": "relu", "rope_parameters": {"mrope_section": [1]}}}, "asks for 'relu'"),
])
def test_what_would_come_out_wrong_is_refused_by_name(change, message):
    config = {"model_type": "qwen2_vl", "vision_config": {}} | change
    with pytest.raises(UserError, match=message):
        vision_config.normalize_vision_config({k: v for k, v in config.items() if v is not ...})


def test_a_missing_package_is_one_line(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    for call in (lambda: convert("--hf-path", place / "qwen2_vl", "--output-dir", place / "none"),
                 lambda: greedy(place / "qwen2_vl-mlx")):
        with pytest.raises(UserError, match=r"pip install -e '\.\[vision\]'"):
            call()
    assert not (place / "none").exists()


def test_options_without_effect_are_refused():
    for words in (["--bits", "4"], ["--group-size", "64"], ["--quantize-vision"], ["-q", "--dequantize"]):
        with pytest.raises(UserError):
            convert_vision_model.parse(["--hf-path", "x", *words])


# ---- inference -------------------------------------------------------------------------------------------------------

def test_the_repetition_penalty_reaches_prompt_and_answer(place):
    session = greedy(place / "qwen2_5_vl-mlx", 12)
    text_of(session, [open_image(place / "a.png")])
    assert len(set(session.sampled)) < len(session.sampled)
    session.sampling = Sampling(temperature=0, max_tokens=12, repetition_penalty=1e6)
    text_of(session, [open_image(place / "a.png")])
    assert len(set(session.sampled)) == len(session.sampled)


def test_an_answer_depends_on_the_images_order(place):
    session = greedy(place / "qwen3_vl-mlx", 12)
    a, b = (open_image(place / name) for name in ("a.png", "b.png"))
    assert len({text_of(session, images) for images in ([a], [b], [a, b], [b, a], [])}) == 5


def test_images_that_cant_be_read_are_one_line(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    (tmp_path / "text.png").write_text("hello")
    for name, message in ((tmp_path / "none.png", "no such file"), ("https://host/a.png", "download it first"),
                          (tmp_path / "broken.png", "can't be read"), (tmp_path / "text.png", "can't be read")):
        with pytest.raises(UserError, match=message):
            open_image(name)


def test_a_place_for_an_image_in_the_text_is_refused(place):
    session = greedy(place / "qwen2_vl-mlx")
    with pytest.raises(UserError, match="2 places for images and there are 1"):
        text_of(session, [open_image(place / "a.png")], "see <|image_pad|>")


def test_a_relative_directory_is_never_asked_for_on_the_hub(place, monkeypatch):
    import huggingface_hub
    asked = []
    refuse = lambda name, *rest, **others: asked.append(name) or huggingface_hub.utils.validate_repo_id(name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.chdir(place)
    greedy("qwen2_vl-mlx")
    assert all(os.path.isabs(name) for name in asked)


def test_an_image_too_narrow_is_refused_in_one_line(place, tmp_path):
    save_image(tmp_path / "line.png", (4000, 2))
    with pytest.raises(UserError, match="refuses an image"):
        text_of(greedy(place / "qwen2_vl-mlx"), [open_image(tmp_path / "line.png")])


def test_stream_and_whole_print_the_same_and_errors_exit_2(place):
    base = [sys.executable, str(ROOT / "utils" / "inference_vision.py"), "--model", "qwen2_vl-mlx", "--max-tokens", "8",
            "--temperature", "0", "--image"]
    whole, streamed, broken = (subprocess.run([*base, *words], cwd=place, capture_output=True, timeout=120) for words in
                               (["a.png", "--prompt", "hi"], ["a.png", "--prompt", "hi", "--stream"],
                                ["none.png", "--prompt", "hi"]))
    assert whole.returncode == 0 and whole.stdout == streamed.stdout and len(whole.stdout) > 1
    assert broken.returncode == 2 and broken.stderr.decode().splitlines()[-1].endswith("image none.png: no such file")


def test_a_conversation_about_images_in_a_real_terminal(place, tmp_path):
    save_image(tmp_path / "first.png")
    lines = [f"image {tmp_path}/first.png", "What is it?", "image none.png", f"image {place}/b.png", "image",
             "And this?", f"/save {tmp_path}/talk.jsonl", "clear", "q"]
    leader, follower = pty.openpty()
    command = [sys.executable, str(ROOT / "utils" / "inference_vision.py"), "--model", str(place / "qwen2_vl-mlx"),
               "--chat", "--system", "Be brief.", "--max-tokens", "6", "--temperature", "0"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    os.write(leader, ("\n".join(lines) + "\n").encode())
    output = b""
    while piece := read(leader):
        output += piece
    assert process.wait(timeout=60) == 0
    shown = output.decode("utf-8", "replace")
    assert "(1 image for the next message)" in shown and "(saved 5 messages)" in shown and "(cleared)" in shown
    assert "image none.png: no such file" in shown and "image needs a file" in shown
    talk = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert [part["type"] for part in talk[3]["content"]] == ["image", "text"]


def read(handle):
    try:
        return os.read(handle, 4096)
    except OSError:         # the other side has closed
        return b""


# ---- DeepSeek-OCR ----------------------------------------------------------------------------------------------------

def test_deepseek_reads_one_image_several_and_none(deepseek):
    session = greedy(deepseek / "mlx")
    images = [open_image(deepseek / f"{n}.png") for n in range(2)]
    answers = [text_of(session, some, "Free OCR.") for some in ([], images[:1], images[:2], images[1::-1])]
    assert len(set(answers)) == 4


def test_deepseek_places_each_image_where_it_stands_alone(deepseek):
    session = greedy(deepseek / "mlx")
    embed = lambda images: embeddings(session, images)
    images = [open_image(deepseek / f"{n}.png") for n in (0, 2)]
    (_, first, _), (_, second, _), (_, both, spans) = embed(images[:1]), embed(images[1:]), embed(images)
    (a, b), (c, d) = spans
    assert (b - a, d - c) == (273, 273 + 210)                   # 16 rows of 17 and a separator; 2 crops of 10 x 10 more
    assert mx.abs(both[a:b] - first[1:1 + b - a]).max().item() < 1e-5
    assert mx.abs(both[c:d] - second[1:1 + d - c]).max().item() < 1e-5


def embeddings(session, images):
    inputs = make_inputs("deepseekocr", session.processor, [user_message("Free OCR.")], images)
    ids = inputs.pop("input_ids")
    return ids, session.model.get_input_embeddings(ids, **inputs).inputs_embeds[0], inputs["spans"]


def test_deepseek_knows_no_chat_and_says_so(deepseek, monkeypatch):
    for words in (["--chat"], ["--prompt", "x", "--system", "y"]):
        with pytest.raises(UserError, match="knows no --(chat|system)"):
            inference_vision.answer(inference_vision.parse(["--model", str(deepseek / "mlx"), *words]))


def test_deepseek_is_quantised_without_its_tower_and_verified(deepseek, tmp_path, capsys):
    words = ["--hf-path", str(deepseek / "hf"), "--output-dir", str(tmp_path / "q"), "-q"]
    options = convert_vision_model.parse(words)
    convert_vision_model.convert(options)
    packed = [n for n in mx.load(str(tmp_path / "q" / "model.safetensors")) if n.endswith(".scales")]
    assert any("switch_mlp" in name for name in packed) and all(n.startswith("language_model.") for n in packed)
    assert convert_vision_model.verify(options) and "KL" in capsys.readouterr().out


def copied(module, arrays):
    """A torch module in float32 with MLX weights under torch's names."""
    module.load_state_dict({name: torch.tensor(np.array(value)) for name, value in arrays.items()})
    return module.float().eval()


def under(model, prefix):
    from mlx.utils import tree_flatten
    return {name.removeprefix(prefix): a for name, a in tree_flatten(model.parameters()) if name.startswith(prefix)}


def torch_sam(model, pixels):
    """DeepSeek's SAM tower, of transformers' layers: pixels (1, 3, S, S) -> (1, 1024, S/64, S/64)."""
    from transformers.models.sam import modeling_sam as sam
    config = sam.SamVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=1024,
                                 mlp_dim=64, window_size=14, global_attn_indexes=[1], layer_norm_eps=1e-6)
    config._attn_implementation = "eager"
    ours = under(model, "sam_model.")
    convolve = lambda x, name, **how: torch.nn.functional.conv2d(
        x, torch.tensor(np.array(ours[f"{name}.weight"].transpose(0, 3, 1, 2))), **how)
    bias = torch.tensor(np.array(ours["patch_embed.proj.bias"]))
    x = convolve(pixels, "patch_embed.proj", stride=16) + bias[:, None, None]
    table = torch.tensor(np.array(ours["pos_embed"])).permute(0, 3, 1, 2)
    x = x + torch.nn.functional.interpolate(table, size=x.shape[2:], mode="bicubic", antialias=True)
    x = x.permute(0, 2, 3, 1)
    for n, window in enumerate((14, 0)):
        names = under(model, f"sam_model.blocks.{n}.").items()
        layer = copied(sam.SamVisionLayer(config, window), {k.replace("norm", "layer_norm"): v for k, v in names})
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    norm = lambda x, n: torch.nn.functional.layer_norm(
        x.permute(0, 2, 3, 1), (256,), *(torch.tensor(np.array(ours[f"neck.{n}.{k}"])) for k in ("weight", "bias")),
        eps=1e-6).permute(0, 3, 1, 2)
    x = norm(convolve(x.permute(0, 3, 1, 2), "neck.0"), 1)
    x = norm(convolve(x, "neck.2", padding=1), 3)
    return convolve(convolve(x, "net_2", stride=2, padding=1), "net_3", stride=2, padding=1)


def torch_clip(model, patches):
    """DeepSeek's CLIP tower, of transformers' layers: patches (1, 1024, s, s) -> (1, 1 + s s, 1024)."""
    from transformers.models.clip import modeling_clip as clip
    config = clip.CLIPVisionConfig(hidden_size=1024, intermediate_size=32, num_attention_heads=16,
                                   hidden_act="quick_gelu", layer_norm_eps=1e-5)
    config._attn_implementation = "eager"
    ours = {name: torch.tensor(np.array(value)) for name, value in under(model, "vision_model.").items()}
    table = ours["embeddings.position_embedding.weight"]
    grid = table[1:].reshape(1, 16, 16, 1024).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=patches.shape[2:], mode="bicubic", antialias=True)
    x = torch.cat([ours["embeddings.class_embedding"].reshape(1, 1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + torch.cat([table[:1][None], grid.flatten(2).transpose(1, 2)], 1)
    x = torch.nn.functional.layer_norm(x, (1024,), ours["pre_layrnorm.weight"], ours["pre_layrnorm.bias"], eps=1e-5)
    weights = {}
    for name, value in under(model, "vision_model.transformer.layers.0.").items():
        if "qkv_proj" in name:
            weights |= {name.replace("qkv", letter): part for letter, part in zip("qkv", mx.split(value, 3))}
        else:
            weights[name] = value
    x = copied(clip.CLIPEncoderLayer(config), weights)(x, None)
    return x[0] if isinstance(x, tuple) else x


@pytest.mark.parametrize("side", [1024, 640])       # a whole image, and a crop: the position tables are resized
def test_deepseeks_towers_compute_what_torch_does(deepseek, side):
    model = load_vision_model(deepseek / "mlx")[0]
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        sam = torch_sam(model, torch.tensor(pixels))
        clip = torch_clip(model, sam)
    ours = model.sam_model(mx.array(pixels.transpose(0, 2, 3, 1)))
    for mine, theirs in ((ours.transpose(0, 3, 1, 2), sam), (model.vision_model(mx.array(pixels), ours), clip)):
        theirs = theirs.numpy()
        assert mine.shape == theirs.shape and np.abs(theirs).max() > 1
        assert np.abs(np.array(mine) - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_deepseeks_experts_and_attention_compute_what_transformers_do(deepseek):
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.llama import modeling_llama as llama
    model = load_vision_model(deepseek / "mlx")[0]
    x = np.random.default_rng(0).standard_normal((1, 9, 64)).astype(np.float32)
    ours = under(model, "language_model.model.layers.1.mlp.")
    gate, up, down = (ours[f"switch_mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    packed = {"experts.gate_up_proj": mx.concatenate([gate, up], axis=1), "experts.down_proj": down}
    config = v2.DeepseekV2Config(hidden_size=64, moe_intermediate_size=64, n_routed_experts=4, n_shared_experts=2,
                                 num_experts_per_tok=2, topk_method="greedy", routed_scaling_factor=1.0)
    config._experts_implementation = "eager"
    experts = copied(v2.DeepseekV2Moe(config), packed | {k: v for k, v in ours.items() if "switch_mlp" not in k})
    flat = llama.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=4,
                             rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    flat._attn_implementation = "eager"
    layer = copied(llama.LlamaDecoderLayer(flat, 0), under(model, "language_model.model.layers.0."))
    places = torch.arange(9)[None]
    with torch.no_grad():
        angles = llama.LlamaRotaryEmbedding(flat)(torch.tensor(x), places)
        causal = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        dense = layer(torch.tensor(x), attention_mask=causal, position_ids=places, position_embeddings=angles)
        theirs = [experts(torch.tensor(x)), dense[0] if isinstance(dense, tuple) else dense]
    layers = model.language_model.model.layers
    for mine, reference in zip([layers[1].mlp(mx.array(x)), layers[0](mx.array(x), mask="causal")], theirs):
        assert np.abs(np.array(mine) - reference.numpy()).max() < 1e-4


def test_deepseeks_prompt_is_start_images_newline_instruction(deepseek):
    session = greedy(deepseek / "mlx")
    image = open_image(deepseek / "0.png")
    inputs = make_inputs("deepseekocr", session.processor, [user_message(" Free OCR. ")], [image])
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == 0 and set(ids[1:274]) == {4} and session.tokenizer.decode(ids[274:]) == "\nFree OCR."


# ---- the documents ---------------------------------------------------------------------------------------------------

def section(name):
    return (ROOT / "utils" / "README.md").read_text().split(f"## {name}")[-1].split("\n## ")[0]


@pytest.mark.parametrize("module", [convert_vision_model, inference_vision])
def test_every_option_is_in_the_readmes_table(module, capsys):
    with pytest.raises(SystemExit):
        module.parse(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("options:")[1])) - {"--help"}
    told = set(re.findall(r"^\| `?(?:-q`, `)?(--[a-z-]+)", section(f"{module.__name__.split('.')[-1]}.py"), re.M))
    assert told == options


def test_the_readmes_commands_run_in_their_order(place, tmp_path, monkeypatch):
    (tmp_path / "utils").symlink_to(ROOT / "utils")
    shutil.copytree(place / "qwen2_vl", tmp_path / "hf_vision_model")
    for name in ("a.png", "b.png"):
        shutil.copy(place / name, tmp_path / name)
    blocks = [section(name).split("```text\n")[1].split("```")[0]
              for name in ("convert_vision_model.py", "inference_vision.py")]
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    for line in "".join(blocks).splitlines():
        words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(words[1], run_name="__main__")
        assert not end.value.code, line
    signal.signal(signal.SIGTERM, handler)


def test_the_hub_commands_are_understood():
    text = section("convert_vision_model.py") + (ROOT / "docs" / "vision.md").read_text()
    commands = re.findall(r"^python utils/convert_vision_model.py (.*?)(?: +#.*)?$", text, re.M)
    assert len(commands) > 4
    for line in commands:
        convert_vision_model.parse(shlex.split(line))
