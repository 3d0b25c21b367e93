import json
import statistics
from dataclasses import asdict

import pytest
import torch

from align.learn.shaping import RunningScores, scores_that_count, shape_scores
from align.settings import PPOSettings

RAW = torch.tensor([2.0, 3.0, -4.0, 8.0])
ENDED = torch.tensor([True, False, True, True])
LENGTHS = torch.tensor([2, 5, 1, 10])


def shaped(running=None, **changes):
    return shape_scores(RAW, ENDED, LENGTHS, running or RunningScores(), PPOSettings(**changes)).tolist()


def test_a_missing_end_replaces_the_score():
    assert shaped() == [2.0, -1.0, -4.0, 8.0]
    assert shaped(missing_eos_score=-7.0) == [2.0, -7.0, -4.0, 8.0]
    assert shaped(missing_eos_score=None) == [2.0, 3.0, -4.0, 8.0]


def test_the_length_penalty_is_for_every_token_of_every_completion():
    """0.5 a token: 2 - 1, -1 - 2.5, -4 - 0.5, 8 - 5."""
    assert shaped(length_penalty=0.5) == [1.0, -3.5, -4.5, 3.0]


def test_scores_are_centred_then_scaled_then_clipped_and_ends_replaced_last():
    """Less 1, by 2: 0.5, 1, -2.5, 3.5; clipped at 2; the second did not end."""
    running = RunningScores(count=2, mean=5.0, squares=8.0, first_mean=1.0)
    assert shaped(running, centre_scores=True, scale_scores=True, clip_scores=2.0) == [0.5, -1.0, -2.0, 2.0]


def test_running_statistics_are_those_of_all_scores_at_once():
    rounds = [torch.randn(size, generator=torch.Generator().manual_seed(size)) * size + 100 for size in (5, 1, 17, 2)]
    running = RunningScores()
    for number, scores in enumerate(rounds):
        running.add(scores)
        everything = torch.cat(rounds[: number + 1]).tolist()
        assert running.count == len(everything)
        assert running.mean == pytest.approx(statistics.fmean(everything), rel=1e-12)
        assert running.deviation == pytest.approx(statistics.pstdev(everything), rel=1e-9)
        assert running.first_mean == pytest.approx(statistics.fmean(rounds[0].tolist()), rel=1e-12)


def test_running_statistics_come_back_from_json_to_the_bit():
    running = RunningScores()
    running.add(torch.randn(7))
    again = RunningScores(**json.loads(json.dumps(asdict(running))))
    for each in (running, again):
        each.add(torch.ones(3) / 3)
    assert again == running


@pytest.mark.parametrize("scores", [[], [0.0, 0.0], [0.3, 0.3, 0.3], [1e6] * 5])
def test_scores_that_do_not_differ_are_not_scaled(scores):
    running = RunningScores()
    running.add(torch.tensor(scores))
    assert running.deviation == 1


def test_a_replaced_score_is_no_part_of_the_statistics():
    assert scores_that_count(RAW, ENDED, PPOSettings()).tolist() == [2.0, -4.0, 8.0]
    assert scores_that_count(RAW, ENDED, PPOSettings(missing_eos_score=None)).tolist() == RAW.tolist()
