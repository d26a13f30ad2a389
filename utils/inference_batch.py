"""Many prompts at once: read from a file, decoded together, written in order as JSON lines."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_grpo import UserError
from mlx_grpo.problems import parse_row
from mlx_grpo.inference_engine import Float32Logits, context_length, fit_context

PROMPT_KEYS = ("prompt", "question", "messages")


@dataclass(frozen=True)
class Item:
    """One prompt of a batch: text or chat messages, and what of its line is handed through."""
    prompt: object      # str, or a list of {"role", "content"}
    key: str            # what its line calls it
    extra: dict         # further keys of its JSON line, such as "id"


@dataclass
class Result:
    """What one prompt gave; seconds from the start of the batch to its last token."""
    ids: list
    ended: str
    prompt_tokens: int
    seconds: float


def read_items(path):
    """Items of a .jsonl file ({"prompt": text}, {"question": text} or {"messages": [...]} a line) or of a text file
    (one prompt a line). Empty lines are skipped. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")     # not splitlines: JSON text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--batch {path} can't be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--batch {path} holds no prompts; give one a line, or JSON lines with \"prompt\"")
    if Path(path).suffix in (".jsonl", ".ndjson", ".json"):
        return [read_line(f"{path}:{number}", line) for number, line in numbered]
    return [Item(line, "prompt", {}) for _, line in numbered]


def read_line(where, line):
    """The Item of one JSON line. Raises UserError naming `where`."""
    row = parse_row(line, where)
    given = [key for key in PROMPT_KEYS if isinstance(row, dict) and key in row]
    if len(given) != 1:
        raise UserError(f'{where}: needs one of "prompt", "question" (text) and "messages" (a list)')
    prompt = row[given[0]]
    messages = isinstance(prompt, list) and prompt and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt)
    if not (messages if given == ["messages"] else isinstance(prompt, str)):
        raise UserError(f'{where}: "prompt" and "question" must be text, "messages" a list of '
                        '{"role": ..., "content": ...}')
    return Item(prompt, given[0], {key: value for key, value in row.items() if key != given[0]})


def generate_batch(model, tokenizer, prompts, sampling, batch_size=32):
    """Yields (index, Result) as prompts finish; `prompts` are lists of ids. Up to `batch_size` rows are decoded
    together, a finished row gives its place to the next prompt. Raises UserError."""
    from mlx_lm.models.cache import make_prompt_cache
    context = context_length(model)
    limits = [fit_context(len(ids), sampling.max_tokens, context) for ids in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))     # little padding between neighbours
    mergeable = all(hasattr(layer, "merge") for layer in make_prompt_cache(model))
    run = continuous if mergeable else lockstep
    yield from run(Float32Logits(model), set(tokenizer.eos_token_ids), prompts, limits, order, sampling, batch_size)


def continuous(model, ends, prompts, limits, order, sampling, batch_size):
    """Rows of different lengths together, by mlx-lm's BatchGenerator."""
    from mlx_lm.generate import BatchGenerator
    generator = BatchGenerator(model, stop_tokens=[(token,) for token in ends], sampler=sampling.sampler(),
                               completion_batch_size=batch_size, prefill_batch_size=batch_size)
    uids = generator.insert([list(prompts[i]) for i in order], max_tokens=[limits[i] for i in order],
                            logits_processors=[sampling.processors() for _ in order])
    index = dict(zip(uids, order))
    ids, start = {i: [] for i in order}, time.perf_counter()
    try:
        while index:
            _, responses = generator.next()
            for response in responses:
                i = index[response.uid]
                ids[i].append(response.token)
                if response.finish_reason:
                    del index[response.uid]
                    yield i, Result(ids.pop(i), response.finish_reason, len(prompts[i]), time.perf_counter() - start)
    finally:
        generator.close()


def lockstep(model, ends, prompts, limits, order, sampling, batch_size):
    """Rows of one length together on plain caches, for architectures whose caches can't be merged."""
    start = time.perf_counter()
    by_length = {}
    for i in order:
        by_length.setdefault(len(prompts[i]), []).append(i)
    for group in by_length.values():
        for first in range(0, len(group), batch_size):
            rows = group[first:first + batch_size]
            for i, (ids, ended) in lockstep_rows(model, ends, prompts, limits, rows, sampling):
                yield i, Result(ids, ended, len(prompts[i]), time.perf_counter() - start)


def lockstep_rows(model, ends, prompts, limits, rows, sampling, chunk=512):
    """Decode prompts of one length together. Yields (index, (ids, why it ended)) as rows finish."""
    cache, sample = model.make_cache(), sampling.sampler()
    inputs, ids, open_rows = mx.array([prompts[i] for i in rows]), {i: [] for i in rows}, set(rows)
    for begin in range(0, inputs.shape[1], chunk):
        logits = model(inputs[:, begin:begin + chunk], cache=cache)[:, -1]
        mx.eval(logits, [layer.state for layer in cache])       # a chunk's activations are freed before the next
    while open_rows:
        if sampling.repetition_penalty != 1.0:
            logits = mx.concatenate([sampling.processors(prompts[i])[0](mx.array(ids[i]), logits[row:row + 1])
                                     for row, i in enumerate(rows)])
        tokens = sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        for i, token in zip(rows, tokens.tolist()):
            if i in open_rows:
                ids[i].append(token)
                if token in ends or len(ids[i]) == limits[i]:
                    open_rows.remove(i)
                    yield i, (ids[i], "stop" if token in ends else "length")
        logits = model(tokens[:, None], cache=cache)[:, -1]


def run_batch(model, tokenizer, items, encode, sampling, batch_size, write):
    """Answer every item and `write` each result's JSON line in the order of the items. `encode`: an Item's prompt to
    ids. Returns the summary for people: throughput and latencies."""
    prompts = [encode(item.prompt) for item in items]
    ends, waiting, results, start = set(tokenizer.eos_token_ids), {}, [], time.perf_counter()
    for i, result in generate_batch(model, tokenizer, prompts, sampling, batch_size):
        waiting[i] = result
        while len(results) in waiting:
            item, result = items[len(results)], waiting.pop(len(results))
            said = result.ids[:-1] if result.ids[-1] in ends else result.ids
            write(json.dumps({**item.extra, item.key: item.prompt, "index": len(results),
                              "completion": tokenizer.decode(said, skip_special_tokens=True),
                              "finish_reason": result.ended, "prompt_tokens": result.prompt_tokens,
                              "completion_tokens": len(result.ids), "seconds": round(result.seconds, 4)},
                             ensure_ascii=False))
            results.append(result)
    return summary(results, time.perf_counter() - start)


def summary(results, seconds):
    """Throughput, latency percentiles and peak memory for people, on one line; a latency counts from the start of the
    batch to a prompt's last token."""
    tokens = sum(len(result.ids) for result in results)
    sorted_s = sorted(result.seconds for result in results)
    percentile = lambda p: sorted_s[min(len(sorted_s) - 1, int(p / 100 * len(sorted_s)))]
    latencies = ", ".join(f"p{p} {percentile(p):.2f} s" for p in (50, 90, 99))
    prompt_tokens = sum(result.prompt_tokens for result in results)
    return (f"{len(results)} prompts, {prompt_tokens} prompt tokens, {tokens} generated in {seconds:.2f} s: "
            f"{tokens / seconds:.1f} tokens/s | latency {latencies} | peak memory {mx.get_peak_memory() / 1e9:.2f} GB")
