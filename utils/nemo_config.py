"""
A model's configuration between Hugging Face's config.json and the three NeMo containers.

In the middle stands the spec, a flat dict in Megatron's words (num_layers, hidden_size, ffn_hidden_size,
num_attention_heads, num_query_groups, kv_channels, vocab_size, seq_length, layernorm_epsilon, rotary_base,
rotary_percent, rope, sliding_window, ...); a sliding window is Hugging Face's: W keys, the token's own included.

    config.json  --spec_from_hf-->  spec  --to_nemo2, to_bridge, to_nemo1 (nemo_config_out)-->  the container's words
    config.json  <--hf_from_spec--  spec  <--from_megatron, from_nemo1 (nemo_config_in)-------
"""

from difflib import get_close_matches

from mlx_grpo import UserError
from mlx_grpo.nemo_families import family_of

LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
DTYPES = ("float32", "bfloat16", "float16")
# In config.json; silu elsewhere. Gemma's first files say gelu where transformers takes the tanh form.
ACTIVATION_NAMES = {"gemma": ("gelu_pytorch_tanh", "gelu"), "gpt_neox": ("gelu",), "falcon": ("gelu",)}
NUMBERS = ("layernorm_epsilon", "init_method_std", "attention_dropout", "rotary_base", "rotary_percent")


# ---- config.json -> spec ----

def rope_of(config, default_theta):
    """(theta, rope dict, partial factor or None) of a config.json in the form of transformers 4 or 5."""
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise UserError("config.json: rope_parameters and rope_scaling must be objects or null")
    merged = scaling | parameters
    theta = first(parameters.get("rope_theta"), config.get("rope_theta"), config.get("rotary_emb_base"), default_theta)
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind == "default":
        rope = {"type": "default"}
    elif kind == "linear":
        rope = {"type": "linear", "factor": merged.get("factor")}
    elif kind == "llama3":
        rope = {"type": "llama3", "factor": merged.get("factor")} | {k: merged.get(k, v) for k,
                                                                     v in LLAMA3_FIXED.items()}
    else:
        raise UserError(f"rope type {kind!r} is not supported: Megatron has no counterpart that gives the same "
                        "numbers; supported: default, linear, llama3")
    partial = first(parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"),
                    config.get("rotary_pct"))
    return theta, rope, partial


def first(*values):
    """The first value that isn't None, None if all are."""
    return next((value for value in values if value is not None), None)


def refuse_options(family, config):
    """Raises UserError for a config.json option under which the model computes something Megatron's layer doesn't."""
    name = family.name
    usual = ACTIVATION_NAMES.get(name, ("silu",))
    activation = config.get("activation" if name == "falcon" else "hidden_act") or usual[0]
    reasons = (
        (config.get("quantization_config"), "its weights are quantised; convert the unquantised model"),
        (name == "gpt_neox" and config.get("use_parallel_residual", True),
         "parallel residual (use_parallel_residual: true, the default) is not supported by Megatron's GPT layer"),
        (name == "gpt_neox" and not config.get("attention_bias", True), "attention_bias: false has no settled mapping"),
        (name == "falcon" and config.get("alibi"), "alibi positions are not supported by Megatron's GPT layer"),
        (name == "falcon" and config.get("new_decoder_architecture") and config.get("num_ln_in_parallel_attn") == 1,
         "the new decoder with one layer norm (num_ln_in_parallel_attn: 1) has no mapping"),
        (name in ("llama", "qwen3", "gemma") and config.get("attention_bias"),
         "attention_bias: true has no settled mapping"),
        (name == "llama" and config.get("mlp_bias"), "mlp_bias: true has no settled mapping"),
        (activation not in usual, f"its activation {activation!r} is not the family's in Megatron"),
        (name in ("qwen2", "qwen3") and config.get("use_sliding_window"),
         "use_sliding_window: true has no counterpart in NeMo"),
    )
    for met, reason in reasons:
        if met:
            raise UserError(f"this {name} model is not supported: {reason}")


def spec_from_hf(config):
    """(family, spec) of a config.json. Raises UserError with the reason where the model isn't supported or a value is
    missing."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError("config.json has no model_type")
    family = family_of(config["model_type"])
    refuse_options(family, config)
    spec = {}
    for ours, key in family.hf.items():
        value = config.get(key)
        if value is None and key in config and ours == "sliding_window":
            value = None
        elif value is None:
            value = family.defaults.get(ours)
        spec[ours] = value
    heads, width = spec["num_attention_heads"], spec["hidden_size"]
    check_sizes(spec, ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"),
                {v: k for k, v in family.hf.items()})
    if family.name == "falcon":
        multi_query = config.get("multi_query", True) and not spec["new_decoder_architecture"]
        spec["num_query_groups"] = 1 if multi_query else spec["num_query_groups"]
        spec["ffn_hidden_size"] = spec["ffn_hidden_size"] or 4 * width
    spec["num_query_groups"] = spec.get("num_query_groups") or heads
    if spec.get("kv_channels") is None or family.traits.get("null_head_dim"):
        spec["kv_channels"] = config.get("head_dim") or width // heads
    if config.get("architectures") and config["architectures"] != [family.architecture]:
        raise UserError(f"config.json names {config['architectures']}, not a {family.name} language model "
                        f"(['{family.architecture}'])")
    spec["rotary_base"], spec["rope"], partial = rope_of(config, family.defaults["rotary_base"])
    spec["rotary_percent"] = family.defaults.get("rotary_percent", 1.0) if partial is None else partial
    spec["params_dtype"] = str(config.get("dtype") or config.get("torch_dtype") or "").replace("torch.", "") or None
    check_spec(family, spec)
    return family, spec


def check_sizes(spec, names, shown=None):
    """Raises UserError where one of `names` isn't a positive whole number; shown: the names the user knows them by."""
    for name in names:
        value = spec.get(name)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"the configuration's {(shown or {}).get(name, name)} is {value!r}, not a positive whole "
                            "number")


def check_spec(family, spec):
    """Raises UserError where sizes are absent or don't fit each other."""
    check_sizes(spec, (*SIZES, "seq_length"))
    if spec.get("vocab_size") is not None:            # a container may leave it to the tokenizer
        check_sizes(spec, ("vocab_size",))
    if type(spec["share_embeddings_and_output_weights"]) is not bool:
        raise UserError("the configuration's share_embeddings_and_output_weights (tie_word_embeddings) is "
                        f"{spec['share_embeddings_and_output_weights']!r}, neither true nor false")
    numbers = {name: spec.get(name) for name in NUMBERS} | {f"rope {k}": v for k, v in spec["rope"].items()
                                                            if k != "type"}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UserError(f"the configuration's {name} is {value!r}, not a number")
    window = spec.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise UserError(f"the configuration's sliding_window is {window!r}, not a positive whole number or null")
    if spec["num_attention_heads"] % spec["num_query_groups"]:
        raise UserError(f"{spec['num_attention_heads']} attention heads can't be shared by {spec['num_query_groups']} "
                        "query groups")
    if family.name == "gpt_neox" and spec["num_attention_heads"] * spec["kv_channels"] != spec["hidden_size"]:
        raise UserError("a GPT-NeoX model's hidden size must be heads x head size")
    if spec["rope"]["type"] == "llama3" and family.name != "llama":
        raise UserError(f"rope type 'llama3' is only settled for Llama, not for {family.name}")
    if family.name == "mixtral":
        check_sizes(spec, ("num_moe_experts", "moe_router_topk"))


def override(spec, changes):
    """The spec with `--model-config key=value` applied. Raises UserError for a key the spec doesn't have."""
    for name, value in changes.items():
        if name not in spec or name in ("rope",):
            near = get_close_matches(name, spec, n=1)
            raise UserError(f"--model-config: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else
                            f"; known: {', '.join(sorted(k for k in spec if k != 'rope'))}"))
        old = spec[name]
        if old is not None and type(old) is not type(value) and not (isinstance(old, float) and type(value) is int):
            raise UserError(f"--model-config: {name} must be like {old!r}, got {value!r}")
    return spec | changes


# ---- spec -> config.json ----

def hf_from_spec(family, spec, ids):
    """A config.json (the form of transformers 4, which 5 reads too) for `spec`; ids: bos/eos/pad token ids that are
    known."""
    config = {"architectures": [family.architecture], "model_type": family.model_type} | family.constants
    config |= {key: spec[ours] for ours, key in family.hf.items()}
    if family.name == "falcon":
        new = spec["new_decoder_architecture"]
        config |= {"multi_query": new or spec["num_query_groups"] == 1, "num_ln_in_parallel_attn": 2 if new else None}
    elif family.name == "gpt_neox":
        config |= {"rotary_emb_base": spec["rotary_base"], "partial_rotary_factor": spec["rotary_percent"]}
    if family.traits.get("null_head_dim") and spec["kv_channels"] * spec["num_attention_heads"] != spec["hidden_size"]:
        config["head_dim"] = spec["kv_channels"]
    if family.traits.get("layer_types"):
        config["layer_types"] = ["full_attention"] * spec["num_layers"]
    if family.traits.get("original_length"):
        config["original_max_position_embeddings"] = spec["seq_length"]
    rope = spec["rope"]
    config["rope_theta"] = spec["rotary_base"]
    config["rope_scaling"] = None if rope["type"] == "default" else {"rope_type": rope["type"]} | {
        k: v for k, v in rope.items() if k != "type"}
    config |= {"torch_dtype": spec["params_dtype"], "transformers_version": "4.53.3", "use_cache": True} | ids
    return dict(sorted(config.items()))
