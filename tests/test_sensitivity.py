"""utils/sensitivity.py: what quantising one part alone does, against NumPy, and the option that it writes."""

import tomllib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ROOT
from mlx.utils import tree_flatten
from mlx_grpo import MLXGRPOConfig, UserError, frozen_copy, load_model, sensitivity

DEMO = str(ROOT / "data/demo_model")
SHORT = ["--model", DEMO, "--num-prompts", "3", "--max-new-tokens", "16"]
PARTS = ["lm_head", "transformer.h.0", "transformer.h.1", "transformer.h.2", "transformer.h.3", "transformer.wte"]


@pytest.fixture(scope="module")
def answered():
    """(demo model, sequences)"""
    model, tokenizer = load_model(DEMO)
    return model, sensitivity.answer(model, tokenizer, ["7*3+2", "1+1*4*5", "3*9"], 16)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_damage_of_a_part_is_numpy_s_kl_of_a_model_whose_part_alone_is_quantised(answered):
    model, sequences = answered
    damage, copy_kl = sensitivity.measure(model, PARTS, sequences, 4, 64)
    for part, chosen in (("transformer.h.1", "transformer.h.1."), ("lm_head", "lm_head"), ("everything", "")):
        other, _ = load_model(DEMO)
        nn.quantize(other, 64, 4, class_predicate=lambda path, m: hasattr(m, "to_quantized") and path.startswith(chosen))
        kls = []
        for ids, start in sequences:
            p, q = (log_softmax(np.array(m(mx.array([ids]))[0, start - 1:-1])) for m in (model, other))
            kls.append((np.exp(p) * (p - q)).sum(-1))
        measured = copy_kl({}) if part == "everything" else damage[part]
        assert measured == pytest.approx(np.concatenate(kls).mean(), rel=2e-3, abs=1e-7) and measured > 1e-6


def test_the_parts_are_the_blocks_and_what_lies_outside_and_the_model_stays_as_it_was(answered):
    model, sequences = answered
    before = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    assert sensitivity.quantisable_parts(model, 64) == PARTS
    damage, _ = sensitivity.measure(model, PARTS, sequences, 8, 64)
    assert list(damage) == PARTS and max(damage.values()) < 1e-4              # 8 bits are nearly harmless
    after = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)


def test_blocks_come_in_their_order_beyond_nine():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Sequential(nn.Linear(64, 64)) for _ in range(12)]
            self.odd = nn.Linear(40, 64)                                       # 64 doesn't divide its rows

    assert sensitivity.quantisable_parts(Model(), 64) == [f"layers.{i}" for i in range(12)]
    with pytest.raises(UserError, match="--group-size 64 divides"):
        small = Model()
        small.layers = [nn.Linear(40, 40)]
        sensitivity.quantisable_parts(small, 64)


def test_an_outlier_in_one_block_is_found_and_the_written_option_mends_it(tmp_path, capsys, monkeypatch):
    model, tokenizer = load_model(DEMO)
    for _, module in model.layers[2].named_modules():
        if isinstance(module, nn.Linear):                    # one large weight in each group: a coarse scale
            weight = np.array(module.weight)
            size = 4 * np.abs(weight).max()
            weight[::2, ::64] += size
            weight[1::2, ::64] -= size
            module.weight = mx.array(weight)
    monkeypatch.setattr(sensitivity, "load_model", lambda *_, **__: (model, tokenizer))
    out = tmp_path / "line.toml"
    sensitivity.main([*SHORT, "--threshold", "0.02", "--output", str(out)])
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith(("transformer", "lm_head"))]
    assert rows[0][0] == "transformer.h.2" and rows[0][2] == "*"
    assert [float(r[1]) for r in rows] == sorted((float(r[1]) for r in rows), reverse=True)
    precision = tomllib.loads(out.read_text())["rollout_precision"]
    assert precision["transformer.h.2"] == 8 and out.read_text().strip() == text.splitlines()[-1]
    config = MLXGRPOConfig(quantize_for_rollouts=True, rollout_precision=precision)
    copy = frozen_copy(model, bits=config.rollout_bits, precision=config.rollout_precision)
    assert copy.layers[2].attn.c_q.bits == 8 and copy.layers[1].attn.c_q.bits == 4
    everything, mended = (float(next(line.split()[-1] for line in text.splitlines() if line.startswith(start)))
                          for start in ("everything", "with *"))
    assert mended < 0.8 * everything


def test_nothing_above_the_threshold_is_said(capsys):
    sensitivity.main([*SHORT, "--threshold", "5"])
    assert "rollout_precision isn't needed" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, text", [
    (["--bits", "4", "--keep-bits", "4"], "no more than --bits 4"),
    (["--num-prompts", "0"], "--num-prompts must be at least 1"),
    (["--prompts", "nowhere.txt"], "nowhere.txt can't be read"),
    (["--output", "no/such/line.toml"], "there is no directory no/such"),
])
def test_what_the_user_can_mend_is_told(arguments, text):
    with pytest.raises(UserError, match=text):
        sensitivity.main([*SHORT, *arguments])


def test_prompts_are_lines_or_rows_and_never_none(tmp_path):
    for name, content in (("a.txt", "one\n\ntwo\n"), ("a.jsonl", '{"prompt": "one"}\n{"question": "two", "x": 2}\n')):
        (tmp_path / name).write_text(content)
        assert sensitivity.read_prompts(tmp_path / name) == ["one", "two"]
    for name, content, text in (("b.txt", "\n", "holds no prompts"), ("b.jsonl", '{"text": "one"}\n', "b.jsonl:1: needs")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=text):
            sensitivity.read_prompts(tmp_path / name)


def test_a_quantised_model_is_refused(monkeypatch):
    model, tokenizer = load_model(DEMO)
    nn.quantize(model, 64, 4)
    monkeypatch.setattr(sensitivity, "load_model", lambda *_, **__: (model, tokenizer))
    with pytest.raises(UserError, match="quantised already"):
        sensitivity.main(SHORT)
