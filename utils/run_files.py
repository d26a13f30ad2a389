"""
The files of a run: checkpoints, metrics.jsonl, completions.jsonl. Part of mlx_grpo, which gives all of these names out again.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_grpo import UserError, cast_floats, finite_or_none, is_right, lora_parameters
from mlx_grpo.files import disk_errors


# Beside the weights, where there is such a thing to continue with (mlx-lm reads model*.safetensors only): model_old that is
# older than the model, a reference that has moved, what is left of the rollout batch.
WEIGHTS, ADAPTERS, OPTIMIZER = "model.safetensors", "adapters.safetensors", "optimizer.safetensors"
OLD_POLICY, REFERENCE, WINDOW = "old_policy.safetensors", "reference.safetensors", "rollouts.safetensors"
ENDLESS = 10**9      # total_steps of a run that has no last one


def arrays_of(learner):
    """{file: arrays} of a learner as it is now: weights in the dtype they are trained in, or adapters, and moments."""
    master, full = dict(tree_flatten(learner.master)), learner.config.fine_tune_type == "full"
    weights = {WEIGHTS: dict(tree_flatten(learner.model.parameters())) | master} if full else {ADAPTERS: master}
    return weights | {OPTIMIZER: dict(tree_flatten(learner.optimizer.state))}


def save_checkpoint(path, learner, tokenizer, state, files, phase):
    """Write a model directory with float32 weights (model.safetensors, sharded when large; config.json; tokenizer;
    generation_config.json), or adapters in mlx-lm's format, and optimizer.safetensors and trainer_state.json; the
    manifest last; under a temporary name, then rename it. state: JSON; files: {name: arrays}; phase: the run's RunState.
    Raises UserError where it can't be written."""
    from mlx_grpo.files import atomic_directory
    from mlx_grpo.manifest import write_manifest
    from mlx_grpo.run_guard import set_aside

    try:
        set_aside(Path(path))
        with atomic_directory(path, replace=True) as work:
            write_checkpoint(work, learner, tokenizer, json.loads(state), files)
            write_manifest(work)
            phase("rename")
    except OSError as error:
        raise UserError(f"can't save {path}: {error.strerror or error}; earlier checkpoints are as they were: make room and go "
                        "on with --resume") from error


def write_checkpoint(work, learner, tokenizer, state, files):
    """The files of a checkpoint, into the directory `work`."""
    source = Path(learner.model.source_path)
    if learner.config.fine_tune_type == "full":
        save_weights(work, files[WEIGHTS])
        config = json.loads((source / "config.json").read_text())
        config["torch_dtype"] = config["dtype"] = learner.config.optimizer_dtype
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in [source / "generation_config.json", *source.glob("*.py")]:
            if file.exists():
                (work / file.name).write_bytes(file.read_bytes())
    else:
        layers = learner.config.lora_layers if learner.config.lora_layers >= 0 else len(learner.model.layers)
        adapter = {"fine_tune_type": learner.config.fine_tune_type, "num_layers": layers,
                   "lora_parameters": lora_parameters(learner.config), "model": learner.config.model_name}
        (work / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
    save_tokenizer(tokenizer, work)
    for name, arrays in files.items():
        if name != WEIGHTS:
            save_arrays(work / name, arrays)
    (work / "trainer_state.json").write_text(json.dumps(state | {"versions": versions()}, indent=2) + "\n")


def save_arrays(file, arrays):
    """A safetensors file; sorted by name, so that equal arrays give equal bytes. Raises OSError."""
    file, size = Path(file), sum(a.nbytes for a in arrays.values())
    try:
        mx.save_safetensors(str(file), dict(sorted(arrays.items())), metadata={"format": "mlx"})
    except RuntimeError as error:
        with open(file, "ab"):                                # raises with the reason that MLX doesn't tell
            pass
        full = shutil.disk_usage(file.parent).free < size
        raise OSError("No space left on device" if full else f"{file.name}: {error}") from error
    if file.stat().st_size < size:                            # a full disk may cut a file without an error
        raise OSError(f"{file.name} was cut short; the disk is full")


def save_weights(directory, weights):
    """model.safetensors, or shards of at most 5 GB with the index that mlx-lm and transformers read."""
    from mlx_lm.utils import make_shards

    shards = make_shards(dict(sorted(weights.items())))
    names = ["model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
             for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_arrays(directory / name, shard)
    index = {"metadata": {"total_size": sum(a.nbytes for a in weights.values())},
             "weight_map": {key: name for name, shard in zip(names, shards) for key in sorted(shard)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_tokenizer(tokenizer, directory):
    """The tokenizer's files, special_tokens_map.json among them (transformers 5 no longer writes that one)."""
    tokenizer.save_pretrained(directory)
    names = {k: str(v) for k in ("bos_token", "eos_token", "pad_token", "unk_token") if (v := getattr(tokenizer, k, None))}
    file = Path(directory) / "special_tokens_map.json"
    if not file.exists():
        file.write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n")


def load_checkpoint(path, learner):
    """Put a checkpoint's weights and moments into the learner; returns its trainer state."""
    full = learner.config.fine_tune_type == "full"
    weights = {}
    for file in sorted(Path(path).glob("model*.safetensors" if full else "adapters.safetensors")):
        weights |= mx.load(str(file))
    if not weights:
        raise UserError(f"{path} holds no {'weights' if full else 'adapters'}; it was not saved by a run with "
                        f"fine_tune_type = {learner.config.fine_tune_type!r}")
    learner.model.load_weights(list(weights.items()), strict=full)
    learner.master = cast_floats(learner.model.trainable_parameters(), learner.master_dtype)
    learner.model.update(cast_floats(learner.model.parameters(), learner.dtype))
    learner.optimizer.state = tree_unflatten(list(mx.load(str(Path(path) / "optimizer.safetensors")).items()))
    mx.eval(learner.master, learner.model.parameters(), learner.optimizer.state)
    return json.loads((Path(path) / "trainer_state.json").read_text())


def versions():
    from importlib.metadata import version
    return {"python": sys.version.split()[0]} | {p: version(p) for p in ("mlx", "mlx-lm", "numpy")}


def step_of(step, total):
    """"step 3/100", or "step 3" where there is no last one."""
    return f"step {step}" + (f"/{total}" if total < ENDLESS else "")


class RunLog:
    """metrics.jsonl and completions.jsonl of a run, and its lines on the terminal. run_dir None writes no files."""

    def __init__(self, run_dir):
        self.run_dir = Path(run_dir) if run_dir else None
        self.started, self.first_step = time.perf_counter(), None

    def append(self, name, rows):
        if not self.run_dir:
            return
        with disk_errors(self.run_dir / name):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with open(self.run_dir / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def metrics(self, metrics):
        self.append("metrics.jsonl", [metrics])

    def evaluation(self, step, problems, texts):
        """One object for each held-out problem, in eval_completions.jsonl."""
        self.append("eval_completions.jsonl", [
            {"step": step, "prompt": p.prompt, "answer": p.answer, "completion": text,
             "correct": is_right(p, text)} for p, text in zip(problems, texts)])

    def completions(self, step, rollouts, scores, names, rewards, advantages, extras, details=()):
        """One object for each completion: prompt, text, each reward, advantage, length; tokens and log-probs of the first
        ones, as `details` gives them."""
        rows, G = [], len(rollouts[0].completion_ids)
        for i, row in enumerate(scores):
            r, g = rollouts[i // G], i % G
            rows.append({
                "step": step, "prompt": r.problem.prompt, "answer": r.problem.answer, "completion": r.texts[g],
                "rewards": {n: None if np.isnan(s) else float(s) for n, s in zip(names, row)},
                "reward": finite_or_none(rewards.reshape(-1)[i]), "advantage": float(advantages.reshape(-1)[i]),
                "length": len(r.completion_ids[g]), "ended": r.ended[g], **{k: v[i] for k, v in extras.items()}})
        for row, (texts, logprobs) in zip(rows, details):
            row |= {"token_texts": texts, "token_logprobs": [round(x, 4) for x in logprobs]}
        self.append("completions.jsonl", rows)

    def cut_after(self, step):
        """Drop what was logged after `step`, when a run continues from there."""
        for name in ("metrics.jsonl", "completions.jsonl", "eval_completions.jsonl"):
            if self.run_dir and (file := self.run_dir / name).exists():
                lines = file.read_text(encoding="utf-8").split("\n")[:-1]       # what follows the last line break is half a line
                kept = [line for line in lines if json.loads(line)["step"] <= step]
                temporary = file.with_suffix(".tmp")
                with disk_errors(file):
                    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                    os.replace(temporary, file)

    def line(self, m, total):
        """One line for people, the same fields in the same order."""
        if self.first_step is None:
            self.first_step, self.started = m["step"] - 1, time.perf_counter() - m["step_time"]
        done = m["step"] - self.first_step
        left = (time.perf_counter() - self.started) / done * (total - m["step"])
        parts = [step_of(m["step"], total)]
        if m.get("reward") is not None:
            parts += [f"reward {m['reward']:.3f} ±{m['reward_std'] or 0:.2f}", f"kl {m['kl']:.4f}",
                      f"clip {m['clip_ratio/region_mean']:.2f}",
                      f"len {m['completions/mean_length']:.0f} (ended {1 - m['completions/clipped_ratio']:.0%})"]
        parts += [f"loss {m['loss']:.4f}", f"lr {m['learning_rate']:.1e}", f"{m['step_time']:.1f} s"
                  + (f" (rollout {m['rollout_s']:.1f})" if "rollout_s" in m else ""), f"{m['peak_gb']:.1f} GB"]
        parts += [f"exact match {m['eval/exact_match']:.2f}"] if "eval/exact_match" in m else []
        print(" | ".join(parts) + (f" | {left / 60:.0f} min left" if total < ENDLESS else ""), flush=True)

    def lines(self, step, texts):
        """What is worth telling of a step besides its metrics."""
        for text in texts:
            print(f"step {step}: {text}", flush=True)


def read_metrics(run_dir):
    """The objects of a run's metrics.jsonl. Raises UserError where there is none."""
    file = Path(run_dir) / "metrics.jsonl"
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't read the metrics of a run: {error}") from error
