import json
import re

import pytest
from conftest import read_records, write_rows
from judge.faulty_server import MODEL, FaultyServer, knows_the_truth, ok

from align import AlignError, Recipe
from align.artifact import publish
from align.judge.pairs import draw_pairs

PROMPTS = [f"question {n}" for n in range(30)]


def message(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_base):
    """Completions of which one holds GOOD and one holds BAD, as an artifact from elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "work").mkdir()
    rows = [{"prompt": message("user", p), "completions": [{"text": f"{p}: a GOOD answer"}, {"text": f"{p}: a BAD one"}]} for p in PROMPTS]
    write_rows(folder / "work/completions.jsonl", rows)
    facts = {"format": 1, "kind": "completions", "name": "sample", "identity": "0" * 64, "parents": {}, "base": {}}
    publish(folder / "work", folder / "sample", {**facts, "settings": {}, "model": {"form": "none"}, "metrics": {}, "seconds": 1.0})
    return folder / "sample"


@pytest.fixture(scope="module")
def gold(tmp_path_factory):
    """People's preferences for GOOD, of which the longer side is chosen half of the time."""
    rows = [
        {
            "prompt": message("user", f"gold {n}"),
            "chosen": message("assistant", "GOOD"),
            "rejected": message("assistant", "BAD" + ".." * (n % 2)),
        }
        for n in range(60)
    ]
    return write_rows(tmp_path_factory.mktemp("gold") / "gold.jsonl", rows)


def labelling(tiny_base, sampled, judge, gold, **settings):
    recipe = Recipe("labelling", base=str(tiny_base), dtype="float32")
    labels = recipe.label(completions=recipe.load(sampled), judge=judge, gold=gold, audit_pairs=40, **settings)
    return recipe, labels


def always_first(asked):
    return {"A": 0.9, "B": 0.1}


def test_a_judge_that_knows_the_truth_labels_everything_right_in_both_orders(tiny_base, sampled, gold, tmp_path):
    with FaultyServer() as server:
        recipe, labels = labelling(tiny_base, sampled, f"{server.url}#{MODEL}", gold)
        recipe.reward(policy=recipe.base, preferences=labels, holdout=0.2)
        folder = recipe.run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "label/preferences.jsonl").read_text().splitlines()]
    assert len(rows) == len(PROMPTS)
    for row in rows:
        assert "GOOD" in row["chosen"][0]["content"]
        assert "BAD" in row["rejected"][0]["content"]
        assert row["chosen_probability"] == pytest.approx(0.9)
        right = "a" if row["judgement"]["a_is"] == "chosen" else "b"
        assert [order["verdict"] for order in row["judgement"]["orders"]] == [right, right]
    read = read_records(folder / "label/preferences.jsonl", "preference")
    assert [(r["chosen"], r["chosen_probability"]) for r in read] == [(row["chosen"], row["chosen_probability"]) for row in rows]
    facts = json.loads((folder / "label/artifact.json").read_text())
    assert facts["checks"]["audit"]["accepted"] is True
    assert facts["metrics"]["orders_agree"] == 1.0
    assert json.loads((folder / "reward/artifact.json").read_text())["data"]["preferences"]["rows"] == len(rows)


def test_a_judge_that_always_says_first_is_refused_and_labels_nothing(tiny_base, sampled, gold, tmp_path):
    with FaultyServer(afterwards=ok(always_first)) as server:
        judge = f"{server.url}#{MODEL}"
        with pytest.raises(AlignError, match=r"(?s)label: the judge is refused: right on .*--set label.trust_judge=true"):
            labelling(tiny_base, sampled, judge, gold)[0].run(tmp_path / "run")
        assert (tmp_path / "run/label-audit/audit.html").is_file()
        with pytest.raises(AlignError, match=r"decided none of 30 pairs \(30 flipped with the order, 0 were too close\)"):
            labelling(tiny_base, sampled, judge, gold, trust_judge=True)[0].run(tmp_path / "run")


def test_what_a_judge_doubts_is_left_out_or_kept_at_its_probability(tiny_base, sampled, gold, tmp_path):
    def sure_of_some(asked):
        """Says first to every third question, and knows the truth of the others."""
        number = re.search(r"question (\d+):", asked)
        return always_first(asked) if number and int(number[1]) % 3 == 0 else knows_the_truth(asked)

    with FaultyServer(afterwards=ok(sure_of_some)) as server:
        judge = f"{server.url}#{MODEL}"
        dropped = labelling(tiny_base, sampled, judge, gold)[0].run(tmp_path / "drop")
        kept = labelling(tiny_base, sampled, judge, gold, undecided="keep")[0].run(tmp_path / "keep")
        hard = labelling(tiny_base, sampled, judge, gold, hard_labels=True)[0].run(tmp_path / "hard")
    rows = {
        folder.name: [json.loads(line) for line in (folder / "label/preferences.jsonl").read_text().splitlines()]
        for folder in (dropped, kept, hard)
    }
    assert len(rows["drop"]) == 20
    assert len(rows["keep"]) == 30
    assert sorted({round(row["chosen_probability"], 3) for row in rows["keep"]}) == [0.5, 0.9]
    assert {row["chosen_probability"] for row in rows["hard"]} == {1.0}
    undecided = [json.loads(line) for line in (dropped / "label/undecided.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in undecided} == {"flipped"}
    assert len(undecided) == 10


def test_labelling_again_asks_nothing_and_a_budget_stops_cleanly(tiny_base, sampled, gold, tmp_path):
    with FaultyServer() as server:
        judge = f"{server.url}#{MODEL}"
        recipe = Recipe("labelling", base=str(tiny_base), dtype="float32")
        recipe.label(completions=recipe.load(sampled), judge=judge, audit_pairs=0, max_requests=20)
        folder = recipe.run(tmp_path / "run")
        assert len(server.requests) == 20
        metrics = json.loads((folder / "label/artifact.json").read_text())["metrics"]
        assert metrics["judged"] == metrics["labelled"] == 10
        recipe.override("label.max_requests=null")
        recipe.run(tmp_path / "run")
        assert len(server.requests) == 60
        recipe.override("label.abstain=0.1")
        recipe.run(tmp_path / "run")
        assert len(server.requests) == 60  # another setting, the same questions


def test_pairs_are_drawn_by_the_prompt_alone():
    rows = [{"prompt": message("user", p), "completions": [{"text": t} for t in "abcd"]} for p in PROMPTS]
    all_pairs = draw_pairs(rows, 2, seed=0)
    assert draw_pairs(rows[5:7], 2, seed=0) == all_pairs[10:14]
    assert draw_pairs(rows, 2, seed=1) != all_pairs
    assert all(pair.a != pair.b for pair in draw_pairs(rows, 99, seed=0))
    assert len(draw_pairs(rows[:1], 99, seed=0)) == 6
    assert draw_pairs([{"prompt": [], "completions": [{"text": "same"}, {"text": "same"}]}], 2, 0) == []


def test_nothing_to_compare_is_said(tiny_base, sampled, gold, tmp_path):
    lonely = tmp_path / "lonely"
    (tmp_path / "work").mkdir()
    write_rows(tmp_path / "work/completions.jsonl", [{"prompt": message("user", "q"), "completions": [{"text": "one"}]}])
    facts = json.loads((sampled / "artifact.json").read_text())
    publish(tmp_path / "work", lonely, {**facts, "identity": "1" * 64})
    with pytest.raises(AlignError, match=r"label: .*lonely has no prompt with two different completions to compare"):
        labelling(tiny_base, lonely, "embedded", gold)[0].run(tmp_path / "run")


def test_a_reward_model_is_measured_on_pairs_it_was_not_trained_on(tiny_base, sampled, data, tmp_path):
    from align.artifact import Artifact
    from align.data.mix import load_data
    from align.data.sources import Source
    from align.judge.labelling import unseen_by

    recipe = Recipe("judge", base=str(tiny_base), dtype="float32")
    recipe.reward(policy=recipe.base, preferences=data / "preferences.jsonl", holdout=0.4, epochs=0.5)
    folder = recipe.run(tmp_path / "run")
    gold = load_data((Source(str(data / "preferences.jsonl")),), "preference", "gold")
    artifact = Artifact.open(folder / "reward")
    unseen = unseen_by([artifact], gold)
    assert unseen.sum() == artifact.facts["data"]["preferences"]["heldout"] > 0
    other = write_rows(
        tmp_path / "other.jsonl",
        [
            {"prompt": message("user", f"q{n}"), "chosen": message("assistant", "yes"), "rejected": message("assistant", "no")}
            for n in range(5)
        ],
    )
    assert unseen_by([artifact], load_data((Source(str(other)),), "preference", "gold")).all()
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((data / "preferences.jsonl").read_bytes())
    both = load_data((Source(str(other)), Source(str(copy))), "preference", "gold")
    assert unseen_by([artifact], both).sum() == 5 + unseen.sum()


def test_another_judge_by_the_command_line_replaces_the_recipes(tiny_base, data):
    recipe = Recipe("r", base=str(tiny_base))
    sampled = recipe.sample(policy=recipe.base, prompts=data / "prompts.jsonl")
    recipe.label(completions=sampled, judge=recipe.base)
    recipe.override("label.judge=http://127.0.0.1:1/v1#m")
    stage = recipe.stages["label"]
    assert list(stage.inputs) == ["completions"]
    assert stage.settings.judges == ("http://127.0.0.1:1/v1#m",)


def test_a_stage_is_made_again_when_its_template_changes(tiny_base, data, tmp_path):
    from align.plan import make_plan

    template = tmp_path / "judge.txt"
    template.write_text("kind: pair\nfirst: A\nsecond: B\nreply: verdict\n---\n[user]\n$prompt $first $second Which?\n")
    recipe = Recipe("r", base=str(tiny_base))
    sampled = recipe.sample(policy=recipe.base, prompts=data / "prompts.jsonl")
    recipe.label(completions=sampled, judge="http://127.0.0.1:1/v1#m", template=str(template))
    before = make_plan(recipe, tmp_path / "run")[1].identity
    assert make_plan(recipe, tmp_path / "run")[1].identity == before
    template.write_text(template.read_text().replace("Which?", "Which one?"))
    assert make_plan(recipe, tmp_path / "run")[1].identity != before
    template.unlink()
    with pytest.raises(AlignError, match=r"label.template: there is no file '.*judge.txt'"):
        make_plan(recipe, tmp_path / "run")
