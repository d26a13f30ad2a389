"""
Peak memory and time of a run's phases, measured at a few rows on this machine and carried on to all of them.
It runs in a process of its own, so that `plan` itself stays small.

A trial is the trainer's own step on the run's own model with prompts and completions of full length, but few rows. Then
every array either doesn't depend on the number of rows (weights, moments, gradients) or is proportional to it, so the peak
is a straight line in the rows, of which two points are measured. The head's chunk shrinks with the rows, so that their
number stays. Passes that are apart from their prompt have no such line, and few rows: they are measured as they are.
Decoding starts at the length where the keys and values of a row grow for the last time.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import mlx_grpo
from mlx_grpo import (
    HEAD_CHUNK, Decoder, MLXGRPOConfig, MLXGRPOTrainer, Problem, Rollout, bucket, load_model, run_command, train_sampling,
    vocabulary_of)
from mlx_grpo.plan_account import work_of

import mlx.core as mx
import numpy as np

COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); from mlx_grpo import plan_measure; plan_measure.start()"
DECODED = 4          # tokens that are decoded in a trial
CACHE_STEP = 256     # tokens by which mlx-lm's caches grow


def points(full):
    """Two numbers below `full` to measure at, or `full` itself where it is small."""
    low = max(2, full // 3)
    return [full] if full <= 3 else [low, max(low + 1, full * 2 // 3)]


def carried(measured, full):
    """The value at `full` of the straight line through {x: value} of one or two points."""
    (a, *_), (b, *_) = (sorted(measured.items())[i] for i in (0, -1))
    slope = (measured[b] - measured[a]) / (b - a) if b > a else 0.0
    return measured[b] + max(slope, 0.0) * (full - b)


class Decoding(Decoder):
    """Notes the peak of each prefill, and starts the counter again for the decoding."""

    prefill_peak = 0

    def entering(self, room):
        fresh = super().entering(room)
        self.prefill_peak = max(self.prefill_peak, mx.get_peak_memory())
        mx.reset_peak_memory()
        return fresh


class Trial:
    """A trainer on the run's model, whose rollouts are random tokens of full length."""

    def __init__(self, config, work):
        self.config, self.work = config, work
        config = replace(config, max_train_samples=0, max_steps=10**6, eval_samples=0, eval_every_updates=0, dynamic_sampling=False,
                         minibatches=1, num_iterations=1, log_jsonl=False, on_reward_error="stop",
                         reward_weights=[], reward_options={}, mask_truncated_completions=False, max_prompt_length=10**9,
                         watch="", watch_idle=0.0, watch_target=0.0, callbacks=[], health={})
        model, tokenizer = load_model(config.model_name, loader=config.model_loader, trust_remote_code=config.trust_remote_code)
        self.rng, self.vocab_size = np.random.default_rng(0), vocabulary_of(model)
        self.trainer = MLXGRPOTrainer(model, tokenizer, [self.reward], config, [Problem("1", "1", {})], run_dir=tempfile.gettempdir(),
                                      rollout_func=self.sampled)
        self.update, self.trainer.learner.update = self.trainer.learner.update, self.noted_update
        self.lengths = 8, 8
        self.trainer.update_every = 1 if config.update_every == 1 else 10**9      # the copy for rollouts stays an old one
        self.step(1, 2, 1)                   # the first update, after which the model and its copies are apart
        self.lengths = work["prompt"], work["completion"]

    def reward(self, completions, **_):
        return self.rng.random(len(completions)).tolist()

    def noted_update(self, *arguments):
        """The optimizer's update, with a peak of its own: it doesn't depend on the rows."""
        self.passes_peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return self.update(*arguments)

    def ids(self, n):
        return self.rng.integers(min(10, self.vocab_size // 2), self.vocab_size, n).tolist()

    def sampled(self, trainer, problems):
        """A Rollout for each problem, as sample_completions gives it."""
        (L, T), G = self.lengths, trainer.args.num_generations
        kept = [np.zeros((T, *self.kept[0]), dtype=self.kept[1])] * G if trainer.sampling.truncated else None
        return [Rollout(p, self.ids(L), [self.ids(T) for _ in range(G)], [[-8.0] * T] * G, [[1] * T] * G, [True] * G, [""] * G,
                        kept=kept) for p in problems]

    @property
    def kept(self):
        """(shape, dtype) of the set of tokens that could be drawn at one position."""
        top_k = self.trainer.sampling.top_k
        return ((top_k,), np.int32) if top_k else ((-(-self.vocab_size // 8),), np.uint8)

    def step(self, prompts, generations, passes):
        """{phase: (peak bytes, seconds)} of scoring, passes and update, with that many prompts, each of so many rows, in a pass."""
        trainer, G = self.trainer, generations
        sharing = {"prefix_sharing": "off" if self.work["way"] == "each" else "on", "num_generations": G,
                   "gradient_accumulation_steps": passes, "max_tokens_per_microbatch": 0}
        if self.work["way"] == "before":                       # a group of so many passes instead of so many groups
            sharing |= {"num_generations": G * passes, "gradient_accumulation_steps": 1,
                        "max_tokens_per_microbatch": G * bucket(self.lengths[1])}
        trainer.args = replace(trainer.args, batch_size=prompts, **sharing)
        mlx_grpo.HEAD_CHUNK = max(1, HEAD_CHUNK * prompts * G // self.work["pass_rows"])
        started = time.perf_counter()
        metrics = trainer.step([trainer.train_dataset[0]] * prompts * trainer.args.gradient_accumulation_steps)
        seconds = (time.perf_counter() - started) / passes
        scoring, update = (int(metrics[f"memory/{name}_peak_gb"] * 1e9) for name in ("scoring", "update"))
        return {"scoring": (scoring, seconds), "passes": (self.passes_peak, seconds), "update": (update, seconds)}

    def decode(self, prompts, generations, new_tokens):
        """(peak bytes, seconds for one token of every row) of decoding `generations` rows of each prompt."""
        L, last = self.work["prompt"], (max(new_tokens - 2, 0) // CACHE_STEP) * CACHE_STEP
        rows, sampling = prompts * generations, replace(train_sampling(self.config), max_new_tokens=min(new_tokens, DECODED))
        peak = 0
        for length in {L, L + last}:            # prefills as they are, decoding where it ends
            mx.reset_peak_memory()
            decoder = Decoding(self.trainer.model_old, [self.ids(length - i % 2) for i in range(prompts)],
                               self.rng.random((rows, sampling.max_new_tokens), dtype=np.float32), sampling, end_ids=set(),
                               at_once=rows, kv_bits=self.config.kv_bits)
            started = time.perf_counter()
            decoder.run()
            peak = max(peak, mx.get_peak_memory(), decoder.prefill_peak if length == L else 0)
        return peak, (time.perf_counter() - started) / sampling.max_new_tokens


def trial(config, work):
    """({phase: {x: [bytes, seconds]}}, work): x is the rows of a pass, or the prompts whose rows are decoded together. work:
    as given, unless the model turns out to be one that can't share prompts."""
    run, found = Trial(config, work), {"scoring": {}, "passes": {}, "update": {}, "rollout": {}, "evaluate": {}}
    if not run.trainer.split.shares_prompts:
        run.work = work = work_of(replace(config, prefix_sharing="off"), work["prompt"], work["eval_count"])
    prompts = work["pass_prompts"]
    each, rest = divmod(work["pass_rows"], prompts)
    rows = [each] if work["way"] == "before" else points(each)
    for G in [each, each + 1] if rest and each <= 3 else rows:      # few rows of two prompts: on both sides of what they are
        for phase, value in run.step(prompts, G, min(work["together" if work["way"] == "before" else "passes"], 3)).items():
            found[phase][prompts * G] = value
    for prompts in points(work["rollout_prompts"]):
        found["rollout"][prompts] = run.decode(prompts, config.num_generations, config.max_new_tokens)
    for prompts in points(work["eval_prompts"]) if work["eval_prompts"] else ():
        found["evaluate"][prompts] = run.decode(prompts, 1, config.eval_max_new_tokens)
    return found, work


def measure(config, work):
    """trial() in a process of its own. Returns ({phase: {"bytes", "seconds"}} at full size: seconds of one pass, or of one
    token of all rows; work)."""
    here = str(Path(mlx_grpo.__file__).parent)
    done = subprocess.run([sys.executable, "-c", COMMAND, here], input=json.dumps({"config": asdict(config), "work": work}),
                          text=True, capture_output=True)
    last = done.stderr.splitlines()[-1:]
    if done.returncode == 2 and last and last[0].startswith("error: "):
        raise mlx_grpo.UserError(last[0].removeprefix("error: "))
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode:
        raise mlx_grpo.UserError(f"the trial run ended with exit code {done.returncode} (see above); --no-measure plans without one")
    found, work = json.loads(done.stdout.splitlines()[-1])
    full = {"rollout": work["rollout_prompts"], "evaluate": work["eval_prompts"]}
    phases = {}
    for phase, rows in found.items():
        if rows:
            at = lambda i: carried({int(x): value[i] for x, value in rows.items()}, full.get(phase, work["pass_rows"]))
            phases[phase] = {"bytes": at(0), "seconds": at(1)}
    return phases, work


def start():
    """The other end of measure()."""
    def main():
        asked = json.load(sys.stdin)
        print(json.dumps(trial(MLXGRPOConfig(**asked["config"]), asked["work"])))

    run_command(main)
