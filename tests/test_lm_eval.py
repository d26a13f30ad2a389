"""lm-evaluation-harness through mlx_lm.evaluate opens our checkpoints and scores them as we do (docs/evaluation.md)."""

import mlx.core as mx
import pytest
from conftest import require
from mlx_grpo import load_model, main
from tiny_models import QUICK, sets, tiny_qwen2

pytestmark = pytest.mark.parity


def test_the_harness_scores_a_checkpoint_of_ours_with_our_log_probs(tmp_path, monkeypatch):
    require("lm_eval")
    from lm_eval.api.instance import Instance
    from mlx_lm.evaluate import MLXLM

    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)
    model = tiny_qwen2(tmp_path / "tiny")
    main(sets(**QUICK | {"model_name": model, "output_dir": str(tmp_path), "eval_samples": 0}))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    pairs = [("Two and two is", " four"), ("Two and two is", " five"), ("1, 2,", " 3")]
    found = MLXLM(str(checkpoint)).loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    ours, tokenizer = load_model(checkpoint)
    start, _ = load_model(model)

    def scored(model, ids, n):
        """(log-prob of ids[n:], whether each of them is the likeliest) from one plain forward pass."""
        logits = model(mx.array([ids]))[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        places = range(n, len(ids))
        return (sum(logprobs[i - 1, ids[i]].item() for i in places), all(mx.argmax(logits[i - 1]).item() == ids[i] for i in places))

    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        ids, n = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
        assert (logprob, greedy) == (pytest.approx(scored(ours, ids, n)[0], abs=1e-4), scored(ours, ids, n)[1])
        assert logprob != pytest.approx(scored(start, ids, n)[0], abs=1e-4)              # the trained weights, not the first ones
