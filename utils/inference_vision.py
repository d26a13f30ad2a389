"""
Ask a vision-language model about images: one prompt, or a conversation.

    python utils/inference_vision.py --model mlx_vision_model --image photo.jpg --prompt "What is on it?" --stream
    python utils/inference_vision.py --model mlx_vision_model --image a.png --image b.png --prompt "What changed?"
    python utils/inference_vision.py --model mlx_vision_model --chat --system "Answer in one sentence."

Qwen2-VL, Qwen2.5-VL, Qwen3-VL and DeepSeek-OCR, on mlx-vlm (pip install -e '.[vision]'). Answers go to standard output,
everything else to standard error. In a conversation `image FILE` adds an image to the next message.
"""

import os
import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # runs from a plain clone, from any directory

from mlx_grpo import UserError, run_command  # noqa: E402
from mlx_grpo.command_line import Parser  # noqa: E402
from mlx_grpo.help_text import help_of  # noqa: E402
from mlx_grpo.inference_engine import Sampling  # noqa: E402
from mlx_grpo.model_files import open_tokenizer  # noqa: E402
from mlx_grpo.vision_chat import VisionChat, vision_chat_loop  # noqa: E402
from mlx_grpo.vision_config import import_mlx_vlm  # noqa: E402
from mlx_grpo.vision_engine import VisionSession, open_image, user_message  # noqa: E402
from mlx_grpo.vision_model import family_of_directory, fetch_vision_model  # noqa: E402
from mlx_grpo.vision_model import load_processor, load_vision_model  # noqa: E402

import mlx.core as mx  # noqa: E402


def open_vision_session(name, sampling, trust_remote_code=False, check=lambda family: None):
    """A VisionSession of a directory or hub id; `check` may refuse the architecture before its weights are read."""
    import_mlx_vlm()
    path = fetch_vision_model(name)
    family = family_of_directory(path)
    check(family)
    model, config, keys = load_vision_model(path)
    tokenizer = open_tokenizer(path, config, None, trust_remote_code)
    for line in keys.lines():
        print(f"note: {line}", file=sys.stderr)
    return VisionSession(model, config, tokenizer, load_processor(path, family, tokenizer), sampling)


def answer_prompt(session, messages, images, options):
    """Print the answer to one prompt, piece by piece with --stream."""
    pieces = session.stream(messages, images)
    if options.stream:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print("".join(pieces))
    if options.verbose:
        print(session.stats.line(), file=sys.stderr)


def parse(arguments=None):
    """The options; UserError for contradictory ones."""
    parser = Parser(**help_of(__doc__))
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--prompt", help="one prompt; - reads it from standard input")
    way.add_argument("--chat", action="store_true", help="a conversation in the terminal, always streamed")
    parser.add_argument("--model", default="mlx_vision_model", help="directory or hub id (default mlx_vision_model)")
    parser.add_argument("--image", action="append", default=[], metavar="FILE",
                        help="an image for the prompt, or for the first message; may be given again")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="let Python files of the model's tokenizer run on this machine")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens to generate at most (default 512)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling, 1 for none (default 0.95)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0,
                        help="over all tokens so far, 1 for none (default 1)")
    parser.add_argument("--seed", type=int, help="for the same samples again (default: a new one)")
    parser.add_argument("--stream", action="store_true", help="print the answer to --prompt as it comes")
    parser.add_argument("--verbose", action="store_true", help="speeds, latency and memory on standard error")
    options = parser.parse_args(arguments)
    if options.seed is not None and not 0 <= options.seed < 1 << 64:
        raise UserError(f"--seed {options.seed} must be at least 0 and below 2^64")
    return options


def answer(options):
    """Open the model and answer in the way that the options ask for."""
    sampling = Sampling(options.temperature, options.top_p, options.repetition_penalty, options.max_tokens)
    import_mlx_vlm()
    images = [open_image(name) for name in options.image]       # a bad file is told before the model is loaded
    seed = secrets.randbits(32) if options.seed is None else options.seed
    mx.random.seed(seed)

    def check(family):
        if family == "deepseekocr" and (options.chat or options.system):
            raise UserError(f"DeepSeek-OCR answers one instruction about its images and knows no "
                            f"{'--chat' if options.chat else '--system'}; use --prompt alone")

    session = open_vision_session(options.model, sampling, options.trust_remote_code, check)
    if options.verbose:
        print(f"seed {seed}", file=sys.stderr)
    if options.chat:
        return vision_chat_loop(VisionChat(session, options.system, options.image), options.verbose)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    return answer_prompt(session, [*messages, user_message(prompt, options.image)], images, options)


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
