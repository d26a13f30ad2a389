"""A model's config.json as mlx-lm's classes read it.

mlx-lm builds a model from the fields its architecture's ModelArgs declares and ignores every other key. transformers 5
writes the rotary settings into one dictionary, `rope_parameters`; an architecture that declares `rope_theta` and
`rope_scaling` instead falls back to its defaults without a word, and the logits are wrong. `normalize_config` puts each
setting under the names that the architecture declares; it looks at the classes, so it knows no list of architectures.

    normalize_config(config)      -> the config to build the model from
    unsupported_reason(config)    -> None, or one line that says why mlx-lm can't run it and what is near
    config_notes(config)          -> what mlx-lm leaves out of a model that it runs
"""

import copy
import difflib
import functools
import importlib
import inspect
import math
import pkgutil
import re
import sys
from pathlib import Path

# Names under which an architecture may declare a setting; the first is what transformers calls it.
THETA_FIELDS = ("rope_theta", "rotary_emb_base", "rope_embedding_base")
LOCAL_THETA_FIELDS = ("rope_local_base_freq", "swa_rope_theta", "rope_local_theta")
ROTARY_FRACTION_FIELDS = ("partial_rotary_factor", "rotary_pct")
PLAIN_ROPE = ("default", "mrope", "axial")      # no rescaling of positions; mrope is plain rotary on text

ENCODERS = {"albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm",
            "eurobert", "flaubert", "funnel", "layoutlm", "longformer", "megatron-bert", "mobilebert", "modernbert",
            "mpnet", "mra", "nomic_bert", "nystromformer", "rembert", "roberta", "roformer", "squeezebert",
            "xlm-roberta", "xlm-roberta-xl", "xlm", "xlnet", "yoso", "clip", "siglip", "vit", "wav2vec2"}
ENCODER_DECODERS = {"bart", "bigbird_pegasus", "blenderbot", "encoder-decoder", "led", "longt5", "m2m_100", "marian",
                    "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet",
                    "seamless_m4t", "speech_to_text", "switch_transformers", "t5", "t5gemma", "udop", "umt5", "whisper"}
HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice",
            "ForMaskedLM", "ForRewardModel", "RewardModel")


def normalize_config(config):
    """A copy of a config.json dictionary with every setting under the name that the architecture's ModelArgs reads.

    Mended, for the architecture and for the text part of a multimodal one (`text_config`):
    - rope_parameters (transformers 5), flat or one per layer type, into rope_theta, rope_scaling (None for a plain
      rotary embedding, with its kind under both `rope_type` and `type`), partial_rotary_factor, the theta of the
      sliding layers (rope_local_base_freq of Gemma 3 and its like), and GPT-NeoX's rotary_emb_base and rotary_pct;
    - as transformers does, a non-empty rope_scaling comes before rope_parameters, and what is inside them before what
      stands beside them;
    - yarn's attention_factor, which mlx-lm doesn't read, as the mscale that gives it;
    - tie_word_embeddings of a multimodal model, kept at the top by transformers 5, for its text part;
    - required settings that transformers 5 saves under another name, by its own table of names (the num_experts of
      Qwen3-MoE as num_local_experts), or not at all: head_dim where it is hidden_size / heads, GPT-2's n_ctx.
    Keys that the architecture reads as they are stay as they are; a config of an architecture that mlx-lm doesn't have
    comes back unchanged. Nothing is written into `config`."""
    config = copy.deepcopy(config)
    fields = declared_fields(config)
    if fields is None:
        return config
    parts = [config] + ([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])
    for part in parts:
        normalize_rope(part, set(fields))
        fill_required(part, [name for name, required in fields.items() if required and part.get(name) is None])
    if len(parts) == 2 and "tie_word_embeddings" in config:
        config["text_config"].setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    return config


def normalize_rope(part, fields):
    """Write the rotary settings of one config (changed in place) under the names in `fields`."""
    full, sliding = rope_settings(part)
    if not full:
        return
    theta = full.get("rope_theta", part.get("rope_theta"))
    for name in fields.intersection(THETA_FIELDS) if theta is not None else ():
        part[name] = theta
    if sliding.get("rope_theta") is not None:
        for name in fields.intersection(LOCAL_THETA_FIELDS):
            part[name] = sliding["rope_theta"]
    fraction = full.get("partial_rotary_factor")
    for name in fields.intersection(ROTARY_FRACTION_FIELDS) if fraction is not None else ():
        part[name] = fraction
    if "rotary_dim" in fields and "rotary_dim" not in part and "num_attention_heads" in part:
        head_dim = part.get("head_dim") or part["hidden_size"] // part["num_attention_heads"]
        part["rotary_dim"] = int(head_dim * (1.0 if fraction is None else fraction))
    if "rope_scaling" in fields:
        part["rope_scaling"] = scaling_of(full)


def fill_required(part, missing):
    """Give the settings named in `missing` the value that the config (changed in place) has under another name."""
    from transformers import CONFIG_MAPPING
    kind = part.get("model_type")
    names = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    for name in missing:
        if names.get(name) in part:
            part[name] = part[names[name]]
    if "n_ctx" in missing and "n_positions" in part:
        part["n_ctx"] = part["n_positions"]
    if "head_dim" in missing and {"hidden_size", "num_attention_heads"} <= set(part):
        part["head_dim"] = part["hidden_size"] // part["num_attention_heads"]


def rope_settings(part):
    """(settings of the full-attention layers, settings of the sliding ones), each a dictionary and empty where the
    config has none. A flat config has the same settings for both."""
    settings = part.get("rope_scaling") or part.get("rope_parameters") or {}
    if not isinstance(settings, dict):
        return {}, {}
    by_layer = {key: value for key, value in settings.items() if isinstance(value, dict)}
    if not by_layer:
        settings = {"rope_theta": (part.get("rope_parameters") or {}).get("rope_theta"), **settings}
        settings = {key: value for key, value in settings.items() if value is not None}
        return settings, settings
    first = next(iter(by_layer.values()))
    return by_layer.get("full_attention", first), by_layer.get("sliding_attention", {})


def scaling_of(settings):
    """mlx-lm's rope_scaling: None for a plain rotary embedding, else the settings without theta, their kind under both
    names that architectures look for, factors as floats."""
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind in PLAIN_ROPE:
        return None
    scaling = {key: value for key, value in settings.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaling |= {"rope_type": kind, "type": kind}
    if "factor" in scaling:
        scaling["factor"] = float(scaling["factor"])
    attention = scaling.get("attention_factor")
    own_scale = {"mscale", "mscale_all_dim"} & set(scaling)
    if kind == "yarn" and attention is not None and not own_scale and scaling["factor"] > 1:
        scaling["mscale"] = (attention - 1) / (0.1 * math.log(scaling["factor"]))   # YarnRoPE: 0.1 mscale ln factor + 1
    return scaling


# ---- what mlx-lm has ----

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim",
         "max_position_embeddings")

def architecture_module(config):
    """The module of mlx_lm.models that builds this config, None where there is none (or it can't be imported: OLMo's
    first generation ends the program where hf_olmo is missing)."""
    from mlx_lm.utils import _get_classes
    if not isinstance(config.get("model_type"), str):
        return None
    try:
        return sys.modules[_get_classes(config)[0].__module__]
    except (ValueError, AttributeError, SystemExit):
        return None


def related_modules(module):
    """`module` and the mlx_lm.models modules whose names it uses (gemma3 builds its text part with gemma3_text)."""
    used = {value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            for value in vars(module).values()}
    names = {name for name in used if isinstance(name, str) and name.startswith("mlx_lm.models.")}
    return [module] + [sys.modules[name] for name in sorted(names - {module.__name__})]


def declared_fields(config):
    """{name: whether it is required} of the settings that the architecture's argument classes read, its text part's
    included; None for an architecture that mlx-lm doesn't have."""
    from mlx_lm.models.base import BaseModelArgs
    module = architecture_module(config)
    if module is None:
        return None
    classes = [value for each in related_modules(module) for value in vars(each).values()
               if inspect.isclass(value) and issubclass(value, BaseModelArgs) and value is not BaseModelArgs]
    parameters = [parameter for each in classes for parameter in inspect.signature(each).parameters.values()]
    return {p.name: any(q.default is q.empty for q in parameters if q.name == p.name) for p in parameters}


def uses(config, field):
    """Whether the architecture's code reads `field`, beyond declaring it (Mixtral ignores the rope_scaling it has)."""
    sources = (inspect.getsource(each) for each in related_modules(architecture_module(config)))
    return any(re.search(rf"\.{field}\b", source) for source in sources)


@functools.cache
def supported_architectures():
    """Sorted model types that mlx-lm can build here, aliases included."""
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING
    found = set()
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        source = (Path(info.module_finder.path) / f"{info.name}.py").read_text(encoding="utf-8")
        builds = "class ModelArgs" in source and re.search(r"class Model\(|import .*\bModel\b", source)
        if builds and ("hf_olmo" not in source or importlib.util.find_spec("hf_olmo")):
            found.add(info.name)
    return sorted(found | {alias for alias, target in MODEL_REMAPPING.items() if target in found})


def unsupported_reason(config):
    """None where mlx-lm can run a model of this config, else one line: what it is and the nearest supported choice.
    A config that brings its own `model_file` is left to the caller."""
    kind = config.get("model_type")
    if config.get("model_file"):
        return None
    if not isinstance(kind, str) or not kind:
        return ("config.json has no model_type, so it isn't a language model's (an adapter, a tokenizer or a dataset "
                "perhaps); give the directory or repository of a full model")
    head = next((name for name in config.get("architectures") or [] if str(name).endswith(HEADLESS)), None)
    supported = supported_architectures()
    if kind in ENCODER_DECODERS or (config.get("is_encoder_decoder") and kind not in supported):
        return f"{kind} is an encoder-decoder; mlx-lm runs decoders only: choose one such as {nearest(kind, supported)}"
    if kind in ENCODERS or head:
        what = f"{kind} is encoder-only" if kind in ENCODERS else f"{head} is a classifier"
        return f"{what} and writes no text; mlx-lm runs decoders only: choose one such as {nearest(kind, supported)}"
    if architecture_module(config) is None:
        return f"mlx-lm has no architecture {kind!r}; the nearest it has: {nearest(kind, supported)} (--list shows all)"
    return value_error(config) or args_error(config, kind) or rope_error(config, kind)


def value_error(config):
    """One line where a size isn't a positive whole number, an end token no token id, or a quantisation not given whole."""
    for part in (config, config.get("text_config")):
        for name in SIZES if isinstance(part, dict) else ():
            value = part.get(name)
            if value is not None and not isinstance(value, list) and (type(value) is not int or value < 1):
                return (f"config.json: {name} must be a whole number above 0, got {value!r}; use the configuration that the "
                        "model's authors published")
    ends = config.get("eos_token_id")
    for value in ends if isinstance(ends, list) else [ends]:
        if value is not None and (type(value) is not int or value < 0):
            return (f"eos_token_id (config.json, generation_config.json) must be a token id or a list of them, got {value!r}"
                    "; set it to the id of the end token")
    quantization = config.get("quantization")
    if quantization is not None:
        for name in ("bits", "group_size"):
            value = quantization.get(name) if isinstance(quantization, dict) else None
            if type(value) is not int or value < 1:
                return f"config.json: quantization needs a whole number as {name}, got {value!r}; convert the model again"
    return None


def args_error(config, kind):
    """One line where the architecture's ModelArgs doesn't take the config (a required setting missing, or refused)."""
    from mlx_lm.utils import _get_classes
    try:
        _get_classes(config)[1].from_dict(normalize_config(config))
    except (TypeError, ValueError, KeyError) as error:
        text = str(error)
        missing = re.findall(r"'(\w+)'", text) if "missing" in text else []
        what = "lacks " + ", ".join(missing) if missing else f"has a value that it refuses: {text}"
        return (f"config.json isn't what mlx-lm's {kind} reads: it {what}; use the configuration that the model's "
                "authors published, or a conversion from mlx-community")


def rope_error(config, kind):
    """One line where the config rescales positions in a way that this architecture's code would ignore."""
    for part in (config, config.get("text_config")):
        full, sliding = rope_settings(part) if isinstance(part, dict) else ({}, {})
        scaling = scaling_of(full)
        own = uses(config, "rope_parameters")
        if scaling and not own and not uses(config, "rope_scaling"):
            return (f"the config asks for rope_scaling of type {scaling['type']!r}, which mlx-lm's {kind} doesn't "
                    "apply: its logits would be wrong; choose a checkpoint without it")
        thetas = {full.get("rope_theta"), sliding.get("rope_theta", full.get("rope_theta"))}
        if len(thetas) == 2 and not own and not any(uses(config, name) for name in LOCAL_THETA_FIELDS):
            return (f"the config gives sliding layers a rope_theta of their own ({sliding['rope_theta']}), which "
                    f"mlx-lm's {kind} doesn't read: its logits would be wrong")
    return None


def config_notes(config):
    """What mlx-lm leaves out of a model that it runs otherwise: a list of lines, empty for most models."""
    notes = []
    part = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    window = part.get("sliding_window")
    applied = uses(config, "sliding_window") and (part.get("model_type") != "mistral" or part.get("layer_types"))
    if window and part.get("use_sliding_window", True) and not applied:
        notes.append(f"attention windows of {window} tokens aren't applied by mlx-lm's {config['model_type']}: "
                     "contexts longer than that differ from transformers")
    if (scaling_of(rope_settings(part)[0]) or {}).get("type") in ("longrope", "su"):
        notes.append("mlx-lm uses longrope's long factors at every length, transformers the short ones up to "
                     f"{part.get('original_max_position_embeddings', 'the original')} tokens: short contexts differ")
    return notes


def nearest(kind, supported):
    """Up to three supported names near `kind`, else three common ones; "qwen3, llama, gemma3"."""
    return ", ".join(difflib.get_close_matches(kind, supported, n=3, cutoff=0.5) or ["qwen3", "llama", "gemma3"])
