"""Options: defaults, precedence, and that nothing mistaken gets through, with a message that says what to write."""

import json
import tomllib
from dataclasses import asdict

import pytest
from conftest import ROOT
from mlx_grpo import OPTIONS, OTHER_NAMES, ConfigError, MLXGRPOConfig, check_option, load_config

DEFAULTS = {  # the names and values that users of the public script rely on
    "model_name": "Qwen/Qwen2.5-1.5B-Instruct", "output_dir": "outputs", "learning_rate": 1e-6, "batch_size": 1,
    "gradient_accumulation_steps": 4, "num_epochs": 1, "max_train_samples": 0, "warmup_ratio": 0.1,
    "max_grad_norm": 0.1,
    "logging_steps": 1, "num_generations": 64, "max_prompt_length": 512, "max_completion_length": 1024,
    "max_new_tokens": 512, "temperature": 0.7, "clip_eps": 0.2, "kl_coeff": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "weight_decay": 0.0, "lr_scheduler_type": "cosine", "save_steps": 100, "eval_steps": 50, "eval_samples": 200,
    "eval_every_updates": 25, "eval_subset_size": 200, "eval_max_new_tokens": 128, "update_every": 10,
    "quantize_for_rollouts": False, "seed": 0, "log_jsonl": True, "loss_type": "grpo", "on_reward_error": "stop",
}
MORE = {"run_name", "use_compile", "max_steps", "dtype", "system_prompt", "chat_template_kwargs", "dataset",
        "dataset_config", "dataset_split", "shuffle", "eval_temperature", "rewards", "reward_weights",
        "max_reward_errors", "model_loader"}
SHIPPED = {  # the values that the documentation of each configuration promises
    "prod_lora": dict(fine_tune_type="lora", num_generations=16, max_tokens_per_microbatch=1024),
    "smoke_test": {}, "ultra_light": {}, "medium": {}, "demo": {}, "nanochat_test": {}, "nanochat_d32_test": {},
    "nanochat_d32_lora": dict(fine_tune_type="lora", lora_rank=16, kl_coeff=0.02, max_new_tokens=128),
    "prod": dict(learning_rate=1e-6, gradient_accumulation_steps=4, max_train_samples=2000, num_generations=16,
                 max_new_tokens=256, eval_max_new_tokens=256, max_grad_norm=0.1, save_steps=100, eval_steps=50,
                 eval_samples=200, eval_every_updates=25, eval_subset_size=100,
                 model_name="Qwen/Qwen2.5-1.5B-Instruct", dataset="openai/gsm8k"),
    "nanochat_grpo": dict(learning_rate=5e-6, num_generations=4, max_new_tokens=64, temperature=0.8, kl_coeff=0.01,
                          quantize_for_rollouts=True, num_epochs=3, max_grad_norm=1.0, max_train_samples=500,
                          warmup_ratio=0.05),
    "nanochat_d32": dict(learning_rate=3e-6, max_new_tokens=128, kl_coeff=0.02, quantize_for_rollouts=False,
                         num_epochs=2),
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """Tests run in an empty directory, without a configuration in the environment; nothing may be left in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)


def write(text, name="run.toml"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def refusal(*sets, file=None):
    """The message with which these settings are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, sets)
    message = str(caught.value)
    assert "\n" not in message
    return message


def wrong_values(name):
    """(what goes into TOML, a word that the message must hold) for each way in which an option can be wrong."""
    kind, rule = OPTIONS[name].type, OPTIONS[name].metadata
    text, number = '"x"', "3"
    wrong = {"str": [(number, "text"), ("true", "text"), ("[]", "text")],
             "int": [(text, "whole"), ("1.5", "whole"), ("true", "whole")],
             "float": [(text, "number"), ("true", "number"), ("nan", "finite"), ("inf", "finite")],
             "bool": [(text, "true or false"), ("1", "true or false")], "dict": [(text, "table"), ("[1]", "table")],
             "list[str]": [(text, "list"), ("[1]", "list")],
             "list[float]": [("1.0", "list"), ('["a"]', "list"), ("[true]", "list"), ("[nan]", "finite")],
             "int | list[int]": [(text, "whole"), ("1.5", "whole"), ("true", "whole")],
             "list[dict]": [("{a = 1}", "list"), ("[1]", "list")],
             "int | str": [("1.5", "whole"), ("true", "whole"), ("[1]", "whole")],
             "bool | str": [("2", "true, false"), ("1.5", "true, false")]}[kind]
    if rule["choices"]:
        wrong.append(('"x"' if "str" in kind else "1", "one of"))
    if rule["low"] is not None:
        wrong.append((str(rule["low"] - 1), "at least"))
    if rule["high"] is not None:
        wrong.append((str(rule["high"] + 1), "at most"))
    if rule["above"] is not None:
        wrong.append((str(rule["above"]), "above"))
    return wrong


# ---- names and defaults

def test_the_documented_names_have_the_documented_defaults():
    values = asdict(MLXGRPOConfig())
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS
    assert MORE <= values.keys()


def test_every_option_says_what_it_means():
    for name, option in OPTIONS.items():
        assert len(option.metadata["help"]) > 10, name


def test_every_default_keeps_its_own_rules():
    for name, value in asdict(MLXGRPOConfig()).items():
        assert check_option(name, value, "test") == value


@pytest.mark.parametrize("name", OPTIONS)
def test_a_typo_is_refused_with_the_right_name(name):
    for typo in {name[:2] + name[3:], name[0] + name[2:], name + "s", name.replace("_", "-")} - OPTIONS.keys():
        message = refusal(file=write(f'{typo} = 1\n'))
        assert message.startswith(f"run.toml: unknown option {typo!r}")
        assert f"did you mean {name!r}?" in message or f"it is called {name!r}" in message
    message = refusal(f"{name}x=1")
    assert message.startswith(f"--set {name}x=1: unknown option") and f"{name!r}" in message


@pytest.mark.parametrize("theirs, ours", [
    ("beta", "kl_coeff"), ("epsilon", "clip_eps"), ("epsilon_high", "clip_eps_high"), ("group_size", "num_generations"),
    ("num_train_epochs", "num_epochs"), ("per_device_train_batch_size", "batch_size"), ("reward_funcs", "rewards"),
    ("torch_dtype", "dtype"), ("model_name_or_path", "model_name"),   # TRL
    ("clip_ratio", "clip_eps"), ("clip_ratio_high", "clip_eps_high"), ("kl_loss_coef", "kl_coeff"),
    ("n", "num_generations"),
    ("total_epochs", "num_epochs"), ("max_response_length", "max_completion_length"), ("save_freq", "save_steps"),
    ("test_freq", "eval_steps"), ("loss_agg_mode", "loss_type"), ("grad_clip", "max_grad_norm"),        # verl
    ("actor_rollout_ref.actor.kl_loss_coef", "kl_coeff"), ("trainer.total_epochs", "num_epochs"),
    ("iters", "max_steps"), ("steps_per_report", "logging_steps"), ("steps_per_eval", "eval_steps"),
    ("model", "model_name"),
    ("save_every", "save_steps"), ("grpo_loss_type", "loss_type"), ("reward_functions", "rewards"),
    ("lr_schedule", "lr_scheduler_type"),
    ("max_seq_length", "max_prompt_length")])   # mlx-lm-lora
def test_the_names_of_other_trainers_are_answered_with_ours(theirs, ours):
    assert refusal(f"{theirs}=1") == f"--set {theirs}=1: unknown option {theirs!r}; here it is called {ours!r}"


def test_no_foreign_name_leads_nowhere():
    assert not OTHER_NAMES.keys() & OPTIONS.keys()
    assert {ours for ours in OTHER_NAMES.values()} <= OPTIONS.keys()


# ---- values

@pytest.mark.parametrize("name", OPTIONS)
def test_a_wrong_value_is_refused_in_a_file_and_on_the_command_line_and_from_python(name):
    for raw, word in wrong_values(name):
        message = refusal(file=write(f"{name} = {raw}\n"))
        assert message.startswith(f"run.toml: {name} must be ") and word in message
        assert str(next(iter(tomllib.loads(f"v = {raw}").values()))).strip("[]") in message       # the value is shown
        if OPTIONS[name].type != "str":                                    # there every text is a text
            assert refusal(f"{name}={raw}").startswith(f"--set {name}={raw}: {name} must be ")
        with pytest.raises(ConfigError, match=f"MLXGRPOConfig: {name} must be"):
            MLXGRPOConfig(**{name: tomllib.loads(f"v = {raw}")["v"]})


def test_a_whole_number_is_good_for_a_fractional_option_and_becomes_one():
    config, _ = load_config(write("learning_rate = 1\nreward_weights = [1, 2, 0, 0, 1]"), ["kl_coeff=2"])
    assert (config.learning_rate, config.kl_coeff) == (1.0, 2.0) and type(config.kl_coeff) is float
    assert all(type(w) is float for w in config.reward_weights)
    assert type(MLXGRPOConfig(learning_rate=1).learning_rate) is float


def test_numbers_beyond_all_bounds_are_refused_and_do_not_crash():
    for raw in ("1" + "0" * 400, "1e999", "-1e999"):
        assert "learning_rate must be" in refusal(f"learning_rate={raw}")
    assert "run.toml: not TOML" in refusal(file=write("learning_rate = " + "9" * 5000))


def test_a_near_choice_is_suggested():
    assert refusal("loss_type=dr-grpo").endswith("did you mean 'dr_grpo'?")
    assert refusal("quantize_for_rollouts=Auto").endswith("did you mean 'auto'?")
    assert refusal("use_compile=True").endswith("did you mean 'true'?")


@pytest.mark.parametrize("sets, words", [
    (["max_new_tokens=100", "max_completion_length=99"], ["100", "99", "lower the first or raise the second"]),
    (['rewards=["correctness", "int"]', "reward_weights=[1]"], ["1 values for 2 rewards"]),
    (["rewards=[]"], ["rewards is empty", "correctness"]),
    (['rewards=["int"]', "reward_weights=[0]"], ["every advantage would be 0"]),
    (["clip_eps_high=-0.5"], ["-0.5", "-1"]),
    (["dataset_options={length = 3}"], ["synthetic"]),
    (["model_name="], ["model_name is empty", "Qwen"]), (["run_name="], ["run_name is empty"]),
    (["run_name=../elsewhere"], ["output_dir"]), (["run_name=/tmp/elsewhere"], ["output_dir"]),
])
def test_contradictions_are_refused_with_a_way_out(sets, words):
    message = refusal(*sets)
    assert message.startswith("--set: ") and all(word in message for word in words)


def test_a_contradiction_names_both_its_sources():
    message = refusal("max_new_tokens=100", file=write("max_completion_length = 50"))
    assert message.startswith("--set and run.toml: max_new_tokens is 100 but max_completion_length is 50")


def test_python_users_get_the_same_rules():
    with pytest.raises(ConfigError, match="max_completion_length"):
        MLXGRPOConfig(max_new_tokens=2000)
    with pytest.raises(ConfigError, match="at least 2"):
        MLXGRPOConfig(num_generations=1)


# ---- sources

def test_a_set_beats_the_file_which_beats_the_default_and_each_is_named():
    config, sources = load_config(write("seed = 1\nbatch_size = 2"), ["seed=3", "num_epochs=4", "num_epochs=5"])
    assert (config.seed, config.batch_size, config.num_epochs, config.max_steps) == (3, 2, 5, 0)
    assert {n: sources[n] for n in ("seed", "batch_size", "num_epochs", "max_steps")} == {
        "seed": "--set", "batch_size": "run.toml", "num_epochs": "--set", "max_steps": "default"}
    assert sources.keys() == OPTIONS.keys()


def test_the_environment_names_the_file_where_the_command_line_does_not(monkeypatch):
    monkeypatch.setenv("MLX_GRPO_CONFIG", write("seed = 7", "env.toml"))
    assert load_config()[0].seed == 7
    assert load_config(write("batch_size = 2"))[0].seed == 0
    monkeypatch.setenv("MLX_GRPO_CONFIG", "missing.toml")
    message = refusal()
    assert message.startswith("missing.toml: can't read") and "$MLX_GRPO_CONFIG" in message


def test_options_may_stand_flat_or_in_a_table_but_not_in_both():
    assert load_config(write("[mlx_grpo]\nseed = 4"))[0].seed == 4
    message = refusal(file=write("batch_size = 2\n[mlx_grpo]\nseed = 4"))
    assert "'batch_size' stands outside the table [mlx_grpo]" in message
    assert "unknown option 'model'" in refusal(file=write('[model]\nname = "x"'))


@pytest.mark.parametrize("text, words", [("seed = ", "not TOML"), ("seed = 1\nseed = 2", "not TOML"),
                                         (None, "can't read"),
                                         ("seed = 1 # \udcff", "not TOML")])
def test_a_file_that_is_no_configuration_is_named(text, words, tmp_path):
    if text is not None:
        (tmp_path / "run.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refusal(file="run.toml").startswith("run.toml: ") and words in refusal(file="run.toml")


def test_a_directory_is_no_configuration(tmp_path):
    assert "can't read" in refusal(file=str(tmp_path))


@pytest.mark.parametrize("text, name, value", [
    ("system_prompt=", "system_prompt", ""), ("system_prompt=Say = this", "system_prompt", "Say = this"),
    ('system_prompt="two\\nlines"', "system_prompt", "two\nlines"), ("model_name=123", "model_name", "123"),
    ("shuffle=false", "shuffle", False), ("quantize_for_rollouts=auto", "quantize_for_rollouts", "auto"),
    ('rewards=["int"]', "rewards", ["int"]), ("chat_template_kwargs={enable_thinking = false}",
                                              "chat_template_kwargs", {"enable_thinking": False}),
    (" seed = 5", "seed", 5), ("learning_rate=1e-5", "learning_rate", 1e-5)])
def test_set_takes_toml_values_and_plain_texts(text, name, value):
    assert asdict(load_config(None, [text])[0])[name] == value


@pytest.mark.parametrize("text", ["seed", "=5", ""])
def test_a_set_without_key_and_value_is_refused(text):
    assert "expected key=value" in refusal(text)


def test_a_second_option_can_not_hide_in_a_value():
    assert "seed must be a whole number" in refusal("seed=1\nbatch_size=2")


# ---- the shipped files

def test_every_shipped_configuration_promises_something_here():
    assert {path.stem for path in (ROOT / "configs").glob("*.toml")} == SHIPPED.keys()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_loads_with_its_documented_values(name):
    path = ROOT / "configs" / f"{name}.toml"
    config, sources = load_config(path)
    values = asdict(config)
    assert {key: values[key] for key in SHIPPED[name]} == SHIPPED[name]
    assert str(path) in sources.values()
    assert json.dumps(values)                                           # as it is saved in the run directory


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_says_what_it_is_for_and_what_machine_it_needs(name):
    lines = (ROOT / "configs" / f"{name}.toml").read_text().splitlines()
    header = " ".join(lines[:next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert len(header) > 100
    assert " GB" in header or "any machine" in header
