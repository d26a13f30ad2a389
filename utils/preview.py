"""`mlx_grpo.py preview`: the prompts of a run as the model will read them."""

import json
import sys

from mlx_grpo import (
    UserError, add_config_arguments, fitting_problems, load_config, load_problems, load_tokenizer, render_prompt)
from mlx_grpo.prompt_stream import PromptStream
from mlx_grpo.sources import sources_of


def add_arguments(parser):
    add_config_arguments(parser)
    parser.add_argument("-n", "--number", type=int, default=3, metavar="N", help="how many prompts (default: 3)")
    parser.add_argument("--held-out", action="store_true", help="held-out problems instead of the first training prompts")
    parser.add_argument("--level", type=int, default=0, help="level of every curriculum, from 0 (default: 0)")


def run(args):
    """The first prompts of a run, exactly as it will draw and render them: mixed, with examples, augmented. Special tokens
    stand between ⟦ and ⟧, so that one can be told from the same text typed by somebody; only the tokenizer is loaded.

    examples:
      python mlx_grpo.py preview --config configs/demo.toml
      python mlx_grpo.py preview --config configs/prod.toml -n 1 --held-out --set few_shot=4
    """
    config, _ = load_config(args.config, args.set)
    if args.number < 1:
        raise UserError(f"--number must be at least 1, got {args.number}")
    highest = max(len(source.levels) for source in sources_of(config)) - 1
    if not 0 <= args.level <= highest:
        raise UserError(f"--level must be from 0 to {highest}, the last level of the curriculum, got {args.level}")
    train, held_out = load_problems(config)
    tokenizer = load_tokenizer(config.model_name, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
    train, held_out = (fitting_problems(problems, tokenizer, config) for problems in (train, held_out))
    fits = lambda problem: len(render_prompt(tokenizer, problem, config)) <= config.max_prompt_length
    stream = PromptStream(train, config, fits)
    curriculum = {s.name: {"level": min(args.level, len(s.levels) - 1)} for s in stream.sources}
    problems = held_out[:args.number] if args.held_out else stream.take(0, args.number, curriculum)
    for i, problem in enumerate(problems):
        print("\n".join(prompt_lines(i + 1, problem, render_prompt(tokenizer, problem, config), tokenizer)) + "\n")
    print(summary([len(render_prompt(tokenizer, p, config)) for p in train], len(held_out), config))
    return 0


def prompt_lines(number, problem, ids, tokenizer):
    """One prompt as lines: what it is, its text, what is expected."""
    about = [f"prompt {number}", f"{len(ids)} tokens", *([problem.source] if problem.source else [])]
    about += [f"level {problem.columns['curriculum_level']}"] if "curriculum_level" in problem.columns else []
    about += [f"{len(problem.examples)} examples"] if problem.examples else []
    text = visible(ids, tokenizer)
    lines = [" | ".join(about), *("  " + line for line in text.split("\n")), f"gold answer: {quoted(problem.answer)}"]
    if ids[:1] == ids[1:2] == [tokenizer.bos_token_id]:
        print(f"prompt {number} begins with {tokenizer.bos_token!r} twice: the chat template and the tokenizer both put it "
              "there", file=sys.stderr)
    return lines + ([f"demonstration: {quoted(problem.solution)}"] if problem.solution is not None else [])


def quoted(value):
    return json.dumps(value, ensure_ascii=False)


def visible(ids, tokenizer):
    """The text of token ids, each special token as ⟦text⟧."""
    special, text, plain = set(tokenizer.all_special_ids), "", []
    for i in [*ids, None]:
        if i is not None and i not in special:
            plain.append(i)
            continue
        text += tokenizer.decode(plain) if plain else ""
        text += f"⟦{tokenizer.decode([i])}⟧" if i is not None else ""
        plain = []
    return text


def summary(lengths, held_out, config):
    ordered = sorted(lengths)
    return (f"{len(ordered)} training prompts of {ordered[0]} to {ordered[-1]} tokens (median {ordered[len(ordered) // 2]}; "
            f"max_prompt_length {config.max_prompt_length}), {held_out} held out")
