"""Tiny random Hugging Face models, made on the spot by transformers, and the two sides' logits."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from conftest import require
from mlx.utils import tree_flatten, tree_map

SHAPE = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=30000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
GPT2 = dict(vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
THETA = dict(rope_type="default", rope_theta=33333.0)     # of no architecture's defaults

FAMILIES = {   # name: (transformers model type, its settings)
    "llama3": ("llama", SHAPE | dict(rope_parameters=LLAMA3_ROPE)),
    "qwen2.5": ("qwen2", SHAPE | dict(rope_parameters=THETA)),
    "qwen3": ("qwen3", SHAPE | dict(head_dim=16, rope_parameters=THETA)),
    "mistral": ("mistral", SHAPE | dict(head_dim=8, rope_parameters=THETA)),
    "gemma2": ("gemma2", SHAPE | dict(head_dim=8, query_pre_attn_scalar=8, rope_parameters=THETA)),
    "phi3": ("phi3", SHAPE | dict(rope_parameters=THETA | dict(partial_rotary_factor=0.5))),
    "gpt2": ("gpt2", GPT2),
    "mixtral": ("mixtral", SHAPE | dict(num_local_experts=4, num_experts_per_tok=2, rope_parameters=THETA)),
    "gemma3": ("gemma3_text", SHAPE | dict(hidden_size=64,       # mlx-lm rounds its root to bfloat16, exact for 64
               head_dim=8, query_pre_attn_scalar=8, num_hidden_layers=6, sliding_window=16,
               rope_parameters=dict(full_attention=THETA, sliding_attention=THETA | dict(rope_theta=777.0)))),
    "gpt_neox": ("gpt_neox", {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
                 | dict(intermediate_size=128, hidden_act="gelu_new",   # the one that mlx-lm has
                        rope_parameters=THETA | dict(partial_rotary_factor=0.5))),
    "stablelm": ("stablelm", SHAPE | dict(rope_parameters=THETA | dict(partial_rotary_factor=0.5))),
    "qwen3_moe": ("qwen3_moe", SHAPE | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                  norm_topk_prob=True, rope_parameters=THETA)),
    "yarn": ("llama", SHAPE | dict(rope_parameters=dict(rope_type="yarn", rope_theta=33333.0, factor=4.0,
             original_max_position_embeddings=64, attention_factor=1.3))),
    "linear": ("llama", SHAPE | dict(rope_parameters=THETA | dict(rope_type="linear", factor=3))),
}


def save_tiny(directory, family, seed=0, **changes):
    """Save a random float32 model of FAMILIES as transformers writes it; returns its torch model. Weights are drawn
    wide enough (0.2) that positions and logits matter."""
    torch, transformers = require("torch"), require("transformers")
    kind, settings = FAMILIES[family]
    config = transformers.CONFIG_MAPPING[kind](**(settings | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    model.save_pretrained(directory)
    return model


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def save_tokenizer(directory, chat_template=None, every_byte=False):
    """A byte-level tokenizer without merges beside a tiny model: the specials <pad> <s> </s> <|im_end|> <|im_start|> as
    0-4, then the printable bytes of ASCII (fewer than 128 ids together), or all 256 bytes. Returns transformers'
    tokenizer."""
    tokenizers, transformers = require("tokenizers"), require("transformers")
    specials = ["<pad>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet if every_byte else [c for c in alphabet if ord(c) < 127] + ["Ġ", "Ċ"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|im_end|>", "<|im_start|>"])
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return fast


def torch_logits(model, tokens):
    """(B, L, V) float32 of a transformers model."""
    torch = require("torch")
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def mlx_logits(model, tokens):
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def random_tokens(batch=2, length=40, vocab=128, seed=0):
    return np.random.default_rng(seed).integers(3, vocab, (batch, length)).tolist()


def edit_json(path, **changes):
    path = Path(path)
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    return value


def save_adapter(path, model, kind="lora", base="hf_model"):
    """A random mlx-lm adapter ("lora" or "full") of an MLX model (which gets it too)."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    path.mkdir()
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    if kind == "lora":
        model.freeze()
        linear_to_lora_layers(model, 2, settings)
    mx.random.seed(5)
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.trainable_parameters()))
    mx.save_safetensors(str(path / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings, "model": base}
    (path / "adapter_config.json").write_text(json.dumps(config))
