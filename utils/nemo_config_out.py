"""A model's spec (nemo_config.py) as the configurations of the three NeMo containers, on a template of what NVIDIA's
savers write."""

import math

from mlx_grpo import UserError
from mlx_grpo.nemo_config import LLAMA3_FIXED


def largest_power(n, limit=128):
    """The largest power of two up to `limit` that divides n."""
    return math.gcd(n, limit)


def megatron_values(family, spec):
    """The entries that nemo2's `config` and bridge's `model` share."""
    heads, width, rope, dtype = spec["num_attention_heads"], spec["hidden_size"], spec["rope"], spec["params_dtype"]
    plain = spec["kv_channels"] * heads == width and family.traits.get("null_head_dim")
    values = {name: spec[name] for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "seq_length",
        "layernorm_epsilon", "init_method_std", "attention_dropout", "rotary_base", "rotary_percent",
        "share_embeddings_and_output_weights")}
    values |= {"kv_channels": None if plain else spec["kv_channels"], "hidden_dropout": spec.get("hidden_dropout", 0.0),
               "seq_len_interpolation_factor": rope["factor"] if rope["type"] == "linear" else None,
               "params_dtype": {"_call_": False, "_target_": f"torch.{dtype}"}, "bf16": dtype == "bfloat16",
               "fp16": dtype == "float16",
               "window_size": [spec["sliding_window"], 0] if spec.get("sliding_window") else None}
    if spec.get("sliding_window"):
        values["cp_comm_type"] = "a2a"
    if family.name == "mixtral":
        values |= {"num_moe_experts": spec["num_moe_experts"], "moe_router_topk": spec["moe_router_topk"],
                   "moe_router_pre_softmax": False, "moe_aux_loss_coeff": spec["moe_aux_loss_coeff"]}
    return values


def vocabulary_rows(family, container, spec, tokenizer_length):
    """(rows of embedding and head, make_vocab_size_divisible_by, vocab_size entry) as NVIDIA's importer of the family
    has them. Where it leaves vocab_size out, NeMo takes padded(len(tokenizer)): the size is written out where that
    would differ."""
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
        config |= {"scale_factor": rope["factor"], "low_freq_factor": rope["low_freq_factor"],
                   "high_freq_factor": rope["high_freq_factor"],
                   "old_context_len": rope["original_max_position_embeddings"],
                   "autocast_dtype": config["params_dtype"],
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
    """The `model` section of run_config.yaml (the dialect of Megatron-Bridge 0.3.1, whose window [W, 0] means Hugging
    Face's W)."""
    rope = spec["rope"]
    if rope["type"] == "llama3" and any(rope[k] != v for k, v in LLAMA3_FIXED.items()):
        raise UserError(f"Megatron-Bridge fixes rope scaling's {LLAMA3_FIXED}, this model has other values; use "
                        "--format nemo2")
    model = template | megatron_values(family, spec) | {
        "kv_channels": spec["kv_channels"], "vocab_size": spec["vocab_size"], "should_pad_vocab": False,
        "make_vocab_size_divisible_by": largest_power(spec["vocab_size"]), "rope_scaling": rope["type"] == "llama3",
        "rope_scaling_factor": rope["factor"] if rope["type"] == "llama3" else 1.0,
        "embedding_init_method_std": spec["init_method_std"]}
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
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "layernorm_epsilon",
        "init_method_std", "attention_dropout", "rotary_base", "share_embeddings_and_output_weights")}
    config |= {"encoder_seq_length": spec["seq_length"], "max_position_embeddings": spec["seq_length"],
               "kv_channels": None if spec["kv_channels"] * heads == width else spec["kv_channels"],
               "precision": precision, "rotary_percentage": spec["rotary_percent"],
               "make_vocab_size_divisible_by": divisor,
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
        config |= {"bias": spec["add_bias_linear"], "hidden_dropout": spec["hidden_dropout"],
                   "precision": str(precision),
                   "mcore_customization_config": {
                       k: spec[k] for k in ("new_decoder_architecture", "parallel_attention")}}
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
