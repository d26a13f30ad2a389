"""
The model card of a trained checkpoint: what it is, how it was trained, what that changed. Part of utils/push.py.

Nothing in it names a directory of the machine: local paths are shortened to their last part.
"""

import json
import re
from pathlib import Path

from mlx_grpo import shipped_path

HUB_ID = r"[\w][\w.-]*/[\w][\w.-]*"
NOT_TOLD = ("output_dir", "run_name", "model_name", "dataset", "dataset_config", "system_prompt", "rewards",
            "reward_weights", "log_jsonl", "log_token_details", "logging_steps", "save_steps", "save_total_limit",
            "save_best", "callbacks")
ROWS = {  # metric -> (words, format)
    "eval/exact_match": ("exact match, held-out problems", "{:.3f}"),
    "eval/mean_length": ("their mean length, tokens", "{:.0f}"),
    "eval/clipped_ratio": ("share of them cut at the limit", "{:.2f}"),
    "eval_train/exact_match": ("exact match, training problems", "{:.3f}"),
    "reward": ("reward of sampled completions", "{:.3f}"),
    "completions/mean_length": ("their mean length, tokens", "{:.0f}")}


def is_local(name):
    """Whether a model or data name is a path of this machine rather than a hub id."""
    return shipped_path(name).exists() or not re.fullmatch(HUB_ID, name)


def base_of(name):
    """The hub id that a model goes back to, through runs of ours and conversions whose files say where they come from; None
    where that isn't known."""
    for _ in range(10):
        if not is_local(name):
            return name
        path = shipped_path(name).resolve()
        for file, keys in ((path / "conversion.json", ("source",)), (path.parent / "config.json", ("config", "model_name"))):
            found = read_object(file)
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, str):
                name = found
                break
        else:
            return None
    return None


def read_object(file):
    """The object of a JSON file; {} where there is none."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):                 # not every directory has one: nothing is known then
        return {}
    return found if isinstance(found, dict) else {}


def without_paths(value):
    """A value of the configuration with local paths shortened to their last part: "/home/me/rewards.py:f" ->
    "rewards.py:f"."""
    if isinstance(value, dict):
        return {key: without_paths(v) for key, v in value.items()}
    if isinstance(value, list):
        return [without_paths(v) for v in value]
    if not isinstance(value, str) or "\n" in value or len(value) > 1000:
        return value
    path = value.partition(".py:")[0] + ".py" if ".py:" in value else value
    local = path.startswith(("/", "~", "./", "../")) or "\\" in path or ("/" in path and shipped_path(path).exists())
    return value[len(path) - len(re.split(r"[/\\]", path)[-1]):] if local else value


def metrics_up_to(rows, step):
    """(first, last): for each metric in ROWS its first and its last value up to the checkpoint's step, with their steps."""
    first, last = {}, {}
    for row in rows:
        for key in ROWS.keys() & row.keys():
            if row["step"] <= step and isinstance(row[key], (int, float)):
                first.setdefault(key, (row[key], row["step"]))
                last[key] = row[key], row["step"]
    return first, last


def metadata(record, base, last, repo, license, license_name, license_link, adapters):
    """The YAML block at the card's head, for the hub's search and its pages."""
    from huggingface_hub import EvalResult, ModelCardData

    config, results = record["config"], None
    datasets = [name for name in data_names(config) if not is_local(name) and ":" not in name] or None
    if "eval/exact_match" in last:
        name = datasets[0] if datasets else without_paths(data_names(config)[0])
        results = [EvalResult(task_type="text-generation", dataset_type=name, dataset_name=name, metric_type="exact_match",
                              metric_value=round(last["eval/exact_match"][0], 4), metric_name="exact match, greedy")]
    given = {"base_model": base, "datasets": datasets, "license": license, "license_name": license_name,
             "license_link": license_link, "eval_results": results, "model_name": repo.split("/")[-1]}
    data = ModelCardData(library_name="mlx", pipeline_tag="text-generation", tags=["mlx", "grpo", "reinforcement-learning"],
                         **{key: value for key, value in given.items() if value})
    if base:
        data["base_model_relation"] = "adapter" if adapters else "finetune"
    return data.to_yaml()


def data_names(config):
    """The data sets that the configuration names, as texts."""
    names = config["dataset"] if isinstance(config["dataset"], list) else [config["dataset"]]
    return [name if isinstance(name, str) else str(name.get("dataset", name)) for name in names]


def markdown_table(*rows):
    cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    head, *rest = ["| " + " | ".join(map(cell, row)) + " |\n" for row in rows]
    return head + "|" + "---|" * len(rows[0]) + "\n" + "".join(rest)


def results_table(first, last, step, problems):
    """Before and after, as a table; a sentence where nothing was logged."""
    if not last:
        return "The run logged no metrics.\n"
    rows = [["", "before", f"at step {step}"]]
    for key in [key for key in ROWS if key in last]:
        words, written = ROWS[key]
        told = f" ({problems})" if key == "eval/exact_match" and problems else ""
        when = "" if last[key][1] == step else f" (step {last[key][1]})"
        rows.append([words + told, written.format(first[key][0]) + (f" (step {first[key][1]})" if first[key][1] else ""),
                     written.format(last[key][0]) + when])
    return markdown_table(*rows)


def use(repo, base, adapters, system_prompt):
    """How to run the model, and the system message that it was trained with."""
    if adapters:
        lines = [f"hf download {repo} --local-dir adapters",
                 f"mlx_lm.generate --model {base} --adapter-path adapters --prompt \"...\""]
    else:
        lines = [f"mlx_lm.generate --model {repo} --prompt \"...\""]
    text = "```sh\npip install mlx-lm\n" + "\n".join(lines) + "\n```\n"
    if system_prompt:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", system_prompt)), default=0))
        text += ("\nIt was trained with this system message, which belongs before a prompt:\n\n"
                 f"{fence}text\n{system_prompt}\n{fence}\n")
    return text


def training_table(record):
    """The options that the user or a recipe set, and what it ran on."""
    config, sources = record["config"], record.get("sources", {})
    told = [name for name, value in config.items() if sources.get(name, "default") != "default" and name not in NOT_TOLD]
    text = lambda value: json.dumps(without_paths(value), ensure_ascii=False)
    rows = [["option", "value"], *([f"`{name}`", f"`{text(config[name])}`"] for name in told)]
    versions = ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
    options = markdown_table(*rows) if told else "All options at their defaults.\n"
    return f"{options}\n{versions}; {record.get('device')}.\n"


def card(record, metrics, *, repo, step, problems, base, adapters, plot, license, license_name, license_link):
    """README.md of the repository, as text. record: the run's config.json; metrics: the rows of metrics.jsonl; problems:
    held-out problems of an evaluation, or 0; plot: the picture's name there, or None."""
    config = record["config"]
    first, last = metrics_up_to(metrics, step)
    weights = config.get("reward_weights") or [1.0] * len(config["rewards"])
    rewards = ", ".join(f"{without_paths(name)} (weight {weight:g})" for name, weight in zip(config["rewards"], weights))
    method = "GRPO" if config.get("objective", "grpo") == "grpo" else "on-policy distillation"
    method = "supervised fine-tuning" if record.get("command") == "sft" else method
    parent = f"[{base}](https://huggingface.co/{base})" if base else f"`{without_paths(config['model_name'])}`"
    data = ", ".join(f"`{without_paths(name)}`" for name in data_names(config))
    return "\n".join([
        f"---\n{metadata(record, base, last, repo, license, license_name, license_link, adapters)}\n---\n",
        f"# {repo.split('/')[-1]}\n",
        f"{'Adapters for ' if adapters else ''}{parent}, trained by {method} on {data} with MLX-GRPO: the checkpoint of "
        f"step {step}.\n",
        "## Use\n", use(repo, base, adapters, config.get("system_prompt")),
        "## Before and after\n", results_table(first, last, step, problems),
        f"![Curves of the run]({plot})\n" if plot else "",
        "## Training\n",
        f"Data: {data}" + (f", configuration `{config['dataset_config']}`, split `{config['dataset_split']}`"
                           if not is_local(data_names(config)[0]) else "") + ".\n",
        f"Rewards: {rewards}.\n" if method == "GRPO" else "",
        training_table(record),
        "Licence: see the metadata above.\n" if license else
        "The base model's licence and that of the data apply; this card states none.\n"])
