"""
The files around the weights, as NVIDIA's savers write them: NeMo 2's context, Megatron-Bridge's run_config.yaml, NeMo
1's archive.

Options that have no meaning for the weights come from nemo_defaults.yaml; nothing holds a path of this machine.
"""

import json
import tarfile
from functools import cache
from pathlib import Path

from mlx_grpo.nemo_config_in import CLASS_DEFAULTS
from mlx_grpo.nemo_config_out import to_bridge, to_nemo1, to_nemo2
from mlx_grpo.nemo_fiddle import Config, write_graph
from mlx_grpo.nemo_hf import copy_tokenizer
from mlx_grpo.nemo_read import GENERATION, SIDECAR

# Arguments of a nemo2 config class that are passed, beyond those NVIDIA's importer passes, where its default is wrong.
CARRIED = (
    "kv_channels", "num_query_groups", "seq_length", "max_position_embeddings", "window_size", "cp_comm_type",
    "moe_aux_loss_coeff", "attention_dropout", "hidden_dropout", "rotary_percent", "seq_len_interpolation_factor",
    "vocab_size", "scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len", "generation_config")
FLOAT32 = {"_target_": "torch.float32", "_call_": False}


@cache
def defaults():
    """nemo_defaults.yaml. Callers must not change it."""
    import yaml
    return yaml.safe_load((Path(__file__).parent / "nemo_defaults.yaml").read_text())


def configuration(container, family, spec, tokenizer_length, has_generation_config):
    """The mapping that describes the model in a container: nemo2's `config`, bridge's `model`, or nemo1's
    model_config.yaml."""
    if container == "nemo2":
        part = defaults()["nemo2"]
        own = part["families"][family.name]
        template = {k: v for k, v in part["config"].items() if k not in own["remove"]} | own["set"]
        template["_target_"] = f"nemo.collections.llm.gpt.model.{family.nemo2[0]}.{family.nemo2[2]}"
        return to_nemo2(family, spec, template, tokenizer_length, has_generation_config)
    if container == "bridge":
        part = defaults()["bridge"]
        return to_bridge(family, spec, part["run_config"]["model"] | part["families"].get(family.name, {}))
    part = defaults()["nemo1"]
    own = part["families"].get(family.name, {"set": {}, "remove": []})
    template = {k: v for k, v in part["model_config"].items() if k not in own["remove"]} | own["set"]
    return to_nemo1(family, spec, template)


def dump_yaml(value, path):
    """Write a mapping as YAML; keys sorted as NVIDIA's files have them (model_config.yaml is in its own order)."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data):       # a value used twice is written twice, as NVIDIA's files have it
            return True
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.dump(value, Dumper=Dumper, sort_keys=path.name != "model_config.yaml", allow_unicode=True))


def dump_json(value, path):
    """Write JSON as Hugging Face's libraries do, so that an unchanged file comes back byte for byte."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---- NeMo 2 ----

def write_nemo2(directory, family, config, source):
    """context/ of a NeMo 2 checkpoint. source: its config.json (hf_config), generation_config and tokenizer folder."""
    context = directory / "context"
    module, model_class, _ = family.nemo2
    model = defaults()["nemo2"]["model"] | {"_target_": f"nemo.collections.llm.gpt.model.{module}.{model_class}"}
    if family.name != "llama":
        del model["model_context_managers"]                  # a field of NeMo's LlamaModel alone
    dump_yaml(model | {"config": config}, context / "model.yaml")
    (context / "io.json").write_text(json.dumps(context_graph(family, config)))
    copy_tokenizer(source.tokenizer, context / "nemo_tokenizer")
    dump_json(source.hf_config, context / SIDECAR)
    if source.generation_config is not None:
        dump_json(source.generation_config, context / "artifacts" / "generation_config.json")


def passed_arguments(family, config):
    """The config's entries that io.json passes: those of NVIDIA's importer, and the carried ones that differ from the
    class."""
    part = defaults()["nemo2"]
    own = part["families"][family.name]
    names = [name for name in own["arguments"] if name in config]
    assumed = CLASS_DEFAULTS[None] | {"hidden_dropout": 0.0} | CLASS_DEFAULTS.get(family.name, {})
    names += [name for name in CARRIED if name not in names and config.get(name) != assumed.get(name)]
    return {name: config[name] for name in names if name != "generation_config" or config[name] is not None}


def context_graph(family, config):
    """io.json: the fiddle graph that NeMo loads, in the form its own saver gives it."""
    part = defaults()["nemo2"]
    optim = part["model"]["optim"]["config"]
    optimizer = {name: FLOAT32 if name.endswith("_dtype") else optim[name] for name in part["optimizer_arguments"]}
    module = f"nemo.collections.llm.gpt.model.{family.nemo2[0]}"
    root = Config("nemo.lightning.io.pl.TrainerContext", {
        "model": Config(f"{module}.{family.nemo2[1]}", {
            "config": Config(config["_target_"], passed_arguments(family, config)),
            "optim": Config("nemo.lightning.pytorch.optim.megatron.MegatronOptimizerModule", {
                "config": Config("megatron.core.optimizer.optimizer_config.OptimizerConfig", optimizer)}),
            "tokenizer": Config("nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
                                {"pretrained_model_name": "nemo_tokenizer"})}),
        "trainer": Config("nemo.lightning.pytorch.trainer.Trainer", {
            "accelerator": "cpu",
            "strategy": Config("nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy", {
                "ckpt_save_optimizer": False, "kwargs": {"always_save_context": True}}),
            "devices": 1}),
        "extra": {}})
    return write_graph(root)


def progress(*keys):
    """One of Lightning's counters, at zero."""
    return {"total": dict.fromkeys(keys, 0), "current": dict.fromkeys(keys, 0)}


def lightning_state():
    """common.pt of NeMo 2: what Lightning 2.4 saves before a first step."""
    import torch
    batch = progress("ready", "completed", "started", "processed")
    loop = {"state_dict": {}, "batch_progress": batch | {"is_last_batch": False}}
    fit = {"state_dict": {}, "epoch_loop.state_dict": {"_batches_that_stepped": 0},
           "epoch_loop.batch_progress": batch | {"is_last_batch": False},
           "epoch_loop.scheduler_progress": progress("ready", "completed"),
           "epoch_loop.automatic_optimization.state_dict": {},
           "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {
               "step": progress("ready", "completed"), "zero_grad": progress("ready", "completed", "started")}},
           "epoch_loop.manual_optimization.state_dict": {},
           "epoch_loop.manual_optimization.optim_step_progress": progress("ready", "completed"),
           "epoch_loop.val_loop.state_dict": {}, "epoch_loop.val_loop.batch_progress": batch | {"is_last_batch": False},
           "epoch_progress": progress("ready", "completed", "started", "processed")}
    callback = ("ModelCheckpoint{'monitor': None, 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, "
                "'train_time_interval': None}")
    return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0", "state_dict": {},
            "loops": {"fit_loop": fit, "validate_loop": loop, "test_loop": loop,
                      "predict_loop": loop | {"batch_progress": batch}},
            "callbacks": {callback: {
                "monitor": None, "best_model_score": None, "best_model_path": "", "current_score": None,
                "dirpath": None,
                "best_k_models": {}, "kth_best_model_path": "", "kth_value": torch.tensor(float("inf")),
                "last_model_path": ""}},
            "optimizer_states": {}, "lr_schedulers": [],
            "content_metadata": {"distrib_optim_sharding_type": "fully_sharded_model_space"}}


# ---- Megatron-Bridge ----

def bridge_state():
    """common.pt of a bridge import."""
    return {"checkpoint_version": 3.0, "iteration": 0,
            "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}}


def write_bridge(directory, model, source, name):
    """run_config.yaml, tokenizer and train state around directory/iter_0000000. name: of the checkpoint, for its own
    config."""
    import torch
    iteration = directory / "iter_0000000"
    config = dict(defaults()["bridge"]["run_config"])
    config |= {"model": model | {"hf_model_id": source.name},
               "checkpoint": config["checkpoint"] | {"save": name},
               "tokenizer": config["tokenizer"] | {"tokenizer_model": source.name}}
    dump_yaml(config, iteration / "run_config.yaml")
    copy_tokenizer(source.tokenizer, iteration / "tokenizer")
    state = {key: torch.tensor(0, dtype=torch.int32) for key in
             ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")}
    state["floating_point_operations_so_far"] = torch.tensor(0.0)
    state |= {key: torch.tensor(False) for key in ("do_train", "do_valid", "do_test")}
    for path in (iteration / "train_state.pt", directory / "latest_train_state.pt"):
        torch.save(state, path)
    (directory / "latest_checkpointed_iteration.txt").write_text("0")
    dump_json(source.hf_config, iteration / SIDECAR)
    if source.generation_config is not None:
        dump_json(source.generation_config, iteration / GENERATION)


# ---- NeMo 1 ----

def write_nemo1(content, config, source):
    """The files of a .nemo archive beside content/model_weights. Ours has the tokenizer too, which NeMo keeps by name
    only."""
    tokenizer = {"library": "huggingface", "type": source.name, "use_fast": True}
    dump_yaml(config | {"tokenizer": tokenizer}, content / "model_config.yaml")
    copy_tokenizer(source.tokenizer, content / "tokenizer")
    dump_json(source.hf_config, content / SIDECAR)
    if source.generation_config is not None:
        dump_json(source.generation_config, content / GENERATION)


def pack(content, archive, done):
    """Write the directory `content` as the tar `archive`: ./ names, plain files, no owner, no time. done(bytes) after
    each file."""
    def member(path, name, size):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.type = size, 0o644, tarfile.REGTYPE
        if path.is_dir():
            info.mode, info.type = 0o755, tarfile.DIRTYPE
        info.uname = info.gname = "root"
        return info
    with open(archive, "wb") as out, tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member(content, ".", 0))
        for path in sorted(content.rglob("*"), key=lambda p: (len(p.relative_to(content).parts) > 1, str(p))):
            name = f"./{path.relative_to(content)}"
            if path.is_dir():
                tar.addfile(member(path, name, 0))
                continue
            with open(path, "rb") as file:
                tar.addfile(member(path, name, path.stat().st_size), file)
            done(path.stat().st_size)
