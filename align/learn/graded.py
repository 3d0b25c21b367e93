"""How a reward model's held-out pairs came out: by the file they are from, by who is longer, by how sure it was. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, NamedTuple

from align.confidence import calibration_error, reliability, wilson_interval

BINS = 5  # of how sure it was, from one half to one
LONGER = 1.5  # times as long as the other is what is called longer
LENGTHS = ("the better one is longer", "about as long", "the better one is shorter")


class Graded(NamedTuple):
    """A pair of which people prefer one completion."""

    right: bool  # whether the reward model does too
    sure: float  # the probability that its scores give to the one it prefers (Bradley and Terry 1952)
    better: int  # tokens of the one that people prefer
    worse: int  # tokens of the other
    source: str  # the file it is from

    @property
    def longer_earned(self) -> float:
        """What 'the longer one' earns here; half where both are equally long."""
        return 0.5 if self.better == self.worse else float(self.better > self.worse)

    @property
    def length(self) -> str:
        """Who is longer."""
        return LENGTHS[0] if self.better > LONGER * self.worse else LENGTHS[2] if self.worse > LONGER * self.better else LENGTHS[1]


def breakdown(pairs: Sequence[Graded]) -> dict[str, Any]:
    """Accuracy by length and by source, where there are several, and how often it is right by how sure it is.

    Args:
        pairs: held out; at least one.

    Returns:
        `by_length` and `by_source`: for each group `pairs`, `accuracy`, `accuracy_interval` and `longer_is_better_accuracy`;
        `calibration`, bins of pairs; and `calibration_error`.
    """
    bins = reliability([(pair.sure, float(pair.right)) for pair in pairs], BINS)
    sources = sorted({pair.source for pair in pairs})
    return {
        "by_length": {name: _accuracy(group) for name in LENGTHS if (group := [pair for pair in pairs if pair.length == name])},
        "by_source": {name: _accuracy([pair for pair in pairs if pair.source == name]) for name in sources} if len(sources) > 1 else {},
        "calibration": [{**asdict(each), "interval": wilson_interval(each.right * each.n, each.n)} for each in bins],
        "calibration_error": calibration_error(bins),
    }


def _accuracy(pairs: Sequence[Graded]) -> dict[str, Any]:
    right = sum(pair.right for pair in pairs)
    return {
        "pairs": len(pairs),
        "accuracy": right / len(pairs),
        "accuracy_interval": wilson_interval(right, len(pairs)),
        "longer_is_better_accuracy": fmean(pair.longer_earned for pair in pairs),
    }
