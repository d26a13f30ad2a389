"""
The architectures that can be converted, one table each: which Megatron tensor is which Hugging Face tensors, and in
which layout.

A row is (Megatron name, Hugging Face names, layout, shape). `{i}` is the layer, `{e}` the expert. Megatron's layers may
be stacked or one by one: the names here leave `decoder.layers.` and the number out. Shapes are of one layer's Megatron
tensor, in

    V vocabulary   C hidden   H query heads   G key/value groups   D head size   I FFN width   E experts
    A = H*D   K = G*D   Q = (H + 2G)*D   F = 2*I

Layouts: copy       the same tensor
         qkv        q, k, v apart in Hugging Face; in Megatron per group its query heads, its key head, its value head
         qkv_fused  as qkv, but Hugging Face has one tensor [q; k; v] (Phi-3)
         gated      gate and up apart in Hugging Face; in Megatron [gate; up], saved as two pieces
         gated_fused  as gated, but Hugging Face has one tensor [gate; up]
Rows of GPT-NeoX's and Falcon's fused query_key_value already have Megatron's order.
"""

from dataclasses import dataclass, field

from mlx_grpo import UserError

FORMATS = ("nemo2", "bridge", "nemo1")


@dataclass(frozen=True)
class Family:
    """One architecture. `hf` names a config.json key per value of ours, `defaults` what transformers assumes without
    it."""
    name: str
    model_type: str
    architecture: str
    outer: tuple                      # rows of the embedding, the last norm and the head
    layer: tuple                      # rows of one layer
    states: tuple                     # modules with a TransformerEngine `_extra_state` object
    formats: tuple
    hf: dict
    defaults: dict
    constants: dict                   # config.json entries that are the same for every model of the family
    nemo2: tuple = ()                 # (module, model class, config class)
    head_copies: tuple = ()           # containers in which NVIDIA writes a tied head as a copy of the embedding
    traits: dict = field(default_factory=dict)


def q_k_v(name, suffix="weight"):
    return tuple(f"model.layers.{{i}}.self_attn.{part}_proj.{suffix}" for part in "qkv")


ATTENTION = (
    ("self_attention.linear_proj.weight", "model.layers.{i}.self_attn.o_proj.weight", "copy", "C A"),
    ("self_attention.linear_qkv.layer_norm_weight", "model.layers.{i}.input_layernorm.weight", "copy", "C"),
    ("self_attention.linear_qkv.weight", q_k_v("weight"), "qkv", "Q C"),
)
QKV_BIAS = (("self_attention.linear_qkv.bias", q_k_v("bias", "bias"), "qkv", "Q"),)
QK_NORM = (
    ("self_attention.q_layernorm.weight", "model.layers.{i}.self_attn.q_norm.weight", "copy", "D"),
    ("self_attention.k_layernorm.weight", "model.layers.{i}.self_attn.k_norm.weight", "copy", "D"),
)
GATED_MLP = (
    ("mlp.linear_fc1.layer_norm_weight", "model.layers.{i}.post_attention_layernorm.weight", "copy", "C"),
    ("mlp.linear_fc1.weight", ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"), "gated",
     "F C"),
    ("mlp.linear_fc2.weight", "model.layers.{i}.mlp.down_proj.weight", "copy", "C I"),
)
EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}."
EXPERTS = (
    ("pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight", "copy", "C"),
    ("mlp.router.weight", "model.layers.{i}.block_sparse_moe.gate.weight", "copy", "E C"),
    ("mlp.experts.experts.linear_fc1.weight", (EXPERT + "w1.weight", EXPERT + "w3.weight"), "gated", "F C"),
    ("mlp.experts.experts.linear_fc2.weight", EXPERT + "w2.weight", "copy", "C I"),
)
PHI3_LAYER = (
    ATTENTION[0], ATTENTION[1],
    ("self_attention.linear_qkv.weight", "model.layers.{i}.self_attn.qkv_proj.weight", "qkv_fused", "Q C"),
    GATED_MLP[0],
    ("mlp.linear_fc1.weight", "model.layers.{i}.mlp.gate_up_proj.weight", "gated_fused", "F C"),
    GATED_MLP[2],
)
OUTER = (
    ("embedding.word_embeddings.weight", "model.embed_tokens.weight", "copy", "V C"),
    ("decoder.final_layernorm.weight", "model.norm.weight", "copy", "C"),
    ("output_layer.weight", "lm_head.weight", "copy", "V C"),
)


def weight_and_bias(*rows):
    """Each (Megatron module, Hugging Face module, weight shape) as two copied rows, weight and bias; a Megatron module
    that ends in `layer_norm_` is the norm inside a linear module."""
    for megatron, hf, shape in rows:
        dot = "" if megatron.endswith("_") else "."
        yield f"{megatron}{dot}weight", f"{hf}.weight", "copy", shape
        yield f"{megatron}{dot}bias", f"{hf}.bias", "copy", shape.split()[0]


NEOX_LAYER = tuple(weight_and_bias(
    ("self_attention.linear_qkv.layer_norm_", "gpt_neox.layers.{i}.input_layernorm", "C"),
    ("self_attention.linear_qkv", "gpt_neox.layers.{i}.attention.query_key_value", "Q C"),
    ("self_attention.linear_proj", "gpt_neox.layers.{i}.attention.dense", "C A"),
    ("mlp.linear_fc1.layer_norm_", "gpt_neox.layers.{i}.post_attention_layernorm", "C"),
    ("mlp.linear_fc1", "gpt_neox.layers.{i}.mlp.dense_h_to_4h", "I C"),
    ("mlp.linear_fc2", "gpt_neox.layers.{i}.mlp.dense_4h_to_h", "C I"),
))
NEOX_OUTER = (
    ("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight", "copy", "V C"),
    *weight_and_bias(("decoder.final_layernorm", "gpt_neox.final_layer_norm", "C")),
    ("output_layer.weight", "embed_out.weight", "copy", "V C"),
)
FALCON_LINEAR = (
    ("self_attention.linear_proj.weight", "transformer.h.{i}.self_attention.dense.weight", "copy", "C A"),
    ("self_attention.linear_qkv.weight", "transformer.h.{i}.self_attention.query_key_value.weight", "copy", "Q C"),
    ("mlp.linear_fc1.weight", "transformer.h.{i}.mlp.dense_h_to_4h.weight", "copy", "I C"),
    ("mlp.linear_fc2.weight", "transformer.h.{i}.mlp.dense_4h_to_h.weight", "copy", "C I"),
)
FALCON_BIASES = tuple((m.replace("weight", "bias"), h.replace("weight", "bias"), how, shape.split()[0])
                      for m, h, how, shape in FALCON_LINEAR)
# which layer norms a layer has: two for the new decoder, one before both branches, or one before each
FALCON_NORMS = {
    "new": tuple(weight_and_bias(("input_layernorm", "transformer.h.{i}.ln_attn", "C"),
                                 ("pre_mlp_layernorm", "transformer.h.{i}.ln_mlp", "C"))),
    "parallel": tuple(weight_and_bias(("input_layernorm", "transformer.h.{i}.input_layernorm", "C"))),
    "sequential": tuple(weight_and_bias(
        ("input_layernorm", "transformer.h.{i}.input_layernorm", "C"),
        ("post_self_attn_layernorm", "transformer.h.{i}.post_attention_layernorm", "C"))),
}
FALCON_OUTER = (
    ("embedding.word_embeddings.weight", "transformer.word_embeddings.weight", "copy", "V C"),
    *weight_and_bias(("decoder.final_layernorm", "transformer.ln_f", "C")),
    ("output_layer.weight", "lm_head.weight", "copy", "V C"),
)

CORE = ("self_attention.core_attention", "self_attention.linear_proj", "self_attention.linear_qkv")
DENSE = (*CORE, "mlp.linear_fc1", "mlp.linear_fc2")

HF_KEYS = {   # our value (Megatron's name) -> config.json
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim",
    "vocab_size": "vocab_size", "seq_length": "max_position_embeddings", "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range", "attention_dropout": "attention_dropout",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
DEFAULTS = {"attention_dropout": 0.0, "init_method_std": 0.02, "layernorm_epsilon": 1e-6, "seq_length": 2048,
            "rotary_base": 10000.0, "share_embeddings_and_output_weights": False}


def family(name, architecture, layer, states, formats, nemo2=(), model_type=None, outer=OUTER, hf=None, without=(),
           defaults=None, constants=None, head_copies=(), **traits):
    """A Family whose config.json keys and defaults are the common ones but for those given."""
    keys = {k: v for k, v in (HF_KEYS | (hf or {})).items() if k not in without}
    return Family(name, model_type or name, architecture, outer, layer, states, formats, keys,
                  DEFAULTS | (defaults or {}), constants or {}, nemo2, head_copies, traits)


WINDOW = {"sliding_window": "sliding_window"}
FAMILIES = {f.name: f for f in (
    family("llama", "LlamaForCausalLM", (*ATTENTION, *GATED_MLP), DENSE, FORMATS,
           ("llama", "LlamaModel", "LlamaConfig"),
           constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
           head_copies=("nemo1",)),
    family("mistral", "MistralForCausalLM", (*ATTENTION, *GATED_MLP), DENSE, FORMATS,
           ("mistral", "MistralModel", "MistralConfig7B"),
           hf=WINDOW, defaults={"num_query_groups": 8, "seq_length": 131072, "sliding_window": 4096},
           constants={"hidden_act": "silu"}, tokenizer_rows=True),
    family("mixtral", "MixtralForCausalLM", (*ATTENTION, *EXPERTS),
           (*CORE, "pre_mlp_layernorm", "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"),
           ("nemo2", "nemo1"), ("mixtral", "MixtralModel", "MixtralConfig8x7B"),
           hf=WINDOW | {"num_moe_experts": "num_local_experts", "moe_router_topk": "num_experts_per_tok",
                        "moe_aux_loss_coeff": "router_aux_loss_coef"},
           defaults={"num_query_groups": 8, "seq_length": 131072, "layernorm_epsilon": 1e-5, "rotary_base": 1e6,
                     "num_moe_experts": 8, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.001, "sliding_window": None},
           constants={"hidden_act": "silu", "output_router_logits": False, "router_jitter_noise": 0.0},
           tokenizer_rows=True, padded_rows=128),
    family("qwen2", "Qwen2ForCausalLM", (*ATTENTION, *QKV_BIAS, *GATED_MLP), DENSE, FORMATS,
           ("qwen2", "Qwen2Model", "Qwen2Config"),
           without=("kv_channels",), defaults={"num_query_groups": 32, "seq_length": 32768},
           constants={"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None,
                      "max_window_layers": 28},
           head_copies=("nemo2",), null_head_dim=True, layer_types=True),
    family("qwen3", "Qwen3ForCausalLM", (*ATTENTION, *QK_NORM, *GATED_MLP),
           (*CORE, "self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"),
           ("nemo2", "bridge"), ("qwen3", "Qwen3Model", "Qwen3Config"),
           defaults={"num_query_groups": 32, "kv_channels": 128, "seq_length": 32768},
           constants={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False,
                      "sliding_window": None, "max_window_layers": 28}, layer_types=True),
    family("gemma", "GemmaForCausalLM", (*ATTENTION, *GATED_MLP), DENSE, FORMATS,
           ("gemma", "GemmaModel", "GemmaConfig"),
           defaults={"num_query_groups": 16, "kv_channels": 256, "seq_length": 8192,
                     "share_embeddings_and_output_weights": True},
           constants={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
                      "attention_bias": False},
           tokenizer_rows=True, always_tied=True),
    family("phi3", "Phi3ForCausalLM", PHI3_LAYER, DENSE, ("nemo2",), ("phi3mini", "Phi3Model", "Phi3Config"),
           hf=WINDOW | {"rotary_percent": "partial_rotary_factor"}, without=("kv_channels",),
           defaults={"layernorm_epsilon": 1e-5, "seq_length": 4096, "sliding_window": None, "rotary_percent": 1.0},
           constants={"hidden_act": "silu", "embd_pdrop": 0.0, "resid_pdrop": 0.0}, tokenizer_rows=True,
           null_head_dim=True, original_length=True),
    family("falcon", "FalconForCausalLM", FALCON_LINEAR, (*DENSE, "input_layernorm"), ("nemo1",), outer=FALCON_OUTER,
           hf={"ffn_hidden_size": "ffn_hidden_size", "num_query_groups": "num_kv_heads",
               "layernorm_epsilon": "layer_norm_epsilon", "hidden_dropout": "hidden_dropout",
               "add_bias_linear": "bias", "parallel_attention": "parallel_attn",
               "new_decoder_architecture": "new_decoder_architecture"}, without=("kv_channels",),
           defaults={"layernorm_epsilon": 1e-5, "hidden_dropout": 0.0, "add_bias_linear": False,
                     "parallel_attention": True, "new_decoder_architecture": False,
                     "share_embeddings_and_output_weights": True},
           constants={"activation": "gelu", "alibi": False}, head_copies=("nemo1",)),
    family("gpt_neox", "GPTNeoXForCausalLM", NEOX_LAYER, DENSE, ("bridge",), outer=NEOX_OUTER,
           hf={"layernorm_epsilon": "layer_norm_eps", "hidden_dropout": "hidden_dropout",
               "rotary_percent": "rotary_pct"},
           without=("num_query_groups", "kv_channels"),
           defaults={"layernorm_epsilon": 1e-5, "hidden_dropout": 0.0, "rotary_percent": 0.25},
           constants={"hidden_act": "gelu", "use_parallel_residual": False, "attention_bias": True,
                      "classifier_dropout": 0.1}),
)}
BY_MODEL_TYPE = {f.model_type: f for f in FAMILIES.values()}

NO_MOE = "mixtures of experts other than Mixtral are not settled"
REFUSED = {   # model types people will try, and why not
    "qwen": "first-generation Qwen needs its own modelling code and NVIDIA's importers start at Qwen2",
    "gemma2": "Gemma 2 has norms after each block that this converter has no settled mapping for",
    "gemma3": "Gemma 3 has norms after each block that this converter has no settled mapping for",
    "gemma3_text": "Gemma 3 has norms after each block that this converter has no settled mapping for",
    "qwen2_moe": NO_MOE, "qwen3_moe": NO_MOE, "deepseek_v2": NO_MOE, "deepseek_v3": NO_MOE, "phimoe": NO_MOE,
    "olmoe": NO_MOE, "llama4": NO_MOE, "gpt_oss": NO_MOE, "dbrx": NO_MOE,
    "RefinedWeb": "a Falcon config from before transformers 4.33; save it again as model_type falcon",
    "RefinedWebModel": "a Falcon config from before transformers 4.33; save it again as model_type falcon",
}
WHY_NOT = {   # containers that NVIDIA's own tools don't write for a family
    ("mixtral", "bridge"): "Megatron-Bridge's Mixtral checkpoints are not settled",
    ("qwen3", "nemo1"): "NeMo 1 has no Qwen3",
    ("phi3", "bridge"): "Megatron-Bridge has no Phi-3", ("phi3", "nemo1"): "NeMo 1 has no Phi-3",
    ("falcon", "nemo2"): "NeMo 2 has no Falcon", ("falcon", "bridge"): "Megatron-Bridge has no Falcon with this layout",
    ("gpt_neox", "nemo2"): "NeMo 2 has no GPT-NeoX", ("gpt_neox", "nemo1"): "NeMo 1 has no GPT-NeoX importer",
    ("gemma", "nemo1"): "NeMo 1 keeps Gemma's norms as weight + 1, which rounds; it can be exported, but not written",
}


def supported():
    """One line for messages: every family with its containers."""
    return "; ".join(f"{f.name} ({', '.join(f.formats)})" for f in FAMILIES.values())


def family_of(model_type):
    """The family of a config.json's model_type. Raises UserError with the reason and the list of those that are
    supported."""
    if model_type in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[model_type]
    reason = REFUSED.get(model_type, "there is no settled mapping for it")
    raise UserError(f"model type {model_type!r} is not supported: {reason}. Supported: {supported()}")


def check_format(family, container):
    """Raises UserError where `family` can't be written as `container`."""
    reason = WHY_NOT.get((family.name, container))
    if reason:
        usable = [f for f in family.formats if (family.name, f) not in WHY_NOT]
        raise UserError(f"{family.name} can't be written as {container}: {reason}; use --format {' or '.join(usable)}")


def rows_of(family, spec):
    """(outer rows, layer rows, modules with a state object) for one model; Falcon's norms and biases depend on its
    config."""
    if family.name != "falcon":
        return family.outer, family.layer, family.states
    kind = "new" if spec["new_decoder_architecture"] else "parallel" if spec["parallel_attention"] else "sequential"
    norms = FALCON_NORMS[kind]
    states = family.states + {"new": ("pre_mlp_layernorm",), "parallel": (),
                              "sequential": ("post_self_attn_layernorm",)}[kind]
    return family.outer, (*FALCON_LINEAR, *(FALCON_BIASES if spec["add_bias_linear"] else ()), *norms), states


def dims_of(spec):
    """The shape letters' values for one model."""
    H, G, D, I = (spec[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"))
    return {"C": spec["hidden_size"], "A": H * D, "K": G * D, "Q": (H + 2 * G) * D, "D": D, "I": I, "F": 2 * I,
            "E": spec.get("num_moe_experts") or 0}
