"""The figures of an audit, against oracles of their own and by hand."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.confidence import reliability
from align.judge.agreement import BINS, Judged, Share, as_json, kappa, statistics, sure_and_right
from align.judge.judgement import Reply, combine

NONE = Reply("unparsed", "?")


def reply(log_odds, **more):
    said = "first" if log_odds > 0 else "second" if log_odds < 0 else "tie"
    return Reply(said, said, log_odds=log_odds, **more)


def judged(a_first, b_first, right="a", longer=0, abstain=0.0):
    """A pair by what is said in each order: log-odds, or a word."""
    replies = [reply(x) if isinstance(x, int | float) else Reply(x, x) for x in (a_first, b_first)]
    return Judged(combine(*replies, abstain), right, longer)


def kappa_by_the_table(ours, theirs):
    """(observed - expected) / (1 - expected) agreement, from the table of proportions."""
    classes = sorted({*ours, *theirs})
    table = np.zeros((len(classes), len(classes)))
    for one, other in zip(ours, theirs, strict=True):
        table[classes.index(one), classes.index(other)] += 1
    table /= table.sum()
    expected = table.sum(1) @ table.sum(0)
    return (np.trace(table) - expected) / (1 - expected)


pairs_of_verdicts = st.lists(st.tuples(st.sampled_from(["a", "b", "tie"]), st.sampled_from(["a", "b", "tie"])), min_size=2, max_size=40)


@given(pairs_of_verdicts)
@settings(max_examples=200, deadline=None)
def test_kappa_is_the_table_s(said):
    ours, theirs = zip(*said, strict=True)
    found = kappa(ours, theirs)
    if len({*ours, *theirs}) == 1:
        assert found is None  # both always say the same: no agreement is to be expected by more than chance
    else:
        assert found == pytest.approx(kappa_by_the_table(ours, theirs))


def test_kappa_by_hand():
    """Cohen's example: 20 yes-yes, 15 no-no, 5 and 10 apart: (0.7 - 0.5) / 0.5 = 0.4."""
    ours, theirs = ["y"] * 25 + ["n"] * 25, ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert kappa(ours, theirs) == pytest.approx(0.4)
    assert kappa([], []) is None


def test_a_group_by_hand():
    """Five pairs: right both ways; flips to the first, on the whole right; wrong both ways; a tie and right; one reply unreadable."""
    group = [
        judged(2.0, -2.0, "a", longer=10),
        judged(3.0, 1.0, "a", longer=-10),  # says a, then b; (3 - 1) / 2 > 0
        judged(1.0, -1.0, "b", longer=5),
        judged("tie", "first", "b", longer=-5),  # a tie, then b: probability 0.25 of a
        Judged(combine(reply(2.0), NONE), "a", 0),
    ]
    found = statistics(group)
    assert found.pairs == 5
    assert found.correct == Share(3, 5)  # unparsed is not right, and not left out
    assert found.correct_ab == Share(3, 5)  # a, a, a(wrong), tie(wrong), a
    assert found.correct_ba == Share(2, 5)  # a, b(wrong), a(wrong), b, unparsed(wrong)
    assert found.correct_both == Share(1, 5)
    assert found.agree == Share(2, 4)
    assert found.first_position == Share(0.5 + 1 + 0.5, 3)
    assert found.longer_wins == Share(3, 4)  # all but the second; the last has no longer side
    assert found.longer_is_right == Share(1 + 0 + 0 + 1 + 0.5, 5)
    assert found.decided == Share(2, 5)
    assert found.decided_correct == Share(1, 2)
    assert found.undecided == {"flipped": 2, "unparsed": 1}
    assert found.tied_replies == Share(1, 10)
    assert found.unparsed_replies == Share(1, 10)
    assert found.kappa == pytest.approx(kappa_by_the_table(["a", "a", "a", "tie"], ["a", "b", "a", "b"]))


def test_an_even_probability_earns_half_a_pair_and_an_unread_one_nothing():
    assert judged("first", "first").earned == 0.5
    assert Judged(combine(NONE, NONE), "a", 0).earned == 0.0


def test_of_the_same_text_twice_undecided_is_right_but_unread_is_not():
    same = [judged(4.0, 4.0, "tie"), judged("tie", "tie", "tie"), Judged(combine(NONE, NONE), "tie", 0), judged("first", "second", "tie")]
    found = statistics(same)
    assert found.correct == Share(2, 4)
    assert found.correct_ab == Share(1, 4)  # in one order only a tie is right
    assert (found.p_chance, found.p_longer, found.longer_is_right, found.calibration_error, found.bins) == (None, None, None, None, [])


log_odds = st.floats(-5, 5).map(lambda x: round(x, 3))
anyone = st.tuples(log_odds, log_odds, st.sampled_from("ab"), st.integers(-50, 50))


@given(st.lists(anyone, min_size=1, max_size=25))
@settings(max_examples=100, deadline=None)
def test_calling_a_b_and_b_a_changes_no_figure_but_which_order_is_which(rows):
    found = statistics([judged(*row) for row in rows])
    turned = statistics([judged(b_first, a_first, "ab"[right == "a"], -longer) for a_first, b_first, right, longer in rows])
    assert (turned.correct_ab, turned.correct_ba) == (found.correct_ba, found.correct_ab)
    for name in ("correct", "correct_both", "agree", "first_position", "longer_wins", "longer_is_right", "decided", "p_chance", "p_longer"):
        assert getattr(turned, name) == getattr(found, name)
    assert turned.kappa == (None if found.kappa is None else pytest.approx(found.kappa))
    assert turned.calibration_error == pytest.approx(found.calibration_error)


@given(st.lists(anyone, min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_calibration_is_the_mean_gap_between_confidence_and_accuracy_in_bins(rows):
    """Against numpy, bin by bin; confidences on an edge may fall on either side of it, so they are moved off."""
    group = [judged(*row) for row in rows]
    sure = np.array([max(item.judgement.probability, 1 - item.judgement.probability) for item in group])
    off_edges = np.abs(sure * 2 * BINS - np.round(sure * 2 * BINS)) > 1e-9
    group = [item for item, keep in zip(group, off_edges, strict=True) if keep]
    if not group:
        return
    sure, right = sure[off_edges], np.array([item.earned for item in group])
    at = np.digitize(sure, np.linspace(0.5, 1, BINS + 1)[1:-1])
    gaps = [(at == i).sum() * abs(right[at == i].mean() - sure[at == i].mean()) for i in range(BINS) if (at == i).any()]
    assert statistics(group).calibration_error == pytest.approx(sum(gaps) / len(group))
    assert sum(b.n for b in reliability(sure_and_right(group), BINS)) == len(group)


def test_a_judge_that_is_as_right_as_sure_is_calibrated_and_one_that_is_too_sure_is_not():
    lot = random.Random(0)
    honest, boastful = [], []
    for _ in range(4000):
        x = lot.uniform(0, 3)
        right = "a" if lot.random() < 1 / (1 + np.exp(-x)) else "b"
        honest.append(judged(x, -x, right))
        boastful.append(judged(4 * x, -4 * x, right))
    assert statistics(honest).calibration_error < 0.03
    assert statistics(boastful).calibration_error > 0.12


def test_price_and_time_are_of_a_thousand_pairs_and_unknown_where_nobody_told():
    told = Judged(combine(reply(1.0, price=0.002, seconds=0.5), reply(-1.0, price=0.001, seconds=1.0)), "a", 0)
    assert statistics([told]).price_per_thousand == pytest.approx(3.0)
    assert statistics([told]).seconds_per_thousand == pytest.approx(1500)
    assert statistics([judged(1.0, -1.0)]).price_per_thousand is None
    assert statistics([judged(1.0, -1.0)]).seconds_per_thousand is None


def test_a_panel_has_no_figures_by_order():
    found = statistics([judged(1.0, -1.0)], by_order=False)
    assert found.correct == Share(1, 1)
    assert found.correct_ab is found.agree is found.kappa is found.first_position is found.unparsed_replies is None


def test_no_pairs_give_no_shares():
    found = statistics([])
    assert found.correct.share is None
    assert found.correct.interval is None
    assert found.kappa is None


def test_as_json_has_every_figure_and_intervals():
    told = as_json(statistics([judged(2.0, -2.0, "a", 3), judged(1.0, -1.0, "b", 3)]))
    assert told["correct"] == {
        "share": 0.5,
        "count": 1.0,
        "n": 2,
        "interval": [pytest.approx(0.0945, abs=1e-4), pytest.approx(0.9055, abs=1e-4)],
    }
    assert Counter(each["n"] for each in told["bins"]) == Counter({1: 2})
    assert told["undecided"] == {}
