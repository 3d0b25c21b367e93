"""Win rates of an evaluation's policies, by a judge behind a real server."""

import json

import pytest
from conftest import write_rows
from judge.faulty_server import MODEL, FaultyServer, ok

from align import AlignError, Recipe
from align.artifact import Artifact, publish
from align.report.page import write_report
from align.show import win_table

ANSWERS = ["GOOD"] * 20 + ["BAD"] * 5 + [""] * 2 + ["MIDDLING"] * 3  # of ppo; sft says MIDDLING, so 20 are better and 3 the same
RANK = {"BAD": 0, "MIDDLING": 1, "GOOD": 2}


def message(role, text):
    return [{"role": role, "content": text}]


def evaluated(folder, policies):
    """An evaluation as an artifact from elsewhere."""
    folder.mkdir()
    (folder / "work").mkdir()
    said = {"sft": ["MIDDLING"] * 30, "ppo": ANSWERS}
    rows = [
        {
            "prompt": message("user", f"question {n}"),
            "answers": {name: [{"text": said[name][n], "score": 1.0, "ended": True}] for name in policies},
        }
        for n in range(30)
    ]
    write_rows(folder / "work/samples.jsonl", rows)
    facts = {"format": 1, "kind": "evaluation", "name": "evaluate", "identity": "0" * 64, "parents": {}, "base": {}}
    metrics = {"policies": [{"name": name} for name in policies], "prompts": 30}
    publish(folder / "work", folder / "evaluate", {**facts, "settings": {}, "model": {"form": "none"}, "metrics": metrics, "seconds": 1.0})
    return folder / "evaluate"


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("elsewhere") / "two", ["sft", "ppo"])


def by_rank(asked):
    """The better answer, wherever it stands."""
    places = sorted((asked.find(word), word) for word in RANK if word in asked)
    first, second = (RANK[word] for _, word in places[:2])
    return {"A": 0.9, "B": 0.1} if first > second else {"A": 0.1, "B": 0.9}


def comparing(tiny_base, evaluation, judge, **settings):
    recipe = Recipe("comparing", base=str(tiny_base), dtype="float32")
    recipe.compare(evaluation=recipe.load(evaluation), judge=judge, **{"audit_pairs": 0, **settings})
    return recipe


def test_wins_ties_and_losses(tiny_base, evaluation, tmp_path, capsys):
    """The same text is a tie and an empty answer loses: nobody is asked."""
    with FaultyServer(afterwards=ok(by_rank)) as server:
        folder = comparing(tiny_base, evaluation, f"{server.url}#{MODEL}").run(tmp_path / "run")
    facts = json.loads((folder / "compare/artifact.json").read_text())
    assert facts["kind"] == "comparison"
    assert facts["metrics"]["first"] == "sft"
    (ppo,) = facts["metrics"]["policies"]
    assert (ppo["name"], ppo["wins"], ppo["ties"], ppo["losses"], ppo["unknown"]) == ("ppo", 20, 3, 7, 0)
    assert ppo["win_rate"] == pytest.approx(21.5 / 30)
    duels = [json.loads(line) for line in (folder / "compare/duels.jsonl").read_text().splitlines()]
    assert [duel["settled"] for duel in duels] == [1.0] * 20 + [0.0] * 7 + [0.5] * 3
    assert sum("judgement" in duel for duel in duels) == 25
    assert "ppo against sft: wins 20, ties 3, loses 7; win rate 72%" in capsys.readouterr().out
    table = win_table(Artifact.open(folder / "compare"))
    assert [list(column.cells)[0] for column in table.columns][:6] == ["ppo", "20", "3", "7", "0", "72% (54% to 85%)"]
    page = write_report(folder).read_text()
    assert "Who wins" in page
    assert "(not measured)" in page


def test_a_judge_that_always_says_first_ties_everything(tiny_base, evaluation, tmp_path):
    with FaultyServer(afterwards=ok(lambda asked: {"A": 0.9, "B": 0.1})) as server:
        folder = comparing(tiny_base, evaluation, f"{server.url}#{MODEL}").run(tmp_path / "run")
    (ppo,) = json.loads((folder / "compare/artifact.json").read_text())["metrics"]["policies"]
    assert (ppo["wins"], ppo["ties"], ppo["losses"]) == (0, 28, 2)


def test_a_judge_that_the_audit_refuses_compares_nothing(tiny_base, evaluation, tmp_path):
    with FaultyServer(afterwards=ok(lambda asked: {"A": 0.9, "B": 0.1})) as server:
        recipe = comparing(tiny_base, evaluation, f"{server.url}#{MODEL}", audit_pairs=40)
        with pytest.raises(AlignError, match=r"(?s)compare: the judge is refused: .*--set compare.trust_judge=true"):
            recipe.run(tmp_path / "run")
    assert not (tmp_path / "run/compare").exists()


def test_one_policy_alone_is_refused(tiny_base, tmp_path):
    recipe = comparing(tiny_base, evaluated(tmp_path / "one", ["sft"]), "http://127.0.0.1:9/v1#none")
    with pytest.raises(AlignError, match=r"compare: evaluate has answers of sft alone; expected two policies or more"):
        recipe.run(tmp_path / "run")


def test_another_judge_asks_again_and_samples_nothing(tiny_base, evaluation):
    """The judge is part of the stage's identity, and --set names it."""
    recipe = comparing(tiny_base, evaluation, "http://127.0.0.1:9/v1#one")
    recipe.override("compare.judge=http://127.0.0.1:9/v1#two")
    assert recipe.stages["compare"].settings.judges == ("http://127.0.0.1:9/v1#two",)


def test_what_is_compared_must_be_an_evaluation(tiny_base):
    recipe = Recipe("comparing", base=str(tiny_base), dtype="float32")
    with pytest.raises(AlignError, match=r"compare: evaluation is a Policy \(stage 'base'\); expected an Evaluation, from recipe.evaluate"):
        recipe.compare(evaluation=recipe.base, judge="embedded")
