import random
from pathlib import Path

import pytest
import torch

from align.artifact import Artifact
from align.base import find_base
from align.errors import AlignError
from align.judge import reward
from align.judge.ask import judge_pairs
from align.judge.judgement import Pair, Question, sigmoid
from align.judge.ledger import Ledger
from align.judge.reward import RewardJudge
from align.model.forward import forward_head
from align.model.packing import Example, make_row
from align.settings import JudgeSettings


def turn(text, role="assistant"):
    return [{"role": role, "content": text}]


def pair(prompt, a, b):
    return Pair(turn(prompt, "user"), turn(a), turn(b))


PAIRS = [pair("say red", "red", "der"), pair("say red", "red", "redder"), pair("say red", "der", "redder"), pair("sing", "la", "la la")]
QUESTIONS = [question for each in PAIRS for question in each.questions()]


@pytest.fixture(scope="module")
def artifact(small_run):
    return Artifact.open(Path(small_run) / "reward")


def judge_with(artifact, **settings):
    return RewardJudge(artifact.base, artifact, JudgeSettings(**settings), "float32")


def answers(judge, questions):
    found = {}

    def on_reply(place, reply):
        assert place not in found
        found[place] = reply

    judge.ask(questions, on_reply)
    return [found[place] for place in range(len(questions))]


def test_log_odds_are_the_difference_of_the_scores(artifact, chat):
    judge = judge_with(artifact)
    trunk, _, role = judge._loaded

    def score(prompt, completion):
        example = chat.conversation(0, [*prompt, *completion], last_turn_only=True)
        with torch.no_grad():
            return forward_head(trunk, role, make_row([Example(0, example.prompt, example.completions)])).scores.item()

    for question, reply in zip(QUESTIONS, answers(judge, QUESTIONS), strict=True):
        first, second = score(question.prompt, question.first), score(question.prompt, question.second)
        assert reply.log_odds == pytest.approx(first - second, abs=1e-4)
        assert reply.said == ("first" if first > second else "second")
        assert reply.raw == f"{first:.4f} {second:.4f}"
        assert (reply.completion_tokens, reply.price) == (0, 0.0)


def test_the_order_does_not_matter_and_each_completion_is_scored_once(artifact, monkeypatch):
    rows, compute = [], reward.last_hidden_states
    monkeypatch.setattr(reward, "last_hidden_states", lambda trunk, tree: rows.append(tree) or compute(trunk, tree))
    replies = answers(judge_with(artifact), QUESTIONS)
    assert [reply.log_odds for reply in replies[::2]] == [-reply.log_odds for reply in replies[1::2]]
    assert sum(len(row.sequences) for row in rows) == 5  # red, der, redder; la, la la
    order = random.Random(3).sample(range(len(QUESTIONS)), len(QUESTIONS))
    for place, reply in zip(order, answers(judge_with(artifact, row_tokens=32), [QUESTIONS[i] for i in order]), strict=True):
        assert reply.log_odds == pytest.approx(replies[place].log_odds, abs=1e-4)


def test_pairs_are_judged_in_the_models_own_terms(artifact, tmp_path):
    judge = judge_with(artifact)
    judged = judge_pairs(judge, PAIRS, Ledger(tmp_path / "l.sqlite"), JudgeSettings(abstain=0.0))
    for each, said in zip(PAIRS, judged, strict=True):
        (odds,) = (reply.log_odds for reply in answers(judge, [each.questions()[0]]))
        assert said.undecided is None
        assert said.probability == pytest.approx(sigmoid(odds), abs=1e-4)
        assert said.verdict == ("a" if odds > 0 else "b")


def test_the_same_text_twice_is_a_tie(artifact, tmp_path):
    (said,) = judge_pairs(judge_with(artifact), [pair("p", "x", "x")], Ledger(tmp_path / "l.sqlite"), JudgeSettings())
    assert (said.verdict, said.probability, said.undecided) == ("tie", 0.5, "tie")


def test_what_cannot_be_scored_is_unparsed_and_says_so(artifact):
    bad = [Question(turn("p", "user"), turn("x" * 600), turn("y")), Question(turn("p", "user"), turn("x<|end|>"), turn("y"))]
    replies = answers(judge_with(artifact), [*bad, QUESTIONS[0]])
    assert [reply.said for reply in replies[:2]] == ["unparsed", "unparsed"]
    assert replies[0].raw.startswith("[not scored: 6")
    assert replies[1].raw == "[not scored: its text contains the control token: <|end|>]"
    assert replies[2].log_odds is not None


def test_it_is_named_without_loading_anything(artifact, monkeypatch):
    monkeypatch.setattr(reward, "open_trunk", None)
    judge = judge_with(artifact)
    assert (judge.name, judge.model, judge.template) == ("reward_model reward", artifact.identity, "")
    judge.ask([], None)


def test_it_reads_no_principles(artifact):
    with pytest.raises(
        AlignError, match=r"reward: is a reward model, which .* reads no principle of 'prompts/constitution.txt'. Leave constit"
    ):
        judge_with(artifact, constitution="prompts/constitution.txt")


def test_it_stands_on_its_own_base(artifact, tiny_base):
    assert artifact.base.identity == find_base(str(tiny_base)).identity
