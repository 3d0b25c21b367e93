import json
from dataclasses import asdict

import pytest

from align.learn.watch import Watch
from align.settings import PPOSettings

WELL = {
    "kl": 3.0,
    "kl_coef": 0.05,
    "length": 40.0,
    "entropy": 2.0,
    "cut": 0.1,
    "repetition": 0.02,
    "score": 0.5,
    "raw_score": 0.5,
    "raw_score_spread": 1.0,
    "explained_variance": 0.3,
}


def told(*rounds, **settings):
    """What is told after the given changes of a good round's metrics, one round after the other; the first is as it should be."""
    watch, found = Watch(), []
    for number, changes in enumerate(({}, *rounds), 1):
        found.append(watch.look(number, {**WELL, **changes}, PPOSettings(**settings)))
    return found


def test_a_run_that_is_well_is_told_nothing():
    assert told(*[{}] * 20) == [[]] * 21


SIGNS = {
    "KL runs away": ({"kl": 26.0}, {}, "KL to the reference is 26 nats per completion", "Raise kl_coef (0.05), set kl_target, or lower"),
    "entropy collapses": ({"entropy": 0.3}, {}, "entropy fell from 2.00 to 0.30 nats per token", "Set entropy_coef"),
    "answers repeat themselves": ({"repetition": 0.4}, {}, "40% of an answer's trigrams were there before", "raise kl_coef (0.05)"),
    "every completion is cut": ({"cut": 1.0}, {}, "100% of the completions hit the limit of 64 tokens", "Raise max_new_tokens"),
    "scores saturate": ({"raw_score_spread": 0.001}, {}, "the scores hardly differ any more (spread 0.001, mean 0.5)", "(iterations)"),
    "scores are clipped": ({"score": 0.99}, {"clip_scores": 1.0}, "the scores are at clip_scores (1.0)", "Raise it"),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_what_goes_wrong_is_told_once_with_the_setting_to_change(sign):
    changes, settings, what, cure = SIGNS[sign]
    first, second, third = told(changes, changes, **settings)
    assert first == third == []
    (text,) = second
    assert what in text
    assert cure in text


def test_scores_that_never_differed_are_told_in_the_first_round():
    watch = Watch()
    (text,) = watch.look(1, {**WELL, "raw_score_spread": 0.0, "raw_score": -1.0}, PPOSettings())
    assert "every completion has the same score (-1): there is nothing to learn from" in text
    assert watch.look(2, WELL, PPOSettings()) == []


def test_a_value_that_explains_nothing_is_told_once_it_had_time_to_learn():
    found = told(*[{"explained_variance": -0.1}] * 11)
    assert [number for number, texts in enumerate(found, 1) if texts] == [8]
    assert "the value explains nothing of the returns (explained variance -0.10 over 5 rounds)" in found[7][0]
    assert "estimator=rloo" in found[7][0]
    assert told(*[{"explained_variance": 0.01}] * 11) == [[]] * 12


def test_an_estimator_without_a_value_is_told_nothing_of_one():
    watch = Watch()
    without = {name: number for name, number in WELL.items() if name != "explained_variance"}
    assert [watch.look(number, without, PPOSettings(estimator="rloo")) for number in range(1, 15)] == [[]] * 14


@pytest.mark.parametrize(("kl", "changes", "settings"), [(50.0, {"length": 500.0}, {}), (50.0, {}, {"kl_target": 20.0})])
def test_a_kl_that_is_long_or_wanted_is_no_sign(kl, changes, settings):
    assert told({"kl": kl, **changes}, **settings) == [[], []]


def test_what_was_told_is_not_told_again_after_a_resumption():
    watch = Watch()
    watch.look(1, WELL, PPOSettings())
    assert watch.look(2, {**WELL, "cut": 1.0}, PPOSettings())
    again = Watch(**json.loads(json.dumps(asdict(watch))))
    assert again == watch
    assert [text.partition(":")[0] for text in again.told.values()] == ["round 2"]
    assert again.look(3, {**WELL, "cut": 1.0}, PPOSettings()) == []
