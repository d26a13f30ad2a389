"""
Ask a model: one prompt, a conversation, or a file of prompts.

    python utils/inference.py --model mlx_model --prompt "What is 17 * 23?" --stream
    python utils/inference.py --model outputs/run/checkpoint-last --chat --system "Answer in one sentence."
    python utils/inference.py --model mlx_model --batch questions.jsonl --temperature 0 > answers.jsonl

Opens whatever the trainer opens: mlx-lm models, every nanochat generation, checkpoints of our own runs; --adapter adds
LoRA weights. Answers go to standard output, everything else to standard error.
"""

import os
import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # runs from a plain clone, from any directory

from mlx_grpo import UserError, run_command  # noqa: E402
from mlx_grpo.command_line import Parser  # noqa: E402
from mlx_grpo.help_text import help_of  # noqa: E402
from mlx_grpo.inference_batch import read_items, run_batch  # noqa: E402
from mlx_grpo.inference_chat import chat_loop, template_ids  # noqa: E402
from mlx_grpo.inference_engine import Sampling, Session, model_identity  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402


# ---- the model -------------------------------------------------------------------------------------------------------

def open_model(name, adapter=None, quantize=None, trust_remote_code=False):
    """(model, tokenizer), with an adapter's weights, and quantised to `quantize` bits. Raises UserError."""
    from mlx_grpo import load_model
    from mlx_grpo.adapter_files import load_onto, read_mlx_config
    model, tokenizer = load_model(name, trust_remote_code=trust_remote_code)
    whole = bool(adapter) and read_mlx_config(Path(adapter))["fine_tune_type"] == "full"
    if whole:       # whole weights, put in before they are quantised
        load_onto(model, Path(adapter))
    if quantize:
        quantize_matrices(model, quantize)
    if adapter and not whole:
        load_onto(model, Path(adapter))
    mx.eval(model.parameters())
    model.eval()
    return model, tokenizer


def quantize_matrices(model, bits):
    """Quantise in place, in groups of 64, or 32 where the rows ask for it. Raises UserError where nothing can be."""
    if any(hasattr(module, "bits") for _, module in model.named_modules()):
        raise UserError(f"--quantize {bits}: the model is quantised already; leave the option away")
    own_choice = getattr(model, "quant_predicate", lambda path, module: True)     # mlx-lm's: routers get 8 bits, say

    def choose(path, module):
        choice = hasattr(module, "to_quantized") and own_choice(path, module)
        if choice is not True:
            return choice
        fitting = [size for size in (64, 32) if module.weight.shape[-1] % size == 0]
        return {"group_size": fitting[0], "bits": bits} if fitting else False

    nn.quantize(model, 64, bits, class_predicate=choose)
    if not any(hasattr(module, "bits") for _, module in model.named_modules()):
        raise UserError(f"--quantize {bits}: no matrix here has rows of a multiple of 32; leave the option away")


def encoder(tokenizer, system):
    """A function from a prompt (text, or chat messages) to ids: through the chat template where the model has one."""
    def encode(prompt):
        if isinstance(prompt, str) and not system and not tokenizer.has_chat_template:
            ids = tokenizer.encode(prompt)
            if not ids:
                raise UserError("the prompt is empty, and this model's tokenizer puts no start token before it")
            return ids
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return template_ids(tokenizer, messages)
    return encode


# ---- the three ways --------------------------------------------------------------------------------------------------

def answer_prompt(session, ids, options):
    """Print the answer to one prompt, piece by piece with --stream."""
    pieces = session.stream(ids)
    if options.stream:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print("".join(pieces))
    if options.verbose:
        print(session.stats.line(), file=sys.stderr)


def answer_file(model, tokenizer, items, options, sampling):
    """Answer the prompts of a file, a JSON line each, in order."""
    told = run_batch(model, tokenizer, items, encoder(tokenizer, options.system), sampling,
                     options.batch_size, lambda line: print(line, flush=True))
    if options.verbose:
        print(told, file=sys.stderr)


def with_prompt_cache(session, options, work):
    """Do `work` with the session's cache taken from --prompt-cache where that file exists, and written to it after."""
    if not options.prompt_cache:
        return work()
    directories = [session.model.source_path, options.model, options.adapter]      # --model may be an adapter's
    identity = model_identity(*[d for d in directories if d and Path(d).is_dir()], bits=options.quantize)
    if Path(options.prompt_cache).exists():
        session.load(options.prompt_cache, identity)
    work()
    if session.cached:
        session.save(options.prompt_cache, identity)


def parse(arguments=None):
    parser = Parser(**help_of(__doc__))
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--prompt", help="one prompt; - reads it from standard input")
    way.add_argument("--chat", action="store_true", help="a conversation in the terminal, always streamed")
    way.add_argument("--batch", metavar="FILE",
                     help='a prompt a line, or .jsonl with "prompt", "question" or "messages"')
    parser.add_argument("--model", default="mlx_model", help="directory or hub id (default mlx_model)")
    parser.add_argument("--adapter", metavar="DIR", help="mlx-lm adapter to add (LoRA, DoRA or full)")
    parser.add_argument("--quantize", type=int, choices=(2, 3, 4, 6, 8), metavar="BITS",
                        help="quantise the matrices at load: 2, 3, 4, 6 or 8")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="let Python files of the model run on this machine")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens to generate at most (default 512)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling, 1 for none (default 0.95)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0,
                        help="over all tokens so far, 1 for none (default 1)")
    parser.add_argument("--seed", type=int, help="for the same samples again (default: a new one)")
    parser.add_argument("--stream", action="store_true", help="print the answer to --prompt as it comes")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts decoded together with --batch (default 32)")
    parser.add_argument("--prompt-cache", metavar="FILE",
                        help="keep the KV cache in this .safetensors file between calls")
    parser.add_argument("--verbose", action="store_true", help="speeds, latencies and memory on standard error")
    options = parser.parse_args(arguments)
    if options.batch and (options.stream or options.prompt_cache):
        name = "--stream" if options.stream else "--prompt-cache"
        raise UserError(f"{name} is for --prompt and --chat; --batch writes whole answers, in order")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size} must be at least 1")
    if options.prompt_cache and not options.prompt_cache.endswith(".safetensors"):
        raise UserError(f"--prompt-cache {options.prompt_cache} must end in .safetensors")
    if options.seed is not None and not 0 <= options.seed < 1 << 64:
        raise UserError(f"--seed {options.seed} must be at least 0 and below 2^64")
    return options


def answer(options):
    """Open the model and answer in the way that the options ask for."""
    sampling = Sampling(options.temperature, options.top_p, options.repetition_penalty, options.max_tokens)
    items = read_items(options.batch) if options.batch else None      # a bad file is told before the model is loaded
    seed = secrets.randbits(32) if options.seed is None else options.seed
    mx.random.seed(seed)
    model, tokenizer = open_model(options.model, options.adapter, options.quantize, options.trust_remote_code)
    if options.verbose:
        print(f"seed {seed}", file=sys.stderr)
    if options.batch:
        return answer_file(model, tokenizer, items, options, sampling)
    session = Session(model, tokenizer, sampling)
    if options.chat:
        talk = lambda: chat_loop(model, tokenizer, sampling, options.system, options.verbose, session)
        return with_prompt_cache(session, options, talk)
    ids = encoder(tokenizer, options.system)(sys.stdin.read() if options.prompt == "-" else options.prompt)
    return with_prompt_cache(session, options, lambda: answer_prompt(session, ids, options))


def main():
    options = parse()
    sys.stdout.reconfigure(errors="replace")     # what the terminal's encoding can't show doesn't end the program
    try:
        answer(options)
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:         # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


if __name__ == "__main__":
    run_command(main)
