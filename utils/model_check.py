"""Proofs that a converted model computes what its source does, on a few short texts.

A model in float is compared with transformers on the same weights (the source's, rounded to the stored dtype, both
sides computing in float32), a quantised one with its unquantised source by KL divergence and perplexity.
"""

import math

import mlx.core as mx
import numpy as np

from mlx_grpo import UserError, cast_floats

TEXTS = [
    "The train leaves at 7:45 and arrives 95 minutes later. It arrives at 9:20, because 45 + 95 = 140 minutes after 7.",
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n",
    "Zwei Äpfel und drei Birnen kosten 4,20 €. 東京は日本の首都です。",
]
MAX_TOKENS = 64
LOGIT_TOLERANCE = 1e-3      # largest difference accepted, relative to the largest logit (at least 1)


def check_sequences(tokenizer, vocab_size):
    """Lists of token ids to compare on: TEXTS as the tokenizer has them, and one of random ids (all within the model's
    vocabulary)."""
    sequences = [tokenizer.encode(text)[:MAX_TOKENS] for text in TEXTS]
    sequences.append(np.random.default_rng(0).integers(0, vocab_size, MAX_TOKENS // 2).tolist())
    return [[t for t in ids if t < vocab_size] for ids in sequences if len(ids) > 1]


def torch_logits(path, sequences, dtype, trust_remote_code=False):
    """Logits (L, V) of each sequence by transformers, in float32, of weights rounded to `dtype` first."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--verify compares with transformers and needs torch: pip install torch") from error
    import transformers
    try:
        model, keys = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager",
            output_loading_info=True)
    except (ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--verify: transformers can't open {path}: {reason}; convert without --verify") from error
    if keys["missing_keys"]:
        raise UserError(f"--verify: transformers finds no weights for {sorted(keys['missing_keys'])[0]} in {path}, "
                        "so it can't be the measure; convert without --verify")
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():       # the weights only: buffers, such as Gemma's scale, aren't stored
            weight.copy_(weight.to(getattr(torch, dtype)))
        return [model(torch.tensor([ids])).logits[0].float().numpy() for ids in sequences]


def mlx_logits(model, sequences):
    """Logits (L, V) of each sequence by an MLX model, computed in float32 unless its weights are quantised."""
    return [np.array(model(mx.array([ids]))[0].astype(mx.float32)) for ids in sequences]


def in_float32(model):
    """The model with its floating-point weights in float32 (changed in place)."""
    model.update(cast_floats(model.parameters(), mx.float32))
    return model


def compare_logits(ours, theirs):
    """{"max", "mean", "limit", "passed"}: differences over all sequences (arrays (L, V) each; V may be padded on one
    side), and the limit that `max` has to stay under."""
    V = min(ours[0].shape[1], theirs[0].shape[1])
    pairs = [(a[:, :V], b[:, :V]) for a, b in zip(ours, theirs, strict=True)]
    differences = np.concatenate([np.abs(a - b).reshape(-1) for a, b in pairs])
    limit = LOGIT_TOLERANCE * max(1.0, max(float(np.abs(b).max()) for _, b in pairs))
    largest = float(differences.max())
    return {"max": largest, "mean": float(differences.mean()), "limit": limit, "passed": largest <= limit}   # NaN fails


def compare_distributions(ours, theirs, sequences):
    """What quantisation did: mean KL(source || ours) in nats per token, both perplexities of the texts (all sequences
    but the random one, where there are others), and how often the likeliest next token is the same."""
    kl, agreement, ours_nll, theirs_nll = [], [], [], []
    for a, b, ids in zip(ours, theirs, sequences, strict=True):
        log_p, log_q = log_softmax(b), log_softmax(a)
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        agreement.append(log_p.argmax(-1) == log_q.argmax(-1))
        rows, targets = np.arange(len(ids) - 1), np.array(ids[1:])
        ours_nll.append(-log_q[rows, targets])
        theirs_nll.append(-log_p[rows, targets])
    texts = slice(0, max(1, len(sequences) - 1))
    perplexity = lambda nll: math.exp(min(700.0, np.concatenate(nll[texts]).mean()))    # exp(710) overflows
    mean_kl = float(np.concatenate(kl).mean())
    return {"kl": mean_kl, "perplexity": perplexity(ours_nll), "source_perplexity": perplexity(theirs_nll),
            "same_top_token": float(np.concatenate(agreement).mean()), "passed": bool(np.isfinite(mean_kl))}


def log_softmax(logits):
    """Log-probabilities in float64; logits (L, V)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
