"""
Hugging Face's tensors as Megatron's, planned as pieces before anything is read: the plan is complete, shapes are
compared with the configuration, and a tensor that is missing or left over is an error. One piece is in memory at a
time.
"""

import math
from dataclasses import dataclass

from mlx_grpo import UserError
from mlx_grpo.nemo_families import dims_of, rows_of
from mlx_grpo.nemo_layout import (BUFFERS, EMBEDDING, HEAD, hf_names, instances, part_rows, qkv_merge, same_bits,
                                  shape_of)

PREFIX = {"nemo2": "module.", "bridge": "", "nemo1": "model."}


@dataclass(frozen=True)
class Piece:
    """One chunk of a Megatron tensor to be written: make() gives the tensor of shape `extent`."""
    key: str
    size: tuple
    offsets: tuple
    extent: tuple
    dtype: object
    make: object


def import_plan(source, family, spec, container, rows, copy_head, dtype=None):
    """([Piece], state objects' keys, names of `source` that aren't converted) for a whole model.

    source: an HFSource. rows: of embedding and head, >= vocab_size, the rest zeros. copy_head: write a tied head as a
    copy. dtype: torch dtype to convert to, None to keep each tensor's. Raises UserError for a missing, superfluous or
    wrongly shaped tensor.
    """
    outer, layer, states = rows_of(family, spec)
    plan = ImportPlan(source, family, spec, container, rows, dtype)
    outer = {row[0]: row for row in outer}
    tied = spec["share_embeddings_and_output_weights"]
    embedding, head = outer.pop(EMBEDDING), outer.pop(HEAD)
    equal_head = tied and head[1] in source.tensors
    if equal_head:
        check_tied_head(source, embedding[1], head[1])
        plan.used.add(head[1])
    plan.add_outer(embedding, embedding[1])
    for row, i, e in instances(layer, spec):
        plan.add_layer(row, i, e)
    for row in outer.values():
        plan.add_outer(row, row[1])
    if not tied or copy_head:
        plan.add_outer(head, embedding[1] if tied else head[1])
    left_out = plan.finish()
    return plan.pieces, state_keys(container, states,
                                   spec), left_out + [f"{head[1]} (equal to the tied embedding)"] * equal_head


class ImportPlan:
    """Collects the pieces of a model and notes which tensors of the source they use."""

    def __init__(self, source, family, spec, container, rows, dtype):
        self.source, self.family, self.spec, self.rows, self.dtype = source, family, spec, rows, dtype
        self.prefix, self.dims = PREFIX[container], dims_of(spec) | {"V": spec["vocab_size"]}
        self.heads = tuple(spec[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels"))
        self.used, self.pieces = set(), []

    def check(self, name, shape):
        """Note a tensor as used and return its dtype. Raises UserError where it is missing or has another shape."""
        if name not in self.source.tensors:
            raise UserError(f"{self.source.path} has no tensor {name}, which a {self.family.name} model of "
                            f"{self.spec['num_layers']} layers needs")
        dtype, found = self.source.tensors[name]
        if tuple(found) != tuple(shape):
            raise UserError(f"{self.source.path}: {name} has shape {list(found)}, the configuration says {list(shape)}")
        self.used.add(name)
        return dtype

    def read(self, name, rows=None):
        tensor = self.source.read(name, rows)
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def padded(self, name, extent):
        """A tensor with rows of zeros behind it, up to the shape `extent`."""
        tensor, missing = self.read(name), extent[0] - self.source.tensors[name][1][0]
        if missing == 0:
            return tensor
        import torch
        return torch.cat([tensor, tensor.new_zeros(missing, *extent[1:])])

    def add_outer(self, row, name):
        """A tensor outside the layers, from the Hugging Face tensor `name`."""
        dtype = self.check(name, shape_of(row, self.dims))
        extent = shape_of(row, self.dims | {"V": self.rows})
        self.pieces.append(Piece(self.prefix + row[0], extent, (0,) * len(extent), extent, self.dtype or dtype,
                                 lambda: self.padded(name, extent)))

    def add_layer(self, row, i, e):
        """The piece of one layer (and expert), or the two halves of a gated one, as Megatron writes them."""
        shape, how, names = shape_of(row, self.dims), row[2], hf_names(row, i, e)
        parts = part_rows(how, self.dims) or shape[:1]
        dtypes = {self.check(name, (n, *shape[1:])) for name, n in zip(names, parts)}
        if len(dtypes) > 1 and self.dtype is None:
            raise UserError(f"{self.source.path}: {names[0]} and {names[1]} have different dtypes; choose one with "
                            "--dtype")
        L, E, I = self.spec["num_layers"], self.dims["E"], self.dims["I"]
        lead, at = ((L,), (i,)) if e is None else ((L, E), (i, e))
        halves = {"gated": [(names[0], None), (names[-1], None)], "gated_fused": [(names[0], (0, I)),
                                                                                  (names[0], (I, 2 * I))]}
        makers = {"copy": lambda: self.read(names[0]),
                  "qkv": lambda: qkv_merge(*(self.read(name) for name in names), *self.heads),
                  "qkv_fused": lambda: qkv_merge(*self.read(names[0]).split([self.dims[k] for k in "AKK"]),
                                                 *self.heads)}
        steps = [makers[how]] if how in makers else [lambda half=half: self.read(*half) for half in halves[how]]
        count = shape[0] // len(steps)
        for index, make in enumerate(steps):
            extent = (1,) * len(lead) + (count, *shape[1:])
            self.pieces.append(Piece(f"{self.prefix}decoder.layers.{row[0]}", lead + shape,
                                     at + (index * count,) + (0,) * (len(shape) - 1), extent, self.dtype
                                     or next(iter(dtypes)),
                                     lambda make=make, extent=extent: make().reshape(extent)))

    def finish(self):
        """Names of computed buffers, which aren't converted. Raises UserError for any other tensor that no piece uses,
        and for layers of different dtypes in one stack."""
        rest = set(self.source.tensors) - self.used
        buffers = sorted(name for name in rest if BUFFERS.search(name))
        left = sorted(rest - set(buffers))
        if left:
            raise UserError(f"{self.source.path} has {len(left)} tensors that a {self.family.name} model of "
                            f"{self.spec['num_layers']} layers doesn't, {left[0]} for one")
        dtypes = {}
        for piece in self.pieces:
            if dtypes.setdefault(piece.key, piece.dtype) != piece.dtype:
                raise UserError(f"{self.source.path}: {piece.key} has different dtypes in different layers; choose one "
                                "with --dtype")
        return buffers


def check_tied_head(source, embedding, head):
    """A tied model's file may hold the head all the same. Raises UserError where it differs from the embedding."""
    dtype, shape = source.tensors[head]
    if source.tensors.get(embedding) != (dtype, shape) or not same_bits(
            lambda a, b: source.read(head, (a, b)), lambda a, b: source.read(embedding, (a, b)), shape[0],
            math.prod(shape[1:]) * dtype.itemsize):
        raise UserError(f"{source.path}: config.json ties the head to the embedding, but {head} differs from "
                        f"{embedding}; "
                        "set tie_word_embeddings to false there if the head is meant")


def state_keys(container, states, spec):
    """The keys of TransformerEngine's state objects, which Megatron's loader insists on."""
    L, E, keys = spec["num_layers"], spec.get("num_moe_experts"), []
    for i in range(L):
        for module in states:
            if module.endswith("core_attention") and container == "bridge":
                continue
            shards = [f"{i}.{e}_{L}.{E}" for e in range(E)] if ".experts." in module else [f"{i}_{L}"]
            keys += [f"{PREFIX[container]}decoder.layers.{module}._extra_state/shard_{shard}" for shard in shards]
    return [*keys, f"{PREFIX[container]}decoder.final_layernorm._extra_state/shard_0_1"]
