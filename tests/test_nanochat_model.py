"""The MLX model of nanochat's generations against nanochat's own outputs: logits, gradients, caches, batches."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_grpo import TiktokenTokenizerWrapper
from mlx_grpo import nanochat_checkpoint as checkpoint
from mlx_grpo.nanochat_model import Block, Model, ModelArgs
from mlx_grpo.nanochat_tokenizer import ByteDetokenizer, read_encoding
from mlx_lm.generate import BatchGenerator, generate_step, stream_generate
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from nanochat_fixtures import STORED, TINY, converted, folder, load, mean_loss, reference

LIMIT = 1e-4                 # measured: 8e-5 for generation 1 (mlx-lm's own model, eps 1e-5), 7e-6 for the others
OURS = ("gen3", "gen5")


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Generation -> its fixture, converted in float32."""
    root = tmp_path_factory.mktemp("nanochat")
    for generation in STORED:
        converted(folder(generation), root / generation)
    return {generation: root / generation for generation in STORED}


def as_ids(array):
    return mx.array(np.atleast_2d(array).astype(np.int32))


def at_positions(logits, stored, i):
    """The logits of input `i` at the positions that the reference keeps."""
    return np.array(logits)[:, stored[f"pos_{i}"]]


def largest(a, b):
    return float(np.abs(np.array(a, dtype=np.float32) - np.array(b, dtype=np.float32)).max())


def in_chunks(model, ids, size):
    """Logits of `ids` fed through the cache `size` tokens at a time."""
    cache = make_prompt_cache(model)
    return mx.concatenate([model(ids[:, at:at + size], cache=cache) for at in range(0, ids.shape[1], size)], axis=1)


def random_model(generation, seed=0, **changes):
    """An untrained model with random numbers in every parameter, the lambdas too."""
    args = checkpoint.architecture(checkpoint.GENERATIONS[generation], {**TINY, "window_pattern": "SSSL", **changes})
    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict(args))
    draw = lambda array: mx.random.normal(array.shape) * (0.1 if array.ndim > 1 else 0.5)
    model.update(tree_map(draw, model.parameters()))
    return model


@pytest.mark.parametrize("generation", STORED)
def test_logits_are_nanochats(directories, generation):
    model, stored = load(directories[generation])[0], reference(generation)
    for i in range(4):
        assert largest(at_positions(model(as_ids(stored[f"ids_{i}"])), stored, i), stored[f"logits_{i}"]) < LIMIT


@pytest.mark.parametrize("size", [1, 13, 64])
@pytest.mark.parametrize("generation", STORED)
def test_logits_through_the_cache_are_nanochats(directories, generation, size):
    """300 tokens: past the short window of 128 and past sequence_len, where "L" becomes a window too."""
    model, stored = load(directories[generation])[0], reference(generation)
    for i in (1, 3):
        logits = in_chunks(model, as_ids(stored[f"ids_{i}"]), size)
        assert largest(at_positions(logits, stored, i), stored[f"logits_{i}"]) < LIMIT


@pytest.mark.parametrize("generation", STORED)
def test_greedy_continuations_are_nanochats(directories, generation):
    model, stored = load(directories[generation])[0], reference(generation)
    for j in range(3):
        tokens = [token for token, _ in generate_step(mx.array(stored[f"prompt_{j}"]), model, max_tokens=24)]
        assert tokens == stored[f"greedy_{j}"].tolist()


@pytest.mark.parametrize("generation", STORED)
def test_loss_and_gradients_are_nanochats(directories, generation):
    model = load(directories[generation])[0]
    expected = json.loads((folder(generation) / "reference" / "grads.json").read_text())
    entries = np.load(folder(generation) / "reference" / "grads.npz")
    loss, grads = nn.value_and_grad(model, mean_loss)(model, as_ids(reference(generation)["ids_1"]))
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    grads = {checkpoint.nanochat_name(name): np.array(grad) for name, grad in tree_flatten(grads)}
    assert grads.keys() == expected["grad_l2"].keys()
    total = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in grads.values()))
    assert total == pytest.approx(expected["global_grad_l2"], rel=2e-5)
    for name, grad in grads.items():
        norm = expected["grad_l2"][name]
        assert np.linalg.norm(grad) == pytest.approx(norm, rel=1e-4), name
        index = entries[f"index/{name}"]                       # flat, in the stored shape: padding rows stand last
        inside = index < grad.size
        assert largest(grad.ravel()[index[inside]], entries[f"grad/{name}"][inside]) < 1e-4 * norm, name
        assert not entries[f"grad/{name}"][~inside].any()


@pytest.mark.parametrize("generation", STORED)
def test_a_batch_of_unequal_prompts_equals_each_alone(directories, generation):
    """Prompts shorter and longer than the window, prefilled in pieces of 50, one joining while others generate."""
    model, draw = load(directories[generation])[0], np.random.default_rng(1)
    prompts = [draw.integers(0, 500, n).tolist() for n in (7, 290, 131, 45, 200)]
    alone = [[token for token, _ in generate_step(mx.array(p), model, max_tokens=30)] for p in prompts]
    generator = BatchGenerator(model, max_tokens=30, prefill_step_size=50, completion_batch_size=4)
    tokens = {number: [] for number in generator.insert(prompts[:4])}
    late = None
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
        if late is None and max(map(len, tokens.values())) > 10:
            late = generator.insert(prompts[4:])[0]
            tokens[late] = []
    assert list(tokens.values()) == alone


def test_mlx_lm_streams_text_and_stops_at_either_end_token(directories):
    """With the tiktoken wrapper inside mlx-lm's own: whole characters only, the text of the tokens, both end tokens."""
    model, encoding = load(directories["gen5"])[0], read_encoding(directories["gen5"])
    tiktoken_wrapper = TiktokenTokenizerWrapper(encoding)
    tokenizer = TokenizerWrapper(tiktoken_wrapper, ByteDetokenizer, eos_token_ids=tiktoken_wrapper.eos_token_ids)
    prompt = reference("gen5")["prompt_0"].tolist()
    pieces = list(stream_generate(model, tokenizer, prompt, max_tokens=24))
    assert "".join(piece.text for piece in pieces) == encoding.decode(reference("gen5")["greedy_0"].tolist())
    for end in tiktoken_wrapper.eos_token_ids:
        force = lambda tokens, logits, end=end: mx.where(mx.arange(777) == end, 99.0, logits)
        *_, last = stream_generate(model, tokenizer, prompt, max_tokens=24, logits_processors=[force])
        assert (last.finish_reason, last.generation_tokens, last.text) == ("stop", 1, "")


@pytest.mark.parametrize("generation", STORED)
def test_right_padding_changes_nothing_before_it(directories, generation):
    model, ids = load(directories[generation])[0], as_ids(reference(generation)["ids_1"])
    padded = mx.pad(ids, [(0, 0), (0, 9)], constant_values=3)
    assert largest(model(padded)[:, :ids.shape[1]], model(ids)) < 1e-5


@pytest.mark.parametrize("generation", STORED)
def test_a_saved_prompt_cache_goes_on_where_it_stopped(directories, generation, tmp_path):
    model, ids = load(directories[generation])[0], as_ids(reference(generation)["ids_3"])
    cache = make_prompt_cache(model)
    model(ids[:, :200], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    logits = model(ids[:, 200:], cache=load_prompt_cache(str(tmp_path / "cache.safetensors")))
    assert largest(logits, model(ids)[:, 200:]) < 1e-4


@pytest.mark.parametrize("change", [
    {"attention_windows": [127, 127, 127, 256]}, {"attention_windows": [None] * 4}, {"rope_theta": 10000.0},
    {"qk_scale": 1.15}, {"logit_softcap": 20.0}, {"value_gate_scale": 2.0}, {"backout_layer": 1},
    {"smear_channels": 23}])
def test_any_wrong_constant_is_seen(directories, change):
    """The comparison with nanochat's logits has teeth: every constant of the config moves them by 0.1 or more."""
    config, stored = load(directories["gen5"])[1], reference("gen5")
    model = Model(ModelArgs.from_dict({**config, **change}))
    weights = mx.load(str(directories["gen5"] / "model.safetensors"))
    if "smear_channels" in change:
        weights["transformer.smear_gate.weight"] = weights["transformer.smear_gate.weight"][:, :23]
    model.load_weights(list(weights.items()), strict=True)
    logits = [at_positions(model(as_ids(stored[f"ids_{i}"])), stored, i) for i in range(4)]
    assert max(largest(logits[i], stored[f"logits_{i}"]) for i in range(4)) > 0.1


@pytest.mark.parametrize("generation", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"n_layer": 3, "n_kv_head": 1}, {"n_layer": 1, "window_pattern": "L"}])
def test_cached_decoding_equals_the_full_forward_in_every_generation(generation, changes):
    if generation == 1:
        changes = {**changes, "window_pattern": "L"}
    model = random_model(generation, **changes)
    ids = mx.random.randint(0, 600, (2, 300))
    full = model(ids)
    for size in (30, 100):
        assert largest(in_chunks(model, ids, size), full) < 1e-4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_half_until_the_logits(dtype):
    """One float32 lambda times a bfloat16 stream is float32 in MLX: the whole residual stream would double."""
    model = random_model(5)
    model.set_dtype(dtype)
    cache = make_prompt_cache(model)
    assert model(mx.array([[1, 2, 3]]), cache=cache).dtype == mx.float32
    assert {array.dtype for array in (*cache[0].keys_and_values(), cache[-1][0])} == {dtype}


def test_gates_narrower_than_a_group_are_left_alone_when_quantised():
    from mlx_lm.utils import quantize_model
    model, config = quantize_model(random_model(5), {}, group_size=32, bits=4)
    assert not any(name.endswith("gate.scales") for name, _ in tree_flatten(model.parameters()))
    assert isinstance(model.transformer.h[3].value_embed, nn.QuantizedEmbedding)
    assert isinstance(model.lm_head, nn.QuantizedLinear)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 600)


def test_recomputing_the_blocks_in_the_backward_pass_gives_the_same_gradients():
    """mx.checkpoint asks for the gradient of every array a block is called with; token ids have none."""
    from mlx_lm.tuner.trainer import grad_checkpoint
    model, ids = random_model(5), mx.random.randint(0, 600, (2, 150))
    plain = tree_flatten(nn.value_and_grad(model, mean_loss)(model, ids)[1])
    original = Block.__call__
    try:
        grad_checkpoint(model.layers[0])
        recomputed = dict(tree_flatten(nn.value_and_grad(model, mean_loss)(model, ids)[1]))
    finally:
        Block.__call__ = original
    assert all(largest(grad, recomputed[name]) < 1e-6 for name, grad in plain)


def test_it_learns():
    """Fifteen steps on one row of 40 tokens: the loss goes to a fifth."""
    from mlx.optimizers import Adam
    model, ids = random_model(5), mx.random.randint(0, 600, (1, 40))
    optimizer, step = Adam(1e-2), nn.value_and_grad(model, mean_loss)
    first = mean_loss(model, ids).item()
    for _ in range(15):
        _, grads = step(model, ids)
        optimizer.update(model, grads)
    assert mean_loss(model, ids).item() < first / 5
