"""Held-out pairs in groups, by hand and by what must hold of every grouping."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.confidence import wilson_interval
from align.learn.graded import LENGTHS, Graded, breakdown

graded = st.builds(
    Graded, st.booleans(), st.floats(0.5, 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["a.jsonl", "b.jsonl", "c.jsonl"])
)


def test_by_hand():
    """A model that prefers the longer one: right on the first two and the fourth, wrong on the third; three are decided by length."""
    pairs = [
        Graded(True, 0.9, 30, 10, "a.jsonl"),
        Graded(True, 0.8, 16, 10, "a.jsonl"),
        Graded(False, 0.9, 10, 30, "b.jsonl"),
        Graded(True, 0.6, 12, 12, "b.jsonl"),
    ]
    found = breakdown(pairs)
    longer, alike, shorter = (found["by_length"][name] for name in LENGTHS)
    assert (longer["pairs"], longer["accuracy"], longer["longer_is_better_accuracy"]) == (2, 1.0, 1.0)
    assert (alike["pairs"], alike["accuracy"], alike["longer_is_better_accuracy"]) == (1, 1.0, 0.5)
    assert (shorter["pairs"], shorter["accuracy"], shorter["longer_is_better_accuracy"]) == (1, 0.0, 0.0)
    assert found["by_source"]["b.jsonl"]["accuracy"] == 0.5
    assert found["by_source"]["b.jsonl"]["accuracy_interval"] == wilson_interval(1, 2)
    assert [(each["n"], each["right"]) for each in found["calibration"]] == [(1, 1.0), (1, 1.0), (2, 0.5)]
    assert found["calibration_error"] == pytest.approx((0.4 + 0.2 + 2 * 0.4) / 4)


def test_of_one_source_nothing_is_told_by_source():
    assert breakdown([Graded(True, 0.7, 3, 4, "a.jsonl")])["by_source"] == {}


@given(st.lists(graded, min_size=1, max_size=40))
def test_every_pair_is_in_one_group_of_each_kind(pairs):
    found = breakdown(pairs)
    for groups in (found["by_length"], found["by_source"] or {"all": {"pairs": len(pairs), "accuracy": None}}):
        assert sum(group["pairs"] for group in groups.values()) == len(pairs)
    assert sum(each["n"] for each in found["calibration"]) == len(pairs)
    right = sum(group["accuracy"] * group["pairs"] for group in found["by_length"].values())
    assert right == pytest.approx(sum(pair.right for pair in pairs))
    assert 0 <= found["calibration_error"] <= 1
