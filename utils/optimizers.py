"""
Optimizers: which rule updates which weight, at which learning rate, kept in which dtype.

    optimizer = make_optimizer(config, parameters)        # then init, apply_gradients, state, learning_rate as in MLX

group       weights                                        decays   learning rate             adam ...   muon
embeddings  embed_tokens, wte, value_embed, tied heads     no       embedding_learning_rate   the rule   AdamW
head        lm_head, output                                yes      head_learning_rate        the rule   AdamW
matrices    other weights of two or more dimensions        yes      matrix_learning_rate      the rule   Muon
adapters    lora_a, lora_b, which mlx-lm stores (in, out)  yes      matrix_learning_rate      the rule   Muon
rest        norms, biases, scalars                         no       learning_rate             the rule   AdamW

A learning rate of 0 means learning_rate; each group's rate follows the schedule at its ratio to learning_rate, and
decay_all decays every group. What the rules are:

adam, adamw  Kingma and Ba 2015, Loshchilov and Hutter 2019, with bias correction (off by default in MLX).
lion         Chen et al. 2023, betas 0.9 and 0.99. Its steps are signs: use a 3 to 10 times smaller learning rate.
adafactor    Shazeer and Stern 2018, relative_step and scale_parameter off as in transformers' and TRL's trainers: the
             learning rate means what it means in Adam. Scaled by the weights' size, a LoRA's zeros would hardly move.
muon         Jordan et al. 2024 with decoupled decay (Moonlight, arXiv 2502.16982; torch.optim.Muon): MLX adds the decay
             to the gradient, where orthogonalisation undoes its size.

nanochat's RL is optimizer = "muon", matrix 0.02, embedding 0.2 / sqrt(d / 768), head 0.004 / sqrt(d / 768) with d the
width, all times an initial 0.05, linear to 0, adam_beta1 = 0.8, adam_beta2 = 0.95, no decay. Its Adam has eps 1e-10,
ours 1e-8; it runs Newton-Schulz in bfloat16, we in float32.
"""

import hashlib
import inspect
import re

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from mlx_grpo import OPTIONS, ConfigError, UserError, load_symbol, nearest

NAMES = ("adam", "adamw", "adafactor", "lion", "muon")
DECAYING = ("head", "matrices", "adapters")
RATES = {"embeddings": "embedding_learning_rate", "head": "head_learning_rate", "matrices": "matrix_learning_rate",
         "adapters": "matrix_learning_rate", "rest": "learning_rate"}
EMBEDDING = re.compile(r"wte|wpe|embed|embed_in|embed_tokens(_per_layer)?|value_embeds?|(\w+_)?embeddings?(_table)?")


# ---- groups ----------------------------------------------------------------------------------------------------------

def group_of(name, shape):
    """The group of a weight: "model.embed_tokens.weight", (V, D) -> "embeddings". An embedding whose transpose is the
    head (tied) is an embedding; what adapts an embedding or a head is an adapter."""
    parts = name.split(".")
    if len(shape) < 2:
        return "rest"
    if parts[-1] in ("lora_a", "lora_b"):          # those of experts are (experts, out, in)
        return "adapters" if len(shape) == 2 else "matrices"
    if {"lm_head", "embed_out"} & set(parts) or (parts[-2:-1] == ["output"] and not any(p.isdigit() for p in parts)):
        return "head"
    return "embeddings" if any(EMBEDDING.fullmatch(p) for p in parts) else "matrices"


# ---- Muon ------------------------------------------------------------------------------------------------------------

def orthogonalize(x, steps=5):
    """(..., rows, columns) -> the same with singular values pushed to about 0.7 to 1.2 (the smallest stay below):
    Jordan's quintic Newton-Schulz. A stack of matrices, a mixture's experts for instance, is done matrix by matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x
    x = x / (mx.sqrt(mx.square(x).sum((-2, -1), keepdims=True)) + 1e-7)         # spectral norm at most 1
    for _ in range(steps):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x


class Muon(optim.Muon):
    """MLX's Muon with decoupled decay, stacks of matrices, and the step's size by fan-out over fan-in.

    transposed: the weights are (in, out), as mlx-lm's lora_a and lora_b, not (out, in)."""

    def __init__(self, learning_rate, weight_decay=0.0, transposed=False):
        super().__init__(learning_rate, weight_decay=weight_decay)
        self.transposed = transposed

    def apply_single(self, gradient, parameter, state):
        state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        direction = self.momentum * state["v"] + (1 - self.momentum) * gradient                     # Nesterov
        rows, columns = parameter.shape[-2:]
        fan_out, fan_in = (columns, rows) if self.transposed else (rows, columns)
        size = max(1, fan_out / fan_in) ** 0.5
        decayed = parameter * (1 - self.learning_rate * self.weight_decay)
        return decayed - self.learning_rate * size * orthogonalize(direction, self.ns_steps)


# ---- stochastic rounding ---------------------------------------------------------------------------------------------

def random_key(*labels):
    """A random key that depends on the labels alone, so that a resumed run rounds as an unbroken one does."""
    digest = hashlib.sha256(" ".join(map(str, labels)).encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


def round_stochastically(x, key):
    """float32 -> bfloat16, up or down with probabilities that make the mean x; rounding to nearest would undo every
    update below 1/256 of a weight. Infinities and NaN stay what they are."""
    noise = mx.random.randint(0, 1 << 16, x.shape, dtype=mx.uint32, key=key)
    rounded = ((x.view(mx.uint32) + noise) & 0xFFFF0000).view(mx.float32)
    return mx.where(mx.isfinite(x), rounded, x).astype(mx.bfloat16)


# ---- the optimizer ---------------------------------------------------------------------------------------------------

class GroupedOptimizer(optim.Optimizer):
    """One MLX optimizer for each group of weights, behind the interface of one.

    optimizers: {group: mlx Optimizer}. group_names: {weight name: group}. ratios: {group: its rate / learning_rate}.
    dtype: of weights and moments between steps; updates are done in float32, and bfloat16 is rounded stochastically
    with bits drawn from (seed, step, name). strict: refuse a restored state with more arrays than a fresh one (a user's
    optimizer may add some as it goes). The state is {"step", "learning_rate", group: that optimizer's state}."""

    def __init__(self, optimizers, group_names, ratios, learning_rate, *, dtype=mx.float32, seed=0, strict=True):
        super().__init__()
        self.optimizers, self.group_names, self.ratios = optimizers, group_names, ratios
        self.dtype, self.seed, self.strict = dtype, seed, strict
        self.learning_rate = learning_rate

    def split(self, tree):
        """{group: the part of a tree of weights or gradients that belongs to it}, in the order of the groups."""
        parts = {group: [] for group in self.optimizers}
        for name, array in tree_flatten(tree):
            parts[self.group_names[name]].append((name, array))
        return {group: tree_unflatten(part) for group, part in parts.items() if part}

    def init(self, parameters):
        """Zero moments of the kept dtype for every weight."""
        for group, part in self.split(parameters).items():
            self.optimizers[group].init(tree_map(lambda p: p.astype(self.dtype), part))
        self._initialized = True

    def apply_gradients(self, gradients, parameters):
        """The updated weights, in the structure of the gradients and in the kept dtype. Not yet computed in float32; in
        bfloat16 computed weight by weight, so that float32 copies exist of one weight at a time."""
        if not self._initialized:
            self.init(parameters)
        self._state["step"] = self.step + 1
        weights, updated = dict(tree_flatten(parameters)), {}
        for group, part in self.split(gradients).items():
            optimizer = self.optimizers[group]
            part = tree_map(lambda g: g.astype(mx.float32), part)
            wide = tree_map_with_path(lambda name, _: weights[name].astype(mx.float32), part)
            if self.dtype == mx.float32:
                updated |= tree_flatten(optimizer.apply_gradients(part, wide), destination={})
            else:
                widened = lambda s: s.astype(mx.float32) if s.dtype == self.dtype else s
                optimizer.state = tree_map(widened, optimizer.state)
                found = tree_flatten(optimizer.apply_gradients(part, wide), destination={})
                del part, wide                        # what Python holds stays in memory once it is computed
                updated |= self.narrow(optimizer, found)
        return tree_map_with_path(lambda name, _: updated[name], gradients)

    def narrow(self, optimizer, weights):
        """Round an optimizer's float32 moments and weights {name: array} to the kept dtype, and compute them."""
        state = tree_flatten(optimizer.state, destination={})
        optimizer.state = tree_map(lambda _: None, optimizer.state)      # float32 moments are held here alone
        moments, step = {}, self.step.item()
        for key in state:                             # model.layers.0.mlp.up_proj.weight.m is that weight's
            owner = next((name for name in parents(key) if name in weights), None)
            if owner and state[key].dtype == mx.float32:
                moments.setdefault(owner, []).append(key)
        rounded = {}
        for name in list(weights):
            rounded[name] = round_stochastically(weights.pop(name), random_key(self.seed, step, name))
            for key in moments.get(name, []):
                state[key] = round_stochastically(state[key], random_key(self.seed, step, key))
            mx.eval(rounded[name], [state[key] for key in moments.get(name, [])])
        optimizer.state = tree_unflatten(state)
        return rounded

    @property
    def state(self):
        """A tree of arrays; tree_flatten names them, and tree_unflatten of the same puts the optimizer where it was."""
        return self._state | {group: optimizer.state for group, optimizer in self.optimizers.items()}

    @state.setter
    def state(self, state):
        """Raises UserError for the state of another optimizer or of other weights."""
        expected, given = (tree_flatten(s, destination={}) for s in (self.state, state))
        kind = lambda arrays, key: f"{arrays[key].shape} {arrays[key].dtype}" if key in arrays else "missing"
        for key in expected | given if self.strict else expected:
            if kind(expected, key) != kind(given, key):
                raise UserError("the optimizer state is of another optimizer, optimizer_dtype or set of weights: "
                                f"{key} is {kind(given, key)} there, {kind(expected, key)} here; use the configuration "
                                "it was trained with")
        self._state = {key: state[key] for key in ("step", "learning_rate")}
        for group, optimizer in self.optimizers.items():
            optimizer.state = state[group]

    @property
    def learning_rate(self):
        return self._state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self._state["learning_rate"] = mx.array(learning_rate)
        for group, optimizer in self.optimizers.items():
            optimizer.learning_rate = learning_rate * self.ratios[group]


def parents(key):
    """ "a.b.c" -> "a.b", "a"."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


# ---- from the configuration ------------------------------------------------------------------------------------------

def check_optimizer(config):
    """Raises ConfigError for an optimizer that doesn't exist, or an option that the chosen one would ignore."""
    name, custom = config.optimizer, ".py:" in config.optimizer
    if name not in NAMES and not custom:
        raise ConfigError(f"optimizer is {name!r}; use one of {', '.join(NAMES)}, or \"my_opt.py:Class\""
                          + nearest(name, NAMES))
    if config.weight_decay and name == "adam":
        raise ConfigError(f"weight_decay is {config.weight_decay} and optimizer \"adam\" has none; use \"adamw\"")
    if config.weight_decay and custom:
        raise ConfigError(f"weight_decay is {config.weight_decay} and {name} is constructed with a learning rate only; "
                          "set the decay in the class")
    if config.decay_all and not config.weight_decay:
        raise ConfigError("decay_all is on but weight_decay is 0; set the one or leave out the other")
    for option in ("adam_beta1", "adam_beta2"):
        if name not in ("adam", "adamw", "muon") and vars(config)[option] != OPTIONS[option].default:
            raise ConfigError(f"{option} is Adam's, and optimizer {name!r} doesn't read it; leave it out")
    for option in ("embedding_learning_rate", "head_learning_rate", "matrix_learning_rate"):
        if vars(config)[option] and not config.learning_rate:
            raise ConfigError(f"{option} is {vars(config)[option]} but learning_rate is 0, whose schedule it follows; "
                              "give learning_rate a value")


def make_optimizer(config, parameters):
    """The optimizer of config.optimizer for a tree of weights; init is still to be called. Raises ConfigError where an
    option doesn't exist or would have no effect on these weights."""
    check_optimizer(config)
    group_names = {name: group_of(name, p.shape) for name, p in tree_flatten(parameters)}
    present = [group for group in RATES if group in group_names.values()]
    for option in sorted(set(RATES.values())):
        if vars(config)[option] and option != "learning_rate" and all(RATES[group] != option for group in present):
            raise ConfigError(f"{option} is {vars(config)[option]}, but the weights that are trained have none of that "
                              "kind (a head tied to the embeddings is an embedding); leave it out")
    rate_of = lambda group: vars(config)[RATES[group]] or config.learning_rate
    ratios = {group: rate_of(group) / config.learning_rate if config.learning_rate else 1.0 for group in present}
    custom = load_custom(config.optimizer) if ".py:" in config.optimizer else None
    if custom and len(set(ratios.values())) == 1:          # one object, so that it may look at all weights together
        group_names, ratios = dict.fromkeys(group_names, "all"), {"all": ratios[present[0]]}
    optimizers = {group: custom(config.learning_rate) if custom else make_rule(config, group) for group in ratios}
    return GroupedOptimizer(optimizers, group_names, ratios, config.learning_rate,
                            dtype=getattr(mx, config.optimizer_dtype), seed=config.seed, strict=not custom)


def make_rule(config, group):
    """MLX's optimizer for one group; the learning rate is set later."""
    decay = config.weight_decay if config.decay_all or group in DECAYING else 0.0
    betas = [config.adam_beta1, config.adam_beta2]
    if config.optimizer == "muon" and group in ("matrices", "adapters"):
        return Muon(config.learning_rate, weight_decay=decay, transposed=group == "adapters")
    if config.optimizer == "adam":
        return optim.Adam(config.learning_rate, betas=betas, bias_correction=True)
    if config.optimizer == "lion":
        return optim.Lion(config.learning_rate, betas=[0.9, 0.99], weight_decay=decay)
    if config.optimizer == "adafactor":
        return optim.Adafactor(config.learning_rate, relative_step=False, scale_parameter=False, weight_decay=decay)
    return optim.AdamW(config.learning_rate, betas=betas, weight_decay=decay, bias_correction=True)


def load_custom(spec):
    """learning_rate -> the user's optimizer. Raises ConfigError for what isn't a class that MLX could use."""
    made = load_symbol(spec, "optimizer")
    if not (inspect.isclass(made) and issubclass(made, optim.Optimizer)):
        raise ConfigError(f"optimizer {spec!r} is {made!r}, which is not a subclass of mlx.optimizers.Optimizer")

    def construct(learning_rate):
        try:
            return made(learning_rate=learning_rate)
        except Exception as error:                         # the user's code may raise anything
            raise ConfigError(f"optimizer {spec!r}: constructing it with learning_rate={learning_rate} raised "
                              f"{type(error).__name__}: {error}") from error

    return construct
