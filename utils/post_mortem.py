"""
What is left of a batch that was not finite: failure.json (step, reason, configuration, each row's texts and advantage)
and failure.safetensors (its tokens, mask, advantages and log-probs, as they went into the loss) in the run directory.

    arrays = mx.load("outputs/run/failure.safetensors")       # "0.mask" (B, T), "0.sampler_logprobs" (B, T), ...
"""

import json
from dataclasses import asdict

import mlx.core as mx
import numpy as np

from mlx_grpo import UserError
from mlx_grpo.run_files import save_arrays

RECORD, ARRAYS = "failure.json", "failure.safetensors"


def save_post_mortem(trainer, error, batches, problems):
    """Write both files. batches: the Batches of the failed step, none where sampling itself failed; problems: what was to
    be sampled then. Raises UserError where they can't be written."""
    rows = [row | {"batch": i} for i, batch in enumerate(batches) for row in describe_rows(batch, trainer.tokenizer)]
    record = {"step": trainer.step_count + 1, "reason": str(error), "config": asdict(trainer.args), "rows": rows,
              "problems": list(dict.fromkeys(row["prompt"] for row in rows)) or [p.prompt for p in problems]}
    try:
        trainer.run_dir.mkdir(parents=True, exist_ok=True)
        (trainer.run_dir / ARRAYS).unlink(missing_ok=True)
        if batches:
            arrays = {f"{i}.{name}": a for i, batch in enumerate(batches) for name, a in vars(batch).items() if a.size}
            save_arrays(trainer.run_dir / ARRAYS, arrays)
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (trainer.run_dir / RECORD).write_text(text + "\n", encoding="utf-8")
    except OSError as failed:
        raise UserError(f"{error}; and its batch can't be kept in {trainer.run_dir}: {failed.strerror or failed}") from failed


def describe_rows(batch, tokenizer):
    """[{"prompt", "completion", "advantage", "not_finite": [names of arrays]}] of a Batch."""
    prompts, lengths, mask = np.array(batch.prompts), np.array(batch.prompt_lengths), np.array(batch.mask)
    found = []
    for i, ids in enumerate(np.array(batch.completion_ids)):
        bad = [name for name in ("old_logprobs", "sampler_logprobs", "ref_logprobs", "is_weights", "advantages")
               if not mx.isfinite(vars(batch)[name][i]).all().item()]
        prompt = int(batch.prompt_of[i].item())
        length = np.flatnonzero(mask[i]).max(initial=-1) + 1
        found.append({"prompt": tokenizer.decode(prompts[prompt, :lengths[prompt]].tolist()), "completion": tokenizer.decode(ids[:length].tolist()),
                      "advantage": np.nan_to_num(np.array(batch.advantages[i])).tolist(), "not_finite": bad})
    return found
