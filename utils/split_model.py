"""
A model as trunk and head, and the prompt of a group computed once for all of its completions. Part of mlx_grpo.

Only the positions that predict completion tokens are projected onto the vocabulary; and where the attention is plain, a
prompt runs through the trunk once for all of its completions, forward and backward (Prefix Grouper, arXiv 2506.05433), in
their pass or before several of them. Neither patches the model: heads are reached by standing in for the trunk, prompts by
the cache argument.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

TRUNKS = ("model", "transformer", "backbone")      # attributes of mlx-lm's Models that hold everything but the head


class HiddenStates:
    """Stands in for a model's trunk and returns hidden states already computed, so that calling the model applies only
    its head, with whatever soft-cap or scale belongs to it."""

    def __init__(self, trunk, hidden):
        self.trunk, self.hidden = trunk, hidden

    def __call__(self, *_, **__):
        return self.hidden

    def __getattr__(self, name):        # tied heads reach for trunk.embed_tokens.as_linear
        return getattr(self.trunk, name)


class PromptKeys:
    """Takes the place of a layer's cache while the prompts run: keeps their keys and values, (P, heads, L, width) each.
    Prompts are padded on the left (`padding` (P,) positions), so that all of them end where the completions begin."""

    offset = 0

    def __init__(self, padding):
        self.padding, self.arrays, self.captured = padding, (), ()

    def update_and_fetch(self, keys, values):
        self.captured = keys, values
        return keys, values

    def make_mask(self, N, return_array=False, window_size=None):
        """(P, 1, N, N) booleans; a padded position sees itself, as a softmax over nothing is not a number."""
        i, j = mx.arange(N)[:, None], mx.arange(N)[None]
        seen = (j <= i) if window_size is None else (j <= i) & (i < j + window_size)
        return (seen & (j >= self.padding[:, None, None]) | (i == j))[:, None]


class GroupKeys:
    """Takes the place of a layer's cache while the completions run: each row sees its prompt's keys and values in front of
    its own. chosen (B, P): one-hot rows; a product with them repeats a prompt for its rows, and sums in the backward pass
    in a fixed order, which a gather doesn't promise."""

    def __init__(self, arrays, padding, chosen):
        self.arrays, self.padding, self.chosen, self.captured = arrays, padding, chosen, ()
        self.offset = arrays[0].shape[2]

    def update_and_fetch(self, keys, values):
        def joined(prompt, own):
            rows = (len(own), *prompt.shape[1:])
            if len(prompt) == 1:
                return mx.concatenate([mx.broadcast_to(prompt, rows), own], axis=2)
            repeated = self.chosen.astype(prompt.dtype) @ prompt.reshape(len(prompt), -1)
            return mx.concatenate([repeated.reshape(rows), own], axis=2)
        return tuple(joined(prompt, own) for prompt, own in zip(self.arrays, (keys, values)))

    def make_mask(self, N, return_array=False, window_size=None):
        """(B, 1, N, L + N) booleans."""
        i, j = mx.arange(self.offset, self.offset + N)[:, None], mx.arange(self.offset + N)[None]
        seen = (j <= i) if window_size is None else (j <= i) & (i < j + window_size)
        padding = (self.chosen @ self.padding.astype(mx.float32)[:, None])[:, :, None]              # (B, 1, 1)
        return (seen & (j >= padding))[:, None]


class SplitModel:
    """A model as trunk and head: trunk(tokens) -> hidden (B, S, C); head(hidden) -> logits (..., V). Works on mlx-lm's
    usual shape, a Model whose attribute (TRUNKS) holds everything but the head; others keep the whole forward as trunk and
    an empty head. shares_prompts: whether completion_hidden gives the same with prompt_states; why_not: if not, why."""

    def __init__(self, model):
        self.model = model
        self.name = next((n for n in TRUNKS if isinstance(model.get(n), nn.Module)), None)
        probe = mx.array([[0, 1, 2]])
        logits = model(probe)
        self.vocab_size = logits.shape[-1]
        if self.name and not mx.array_equal(self.head(self.trunk(probe)), logits).item():
            self.name = None
        self.why_not = self.check_sharing()
        self.shares_prompts = not self.why_not

    def check_sharing(self):
        """Why prompts can't be shared, or None: the caches must be plain, and a probe must give the same both ways."""
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        kinds = {type(layer) for layer in make_prompt_cache(self.model)}
        if kinds != {KVCache}:
            return "its layers keep a " + ", ".join(sorted(kind.__name__ for kind in kinds - {KVCache}))
        prompts, lengths = mx.array([[0, 1, 2], [2, 1, 0]]), mx.array([3, 2])
        ids, rows = mx.array([[1, 0, 2, 1], [2, 2, 0, 1], [0, 1, 1, 2]]), mx.array([0, 1, 0])
        try:
            plain, shared = (self.completion_hidden(prompts, lengths, rows, ids, states).astype(mx.float32)
                             for states in (None, self.prompt_states(prompts, lengths)))
        except ValueError as error:                     # an attention of its own, which takes no mask for each row
            return f"its attention doesn't take such a mask ({error})"
        spread = mx.abs(plain).max().item()
        if not mx.abs(plain - shared).max().item() <= 0.05 * spread:      # wide: half precision; a wrong mask is far off
            return "a probe with a shared prompt gives other hidden states"
        return None

    def trunk(self, tokens, cache=None):
        return (self.model[self.name] if self.name else self.model)(tokens, cache=cache)

    def prompt_states(self, prompts, prompt_lengths):
        """What completions need of their prompts: the last hidden state (P, 1, C), and for each layer its keys and values.
        prompts (P, L), padded on the right."""
        L = prompts.shape[1]
        padding = L - prompt_lengths
        aligned = mx.take_along_axis(prompts, mx.maximum(mx.arange(L) - padding[:, None], 0), axis=1)
        layers = [PromptKeys(padding) for _ in self.model.layers]
        last = self.trunk(aligned, cache=layers)[:, -1:]
        return last, *(layer.captured for layer in layers)

    def completion_hidden(self, prompts, prompt_lengths, prompt_of, completion_ids, states=None):
        """(B, T, C): the hidden states that predict each completion token. prompts (P, L), padded on the right; prompt_of
        (B,): the prompt of each row; completion_ids (B, T). states: prompt_states, or each row runs its prompt itself."""
        (P, L), (B, T) = prompts.shape, completion_ids.shape
        if states:
            last, *layers = states
            chosen = (prompt_of[:, None] == mx.arange(P)).astype(mx.float32)
            first = (chosen.astype(last.dtype) @ last[:, 0])[:, None] if P > 1 else mx.broadcast_to(last, (B, *last.shape[1:]))
            if T == 1:
                return first
            keys = [GroupKeys(layer, L - prompt_lengths, chosen) for layer in layers]
            return mx.concatenate([first, self.trunk(completion_ids[:, :-1], cache=keys)], axis=1)
        lengths = prompt_lengths[prompt_of][:, None]                                            # (B, 1)
        place = mx.broadcast_to(mx.arange(L + T - 1), (B, L + T - 1))
        own = mx.take_along_axis(completion_ids, mx.clip(place - lengths, 0, T - 1), axis=1)
        tokens = mx.where(place < lengths, mx.take_along_axis(prompts[prompt_of], mx.minimum(place, L - 1), axis=1), own)
        return mx.take_along_axis(self.trunk(tokens), (lengths - 1 + mx.arange(T))[:, :, None], axis=1)

    def head_weights(self):
        """The trained weights that the head uses: those outside of the trunk, or, where there are none at all, the trunk's
        embedding, to which the head is tied."""
        if not self.name:
            return {}
        outside = [name for name, child in self.model.children().items() if name != self.name and tree_flatten(child)]
        trained = self.model.trainable_parameters()
        if outside:
            return {name: trained[name] for name in outside if name in trained}
        trunk = self.model[self.name]
        return {self.name: {name: trained[self.name][name] for name, child in trunk.children().items()
                            if isinstance(child, (nn.Embedding, nn.QuantizedEmbedding)) and name in trained.get(self.name, {})}}

    def head(self, hidden):
        if not self.name:
            return hidden
        vars(self.model)[self.name] = HiddenStates(self.model[self.name], hidden)
        try:
            return self.model(mx.zeros(hidden.shape[:2], dtype=mx.int32))
        finally:
            del vars(self.model)[self.name]
