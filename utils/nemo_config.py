"""
A model's configuration between Hugging Face's config.json and the three NeMo containers.

In the middle stands the spec, a flat dict in Megatron's words (num_layers, hidden_size, ffn_hidden_size, num_attention_heads,
num_query_groups, kv_channels, vocab_size, seq_length, layernorm_epsilon, rotary_base, rotary_percent, rope, sliding_window, ...);
a sliding window is Hugging Face's: W keys, the token's own included.

    config.json  --spec_from_hf-->  spec  --to_nemo2, to_bridge, to_nemo1-->  the container's configuration
    config.json  <--hf_from_spec--  spec  <--from_megatron, from_nemo1------
"""

import math
from difflib import get_close_matches

from mlx_grpo import UserError
from mlx_grpo.nemo_families import FAMILIES, family_of

LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
DTYPES = ("float32", "bfloat16", "float16")
MUST_BE = {   # options of Megatron that change the function computed and have no counterpart in the target's configuration
    "rotary_interleaved": False, "position_embedding_type": "rope", "softmax_scale": None, "multi_latent_attention": False,
    "qk_l2_norm": False, "attention_output_gate": False, "softmax_type": "vanilla", "no_rope_freq": None, "mtp_num_layers": None,
    "apply_residual_connection_post_layernorm": False, "glu_linear_offset": 0.0, "activation_func_clamp_value": None,
}
ACTIVATIONS = {"llama": {"silu"}, "gemma": {"openai_gelu", "fast_gelu", "gelu_impl"}, "gpt_neox": {"gelu"}}   # silu elsewhere

ACTIVATION_NAMES = {   # of config.json; silu elsewhere. Gemma's first files say gelu where transformers takes the tanh form
    "gemma": ("gelu_pytorch_tanh", "gelu"), "gpt_neox": ("gelu",), "falcon": ("gelu",)}


# ---- config.json -> spec ----

def rope_of(config, default_theta):
    """(theta, rope dict, partial factor or None) of a config.json in the form of transformers 4 or 5."""
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    merged = scaling | parameters
    theta = next((v for v in (parameters.get("rope_theta"), config.get("rope_theta"), config.get("rotary_emb_base")) if v is not None),
                 default_theta)
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind == "default":
        rope = {"type": "default"}
    elif kind == "linear":
        rope = {"type": "linear", "factor": merged["factor"]}
    elif kind == "llama3":
        rope = {"type": "llama3", "factor": merged["factor"]} | {k: merged.get(k, v) for k, v in LLAMA3_FIXED.items()}
    else:
        raise UserError(f"rope type {kind!r} is not supported: Megatron has no counterpart that gives the same numbers; "
                        "supported: default, linear, llama3")
    partial = next((v for v in (parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"), config.get("rotary_pct"))
                    if v is not None), None)
    return theta, rope, partial


def refuse_options(family, config):
    """Raises UserError for a config.json option under which the model computes something Megatron's layer doesn't."""
    name = family.name
    activation = config.get("activation" if name == "falcon" else "hidden_act") or ACTIVATION_NAMES.get(name, ("silu",))[0]
    reasons = (
        (config.get("quantization_config"), "its weights are quantised; convert the unquantised model"),
        (name == "gpt_neox" and config.get("use_parallel_residual", True),
         "parallel residual (use_parallel_residual: true, the default) is not supported by Megatron's GPT layer"),
        (name == "gpt_neox" and not config.get("attention_bias", True), "attention_bias: false has no settled mapping"),
        (name == "falcon" and config.get("alibi"), "alibi positions are not supported by Megatron's GPT layer"),
        (name == "falcon" and config.get("new_decoder_architecture") and config.get("num_ln_in_parallel_attn") == 1,
         "the new decoder with one layer norm (num_ln_in_parallel_attn: 1) has no mapping"),
        (name in ("llama", "qwen3", "gemma") and config.get("attention_bias"), "attention_bias: true has no settled mapping"),
        (name == "llama" and config.get("mlp_bias"), "mlp_bias: true has no settled mapping"),
        (activation not in ACTIVATION_NAMES.get(name, ("silu",)), f"its activation {activation!r} is not the family's in Megatron"),
        (name in ("qwen2", "qwen3") and config.get("use_sliding_window"), "use_sliding_window: true has no counterpart in NeMo"),
    )
    for met, reason in reasons:
        if met:
            raise UserError(f"this {name} model is not supported: {reason}")


def spec_from_hf(config):
    """(family, spec) of a config.json. Raises UserError with the reason where the model isn't supported or a value is missing."""
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
    check_sizes(spec, ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"), {v: k for k, v in family.hf.items()})
    if family.name == "falcon":
        groups = spec["num_query_groups"] if spec["new_decoder_architecture"] or not config.get("multi_query", True) else 1
        spec["num_query_groups"] = groups or heads
        spec["ffn_hidden_size"] = spec["ffn_hidden_size"] or 4 * width
    spec["num_query_groups"] = spec.get("num_query_groups") or heads
    if spec.get("kv_channels") is None or family.traits.get("null_head_dim"):
        spec["kv_channels"] = config.get("head_dim") or width // heads
    if config.get("architectures") and family.architecture not in config["architectures"]:
        raise UserError(f"config.json names {config['architectures'][0]}, which is not a {family.name} language model "
                        f"({family.architecture})")
    spec["rotary_base"], spec["rope"], partial = rope_of(config, family.defaults["rotary_base"])
    spec["rotary_percent"] = family.defaults.get("rotary_percent", 1.0) if partial is None else partial
    spec["params_dtype"] = str(config.get("dtype") or config.get("torch_dtype") or "").replace("torch.", "") or None
    check_spec(family, spec)
    return family, spec


def check_sizes(spec, names, shown=None):
    for name in names:
        value = spec.get(name)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"the configuration's {(shown or {}).get(name, name)} is {value!r}, not a positive whole number")


def check_spec(family, spec):
    """Raises UserError where sizes are absent or don't fit each other."""
    check_sizes(spec, SIZES)
    if spec["num_attention_heads"] % spec["num_query_groups"]:
        raise UserError(f"{spec['num_attention_heads']} attention heads can't be shared by {spec['num_query_groups']} query groups")
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
    """A config.json (the form of transformers 4, which 5 reads too) for `spec`; ids: bos/eos/pad token ids that are known."""
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


# ---- spec -> containers ----

def largest_power(n, limit=128):
    """The largest power of two up to `limit` that divides n."""
    return math.gcd(n, limit)


def megatron_values(family, spec):
    """The entries that nemo2's `config` and bridge's `model` share."""
    heads, width, rope, dtype = spec["num_attention_heads"], spec["hidden_size"], spec["rope"], spec["params_dtype"]
    plain = spec["kv_channels"] * heads == width and family.traits.get("null_head_dim")
    values = {name: spec[name] for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "seq_length", "layernorm_epsilon",
        "init_method_std", "attention_dropout", "rotary_base", "rotary_percent", "share_embeddings_and_output_weights")}
    values |= {"kv_channels": None if plain else spec["kv_channels"], "hidden_dropout": spec.get("hidden_dropout", 0.0),
               "seq_len_interpolation_factor": rope["factor"] if rope["type"] == "linear" else None,
               "params_dtype": {"_call_": False, "_target_": f"torch.{dtype}"}, "bf16": dtype == "bfloat16", "fp16": dtype == "float16",
               "window_size": [spec["sliding_window"], 0] if spec.get("sliding_window") else None}
    if spec.get("sliding_window"):
        values["cp_comm_type"] = "a2a"
    if family.name == "mixtral":
        values |= {"num_moe_experts": spec["num_moe_experts"], "moe_router_topk": spec["moe_router_topk"],
                   "moe_router_pre_softmax": False, "moe_aux_loss_coeff": spec["moe_aux_loss_coeff"]}
    return values


def vocabulary_rows(family, container, spec, tokenizer_length):
    """(rows of embedding and head, make_vocab_size_divisible_by, vocab_size entry) as NVIDIA's importer of the family has them.
    Where it leaves vocab_size out, NeMo takes padded(len(tokenizer)): the size is written out where that would differ."""
    V = spec["vocab_size"]
    if container == "nemo2" and family.traits.get("tokenizer_rows"):
        divisor = family.traits.get("padded_rows") or largest_power(V)
        rows = -(-V // divisor) * divisor
        if tokenizer_length and -(-tokenizer_length // divisor) * divisor == rows:
            return rows, divisor, None
        return V, divisor, V
    fixed = {("qwen2", "nemo2"): 128, ("qwen3", "nemo2"): 1187, ("falcon", "nemo1"): 128}
    return V, fixed.get((family.name, container), largest_power(V)), V


def head_copied(family, container, spec):
    """True where a tied head is written out as a copy, with sharing off, because NVIDIA's exporter reads it."""
    return spec["share_embeddings_and_output_weights"] and container in family.head_copies


def to_nemo2(family, spec, template, tokenizer_length, has_generation_config):
    """The `config` mapping of context/model.yaml, from the family's template."""
    config = template | megatron_values(family, spec)
    _, divisor, vocab_size = vocabulary_rows(family, "nemo2", spec, tokenizer_length)
    config |= {"make_vocab_size_divisible_by": divisor, "vocab_size": vocab_size}
    if head_copied(family, "nemo2", spec):
        config["share_embeddings_and_output_weights"] = False
    if family.name == "phi3" and spec["num_query_groups"] == spec["num_attention_heads"]:
        config["num_query_groups"] = None
    if "max_position_embeddings" in config:
        config["max_position_embeddings"] = spec["seq_length"]
    if not has_generation_config:
        config["generation_config"] = None
    if spec["rope"]["type"] == "llama3":
        rope, std = spec["rope"], spec["init_method_std"]
        config |= {"scale_factor": rope["factor"], "low_freq_factor": rope["low_freq_factor"], "high_freq_factor": rope["high_freq_factor"],
                   "old_context_len": rope["original_max_position_embeddings"], "autocast_dtype": config["params_dtype"],
                   "_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config", "embedding_init_method_std": std,
                   "expert_tensor_parallel_size": 1, "recompute_modules": ["core_attn"]}
        config |= initialisers(std, spec["num_layers"], {"generator": None})
    return config


def initialisers(std, layers, extra):
    """The three initialiser entries (unused by a loaded model), as the classes resolve them."""
    normal = {"_partial_": True, "_target_": "torch.nn.init.normal_", "mean": 0.0} | extra
    return {"init_method": normal | {"std": std}, "embedding_init_method": normal | {"std": std},
            "output_layer_init_method": normal | {"std": std / math.sqrt(2 * layers)}}


def to_bridge(family, spec, template):
    """The `model` section of run_config.yaml (the dialect of Megatron-Bridge 0.3.1, whose window [W, 0] means Hugging Face's W)."""
    rope = spec["rope"]
    if rope["type"] == "llama3" and any(rope[k] != v for k, v in LLAMA3_FIXED.items()):
        raise UserError(f"Megatron-Bridge fixes rope scaling's {LLAMA3_FIXED}, this model has other values; use --format nemo2")
    model = template | megatron_values(family, spec) | {
        "kv_channels": spec["kv_channels"], "vocab_size": spec["vocab_size"], "should_pad_vocab": False,
        "make_vocab_size_divisible_by": largest_power(spec["vocab_size"]), "rope_scaling": rope["type"] == "llama3",
        "rope_scaling_factor": rope["factor"] if rope["type"] == "llama3" else 1.0, "embedding_init_method_std": spec["init_method_std"]}
    model |= {"autocast_dtype": model["params_dtype"]}
    return model | initialisers(spec["init_method_std"], spec["num_layers"], {"_args_": []})


def to_nemo1(family, spec, template):
    """model_config.yaml of a .nemo archive."""
    rope, heads, width = spec["rope"], spec["num_attention_heads"], spec["hidden_size"]
    fixed = LLAMA3_FIXED | {"factor": 8.0}
    if rope["type"] == "llama3" and any(rope[k] != v for k, v in fixed.items()):
        raise UserError(f"NeMo 1 fixes rope scaling to {fixed}, this model has other values; use --format nemo2")
    precision = {"float32": 32, "bfloat16": "bf16", "float16": 16}[spec["params_dtype"]]
    _, divisor, _ = vocabulary_rows(family, "nemo1", spec, None)
    config = template | {name: spec[name] for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "layernorm_epsilon", "init_method_std",
        "attention_dropout", "rotary_base", "share_embeddings_and_output_weights")}
    config |= {"encoder_seq_length": spec["seq_length"], "max_position_embeddings": spec["seq_length"],
               "kv_channels": None if spec["kv_channels"] * heads == width else spec["kv_channels"], "precision": precision,
               "rotary_percentage": spec["rotary_percent"], "make_vocab_size_divisible_by": divisor,
               "scale_positional_embedding": rope["type"] == "llama3", "mcore_gpt": True, "transformer_engine": True,
               "megatron_amp_O2": False, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
               "seq_len_interpolation_factor": rope["factor"] if rope["type"] == "linear" else None}
    if config["seq_len_interpolation_factor"] is None and family.name != "falcon":
        del config["seq_len_interpolation_factor"]      # the Llama fixture leaves it out
    if head_copied(family, "nemo1", spec):
        config["share_embeddings_and_output_weights"] = False
    if "data" in config:
        config["data"] = config["data"] | {"seq_length": spec["seq_length"]}
    if family.name == "falcon":
        config |= {"bias": spec["add_bias_linear"], "hidden_dropout": spec["hidden_dropout"], "precision": str(precision),
                   "mcore_customization_config": {k: spec[k] for k in ("new_decoder_architecture", "parallel_attention")}}
        del config["scale_positional_embedding"]
        if spec["rotary_base"] == 10000:
            del config["rotary_base"]         # NeMo's default, which its Falcon configurations leave out
    elif family.name == "mixtral":
        config |= {"num_moe_experts": spec["num_moe_experts"], "moe_router_topk": spec["moe_router_topk"],
                   "moe_router_pre_softmax": False, "moe_aux_loss_coeff": spec["moe_aux_loss_coeff"]}
    elif family.name == "qwen2":
        config |= {"qkv_bias": True, "override_vocab_size": spec["vocab_size"]}
    if spec.get("sliding_window"):
        config["window_size"] = [spec["sliding_window"], 0]
    elif family.name == "mistral":
        config["window_size"] = None      # tells Mistral from Llama
    return config


# ---- containers -> spec ----

CLASS_DEFAULTS = {   # what the classes assume for arguments that io.json leaves out, where model.yaml is missing
    None: {"layernorm_epsilon": 1e-5, "rotary_base": 10000.0, "rotary_percent": 1.0, "init_method_std": 0.02, "attention_dropout": 0.0,
           "share_embeddings_and_output_weights": False, "normalization": "RMSNorm", "add_bias_linear": False},
    "qwen2": {"layernorm_epsilon": 1e-6, "rotary_base": 1e6, "seq_length": 4096},
    "qwen3": {"layernorm_epsilon": 1e-6, "rotary_base": 1e6, "kv_channels": 128, "seq_length": 4096, "max_position_embeddings": 40960},
    "mixtral": {"rotary_base": 1e6, "num_moe_experts": 8, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01, "seq_length": 4096},
    "gemma": {"kv_channels": 256, "seq_length": 8192, "layernorm_epsilon": 1e-6, "share_embeddings_and_output_weights": True},
    "mistral": {"window_size": [4096, 0], "seq_length": 32768}, "phi3": {"seq_length": 4096}, "llama": {"seq_length": 4096},
    "Llama31": {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192, "seq_length": 131072},
}
CLASS_PREFIXES = (("Llama", "llama"), ("CodeLlama", "llama"), ("Mistral", "mistral"), ("Mixtral", "mixtral"), ("Qwen25", "qwen2"),
                  ("Qwen2", "qwen2"), ("Qwen3", "qwen3"), ("Gemma2", None), ("Gemma3", None), ("Gemma", "gemma"), ("CodeGemma", "gemma"),
                  ("Phi3", "phi3"))


def class_name(value):
    """The last part of a `_target_`, or of a mapping that has one: "torch.bfloat16" -> "bfloat16"; "" for anything else."""
    value = value.get("_target_") if isinstance(value, dict) else value
    return value.rsplit(".", 1)[-1] if isinstance(value, str) else ""


def family_of_megatron(config):
    """The family of a nemo2 `config` or bridge `model` mapping, by its class or, for the generic provider, by its options."""
    name = class_name(config)
    if name == "GPTModelProvider":
        if config.get("normalization") == "LayerNorm" and config.get("add_bias_linear") and not config.get("gated_linear_unit"):
            return FAMILIES["gpt_neox"]
        if config.get("num_moe_experts"):
            raise UserError("the checkpoint is a mixture of experts written by Megatron-Bridge, which is not settled")
        return FAMILIES["qwen3" if config.get("qk_layernorm") else "qwen2" if config.get("add_qkv_bias") else "llama"]
    moe = "MoE" in name or "MOE" in name
    found = next((family for prefix, family in CLASS_PREFIXES if name.startswith(prefix)), None) if not moe else None
    if found is None:
        from mlx_grpo.nemo_families import supported
        raise UserError(f"the checkpoint's configuration class {name or config.get('_target_')!r} is not supported. Supported: {supported()}")
    return FAMILIES[found]


def check_options(family, config):
    for name, expected in MUST_BE.items():
        if name in config and config[name] not in (expected, None):
            raise UserError(f"the checkpoint has {name}: {config[name]!r}, which no supported Hugging Face model has")
    function = class_name(config.get("activation_func"))
    allowed = ACTIVATIONS.get(family.name, ACTIVATIONS["llama"])
    if function and function not in allowed:
        raise UserError(f"the checkpoint's activation is {function}, a {family.name} model has {' or '.join(sorted(allowed))}")


def window_of(value, ours_is_one_more):
    """Hugging Face's W of Megatron's [left, right], None without a window."""
    if value is None or value[0] is None or value[0] < 0:
        return None
    return value[0] + (1 if ours_is_one_more else 0)


def from_megatron(config, container):
    """(family, spec) of a nemo2 `config` or bridge `model` mapping; vocab_size may still be None (see nemo_weights)."""
    family = family_of_megatron(config)
    llama31 = "scale_factor" in config or class_name(config).startswith(("Llama31", "Llama32"))
    config = CLASS_DEFAULTS[None] | CLASS_DEFAULTS.get(family.name, {}) | (CLASS_DEFAULTS["Llama31"] if llama31 else {}) | config
    check_options(family, config)
    spec = {name: config.get(name) for name in family.hf if name != "sliding_window"}
    if family.name in ("qwen3", "mixtral") and config.get("max_position_embeddings"):
        spec["seq_length"] = config["max_position_embeddings"]
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    check_sizes(config, ("num_attention_heads", "hidden_size"))
    spec["num_query_groups"] = config.get("num_query_groups") or heads
    spec["kv_channels"] = config.get("kv_channels") or width // heads
    newer = container == "bridge" and "async_tensor_model_parallel_allreduce" not in config   # megatron-core >= 0.17: [W - 1, 0]
    if "sliding_window" in family.hf:
        spec["sliding_window"] = window_of(config.get("window_size"), newer)
    elif config.get("window_size") is not None:
        raise UserError(f"the checkpoint has window_size {config['window_size']!r}, which a {family.name} config.json can't say")
    spec["rotary_base"], spec["rotary_percent"] = config["rotary_base"], config["rotary_percent"]
    spec["vocab_size"] = config.get("vocab_size")
    spec["rope"] = {"type": "default"}
    if config.get("seq_len_interpolation_factor"):
        spec["rope"] = {"type": "linear", "factor": config["seq_len_interpolation_factor"]}
    if llama31 and container == "nemo2":
        spec["rope"] = {"type": "llama3", "factor": config["scale_factor"], "low_freq_factor": config["low_freq_factor"],
                        "high_freq_factor": config["high_freq_factor"], "original_max_position_embeddings": config["old_context_len"]}
    elif config.get("rope_scaling"):
        spec["rope"] = {"type": "llama3", "factor": config.get("rope_scaling_factor", 8.0)} | LLAMA3_FIXED
    spec["params_dtype"] = class_name(config.get("params_dtype")) or None
    check_spec(family, spec)
    return family, spec


def from_nemo1(config):
    """(family, spec) of a .nemo archive's model_config.yaml."""
    if config.get("mcore_gpt") is False:
        raise UserError("the archive has mcore_gpt: false: names from before Megatron-core, which are not supported; convert it with NeMo 1.23 first")
    if config.get("tensor_model_parallel_size", 1) and config.get("rotary_interleaved"):
        raise UserError("the archive has rotary_interleaved: true, which no supported Hugging Face model has")
    custom, norm, activation = config.get("mcore_customization_config"), str(config.get("normalization")), str(config.get("activation"))
    if custom or config.get("name") == "megatron_falcon_gpt":
        name = "falcon"
    elif norm == "rmsnorm" and activation in ("geglu", "fast-geglu"):
        name = "gemma"
    elif norm == "rmsnorm" and activation == "fast-swiglu":
        name = ("mixtral" if config.get("num_moe_experts") else "qwen2" if config.get("qkv_bias") else
                "mistral" if "window_size" in config else "llama")
    else:
        raise UserError(f"the archive's normalization {norm!r} with activation {activation!r} belongs to no supported architecture")
    if str(config.get("position_embedding_type", "rope")) != "rope":
        raise UserError(f"the archive has position_embedding_type {config['position_embedding_type']!r}; only rope is supported")
    family = FAMILIES[name]
    config = {"rotary_base": 10000.0, "init_method_std": 0.02, "attention_dropout": 0.0, "moe_aux_loss_coeff": 0.001} | config
    check_sizes(config, ("num_attention_heads", "hidden_size"))
    spec = {key: config.get(key) for key in family.hf if key != "sliding_window"}
    spec |= {"num_query_groups": config.get("num_query_groups") or config["num_attention_heads"],
             "kv_channels": config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"],
             "seq_length": config.get("max_position_embeddings") or config.get("encoder_seq_length"),
             "rotary_base": config["rotary_base"], "rotary_percent": config.get("rotary_percentage", 1.0),
             "vocab_size": config.get("override_vocab_size"), "rope": {"type": "default"},
             "params_dtype": {"32": "float32", "bf16": "bfloat16", "16": "float16"}.get(str(config.get("precision")).split("-")[0])}
    if config.get("seq_len_interpolation_factor"):
        spec["rope"] = {"type": "linear", "factor": config["seq_len_interpolation_factor"]}
    elif config.get("scale_positional_embedding"):
        spec["rope"] = {"type": "llama3", "factor": 8.0} | LLAMA3_FIXED
    if name == "falcon":
        custom = custom or {}
        spec |= {"add_bias_linear": bool(config.get("bias")), "hidden_dropout": config.get("hidden_dropout", 0.0),
                 "new_decoder_architecture": bool(custom.get("new_decoder_architecture")),
                 "parallel_attention": bool(custom.get("parallel_attention"))}
    if "sliding_window" in family.hf:
        spec["sliding_window"] = window_of(config.get("window_size"), False)
    check_spec(family, spec)
    return family, spec
