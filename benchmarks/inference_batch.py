"""
Throughput of utils/inference.py --batch: N prompts decoded together against the same N one by one.

    python benchmarks/inference_batch.py                                  # a random model of 24 layers, 1024 wide
    python benchmarks/inference_batch.py --model mlx_model --prompts 16 --max-tokens 128

Both ways generate the same number of tokens (end tokens don't end), greedily, after a warm-up. Prints one JSON line:
tokens per second both ways, their ratio, and whether the tokens are the same.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # runs from a plain clone, from any directory

from mlx_grpo import run_command  # noqa: E402
from mlx_grpo.inference_batch import generate_batch  # noqa: E402
from mlx_grpo.inference_engine import Sampling, Session  # noqa: E402

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402


class NoEnd:
    """In a tokenizer's place: nothing ends a completion and no text is made."""
    eos_token_ids = frozenset()

    @staticmethod
    def decode(ids, skip_special_tokens=False):
        return ""


def random_model(layers, width, vocab, dtype):
    """A Qwen3 of random weights in `dtype`."""
    from mlx.utils import tree_map
    from mlx_lm.models.qwen3 import Model, ModelArgs
    mx.random.seed(0)
    model = Model(ModelArgs(
        model_type="qwen3", hidden_size=width, num_hidden_layers=layers, intermediate_size=3 * width,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), head_dim=64, rms_norm_eps=1e-6,
        vocab_size=vocab, max_position_embeddings=4096, rope_theta=1e6, tie_word_embeddings=True))
    model.update(tree_map(lambda a: a.astype(getattr(mx, dtype)), model.parameters()))
    return model


def measure(model, prompts, max_tokens):
    """The JSON line's dictionary."""
    sampling = Sampling(temperature=0, max_tokens=max_tokens)

    def one_by_one(prompts):
        rows = []
        for prompt in prompts:
            session = Session(model, NoEnd, sampling)
            list(session.stream(prompt))
            rows.append(session.sampled)
        return rows

    def together(prompts):
        results = dict(generate_batch(model, NoEnd, prompts, sampling, len(prompts)))
        return [results[i].ids for i in range(len(prompts))]

    rows, per_s = {}, {}
    for name, run in (("one_by_one", one_by_one), ("batched", together)):
        run(prompts[:2])        # compiles what has to be compiled
        start = time.perf_counter()
        rows[name] = run(prompts)
        per_s[name] = len(prompts) * max_tokens / (time.perf_counter() - start)
    same = sum(a == b for a, b in zip(rows["one_by_one"], rows["batched"]))
    return {"prompts": len(prompts), "max_tokens": max_tokens, "device": str(mx.default_device()),
            "one_by_one_tokens_per_s": round(per_s["one_by_one"], 2),
            "batched_tokens_per_s": round(per_s["batched"], 2),
            "ratio": round(per_s["batched"] / per_s["one_by_one"], 2), "equal_rows": same}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub id (default: random weights)")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="longest prompt; the shortest is half of it")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    if options.model:
        from mlx_grpo import load_model
        model, tokenizer = load_model(options.model)
        vocab = min(options.vocab, len(tokenizer.get_vocab()))
    else:
        model, vocab = random_model(options.layers, options.width, options.vocab, options.dtype), options.vocab
    draw = np.random.default_rng(0)
    lengths = draw.integers(options.prompt_tokens // 2, options.prompt_tokens + 1, options.prompts)
    print(json.dumps(measure(model, [draw.integers(0, vocab, int(n)).tolist() for n in lengths], options.max_tokens)))


if __name__ == "__main__":
    run_command(main)
