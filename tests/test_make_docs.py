"""docs/configuration.md: written from the declarations, complete, and true where they can be asked."""

import re
import tomllib

import pytest
from conftest import ROOT
from mlx_grpo import LOADERS, LOSSES, OPTIONS, RECIPES, REWARDS, MLXGRPOConfig, make_docs, option_default

TEXT = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ROWS = {cells[0].strip("` "): [c.strip() for c in cells] for line in TEXT.splitlines() if line.startswith("| `")
        for cells in [re.split(r"(?<!\\)\|", line)[1:-1]]}


def test_the_page_is_what_the_declarations_say():
    assert make_docs.page() == TEXT, "run: python utils/make_docs.py"


def test_the_script_writes_the_page(tmp_path, capsys):
    assert make_docs.main(["-o", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == TEXT
    assert f"{len(OPTIONS)} options" in capsys.readouterr().out


def test_every_option_and_recipe_has_a_row_with_all_its_cells():
    assert ROWS.keys() == OPTIONS.keys() | RECIPES.keys()
    assert all(len(ROWS[name]) == 6 and ROWS[name][4] for name in OPTIONS)
    assert make_docs.SOURCES.keys() == RECIPES.keys()
    assert make_docs.TRY.keys() | make_docs.SECTIONS.keys() <= OPTIONS.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_default_on_the_page_can_be_written_into_a_file(name):
    shown = ROWS[name][2].strip("`")
    if name == "system_prompt":
        assert shown == '"Respond in the following format: ..."'         # its first line
    else:
        assert tomllib.loads(f"v = {shown}")["v"] == option_default(name)


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_of_a_recipe_on_the_page_are_those_it_makes(name):
    shown = tomllib.loads("\n".join(re.findall("`([^`]*)`", ROWS[name][1])))
    assert shown == RECIPES[name]
    config = MLXGRPOConfig(recipe=name)
    assert {option: vars(config)[option] for option in shown} == shown


def test_a_range_says_which_of_its_ends_are_inside():
    assert make_docs.allowed(OPTIONS["top_p"]) == "(0, 1]" and make_docs.allowed(OPTIONS["clip_eps"]) == "[0, 1]"
    assert make_docs.allowed(OPTIONS["num_generations"]) == "[2, ∞)" and make_docs.allowed(OPTIONS["run_name"]) == ""
    assert make_docs.allowed(OPTIONS["kl_in"]) == '`"loss"`, `"reward"`'


def test_what_a_registry_knows_is_listed():
    for name, known in (("loss_type", LOSSES), ("rewards", REWARDS), ("model_loader", LOADERS)):
        assert all(f'"{choice}"' in ROWS[name][3] for choice in known) and "file.py:name" in ROWS[name][3]
