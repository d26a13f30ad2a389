"""Opening a vision-language model directory on mlx-vlm so that nothing is wrong in silence: the config is normalised
(utils/vision_config.py), safetensors headers are checked against their files, every unexpected key is listed and a
missing weight is refused. No file of the directory runs code."""

import contextlib
import importlib
import io
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_grpo import UserError
from mlx_grpo.checked_load import KeyReport, check_files, read_json
from mlx_grpo.files import check_free_space
from mlx_grpo.hub_files import PATTERNS, hub_trouble
from mlx_grpo.vision_config import family_of, import_mlx_vlm, normalize_vision_config
from mlx_grpo.vision_deepseek import as_published

PROCESSORS = {      # family: (module of mlx_vlm.models, class)
    "qwen2_vl": ("qwen2_vl.processing_qwen2_vl", "Qwen2VLProcessor"),
    "qwen2_5_vl": ("qwen2_5_vl.processing_qwen2_5_vl", "Qwen2_5_VLProcessor"),
    "qwen3_vl": ("qwen3_vl.processing_qwen3_vl", "Qwen3VLProcessor"),
    "deepseekocr": ("deepseekocr.processing_deepseekocr", "DeepseekOCRProcessor"),
}


def fetch_vision_model(name, revision=None):
    """The local directory of a vision-language model named by a directory or a hub id (owner/name). A download starts
    only once its config.json is of a supported architecture and the disk has room. Raises UserError in one line."""
    path = Path(name).expanduser()
    if path.is_dir():
        if revision:
            raise UserError(f"{name} is a directory here, so --revision {revision} has no meaning; leave it away")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
        raise UserError(f"{name}: " + ("a file; give the directory that holds it" if path.is_file() else
                                       "no such directory; check the path"))
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import DryRunError, HFValidationError, HTTPError
    wanted = {"revision": revision, "allow_patterns": PATTERNS}
    try:
        normalize_vision_config(read_json(hf_hub_download(name, "config.json", revision=revision)))
        with contextlib.suppress(DryRunError):      # without the hub, what is cached will do
            files = snapshot_download(name, dry_run=True, **wanted)
            needed = sum(file.file_size or 0 for file in files if file.will_download)
            check_free_space(constants.HF_HUB_CACHE, needed, f"downloading {name}")
        return Path(snapshot_download(name, **wanted))
    except (HFValidationError, HTTPError, OSError) as error:
        raise UserError(f"{name}: {hub_trouble(error, revision)}") from error


def load_vision_model(path, lazy=False):
    """(model, config, KeyReport) of a directory: mlx-vlm's model, the normalised config it was built from, and how the
    names met. With `lazy` the weights stay in their files until they are used. Raises UserError."""
    import_mlx_vlm()
    from mlx_vlm.utils import get_model_and_args, sanitize_weights, update_module_configs
    path = Path(path)
    check_files(path)
    config = normalize_vision_config(read_json(path / "config.json"))
    if config.get("quantization_config") and "quantization" not in config:
        method = config["quantization_config"].get("quant_method", "another program")
        raise UserError(f"{path} is quantised by {method}; use its original in floats")
    if (path / "generation_config.json").is_file():
        ends = read_json(path / "generation_config.json").get("eos_token_id")
        config |= {} if ends is None else {"eos_token_id": ends}
    architecture, family = get_model_and_args({"model_type": config["model_type"]})
    built = build_config(architecture, config, update_module_configs)
    model = architecture.Model(built)
    weights = {}
    for file in sorted(path.glob("model*.safetensors")):
        weights |= mx.load(str(file))
    weights = sanitize_weights(model, weights)
    weights = sanitize_weights(architecture.VisionModel, weights, built.vision_config)
    weights = sanitize_weights(architecture.LanguageModel, weights, built.text_config)
    quantize_as_stored(model, config.get("quantization"), weights)
    report = install_weights(path, family, model, weights)
    if family == "deepseekocr":
        as_published(model)
    if not lazy:
        mx.eval(model.parameters())
    model.eval()
    model.source_path = str(path)
    return model, config, report


def build_config(architecture, config, update_module_configs):
    """mlx-vlm's configuration object. Raises UserError where a setting is missing or refused."""
    work = normalize_vision_config(config)      # a copy: from_dict writes into what it is given
    try:
        built = architecture.ModelConfig.from_dict(work)
        return update_module_configs(built, architecture, work, ["text", "vision", "projector"])
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"config.json isn't what mlx-vlm's {config['model_type']} reads: {error}; use the "
                        "configuration that the model's authors published") from error


def quantize_as_stored(model, quantization, weights):
    """Quantise (in place) the modules that have scales among the weights."""
    if quantization:
        choose = lambda name, module: f"{name}.scales" in weights and quantization.get(name, True)
        nn.quantize(model, quantization["group_size"], quantization["bits"], class_predicate=choose)


def install_weights(path, family, model, weights):
    """Put the weights in. Returns the KeyReport. Raises UserError for other shapes and where one is missing (even one
    that starts at a constant: a router of zeros would run)."""
    current = dict(tree_flatten(model.parameters()))
    for name in sorted(set(current) & set(weights)):
        if current[name].shape != weights[name].shape:
            raise UserError(f"{path}: {name} has shape {list(weights[name].shape)}, and mlx-vlm's {family} makes it "
                            f"{list(current[name].shape)} from config.json; the two belong to different models")
    missing, report = sorted(set(current) - set(weights)), KeyReport(unexpected=sorted(set(weights) - set(current)))
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        remedy = "if its embedding serves as the head, set tie_word_embeddings to true in config.json" \
            if missing == ["language_model.lm_head.weight"] else "the checkpoint is incomplete; download it again"
        raise UserError(f"{path}: no weights for {', '.join(missing[:4])}{more}; {remedy}")
    model.load_weights([(name, weights[name]) for name in weights if name in current], strict=False)
    return report


def load_processor(path, family, tokenizer):
    """mlx-vlm's processor of a directory; `tokenizer`: used where the processor doesn't open one itself. Raises
    UserError."""
    path = Path(path).resolve()      # a relative path looks like a hub name, where mlx-vlm would ask for files
    module, name = PROCESSORS[family]
    Processor = getattr(importlib.import_module(f"mlx_vlm.models.{module}"), name)
    files = [path / name for name in ("preprocessor_config.json", "processor_config.json") if (path / name).is_file()]
    if not files:
        raise UserError(f"{path} has neither preprocessor_config.json nor processor_config.json, which tell how images "
                        "are cut; copy them from the model it was made from")
    if family != "deepseekocr":
        return Processor.from_pretrained(str(path))
    settings = {key: value for file in reversed(files) for key, value in read_json(file).items()}
    names = ("candidate_resolutions", "patch_size", "downsample_ratio", "image_mean", "image_std", "normalize",
             "image_token", "pad_token")
    given = {key: settings[key] for key in names if key in settings}
    with contextlib.redirect_stdout(io.StringIO()):     # it tells of every token that it adds
        return Processor(getattr(tokenizer, "_tokenizer", tokenizer), **given)      # not mlx-lm's wrapper of it


def family_of_directory(path):
    """The architecture of a directory, from its config.json."""
    return family_of(read_json(Path(path) / "config.json"))
