import json

from align import Recipe
from align.prompts import PromptTemplate
from align.settings import ReviseSettings
from align.stages.revise import revise

TEMPLATES = [PromptTemplate.load("prompts/critique.txt"), PromptTemplate.load("prompts/revision.txt")]
DRAFTS = [([{"role": "user", "content": f"question {n}"}], f"draft {n}") for n in range(4)]
PRINCIPLES = ["Be brief.", "Be kind.", "Be honest."]


class Scripted:
    """Answers what it is asked with a number, and keeps the questions."""

    def __init__(self, ended=lambda number: True):
        self.asked, self.ended = [], ended

    def __call__(self, questions, seed):
        first = len(self.asked)
        self.asked += [question[-1]["content"] for question in questions]
        return [(f"answer {first + i}", self.ended(first + i)) for i in range(len(questions))]


def test_a_revision_is_asked_with_prompt_draft_principle_and_critique():
    writer = Scripted()
    found = revise(writer, DRAFTS, PRINCIPLES, TEMPLATES, ReviseSettings(), 0)
    for n, row in enumerate(found):
        (step,) = row["revisions"]
        assert step["principle"] in PRINCIPLES
        assert step["critique"] == f"answer {n}"
        assert row["messages"] == [*DRAFTS[n][0], {"role": "assistant", "content": f"answer {4 + n}"}]
        assert row["draft"] == f"draft {n}"
        for question in (writer.asked[n], writer.asked[4 + n]):
            assert all(part in question for part in (f"question {n}", f"draft {n}", step["principle"]))
        assert f"answer {n}" in writer.asked[4 + n]


def test_rounds_build_on_each_other():
    writer = Scripted()
    found = revise(writer, DRAFTS[:1], PRINCIPLES, TEMPLATES, ReviseSettings(rounds=2), 0)
    assert "answer 1" in writer.asked[2]  # the second critique is of the first revision
    assert "draft 0" not in writer.asked[2]
    assert found[0]["messages"][-1]["content"] == "answer 3"


def test_a_revision_that_never_ended_is_not_learned_from():
    found = revise(Scripted(lambda number: number != 4), DRAFTS, PRINCIPLES, TEMPLATES, ReviseSettings(), 0)
    assert [bool(row["messages"]) for row in found] == [False, True, True, True]
    kept = revise(Scripted(lambda number: number != 3), DRAFTS[:1], PRINCIPLES, TEMPLATES, ReviseSettings(rounds=2), 0)
    assert kept[0]["messages"][-1]["content"] == "answer 1"  # the one before it did


def test_what_is_drawn_depends_on_the_place_and_the_seed_alone():
    whole = revise(Scripted(), DRAFTS, PRINCIPLES, TEMPLATES, ReviseSettings(), 0)
    later = revise(Scripted(), DRAFTS[2:], PRINCIPLES, TEMPLATES, ReviseSettings(), 2)
    assert [row["revisions"][0]["principle"] for row in later] == [row["revisions"][0]["principle"] for row in whole[2:]]


def test_revisions_are_learned_from_by_the_next_stage(tiny_base, data, tmp_path):
    recipe = Recipe("revised", base=str(tiny_base), dtype="float32")
    drafts = recipe.sample(policy=recipe.base, prompts=data / "prompts.jsonl", completions_per_prompt=1, max_new_tokens=12, keep_cut=True)
    revisions = recipe.revise(completions=drafts, max_new_tokens=24, temperature=1.0)
    recipe.sft(data=revisions, epochs=1.0, max_length=2048, row_tokens=2048)
    folder = recipe.run(tmp_path / "run")
    kept = [json.loads(line) for line in (folder / "revise/conversations.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "sft/artifact.json").read_text())
    assert facts["data"]["data"]["rows"] == len(kept) > 0
    assert facts["parents"]["data"]["name"] == "revise"
    assert all(row["messages"][-1]["content"] for row in kept)
