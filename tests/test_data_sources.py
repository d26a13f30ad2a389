"""Mixtures, curricula, few-shot examples and augmentation: what each draws, and that a resumed run draws the same."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT
from test_checkpoints import logged
from test_trainer import CONFIG, largest_difference, make_trainer, weights

from mlx_grpo import (ConfigError, MLXGRPOConfig, PromptStream, SFTTrainer, UserError, as_problems, load_config, load_model,
                      load_problems, main, prompt_order, render_prompt)

ROWS = [{"question": f"{i}+{i}", "answer": str(2 * i), "demo": f"<answer>{2 * i}</answer>"} for i in range(30)]
MIXED = replace(CONFIG, dataset=MLXGRPOConfig.dataset, datasets=[
    {"dataset": "synthetic:chain", "weight": 3.0, "dataset_options": {"length": 3}},
    {"dataset": "synthetic:reverse", "name": "words", "max_train_samples": 8}])
RISING = replace(CONFIG, curriculum={"option": "length", "levels": [2, 3, 4], "raise_at": 0.5, "window": 2})
AUG = """
def spaced(row, rng):
    return row | {"question": row["question"] + " " * rng.randint(0, 99)}
def cheat(row, rng):
    return row | {"answer": "1"}
def nothing(row, rng):
    row["question"] = "changed in place"
def broken(row, rng):
    return 1 / 0
def longer(row, rng):
    return row | {"question": row["question"] * 100}
"""


@pytest.fixture
def aug(tmp_path):
    (tmp_path / "my_aug.py").write_text(AUG)
    return str(tmp_path / "my_aug.py")


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return replace(CONFIG, dataset=str(tmp_path / "rows.jsonl"), eval_samples=5)


def stream(config):
    return PromptStream(load_problems(config)[0], config)


def questions(problems):
    return [p.columns["question"] for p in problems]


# ---- several data sets

def test_each_data_set_gets_its_share_of_the_prompts_and_visits_every_row_each_epoch():
    drawn = stream(MIXED).take(0, 2000, {})
    count = Counter(p.source for p in drawn)
    assert abs(count["synthetic:chain"] / 2000 - 0.75) < 0.05                           # 3 of 4; sigma 0.01
    words = [p for p in drawn if p.source == "words"]
    for epoch in range(4):
        assert len({p.prompt[-1]["content"] for p in words[8 * epoch:8 * epoch + 8]}) == 8
    assert all(p.columns["data_source"] == p.source for p in drawn)


def test_a_position_gives_the_same_prompt_however_it_is_reached():
    whole, again = stream(MIXED).take(0, 9000, {}), stream(MIXED)                       # beyond two blocks of choices
    assert again.take(8990, 10, {}) == whole[8990:] and again.take(5, 3, {}) == whole[5:8]
    other = PromptStream(load_problems(MIXED)[0], replace(MIXED, seed=1))
    assert [p.source for p in other.take(0, 99, {})] != [p.source for p in whole[:99]]


def test_one_data_set_is_visited_as_it_always_was():
    problems = load_problems(CONFIG)[0]
    order = prompt_order(0, 40, len(problems), CONFIG.seed, True)
    assert PromptStream(problems, CONFIG).take(0, 40, {}) == [problems[i] for i in order]


def test_no_data_set_holds_out_what_another_trains_on(tmp_path):
    for name, part in (("a", ROWS[:20]), ("b", ROWS[10:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = replace(MIXED, eval_samples=12, eval_fraction=0.4,
                     datasets=[{"dataset": str(tmp_path / "a.jsonl")}, {"dataset": str(tmp_path / "b.jsonl")}])
    train, held_out = load_problems(config)
    assert {p.source for p in held_out} == {"a", "b"} and not set(questions(train)) & set(questions(held_out))


def test_metrics_tell_the_data_sets_apart(tmp_path):
    trainer = make_trainer(tmp_path, replace(MIXED, eval_samples=6, eval_steps=1, max_steps=1))
    metrics = trainer.train()
    here = {p for p in ("synthetic:chain", "words") if f"prompts/{p}" in metrics}
    assert sum(metrics[f"prompts/{name}"] for name in here) == CONFIG.prompts_per_step
    mean = sum(metrics[f"prompts/{name}"] * metrics[f"reward/{name}"] for name in here) / CONFIG.prompts_per_step
    assert mean == pytest.approx(metrics["reward"])
    assert {"eval/exact_match/synthetic:chain", "eval/exact_match/words"} <= metrics.keys()


@pytest.mark.parametrize("tables, message", [
    ([{"weight": 1.0}], "datasets[0]: names no dataset"),
    ([{"dataset": "a.jsonl"}, {"dataset": "x/a.jsonl"}], "datasets[1]: name must be a text of its own, got 'a'"),
    ([{"dataset": "a.jsonl", "weight": 0}], "datasets[0]: weight must be a number above 0, got 0"),
    ([{"dataset": "a.jsonl", "prompt_colum": "q"}], "did you mean 'prompt_column'"),
    ([{"dataset": "a.jsonl", "few_shot": 1.5}], "datasets[0]: few_shot must be a whole number or a text, got 1.5"),
    ([{"dataset": "a.jsonl", "dataset_options": {"length": 3}}], "datasets[0]: dataset_options are for synthetic tasks")])
def test_mistakes_in_datasets_are_named_by_table(tables, message):
    with pytest.raises(ConfigError) as caught:
        replace(MIXED, datasets=tables)
    assert message in str(caught.value)


def test_dataset_beside_datasets_is_refused():
    with pytest.raises(ConfigError, match="dataset and datasets are both set"):
        replace(MIXED, dataset="a.jsonl")


# ---- curriculum

def advance(prompts, state, *rewards):
    """The state after rollout batches with these mean rewards."""
    for reward in rewards:
        prompts.seen = {"": [reward]}
        state, _ = prompts.advanced(state)
    return state


def test_a_level_is_raised_when_the_mean_over_the_window_reaches_the_mark_and_never_beyond_the_last():
    prompts = stream(RISING)
    state = advance(prompts, {}, 0.9)                                     # the window is not full
    assert state[""]["level"] == 0
    assert advance(prompts, state, 0.05)[""]["level"] == 0                # (0.9 + 0.05) / 2 < 0.5
    state = advance(prompts, state, 0.1)                                  # (0.9 + 0.1) / 2 = 0.5
    assert state[""] == {"level": 1, "recent": []}
    state = advance(prompts, state, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert state[""]["level"] == 2 and len(state[""]["recent"]) == 2


def test_each_level_draws_its_own_rows_and_the_held_out_ones_are_of_all_levels():
    config = replace(RISING, eval_samples=9)
    train, held_out = load_problems(config)
    prompts = PromptStream(train, config)
    for level, length in enumerate((2, 3, 4)):
        drawn = prompts.take(0, 50, {"": {"level": level, "recent": []}})
        assert {q.count("*") + q.count("+") for q in questions(drawn)} == {length}
        assert {p.columns["curriculum_level"] for p in drawn} == {level}
    assert Counter(p.level for p in held_out) == {0: 3, 1: 3, 2: 3}


def test_the_reward_that_is_watched_can_be_one_function(tmp_path):
    for reward, level in (("correctness", 0), ("strict_format", 1)):       # the demo model keeps the form and is seldom right
        plan = {"option": "length", "levels": [5, 6], "raise_at": 0.3, "window": 1, "reward": reward}
        trainer = make_trainer(tmp_path, replace(CONFIG, curriculum=plan))
        trainer.step()
        seen = trainer.window_metrics[f"rewards/{reward}/mean"]
        assert trainer.curriculum[""]["level"] == int(seen >= 0.3) == level


def test_a_batch_that_is_left_out_does_not_count_for_the_curriculum(tmp_path):
    trainer = make_trainer(tmp_path, replace(RISING, max_bad_steps=1))
    check = trainer.check_health
    trainer.check_health = lambda loss, metrics: (setattr(trainer, "check_health", check), fail())
    trainer.step()
    assert trainer.bad_steps == 1 and len(trainer.curriculum[""]["recent"]) == 1


def fail():
    from mlx_grpo import NotFinite

    raise NotFinite("planted")


def test_levels_may_be_tables_of_options():
    levels = [{"length": 2}, {"length": 4, "modulus": 7}]
    config = replace(CONFIG, curriculum={"levels": levels, "raise_at": 1})
    drawn = stream(config).take(0, 20, {"": {"level": 1, "recent": []}})
    assert {p.columns["modulus"] for p in drawn} == {7}


def test_sft_visits_all_levels(tmp_path):
    config = replace(RISING, solution_column="solution")
    model, tokenizer = load_model(config.model_name)
    trainer = SFTTrainer(model, tokenizer, config, load_problems(config)[0], run_dir=tmp_path)
    assert {p.level for p in trainer.next_problems(60)} == {0, 1, 2}


@pytest.mark.parametrize("change, message", [
    ({"levels": [2]}, "at least two"), ({"raise_at": "high"}, "raise_at"), ({"window": 0}, "window"), ({"option": 3}, "option"),
    ({"reward": "speed"}, "reward is 'speed', and the rewards are correctness"), ({"level": [1]}, "did you mean 'levels'")])
def test_mistakes_in_a_curriculum_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(RISING, curriculum=RISING.curriculum | change)
    with pytest.raises(ConfigError, match="needs data that is made"):
        replace(RISING, dataset="a.jsonl")


# ---- few-shot

def test_examples_are_turns_of_the_chat_before_the_question_and_never_the_row_itself(rows):
    for part in load_problems(replace(rows, few_shot=3, system_prompt="Add.", solution_column="demo")):
        for p in part:
            roles = [m["role"] for m in p.prompt]
            assert roles == ["system", *["user", "assistant"] * 3, "user"]
            shown = [m["content"] for m in p.prompt[1:-1:2]]
            assert len(set(shown)) == 3 and p.columns["question"] not in shown
            assert all(p.prompt[i + 1]["content"] == f"<answer>{2 * int(q.partition('+')[0])}</answer>"
                       for i, q in zip(range(1, 7, 2), shown))


def test_held_out_problems_are_shown_training_rows_only(rows):
    train, held_out = load_problems(replace(rows, few_shot=2))
    shown = {m["content"] for p in train + held_out for m in p.prompt[:-1] if m["role"] == "user"}
    assert shown <= set(questions(train)) and not shown & set(questions(held_out))


def test_examples_of_text_prompts_are_text(rows):
    problem = load_problems(replace(rows, few_shot=1, prompt_format="text", system_prompt="Add."))[0][0]
    (question, answer), = problem.examples
    assert problem.prompt == f"Add.\n\n{question}\n{answer}\n\n{problem.columns['question']}"


def test_examples_follow_from_the_seed_and_differ_by_row(rows):
    draw = lambda **options: [p.examples for p in load_problems(replace(rows, few_shot=2, shuffle=False, **options))[0]]
    assert draw() == draw() and len(set(draw())) > 10
    assert draw(eval_samples=0) != draw(eval_samples=0, seed=1)


def test_a_file_of_examples_is_shown_whole_but_for_the_row_itself(rows, tmp_path):
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    for p in load_problems(replace(rows, few_shot=str(tmp_path / "shots.jsonl")))[0]:
        own = p.columns["question"]
        assert [q for q, _ in p.examples] == [r["question"] for r in ROWS[:3] if r["question"] != own]


def test_rows_given_from_python_get_examples_too(rows):
    config = replace(rows, few_shot=2)
    train = as_problems(ROWS[:10], config)
    assert all(len(p.examples) == 2 for p in train + as_problems(ROWS[10:12], config, train))
    assert as_problems(train, config) == train


def test_more_examples_than_rows_and_rows_without_answers_are_refused(rows):
    with pytest.raises(UserError, match="few_shot is 30.* has 30 different training questions"):
        load_problems(replace(rows, few_shot=30, eval_samples=0))
    with pytest.raises(UserError, match="neither a demonstration nor a gold answer"):
        load_problems(replace(rows, few_shot=1, answer_column=""))
    with pytest.raises(ConfigError, match="few_shot must be a number of examples or a .jsonl"):
        replace(rows, few_shot="three")


# ---- augment

def test_augmentation_is_seeded_by_row_and_epoch(rows, aug):
    config = replace(rows, augment=[f"{aug}:spaced"], eval_samples=0)
    n = len(ROWS)
    first, again = (stream(config).take(0, 2 * n, {}) for _ in range(2))
    assert first == again
    by_epoch = [{p.columns["question"].strip(): p.columns["question"] for p in part} for part in (first[:n], first[n:])]
    assert by_epoch[0].keys() == by_epoch[1].keys() and by_epoch[0] != by_epoch[1]
    assert all(p.prompt[-1]["content"] == p.columns["question"] for p in first)
    assert stream(config).take(n + 3, 1, {}) == first[n + 3:n + 4]                     # whatever was drawn before
    assert all(p.columns["question"] in {r["question"] for r in ROWS} for p in load_problems(config)[0])


def test_augmentation_keeps_the_examples(rows, aug):
    for p in stream(replace(rows, augment=[f"{aug}:spaced"], few_shot=2)).take(0, 5, {}):
        assert len(p.examples) == 2 and len(p.prompt) == 5


@pytest.mark.parametrize("name, message", [
    ("cheat", "changed 'answer' from '.*' to '1' .* gold answer must stay"), ("nothing", "must return the row"),
    ("broken", "raised ZeroDivisionError: division by zero"), ("nowhere", "defines no 'nowhere'")])
def test_what_augmentation_does_wrong_is_named(rows, aug, name, message):
    with pytest.raises(UserError, match=message):
        stream(replace(rows, augment=[f"{aug}:{name}"])).take(0, 3, {})


def test_a_prompt_that_augmentation_makes_too_long_stays_as_it_was_and_that_is_told(rows, aug, tmp_path, capsys):
    config = replace(rows, augment=[f"{aug}:longer"], max_prompt_length=40, eval_samples=0)
    trainer = make_trainer(tmp_path, config)
    drawn = trainer.next_problems(2)
    assert all(len(render_prompt(trainer.tokenizer, p, config)) <= 40 for p in drawn)
    assert "longer than max_prompt_length (40 tokens), so it stays as it was" in capsys.readouterr().err


# ---- resume

@pytest.mark.parametrize("config", [
    MIXED, replace(RISING, max_train_samples=8, curriculum=RISING.curriculum | {"raise_at": 0.0}),
    replace(MIXED, datasets=[MIXED.datasets[0] | {"curriculum": RISING.curriculum | {"raise_at": 0.0}}, MIXED.datasets[1]]),
    "augment"], ids=["mixture", "curriculum", "curriculum in a mixture", "augment"])
def test_a_resumed_run_is_byte_for_byte_the_run_that_went_on(tmp_path, aug, config):
    if config == "augment":
        config = replace(CONFIG, augment=[f"{aug}:spaced"], max_train_samples=5, few_shot=1)     # beyond one epoch
    config = replace(config, log_jsonl=True, max_steps=5, save_steps=3, learning_rate=1e-3)
    whole = make_trainer(tmp_path / "whole", config)
    whole.train()
    broken = make_trainer(tmp_path / "broken", config)
    step = broken.step
    broken.step = lambda: step() if broken.step_count < 4 else (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken", config)
    resumed.load_checkpoint(tmp_path / "broken/checkpoint-3")
    resumed.train()
    assert largest_difference(weights(whole), weights(resumed)) == 0
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken") and whole.curriculum == resumed.curriculum
    if config.curriculum:
        assert [m["curriculum_level"] for m in logged(tmp_path / "whole")[0]] == [0, 0, 1, 1, 2]     # step 3 leaves half a window


def test_a_changed_mixture_is_not_the_same_run(tmp_path):
    trainer = make_trainer(tmp_path, MIXED)
    trainer.save_checkpoint(tmp_path / "checkpoint-0")
    other = make_trainer(tmp_path, replace(MIXED, datasets=[MIXED.datasets[0] | {"weight": 1.0}, MIXED.datasets[1]]))
    with pytest.raises(ConfigError, match="datasets was"):
        other.load_checkpoint(tmp_path / "checkpoint-0")


# ---- preview

def preview(capsys, *words):
    assert main(["preview", "--config", str(ROOT / "configs/demo.toml"), *words]) == 0
    return capsys.readouterr().out


def test_the_preview_shows_the_first_prompts_of_the_run_with_their_special_tokens(capsys):
    shown = preview(capsys, "-n", "2", "--set", "few_shot=1")
    config, _ = load_config(ROOT / "configs/demo.toml", ["few_shot=1"])
    problems, (_, tokenizer) = stream(config).take(0, 2, {}), load_model(config.model_name)
    for i, p in enumerate(problems):
        assert f"prompt {i + 1} | {len(render_prompt(tokenizer, p, config))} tokens | 1 examples" in shown
        assert f"⟦<|user_start|>⟧{p.columns['question']}⟦<|user_end|>⟧⟦<|assistant_start|>⟧" in shown
    assert "2000 training prompts of" in shown and "200 held out" in shown


def test_a_special_token_that_is_typed_is_not_shown_as_one(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "a <|bos|> b", "answer": "1"}) + "\n")
    shown = preview(capsys, "--set", f"dataset={tmp_path / 'a.jsonl'}", "--set", "eval_samples=0", "--set", "max_steps=1")
    assert "⟦<|bos|>⟧⟦<|user_start|>⟧a <|bos|> b⟦<|user_end|>⟧" in shown
