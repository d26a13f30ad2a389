"""Run directories as the trainer writes them, made up from a seed: learning that looks like learning, in any size."""

import json
import math
import random
from pathlib import Path

HOSTILE = ('</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
           ' & <b>bold</b> \u2028 @@DATA@@')
WORDS = "first we take the apples and add them to what was there then halve it so that each gets its share".split()


def make_run(directory, *, steps=40, prompts=2, generations=8, problems=12, seed=0, words=30, start=0, hostile=False,
             tokens=False, warn=False, evaluations=False, **options):
    """A run of `steps` steps, each of `prompts` groups of `generations` completions. start: share solved at first."""
    rng, directory = random.Random(seed), Path(directory)
    directory.mkdir(parents=True)
    config = {"model_name": "tiny/demo", "dataset": "synthetic:chain", "learning_rate": 1e-6, "seed": seed,
              "num_generations": generations, "reward_weights": [2.0, 1.0], **options}
    record = {"command": "train", "config": config, "versions": {"python": "3.11.7", "mlx": "0.32.4"}, "git": "abc1234",
              "sources": {name: "configs/demo.toml" if name in ("dataset", *options) else "default" for name in config},
              "device": "Device(cpu, 0)", "seed": seed}
    (directory / "config.json").write_text(json.dumps(record))
    with open(directory / "metrics.jsonl", "w", encoding="utf-8") as metrics, \
            open(directory / "completions.jsonl", "w", encoding="utf-8") as completions, \
            open(directory / "eval_completions.jsonl", "w", encoding="utf-8") as held_out:
        first = {"step": 0, "eval/exact_match": 0.1 + start, "eval_train/exact_match": 0.15 + start}
        metrics.write(json.dumps(first) + "\n")
        for step in range(1, steps + 1):
            skill = start + (0.9 - start) / (1 + math.exp(-8 * (step / steps - 0.5)))
            numbers = [(step * prompts + p) % problems for p in range(prompts)]
            rows = [row for n in numbers for row in group(rng, step, n, generations, skill, words, hostile, tokens)]
            completions.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            metrics.write(json.dumps(step_metrics(rng, step, steps, rows, skill, warn)) + "\n")
        if evaluations:
            held_out.writelines(json.dumps({
                "step": step, "prompt": f"held-out problem {i}", "answer": str(i), "correct": rng.random() < share,
                "completion": f"<answer>{i}</answer>"}) + "\n"
                for step, share in ((0, 0.1), (steps, 0.8)) for i in range(20))
    if not evaluations:
        (directory / "eval_completions.jsonl").unlink()
    return directory


def group(rng, step, problem, generations, skill, words, hostile, tokens):
    """The completions of one prompt at one step."""
    right = [rng.random() < skill for _ in range(generations)]
    mean = sum(right) / generations
    std = (sum((r - mean) ** 2 for r in right) / max(1, generations - 1)) ** 0.5
    question = f"Problem {problem}: {problem} apples, and {problem + 3} more?" + HOSTILE * hostile
    prompt = [{"role": "system", "content": "Answer inside <answer>."}, {"role": "user", "content": question}]
    rows = []
    for ok in right:
        text = [rng.choice(WORDS) + " " for _ in range(rng.randrange(words // 2, words + 1))]
        text += [f"<answer>{2 * problem + 3 if ok else 7}</answer>"] + [HOSTILE] * hostile
        rows.append({"step": step, "prompt": prompt, "answer": str(2 * problem + 3), "completion": "".join(text),
                     "rewards": {"correctness": 2.0 * ok, "int": rng.choice([0.5, None])}, "reward": 2.0 * ok + 0.5,
                     "advantage": (ok - mean) / (std + 1e-4), "length": len(text), "ended": rng.random() > 0.05}
                    | ({"token_ids": list(range(len(text))), "token_texts": text,
                        "token_logprobs": [-rng.expovariate(1.5) for _ in text]} if tokens else {}))
    return rows


def step_metrics(rng, step, steps, rows, skill, warn):
    """What the trainer logs of a step."""
    lengths, noise = [row["length"] for row in rows], lambda scale: rng.gauss(0, scale)
    mean, done = sum(lengths) / len(lengths), step / steps
    found = {
        "step": step, "epoch": done, "learning_rate": 1e-6 * (1 - done), "loss": noise(0.01),
        "grad_norm": 0.3 + abs(noise(0.1)), "reward": 2 * skill + 0.4 + noise(0.1), "reward_std": 0.8 - 0.5 * skill,
        "frac_reward_zero_std": skill / 2, "rewards/correctness/mean": 2 * skill + noise(0.1),
        "rewards/correctness/std": 0.5, "rewards/int/mean": 0.5 if step % 7 else None,
        "completions/mean_length": mean, "completions/mean_terminated_length": mean - 0.5,
        "completions/min_length": min(lengths), "completions/max_length": max(lengths),
        "completions/clipped_ratio": 0.05, "kl": 0.01 * done + abs(noise(0.0005)),
        "clip_ratio/low_mean": abs(noise(0.002)), "clip_ratio/high_mean": abs(noise(0.003)),
        "clip_ratio/region_mean": abs(noise(0.004)), "clip_ratio/low_min": 0.0, "clip_ratio/high_max": 0.02,
        "entropy": 1.2 - 0.7 * skill + noise(0.02), "sampling/sampling_logp_difference/mean": abs(noise(0.002)),
        "sampling/sampling_logp_difference/max": 0.05 + abs(noise(0.01)), "num_tokens": 4000 * step,
        "rollout_s": 2 + noise(0.1), "score_s": 0.2, "update_s": 1.1 + noise(0.05), "step_time": 3.5 + noise(0.1),
        "peak_gb": 3 + 0.4 * min(1, step / 20)}
    if step % max(1, steps // 10) == 0:
        found |= {"eval/exact_match": 0.1 + 0.8 * skill, "eval_train/exact_match": 0.15 + 0.8 * skill}
    if warn and step % 5 == 0:
        found |= {"warnings": ["entropy fell below 0.1: lower the learning rate"], "health/dead_groups": 3}
    return found
