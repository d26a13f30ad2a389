"""Every objective, every way to train and every optimizer lifts the demo, as the tables in docs/ say."""

import pytest
from conftest import ROOT

from benchmarks import fine_tuning, objectives
from benchmarks.demo_runs import run_demo, table_rows

named = lambda variants: [pytest.param(v, id=v.name) for v in variants]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return run_demo(objectives.VARIANTS[0], tmp_path_factory.mktemp("teacher"))["checkpoint"]


@pytest.mark.seeds
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", named(objectives.VARIANTS))
def test_every_objective_lifts_the_demo(tmp_path, variant, request):
    made = request.getfixturevalue("teacher") if "teacher_model" in variant.options else None
    found = objectives.run_variant(variant, tmp_path, made)
    assert found["before"] <= 0.10 and found["after"] >= 0.9
    assert found["length_after"] > found["length_before"] + 3          # it reasons now


@pytest.mark.seeds
@pytest.mark.timeout(900)
@pytest.mark.parametrize("variant", named(fine_tuning.KINDS + fine_tuning.OPTIMIZERS[:1] + fine_tuning.OPTIMIZERS[2:]))
def test_everything_that_can_be_trained_and_every_optimizer_lifts_the_demo(tmp_path, variant):
    found = fine_tuning.run_variant(variant, tmp_path)
    assert found["before"] <= 0.10 and found["after"] >= 0.9


@pytest.mark.parametrize("document, marker, variants", [
    (objectives.DOCUMENT, objectives.MARKER, objectives.VARIANTS),
    (fine_tuning.DOCUMENT, "kinds", fine_tuning.KINDS), (fine_tuning.DOCUMENT, "optimizers", fine_tuning.OPTIMIZERS)])
def test_the_tables_hold_a_row_for_each_run_in_order(document, marker, variants):
    assert list(table_rows(document, marker)) == [v.name for v in variants]


def test_what_is_measured_can_be_configured(tmp_path):
    """Every row's options are accepted together with the demo's, without a run."""
    from mlx_grpo import load_config

    for variant in objectives.VARIANTS + fine_tuning.KINDS + fine_tuning.OPTIMIZERS:
        config, _ = load_config(ROOT / "configs/demo.toml", variant.sets())
        recipe = variant.options.get("recipe", config.recipe)
        assert config.recipe == recipe and config.num_generations == 8
