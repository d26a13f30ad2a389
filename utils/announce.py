"""What a run says of itself before its first step and after its last. Part of mlx_grpo."""

import sys
from dataclasses import asdict

import mlx.core as mx

from mlx_grpo import count_parameters, old_logprobs_kind, options_without_effect, render_prompt
from mlx_grpo.run_files import read_metrics


def announce(trainer, config, sources, command):
    """What is about to run, in a few lines: sizes, what is trained, the objective, options without effect."""
    from mlx_grpo.plan import warning

    model, run_dir = trainer.model, trainer.run_dir
    print(f"{config.model_name}: {count_parameters(model) / 1e6:.1f}M parameters, {str(trainer.dtype).split('.')[-1]} on "
          f"{mx.default_device()} | {len(trainer.train_dataset)} problems, {len(trainer.eval_dataset)} held out | "
          f"{f'rows of {config.watch} in' if config.watch else trainer.total_steps} steps of {config.prompts_per_step} prompts"
          + (f" x {config.num_generations}" if command == "train" else "")
          + (f" in {trainer.world.size} processes" if trainer.world.size > 1 else "") + f" | {run_dir}", flush=True)
    print(trainer.learner.description(), flush=True)
    if command != "sft":
        print(f"old log-probs: {old_logprobs_kind(config)} | " + "".join(
            f"{name} = {asdict(config)[name]!r} (recipe {config.recipe}) | " for name, source in sources.items()
            if source.startswith("recipe")) + "loss " + config.loss_type, flush=True)
        for line in options_without_effect(config, sources):
            print(line, file=sys.stderr)
        if line := warning(config, max(len(render_prompt(trainer.tokenizer, p, config)) for p in trainer.train_dataset),
                           len(trainer.eval_dataset)):
            print(line, file=sys.stderr)
    if not trainer.tokenizer.has_chat_template:
        print("the tokenizer has no chat template: messages are joined as plain text", file=sys.stderr)


def print_summary(trainer, seconds):
    """What the run did: exact match before and after, one completion of each, and where everything is."""
    run_dir = trainer.run_dir
    if trainer.samples:
        first, last = min(trainer.samples), max(trainer.samples)
        prompt = trainer.samples[first][0]
        print("\nprompt: " + (prompt if isinstance(prompt, str) else prompt[-1]["content"]))
        for name, step in (("before", first), ("after", last)):
            print(f"{name} (step {step}): {trainer.samples[step][1].strip()}")
    if trainer.log.run_dir:
        evaluations = [m for m in read_metrics(run_dir) if "eval/exact_match" in m]
        if evaluations:
            print(f"\nexact match on {len(trainer.eval_dataset)} held-out problems: {evaluations[0]['eval/exact_match']:.3f} "
                  f"(step {evaluations[0]['step']}) -> {evaluations[-1]['eval/exact_match']:.3f} "
                  f"(step {evaluations[-1]['step']}) in {seconds:.0f} s")
        from mlx_grpo.report import write_report

        write_report([run_dir], run_dir / "report.html", say=lambda line: None)
        print(f"log     {run_dir / 'metrics.jsonl'}, {run_dir / 'completions.jsonl'}\nreport  {run_dir / 'report.html'}")
    print(f"model   {run_dir / f'checkpoint-{trainer.step_count}'}")
