"""
The configurations of the three NeMo containers as a model's spec (nemo_config.py). Code that they name stays a name:
the last part of `_target_` says which class, dtype or function is meant, and nothing is imported.
"""

from mlx_grpo import UserError
from mlx_grpo.nemo_config import LLAMA3_FIXED, check_sizes, check_spec
from mlx_grpo.nemo_families import FAMILIES, supported

# Options of Megatron that change the function computed and have no counterpart in the target's configuration.
MUST_BE = {
    "rotary_interleaved": False, "position_embedding_type": "rope", "softmax_scale": None, "mtp_num_layers": None,
    "multi_latent_attention": False, "qk_l2_norm": False, "attention_output_gate": False, "softmax_type": "vanilla",
    "no_rope_freq": None,
    "apply_residual_connection_post_layernorm": False, "glu_linear_offset": 0.0, "activation_func_clamp_value": None,
}
# Names of the activation function; silu elsewhere.
ACTIVATIONS = {"llama": {"silu"}, "gemma": {"openai_gelu", "fast_gelu", "gelu_impl"}, "gpt_neox": {"gelu"}}

CLASS_DEFAULTS = {   # what the classes assume for arguments that io.json leaves out, where model.yaml is missing
    None: {"layernorm_epsilon": 1e-5, "rotary_base": 10000.0, "rotary_percent": 1.0, "init_method_std": 0.02,
           "attention_dropout": 0.0, "share_embeddings_and_output_weights": False, "normalization": "RMSNorm",
           "add_bias_linear": False},
    "qwen2": {"layernorm_epsilon": 1e-6, "rotary_base": 1e6, "seq_length": 4096},
    "qwen3": {"layernorm_epsilon": 1e-6, "rotary_base": 1e6, "kv_channels": 128, "seq_length": 4096,
              "max_position_embeddings": 40960},
    "mixtral": {"rotary_base": 1e6, "num_moe_experts": 8, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01,
                "seq_length": 4096},
    "gemma": {"kv_channels": 256, "seq_length": 8192, "layernorm_epsilon": 1e-6,
              "share_embeddings_and_output_weights": True},
    "mistral": {"window_size": [4096, 0], "seq_length": 32768}, "phi3": {"seq_length": 4096},
    "llama": {"seq_length": 4096},
    "Llama31": {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192,
                "seq_length": 131072},
}
CLASS_PREFIXES = (("Llama", "llama"), ("CodeLlama", "llama"), ("Mistral", "mistral"), ("Mixtral", "mixtral"),
                  ("Qwen25", "qwen2"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3"), ("Gemma2", None), ("Gemma3", None),
                  ("Gemma", "gemma"), ("CodeGemma", "gemma"), ("Phi3", "phi3"))

PRECISIONS = {"32": "float32", "bf16": "bfloat16", "16": "float16"}      # of NeMo 1, also as "bf16-mixed"


def class_name(value):
    """The last part of a `_target_`, or of a mapping that has one: "torch.bfloat16" -> "bfloat16"; "" for anything
    else."""
    value = value.get("_target_") if isinstance(value, dict) else value
    return value.rsplit(".", 1)[-1] if isinstance(value, str) else ""


def family_of_megatron(config):
    """The family of a nemo2 `config` or bridge `model` mapping, by its class or, for the generic provider, by its
    options."""
    name = class_name(config)
    if name == "GPTModelProvider":
        plain = config.get("add_bias_linear") and not config.get("gated_linear_unit")
        if plain and config.get("normalization") == "LayerNorm":
            return FAMILIES["gpt_neox"]
        if config.get("num_moe_experts"):
            raise UserError("the checkpoint is a mixture of experts written by Megatron-Bridge, which is not settled")
        return FAMILIES["qwen3" if config.get("qk_layernorm") else "qwen2" if config.get("add_qkv_bias") else "llama"]
    found = next((family for prefix, family in CLASS_PREFIXES if name.startswith(prefix)), None)
    if found is None or "moe" in name.lower():
        raise UserError(f"the checkpoint's configuration class {name or config.get('_target_')!r} is not supported. "
                        f"Supported: {supported()}")
    return FAMILIES[found]


def check_options(family, config):
    """Raises UserError for an option that no Hugging Face model of the family has."""
    for name, expected in MUST_BE.items():
        if name in config and config[name] not in (expected, None):
            raise UserError(f"the checkpoint has {name}: {config[name]!r}, which no supported Hugging Face model has")
    function = class_name(config.get("activation_func"))
    allowed = ACTIVATIONS.get(family.name, ACTIVATIONS["llama"])
    if function and function not in allowed:
        raise UserError(f"the checkpoint's activation is {function}, a {family.name} model has "
                        f"{' or '.join(sorted(allowed))}")


def window_of(value, ours_is_one_more):
    """Hugging Face's W of Megatron's [left, right], None without a window."""
    if value is None:
        return None
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        raise UserError(f"the checkpoint's window_size is {value!r}, not [keys before the own one, 0]")
    return None if value[0] < 0 else value[0] + (1 if ours_is_one_more else 0)


def from_megatron(config, container):
    """(family, spec) of a nemo2 `config` or bridge `model` mapping; vocab_size may still be None."""
    family = family_of_megatron(config)
    llama31 = "scale_factor" in config or class_name(config).startswith(("Llama31", "Llama32"))
    assumed = CLASS_DEFAULTS[None] | CLASS_DEFAULTS.get(family.name, {})
    if llama31:
        assumed |= CLASS_DEFAULTS["Llama31"]
    config = assumed | config
    check_options(family, config)
    spec = {name: config.get(name) for name in family.hf if name != "sliding_window"}
    if family.name in ("qwen3", "mixtral") and config.get("max_position_embeddings"):
        spec["seq_length"] = config["max_position_embeddings"]
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    check_sizes(config, ("num_attention_heads", "hidden_size"))
    spec["num_query_groups"] = config.get("num_query_groups") or heads
    spec["kv_channels"] = config.get("kv_channels") or width // heads
    # Bridge >= 0.4: [W - 1, 0]
    newer = container == "bridge" and "async_tensor_model_parallel_allreduce" not in config
    if "sliding_window" in family.hf:
        spec["sliding_window"] = window_of(config.get("window_size"), newer)
    elif config.get("window_size") is not None:
        raise UserError(f"the checkpoint has window_size {config['window_size']!r}, which a {family.name} config.json "
                        "can't say")
    spec["rotary_base"], spec["rotary_percent"] = config["rotary_base"], config["rotary_percent"]
    spec["vocab_size"] = config.get("vocab_size")
    spec["rope"] = {"type": "default"}
    if config.get("seq_len_interpolation_factor"):
        spec["rope"] = {"type": "linear", "factor": config["seq_len_interpolation_factor"]}
    if llama31 and container == "nemo2":
        spec["rope"] = {"type": "llama3", "factor": config["scale_factor"],
                        "low_freq_factor": config["low_freq_factor"], "high_freq_factor": config["high_freq_factor"],
                        "original_max_position_embeddings": config["old_context_len"]}
    elif config.get("rope_scaling"):
        spec["rope"] = {"type": "llama3", "factor": config.get("rope_scaling_factor", 8.0)} | LLAMA3_FIXED
    spec["params_dtype"] = class_name(config.get("params_dtype")) or None
    check_spec(family, spec)
    return family, spec


def from_nemo1(config):
    """(family, spec) of a .nemo archive's model_config.yaml."""
    if config.get("mcore_gpt") is False:
        raise UserError("the archive has mcore_gpt: false: names from before Megatron-core, which are not supported; "
                        "convert it with NeMo 1.23 first")
    if config.get("rotary_interleaved"):
        raise UserError("the archive has rotary_interleaved: true, which no supported Hugging Face model has")
    custom = config.get("mcore_customization_config")
    if custom is not None and not isinstance(custom, dict):
        raise UserError(f"the archive's mcore_customization_config is {custom!r}, not a mapping")
    norm, activation = str(config.get("normalization")), str(config.get("activation"))
    if custom or config.get("name") == "megatron_falcon_gpt":
        name = "falcon"
    elif norm == "rmsnorm" and activation in ("geglu", "fast-geglu"):
        name = "gemma"
    elif norm == "rmsnorm" and activation == "fast-swiglu":
        name = ("mixtral" if config.get("num_moe_experts") else "qwen2" if config.get("qkv_bias") else
                "mistral" if "window_size" in config else "llama")
    else:
        raise UserError(f"the archive's normalization {norm!r} with activation {activation!r} belongs to no supported "
                        "architecture")
    if str(config.get("position_embedding_type", "rope")) != "rope":
        raise UserError(f"the archive has position_embedding_type {config['position_embedding_type']!r}; only rope is "
                        "supported")
    family = FAMILIES[name]
    config = {"rotary_base": 10000.0, "init_method_std": 0.02, "attention_dropout": 0.0,
              "moe_aux_loss_coeff": 0.001} | config
    check_sizes(config, ("num_attention_heads", "hidden_size"))
    spec = {key: config.get(key) for key in family.hf if key != "sliding_window"}
    spec |= {"num_query_groups": config.get("num_query_groups") or config["num_attention_heads"],
             "kv_channels": config.get("kv_channels") or config["hidden_size"] // config["num_attention_heads"],
             "seq_length": config.get("max_position_embeddings") or config.get("encoder_seq_length"),
             "rotary_base": config["rotary_base"], "rotary_percent": config.get("rotary_percentage", 1.0),
             "vocab_size": config.get("override_vocab_size"), "rope": {"type": "default"},
             "params_dtype": PRECISIONS.get(str(config.get("precision")).split("-")[0])}
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
