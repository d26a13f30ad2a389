"""docs/metrics.md explains every key that a run can write into metrics.jsonl, and no other."""

import ast
import re
from dataclasses import replace

import pytest
from conftest import ROOT
from mlx_grpo import MLXGRPOConfig, SFTTrainer, load_model, load_problems, read_metrics
from mlx_grpo.health import RULES, metric_name
from mlx_grpo.watch import WatchTrainer
from test_trainer import CONFIG, make_trainer

GLOSSARY = (ROOT / "docs/metrics.md").read_text()
LINES = [[cell.strip() for cell in line.split("|")[1:-1]] for line in GLOSSARY.splitlines() if line.startswith("| `")]
KEYS = [key for line in LINES for key in re.findall(r"`([^`]+)`", line[0])]
LOGGED = replace(CONFIG, log_jsonl=True, max_steps=2)
BROKEN = "def broken(completions):\n    return [1 / 0] * len(completions)\n"


def same(key, other):
    """Whether two keys may be the same, where <name> in the glossary and * in the code stand for anything."""
    pattern = lambda key: "".join("[^ ]+" if part in ("*", "<name>") else re.escape(part)
                                  for part in re.split(r"(\*|<name>)", key))
    return bool(re.fullmatch(pattern(key), other) or re.fullmatch(pattern(other), key))


def unexplained(keys):
    """Keys without a line; evaluate() names its own without eval/ before them."""
    return sorted(key for key in keys if not any(same(known, key) or same(known, f"eval/{key}") for known in KEYS))


def text_of(node):
    """The text of a constant, or of an f-string with * for what is put in; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def keys_in_code():
    """{key: file}: the names with a slash that stand in our code as keys of dictionaries, as what is assigned to, or as
    the first argument of log_metric. Those whose first part isn't known there ("*/...") are left to the runs below."""
    found = {}
    for file in [ROOT / "mlx_grpo.py", *sorted((ROOT / "utils").glob("*.py"))]:
        nodes = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Dict):
                nodes += node.keys
            elif isinstance(node, ast.DictComp):
                nodes.append(node.key)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                nodes.append(node.slice)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "log_metric":
                nodes += node.args[:1]
        texts = [text for node in nodes if (text := text_of(node)) and re.fullmatch(r"[a-z_]+(/[a-z_*]+)+", text)]
        found |= {text: file.name for text in texts}
    return found


def trained(trainer):
    trainer.train()
    return {key for line in read_metrics(trainer.run_dir) for key in line}


def grpo_run(tmp_path):
    """Everything that adds a metric and can be on at once."""
    (tmp_path / "broken.py").write_text(BROKEN)
    config = replace(LOGGED, quantize_for_rollouts=True, rollout_bits=[8, 0], update_every=2, dynamic_sampling=True,
                     entropy_adaptive=True, kl_coeff=0.1, eval_samples=2, eval_steps=1, eval_every_updates=1, eval_subset_size=2,
                     save_in_background=True, save_steps=1, on_reward_error="skip", max_reward_errors=10000,
                     rewards=["correctness", "strict_format", f"{tmp_path}/broken.py:broken"])
    return trained(make_trainer(tmp_path / "run", config))


def sft_run(tmp_path):
    config = replace(LOGGED, max_steps=1, solution_column="solution")
    problems, held_out = load_problems(config)
    return trained(SFTTrainer(*load_model(config.model_name), config, problems, held_out, run_dir=tmp_path / "run"))


def watch_run(tmp_path):
    from mlx_grpo.synthetic import generate
    from test_watch import WATCH, append

    file = str(tmp_path / "rows.jsonl")
    append([{"question": row["question"], "answer": row["answer"]} for row in generate("chain", 4, seed=1)], file)
    config = replace(WATCH, watch=file)
    problems, held_out = load_problems(config)
    return trained(WatchTrainer(*load_model(config.model_name), config.rewards, config, problems, held_out, run_dir=tmp_path / "run"))


def data_run(tmp_path):
    """A curriculum alone, then beside a second data set."""
    rising = {"option": "length", "levels": [2, 3], "raise_at": 9.0}
    one = replace(LOGGED, dataset="synthetic:chain", curriculum=rising, max_steps=1, eval_samples=4)
    tables = [{"dataset": "synthetic:chain", "curriculum": rising, "max_train_samples": 20},
              {"dataset": "synthetic:reverse", "name": "words", "max_train_samples": 20}]
    several = replace(one, dataset=MLXGRPOConfig.dataset, dataset_options={}, curriculum={}, datasets=tables, max_steps=2,
                      eval_steps=1)
    return trained(make_trainer(tmp_path / "one", one)) | trained(make_trainer(tmp_path / "several", several))


@pytest.mark.parametrize("run, expected", [
    (data_run, {"curriculum_level", "curriculum_level/synthetic:chain", "prompts/words", "reward/words", "eval/exact_match/words"}),
    (grpo_run, {"rollout_bits", "healed", "entropy_coef", "reward_errors", "save_background_s", "dynamic_sampling/rounds", "eval_train/exact_match"}),
    (sft_run, {"loss", "grad_norm"}), (watch_run, {"watch/waiting"})])
def test_every_key_of_a_run_is_explained(run, expected, tmp_path):
    keys = run(tmp_path)
    assert expected <= keys and unexplained(keys) == []


def test_every_key_in_the_code_is_explained():
    found = keys_in_code()
    assert {"math_verify/timeouts", "dynamic_sampling/rounds", "watch/rows", "machine/swap_share", "clip_ratio/low_min"} <= found.keys()
    assert [f"{key} ({found[key]})" for key in unexplained(found)] == []
    assert unexplained(map(metric_name, RULES)) == [] and unexplained(["math_verify/other", "new_key"]) == ["math_verify/other", "new_key"]


def test_what_a_judge_logs_is_explained():
    code = (ROOT / "utils/judge.py").read_text()
    names = re.findall(r'"(\w+)"', re.search(r"for name in \((.*)\):\n\s+log_metric", code)[1])
    assert "calls" in names and unexplained(f"judge/{name}" for name in [*names, "cost_total"]) == []


def test_a_line_of_the_glossary_has_a_unit_a_meaning_and_where_there_is_a_healthy_range_what_to_do():
    for line in LINES:
        keys, unit, meaning, healthy, remedy = line
        assert meaning and bool(healthy) <= bool(remedy), keys
        assert unit or keys.strip("`") in ("loss", "grad_norm", "learning_rate", "entropy_coef"), keys       # numbers without one
    assert len(KEYS) == len(set(KEYS))


def test_the_glossary_explains_nothing_that_isnt_written(tmp_path):
    written = {*keys_in_code(), *map(metric_name, RULES)} | grpo_run(tmp_path) | data_run(tmp_path)
    plain = (ROOT / "utils/watch.py").read_text()
    for key in KEYS:
        assert any(same(key, other) for other in written) or key.startswith("judge/") or f'"{key}"' in plain, key
