"""`mlx_grpo.py eval`: how good a model is on the held-out problems."""

import json
from pathlib import Path

from mlx_grpo import (
    UserError, add_config_arguments, cast_floats, compute_dtype, evaluate, extract_answer, fitting_problems, load_config, load_model,
    load_problems, same_answer)


def add_arguments(parser):
    add_config_arguments(parser)
    parser.add_argument("--output", metavar="FILE", help="write scores and completions as JSON")


def run(args):
    """Exact match of a model on the held-out problems, as in training."""
    config, _ = load_config(args.config, args.set)
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no directory {Path(args.output).parent}; create it first")
    _, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
    model.update(cast_floats(model.parameters(), compute_dtype(config)))
    held_out = fitting_problems(held_out, tokenizer, config)
    if not held_out:
        raise UserError(f"dataset {config.dataset!r} gives no held-out problems; set eval_split or eval_fraction, eval_samples")
    scores, texts = evaluate(model, tokenizer, held_out, config)
    if args.output:
        rows = [{"prompt": p.prompt, "answer": p.answer, "completion": t, "correct": same_answer(extract_answer(t), p.answer)}
                for p, t in zip(held_out, texts)]
        Path(args.output).write_text(json.dumps({"model": config.model_name, **scores, "problems": rows}, indent=2,
                                                ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{config.model_name}: exact match {scores['exact_match']:.3f} on {len(held_out)} held-out problems, "
          f"{scores['mean_length']:.0f} tokens on average, {scores['clipped_ratio']:.0%} cut at {config.eval_max_new_tokens}")
    return 0
