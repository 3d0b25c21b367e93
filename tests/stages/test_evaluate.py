import math

import pytest

from align.model.generate import Completion
from align.model.packing import Example
from align.stages.evaluate import Answers, compare, interval


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


def test_an_interval_by_hand():
    """Numbers 0, 2: mean 1, deviation sqrt 2, half width 1.96 * sqrt 2 / sqrt 2 = 1.96."""
    assert interval([0.0, 2.0]) == pytest.approx([1 - 1.96, 1 + 1.96])
    assert interval([3.0]) is None
    assert math.isclose(interval([2.0, 2.0])[0], 2.0)
