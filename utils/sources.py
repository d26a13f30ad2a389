"""
What `datasets` and `curriculum` say: the data sources of a run, each at its levels, checked before anything is loaded.
"""

from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from mlx_grpo import ConfigError, MLXGRPOConfig, check_option, nearest

OWN = ("dataset", "dataset_config", "dataset_split", "eval_split", "eval_fraction", "prompt_column", "answer_column",
       "solution_column", "dataset_options", "prompt_format", "system_prompt", "few_shot", "augment", "curriculum",
       "max_train_samples")              # options that a table of `datasets` may hold
MADE = ("synthetic:", "reasoning_gym:")  # data that is made, from dataset_options


@dataclass(frozen=True)
class Source:
    """One data set of a run. name: of its metrics, "" where it is the only one. config: the run's, with its own options."""

    name: str
    weight: float
    config: MLXGRPOConfig

    @property
    def levels(self):
        """dataset_options of each level of the curriculum; of the one level without."""
        options, plan = self.config.dataset_options, self.config.curriculum
        if not plan:
            return [options]
        return [options | (level if isinstance(level, dict) else {plan["option"]: level}) for level in plan["levels"]]


def sources_of(config):
    """[Source] of a configuration: one for each table of `datasets`, or the one that `dataset` names. Raises ConfigError."""
    if not config.datasets:
        return [Source("", 1.0, config)]
    sources = []
    for i, table in enumerate(config.datasets):
        where = f"datasets[{i}]"
        if not isinstance(table.get("dataset"), str):
            raise ConfigError(f"{where}: names no dataset; each table needs one, {{ dataset = \"my.jsonl\", weight = 1.0 }}")
        for key in table:
            if key not in (*OWN, "name", "weight"):
                raise ConfigError(f"{where}: {key!r} can't be set for one data set{nearest(key, OWN)}; there are name, "
                                  f"weight, {', '.join(OWN)}")
        weight, name = table.get("weight", 1.0), table.get("name", short_name(table["dataset"]))
        if type(weight) not in (int, float) or not 0 < weight < float("inf"):
            raise ConfigError(f"{where}: weight must be a number above 0, got {weight!r}")
        if not isinstance(name, str) or not name or name in [s.name for s in sources]:
            raise ConfigError(f"{where}: name must be a text of its own, got {name!r}; set name for one of them")
        own = {key: check_option(key, value, where) for key, value in table.items() if key in OWN}
        try:
            sources.append(Source(name, float(weight), replace(config, datasets=[], **own)))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return sources


def short_name(dataset):
    return dataset if dataset.startswith(MADE) else Path(dataset).stem


def check_data(config):
    """Contradictions between the options of the data. Raises ConfigError."""
    if config.watch and config.datasets and config.few_shot and isinstance(config.few_shot, int):
        raise ConfigError("few_shot draws the examples of watched rows from one data set, and datasets names several; name "
                          "a file of examples instead")
    for name in ("augment", "curriculum"):
        if config.watch and vars(config)[name]:
            raise ConfigError(f"watch trains on the rows as they come, so {name} has no place; remove one of them")
    if config.datasets:
        if config.dataset != MLXGRPOConfig.dataset:
            raise ConfigError("dataset and datasets are both set; name every data set in datasets, or remove it")
        sources_of(config)
        return
    if config.dataset_options and not config.dataset.startswith(MADE):
        raise ConfigError(f"dataset_options are for synthetic tasks and reasoning_gym, and dataset is {config.dataset!r}; "
                          "remove them, or use dataset = \"synthetic:chain\"")
    if isinstance(config.few_shot, str) and Path(config.few_shot).suffix not in (".jsonl", ".csv", ".parquet"):
        raise ConfigError("few_shot must be a number of examples or a .jsonl, .csv or .parquet file, got "
                          f"{config.few_shot!r}")
    for spec in config.augment:
        if ".py:" not in spec:
            raise ConfigError(f"augment: {spec!r} is not file.py:function")
    if config.curriculum:
        check_curriculum(config)


def check_curriculum(config):
    """The table `curriculum` of one data set. Raises ConfigError."""
    plan, known = config.curriculum, ("option", "levels", "raise_at", "window", "reward")
    levels, window = plan.get("levels"), plan.get("window", 20)
    tables = isinstance(levels, list) and all(isinstance(level, dict) for level in levels)
    unknown = [key for key in plan if key not in known]
    rules = [
        (unknown, f"{unknown and unknown[0]!r} is not one of {', '.join(known)}{nearest(unknown and unknown[0], known)}"),
        (not config.dataset.startswith(MADE), f"it needs data that is made, synthetic:<task> or reasoning_gym:<task>, and "
         f"dataset is {config.dataset!r}"),
        (not isinstance(levels, list) or len(levels) < 2, f"levels must list at least two values of option, got {levels!r}"),
        (not tables and not isinstance(plan.get("option"), str), "option must name the key of dataset_options that levels "
         f"are values of, got {plan.get('option')!r}"),
        (tables and "option" in plan, "levels are tables of dataset_options, so option has no use; remove it"),
        (type(plan.get("raise_at")) not in (int, float) or not isfinite(plan["raise_at"]),
         "raise_at must be the mean reward that the next level begins at, "
         f"got {plan.get('raise_at')!r}"),
        (type(window) is not int or window < 1, f"window must be a number of rollout batches from 1, got {window!r}"),
    ]
    for broken, message in rules:
        if broken:
            raise ConfigError(f"curriculum: {message}")
    names = [r.rpartition(":")[2].removesuffix("_reward_func") for r in config.rewards]
    if plan.get("reward", names[0]) not in names:
        raise ConfigError(f"curriculum: reward is {plan['reward']!r}, and the rewards are {', '.join(names)}; leave it out "
                          "for their weighted sum")
