import pytest
from conftest import small_recipe

from align import pace
from align.plan import make_plan
from align.show import show_plan


def plans_of(recipe, folder):
    return {planned.stage.name: planned for planned in make_plan(recipe, folder)}


def test_a_stage_that_was_made_here_is_expected_at_its_own_pace(tiny_base, data, finished, capsys):
    recipe = small_recipe(tiny_base, data)
    recipe.override("ppo.iterations=9")  # three times as many rounds
    plans = plans_of(recipe, finished)
    took = {name: plan.former.facts["seconds"] for name, plan in plans.items()}
    assert pace.expected_seconds(plans["ppo"], "float32") == pytest.approx(3 * took["ppo"])
    assert pace.expected_seconds(plans["evaluate"], "float32") == took["evaluate"]
    show_plan(recipe, list(plans.values()), finished)
    shown = capsys.readouterr().out
    minutes = (3 * took["ppo"] + took["evaluate"]) / 60
    assert f"2 of 5 stages would run; about {minutes:.1f} minutes at this machine's pace of the last time." in " ".join(shown.split())


def test_another_recipe_goes_at_the_pace_of_the_same_kind_of_stage(tiny_base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe(tiny_base, data)
    plans = plans_of(recipe, tmp_path / "never")
    assert {pace.expected_seconds(planned, "float32") for planned in plans.values()} == {None}
    show_plan(recipe, list(plans.values()), tmp_path / "never")
    assert "5 of 5 stages would run; time not known before such stages have run on this machine." in " ".join(
        capsys.readouterr().out.split()
    )
    for name, seconds in {"sft": 120.0, "ppo": 60.0, "evaluate": 30.0, "dpo": 9.9}.items():
        pace.remember(plans[name], "float32", seconds)
    other = small_recipe(tiny_base, data, name="other")
    for text in ("sft.epochs=4.0", "ppo.max_new_tokens=6", "ppo.epochs=6", "evaluate.best_of=4"):
        other.override(text)
    others = plans_of(other, tmp_path / "other")
    expected = {name: pace.expected_seconds(planned, "float32") for name, planned in others.items()}
    assert expected["sft"] == pytest.approx(120 * 4.0 / plans["sft"].stage.settings.epochs)
    assert expected["ppo"] == pytest.approx(60)  # half as long completions; six passes, sampled and scored, for two
    assert expected["evaluate"] == pytest.approx(60)  # four policies' answers, and four of one more
    assert expected["reward"] is expected["dpo"] is None  # one never made, one too short to tell
    assert pace.expected_seconds(others["sft"], "bfloat16") is None


def test_a_round_that_became_longer_is_expected_to_take_longer(tiny_base, data, finished):
    recipe = small_recipe(tiny_base, data)
    took = plans_of(recipe, finished)["ppo"].former.facts["seconds"]
    recipe.override("ppo.prompts_per_iteration=8")  # was 4
    assert pace.expected_seconds(plans_of(recipe, finished)["ppo"], "float32") == pytest.approx(2 * took)


def test_of_the_last_stages_of_a_kind_the_long_ones_count_most(tiny_base, data, tmp_path, monkeypatch):
    """A tenth of the work in a third of the time counts as a tenth; of seven stages the last five are remembered."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    recipe, short = small_recipe(tiny_base, data), small_recipe(tiny_base, data)
    whole = plans_of(recipe, tmp_path / "run")["sft"]
    short.override(f"sft.epochs={whole.stage.settings.epochs / 10}")
    for _ in range(3):
        pace.remember(whole, "float32", 900.0)
    for _ in range(3):
        pace.remember(whole, "float32", 300.0)
    pace.remember(plans_of(short, tmp_path / "run")["sft"], "float32", 100.0)
    assert pace.expected_seconds(whole, "float32") == pytest.approx((900 + 3 * 300 + 100) / 4.1)


@pytest.mark.parametrize("override", ["sft.lora=none", "ppo.estimator=rloo"])
def test_what_is_done_in_another_way_has_a_pace_of_its_own(override, tiny_base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    name = override.partition(".")[0]
    pace.remember(plans_of(small_recipe(tiny_base, data), tmp_path)[name], "float32", 100.0)
    other = small_recipe(tiny_base, data)
    other.override(override)
    assert pace.expected_seconds(plans_of(other, tmp_path)[name], "float32") is None
