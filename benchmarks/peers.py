"""
The programs that are measured, each in a process of its own; started by the other scripts, not by hand.

    python benchmarks/peers.py NAME '{"model": DIR, "prompts": [...], ...}'

A peer opens the model, says {"ready": true, ...versions}, and then does one piece of work for each line it reads:
common.py times them in turns. A line of JSON answers with the seconds, the sampled tokens and the peak memory; what the
programs print themselves goes to standard error. Every MLX peer loads utils/linux_blas.py first, so all have one BLAS.
"""

import gc
import json
import os
import resource
import sys
import tempfile
import threading
import time
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mlx", "mlx-lm", "mlx-lm-lora", "torch", "transformers", "trl", "numpy")
OUT_OF_MEMORY = 77      # exit code of a peer that went beyond its limit_gb


class Gate:
    """The peer's side of the conversation: wait() for the next line, reply() with what was measured since."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)                       # tqdm, TRL and mlx-lm-lora print on standard output
        self.started = 0.0

    def say(self, **figures):
        print(json.dumps(figures), file=self.out, flush=True)

    def ready(self, **figures):
        found = {}
        for package in PACKAGES:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        self.say(ready=True, versions={"python": sys.version.split()[0], **found}, **figures)

    def wait(self):
        gc.collect()
        if not sys.stdin.readline():
            os._exit(0)                     # no libraries' farewells
        self.started = time.perf_counter()

    def reply(self, **figures):
        seconds = time.perf_counter() - self.started
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.say(seconds=seconds, resident_gb=resident / 1e9, **figures)


def mlx_core(ours=False):
    """(mlx.core, what ready() tells of it), after the fast BLAS: as part of mlx_grpo, or by itself for the others."""
    sys.path.insert(0, str(ROOT if ours else ROOT / "utils"))
    if ours:
        from mlx_grpo import linux_blas
    else:
        import linux_blas
    import mlx.core as mx

    return mx, {"device": "cpu" if mx.default_device() == mx.cpu else "metal" if mx.metal.is_available() else "cuda",
                "blas": linux_blas.BLAS}


def end_beyond(mx, limit_gb):
    """End this process as soon as MLX's peak memory is above limit_gb."""
    def watch():
        while mx.get_peak_memory() <= limit_gb * 1e9:
            time.sleep(0.02)
        os._exit(OUT_OF_MEMORY)

    threading.Thread(target=watch, daemon=True).start()


def spread(completions, **_):
    """A reward for the benchmark: a number in [0, 1) from the text, so no group is without spread."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [zlib.crc32(text.encode()) / 2**32 for text in texts]


# ---- ours ------------------------------------------------------------------------------------------------------------

def our_trainer(o, **more):
    """An MLXGRPOTrainer on the benchmark's work; o["options"] are options of MLXGRPOConfig on top of it, o["constants"]
    of the module, o["environment"] of the process."""
    import mlx_grpo

    os.environ.update(o.get("environment", {}))
    for name, value in o.get("constants", {}).items():
        assert name in vars(mlx_grpo), f"mlx_grpo has no {name}"
        setattr(mlx_grpo, name, value)
    mlx_grpo.check_end_token = lambda *_: None      # these completions are to run to their limit
    P = len(o["prompts"])
    config = mlx_grpo.MLXGRPOConfig(**{
        "model_name": o["model"], "num_generations": o["G"], "batch_size": P, "gradient_accumulation_steps": 1,
        "max_new_tokens": o["max_tokens"], "max_completion_length": o["max_tokens"], "max_prompt_length": 4096,
        "prompt_format": "text", "system_prompt": "", "shuffle": False, "temperature": 1.0, "update_every": 1,
        "dtype": o["dtype"], "learning_rate": o["learning_rate"], "lr_scheduler_type": "constant", "max_steps": 10**6,
        "max_grad_norm": 1.0, "kl_coeff": o["kl"], "eval_samples": 0, "eval_every_updates": 0, "log_jsonl": False,
        "log_token_details": 0, "rollout_batch_size": o.get("at_once") or P * o["G"], **o.get("options", {})})
    model, tokenizer = mlx_grpo.load_model(o["model"], dtype=o["dtype"])
    rows = [{"question": text, "answer": "0"} for text in o["prompts"]]
    return mlx_grpo.MLXGRPOTrainer(model, tokenizer, [spread], config, rows, run_dir=tempfile.mkdtemp(), **more)


def ours(gate, o):
    """Whole GRPO steps."""
    mx, about = mlx_core(ours=True)
    trainer = our_trainer(o)
    gate.ready(**about)
    while True:
        gate.wait()
        m = trainer.step()
        gate.reply(rollout_s=m["rollout_s"], tokens=round(m["completions/mean_length"] * len(o["prompts"]) * o["G"]),
                   peak_gb=m["peak_gb"], gap=m["sampling/sampling_logp_difference/mean"])


def our_training(gate, o):
    """GRPO steps on completions that are there already, random ones of max_tokens each: the training alone."""
    mx, about = mlx_core(ours=True)
    import random

    from mlx_grpo import Rollout

    rng, G, T = random.Random(0), o["G"], o["max_tokens"]
    ids = [[[rng.randrange(5, 256) for _ in range(T)] for _ in range(G)] for _ in o["prompts"]]
    logprobs, ones, ended = [[-8.0] * T] * G, [[1] * T] * G, [True] * G

    def sampled(trainer, problems):
        texts = [[str(i) for i in range(G)]] * len(problems)
        prompts = [trainer.tokenizer.encode(p.prompt) for p in problems]
        return [Rollout(*row) for row in zip(problems, prompts, ids, [logprobs] * len(ids), [ones] * len(ids),
                                             [ended] * len(ids), texts)]
    trainer = our_trainer(o, rollout_func=sampled)
    gate.ready(**about)
    while True:
        gate.wait()
        m = trainer.step()
        gate.reply(tokens=len(o["prompts"]) * G * T, peak_gb=m["peak_gb"], grad_norm=m["grad_norm"])


def our_rollouts(gate, o):
    """Completions for every prompt, nothing else."""
    mx, about = mlx_core(ours=True)
    trainer = our_trainer(o)
    gate.ready(**about)
    while True:
        gate.wait()
        rollouts = trainer.generate_responses(trainer.train_dataset)
        trainer.step_count += 1             # other random numbers the next time
        gate.reply(tokens=sum(len(ids) for r in rollouts for ids in r.completion_ids), peak_gb=mx.get_peak_memory() / 1e9)


def limits(gate, o):
    """What the machine can do: GFLOP/s of a float32 matmul, GB/s of reading memory, ns of an exponential."""
    mx, about = mlx_core()
    a, big, row = mx.random.normal((1536, 1536)), mx.ones((2**26,)), mx.random.normal((2**22,))

    def best(work, times=5):
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            mx.eval(work())
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    mx.eval(a, big, row)
    gate.ready(**about)
    while True:
        gate.wait()
        gate.reply(tokens=0, peak_gb=None, matmul_gflops=2 * 1536**3 / best(lambda: a @ a) / 1e9,
                   read_gb_s=big.nbytes / best(lambda: mx.max(big)) / 1e9, exp_ns=best(lambda: mx.exp(row)) / row.size * 1e9)


# ---- MLX peers -------------------------------------------------------------------------------------------------------

def batch_generator(gate, o):
    """mlx-lm's BatchGenerator: as many rows at once as ours. o["cached"]: each prompt is prefilled once and its cache
    handed to its group, as mlx-lm-lora does."""
    mx, about = mlx_core()
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler

    model, tokenizer = load(o["model"])
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in o["prompts"]]
    rows, at_once = [p for p in prompts for _ in range(o["G"])], o.get("at_once") or len(prompts) * o["G"]

    def forked(prompt):
        cache = make_prompt_cache(model)
        model(mx.array([prompt[:-1]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        return [[type(layer).from_state(layer.state) for layer in cache] for _ in range(o["G"])]

    gate.ready(**about)
    while True:
        gate.wait()
        generator = BatchGenerator(model, stop_tokens=[[i] for i in tokenizer.eos_token_ids], sampler=make_sampler(1.0),
                                   completion_batch_size=at_once, prefill_batch_size=at_once)
        if o.get("cached"):
            generator.insert([p[-1:] for p in rows], [o["max_tokens"]] * len(rows), all_tokens=[p[:-1] for p in rows],
                             caches=[cache for p in prompts for cache in forked(p)])
        else:
            generator.insert(rows, [o["max_tokens"]] * len(rows))
        tokens = 0
        while responses := generator.next_generated():
            tokens += len(responses)
        generator.close()
        gate.reply(tokens=tokens, peak_gb=mx.get_peak_memory() / 1e9)


def forward_only(gate, o):
    """The bound of our sampler: the model as we load it, its forward pass on one token for each row, max_tokens times over
    a cache of the same length, nothing drawn, nothing read."""
    mx, about = mlx_core(ours=True)
    from mlx_grpo import load_model
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = load_model(o["model"])
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in o["prompts"]]
    rows = mx.array([p for p in prompts for _ in range(o["G"])])
    gate.ready(**about)
    while True:
        cache = make_prompt_cache(model)
        mx.eval(model(rows, cache=cache), [layer.state for layer in cache])
        gate.wait()
        for _ in range(o["max_tokens"]):
            logits = model(rows[:, -1:], cache=cache)
            mx.async_eval(logits)
        mx.eval(logits)
        gate.reply(tokens=rows.shape[0] * o["max_tokens"], peak_gb=mx.get_peak_memory() / 1e9)


def sequential(gate, o):
    """The plain way of the public MLX-GRPO scripts: one completion after another by mlx-lm's generate_step, then for each
    a full-logits forward pass of policy, old policy and reference, all completions of the step in one graph."""
    mx, about = mlx_core()
    import mlx.nn as nn
    from mlx.optimizers import AdamW, clip_grad_norm
    from mlx.utils import tree_map
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_sampler

    (model, tokenizer), (model_old, _), (ref_model, _) = load(o["model"]), load(o["model"]), load(o["model"])
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in o["prompts"]]
    optimizer, sampler = AdamW(o["learning_rate"], weight_decay=0.0), make_sampler(1.0)

    def logprobs(model, prompt, ids):
        every = nn.log_softmax(model(mx.array([prompt + ids]))[0].astype(mx.float32), axis=-1)        # (S, V)
        return mx.take_along_axis(every[len(prompt) - 1:-1], mx.array(ids)[:, None], axis=-1)[:, 0]

    def loss(model, prompt, group, advantages, old):
        total = 0
        for ids, advantage, old_logprobs in zip(group, advantages, old):
            new, ref = logprobs(model, prompt, ids), logprobs(ref_model, prompt, ids)
            ratio = mx.exp(new - old_logprobs)
            surrogate = mx.minimum(ratio * advantage, mx.clip(ratio, 0.8, 1.2) * advantage)
            total += (surrogate - o["kl"] * (mx.exp(ref - new) - (ref - new) - 1)).mean()
        return -total / len(group)

    gradients_of = nn.value_and_grad(model, loss)
    gate.ready(**about)
    while True:
        gate.wait()
        rollout_s, tokens, gradients = 0.0, 0, None
        for prompt in prompts:
            started = time.perf_counter()
            group = [[token for token, _ in generate_step(mx.array(prompt), model_old, max_tokens=o["max_tokens"],
                                                          sampler=sampler)] for _ in range(o["G"])]
            rollout_s += time.perf_counter() - started
            rewards = mx.array(spread([tokenizer.decode(ids) for ids in group]))
            advantages = (rewards - rewards.mean()) / (mx.std(rewards) + 1e-8)
            old = [logprobs(model_old, prompt, ids) for ids in group]
            _, part = gradients_of(model, prompt, group, advantages, old)
            gradients = part if gradients is None else tree_map(mx.add, gradients, part)
            tokens += sum(map(len, group))
        optimizer.update(model, clip_grad_norm(tree_map(lambda g: g / len(prompts), gradients), 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
        model_old.update(model.parameters())
        gate.reply(rollout_s=rollout_s, tokens=tokens, peak_gb=mx.get_peak_memory() / 1e9)


def full_logits(gate, o):
    """The training of our_training in the usual way: logits of every position at once, one forward and backward pass.
    o["limit_gb"]: of memory."""
    mx, about = mlx_core()
    import mlx.nn as nn
    import random
    from mlx.optimizers import AdamW
    from mlx_lm import load

    end_beyond(mx, o["limit_gb"])
    model, tokenizer = load(o["model"])
    rng, T = random.Random(0), o["max_tokens"]
    rows = mx.array([tokenizer.encode(text, add_special_tokens=False) + [rng.randrange(5, 256) for _ in range(T)]
                     for text in o["prompts"] for _ in range(o["G"])])                                 # (B, S)
    advantages = mx.random.normal((len(rows), 1))
    optimizer = AdamW(o["learning_rate"])

    def loss(model):
        logits = model(rows[:, :-1]).astype(mx.float32)
        taken = mx.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        ratio = mx.exp(taken - mx.stop_gradient(taken))[:, -T:]
        return -mx.minimum(ratio * advantages, mx.clip(ratio, 0.8, 1.2) * advantages).mean()

    gradients_of = nn.value_and_grad(model, loss)
    gate.ready(**about)
    while True:
        gate.wait()
        value, gradients = gradients_of(model)
        optimizer.update(model, gradients)
        mx.eval(value, model.parameters(), optimizer.state)
        gate.reply(tokens=len(rows) * T, peak_gb=mx.get_peak_memory() / 1e9)


def mlx_lm_lora(gate, o):
    """mlx-lm-lora's train_grpo, full weights. Its batch_size is at once the prompts of a step, the rows of a training pass
    and the rows decoded together; o["at_once"] lifts the last by handing its BatchGenerator a larger number."""
    mx, about = mlx_core()
    from functools import partial

    from mlx.optimizers import AdamW
    from mlx_lm import load
    from mlx_lm_lora.trainer import grpo_trainer

    model, tokenizer = load(o["model"])
    ref_model = load(o["model"])[0] if o["kl"] else None
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in o["prompts"]]
    if o.get("at_once"):
        plain = grpo_trainer.BatchGenerator
        grpo_trainer.BatchGenerator = lambda *a, **k: plain(*a, **k | {"completion_batch_size": o["at_once"]})
    rollout_s, generate = [0.0], grpo_trainer.generate_grpo

    def timed(**arguments):
        started = time.perf_counter()
        result = generate(**arguments)
        rollout_s[0] = time.perf_counter() - started
        return result

    grpo_trainer.generate_grpo = timed

    class Turns:
        def on_train_loss_report(self, info):
            gate.reply(rollout_s=rollout_s[0], peak_gb=mx.get_peak_memory() / 1e9,
                       tokens=round(info["train_average_generated_tokens"] * len(prompts) * o["G"]))
            gate.wait()

    def reward(prompts, completions, answer, types):
        return spread(completions)

    arguments = grpo_trainer.GRPOTrainingArgs(
        batch_size=len(prompts), group_size=o["G"], max_completion_length=o["max_tokens"], iters=10**6, beta=o["kl"],
        epsilon=0.2, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, steps_per_report=1, steps_per_save=10**7,
        steps_per_eval=10**7, max_seq_length=4096, adapter_file=str(Path(tempfile.mkdtemp(), "adapters.safetensors")))
    rows = [(ids, tokenizer.encode("0"), text, "0") for ids, text in zip(prompts, o["prompts"])]
    train = partial(grpo_trainer.train_grpo, model, ref_model, tokenizer, AdamW(o["learning_rate"], weight_decay=0.0), rows,
                    reward_funcs=[reward], args=arguments, training_callback=Turns(), end_answer_token="")
    gate.ready(**about)
    gate.wait()
    train()


# ---- torch -----------------------------------------------------------------------------------------------------------

def trl(gate, o):
    """TRL's GRPOTrainer on torch, without gradient checkpointing and in the asked dtype, the whole step in one pass."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(o["threads"])
    on_cpu, B, tokens = not torch.cuda.is_available(), len(o["prompts"]) * o["G"], [0]

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            gate.wait()

        def on_step_end(self, *_, **__):
            gate.reply(rollout_s=trainer.rollout_s, tokens=tokens[0],
                       peak_gb=None if on_cpu else torch.cuda.max_memory_allocated() / 1e9)

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            started = time.perf_counter()
            result = super()._generate(prompts)
            self.rollout_s = time.perf_counter() - started
            return result

    def reward(completions, completion_ids, **_):
        tokens[0] = sum(map(len, completion_ids))
        return spread(completions)

    model = AutoModelForCausalLM.from_pretrained(o["model"], dtype=getattr(torch, o["dtype"]))
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=B, num_generations=o["G"], loss_type="grpo",
        max_completion_length=o["max_tokens"], max_steps=10**6, learning_rate=o["learning_rate"], beta=o["kl"],
        temperature=1.0, top_p=1.0, top_k=0, lr_scheduler_type="constant", gradient_checkpointing=False, use_cpu=on_cpu,
        bf16=o["dtype"] == "bfloat16", shuffle_dataset=False, logging_strategy="no", save_strategy="no", report_to=[])
    trainer = Timed(model=model, reward_funcs=[reward], args=arguments, callbacks=[Turns()],
                    processing_class=AutoTokenizer.from_pretrained(o["model"]),
                    train_dataset=Dataset.from_list([{"prompt": text} for text in o["prompts"]]))
    gate.ready(device="cpu" if on_cpu else torch.cuda.get_device_name())
    trainer.train()


PEERS = {f.__name__: f for f in (ours, our_training, our_rollouts, limits, batch_generator, forward_only, sequential,
                                 full_logits, mlx_lm_lora, trl)}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PEERS:
        sys.exit(f"{__doc__.strip()}\n\nNAME is one of {', '.join(PEERS)}")
    PEERS[sys.argv[1]](Gate(), json.loads(sys.argv[2]))
