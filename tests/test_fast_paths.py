"""Every fast path equals the plain one: shared prompts, passes by token budget, rows that wait and enter, quantised keys."""

from dataclasses import replace

import mlx.core as mx
import mlx_grpo
import numpy as np
import pytest
from conftest import require
from mlx.utils import tree_flatten
from mlx_grpo import (MLXGRPOConfig, Problem, Rollout, SplitModel, UserError, bucket, completion_logprobs, load_model, pad_batch,
                      plan_passes, sample_completions, take_rows, train_sampling)
from mlx_grpo.learner import Learner, checkpointed_blocks, prepare_trainable
from test_rollouts import CONFIG, chains, demo, sample  # noqa: F401
from test_trainer import CONFIG as TRAIN
from test_trainer import largest_difference, make_trainer, numbers, steps, weights
from tiny_hf import save_tiny, save_tokenizer

SHARING = ("llama3", "qwen2.5", "qwen3", "phi3", "gpt_neox", "stablelm", "qwen3_moe", "yarn", "linear", "mixtral")
REFUSED = {"gemma3": "RotatingKVCache", "gemma2": "mask"}


def random_rollouts(vocab, prompts=(5, 19, 33), G=4, T=21, seed=0):
    """Prompts and completions of many lengths."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(3, vocab, n).tolist()
    rollouts = []
    for n in prompts:
        rows = [ids(int(t)) for t in rng.integers(1, T, G)]
        rollouts.append(Rollout(Problem("", None, {}), ids(n), rows, [[-1.0] * len(r) for r in rows], [[1] * len(r) for r in rows],
                                [True] * G, [""] * G))
    return rollouts


def plain(model, batch):
    """(B, T) log-probs from whole logits of each row alone: no split, no padding, no chunk, no sharing."""
    found = np.zeros(batch.mask.shape)
    lengths, prompts, owner = (np.array(x) for x in (batch.prompt_lengths, batch.prompts, batch.prompt_of))
    for i, mask in enumerate(np.array(batch.mask)):
        L, n = int(lengths[owner[i]]), int(mask.sum())
        own = np.array(batch.completion_ids)[i, :n]
        logits = model(mx.array([[*prompts[owner[i]][:L].tolist(), *own.tolist()]]))[0, L - 1:L - 1 + n].astype(mx.float32)
        logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found[i, :n] = np.array(mx.take_along_axis(logp, mx.array(own)[:, None], axis=-1)[:, 0])
    return found


def gradients(model, batch, way, checkpointing=False):
    split, owned = SplitModel(model), model.trainable_parameters()
    def loss(trained):
        model.update(trained)
        return (completion_logprobs(split, batch, 1.0, way=way)[0] * batch.mask).sum() / batch.mask.sum()
    with checkpointed_blocks(model, checkpointing):
        found = mx.grad(loss)(owned)
        mx.eval(found)
    model.update(owned)
    return {k: np.array(g) for k, g in tree_flatten(found)}


def assert_equal_gradients(a, b, atol=2e-5):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("family", SHARING)
def test_a_shared_prompt_gives_the_log_probs_and_gradients_of_separate_rows(tmp_path, family):
    require("torch")
    save_tiny(tmp_path, family)
    save_tokenizer(tmp_path)
    model, _ = load_model(tmp_path)
    batch = pad_batch(random_rollouts(128))
    assert SplitModel(model).shares_prompts
    for way in ("each", "within"):
        logprobs = completion_logprobs(SplitModel(model), batch, 1.0, way=way)[0] * batch.mask
        np.testing.assert_allclose(np.array(logprobs), plain(model, batch), atol=5e-5)
    assert_equal_gradients(gradients(model, batch, "each"), gradients(model, batch, "within"))


@pytest.mark.parametrize("family, compiled, options", [
    ("llama3", False, {}), ("llama3", True, {}), ("qwen3_moe", False, {}), ("llama3", False, {"lora_layers": 1}),
    ("llama3", True, {"lora_layers": 1}), ("qwen3", False, {"lora_keys": ["self_attn.v_proj"]})])
def test_a_prompt_before_several_passes_gets_the_gradient_of_one_pass(tmp_path, family, compiled, options):
    require("torch")
    save_tiny(tmp_path, family)
    save_tokenizer(tmp_path)
    model, _ = load_model(tmp_path)
    split, batch = SplitModel(model), pad_batch(random_rollouts(128, prompts=(19,)))
    tokens = batch.mask.sum().item()

    def loss(part, way, states, pieces):
        found = completion_logprobs(split, part, 1.0, way=way, states=states, pieces=pieces)[0]
        return (found * part.mask).sum() / tokens, {"tokens": part.mask.sum()}

    config = MLXGRPOConfig(fine_tune_type="lora" if options else "full", **options)
    of_batches = Learner(model, config, mx.float32).gradients_of(loss, split.prompt_states, compiled)
    want, _, whole = of_batches([batch], way="each")
    got, metrics, total = of_batches([take_rows(batch, [0]), take_rows(batch, [1, 2, 3])], way="before")
    assert got == pytest.approx(want, abs=1e-5) and sum(m["tokens"] for m in metrics) == tokens
    arrays = lambda tree: {k: np.array(g) for k, g in tree_flatten(tree)}
    assert_equal_gradients(arrays(whole), arrays(total))
    _, _, twice = of_batches([batch], way="within", into=total)
    assert_equal_gradients({k: 2 * g for k, g in arrays(whole).items()}, arrays(twice), atol=4e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_whose_prompts_cannot_be_shared_says_why_and_takes_the_plain_path(tmp_path, family):
    require("torch")
    save_tiny(tmp_path, family)
    save_tokenizer(tmp_path)
    model, _ = load_model(tmp_path)
    split = SplitModel(model)
    assert not split.shares_prompts and REFUSED[family] in split.why_not


def test_prompt_sharing_with_nanochat_adapters_and_checkpointed_blocks(demo):  # noqa: F811
    model, _ = load_model("data/demo_model")
    batch = pad_batch(random_rollouts(300))
    want = gradients(model, batch, "each")
    assert_equal_gradients(want, gradients(model, batch, "within"))
    assert_equal_gradients(want, gradients(model, batch, "within", checkpointing=True))
    prepare_trainable(model, MLXGRPOConfig(fine_tune_type="lora"))
    assert_equal_gradients(gradients(model, batch, "each"), gradients(model, batch, "within", checkpointing=True))


def test_a_run_with_shared_prompts_is_the_run_without(tmp_path):
    base = replace(TRAIN, learning_rate=1e-3, kl_coeff=0.1, update_every=2, quantize_for_rollouts=True)
    results, on, few = [], {"prefix_sharing": "on", "max_tokens_per_microbatch": 0}, {"max_tokens_per_microbatch": 40}
    for ways, options in (({"each"}, on | {"prefix_sharing": "off"}), ({"within"}, on), ({"within", "before"}, on | few),
                          ({"each"}, {"prefix_sharing": "off", "max_tokens_per_microbatch": 1}),
                          ({"within"}, on | {"gradient_checkpointing": True}),
                          ({"within", "before"}, on | few | {"gradient_checkpointing": True}),
                          ({"within", "before"}, on | few | {"use_compile": True})):
        trainer = make_trainer(tmp_path, replace(base, **options))
        metrics = [{k: v for k, v in numbers(m).items()} for m in steps(trainer, 2)]
        assert {shape[-1] for shape in trainer.shapes} <= ways and ways - {"within"} <= {shape[-1] for shape in trainer.shapes}
        results.append((metrics, weights(trainer), trainer))
    (first, moved, _), *others = results
    for metrics, found, _ in others:
        for x, y in zip(first, metrics):
            assert x == pytest.approx(y, rel=1e-3, abs=1e-5)
        assert largest_difference(moved, found) < 3e-5
    assert max(s[0] for s in others[1][2].shapes) < max(s[0] for s in results[0][2].shapes)      # passes were smaller
    assert max(s[0] for s in others[2][2].shapes) == 1                                          # a row is the least


def test_passes_hold_every_row_once_within_the_budget_and_with_few_widths():
    batch = pad_batch(random_rollouts(300, prompts=(5, 40, 90, 17), G=8, T=200))
    rows = [i for i in range(32) if i % 5]
    seen = set()
    for sharing in ("on", "auto", "off"):
        for budget in (300, 1000, 5000, 0):
            found = plan_passes(batch, rows, budget, sharing)
            assert sorted(i for _, passes in found for chosen in passes for i in chosen) == rows
            for way, passes in found:
                seen.add((sharing, way))
                for chosen in passes:
                    part = take_rows(batch, chosen)
                    (P, L), (B, T) = part.prompts.shape, part.mask.shape
                    tokens = B * T + {"each": B, "within": P, "before": 0}[way] * L
                    assert tokens <= (budget or 10**9) or len(chosen) == 1
                    assert part.mask.sum().item() == np.array(batch.mask)[chosen].sum()
                assert way != "before" or len({batch.prompt_of[i].item() for chosen in passes for i in chosen}) == 1
            assert budget or all(len(passes) == 1 for _, passes in found)
    assert seen == {("on", "within"), ("on", "before"), ("auto", "each"), ("auto", "within"), ("auto", "before"), ("off", "each")}
    assert len({bucket(n) for n in range(1, 4097)}) <= 45


def test_compiled_passes_are_filled_up_to_few_row_counts_without_changing_the_numbers(tmp_path):
    trainer = make_trainer(tmp_path, TRAIN)
    trainer.fill_window()
    batch = trainer.window[0][0]
    part = take_rows(batch, [0, 1, 2], filler=2)
    assert len(part.mask) == 5 and part.mask[3:].sum().item() == 0
    value = lambda b: trainer.compute_grpo_loss(b, mx.array(8.0), batch.mask.sum())[0].item()
    assert value(part) == pytest.approx(value(take_rows(batch, [0, 1, 2])), abs=1e-6)


def counted(model, rows):
    class Counting:
        layers = model.layers

        def __call__(self, tokens, cache=None):
            rows.append(tokens.shape)
            return model(tokens, cache=cache)
    return Counting()


@pytest.mark.parametrize("at_once", [6, 16, 64])
def test_rows_forwarded_stay_within_a_tenth_of_the_sampled_tokens(demo, at_once):  # noqa: F811
    """On mixed lengths: rows that have ended leave, waiting ones enter; each prompt is prefilled once."""
    (model, tokenizer), rows = demo, []
    config = replace(CONFIG, rollout_batch_size=at_once, max_new_tokens=40, temperature=1.3)
    rollouts = sample((counted(model, rows), tokenizer), chains(7, 5, 3, 6, 7, 4), config=config, num_generations=8)
    lengths = [len(ids) for r in rollouts for ids in r.completion_ids]
    forwarded = [shape[0] for shape in rows if shape[1] == 1]
    assert sum(shape[1] > 1 for shape in rows) == 6
    assert max(forwarded) <= at_once and len(set(lengths)) > 3
    assert sum(forwarded) <= 1.1 * sum(lengths)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_concurrency_changes_no_token(tmp_path, family):
    """Rows that enter late, leave early and are padded draw what they draw alone, with sliding windows too."""
    require("torch")
    save_tiny(tmp_path, family)
    save_tokenizer(tmp_path)
    model, tokenizer = load_model(tmp_path)
    config = MLXGRPOConfig(system_prompt="", num_generations=3, max_new_tokens=24, temperature=0.5, seed=1)
    problems = [Problem([{"role": "user", "content": "word " * n}], "", {}) for n in (1, 9, 4, 20)]
    runs = []
    for at_once in (1, 4, 5, 64):
        rollouts = sample_completions(model, tokenizer, problems, replace(config, rollout_batch_size=at_once),
                                      train_sampling(config), num_generations=3, step=1)
        runs.append([r.completion_ids for r in rollouts])
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_finished_groups_are_told_while_others_decode(demo):  # noqa: F811
    order, config = [], replace(CONFIG, rollout_batch_size=4)
    rollouts = sample_completions(*demo, chains(3, 7, 5), config, train_sampling(config), num_generations=4, step=1,
                                  finished=lambda place, rollout: order.append((place, rollout)))
    assert sorted(place for place, _ in order) == [0, 1, 2]
    assert all(rollouts[place] is rollout for place, rollout in order)


def test_quantised_keys_sample_close_to_plain_ones_and_are_corrected_for(demo):  # noqa: F811
    model, tokenizer = load_model("data/demo_model")
    config = replace(CONFIG, kv_bits=8)
    rollouts = sample_completions(model, tokenizer, chains(7, 5, 7), config, train_sampling(config), num_generations=4, step=1)
    batch = pad_batch(rollouts)
    again = completion_logprobs(SplitModel(model), batch, CONFIG.temperature)[0]
    gap = np.abs(np.array((again - batch.sampler_logprobs) * batch.mask))
    assert 1e-6 < gap.max() < 0.5
    assert mlx_grpo.old_logprobs_kind(config) == "proximal"


def test_a_cache_that_cannot_be_quantised_is_refused_by_name(tmp_path):
    require("torch")
    save_tiny(tmp_path, "gemma3")
    save_tokenizer(tmp_path)
    model, tokenizer = load_model(tmp_path)
    config = MLXGRPOConfig(system_prompt="", num_generations=2, kv_bits=4)
    with pytest.raises(UserError, match="RotatingKVCache"):
        sample_completions(model, tokenizer, chains(3), config, train_sampling(config), num_generations=2, step=1)


def test_sharing_that_is_asked_for_and_impossible_is_an_error(tmp_path):
    require("torch")
    save_tiny(tmp_path / "model", "gemma3")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(UserError, match="prefix_sharing.*RotatingKVCache"):
        make_trainer(tmp_path, replace(TRAIN, model_name=str(tmp_path / "model"), prefix_sharing="on"))
