"""Optimizers: against torch, transformers and the papers' formulas; groups, decay, resume, stochastic rounding."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import require
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_grpo import ConfigError, MLXGRPOConfig, UserError
from mlx_grpo.optimizers import (EMBEDDING, NAMES, GroupedOptimizer, check_optimizer, group_of, make_optimizer,
                                 orthogonalize, random_key, round_stochastically)

SHAPES = {"model.embed_tokens.weight": (9, 4), "model.layers.0.mlp.up_proj.weight": (6, 4),
          "model.layers.0.norm.weight": (4,), "model.layers.1.mlp.down_proj.weight": (4, 6),
          "model.layers.1.mlp.down_proj.bias": (4,), "lm_head.weight": (9, 4)}
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def options(**changed):
    return MLXGRPOConfig(**({"learning_rate": 1e-2} | changed))


def tree(seed, shapes=SHAPES, scale=1.0):
    """Normal numbers for every name, as a tree of float32 arrays."""
    random = np.random.default_rng(seed)
    normal = lambda shape: mx.array((scale * random.standard_normal(shape)).astype(np.float32))
    return tree_unflatten([(name, normal(shape)) for name, shape in shapes.items()])


def flat(arrays):
    return {name: np.array(a.astype(mx.float32)) for name, a in tree_flatten(arrays)}


def run(config, steps, weights=None, shapes=SHAPES):
    """The weights after some updates with gradients tree(1), tree(2), ...; (weights, optimizer)."""
    weights = weights or tree(0, shapes)
    optimizer = make_optimizer(config, weights)
    optimizer.init(weights)
    for step in range(1, steps + 1):
        weights = optimizer.apply_gradients(tree(step, shapes), weights)
        mx.eval(weights, optimizer.state)
    return weights, optimizer


def torch_run(make, names, steps):
    """The same with a torch optimizer, for some of the weights: {name: array}."""
    torch = require("torch")
    weights = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in flat(tree(0)).items() if k in names}
    optimizer = make(torch, list(weights.values()))
    for step in range(1, steps + 1):
        for name, gradient in flat(tree(step)).items():
            if name in names:
                weights[name].grad = torch.tensor(gradient)
        optimizer.step()
    return {k: v.detach().numpy() for k, v in weights.items()}


def assert_same(ours, theirs):
    ours = flat(ours)
    for name, expected in theirs.items():
        assert np.abs(ours[name] - expected).max() <= 1e-6, name
        assert np.abs(ours[name] - flat(tree(0))[name]).max() > 1e-3                # moved by much more


# ---- the rules -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 3])
def test_adam_is_torchs(steps):
    theirs = torch_run(lambda torch, p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95)), SHAPES, steps)
    assert_same(run(options(optimizer="adam", adam_beta1=0.8, adam_beta2=0.95), steps)[0], theirs)


@pytest.mark.parametrize("steps", [1, 3])
def test_adamw_is_torchs(steps):
    theirs = torch_run(lambda torch, p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3), SHAPES, steps)
    assert_same(run(options(weight_decay=0.3, decay_all=True), steps)[0], theirs)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adafactor_is_transformers(steps, decay):
    require("transformers")
    from transformers.optimization import Adafactor

    theirs = torch_run(lambda torch, p: Adafactor(p, lr=1e-2, scale_parameter=False, relative_step=False,
                                                  warmup_init=False, weight_decay=decay), SHAPES, steps)
    assert_same(run(options(optimizer="adafactor", weight_decay=decay, decay_all=decay > 0), steps)[0], theirs)


@pytest.mark.parametrize("steps", [1, 3])
def test_adafactor_is_the_papers_algorithm(steps):
    """Algorithm 4 (matrices) and 5 (vectors) of arXiv 1804.04235 in float64, with a given step size."""
    expected = {}
    for name, w in flat(tree(0)).items():
        w, rows, columns, whole = w.astype(np.float64), 0.0, 0.0, 0.0
        for t in range(1, steps + 1):
            g = flat(tree(t))[name].astype(np.float64)
            beta2 = 1 - t**-0.8
            if w.ndim == 2:
                rows = beta2 * rows + (1 - beta2) * (g**2 + 1e-30).sum(1)                  # R_t
                columns = beta2 * columns + (1 - beta2) * (g**2 + 1e-30).sum(0)            # C_t
                v = np.outer(rows, columns) / rows.sum()
            else:
                whole = beta2 * whole + (1 - beta2) * (g**2 + 1e-30)
                v = whole
            u = g / np.sqrt(v)
            w = w - 1e-2 * u / max(1, np.sqrt((u**2).mean()))                              # clipped at RMS 1
        expected[name] = w
    assert_same(run(options(optimizer="adafactor"), steps)[0], expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_lion_is_the_papers_algorithm(steps):
    """Algorithm 2 of arXiv 2302.06675 in float64."""
    expected = {}
    for name, w in flat(tree(0)).items():
        w, m = w.astype(np.float64), 0.0
        for t in range(1, steps + 1):
            g = flat(tree(t))[name].astype(np.float64)
            w = w - 1e-2 * (np.sign(0.9 * m + 0.1 * g) + 0.3 * w)
            m = 0.99 * m + 0.01 * g
        expected[name] = w
    assert_same(run(options(optimizer="lion", weight_decay=0.3, decay_all=True), steps)[0], expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_muon_is_torchs_with_adamw_for_the_rest(steps, monkeypatch):
    torch = require("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())       # torch iterates in bfloat16, we in float32
    muon = torch_run(lambda torch, p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.3), (UP, DOWN), steps)
    rest = torch_run(lambda torch, p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3), set(SHAPES) - {UP, DOWN}, steps)
    assert_same(run(options(optimizer="muon", weight_decay=0.3, decay_all=True), steps)[0], muon | rest)


def test_muon_makes_singular_values_near_one_and_takes_stacks_matrix_by_matrix():
    x = mx.array(np.random.default_rng(0).standard_normal((3, 32, 20)).astype(np.float32))
    values = np.linalg.svd(np.array(orthogonalize(x)), compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3
    for one, of_stack in zip(x, orthogonalize(x)):
        assert np.allclose(orthogonalize(one), of_stack, atol=1e-5)


def test_muon_steps_an_adapter_as_its_transpose_in_torchs_layout():
    """mlx-lm's lora_a is (in, rank), PEFT's lora_A (rank, in): the same step, and no sqrt(in / rank) on it."""
    for ours, theirs, factor in (((64, 4), (4, 64), 1.0), ((4, 64), (64, 4), 4.0)):       # a: in 64, b: out 64
        gradient = tree(3, {"q.lora_a": ours})
        names = {"q.lora_a": ours}, {"q.weight": theirs}
        moved = []
        for shapes, g in zip(names, (gradient, {"q": {"weight": gradient["q"]["lora_a"].T}})):
            zeros = tree_map(mx.zeros_like, g)
            optimizer = make_optimizer(options(optimizer="muon"), zeros)
            optimizer.init(zeros)
            moved.append(np.array(tree_flatten(optimizer.apply_gradients(g, zeros))[0][1]))
            assert list(shapes.values())[0] == moved[-1].shape
        assert np.allclose(moved[0].T, moved[1], atol=1e-6)
        assert np.linalg.svd(moved[0], compute_uv=False).mean() == pytest.approx(1e-2 * factor, rel=0.3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_quadratic(name, dtype):
    """Half the squared distance to a target, 60 steps at 0.05 that fall linearly: less than a tenth is left."""
    target, weights = tree(1), tree_map(lambda w: w.astype(getattr(mx, dtype)), tree(2))
    distance = lambda w: sum(float(((a - b) ** 2).sum()) for a, b in zip(flat(w).values(), flat(target).values()))
    before = distance(weights)
    optimizer = make_optimizer(options(optimizer=name, learning_rate=0.1, optimizer_dtype=dtype), weights)
    optimizer.init(weights)
    for step in range(60):
        optimizer.learning_rate = 0.1 * (1 - step / 60)
        gradients = tree_map(lambda w, t: w.astype(mx.float32) - t, weights, target)
        weights = optimizer.apply_gradients(gradients, weights)
        mx.eval(weights, optimizer.state)
    assert distance(weights) < 0.1 * before


# ---- groups ----------------------------------------------------------------------------------------------------------

def test_groups_by_name_and_shape():
    expected = {"model.embed_tokens.weight": "embeddings", "transformer.wte.weight": "embeddings",
                "wpe.weight": "embeddings", "model.tok_embeddings.weight": "embeddings",
                "model.layers.3.attn.value_embed.weight": "embeddings",
                "lm_head.weight": "head", "language_model.lm_head.weight": "head", "output.weight": "head",
                "model.layers.0.output.weight": "matrices", "model.layers.0.attention.output.dense.weight": "matrices",
                "model.layers.0.self_attn.q_proj.weight": "matrices", "model.layers.0.mlp.ve_gate.weight": "matrices",
                "model.layers.0.self_attn.q_proj.lora_a": "adapters", "model.embed_tokens.lora_b": "adapters",
                "lm_head.lora_a": "adapters"}
    assert {name: group_of(name, (8, 4)) for name in expected} == expected
    for leaf in ("weight", "lora_a", "lora_b"):                # mlx-lm's adapters of experts are (experts, out, in)
        assert group_of(f"model.layers.0.mlp.switch_mlp.up_proj.{leaf}", (4, 8, 4)) == "matrices"
    for name in ("model.norm.weight", "lm_head.bias", "model.embed_norm.weight", "resid_lambdas", "q_proj.m"):
        assert group_of(name, (4,)) == "rest"


def test_every_embedding_and_head_that_mlx_lm_names_is_known():
    import mlx_lm

    source = "\n".join(f.read_text() for f in (Path(mlx_lm.__file__).parent / "models").glob("*.py"))
    embeddings = set(re.findall(r"self\.(\w+) = nn\.Embedding", source))
    heads = set(re.findall(r"self\.(\w+) = nn\.Linear\([^()]*vocab_size, bias", source))
    assert {"embed_tokens", "wte"} <= embeddings and "lm_head" in heads
    assert all(EMBEDDING.fullmatch(name) for name in embeddings)
    assert {group_of(f"{name}.weight", (8, 4)) for name in heads} == {"head"}


def test_each_group_moves_at_its_own_rate_through_the_schedule():
    """Adam's first step is the learning rate in every weight."""
    config = options(optimizer="adam", learning_rate=1e-3, embedding_learning_rate=2e-1, head_learning_rate=4e-3,
                     matrix_learning_rate=2e-2)
    for share in (1.0, 0.25):
        weights = tree(0)
        optimizer = make_optimizer(config, weights)
        optimizer.init(weights)
        optimizer.learning_rate = share * 1e-3
        assert optimizer.learning_rate.item() == pytest.approx(share * 1e-3)
        moved = flat(tree_map(lambda a, b: mx.abs(a - b), optimizer.apply_gradients(tree(1), weights), weights))
        for name, rate in {"model.embed_tokens.weight": 2e-1, "lm_head.weight": 4e-3, UP: 2e-2, DOWN: 2e-2,
                           "model.layers.0.norm.weight": 1e-3}.items():
            assert np.allclose(moved[name], share * rate, rtol=1e-3), name


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("decay_all", [False, True])
def test_decay_shrinks_matrices_and_the_head_and_the_others_only_when_asked(name, decay_all):
    """Without a gradient, a decaying weight is multiplied by 1 - learning_rate * weight_decay."""
    shapes = SHAPES | {"model.layers.0.q_proj.lora_a": (4, 2)}
    weights = tree(0, shapes)
    optimizer = make_optimizer(options(optimizer=name, weight_decay=0.5, decay_all=decay_all), weights)
    optimizer.init(weights)
    after = flat(optimizer.apply_gradients(tree(1, shapes, scale=0.0), weights))
    for weight, before in flat(weights).items():
        spared = not decay_all and ("embed" in weight or len(shapes[weight]) == 1)
        assert np.allclose(after[weight], before * (1 if spared else 0.995), atol=1e-7), weight


def test_the_update_keeps_the_gradients_structure():
    shapes = {"layers.2.q.lora_a": (4, 2)}                    # layers 0 and 1 are frozen: a list with two empty places
    weights, _ = run(options(), 2, tree(0, shapes), shapes)
    assert [len(layer) for layer in weights["layers"]] == [0, 0, 1]
    lone = {"layers": [*tree(0, shapes)["layers"], {}]}
    after = make_optimizer(options(), lone).apply_gradients(lone, lone)
    assert len(after["layers"]) == 4


# ---- state -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_exactly(name, dtype, tmp_path):
    config = options(optimizer=name, optimizer_dtype=dtype, matrix_learning_rate=0.03)
    start = tree_map(lambda w: w.astype(getattr(mx, dtype)), tree(0))
    unbroken, _ = run(config, 4, start)
    weights, optimizer = run(config, 2, start)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(sorted(tree_flatten(optimizer.state))))
    for restored in (True, False):
        again = make_optimizer(config, weights)
        again.init(weights)
        if restored:
            again.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
            assert again.step.item() == 2
        resumed = weights
        for step in (3, 4):
            resumed = again.apply_gradients(tree(step), resumed)
        same = [np.array_equal(a, b) for a, b in zip(flat(resumed).values(), flat(unbroken).values())]
        assert all(same) == restored             # without the state it goes elsewhere


def test_the_state_of_another_configuration_is_refused():
    saved = run(options(), 1)[1].state
    others = [{"optimizer": name} for name in ("lion", "muon", "adafactor")]
    for change in others + [{"optimizer_dtype": "bfloat16"}]:
        optimizer = make_optimizer(options(**change), tree(0))
        optimizer.init(tree(0))
        with pytest.raises(UserError, match="use the configuration it was trained with"):
            optimizer.state = saved


# ---- bfloat16 --------------------------------------------------------------------------------------------------------

def test_stochastic_rounding_goes_to_the_two_neighbours_and_is_right_on_average():
    for value in (1.0 + 2**-10, -1.0 - 2**-10, 3.1e-5):        # bfloat16 has steps of 2^-7 above 1
        x = mx.full((40000,), value)
        rounded = round_stochastically(x, random_key(0))
        assert rounded.dtype == mx.bfloat16
        found = np.array(rounded.astype(mx.float32))
        step = 2.0 ** (np.floor(np.log2(abs(value))) - 7)
        assert len(np.unique(found)) == 2 and np.abs(found - value).max() < step
        assert abs(found.mean() - value) < 4 * step * 0.5 / 200              # four standard errors
    exact = mx.array([0.0, 1.0, -2.5, float("inf"), -float("inf")])
    assert mx.array_equal(round_stochastically(exact, random_key(1)).astype(mx.float32), exact)
    every_nan = mx.array(np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32)).view(mx.float32)
    assert mx.isnan(round_stochastically(every_nan, random_key(2))).all()


def test_bfloat16_weights_move_as_far_as_float32_ones_do():
    """100 AdamW updates at 1e-6, each far below a bfloat16 step; rounded to nearest, hardly any weight would move."""
    shapes = {"a.up_proj.weight": (64, 64), "a.norm.weight": (64,)}
    start = tree_map(lambda w: w.astype(mx.bfloat16), tree(0, shapes, 0.02))
    push = tree(1, shapes)                                     # every weight one way, so that the way is 100 * 1e-6
    way = tree_map(mx.sign, push)

    def moved(dtype, nearest=False):
        weights = tree_map(lambda w: w.astype(getattr(mx, dtype)), start)
        optimizer = make_optimizer(options(learning_rate=1e-6, optimizer_dtype=dtype), weights)
        optimizer.init(weights)
        for _ in range(100):
            weights = optimizer.apply_gradients(push, weights)
            if nearest:
                weights = tree_map(lambda w: w.astype(mx.bfloat16).astype(mx.float32), weights)
            mx.eval(weights, optimizer.state)
        gone = tree_map(lambda w, s, d: ((w.astype(mx.float32) - s.astype(mx.float32)) * d).sum(), weights, start, way)
        return -sum(g.item() for _, g in tree_flatten(gone)) / 4160

    exact = moved("float32")
    assert exact == pytest.approx(1e-4, rel=0.01)
    assert moved("bfloat16") == pytest.approx(exact, rel=0.1)
    assert moved("float32", nearest=True) < 0.3 * exact


def test_bfloat16_is_what_is_kept_and_the_seed_decides_the_rounding():
    start = tree_map(lambda w: w.astype(mx.bfloat16), tree(0))
    weights, optimizer = run(options(optimizer_dtype="bfloat16"), 2, start)
    kept = [a for _, a in tree_flatten([weights, optimizer.state]) if a.size > 1]
    assert all(a.dtype == mx.bfloat16 for a in kept)
    other = run(options(optimizer_dtype="bfloat16", seed=1), 2, start)[0]
    assert flat(other)[UP].tolist() != flat(weights)[UP].tolist()


def test_bfloat16_second_moments_follow_the_gradients():
    """beta2 = 0.999 changes v by a thousandth, which rounding to nearest would lose: v would stand still."""
    shapes = {"a.up_proj.weight": (64, 64)}
    weights = {"a": {"up_proj": {"weight": mx.zeros((64, 64), mx.bfloat16)}}}
    optimizer = make_optimizer(options(optimizer_dtype="bfloat16"), weights)
    optimizer.init(weights)
    for _ in range(100):
        weights = optimizer.apply_gradients(tree_map(mx.ones_like, tree(0, shapes)), weights)
    v = optimizer.state["matrices"]["a"]["up_proj"]["weight"]["v"].astype(mx.float32)
    assert v.mean().item() == pytest.approx(1 - 0.999**100, rel=0.02)
    assert v.std().item() < 0.05 * v.mean().item()             # new bits each step: the same ones would add up


# ---- the configuration -----------------------------------------------------------------------------------------------

OWN = """
import mlx.core as mx
from mlx.optimizers import Optimizer

class SignSGD(Optimizer):
    def __init__(self, learning_rate):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
    def init_single(self, parameter, state):
        state["count"] = mx.zeros_like(parameter)
    def apply_single(self, gradient, parameter, state):
        state["count"] = state["count"] + 1
        return parameter - self.learning_rate * mx.sign(gradient)

class NeedsMore(Optimizer):
    def __init__(self, learning_rate, momentum): ...

def function(learning_rate): ...
"""


def test_a_users_own_optimizer_updates_all_weights_and_takes_the_group_rates(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    spec = f"{tmp_path / 'own.py'}:SignSGD"
    for rates, groups in ({}, {"all"}), ({"head_learning_rate": 0.05}, {"embeddings", "matrices", "head", "rest"}):
        weights, optimizer = run(options(optimizer=spec, **rates), 1)
        assert isinstance(optimizer, GroupedOptimizer) and set(optimizer.optimizers) == groups
        for name, before in flat(tree(0)).items():
            rate = rates.get("head_learning_rate", 0.01) if name == "lm_head.weight" else 0.01
            assert np.allclose(np.abs(flat(weights)[name] - before), rate, atol=1e-6), name
        again = make_optimizer(options(optimizer=spec, **rates), weights)
        again.init(weights)
        again.state = tree_unflatten(tree_flatten(optimizer.state))
        again.apply_gradients(tree(2), weights)
        assert max(a.max().item() for name, a in tree_flatten(again.state) if name.endswith("count")) == 2


@pytest.mark.parametrize("changed, says", [
    ({"optimizer": "adanw"}, "optimizer is 'adanw'; use one of adam, adamw, .*did you mean 'adamw'"),
    ({"optimizer": "adam", "weight_decay": 0.1}, 'optimizer "adam" has none; use "adamw"'),
    ({"decay_all": True}, "decay_all is on but weight_decay is 0"),
    ({"optimizer": "lion", "adam_beta2": 0.95}, "adam_beta2 is Adam's, and optimizer 'lion' doesn't read it"),
    ({"optimizer": "x.py:X", "weight_decay": 0.1}, "set the decay in the class"),
    ({"learning_rate": 0.0, "matrix_learning_rate": 0.1}, "matrix_learning_rate is 0.1 but learning_rate is 0"),
])
def test_options_that_would_be_ignored_are_refused(changed, says):
    with pytest.raises(ConfigError, match=says):
        check_optimizer(options(**changed))


def test_a_rate_for_a_group_that_is_not_trained_is_refused():
    with pytest.raises(ConfigError, match="head_learning_rate is 0.004, but the weights that are trained have none"):
        make_optimizer(options(head_learning_rate=0.004), tree(0, {UP: (6, 4)}))
    make_optimizer(options(matrix_learning_rate=0.004), tree(0, {"q.lora_a": (6, 4)}))


@pytest.mark.parametrize("name, says", [
    ("function", "not a subclass of mlx.optimizers.Optimizer"),
    ("NeedsMore", "raised TypeError: .*momentum"),
    ("SignSDG", "did you mean 'SignSGD'"),
])
def test_a_users_optimizer_that_cannot_be_used_is_refused(name, says, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(ConfigError, match=says):
        make_optimizer(options(optimizer=f"{tmp_path / 'own.py'}:{name}"), tree(0))
