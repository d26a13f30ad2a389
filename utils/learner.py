"""
What is trained: all weights or adapters, in float32 whatever the dtype of the passes; gradients and updates. Part of
mlx_grpo, which gives all of these names out again.
"""

import contextlib
import math

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_grpo import (
    Batch, ConfigError, NotFinite, UserError, cast_floats, count_parameters, evaluate_pieces, is_quantized, nearest)
from mlx_grpo.split_model import GroupKeys, PromptKeys


def lora_parameters(config):
    """The adapters' settings under mlx-lm's names, as adapter_config.json holds them."""
    scale = config.lora_alpha / config.lora_rank if config.lora_alpha else config.lora_scale
    found = {"rank": config.lora_rank, "scale": scale, "dropout": config.lora_dropout}
    return found | ({"keys": config.lora_keys} if config.lora_keys else {})


def prepare_trainable(model, config):
    """Leave trainable what config.fine_tune_type says: everything, or new adapters on a frozen base.

    Adapters are mlx-lm's: B starts at 0, so the model computes what it did; A is drawn from the seed. Raises UserError
    for a quantised model without adapters (only its norms would train, without an error), and for unknown lora_keys."""
    if config.fine_tune_type == "full":
        if is_quantized(model):
            raise UserError(f'{config.model_name} is quantised, so full fine-tuning would train only its norms; set '
                            'fine_tune_type = "lora", or convert it back with utils/convert_model.py --dequantize')
        model.unfreeze()
        return
    from mlx_lm.tuner.utils import linear_to_lora_layers

    if config.lora_layers > len(model.layers):
        raise ConfigError(f"lora_layers is {config.lora_layers}, but the model has {len(model.layers)} blocks; -1 takes all")
    names = {name for name, module in model.named_modules()} | {n for b in model.layers for n, _ in b.named_modules()}
    if unknown := [key for key in config.lora_keys if key not in names]:
        raise ConfigError(f"lora_keys: the model has no module {unknown[0]!r}{nearest(unknown[0], names)}")
    odd = [m.bits for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear) and 32 % m.bits]
    if config.fine_tune_type == "dora" and odd:
        raise ConfigError(f'{config.model_name} has {odd[0]}-bit matrices, which mlx-lm\'s DoRA takes for another shape; set '
                          'fine_tune_type = "lora", or quantise the base to 2, 4 or 8 bits')
    model.freeze()
    mx.random.seed(config.seed)
    layers = config.lora_layers if config.lora_layers >= 0 else len(model.layers)
    try:
        linear_to_lora_layers(model, layers, lora_parameters(config), use_dora=config.fine_tune_type == "dora")
    except ValueError as error:
        raise ConfigError(f"fine_tune_type {config.fine_tune_type!r}: {error}") from error


@contextlib.contextmanager
def checkpointed_blocks(model, on):
    """While it lasts, each block of the model keeps only its input for the backward pass and is computed again there
    (arXiv 1604.06174)."""
    kinds = {type(block): type(block).__call__ for block in model.layers} if on else {}

    def checkpointed(call):
        def block_call(block, *args, **kwargs):
            keys = next((a for a in (*args, *kwargs.values()) if isinstance(a, (PromptKeys, GroupKeys))), None)

            def of_weights(weights, held, *args, **kwargs):          # what a shared prompt brings along is an argument too,
                block.update(weights)                                # and what it takes away a result, or neither would
                if keys:                                             # carry a gradient
                    keys.arrays = held
                out = call(block, *args, **kwargs)
                return out, keys.captured if keys else ()

            held = keys.arrays if keys else ()
            out, captured = mx.checkpoint(of_weights)(block.trainable_parameters(), held, *args, **kwargs)
            if keys:
                keys.captured = captured
            return out
        return block_call

    for kind, call in kinds.items():
        kind.__call__ = checkpointed(call)
    try:
        yield
    finally:
        for kind, call in kinds.items():
            kind.__call__ = call


def added(total, part):
    """total + part, in float32 and in total's memory; part where there is no total yet. Trees of arrays."""
    part = cast_floats(part, mx.float32)
    if total is None:
        return part
    for (_, a), (_, b) in zip(tree_flatten(total), tree_flatten(part)):
        a += b
    return total


def clip_gradients(gradients, max_norm):
    """(gradients scaled to at most max_norm over all together, their norm before); max_norm 0 = as they are."""
    norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(gradients)))
    if max_norm:
        scale = mx.minimum(1.0, max_norm / (norm + 1e-6))
        gradients = tree_map(lambda g: g * scale, gradients)
    return gradients, norm


class Learner:
    """A model's trained weights: float32 whatever the dtype it computes in, with the optimizer's moments beside them.

    MLX's optimizers keep weights and moments in the weights' dtype, and a bfloat16 weight does not move by an update
    below 0.4 % of itself: 100 updates at learning rate 1e-6 move 2 % of them. So the update is done in float32, and
    the model gets its weights cast to the compute dtype. In float32 both are the same arrays."""

    def __init__(self, model, config, dtype):
        from mlx_grpo.optimizers import make_optimizer

        prepare_trainable(model, config)
        self.model, self.config, self.dtype = model, config, dtype
        self.master_dtype = getattr(mx, config.optimizer_dtype)
        self.master = cast_floats(model.trainable_parameters(), self.master_dtype)
        self.optimizer = make_optimizer(config, self.master)
        self.optimizer.init(self.master)
        self.model.update(cast_floats(model.parameters(), dtype))
        mx.eval(self.master, self.model.parameters())

    def gradients_of(self, loss, prompt_states, compiled=False):
        """A function of (batches, *totals, way, into) -> (value, [metrics], float32 gradients with respect to the trained
        weights, added to `into`: what it returned before, in whose memory the sum is made), for loss(batch, *totals, way=,
        states=, pieces=) -> (value, metrics). totals are scalar arrays; way: of plan_passes. With "before" the prompt of all
        batches is computed once, by prompt_states; what they ask of its states is summed, and goes back through it once,
        behind them. compiled: by mx.compile, once per shape, and then the pieces can't be evaluated one by one."""
        pieces = None if compiled else []
        first = 1 + self.first_trained_block()       # the states of blocks before it depend on nothing that is trained

        def of_pass(way):
            def value(weights, moving, fixed, arrays, *totals):
                self.model.update(weights)
                return loss(Batch(**arrays), *totals, way=way, states=(*moving[:1], *fixed, *moving[1:]), pieces=pieces)
            return mx.value_and_grad(value, argnums=(0, 1))

        def of_prompt(weights, wanted, prompts, prompt_lengths):
            self.model.update(weights)
            last, *layers = prompt_states(prompts, prompt_lengths)
            states = tree_flatten((last, *layers[first - 1:]))
            return sum((state.astype(mx.float32) * slope).sum() for (_, state), (_, slope) in zip(states, tree_flatten(wanted)))

        prepared = mx.compile if compiled else lambda function: function
        passes, through_prompt = {way: prepared(of_pass(way)) for way in ("each", "within", "before")}, prepared(mx.grad(of_prompt))

        def gradients(batches, *totals, way="each", into=None):
            weights, states, wanted, found = self.model.trainable_parameters(), (), None, []
            with checkpointed_blocks(self.model, self.config.gradient_checkpointing):
                for batch in batches:
                    if way == "before" and not states:
                        prompt = batch.prompts, batch.prompt_lengths
                        states = prompt_states(*prompt)
                        mx.eval(states)
                    moving, fixed = states[:1] + states[first:], states[1:first]
                    answer, (slopes, of_states) = passes[way](weights, moving, fixed, vars(batch), *totals)
                    self.model.update(weights)               # the traced ones would hold on to the whole graph
                    into, wanted = added(into, slopes), added(wanted, of_states)
                    del slopes, of_states, moving, fixed
                    evaluate_pieces(pieces or [])
                    mx.eval(answer, into, wanted)            # one pass's activations are freed before the next
                    found.append(answer)
                if way == "before":
                    del states
                    into = added(into, through_prompt(weights, wanted, *prompt))
                    self.model.update(weights)
                    mx.eval(into)
            return sum(value.item() for value, _ in found), [{k: v.item() for k, v in m.items()} for _, m in found], into

        return gradients

    def first_trained_block(self):
        """Index of the first of the model's blocks that anything trained comes before or lies in."""
        inside = [len(tree_flatten(block.trainable_parameters())) for block in self.model.layers]
        outside = len(tree_flatten(self.model.trainable_parameters())) > sum(inside)
        return 0 if outside else next((i for i, count in enumerate(inside) if count), 0)

    def update(self, gradients, learning_rate):
        """One optimizer update; returns the gradient norm before clipping. Raises UserError where it is not finite."""
        gradients, norm = clip_gradients(gradients, self.config.max_grad_norm)
        if not math.isfinite(norm.item()):
            raise NotFinite(f"the gradient norm is {norm.item()}; lower learning_rate, or use dtype = \"float32\"")
        self.optimizer.learning_rate = learning_rate
        self.master = self.optimizer.apply_gradients(gradients, self.master)
        self.model.update(cast_floats(self.master, self.dtype))
        mx.eval(self.master, self.model.parameters(), self.optimizer.state)
        return norm.item()

    def checkpoint_bytes(self):
        """About how much a checkpoint takes on disk: weights or adapters, and moments."""
        size = lambda tree: sum(a.nbytes for _, a in tree_flatten(tree))
        return size(self.master) + size(self.optimizer.state)

    def description(self):
        """One line: what is trained, in which dtype, and the bytes of weights, gradients and moments."""
        from mlx_grpo.files import human_bytes

        size = lambda tree: sum(a.nbytes for _, a in tree_flatten(tree))
        trained = sum(a.size for _, a in tree_flatten(self.master))
        total = count_parameters(self.model)
        apart = self.master_dtype != self.dtype
        kind = {"full": "all weights", "lora": "LoRA", "dora": "DoRA"}[self.config.fine_tune_type]
        if self.config.fine_tune_type != "full":
            settings = lora_parameters(self.config)
            said = f" = alpha {self.config.lora_alpha:g} / rank" if self.config.lora_alpha else ""
            kind += f" (rank {settings['rank']}, scale {settings['scale']:g}{said})"
        return (f"training {kind}: {trained:,} of {total:,} parameters, {self.config.optimizer} in {self.config.optimizer_dtype} | "
                f"weights {human_bytes(size(self.model.parameters()) + apart * size(self.master))}, gradients "
                f"{human_bytes(4 * trained)}, moments {human_bytes(size(self.optimizer.state))}")
