"""Pairs of which the better side is known: by people's preferences. What a judge is measured on. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.judge.agreement import Right
from align.judge.judgement import Pair
from align.records import Message

if TYPE_CHECKING:
    import numpy as np

    from align.data.mix import Data


@dataclass(frozen=True)
class Known:
    """A pair and what is right of it; `group` is where it came from, a file or a kind of planted pair."""

    pair: Pair
    right: Right
    group: str

    @property
    def longer(self) -> int:
        """How many characters a has more than b."""
        return _characters(self.pair.a) - _characters(self.pair.b)


def known(prompt: list[Message], better: list[Message], worse: list[Message], group: str, seed: int) -> Known:
    """A pair with the better side as a or b by lot, so that the side says nothing."""
    if lot(seed, group, str(prompt), str(better), str(worse)) % 2:
        return Known(Pair(prompt, better, worse), "a", group)
    return Known(Pair(prompt, worse, better), "b", group)


def people(data: Data, count: int, seed: int, among: np.ndarray | None = None) -> list[Known]:
    """People's preferences, a sample of each source.

    Args:
        data: preferences; those with a probability of one half (a tie) have no right side and are left out.
        count: of each source, at most. Which ones, a hash of the pair decides, so that adding rows moves few.
        seed: of that choice.
        among: True where a preference may be used; none for all.
    """
    import numpy as np

    from align.data.mix import stirred

    found = []
    decided = np.flatnonzero((data.column("probability") != 0.5) & (True if among is None else among))
    order = decided[np.argsort(stirred(data.column("digest")[decided], seed), kind="stable")]
    for number, group in enumerate(names([source.path for source in data.sources])):
        chosen = np.sort(order[data.chosen[order, 0] == number][:count])
        for source, place in data.chosen[chosen]:
            record = data.converted[source].record(int(place))
            sides = record["chosen"], record["rejected"]
            better, worse = sides if record.get("chosen_probability", 1.0) > 0.5 else sides[::-1]
            found.append(known(record["prompt"], better, worse, group, seed))
    return found


def names(paths: Sequence[str]) -> list[str]:
    """What to call files: their names, or whole paths where two have the same name."""
    short = [Path(path).name for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def lot(seed: int, *texts: str) -> int:
    """A number that depends on the seed and the texts alone."""
    return int.from_bytes(hashlib.sha256("\x1f".join([str(seed), *texts]).encode()).digest()[:8], "big")


def _characters(side: list[Message]) -> int:
    return sum(len(message["content"]) for message in side)
