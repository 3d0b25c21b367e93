"""The exact paired test against counting every sign, and against the tests it is named after."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.confidence import sign_flip_test, wilson_interval

differences = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), max_size=9)


def at_least_by_counting(values):
    """The share of all sign patterns whose sum is as large or larger."""
    patterns = list(itertools.product((-1, 1), repeat=len(values)))
    return sum(sum(s * abs(v) for s, v in zip(signs, values, strict=True)) >= sum(values) for signs in patterns) / len(patterns)


@given(differences)
@settings(max_examples=200, deadline=None)
def test_the_p_value_is_the_share_of_sign_patterns_with_a_sum_as_large(values):
    assert sign_flip_test(values) == pytest.approx(at_least_by_counting(values))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_of_whole_differences_it_is_mcnemar_s_exact_test(better, worse, equal):
    """One-sided: P(X >= better) of a binomial with better + worse trials and one half."""
    n = better + worse
    expected = sum(math.comb(n, k) for k in range(better, n + 1)) / 2**n
    assert sign_flip_test([1.0] * better + [-1.0] * worse + [0.0] * equal) == pytest.approx(expected)
    assert sign_flip_test([0.5] * better + [-0.5] * worse) == pytest.approx(expected)  # and of one size, the sign test


def test_by_hand():
    """Five of five: 1/32. Four of five: 6/32. Nothing that differs: no evidence at all."""
    assert sign_flip_test([0.5] * 5) == 1 / 32
    assert sign_flip_test([1, 1, 1, 1, -1]) == 6 / 32
    assert sign_flip_test([0, 0]) == sign_flip_test([]) == 1


def test_thousands_of_pairs_are_no_trouble():
    assert sign_flip_test([1.0] * 5100 + [-1.0] * 4900) == pytest.approx(0.0233, abs=1e-4)  # normal: z = 199 / 100, 0.0233


def test_the_interval_lies_around_the_share_and_within_0_and_1():
    low, high = wilson_interval(7, 10)
    assert 0 < low < 0.7 < high < 1
