import json
import math

import pytest
from conftest import SMALL, write_rows

from align import Lora, Recipe
from align.errors import AlignError
from align.model.generate import Completion
from align.model.packing import Example
from align.stages.evaluate import Answers, compare, declined, says_the_same


def answers(name, scores, kl=None):
    """One completion of two tokens a prompt; a score of None is one that was cut."""
    completions = [[Completion((7, 1) if s is not None else (7, 8), (-1.0, -1.0), s is not None)] for s in scores]
    examples = [Example(i, (5,), tuple(c.ids for c in cs)) for i, cs in enumerate(completions)]
    return Answers(name, name, examples, completions, [["x"]] * len(scores), [[s] for s in scores], kl)


def test_the_difference_is_paired_by_prompt():
    """Scores (1, 5) against (0, 4): the difference is 1 on both prompts, so its interval has no width."""
    row = compare(answers("b", [1.0, 5.0]), answers("a", [0.0, 4.0]))
    assert row["difference"] == 1.0
    assert row["difference_interval"] == [1.0, 1.0]
    assert row["better_share"] == 1.0
    assert row["score"] == 3.0


def test_a_completion_that_was_cut_is_unknown_and_not_a_number():
    row = compare(answers("b", [1.0, None, 3.0]), answers("a", [0.0, 9.0, None]))
    assert row["scored"] == 2
    assert row["score"] == 2.0
    assert row["difference"] == 1.0  # only the first prompt has both
    assert row["difference_interval"] is None
    assert row["ended"] == pytest.approx(2 / 3)


def test_nothing_scored_stays_unknown():
    row = compare(answers("b", [None, None]), answers("a", [1.0, 1.0]))
    assert row["score"] is None
    assert row["score_interval"] is None
    assert row["better_share"] is None


def test_a_tie_is_half_a_win():
    row = compare(answers("b", [1.0, 2.0]), answers("a", [1.0, 1.0]))
    assert row["better_share"] == 0.75


def test_the_first_policy_is_not_compared_with_itself():
    first = answers("a", [1.0, 2.0], kl=[[0.0], [0.0]])
    row = compare(first, first)
    assert row["difference"] is None
    assert row["kl"] == 0.0


@pytest.mark.parametrize(
    ("texts", "warning"),
    [
        (["I'm sorry."] * 4 + [" I'm sorry."] + list("abc"), 'p says the same to 5 of 8 prompts: "I\'m sorry.". Read its answers'),
        ([""] * 5 + list("abc"), "p says nothing to 5 of 8 prompts. Read its answers"),
        (["yes"] * 4 + list("abc"), None),  # four may be chance
        (["yes"] * 5 + [str(number) for number in range(15)], None),  # a quarter, no more
    ],
)
def test_a_policy_that_says_the_same_to_many_prompts_is_warned_of(texts, warning):
    found = says_the_same({"p": [[text] for text in texts]})
    assert list(found) == ([] if warning is None else ["p"])
    assert warning is None or found["p"].startswith(warning)


def test_the_warning_is_told_and_kept(tiny_base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("align.stages.evaluate.SAME_TIMES", 1)
    monkeypatch.setattr("align.stages.evaluate.SAME_SHARE", 0.0)
    recipe = Recipe("same", base=str(tiny_base), dtype="float32")
    reward = recipe.reward(preferences=data / "preferences.jsonl", lora=Lora(rank=4), **SMALL)
    recipe.evaluate(policies=[recipe.base], reward_model=reward, prompts=data / "heldout.jsonl", max_new_tokens=4)
    run = recipe.run(tmp_path / "run")
    (warning,) = json.loads((run / "evaluate" / "artifact.json").read_text())["checks"]["warnings"].values()
    assert warning.startswith("base says ")
    assert " ".join(f"evaluate: {warning}".split())[:40] in " ".join(capsys.readouterr().out.split())


def test_what_declines_is_counted_apart_for_harmful_and_harmless_prompts():
    no, yes = "I can't help with that.", "Stir it."
    found = declined([[no, yes], [no, no], [yes, yes], [no, no]], [True, True, False, None])
    assert [(name, of["declined"], of["answers"]) for name, of in found.items()] == [("harmful", 3, 4), ("harmless", 0, 2)]
    assert found["harmful"]["interval"] == pytest.approx(
        [0.3006, 0.9544], abs=1e-4
    )  # statsmodels' proportion_confint(3, 4, method="wilson")
    assert declined([[no]], [None]) == {}


@pytest.fixture(scope="module")
def compared(tiny_base, data, tmp_path_factory):
    """Two policies and the best of eight of the first, scored by the reward model, one on the same base, and one on weights of its own."""
    recipe = Recipe("compared", base=str(tiny_base), dtype="float32")
    sft = recipe.sft(data=data / "chat.jsonl", lora=Lora(rank=4), **SMALL)
    reward = recipe.reward(policy=sft, preferences=data / "preferences.jsonl", lora=Lora(rank=4), **SMALL)
    unseen = recipe.reward(policy=sft, preferences=data / "preferences.jsonl", lora=Lora(rank=4), name="unseen", **{**SMALL, "seed": 1})
    apart = recipe.reward(preferences=data / "preferences.jsonl", lora=None, name="apart", **SMALL)
    policies = {"policies": [recipe.base, sft], "reward_model": reward, "held_out": [unseen, apart]}
    folder = tmp_path_factory.mktemp("compared")
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text().splitlines()]
    prompts = write_rows(folder / "labelled.jsonl", [{**row, "harmful": number == 1} for number, row in enumerate(rows)])
    recipe.evaluate(**policies, prompts=prompts, max_new_tokens=12, best_of=8)
    run = recipe.run(folder / "run")
    return run, {row["name"]: row for row in json.loads((run / "evaluate" / "results.json").read_text())["policies"]}


def test_reward_models_that_nothing_was_trained_against_are_beside_the_other(compared):
    _, table = compared
    assert list(table) == ["base", "best of 8 of base", "sft"]
    for row in table.values():
        assert set(row["held_out"]) == {"unseen", "apart"}
        for of_model in row["held_out"].values():
            assert of_model["scored"] == row["scored"]
    assert table["sft"]["held_out"]["unseen"]["score"] != table["sft"]["score"]
    assert table["base"]["held_out"]["unseen"]["difference"] is None


def test_the_best_of_some_scores_higher_at_a_known_kl(compared):
    _, table = compared
    best = table["best of 8 of base"]
    assert best["score"] > table["base"]["score"]
    assert best["kl"] == pytest.approx(math.log(8) - 7 / 8)
    assert best["identity"] == table["base"]["identity"]


def test_the_table_and_the_report_show_what_is_unseen(compared, capsys):
    from align.report.page import write_report
    from align.show import show_run

    run, _ = compared
    show_run(run)
    shown, page = capsys.readouterr().out, write_report(run).read_text()
    assert "unseen" in shown
    assert "By unseen, which nothing was trained against:" in page
    assert "<th>declines harmful</th><th>declines harmless</th>" in page
    assert "0 of 3" in page
    assert "0/3" in shown


def test_what_the_prompts_rows_say_is_counted_of_every_policy(compared):
    _, table = compared
    assert [{name: of["answers"] for name, of in row["declined"].items()} for row in table.values()] == [{"harmful": 1, "harmless": 3}] * 3


def test_best_of_needs_a_reward_model_on_the_same_weights(tiny_base, data, tmp_path):
    recipe = Recipe("apart", base=str(tiny_base), dtype="float32")
    apart = recipe.reward(preferences=data / "preferences.jsonl", lora=None, **SMALL)
    recipe.evaluate(policies=[recipe.base], reward_model=apart, prompts=data / "heldout.jsonl", max_new_tokens=8, best_of=2)
    with pytest.raises(
        AlignError, match=r"evaluate\.best_of: the reward model 'reward' stands on other weights than base; leave best_of out"
    ):
        recipe.run(tmp_path / "run")


def test_every_policy_is_sampled_from_merged_weights(small_run, tiny_base, data, tmp_path, monkeypatch):
    from align.stages import evaluate

    merged = []
    plain = evaluate.Sampler.sample
    monkeypatch.setattr(evaluate.Sampler, "sample", lambda self, *a, **k: merged.append(self.copy is not None) or plain(self, *a, **k))
    recipe = Recipe("merged", base=str(tiny_base), dtype="float32")
    policies, reward = [recipe.load(small_run / name) for name in ("sft", "ppo")], recipe.load(small_run / "reward")
    recipe.evaluate(policies=policies, reward_model=reward, prompts=data / "heldout.jsonl", max_new_tokens=4)
    recipe.run(tmp_path / "run")
    assert merged == [True, True]
