"""From raw scores to those that a round optimises: centred, scaled by a running deviation, clipped, with ends and length judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from align.settings import PPOSettings


@dataclass
class RunningScores:
    """Mean and deviation of every raw score so far, joined round by round (Chan, Golub & LeVeque 1983, eq. 1.5)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean
    first_mean: float = 0.0  # of the first round

    def add(self, scores: Tensor) -> None:
        """Take in a round's scores. Shape (completion,)."""
        new = scores.double()
        if not len(new):
            return
        total, distance = self.count + len(new), float(new.mean()) - self.mean
        self.squares += float(((new - new.mean()) ** 2).sum()) + distance**2 * self.count * len(new) / total
        self.mean += distance * len(new) / total
        self.first_mean = self.first_mean if self.count else self.mean
        self.count = total

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 where all scores were the same."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        return deviation if deviation > 1e-8 * max(1.0, abs(self.mean)) else 1.0


def shape_scores(raw: Tensor, ended: Tensor, lengths: Tensor, running: RunningScores, settings: PPOSettings) -> Tensor:
    """The scores that a round optimises.

    Args:
        raw: weighted sums of the rewards. Shape (completion,).
        ended: True where a completion ended its turn. Shape (completion,).
        lengths: tokens of each completion. Shape (completion,).
        running: of all raw scores so far, this round's among them.
        settings: what is done, in the order of the lines below.

    Returns:
        Shape (completion,).
    """
    scores = raw - running.first_mean if settings.centre_scores else raw
    scores = scores / running.deviation if settings.scale_scores else scores
    if settings.clip_scores is not None:
        scores = scores.clamp(-settings.clip_scores, settings.clip_scores)
    if settings.missing_eos_score is not None:
        scores = torch.where(ended, scores, torch.full_like(scores, settings.missing_eos_score))
    return scores - settings.length_penalty * lengths if settings.length_penalty else scores


def scores_that_count(raw: Tensor, ended: Tensor, settings: PPOSettings) -> Tensor:
    """The raw scores that are not replaced: what running statistics are of. Shape (some of the completions,)."""
    return raw if settings.missing_eos_score is None else raw[ended]
