"""Which of two replies a label means: the codings of votes, and how the values of a file tell them apart."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from align.data.rows import number_of

CODINGS = {
    "1/2": "1 is the first, 2 the second, 0 a tie",
    "0/1": "0 is the first, 1 the second, 2 a tie",
    "1/0": "1 is the first, 0 the second",
    "signed": "below zero the first, above it the second, 0 a tie",
    "names": "the side is named, or a tie",
}
_SHARES = {"1/2": {1: 1.0, 2: 0.0, 0: 0.5}, "0/1": {0: 1.0, 1: 0.0, 2: 0.5}, "1/0": {1: 1.0, 0: 0.0}}
TIES = {"tie", "tied", "ties", "same", "equal", "equally", "draw", "both", "neither", "bothbad", "c"}
_FIRST, _SECOND = {"a", "first", "left", "one"}, {"b", "second", "right", "two"}
_COMPARED = re.compile(r"\W*([ab12])\s*(>+|<+|=+)\s*([ab12])\W*")


def words_of(name: str) -> tuple[str, ...]:
    """The words of a name in lower case: 'chosenResponse_2' is ('chosen', 'response', '2')."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+", str(name))
    return tuple(part.lower() for part in parts)


def share_of_first(value: Any, coding: str, first: str = "", second: str = "") -> float | None:
    """The share of a vote that goes to the first reply: 1, 0, or half of a tie; None where it cannot be read.

    Args:
        value: the label as the file has it.
        coding: one of `CODINGS`.
        first: the column of the first reply, which a label may name.
        second: that of the second.
    """
    number = number_of(value)
    if number is not None:
        if coding == "signed":
            return 0.5 if number == 0 else float(number < 0)
        if coding != "names":
            return _SHARES[coding].get(number)  # type: ignore[call-overload]
    if not isinstance(value, str):
        return None
    if value in (first, second):
        return float(value == first)
    if compared := _COMPARED.fullmatch(value.lower()):
        return _share_of_comparison(*compared.groups())
    words = set(words_of(value))
    if words & TIES:
        return 0.5
    firsts, seconds = words & (_FIRST | _marker(first, second)), words & (_SECOND | _marker(second, first))
    return float(bool(firsts)) if bool(firsts) != bool(seconds) else None


def coding_of(values: Collection[Any], first: str, second: str, first_scores_higher: float | None = None) -> str:
    """The coding that a file's labels are in, by all their values and by how the columns of the replies count.

    Args:
        values: the different labels of a sample.
        first: the column of the first reply.
        second: that of the second.
        first_scores_higher: among rows labelled 1, the share where the first reply has the higher score, if there are scores.

    Returns:
        One of `CODINGS`; empty if most values can be read in none.
    """
    numbers = {number for value in values if (number := number_of(value)) is not None}
    if not numbers:
        read = [share_of_first(value, "names", first, second) is not None for value in values]
        return "names" if sum(read) * 2 > len(read) else ""
    if any(number != int(number) for number in numbers) or max(numbers) > 2 and min(numbers) >= 0:
        return ""
    counts_from_zero = "0" in _marker(first, second)
    if min(numbers) < 0:
        return "signed" if min(numbers) >= -10 and max(numbers) <= 10 else ""
    if 2 in numbers:
        return "0/1" if counts_from_zero and 0 in numbers else "1/2"
    if numbers == {1.0} and not counts_from_zero:
        return "1/2"
    return "1/0" if _one_means_first(first, second, first_scores_higher) else "0/1"


def _one_means_first(first: str, second: str, first_scores_higher: float | None) -> bool:
    """SHP's labels say whether the first is preferred, where others number the better one; scores beside them tell."""
    if first_scores_higher is not None:
        return first_scores_higher > 0.5
    return {"human", "ref"} <= set(words_of(first)) & set(words_of(second))


def _marker(name: str, other: str) -> set[str]:
    """What tells a column from the other one of a pair: the '1' of response1."""
    return set(words_of(name)) - set(words_of(other))


def _share_of_comparison(left: str, sign: str, right: str) -> float | None:
    if left == right:
        return None
    if sign[0] == "=":
        return 0.5
    better = left if sign[0] == ">" else right
    return float(better in "a1")
