"""
Which parts of a model suffer most when rollouts are sampled from a quantised copy (quantize_for_rollouts).

    python utils/sensitivity.py --model Qwen/Qwen2.5-0.5B-Instruct --bits 4
    python utils/sensitivity.py --model data/demo_model --bits 2 --threshold 0.01 --output line.toml

The model answers the prompts; then one part at a time (a block, the embeddings, the head) is quantised, everything else
left as it is, and the answers are scored again. The damage of a part is the mean KL(model || copy) over the positions of
the answers, in nats a token. The last line of the output is the option to put into the configuration: the parts whose
damage is above --threshold, at --keep-bits. In bfloat16 (the default on Metal and CUDA) rounding alone gives about 1e-4.

Memory: the model, one quantised copy, and 4 bytes for each answered token and entry of the vocabulary.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))   # runs from a plain clone, from any directory

from mlx_grpo import (MLXGRPOConfig, Problem, Sampling, UserError, cast_floats, compute_dtype, frozen_copy,  # noqa: E402
                      is_quantized, load_model, run_command, sample_completions, shipped_path)
from mlx_grpo.command_line import Parser  # noqa: E402
from mlx_grpo.files import check_output_file  # noqa: E402
from mlx_grpo.help_text import help_of  # noqa: E402
from mlx_grpo.problems import check_messages, read_rows  # noqa: E402

import mlx.core as mx  # noqa: E402

PROMPTS = "data/questions.jsonl"


# ---- what is measured on ---------------------------------------------------------------------------------------------

def read_prompts(path):
    """Texts or chat messages of a .jsonl file ("prompt", "question" or "messages" in each row), or the lines of a text
    file. Raises UserError."""
    file = shipped_path(path)
    if file.suffix == ".jsonl":
        prompts = []
        for row, where in read_rows(file):
            found = [row[key] for key in ("prompt", "question", "messages") if row.get(key)]
            if len(found) != 1 or not isinstance(found[0], (str, list)):
                raise UserError(f'{where}: needs one of "prompt", "question" and "messages"')
            prompts += found if isinstance(found[0], str) else [check_messages(found[0], where, "messages")]
    else:
        try:
            prompts = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {path} can't be read: {error}") from error
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompts")
    return prompts


def answer(model, tokenizer, prompts, max_new_tokens):
    """[(ids of prompt and answer, number of prompt tokens)], the answers sampled from the model at temperature 1."""
    problems = [Problem([{"role": "user", "content": p}] if isinstance(p, str) else p, None, {}) for p in prompts]
    sampling = Sampling(1.0, max_new_tokens=max_new_tokens)
    rollouts = sample_completions(model, tokenizer, problems, MLXGRPOConfig(), sampling, num_generations=1, step=0)
    return [(r.prompt_ids + r.completion_ids[0], len(r.prompt_ids)) for r in rollouts]


def answer_logprobs(model, sequence):
    """(T, V) float32 log-probs of every token at the positions where the T answer tokens are predicted."""
    ids, start = sequence
    logits = model(mx.array([ids]))[0, start - 1:-1].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def mean_kl(model, sequences, expected):
    """Mean KL(expected || model) over all answer positions, nats a token; expected: the full model's answer_logprobs."""
    total = 0.0
    for sequence, log_p in zip(sequences, expected, strict=True):
        total += (mx.exp(log_p) * (log_p - answer_logprobs(model, sequence))).sum().item()
    return total / sum(len(log_p) for log_p in expected)


# ---- the parts -------------------------------------------------------------------------------------------------------

def quantisable_parts(model, group_size):
    """Paths of the parts that can be quantised: each block, and each matrix outside of the blocks, in the model's order.
    Raises UserError where there are none."""
    blocks = {id(block) for block in model.layers}
    block_paths = [path for path, module in model.named_modules() if id(module) in blocks]
    matrices = [path for path, module in model.named_modules()
                if hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0]
    part_of = lambda path: next((b for b in block_paths if path.startswith(b + ".")), path)
    parts = {part_of(path) for path in matrices}
    if not parts:
        raise UserError(f"no matrix of the model has rows that --group-size {group_size} divides; try 32")
    number = lambda path: [(piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in path.split(".")]
    return sorted(parts, key=number)


def measure(model, parts, sequences, bits, group_size, *, say=lambda part, kl: None):
    """({part: KL of quantising that part alone}, function {part: bits} -> KL of the whole copy), in nats a token."""
    expected = [answer_logprobs(model, sequence) for sequence in sequences]
    mx.eval(expected)

    def copy_kl(precision):
        return mean_kl(frozen_copy(model, bits=bits, group_size=group_size, precision=precision), sequences, expected)

    damage = {}
    for part in parts:
        damage[part] = copy_kl({other: 0 for other in parts if other != part})
        say(part, damage[part])
    return damage, copy_kl


def toml_line(precision):
    """rollout_precision = {...} as TOML."""
    return "rollout_precision = {" + ", ".join(f"{json.dumps(part)} = {bits}" for part, bits in precision.items()) + "}"


# ---- command ---------------------------------------------------------------------------------------------------------

def parse(arguments=None):
    parser = Parser(**help_of(__doc__))
    parser.add_argument("--model", required=True, help="directory or hub id of a model that isn't quantised")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 6, 8), help="rollout_bits (default: 4)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128),
                        help="rollout_group_size (default: 64)")
    parser.add_argument("--prompts", default=PROMPTS, help=f"a prompt a line, or .jsonl (default: {PROMPTS})")
    parser.add_argument("--num-prompts", type=int, default=8, help="use the first so many (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--threshold", type=float, default=0.01, help="nats a token (default: 0.01)")
    parser.add_argument("--keep-bits", type=int, default=8, choices=(0, 2, 3, 4, 6, 8),
                        help="of the parts above the threshold; 0 = not quantised (default: 8)")
    parser.add_argument("--output", metavar="FILE", help="write the option to a file as well")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's Python files run here")
    options = parser.parse_args(arguments)
    for name in ("num_prompts", "max_new_tokens"):
        if vars(options)[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {vars(options)[name]}")
    if 0 < options.keep_bits <= options.bits:
        raise UserError(f"--keep-bits {options.keep_bits} is no more than --bits {options.bits}; give more, or 0")
    if not options.threshold >= 0:
        raise UserError(f"--threshold {options.threshold} must be 0 or more, in nats a token")
    if options.output:
        check_output_file("--output", options.output)
    return options


def main(arguments=None):
    options = parse(arguments)
    prompts = read_prompts(options.prompts)[:options.num_prompts]
    model, tokenizer = load_model(options.model, trust_remote_code=options.trust_remote_code)
    if is_quantized(model):
        raise UserError(f"{options.model} is quantised already; give the model that it was made from")
    model.update(cast_floats(model.parameters(), compute_dtype(MLXGRPOConfig())))
    parts = quantisable_parts(model, options.group_size)
    sequences = answer(model, tokenizer, prompts, options.max_new_tokens)
    tell = lambda part, kl: print(f"{part}: {kl:.6f}", file=sys.stderr, flush=True)
    damage, copy_kl = measure(model, parts, sequences, options.bits, options.group_size, say=tell)

    width = max(map(len, [*parts, "everything"]))
    tokens = sum(len(ids) - start for ids, start in sequences)
    print(f"{options.bits} bits, groups of {options.group_size}, {tokens} tokens in {len(sequences)} answers; "
          "nats a token\n")
    print(f"{'quantised alone':{max(width, 15)}}  mean KL")
    for part in sorted(parts, key=damage.get, reverse=True):
        print(f"{part:{max(width, 15)}}  {damage[part]:.6f}{'  *' if damage[part] > options.threshold else ''}")
    precision = {part: options.keep_bits for part in parts if damage[part] > options.threshold}
    print(f"\n{'everything':{max(width, 15)}}  {copy_kl({}):.6f}")
    if not precision:
        print(f"\nno part is above {options.threshold:g}; rollout_precision isn't needed")
        return
    kept = f"at {options.keep_bits} bits" if options.keep_bits else "not quantised"
    print(f"{'with * ' + kept:{max(width, 15)}}  {copy_kl(precision):.6f}\n\n{toml_line(precision)}")
    if options.output:
        Path(options.output).write_text(toml_line(precision) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
