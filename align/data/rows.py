"""What every converter shares: the format of a file, and single values of a row, read or found unfit."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from align.records import Kind

Convert = Callable[[Mapping], list[dict]]


class Unfit(ValueError):
    """A row that cannot be a record.

    Attributes:
        reason: a short class of problem that rows share, as "response1 is not text".
        detail: what was found in this row.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Format:
    """What the rows of a file are, and which of their columns is which of our fields.

    Attributes:
        columns: our field to their column or columns; `list[].key` is the key of each item in a column of lists.
        why: one sentence for a person on what in the columns and values decided it.
        gathers: whether rows must be gathered by `group_key` before they are converted.
        coding: how the values of the file are to be read where its columns do not tell: which side a label means, or how
            a transcript marks its turns.
    """

    name: str
    kind: Kind
    columns: dict[str, str | tuple[str, ...]]
    why: str
    gathers: bool = False
    coding: str = ""

    def column(self, field: str) -> str:
        """The one column of a field; empty if the file has none."""
        column = self.columns.get(field, "")
        return column if isinstance(column, str) else column[0]

    def several(self, field: str) -> tuple[str, ...]:
        """All columns of a field."""
        columns = self.columns.get(field, ())
        return (columns,) if isinstance(columns, str) else columns


def shown(value: Any, limit: int = 60) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def text_of(value: Any, column: str) -> str:
    """The value, which must be text."""
    if isinstance(value, str):
        return value
    raise Unfit(f"{column} is missing") if value is None else Unfit(f"{column} is not text", shown(value))


def number_of(value: Any) -> float | None:
    """A finite number, also written as text; None for anything else. True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def parsed(text: str) -> Any:
    """What a text says that holds JSON, or a list or dict as Python writes it; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def list_of(value: Any, column: str) -> list:
    """A list, also written as JSON text as CSV files have it."""
    found = parsed(value) if isinstance(value, str) else value
    if isinstance(found, list | tuple):
        return list(found)
    raise Unfit(f"{column} is missing") if value is None else Unfit(f"{column} is not a list", shown(value))
