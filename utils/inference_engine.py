"""Text from a loaded model, one sequence at a time: sampling, streaming, and a KV cache that is kept between prompts.

    session = Session(model, tokenizer, Sampling(temperature=0))
    for piece in session.stream(prompt_ids):
        print(piece, end="")
    session.stats.tokens_per_s
"""

import hashlib
import json
import math
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. top_p and temperature as in mlx-lm: the nucleus is taken before the temperature."""
    temperature: float = 0.7            # 0: always the likeliest token
    top_p: float = 0.95                 # in (0, 1]; 1 keeps every token
    repetition_penalty: float = 1.0     # divides (multiplies, where negative) the logits of all tokens so far
    max_tokens: int = 512

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"--temperature {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be above 0 and at most 1 (1 keeps every token)")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise UserError(f"--repetition-penalty {self.repetition_penalty} must be above 0 (1 is none)")
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens} must be at least 1")

    def sampler(self):
        """Log-probs (B, V) -> tokens (B,)."""
        from mlx_lm.sample_utils import make_sampler
        return make_sampler(self.temperature, self.top_p)

    def processors(self, before=()):
        """Functions (tokens so far, logits (1, V)) -> logits; `before`: ids that came before those tokens."""
        if self.repetition_penalty == 1.0:
            return []
        from mlx_lm.sample_utils import make_repetition_penalty
        penalize = make_repetition_penalty(self.repetition_penalty, 1 << 30)
        before = mx.array(list(before), dtype=mx.int32)
        return [lambda tokens, logits: penalize(mx.concatenate([before, tokens.astype(mx.int32)]), logits)]


class Float32Logits:
    """A model whose logits are float32 before anything is done with them (bfloat16 log-probs make ties)."""

    def __init__(self, model):
        self.model = model

    def __call__(self, tokens, cache=None):
        return self.model(tokens, cache=cache).astype(mx.float32)

    def make_cache(self):
        from mlx_lm.models.cache import make_prompt_cache
        return make_prompt_cache(self.model)


class TextStream:
    """Token ids into text, piece by piece, never half a character: what isn't a whole UTF-8 character yet is held back.

    Each piece is the difference between two decodings of a short window, so any tokenizer will do, and the pieces
    together are what decoding everything at once gives."""

    def __init__(self, tokenizer):
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        self.ids, self.begin, self.end = [], 0, 0      # ids[begin:end] is printed, and context for what follows

    def add(self, token):
        """The text that `token` completes, often empty."""
        self.ids.append(token)
        return self.piece(lambda text: not text.endswith("\ufffd"))

    def finish(self):
        """What is still held back, half characters included, as replacement characters."""
        return self.piece(lambda text: True)

    def piece(self, whole):
        printed, text = self.decode(self.ids[self.begin:self.end]), self.decode(self.ids[self.begin:])
        if len(text) <= len(printed) or not whole(text):
            return ""
        self.begin, self.end = self.end, len(self.ids)
        return text[len(printed):]


@dataclass
class Stats:
    """Of one generation. Times in seconds."""
    prompt_tokens: int = 0
    reused_tokens: int = 0          # of the prompt, already in the KV cache
    tokens: int = 0                 # generated, the end token included
    first_token_s: float = 0.0      # from the call to the first token, prefill included
    generation_s: float = 0.0       # from the first token to the last
    ended: str = ""                 # "stop" (an end token) or "length"

    @property
    def prompt_per_s(self):
        return (self.prompt_tokens - self.reused_tokens) / self.first_token_s if self.first_token_s else 0.0

    @property
    def tokens_per_s(self):
        return (self.tokens - 1) / self.generation_s if self.tokens > 1 and self.generation_s else 0.0

    def line(self):
        """For people, on one line."""
        reused = f", {self.reused_tokens} from the cache" if self.reused_tokens else ""
        return (f"prompt {self.prompt_tokens} tokens{reused}, {self.prompt_per_s:.1f} tokens/s | "
                f"generation {self.tokens} tokens, {self.tokens_per_s:.1f} tokens/s | "
                f"first token after {self.first_token_s:.3f} s | peak memory {mx.get_peak_memory() / 1e9:.2f} GB | "
                f"ended by {self.ended}")


def context_length(model):
    """Tokens that the model's config.json says it takes, None where it doesn't say."""
    path = Path(getattr(model, "source_path", "")) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    for part in (config.get("text_config") or {}, config):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "sequence_len", "model_max_length"):
            if isinstance(part.get(name), int):
                return part[name]
    return None


def fit_context(prompt_tokens, max_tokens, context):
    """How many tokens may be generated. Raises UserError where the prompt alone fills the context."""
    if context is None or prompt_tokens + max_tokens <= context:
        return max_tokens
    if prompt_tokens >= context:
        raise UserError(f"the prompt has {prompt_tokens} tokens and the model's context is {context}; shorten it"
                        " (in a chat: clear)")
    return context - prompt_tokens


class Session:
    """A model with its KV cache and the ids in it. A prompt that starts with the same ids is prefilled from where it
    differs; a cache that can't be cut back (a recurrent one) starts anew where it would have to be."""

    def __init__(self, model, tokenizer, sampling):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.context = context_length(model)
        self.reset()

    def reset(self):
        from mlx_lm.models.cache import make_prompt_cache
        self.cache, self.cached = make_prompt_cache(self.model), []     # cached: the ids in the cache
        self.sampled, self.stats = [], Stats()                          # of the last generation, end token included

    def reuse(self, prompt_ids):
        """Cut the cache back to what it has in common with the prompt, its last id excepted. Returns that length."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
        common = 0
        while common < min(len(self.cached), len(prompt_ids) - 1) and self.cached[common] == prompt_ids[common]:
            common += 1
        surplus = len(self.cached) - common
        if surplus and not can_trim_prompt_cache(self.cache):
            self.reset()
            return 0
        if surplus:
            trim_prompt_cache(self.cache, surplus)
            del self.cached[common:]
        return common

    def stream(self, prompt_ids):
        """Yields the pieces of text that follow `prompt_ids` (a list, not empty); `sampled` and `stats` are true at the
        end. A generation that is broken off in the middle empties the cache."""
        from mlx_lm.generate import generate_step, wired_limit
        allowed = fit_context(len(prompt_ids), self.sampling.max_tokens, self.context)
        common = self.reuse(prompt_ids)
        self.sampled, self.stats = [], Stats(len(prompt_ids), common)
        text, ends = TextStream(self.tokenizer), set(self.tokenizer.eos_token_ids)
        start, done = time.perf_counter(), False
        tokens = generate_step(mx.array(prompt_ids[common:]), Float32Logits(self.model), max_tokens=allowed,
                               sampler=self.sampling.sampler(), prompt_cache=self.cache,
                               logits_processors=self.sampling.processors(prompt_ids[:common]))
        try:
            with wired_limit(self.model):
                for token, _ in tokens:
                    if not self.sampled:
                        self.stats.first_token_s = time.perf_counter() - start
                    self.sampled.append(token)
                    if token in ends:
                        break
                    if piece := text.add(token):
                        yield piece
            done = True
        finally:
            tokens.close()
            # every token that generate_step gives has gone through the model to queue the next one
            self.cached = prompt_ids + self.sampled
            self.stats.tokens = len(self.sampled)
            self.stats.generation_s = time.perf_counter() - start - self.stats.first_token_s
            self.stats.ended = "stop" if self.sampled and self.sampled[-1] in ends else "length"
            if not done:
                sampled, stats = self.sampled, self.stats
                self.reset()
                self.sampled, self.stats = sampled, stats
        if piece := text.finish():
            yield piece

    # ---- the cache on disk ----

    def save(self, path, identity):
        """Write the cache and its ids to a safetensors file. `identity`: see model_identity."""
        path = Path(path)
        state = dict(tree_flatten([layer.state for layer in self.cache]))
        arrays = {name: value for name, value in state.items() if isinstance(value, mx.array)}
        others = {name: value for name, value in state.items() if not isinstance(value, mx.array)}
        metadata = {"identity": identity, "ids": json.dumps(self.cached), "others": json.dumps(others)}
        work = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.safetensors")
        try:
            mx.eval(arrays)
            mx.save_safetensors(str(work), arrays, metadata)
            os.replace(work, path)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--prompt-cache {path} can't be written: {error}") from error
        finally:
            work.unlink(missing_ok=True)

    def load(self, path, identity):
        """Take the cache from a file that `save` wrote for the same model. Raises UserError."""
        from mlx_grpo.checked_load import check_safetensors
        check_safetensors(path)
        arrays, metadata = mx.load(str(path), return_metadata=True)
        try:
            ids, others = json.loads(metadata["ids"]), json.loads(metadata["others"])
            saved_identity = metadata["identity"]
            states = tree_unflatten(list((arrays | others).items()))
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"--prompt-cache {path} wasn't written by this program; choose another file") from error
        if saved_identity != identity:
            raise UserError(f"--prompt-cache {path} belongs to another model, adapter or quantisation; delete it or "
                            "choose another file")
        fresh = [layer.state for layer in self.cache]
        if len(fresh) != len(states) or any(len(a) != len(b) for a, b in zip(fresh, states)):
            raise UserError(f"--prompt-cache {path} doesn't fit this model's cache; delete it")
        self.cache = [type(layer).from_state(state) for layer, state in zip(self.cache, states)]
        self.cached = ids


def model_identity(*paths, **settings):
    """A hash that changes when any file of the given directories (name, size, time) or a setting does."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        for file in sorted(Path(path).iterdir()):
            if file.suffix in (".safetensors", ".json", ".npz"):
                status = file.stat()
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
