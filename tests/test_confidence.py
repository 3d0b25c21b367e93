"""Tests and intervals against counting, against scipy, and against simulated truths."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from align.confidence import calibration_error, mean_interval, reliability, sign_flip_test, t_quantile, wilson_interval

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


# Means ------------------------------------------------------------------------------------------------------------------------


def test_the_quantile_of_student_s_t_is_scipy_s():
    freedoms = [*range(1, 200), 1000, 10**6]
    assert [t_quantile(n) for n in freedoms] == pytest.approx(stats.t.ppf(0.975, freedoms).tolist(), rel=1.5e-3)


def test_the_interval_of_a_mean_is_scipy_s():
    for n in (2, 3, 7, 60):
        numbers = np.random.default_rng(n).normal(1, 3, n).tolist()
        expected = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
        assert mean_interval(numbers) == pytest.approx(list(expected), rel=1e-2)
    assert mean_interval([3.0]) is None
    assert mean_interval([2.0, 2.0]) == [2.0, 2.0]


@pytest.mark.parametrize("prompts", [5, 12, 66])
@pytest.mark.parametrize("difference", [0.0, 0.3])
def test_the_interval_of_a_difference_covers_the_truth_at_its_rate(prompts, difference):
    """1,000 pairs of simulated policies, whose scores share what is hard about a prompt."""
    rng, holds = np.random.default_rng(prompts), 0
    for _ in range(1000):
        hard = rng.normal(0, 1, prompts)
        first, second = hard + rng.normal(0, 0.5, prompts), hard + rng.normal(difference, 0.7, prompts)
        low, high = mean_interval((second - first).tolist())
        holds += low <= difference <= high
    assert holds / 1000 == pytest.approx(0.95, abs=0.02)


# Calibration ------------------------------------------------------------------------------------------------------------------


def test_who_is_right_as_often_as_sure_is_calibrated_and_who_is_not_is_off_by_the_difference():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 20_000)
    honest = list(zip(sure.tolist(), (rng.random(20_000) < sure).astype(float).tolist(), strict=True))
    guessing = list(zip(sure.tolist(), (rng.random(20_000) < 0.5).astype(float).tolist(), strict=True))
    assert calibration_error(reliability(honest, 5)) == pytest.approx(0, abs=0.015)
    assert calibration_error(reliability(guessing, 5)) == pytest.approx(0.25, abs=0.015)
    assert [(b.low, b.high) for b in reliability(honest, 5)] == [pytest.approx((i / 10, (i + 1) / 10)) for i in range(5, 10)]
    assert calibration_error(reliability([], 5)) is None
