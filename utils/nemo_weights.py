"""
The tensors of a model from Hugging Face's names to Megatron's and back, planned as small steps before anything is read.

    import_plan(source, ...)    -> [Piece], [state objects], [names not converted]    one piece is written at a time
    export_plan(checkpoint)     -> [Step]                                             one Megatron tensor of one layer at a time

A plan is complete: shapes are compared with the configuration, and a tensor that is missing or left over on either side is an error.
"""

import math
import re
from dataclasses import dataclass

from mlx_grpo import UserError
from mlx_grpo.nemo_families import dims_of, rows_of

PREFIX = {"nemo2": "module.", "bridge": "", "nemo1": "model."}
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias|rotary_emb\.inv_freq))$")   # computed, in old files
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Piece:
    """One chunk of a Megatron tensor to be written: make() gives the tensor of shape `extent`."""
    key: str
    size: tuple
    offsets: tuple
    extent: tuple
    dtype: object
    make: object


@dataclass(frozen=True)
class Step:
    """Hugging Face tensors that come from one Megatron tensor of one layer: make() gives them in the order of `names`."""
    names: tuple
    shapes: tuple
    dtype: object
    make: object


def qkv_merge(q, k, v, H, G, D):
    """q (H*D, ...), k and v (G*D, ...) as Megatron's rows: per group its H/G query heads, its key head, its value head."""
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
    return {"copy": None, "qkv": (dims["A"], dims["K"], dims["K"]), "qkv_fused": (dims["Q"],), "gated": (dims["I"], dims["I"]),
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


# ---- Hugging Face -> Megatron ----

def import_plan(source, family, spec, container, rows, copy_head, dtype=None):
    """Pieces to write, state objects, and names of `source` that aren't converted (computed buffers).

    rows: of embedding and head, >= vocab_size, the rest zeros. copy_head: write a tied head as a copy. dtype: torch dtype to
    convert to, None to keep each tensor's. Raises UserError for a missing, superfluous or wrongly shaped tensor.
    """
    outer, layer, states = rows_of(family, spec)
    dims = dims_of(spec) | {"V": spec["vocab_size"]}
    H, G, D = spec["num_attention_heads"], spec["num_query_groups"], spec["kv_channels"]
    used, pieces = set(), []
    tied = spec["share_embeddings_and_output_weights"]
    head = next(row for row in outer if row[0] == "output_layer.weight")
    embedding = next(row for row in outer if row[0] == "embedding.word_embeddings.weight")
    check_head(source, tied, embedding[1], head[1], used)

    def tensor(name, shape):
        if name not in source.tensors:
            raise UserError(f"{source.path} has no tensor {name}, which a {family.name} model of {spec['num_layers']} layers needs")
        if tuple(source.tensors[name][1]) != tuple(shape):
            raise UserError(f"{source.path}: {name} has shape {list(source.tensors[name][1])}, the configuration says {list(shape)}")
        used.add(name)
        return source.tensors[name][0]

    def read(name, part=None):
        loaded = source.read(name, part)
        return loaded if dtype is None else loaded.to(dtype)

    def padded(name, extent):
        import torch
        loaded = read(name)
        return loaded if loaded.shape[0] == extent[0] else torch.cat([loaded, loaded.new_zeros(extent[0] - loaded.shape[0], *extent[1:])])

    def outer_piece(row):
        name = embedding[1] if row is head and tied else row[1]
        kind = tensor(name, shape_of(row, dims))
        extent = shape_of(row, dims | {"V": rows})
        pieces.append(Piece(PREFIX[container] + row[0], extent, (0,) * len(extent), extent, dtype or kind, lambda: padded(name, extent)))

    def layer_pieces(row, i, e):
        shape, how, names = shape_of(row, dims), row[2], hf_names(row, i, e)
        parts = part_rows(how, dims)
        kinds = [tensor(name, shape if parts is None else (n, *shape[1:])) for name, n in zip(names, parts or (None,))]
        if len(set(kinds)) > 1 and dtype is None:
            raise UserError(f"{source.path}: {names[0]} and {names[1]} have different dtypes; choose one with --dtype")
        lead, at = ((spec["num_layers"],), (i,)) if e is None else ((spec["num_layers"], dims["E"]), (i, e))
        key = f"{PREFIX[container]}decoder.layers.{row[0]}"
        ones, zeros = (1,) * len(lead), (0,) * (len(shape) - 1)

        def add(start, count, make):
            pieces.append(Piece(key, lead + shape, at + (start,) + zeros, ones + (count,) + shape[1:], dtype or kinds[0],
                                lambda: make().reshape(ones + (count,) + shape[1:])))
        if how == "copy":
            add(0, shape[0], lambda: read(names[0]))
        elif how == "qkv":
            add(0, shape[0], lambda: qkv_merge(*(read(name) for name in names), H, G, D))
        elif how == "qkv_fused":
            add(0, shape[0], lambda: qkv_merge(*read(names[0]).split((dims["A"], dims["K"], dims["K"])), H, G, D))
        else:                                              # two pieces, as Megatron writes the halves
            I = dims["I"]
            halves = [(names[0], None), (names[1], None)] if how == "gated" else [(names[0], (0, I)), (names[0], (I, 2 * I))]
            for half, (name, part) in enumerate(halves):
                add(half * I, I, lambda name=name, part=part: read(name, part))

    outer_piece(embedding)
    for row, i, e in instances(layer, spec):
        layer_pieces(row, i, e)
    for row in outer:
        if row is not embedding and (row is not head or not tied or copy_head):
            outer_piece(row)
    dropped = sorted(name for name in set(source.tensors) - used if BUFFERS.search(name))
    left = sorted(set(source.tensors) - used - set(dropped))
    if left:
        raise UserError(f"{source.path} has {len(left)} tensors that a {family.name} model of {spec['num_layers']} layers doesn't, "
                        f"{left[0]} for one")
    check_stacks(source, pieces)
    if tied and head[1] in source.tensors:
        dropped.append(f"{head[1]} (equal to the tied embedding)")
    return pieces, state_keys(container, states, spec), dropped


def check_head(source, tied, embedding, head, used):
    """A tied model's file may hold the head all the same: fine if it equals the embedding, else it isn't tied."""
    if not tied or head not in source.tensors:
        return
    used.add(head)
    kind, shape = source.tensors[head]
    if embedding in source.tensors and source.tensors[embedding][1] == shape and same_bits(
            lambda a, b: source.read(head, (a, b)), lambda a, b: source.read(embedding, (a, b)), shape[0],
            math.prod(shape[1:]) * kind.itemsize):
        return
    raise UserError(f"{source.path}: config.json ties the head to the embedding, but {head} differs from {embedding}; "
                    "set tie_word_embeddings to false there if the head is meant")


def check_stacks(source, pieces):
    """All layers of a stacked tensor must have one dtype."""
    kinds = {}
    for piece in pieces:
        if kinds.setdefault(piece.key, piece.dtype) != piece.dtype:
            raise UserError(f"{source.path}: {piece.key} has different dtypes in different layers; choose one with --dtype")


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


# ---- Megatron -> Hugging Face ----

class MegatronTensors:
    """The tensors of a store by Megatron's names without the container's prefix, stacked or layer by layer; notes which are used."""

    def __init__(self, store):
        self.store, self.used = store, set()
        tail = "embedding.word_embeddings.weight"
        found = [key for key in store.tensors if key.endswith(tail)]
        if not found:
            old = any("language_model." in key for key in store.tensors)
            raise UserError(f"{store.folder} has no {tail}" + (": it has names from before Megatron-core, which are not supported"
                                                               if old else "; it is not a language model's checkpoint"))
        self.prefix = min(found, key=len)[:-len(tail)]
        if self.prefix not in ("", "module.", "model.", "model.module."):
            raise UserError(f"{store.folder} keeps its tensors under {self.prefix!r}, which no supported checkpoint has")
        adapter = next((key for key in store.tensors if ".adapter." in key), None)
        if adapter:
            raise UserError(f"{store.folder} holds a PEFT adapter ({adapter}); merge it in NeMo first, then convert the merged model")

    def has(self, name):
        return self.prefix + name in self.store.tensors

    def shape(self, name):
        return self.store.tensors[self.prefix + name][1]

    def dtype(self, name):
        return self.store.tensors[self.prefix + name][0]

    def rows(self, name, start, stop, lead=()):
        """Rows [start, stop) of a tensor, of its slice `lead` if stacked."""
        rest = self.shape(name)[len(lead) + 1:]
        box = self.store.read(self.prefix + name, lead + (start,) + (0,) * len(rest), (1,) * len(lead) + (stop - start,) + rest)
        return box.reshape(stop - start, *rest)

    def places(self, name, i, e, L, E):
        """(tensor name, index into its leading axes, their sizes) under which a layer's tensor may be stored."""
        if e is None:
            return [(f"decoder.layers.{name}", (i,), (L,)), (f"decoder.layers.{i}.{name}", (), ())]
        one = name.replace("experts.experts.", f"experts.experts.{e}.")
        local = name.replace("experts.experts.", f"experts.local_experts.{e}.")
        return [(f"decoder.layers.{name}", (i, e), (L, E)), (f"decoder.layers.{i}.{name}", (e,), (E,)),
                (f"decoder.layers.{one}", (i,), (L,)), (f"decoder.layers.{i}.{one}", (), ()), (f"decoder.layers.{i}.{local}", (), ())]

    def find(self, name, shape, i, e, L, E):
        """(read(start, stop), dtype) of a layer's tensor. Raises UserError where it is missing or has another shape."""
        for place, lead, sizes in self.places(name, i, e, L, E):
            if self.has(place):
                self.check(place, sizes + shape)
                return (lambda start, stop: self.rows(place, start, stop, lead)), self.dtype(place)
            if self.has(f"{place}_w") and self.has(f"{place}_v"):                   # gate and up saved apart
                half = shape[0] // 2
                for letter in "wv":
                    self.check(f"{place}_{letter}", sizes + (half,) + shape[1:])

                def read(start, stop):
                    import torch
                    both = torch.cat([self.rows(f"{place}_{letter}", 0, half, lead) for letter in "wv"])
                    return both[start:stop]
                return read, self.dtype(f"{place}_w")
        raise UserError(f"{self.store.folder} has no tensor {self.prefix}decoder.layers.{name} for layer {i}"
                        + ("" if e is None else f", expert {e}"))

    def check(self, name, shape):
        if self.shape(name) != tuple(shape):
            raise UserError(f"{self.store.folder}: {self.prefix}{name} has shape {list(self.shape(name))}, the configuration says {list(shape)}")
        self.used.add(self.prefix + name)


def plain_dtype(tensors, name, dtype):
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise UserError(f"{tensors.store.folder}: {name} has dtype {str(dtype).removeprefix('torch.')}; quantised weights can't be converted")
    return dtype


def export_plan(tensors, family, spec, tied, norm_offset=0, dtype=None):
    """Steps that give all Hugging Face tensors of a checkpoint. tied: leave the head out. norm_offset: what the container adds to
    norm weights. Raises UserError for a missing, superfluous or wrongly shaped tensor."""
    outer, layer, _ = rows_of(family, spec)
    V, dims = spec["vocab_size"], dims_of(spec)
    H, G, D, L, E = *(spec[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels", "num_layers")), dims["E"]
    stored_rows = tensors.shape("embedding.word_embeddings.weight")[0]
    steps = []

    def convert(tensor, name):
        if norm_offset and name.endswith(("layer_norm_weight", "layernorm.weight")):
            tensor = tensor - norm_offset
        return tensor if dtype is None else tensor.to(dtype)

    def outer_step(row):
        if not tensors.has(row[0]):
            raise UserError(f"{tensors.store.folder} has no tensor {tensors.prefix}{row[0]}")
        stored = shape_of(row, dims | {"V": stored_rows})
        tensors.check(row[0], stored)
        shape = shape_of(row, dims | {"V": V})
        kind = plain_dtype(tensors, row[0], tensors.dtype(row[0]))
        steps.append(Step((row[1],), (shape,), dtype or kind, lambda: [convert(tensors.rows(row[0], 0, shape[0]), row[0])]))

    def layer_step(row, i, e):
        shape, how, names = shape_of(row, dims), row[2], hf_names(row, i, e)
        read, kind = tensors.find(row[0], shape, i, e, L, E)
        kind = plain_dtype(tensors, row[0], kind)
        parts = part_rows(how, dims) or (shape[0],)

        def make():
            whole = convert(read(0, shape[0]), row[0])
            if how in ("copy", "gated_fused"):
                return [whole]
            if how == "gated":
                return list(whole.split(parts))
            split = qkv_split(whole, H, G, D)
            if how == "qkv":
                return list(split)
            import torch
            return [torch.cat(split)]
        steps.append(Step(names, tuple((n, *shape[1:]) for n in parts), dtype or kind, make))

    embedding, *rest = outer
    outer_step(embedding)
    for row, i, e in instances(layer, spec):
        layer_step(row, i, e)
    for row in rest:
        if row[0] != "output_layer.weight" or not tied:
            outer_step(row)
        elif tensors.has(row[0]):
            tensors.used.add(tensors.prefix + row[0])
    left = sorted(set(tensors.store.tensors) - tensors.used)
    if left:
        raise UserError(f"{tensors.store.folder} has {len(left)} tensors that a {family.name} model of {L} layers doesn't, {left[0]} for one")
    return steps


def head_equals_embedding(tensors):
    """True where output_layer.weight is the embedding, bit for bit."""
    name, head = "embedding.word_embeddings.weight", "output_layer.weight"
    shape = tensors.shape(name)
    return tensors.has(head) and tensors.shape(head) == shape and tensors.dtype(head) == tensors.dtype(name) and same_bits(
        lambda a, b: tensors.rows(name, a, b), lambda a, b: tensors.rows(head, a, b), shape[0],
        math.prod(shape[1:]) * tensors.dtype(name).itemsize)


def rows_are_zero(tensors, start):
    """True where embedding and head have only zeros from row `start` on, as padding has."""
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if tensors.has(name):
            shape = tensors.shape(name)
            block = max(1, BLOCK_BYTES // (math.prod(shape[1:]) * tensors.dtype(name).itemsize))
            for at in range(start, shape[0], block):
                if tensors.rows(name, at, min(shape[0], at + block)).count_nonzero():
                    return False
    return True
