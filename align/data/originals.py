"""The rows of a data set as they are in its files, with every column: what a reward function is given beside the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.data.mix import Data
from align.data.read import parts, rows
from align.data.sources import hub_rows


def original_rows(data: Data, indices: Sequence[int]) -> list[dict[str, Any]]:
    """The row that each of these records was made from; the first of them where several rows made one.

    Args:
        data: records.
        indices: places of records in it.
    """
    wanted: dict[tuple[int, int, int], list[int]] = {}  # source, file, line -> places in the answer
    for number, index in enumerate(indices):
        source, at = map(int, data.chosen[index])
        table = data.converted[source].table
        wanted.setdefault((source, table["file"][at].as_py(), table["line"][at].as_py()), []).append(number)
    found: dict[int, dict[str, Any]] = {}
    for source, file in sorted({key[:2] for key in wanted}):
        for line, row in _rows(data, source, file):
            for number in wanted.get((source, file, line), ()):
                found[number] = row
    return [found[number] for number in range(len(indices))]


def places_of(data: Data, records: Sequence[Any]) -> list[int]:
    """Where some of a data set's own records, in its order, are in it."""
    numbered = enumerate(data.records())
    return [next(at for at, record in numbered if record == one) for one in records]


def _rows(data: Data, source: int, file: int) -> Iterator[tuple[int, Any]]:
    """Every row of one file of a source, with its number."""
    described = data.converted[source].report["files"][file]
    if not described["sha256"]:
        yield from hub_rows(data.sources[source], data.sources[source].path)
        return
    for part in parts(Path(described["path"]), 1):
        yield from rows(part)
