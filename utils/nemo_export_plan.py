"""
Megatron's tensors as Hugging Face's, planned as steps before anything is read: the plan is complete, shapes are
compared with the configuration, and a tensor that is missing or left over is an error. One Megatron tensor of one layer
is in memory at a time.
"""

import math
from dataclasses import dataclass

from mlx_grpo import UserError
from mlx_grpo.nemo_families import dims_of, rows_of
from mlx_grpo.nemo_layout import (BLOCK_BYTES, EMBEDDING, HEAD, hf_names, instances, part_rows, qkv_split, same_bits,
                                  shape_of)

PREFIXES = ("", "module.", "model.", "model.module.")


@dataclass(frozen=True)
class Step:
    """Hugging Face tensors that come from one Megatron tensor of one layer: make() gives them in the order of
    `names`."""
    names: tuple
    shapes: tuple
    dtype: object
    make: object


class MegatronTensors:
    """The tensors of a store by Megatron's names without the container's prefix, stacked or layer by layer; notes which
    are used."""

    def __init__(self, store):
        self.store, self.used = store, set()
        found = [key for key in store.tensors if key.endswith(EMBEDDING)]
        if not found:
            old = any("language_model." in key for key in store.tensors)
            raise UserError(f"{store.folder} has no {EMBEDDING}: it " + (
                "has names from before Megatron-core, which are not supported" if old else "is not a language model's "
                                                                                           "checkpoint"))
        self.prefix = min(found, key=len).removesuffix(EMBEDDING)
        if self.prefix not in PREFIXES:
            raise UserError(f"{store.folder} keeps its tensors under {self.prefix!r}, which no supported checkpoint "
                            "has")
        adapter = next((key for key in store.tensors if ".adapter." in key), None)
        if adapter:
            raise UserError(f"{store.folder} holds a PEFT adapter ({adapter}); merge it in NeMo first, then convert "
                            "the merged model")

    def has(self, name):
        return self.prefix + name in self.store.tensors

    def dtype(self, name):
        return self.store.tensors[self.prefix + name][0]

    def shape(self, name):
        return self.store.tensors[self.prefix + name][1]

    def row_bytes(self, name):
        return math.prod(self.shape(name)[1:]) * self.dtype(name).itemsize

    def rows(self, name, start, stop, lead=()):
        """Rows [start, stop) of a tensor, of its slice `lead` if stacked."""
        rest = self.shape(name)[len(lead) + 1:]
        box = self.store.read(self.prefix + name, (*lead, start, *(0,) * len(rest)), (1,) * len(lead) +
                              (stop - start, *rest))
        return box.reshape(stop - start, *rest)

    def check(self, name, shape):
        """Note a tensor as used. Raises UserError where it is missing, has another shape or isn't of floats."""
        where = f"{self.store.folder}: {self.prefix}{name}"
        if not self.has(name):
            raise UserError(f"{self.store.folder} has no tensor {self.prefix}{name}")
        if self.shape(name) != tuple(shape):
            raise UserError(f"{where} has shape {list(self.shape(name))}, the configuration says {list(shape)}")
        dtype = self.dtype(name)
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise UserError(f"{where} has dtype {str(dtype).removeprefix('torch.')}; quantised weights can't be "
                            "converted")
        self.used.add(self.prefix + name)

    def places(self, name, i, e, L, E):
        """(tensor name, index into its leading axes, their sizes) under which a layer's tensor may be stored."""
        if e is None:
            return [(f"decoder.layers.{name}", (i,), (L,)), (f"decoder.layers.{i}.{name}", (), ())]
        one = name.replace("experts.experts.", f"experts.experts.{e}.")
        local = name.replace("experts.experts.", f"experts.local_experts.{e}.")
        return [(f"decoder.layers.{name}", (i, e), (L, E)), (f"decoder.layers.{i}.{name}", (e,), (E,)),
                (f"decoder.layers.{one}", (i,), (L,)), (f"decoder.layers.{i}.{one}", (), ()),
                (f"decoder.layers.{i}.{local}", (), ())]

    def find(self, name, shape, i, e, L, E):
        """(read, dtype) of a layer's tensor: read() gives it whole. Raises UserError where it is missing or has another
        shape."""
        for place, lead, sizes in self.places(name, i, e, L, E):
            if self.has(place):
                self.check(place, sizes + shape)
                return lambda: self.rows(place, 0, shape[0], lead), self.dtype(place)
            gate, up = f"{place}_w", f"{place}_v"
            if self.has(gate) and self.has(up):                   # the halves saved apart
                half = shape[0] // 2
                self.check(gate, (*sizes, half, *shape[1:]))
                self.check(up, (*sizes, half, *shape[1:]))

                def read():
                    import torch
                    return torch.cat([self.rows(gate, 0, half, lead), self.rows(up, 0, half, lead)])
                return read, self.dtype(gate)
        raise UserError(f"{self.store.folder} has no tensor {self.prefix}decoder.layers.{name} for layer {i}"
                        + ("" if e is None else f", expert {e}"))

    def head_equals_embedding(self):
        """True where the head is the embedding, bit for bit."""
        if not self.has(HEAD) or (self.shape(HEAD), self.dtype(HEAD)) != (self.shape(EMBEDDING), self.dtype(EMBEDDING)):
            return False
        return same_bits(lambda a, b: self.rows(EMBEDDING, a, b), lambda a, b: self.rows(HEAD, a, b),
                         self.shape(HEAD)[0], self.row_bytes(HEAD))

    def rows_are_zero(self, start):
        """True where embedding and head have only zeros from row `start` on, as padding has."""
        for name in filter(self.has, (EMBEDDING, HEAD)):
            rows, block = self.shape(name)[0], max(1, BLOCK_BYTES // self.row_bytes(name))
            if any(self.rows(name, at, min(rows, at + block)).count_nonzero() for at in range(start, rows, block)):
                return False
        return True


def export_plan(tensors, family, spec, tied, norm_offset=0, dtype=None):
    """Steps that give all Hugging Face tensors of a checkpoint. tied: leave the head out. norm_offset: what the
    container adds to norm weights. Raises UserError for a missing, superfluous or wrongly shaped tensor."""
    (embedding, *outer), layer, _ = rows_of(family, spec)
    L, dims = spec["num_layers"], dims_of(spec)
    heads = tuple(spec[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels"))

    def convert(tensor, name):
        if norm_offset and name.endswith(("layer_norm_weight", "layernorm.weight")):
            tensor = tensor - norm_offset
        return tensor if dtype is None else tensor.to(dtype)

    def outer_step(row):
        tensors.check(row[0], shape_of(row, dims | {"V": tensors.shape(EMBEDDING)[0]}))
        shape = shape_of(row, dims | {"V": spec["vocab_size"]})
        return Step((row[1],), (shape,), dtype or tensors.dtype(row[0]),
                    lambda: [convert(tensors.rows(row[0], 0, shape[0]), row[0])])

    def layer_step(row, i, e):
        shape, names = shape_of(row, dims), hf_names(row, i, e)
        read, stored = tensors.find(row[0], shape, i, e, L, dims["E"])
        parts = part_rows(row[2], dims) or shape[:1]
        return Step(names, tuple((n, *shape[1:]) for n in parts), dtype or stored,
                    lambda: split(row[2], convert(read(), row[0]), parts, heads))

    steps = [outer_step(embedding), *(layer_step(row, i, e) for row, i, e in instances(layer, spec))]
    for row in outer:
        if row[0] != HEAD or not tied:
            steps.append(outer_step(row))
        elif tensors.has(HEAD):
            tensors.used.add(tensors.prefix + HEAD)
    left = sorted(set(tensors.store.tensors) - tensors.used)
    if left:
        raise UserError(f"{tensors.store.folder} has {len(left)} tensors that a {family.name} model of {L} layers "
                        "doesn't, "
                        f"{left[0]} for one")
    return steps


def split(how, tensor, parts, heads):
    """The Hugging Face tensors of one Megatron tensor, by layout."""
    if how in ("copy", "gated_fused"):
        return [tensor]
    if how == "gated":
        return list(tensor.split(parts))
    q, k, v = qkv_split(tensor, *heads)
    if how == "qkv":
        return [q, k, v]
    import torch
    return [torch.cat([q, k, v])]
