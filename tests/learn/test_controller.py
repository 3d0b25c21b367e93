import pytest

from align.learn.controller import Evaluations, next_kl_coef
from align.settings import PPOSettings


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # at its target
        (6.6, 1 + 0.1 * 0.5),  # a tenth over, half a horizon
        (60.0, 1 + 0.2 * 0.5),  # more than a fifth over counts as a fifth
        (5.4, 1 - 0.1 * 0.5),
        (0.0, 1 - 0.2 * 0.5),
        (-3.0, 1 - 0.2 * 0.5),  # an estimate may be negative
    ],
)
def test_the_coefficient_moves_by_the_error_a_fifth_at_most(kl, factor):
    assert next_kl_coef(0.1, kl, 50, 6.0, 100) == pytest.approx(0.1 * factor)


def point(number, score, kl=0.0):
    return {"round": number, "score": score, "kl": kl}


def test_the_best_point_has_the_highest_score_less_the_price_of_its_kl():
    """At 0.1 a nat: 1, 2 - 0.5 = 1.5, 2.4 - 1.2 = 1.2."""
    evaluations = Evaluations()
    assert [evaluations.add(each, 0.1, None) for each in (point(0, 1.0), point(2, 2.0, 5), point(4, 2.4, 12))] == [True, True, False]
    assert evaluations.best_round == 2


def test_of_equal_points_the_first_is_the_best():
    evaluations = Evaluations()
    assert [evaluations.add(each, 0.0, None) for each in (point(0, 1.0), point(2, 1.0))] == [True, False]


def test_a_point_beyond_the_bound_is_not_the_best_and_ends_the_run():
    evaluations, settings = Evaluations(), PPOSettings(max_kl=10.0)
    assert evaluations.best_round is None
    evaluations.add(point(0, 1.0), 0.0, 10.0)
    assert evaluations.reason_to_end(settings) == ""
    assert not evaluations.add(point(2, 9.0, 10.5), 0.0, 10.0)
    assert evaluations.reason_to_end(settings) == "held-out KL is 10.5 nats per completion, over max_kl=10.0"
    assert evaluations.best_round == 0


def test_patience_counts_from_the_best_point():
    evaluations, settings, reasons = Evaluations(), PPOSettings(patience=2), []
    for number, score in enumerate([0.0, 2.0, 1.0, 3.0, 2.0, 2.5]):
        evaluations.add(point(4 * number, score), 0.0, None)
        reasons.append(evaluations.reason_to_end(settings))
    assert reasons == [""] * 5 + ["2 evaluations in a row were not better than that after round 12"]
    assert evaluations.reason_to_end(PPOSettings()) == ""
