"""
nanochat's forward pass in plain torch, for checking a conversion, and the way back: a checkpoint nanochat can load.

The rendering is written from the architecture's description, with nanochat's own parameter names, and shares no line
with the MLX model. It asks for the parameters of one layer at a time and lets them go, so a checkpoint of any size
passes through a few hundred megabytes.
"""

from collections import OrderedDict

import numpy as np

from mlx_grpo import UserError


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise UserError("this needs torch: pip install torch") from error
    return torch


def norm(x):
    return import_torch().nn.functional.rms_norm(x, (x.shape[-1],))        # eps: torch's default, as in nanochat


def rotate(x, base):
    """x: (B, T, heads, D) with channel j paired to j + D/2, rotated by -position / base^(j / (D/2))."""
    torch = import_torch()
    T, half = x.shape[1], x.shape[-1] // 2
    frequencies = 1.0 / base ** (torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)
    cos, sin = angles.cos().float()[None, :, None], angles.sin().float()[None, :, None]
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def attend(h, ids, layer, parameter, arch):
    """One layer's attention on normed input h (B, T, C)."""
    torch = import_torch()
    (B, T, C), H, K = h.shape, arch["num_attention_heads"], arch["num_key_value_heads"]
    name = f"transformer.h.{layer}.attn."
    q, k, v = (h @ parameter(f"{name}c_{part}.weight").T for part in "qkv")
    q, k, v = q.view(B, T, H, -1), k.view(B, T, K, -1), v.view(B, T, K, -1)
    if layer in arch["value_embed_layers"]:
        gate = torch.sigmoid(h[..., :arch["value_gate_channels"]] @ parameter(name + "ve_gate.weight").T)
        embeds = parameter(f"value_embeds.{layer}.weight")[ids].view(v.shape)
        v = v + arch["value_gate_scale"] * gate.unsqueeze(-1) * embeds
    q, k = (norm(rotate(part, arch["rope_theta"])) * arch["qk_scale"] for part in (q, k))
    past = torch.arange(T)[:, None] - torch.arange(T)[None]                # query - key
    window = arch["attention_windows"][layer]
    seen = (past >= 0) if window is None else (past >= 0) & (past <= window)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(H // K, dim=1) for part in (k, v))
    scores = (q @ k.transpose(-1, -2) / (C // H) ** 0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C) @ parameter(name + "c_proj.weight").T


def torch_logits(batches, parameter, arch):
    """Logits of token batches, in float32 on the CPU.

    batches: int arrays (B, T). parameter: nanochat's name -> float32 tensor, embeddings without padding rows; called
    once per layer and name. arch: the dict of nanochat_checkpoint.architecture. Returns float32 arrays (B, T, V)."""
    torch = import_torch()
    with torch.inference_mode():
        batches = [torch.from_numpy(np.asarray(ids, np.int64)) for ids in batches]
        embeddings = parameter("transformer.wte.weight")
        streams = [norm(embeddings[ids]) for ids in batches]
        del embeddings
        if arch["smear_channels"]:
            weight, scale = parameter("smear_gate.weight"), parameter("smear_lambda")
            for x in streams:
                gate = torch.sigmoid(x[:, 1:, :arch["smear_channels"]] @ weight.T)
                x[:, 1:] = x[:, 1:] + scale * gate * x[:, :-1].clone()
        starts, middles = [x.clone() for x in streams], None
        for layer in range(arch["num_hidden_layers"]):
            held = {}

            def once(name):
                if name not in held:
                    held[name] = parameter(name)
                return held[name]

            for n, x in enumerate(streams):
                if arch["residual_lambdas"]:
                    x = once("resid_lambdas")[layer] * x + once("x0_lambdas")[layer] * starts[n]
                x = x + attend(norm(x), batches[n], layer, once, arch)
                block = f"transformer.h.{layer}.mlp."
                hidden = torch.relu(norm(x) @ once(block + "c_fc.weight").T).square()
                streams[n] = x + hidden @ once(block + "c_proj.weight").T
            if layer == arch["backout_layer"]:
                middles = list(streams)
        if middles:
            streams = [x - parameter("backout_lambda") * middle for x, middle in zip(streams, middles, strict=True)]
        head, cap = parameter("lm_head.weight").T, arch["logit_softcap"]
        return [(cap * torch.tanh(norm(x) @ head / cap)).numpy() for x in streams]


def as_torch(array, dtype):
    """A NumPy float32 array (copied where it must be) as a torch tensor of that dtype."""
    torch = import_torch()
    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype))


def save_checkpoint(path, tensors):
    """tensors: pairs of nanochat's name and torch tensor, saved as nanochat saves its model."""
    import_torch().save(OrderedDict(tensors), path)
