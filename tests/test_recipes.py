"""Every recipe that ships can be planned; the ones that other tests don't cover are run, cut short."""

import runpy

import pytest

from align.artifact import Artifact
from align.cli import recipe_main
from align.files import shipped_file

RECIPES = sorted(shipped_file("recipes").glob("*.py"))


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.stem)
def test_it_plans(script, tmp_path, capsys):
    recipe = runpy.run_path(str(script))["recipe"]
    assert recipe_main(recipe, ["--plan", "--out", str(tmp_path / "run")]) == 0
    assert f"{len(recipe.stages)} of {len(recipe.stages)} stages would run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_constitutional_runs_to_the_end_on_a_tiny_budget(smollm2, tmp_path):
    recipe = runpy.run_path(str(shipped_file("recipes/constitutional.py")))["recipe"]
    few = {name: tmp_path / name for name in ("chat.jsonl", "preferences.jsonl")}
    for name, path in few.items():
        path.write_text("".join(shipped_file(f"datasets/{name}").read_text().splitlines(keepends=True)[:24]))
    for setting in (
        f"sft.data={few['chat.jsonl']}",
        f"judge.preferences={few['preferences.jsonl']}",
        "sft.epochs=0.5",
        "drafts.max_prompts=6",
        "drafts.max_new_tokens=48",
        "drafts.keep_cut=true",
        "revise.max_new_tokens=64",
        "revised.epochs=1",
        "sample.max_prompts=4",
        "sample.max_new_tokens=48",
        "sample.keep_cut=true",
        "label.audit_pairs=4",
        "judge.epochs=0.5",
        "evaluate.max_prompts=3",
        "evaluate.max_new_tokens=24",
    ):
        recipe.override(setting)
    folder = recipe.run(tmp_path / "run")
    label = Artifact.open(folder / "label", verify=True)
    assert label.facts["metrics"]["labelled"] > 0
    assert label.facts["checks"]["audit"]["accepted"] is False  # and it is said, though the recipe trusts the judge
    assert Artifact.open(folder / "revise").facts["metrics"]["kept"] > 0
    assert [row["name"] for row in Artifact.open(folder / "evaluate").facts["metrics"]["policies"]] == ["sft", "revised", "dpo"]
