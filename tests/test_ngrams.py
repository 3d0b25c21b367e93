import pytest

from align.ngrams import distinct, repetition


def test_n_grams_by_hand():
    assert distinct(["a b a b", "A b"], 2) == pytest.approx(2 / 4)  # ab ba ab, ab
    assert distinct(["one", ""], 2) is None
    assert repetition("a b c a b c") == pytest.approx(1 / 4)  # abc bca cab abc
    assert repetition("one two") == 0.0
