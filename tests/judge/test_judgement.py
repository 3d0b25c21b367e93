import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.judge.judgement import Judgement, Pair, Question, Reply, as_facts, combine, sigmoid, together, verdict_of

PROMPT, A, B = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
saids = st.sampled_from(["first", "second", "tie", "unparsed"])
log_odds = st.one_of(st.none(), st.floats(-30, 30))
replies = st.builds(lambda said, odds: Reply(said, said, odds), saids, log_odds)


def reply(said, odds=None):
    return Reply(said, said, odds)


def test_a_pair_is_asked_in_both_orders():
    one, other = Pair(PROMPT, A, B, "x").questions()
    assert (one, other) == (Question(PROMPT, A, B, "x"), Question(PROMPT, B, A, "x"))


def test_what_fills_a_template():
    assert Question(PROMPT, A, B).fields() == {"prompt": "p", "first": "a", "second": "b"}
    assert Question(PROMPT, A, None, "x").fields() == {"prompt": "p", "completion": "a", "principle": "x"}
    several = Question([*PROMPT, *A, *PROMPT], A, B).fields()["prompt"]
    assert several == "User:\n  p\nAssistant:\n  a\nUser:\n  p"


def test_verdicts_are_told_in_terms_of_the_pair():
    assert [verdict_of(reply(said), swapped=False) for said in ("first", "second", "tie", "unparsed")] == ["a", "b", "tie", "unparsed"]
    assert [verdict_of(reply(said), swapped=True) for said in ("first", "second", "tie", "unparsed")] == ["b", "a", "tie", "unparsed"]


def test_log_odds_are_averaged_over_the_orders():
    """A first: log 9; b first: log 4 for b, so -log 4 for a... the mean for a is (log 9 - log 4) / 2 = log 1.5: p = 0.6."""
    found = combine(reply("first", math.log(9)), reply("first", math.log(4)))
    assert found.probability == pytest.approx(0.6)
    assert (found.verdict, found.undecided) == ("tie", "flipped")
    sure = combine(reply("first", 2.0), reply("second", -4.0), judge="j")
    assert (sure.verdict, sure.undecided, sure.judge) == ("a", None, "j")
    assert sure.probability == pytest.approx(sigmoid(3.0))


@pytest.mark.parametrize(
    ("a_first", "b_first", "verdict", "probability", "undecided"),
    [
        ("first", "second", "a", 1.0, None),
        ("second", "first", "b", 0.0, None),
        ("first", "first", "tie", 0.5, "flipped"),
        ("second", "second", "tie", 0.5, "flipped"),
        ("tie", "tie", "tie", 0.5, "tie"),
        ("first", "tie", "tie", 0.75, "flipped"),
        ("first", "unparsed", "unparsed", None, "unparsed"),
        ("unparsed", "unparsed", "unparsed", None, "unparsed"),
    ],
)
def test_written_verdicts_are_averaged(a_first, b_first, verdict, probability, undecided):
    found = combine(reply(a_first), reply(b_first))
    assert (found.verdict, found.probability, found.undecided) == (verdict, probability, undecided)


def test_a_probability_near_one_half_is_undecided():
    near = reply("first", 0.1), reply("second", -0.1)  # p = 0.525
    assert combine(*near, abstain=0.03).undecided == "abstained"
    assert combine(*near, abstain=0.02).undecided is None


@given(replies, replies, st.floats(0, 0.49))
def test_exchanging_the_completions_exchanges_the_judgement(a_first, b_first, abstain):
    one, other = combine(a_first, b_first, abstain), combine(b_first, a_first, abstain)
    assert one.undecided == other.undecided
    assert one.verdict == {"a": "b", "b": "a"}.get(other.verdict, other.verdict)
    if one.probability is not None:
        assert one.probability == pytest.approx(1 - other.probability, abs=1e-15)


@given(st.lists(st.tuples(replies, replies), min_size=1, max_size=4))
def test_a_panel_of_one_mind_is_its_members_mean(members):
    judged = [combine(*pair) for pair in members]
    panel = together(judged)
    known = [j.probability for j in judged if j.probability is not None]
    assert (panel.probability is None) == (not known)
    if known:
        assert panel.probability == pytest.approx(sum(known) / len(known))
    assert (panel.verdict == "unparsed") == (not known)
    assert together([judged[0]]).probability == judged[0].probability


def test_a_member_that_cannot_be_read_or_decide_does_not_block():
    sure, flipped = combine(reply("first", 4.0), reply("second", -4.0)), combine(reply("first", 1.0), reply("first", 1.0))
    unread = combine(reply("unparsed"), reply("first"))
    assert together([unread, sure, flipped]).verdict == "a"
    assert together([flipped, flipped]).undecided == "flipped"
    assert together([unread, unread]).verdict == "unparsed"
    assert together([sure, combine(reply("second", -4.0), reply("first", 4.0))]).undecided == "abstained"


@given(st.floats(-1e6, 1e6))
def test_sigmoid_never_overflows(x):
    assert 0 <= sigmoid(x) <= 1
    assert sigmoid(x) + sigmoid(-x) == pytest.approx(1)


def test_facts_say_what_each_order_said():
    facts = as_facts(combine(reply("first", 2.0), reply("first", 1.0), judge="local embedded"))
    assert facts == {
        "judge": "local embedded",
        "verdict": "tie",
        "undecided": "flipped",
        "probability": pytest.approx(sigmoid(0.5)),
        "orders": [
            {"order": "ab", "verdict": "a", "log_odds": 2.0, "raw": "first"},
            {"order": "ba", "verdict": "b", "log_odds": 1.0, "raw": "first"},
        ],
    }
    assert isinstance(combine(reply("tie"), reply("tie")), Judgement)
