"""
How one architecture's tensors lie in Hugging Face's files and in Megatron's: what both directions of the conversion
share.
"""

import re

# computed, in old files
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias|rotary_emb\.inv_freq))$")
BLOCK_BYTES = 64 << 20
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def qkv_merge(q, k, v, H, G, D):
    """q (H*D, ...), k and v (G*D, ...) as Megatron's rows: per group its H/G query heads, its key head, its value
    head."""
    import torch
    rest, r = q.shape[1:], H // G
    parts = q.reshape(G, r, D, *rest), k.reshape(G, 1, D, *rest), v.reshape(G, 1, D, *rest)
    return torch.cat(parts, 1).reshape((H + 2 * G) * D, *rest)


def qkv_split(merged, H, G, D):
    """The inverse of qkv_merge."""
    rest, r = merged.shape[1:], H // G
    x = merged.reshape(G, r + 2, D, *rest)
    return x[:, :r].reshape(H * D, *rest), x[:, r].reshape(G * D, *rest), x[:, r + 1].reshape(G * D, *rest)


def part_rows(how, dims):
    """Rows of each Hugging Face tensor of a row, by layout; None for a copied one."""
    return {"copy": None, "qkv": (dims["A"], dims["K"], dims["K"]), "qkv_fused": (dims["Q"],),
            "gated": (dims["I"], dims["I"]),
            "gated_fused": (dims["F"],)}[how]


def hf_names(row, i=None, e=None):
    names = (row[1],) if isinstance(row[1], str) else row[1]
    return tuple(name.format(i=i, e=e) for name in names)


def shape_of(row, dims):
    return tuple(dims[letter] for letter in row[3].split())


def instances(layer_rows, spec):
    """(row, layer, expert or None) of all layer tensors, in Megatron's order."""
    for i in range(spec["num_layers"]):
        for row in layer_rows:
            for e in range(spec["num_moe_experts"]) if "{e}" in hf_names(row, "{i}", "{e}")[0] else (None,):
                yield row, i, e


def same_bits(read_a, read_b, rows, row_bytes):
    """True where two tensors' rows are equal bit for bit; read(start, stop) gives rows. Compared in blocks of 64 MB."""
    import torch
    block = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, rows, block):
        a, b = (read(start, min(rows, start + block)).contiguous() for read in (read_a, read_b))
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True
