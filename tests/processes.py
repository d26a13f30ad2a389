"""Runs the cases of test_distributed.py: in this process, or as one of several (python tests/processes.py OUT CASE ...)."""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx_grpo  # noqa: E402, F401
import numpy as np  # noqa: E402
from mlx.optimizers import SGD  # noqa: E402, F401
from mlx.utils import tree_flatten  # noqa: E402
from mlx_grpo import (MLXGRPOConfig, MLXGRPOTrainer, NotFinite, SFTTrainer, TrainerCallback, find_world,  # noqa: E402
                      load_model, load_problems, load_symbol)

BASE = dict(
    model_name=str(ROOT / "data/demo_model"), dataset="synthetic:chain", system_prompt="", max_train_samples=32, seed=3,
    rewards=["correctness", "strict_format", f"{Path(__file__)}:ragged"], num_generations=4, batch_size=2,
    gradient_accumulation_steps=2, max_steps=2, max_new_tokens=12, max_completion_length=12, temperature=1.0, update_every=1,
    learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0, eval_samples=5, eval_steps=2, eval_max_new_tokens=6,
    eval_every_updates=0, save_steps=0, logging_steps=0)
# Adam divides by the gradient's size, so that where the gradient is nearly 0 rounding alone moves a weight; SGD doesn't.
PLAIN = dict(optimizer=f"{Path(__file__)}:SGD", learning_rate=0.1)
CASES = {
    "grpo": dict(num_iterations=2, max_steps=4, clip_eps=0.01),
    "lora": dict(fine_tune_type="lora", kl_coeff=0.1, batch_size=1, gradient_accumulation_steps=3, loss_type="bnpo",
                 reward_workers=1),
    "dapo": dict(loss_type="dapo", dynamic_sampling=True, minibatches=2, batch_size=1, clip_eps_high=0.28, max_steps=3,
                 mask_truncated_completions=True),
    "dr_grpo": PLAIN | dict(loss_type="dr_grpo", scale_rewards="batch", batch_size=3, gradient_accumulation_steps=1,
                            top_p=0.9, max_tokens_per_microbatch=60),
    "rloo": dict(loss_type="rloo", advantage="rloo", normalize_advantages=True, kl_coeff=0.05, kl_in="reward"),
    "quantised": dict(quantize_for_rollouts=True, rollout_bits=8, rollout_group_size=32, loss_type="luspo", update_every=2,
                      max_steps=3, gradient_accumulation_steps=1),
    "entropy": dict(entropy_coef=0.01, entropy_adaptive=True, top_entropy_quantile=0.5, loss_type="sapo",
                    repetition_penalty=1.2),
    "errors": PLAIN | dict(rewards=["strict_format", f"{Path(__file__)}:broken"], on_reward_error="skip"),
    "left_out": PLAIN | dict(max_bad_steps=1),
    "sft": dict(solution_column="direct", batch_size=3, gradient_accumulation_steps=1),
}


def ragged(completion_ids, log_extra, log_metric, **_):
    """Differs from row to row, so that no group's rewards are equal by chance."""
    log_extra("odd", [sum(ids) % 2 for ids in completion_ids])
    log_metric("rows", len(completion_ids), "sum")
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def broken(completion_ids, log_extra):
    """Raises for some rows."""
    log_extra("even", [1 - sum(ids) % 2 for ids in completion_ids])
    return [1 / (sum(ids) % 3) for ids in completion_ids]


class Fails(TrainerCallback):
    """In the process that MLX_GRPO_TEST names: raises after the first step, or kills itself without a word."""

    def on_step_end(self, trainer, metrics):
        how, rank = os.environ["MLX_GRPO_TEST"].split()
        if trainer.world.rank == int(rank) and trainer.step_count == 1:
            if how == "kill":
                os.kill(os.getpid(), 9)
            if how == "term":
                os.kill(os.getpid(), 15)
            if how == "stop":
                return True
            if how == "raise":
                raise ZeroDivisionError("a callback's own")


def failing_once(trainer):
    """A make_rollout that meets a number which is not finite in the last prompt of the first step, the first time: in one
    process of several."""
    sample, doomed = mlx_grpo.make_rollout, [trainer.last_problems()[-1].prompt]

    def make_rollout(tokenizer, problem, *args, **options):
        if problem.prompt in doomed and not trainer.step_count and options["kept"] is None and doomed.pop():
            raise NotFinite("no number")
        return sample(tokenizer, problem, *args, **options)
    return make_rollout


def run_case(name, output):
    """Train a case; leaves weights-RANK.npz in its run directory."""
    config, world = MLXGRPOConfig(**BASE | CASES[name]), find_world()
    problems, held_out = load_problems(config)
    model, tokenizer = load_model(config.model_name)
    run_dir = Path(output) / name
    if name == "sft":
        trainer = SFTTrainer(model, tokenizer, config, problems, held_out, run_dir=run_dir)
    else:
        rewards = [load_symbol(r, "reward") if ":" in r else r for r in config.rewards]
        trainer = MLXGRPOTrainer(model, tokenizer, rewards, config, problems, held_out, run_dir=run_dir)
    with mock.patch.object(mlx_grpo, "make_rollout", failing_once(trainer)) if name == "left_out" else nullcontext():
        trainer.train()
    run_dir.mkdir(exist_ok=True)
    np.savez(run_dir / f"weights-{world.rank}.npz", **{k: np.array(a) for k, a in tree_flatten(trainer.learner.master)})


def start(command, folder, places=(None, None), **env):
    """Popen of a command, a process in each working directory of `places`, connected over loopback as mlx.launch does it."""
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in places]
    hosts = Path(folder) / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port.getsockname()[1]}"] for port in ports]))
    for port in ports:
        port.close()
    env = {**os.environ, "MLX_HOSTFILE": str(hosts), **env}
    return [subprocess.Popen(command, env=env | {"MLX_RANK": str(rank)}, cwd=place, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for rank, place in enumerate(places)]


def finish(processes, timeout=240):
    """[(exit code, standard output, standard error)]; none is left behind."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, told)]


if __name__ == "__main__":
    with find_world():
        for name in sys.argv[2:]:
            run_case(name, sys.argv[1])
