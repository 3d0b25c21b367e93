import importlib.util
import json

import pytest

from align import Recipe, ifeval
from align.artifact import Artifact
from align.errors import AlignError
from align.ifeval import followed, instructions_of
from align.report.page import write_report
from align.show import show_run

NO_COMMA, WORDS = "punctuation:no_comma", "length_constraints:number_words"
ROW = {"instruction_id_list": [NO_COMMA, WORDS], "kwargs": [{}, {"relation": "at least", "num_words": 3, "num_sentences": None}]}


def test_answers_are_counted_by_the_published_checkers():
    asked = instructions_of(ROW, "Say three words.", "p.jsonl:1")
    texts = [["one two three", "one, two, three"], ["one"], ["not asked for anything"]]
    found = followed(texts, [asked, asked, None])
    assert (found["answers"], found["followed"], found["not_checked"]) == (3, 1, 0)
    assert found["instructions"] == pytest.approx(4 / 6)  # both, the second, the first
    assert found["interval"] == pytest.approx([0.0615, 0.7923], abs=1e-4)  # statsmodels' proportion_confint(1, 3, method="wilson")


def test_prompts_without_instructions_say_nothing():
    assert instructions_of({"prompt": "Hello"}, "Hello", "p.jsonl:1") is None
    assert followed([["Hi."]], [None]) is None


def test_an_instruction_that_repeats_the_prompt_is_told_the_prompt():
    row = {"instruction_id_list": ["combination:repeat_prompt"], "kwargs": [{"prompt_to_repeat": "Say it again."}]}
    asked = instructions_of(row, "Say it again.", "p.jsonl:1")
    assert followed([["Say it again. It is said."]], [asked])["followed"] == 1
    assert followed([["It is said."]], [asked])["followed"] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**ROW, "instruction_id_list": ["punctuation:no_coma"]},
            r"^p.jsonl:7: .* has 'punctuation:no_coma', .* mean 'punctuation:no_comma'",
        ),
        ({**ROW, "instruction_id_list": "anything"}, r"^p.jsonl:7: instruction_id_list has 'anything', which IFEval does not know"),
        ({**ROW, "kwargs": [{}]}, r"^p.jsonl:7: kwargs is \[{}\]; expected a list of 2 mappings"),
        ({"instruction_id_list": [NO_COMMA]}, r"^p.jsonl:7: kwargs is None; expected a list of 1 mappings"),
    ],
)
def test_instructions_that_cannot_be_checked_are_refused_with_their_line(row, message):
    with pytest.raises(AlignError, match=message):
        instructions_of(row, "Say three words.", "p.jsonl:7")


def test_checkers_that_are_not_installed_are_named_with_the_command(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "langdetect" else find(name))
    ifeval._checkers.cache_clear()
    with pytest.raises(AlignError, match=r"not installed: pip install 'lm-eval\[ifeval\]'. Or evaluate without: check_instructions=false"):
        instructions_of(ROW, "Say three words.", "p.jsonl:1")


def test_what_lacks_its_data_is_unknown_and_not_wrong(monkeypatch, capsys):
    """Sentences are told apart by data that nltk fetches."""

    def lacks(*_):
        raise LookupError("Resource punkt_tab not found.")

    asked = instructions_of(ROW, "Say three words.", "p.jsonl:1")
    monkeypatch.setattr(ifeval._checkers(), "test_instruction_following_strict", lacks)
    ifeval._say_once.cache_clear()
    found = followed([["one two three"], ["one"]], [asked, asked])
    assert found == {"answers": 0, "not_checked": 2, "followed": 0, "interval": None, "instructions": None}
    assert capsys.readouterr().out.count("python -m nltk.downloader punkt_tab") == 1


def test_an_evaluation_checks_what_its_prompts_carry(tiny_base, data, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Say three words.", **ROW}) + "\n" + json.dumps({"prompt": "Hello"}) + "\n")
    recipe = Recipe("checked", base=str(tiny_base))
    reward = recipe.reward(preferences=data / "preferences.jsonl", batch_size=4, epochs=0.1)
    recipe.evaluate(policies=[recipe.base], reward_model=reward, prompts=prompts, max_new_tokens=6, samples_per_prompt=2)
    run = recipe.run(tmp_path / "run")
    (row,) = Artifact.open(run / "evaluate").facts["metrics"]["policies"]
    assert row["instructions"]["answers"] == 2
    show_run(run)
    wanted = f"{row['instructions']['followed']}/2"
    assert wanted in capsys.readouterr().out
    page = write_report(run).read_text()
    assert "<th>follows its instructions</th>" in page
    assert f"{row['instructions']['followed']} of 2" in page
    recipe.override("evaluate.check_instructions=false")
    (row,) = Artifact.open(recipe.run(run) / "evaluate").facts["metrics"]["policies"]
    assert row["instructions"] is None
