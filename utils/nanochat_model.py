"""
nanochat's language model for MLX: every generation of it from October 2025 on, told apart by the config alone.

A decoder without biases and without norm weights: RMSNorm after the embedding, before every block part and before the
head; RoPE by negative angles, then RMSNorm on queries and keys; squared ReLU; untied head; logits bounded by a tanh.
Later generations add, each switched by a number in the config: learned residual scales (resid_lambdas, x0_lambdas),
value embeddings with a gate, sliding windows, the smear (each token takes in some of the one before) and the backout
(the middle of the network is subtracted at its end).

This file stands alone and lies beside the weights that convert_nanochat.py writes: `mlx_lm.load(path,
trust_remote_code=True)` runs it. MLX-GRPO's own tools use their own copy and run nothing out of a model directory.
"""

from dataclasses import dataclass, field
from typing import List, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (BaseModelArgs, create_attention_mask, create_ssm_mask,
                                scaled_dot_product_attention)
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

MODEL_TYPE = "nanochat_mlx"


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int                              # without nanochat's padding rows
    max_position_embeddings: int
    intermediate_size: int
    rope_theta: float
    qk_scale: float                              # on queries and on keys, after their norm
    logit_softcap: float
    norm_eps: float
    attention_windows: List[Optional[int]]       # per layer: a query sees keys 0 <= query - key <= window; None: all
    residual_lambdas: bool
    value_embed_layers: List[int] = field(default_factory=list)
    value_gate_channels: int = 0
    value_gate_scale: float = 0.0
    smear_channels: int = 0                      # 0: no smear
    backout_layer: Optional[int] = None          # subtract the residual stream after this block; None: no backout


def rms_norm(x, eps):
    return mx.fast.rms_norm(x, None, eps)


class Attention(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.heads, self.kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.head_dim = args.hidden_size // args.num_attention_heads
        self.eps, self.qk_scale = args.norm_eps, args.qk_scale
        self.gate_channels, self.gate_scale = args.value_gate_channels, args.value_gate_scale
        self.c_q = nn.Linear(args.hidden_size, self.heads * self.head_dim, bias=False)
        self.c_k = nn.Linear(args.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.c_v = nn.Linear(args.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.c_proj = nn.Linear(self.heads * self.head_dim, args.hidden_size, bias=False)
        if layer in args.value_embed_layers:
            self.ve_gate = nn.Linear(self.gate_channels, self.kv_heads, bias=False)
        half = self.head_dim // 2
        self._freqs = -(args.rope_theta ** (mx.arange(half, dtype=mx.float32) / half))   # nanochat rotates by -angle

    def position(self, x, offset):
        """RoPE, RMSNorm over the head, scale. x: (B, heads, L, head_dim)."""
        x = mx.fast.rope(x, self.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._freqs)
        return rms_norm(x, self.eps) * self.qk_scale

    def __call__(self, x, value_embeds, mask, cache):
        """x: (B, L, C), normed. value_embeds: (B, L, kv_heads * head_dim), or None in a layer without."""
        B, L, _ = x.shape
        queries = self.c_q(x).reshape(B, L, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        keys = self.c_k(x).reshape(B, L, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        values = self.c_v(x).reshape(B, L, self.kv_heads, self.head_dim)
        if value_embeds is not None:
            gate = self.gate_scale * mx.sigmoid(self.ve_gate(x[..., :self.gate_channels]))       # (B, L, kv_heads)
            values = values + gate[..., None] * value_embeds.reshape(values.shape)
        values = values.transpose(0, 2, 1, 3)
        offset = cache.offset if cache is not None else 0
        queries, keys = self.position(queries, offset), self.position(keys, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.head_dim ** -0.5, mask=mask)
        return self.c_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.c_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x):
        return self.c_proj(nn.relu2(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.eps = args.norm_eps
        self.attn, self.mlp = Attention(args, layer), MLP(args)
        if layer in args.value_embed_layers:     # nanochat's value_embeds.<layer>
            width = args.num_key_value_heads * args.hidden_size // args.num_attention_heads
            self.value_embed = nn.Embedding(args.vocab_size, width)

    def value_embeds(self, ids):
        """(B, L, kv_heads * head_dim), or None in a layer without. Apart from the call, whose inputs all must have a
        gradient where a block is recomputed in the backward pass (mx.checkpoint); token ids have none."""
        return self.value_embed(ids) if "value_embed" in self else None

    def __call__(self, x, value_embeds, mask, cache):
        x = x + self.attn(rms_norm(x, self.eps), value_embeds, mask, cache)
        return x + self.mlp(rms_norm(x, self.eps))


class Transformer(nn.Module):
    """Everything but the head: token ids to normed hidden states."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        self.wte = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [Block(args, layer) for layer in range(args.num_hidden_layers)]
        if args.residual_lambdas:
            self.resid_lambdas = mx.ones(args.num_hidden_layers)
            self.x0_lambdas = mx.zeros(args.num_hidden_layers)
        if args.smear_channels:
            self.smear_gate = nn.Linear(args.smear_channels, 1, bias=False)
            self.smear_lambda = mx.zeros(1)
        if args.backout_layer is not None:
            self.backout_lambda = mx.zeros(1)

    def smear(self, x, cache):
        """x_t + lambda * gate(x_t) * x_(t-1); x: (B, L, C), normed embeddings. The first token of a row stays as it is,
        padding counts as no token, and `cache` (an ArraysCache) keeps each row's last embedding for the next call."""
        mask = create_ssm_mask(x, cache)                                     # (B, L), False on padding; or None
        kept = x if mask is None else mx.where(mask[..., None], x, 0)
        first = cache[0] if cache is not None else None
        if first is None:
            first = mx.zeros_like(x[:, :1])
        shifted = mx.concatenate([first, kept], axis=1)                      # (B, L + 1, C)
        if cache is not None:
            L = x.shape[1]
            if cache.lengths is None:
                cache[0] = shifted[:, -1:]
            else:                                                            # right padding: each row ends elsewhere
                ends = mx.clip(cache.lengths, 0, L)[:, None, None]
                cache[0] = mx.take_along_axis(shifted, ends, axis=1)
            cache.advance(L)
        gate = mx.sigmoid(self.smear_gate(x[..., :self.args.smear_channels]))
        return x + self.smear_lambda.astype(x.dtype) * gate * shifted[:, :-1]

    def masks(self, x, caches):
        """The attention mask of every layer; layers with the same window share one."""
        windows, shared = self.args.attention_windows, {}
        for window, cache in zip(windows, caches):
            if window not in shared:
                keys = None if window is None else window + 1                # nanochat's window counts the past only
                shared[window] = create_attention_mask(x, cache, window_size=keys)
        return [shared[window] for window in windows]

    def __call__(self, inputs, cache=None):
        args = self.args
        caches = cache if cache is not None else [None] * (len(self.h) + 1)
        x = rms_norm(self.wte(inputs), args.norm_eps)
        if args.smear_channels:
            x = self.smear(x, caches[-1])
        x0, middle = x, None
        # MLX promotes float32 * bfloat16 to float32: without the casts one lambda turns the whole stream to float32.
        if args.residual_lambdas:
            resid_lambdas, x0_lambdas = self.resid_lambdas.astype(x.dtype), self.x0_lambdas.astype(x.dtype)
        for layer, (block, mask) in enumerate(zip(self.h, self.masks(x, caches))):
            if args.residual_lambdas:
                x = resid_lambdas[layer] * x + x0_lambdas[layer] * x0
            x = block(x, block.value_embeds(inputs), mask, caches[layer])
            if layer == args.backout_layer:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda.astype(x.dtype) * middle
        return rms_norm(x, args.norm_eps)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.transformer = Transformer(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        """Token ids (B, L) -> float32 logits (B, L, V). cache: what make_cache gives, or None."""
        logits = self.lm_head(self.transformer(inputs, cache=cache)).astype(mx.float32)
        return self.args.logit_softcap * mx.tanh(logits / self.args.logit_softcap)

    @property
    def layers(self):
        return self.transformer.h

    def make_cache(self):
        """One cache per layer, as long as its window, and one for the smear where there is one."""
        caches = [KVCache() if window is None else RotatingKVCache(max_size=window + 1)
                  for window in self.args.attention_windows]
        return caches + [ArraysCache(1)] * bool(self.args.smear_channels)
