"""A vision-language model's config.json as mlx-vlm reads it, and which architectures there are.

The hub's Qwen2-VL and Qwen2.5-VL have flat configs (the language model's settings at the top), transformers 5 saves
nested ones (`text_config`, rotary settings in `rope_parameters`, the tower's model_type "qwen2_vl_vision"). mlx-vlm
0.7 takes the first kind only; `normalize_vision_config` turns both into it. DeepSeek-OCR's hub config calls itself
deepseek_vl_v2, which in mlx-vlm is another model.
"""

import copy

from mlx_grpo import UserError
from mlx_grpo.vision_deepseek import CLIP_NORM_EPS

ACTIVATIONS = {     # family: (activation of the text part, of the vision tower), as mlx-vlm has them built in
    "qwen2_vl": ("silu", "quick_gelu"),
    "qwen2_5_vl": ("silu", "silu"),
    "qwen3_vl": ("silu", "gelu_pytorch_tanh"),
    "deepseekocr": ("silu", None),
}
NAMES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "deepseekocr": "DeepSeek-OCR"}
FLAT = ("qwen2_vl", "qwen2_5_vl")           # the language model's settings at the top of config.json
OUTSIDE_TEXT = ("vision_config", "text_config", "architectures", "model_type", "transformers_version", "quantization",
                "quantization_config")


def import_mlx_vlm():
    """The package mlx_vlm. Raises UserError where it isn't installed."""
    try:
        import mlx_vlm
    except ImportError as error:
        raise UserError(f"vision-language models need mlx-vlm ({error.name} is missing): "
                        "pip install -e '.[vision]'") from error
    return mlx_vlm


def family_of(config):
    """The key of NAMES that a config.json belongs to. Raises UserError, naming what it is, for any other."""
    kind = config.get("model_type")
    architectures = config.get("architectures") or []
    if kind == "deepseek_vl_v2" and "DeepseekOCRForCausalLM" in architectures:
        return "deepseekocr"
    if kind in NAMES:
        return kind
    known = ", ".join(NAMES)
    if not isinstance(kind, str) or not kind:
        raise UserError(f"config.json has no model_type, so it isn't a model's; the architectures here: {known}")
    if "vision_config" not in config:
        raise UserError(f"{kind} has no vision part; for language models use utils/convert_model.py and "
                        f"utils/inference.py (vision-language architectures here: {known})")
    raise UserError(f"the vision-language architecture {kind!r} isn't supported here, because its results aren't "
                    f"tested; choose one of {known}")


def normalize_vision_config(config):
    """A copy of a config.json dictionary that mlx-vlm builds the right model from. Nothing is written into `config`.
    Raises UserError for an architecture, an activation or a kind of rotary embedding that would come out wrong."""
    family = family_of(config)
    config = copy.deepcopy(config) | {"model_type": family}
    if family == "deepseekocr":
        config.setdefault("language_config", config.pop("text_config", None))
        if not isinstance(config["language_config"], dict) or not isinstance(config.get("vision_config"), dict):
            raise UserError("config.json of a DeepSeek-OCR model needs language_config and vision_config; use the one "
                            "that its authors published")
        config["vision_config"].setdefault("layer_norm_eps", CLIP_NORM_EPS)
        check_activations(family, config["language_config"], config["vision_config"])
        return config
    vision = config.setdefault("vision_config", {})
    vision["model_type"] = family
    text = config.pop("text_config", None) or {key: value for key, value in config.items() if key not in OUTSIDE_TEXT}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    text["tie_word_embeddings"] = config["tie_word_embeddings"] = tied
    normalize_mrope(config, text, family)
    check_activations(family, text, vision)
    if family in FLAT:
        return config | {key: value for key, value in text.items() if key != "model_type"}
    return config | {"text_config": text}


def normalize_mrope(config, text, family):
    """Write the rotary settings of the text part (changed in place) as rope_theta and rope_scaling."""
    settings = text.pop("rope_parameters", None) or {}
    settings = {"rope_theta": text.get("rope_theta")} | settings | (text.get("rope_scaling") or {})
    config.pop("rope_parameters", None)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    kind = settings.get("type", kind) if kind == "default" else kind
    if kind not in ("default", "mrope"):
        raise UserError(f"the config asks for a rotary embedding of type {kind!r}, which mlx-vlm's {family} doesn't "
                        "have: its logits would be wrong; choose a checkpoint without it")
    if not settings.get("mrope_section"):
        raise UserError(f"the config of {family} has no mrope_section, which says how positions in time, height and "
                        "width share a head; use the configuration that the model's authors published")
    if settings["rope_theta"] is not None:
        text["rope_theta"] = settings["rope_theta"]
    text["rope_scaling"] = {"mrope_section": settings["mrope_section"]}
    if family in FLAT:
        text["rope_scaling"] |= {"type": "mrope"}
    else:
        text["rope_scaling"] |= {"rope_type": "default", "mrope_interleaved": settings.get("mrope_interleaved", True)}


def check_activations(family, text, vision):
    """Raises UserError where a config asks for another activation than the one that mlx-vlm has built in."""
    for part, where, ours in ((text, "language model", ACTIVATIONS[family][0]),
                              (vision, "vision tower", ACTIVATIONS[family][1])):
        asked = part.get("hidden_act")
        if ours and asked and asked != ours:
            raise UserError(f"the config asks for {asked!r} in the {where}, and mlx-vlm's {family} computes {ours!r}; "
                            "its logits would be wrong")


def text_settings(config):
    """The language model's settings in a normalised config."""
    return config.get("text_config") or config.get("language_config") or config


def vision_notes(config):
    """What mlx-vlm leaves out of a model that it runs otherwise: a list of lines."""
    text = text_settings(config)
    window = text.get("sliding_window")
    if window and text.get("use_sliding_window"):
        return [f"attention windows of {window} tokens aren't applied by mlx-vlm's {config['model_type']}: contexts "
                "longer than that differ from transformers"]
    return []
