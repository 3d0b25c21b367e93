"""From data rows to examples: rendering, over-length rows, and the split by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.markup import escape

from align.chat import UnfitMessages
from align.errors import AlignError
from align.model.packing import Example
from align.progress import say
from align.records import Row
from align.settings import Training

R = TypeVar("R", bound=Row)


@dataclass
class Examples(Generic[R]):
    """Training and held-out examples; an example's index is its row's place in `rows` and `where`."""

    rows: list[R]
    where: list[str]  # file:line
    training: list[Example]
    heldout: list[Example]
    facts: dict[str, Any]


def prepare(
    name: str, path: Path, rows: list[R], render: Callable[[int, R], Example], split_key: Callable[[R], str], settings: Training
) -> Examples[R]:
    """Render every row, deal with those that are too long, and split by prompt.

    Raises:
        AlignError: for a row that cannot be rendered or has nothing to train on, for one over max_length where that is an
            error, and where nothing is left.
    """
    where = [f"{path}:{row.source_line}" for row in rows]
    kept: list[tuple[R, Example]] = []
    overlong: list[int] = []
    for index, row in enumerate(rows):
        try:
            example = render(index, row)
        except UnfitMessages as error:
            raise AlignError(f"{where[index]}: {error}.") from None
        if not example.trained_tokens:
            raise AlignError(f"{where[index]}: nothing in it would be trained on.")
        if example.longest > settings.max_length:
            overlong.append(index)
        else:
            kept.append((row, example))
    _report_overlong(name, overlong, where, len(rows), settings)
    training = [e for row, e in kept if not is_heldout(split_key(row), settings.holdout, settings.seed)]
    heldout = [e for row, e in kept if is_heldout(split_key(row), settings.holdout, settings.seed)]
    if not training:
        raise AlignError(f"{path}: no row is left to train on ({len(overlong)} over {name}.max_length, {len(heldout)} held out).")
    facts = {"training": len(training), "heldout": len(heldout), "overlong": len(overlong)}
    tokens = sum(example.tokens for example in training)
    say(f"  {name}: {len(training)} rows to train on ({tokens:,} tokens), {len(heldout)} held out, {len(overlong)} over max_length")
    return Examples(rows, where, training, heldout, {**facts, "tokens": tokens})


def _report_overlong(name: str, overlong: Sequence[int], where: Sequence[str], rows: int, settings: Training) -> None:
    if overlong and settings.on_overlong == "error":
        raise AlignError(
            f"{where[overlong[0]]}: over {name}.max_length of {settings.max_length} tokens, with {len(overlong) - 1} more of {rows} rows. "
            f"Raise it (--set {name}.max_length=...), or leave such rows out: --set {name}.on_overlong=drop"
        )
    if overlong:
        first = ", ".join(where[i] for i in overlong[:3])
        say(f"  [yellow]{name}: {len(overlong)} of {rows} rows over {settings.max_length} tokens are left out[/] (first: {escape(first)})")


def is_heldout(key: str, share: float, seed: int) -> bool:
    """Whether a prompt belongs to the held-out share: by its hash, so adding rows moves no other row."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
