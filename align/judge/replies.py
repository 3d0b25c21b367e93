"""Replies of judges that were recorded elsewhere: read again by our own reader, and held against labels or people's votes.

Two forms are known by their columns: replies in both orders beside a label (LLMBar's), and a verdict beside the number of a pair
(PandaLM's), whose votes are in a file of their own. Imports no torch; no judge is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.data.formats import recognise
from align.data.read import Unreadable, first_rows, parts, rows
from align.data.rows import Format, number_of, shown
from align.data.votes import share_of_first
from align.errors import AlignError
from align.judge.agreement import Right, Share, as_json, kappa
from align.judge.judgement import Reply, Verdict, verdict_of
from align.judge.verdict import read_recorded

ORDERS = (("ab", False), ("ba", True))  # output 1 shown first, output 2 shown first
GROUP = ("subset", "judge", "strategy")
KEYS = ("idx", "index", "id", "question_id")  # of a pair
RESULTS = ("result", "verdict", "winner")  # a column of one of these names, or one that ends so after '_'
SEEN_FOR_FORMAT = 1000  # rows


class Recorded(NamedTuple):
    """What one judge said of one pair, as our reader understands it; None in an order that was not asked."""

    group: tuple[Any, ...]
    right: Right
    verdicts: tuple[Verdict | None, Verdict | None]
    recorded: tuple[Verdict | None, Verdict | None]  # as the file has understood it itself; None where it doesn't say


def replay(path: Path, gold: Path | None) -> dict[str, Any]:
    """The figures of a file of replies.

    Args:
        path: the replies.
        gold: people's votes, for replies that have no labels beside them.

    Returns:
        `groups`: for every subset, judge and strategy (null where the file has no such column) the number of pairs `n`, and counts
        of pairs: `correct_ab` and `correct_ba` (right where output 1 was shown first, and second), `correct_both`, `agree` (the same
        in both orders, unreadable in both included); `kappa` between the orders; null for what needs an order that was not asked.
        A reply that cannot be read is not right; it is counted in `unparsed_ab` and `unparsed_ba`. `shares` has the shares of n with
        their intervals.

    Raises:
        AlignError: for a file in neither form, with its columns; for votes that are missing, or given though nothing needs them.
    """
    first = first_rows(path, SEEN_FOR_FORMAT)
    columns = list(dict.fromkeys(name for row in first for name in row))
    both = "label" in columns and any(f"{kind}_{order}" in columns for kind in ("raw", "winner") for order, _ in ORDERS)
    result = next((name for name in columns if name.lower() in RESULTS or name.lower().rpartition("_")[2] in RESULTS), None)
    key = next((name for name in KEYS if name in columns), None)
    if both:
        if gold is not None:
            raise AlignError(f"--gold {gold}: {path} has its labels beside the replies. Leave --gold out.")
        found = _beside_labels(path, columns)
    elif result and key:
        if gold is None:
            raise AlignError(f"--replies {path}: has verdicts ({result!r}) by {key!r} and no labels. Add the people's votes: --gold FILE")
        found = _against_votes(path, gold, key, result)
    else:
        raise AlignError(
            f"--replies {path}: the columns are not known. Found: {', '.join(columns)}.\n"
            "  Expected raw_ab, raw_ba and label (with subset, judge and strategy where there are several), or idx and one that ends "
            "with _result, with people's votes in --gold."
        )
    return {"replies": str(path), "gold": None if gold is None else str(gold), "groups": figures(found)}


def figures(found: Iterable[Recorded]) -> list[dict[str, Any]]:
    """The figures of every group, in the order of the file."""
    groups: dict[tuple[Any, ...], list[Recorded]] = {}
    for one in found:
        groups.setdefault(one.group, []).append(one)
    return [{**dict(zip(GROUP, group, strict=True)), **_figures(members)} for group, members in groups.items()]


def _figures(pairs: Sequence[Recorded]) -> dict[str, Any]:
    right = [pair.right for pair in pairs]
    ab, ba = ([pair.verdicts[at] for pair in pairs] for at in (0, 1))
    asked = {order: None not in said for order, said in (("ab", ab), ("ba", ba))}
    counts: dict[str, int | None] = {
        "correct_ab": sum(map(_same, ab, right)) if asked["ab"] else None,
        "correct_ba": sum(map(_same, ba, right)) if asked["ba"] else None,
        "correct_both": sum(a == b == r for a, b, r in zip(ab, ba, right, strict=True)) if all(asked.values()) else None,
        "agree": sum(map(_same, ab, ba)) if all(asked.values()) else None,
    }
    n = len(pairs)
    # LLMBar's own kappa is of one question, whether output 1 won; what cannot be read is among the noes.
    between = kappa([v == "a" for v in ab], [v == "a" for v in ba]) if all(asked.values()) else None
    read = [(a, b) for a, b in zip(ab, ba, strict=True) if a != "unparsed" != b]
    known = [(ours, theirs) for pair in pairs for ours, theirs in zip(pair.verdicts, pair.recorded, strict=True) if theirs is not None]
    return {
        "n": n,
        **counts,
        "kappa": between,
        "kappa_read": kappa([a for a, _ in read], [b for _, b in read]) if all(asked.values()) else None,
        **{f"kappa_gold_{order}": _kappa_gold(said, right) if asked[order] else None for order, said in (("ab", ab), ("ba", ba))},
        **{
            f"{what}_{order}": said.count(what) if asked[order] else None
            for what in ("tie", "unparsed")
            for order, said in (("ab", ab), ("ba", ba))
        },
        "first_position": as_json(_first_position(pairs)),
        "gold": {side: right.count(side) for side in ("a", "b", "tie")},
        "read_unlike_the_file": sum(ours != theirs for ours, theirs in known) if known else None,
        "shares": {name: None if count is None else as_json(Share(count, n)) for name, count in counts.items()},
    }


def _same(one: Any, other: Any) -> bool:
    return one == other


def _kappa_gold(said: Sequence[Verdict | None], right: Sequence[Right]) -> float | None:
    """Cohen's kappa of what could be read with what is right, ties a class of their own."""
    read = [(ours, gold) for ours, gold in zip(said, right, strict=True) if ours != "unparsed"]
    return kappa([ours for ours, _ in read], [gold for _, gold in read])


def _first_position(pairs: Sequence[Recorded]) -> Share:
    """Replies that take the side shown first, of those that take one."""
    ab, ba = (Counter(pair.verdicts[at] for pair in pairs) for at in (0, 1))
    return Share(ab["a"] + ba["b"], sum(said[side] for said in (ab, ba) for side in ("a", "b")))


# Files ----------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every row with its place; one that cannot be read is refused, for its pair would be missing."""
    for line, row in rows(parts(path, 1)[0]):
        if isinstance(row, Unreadable):
            raise AlignError(f"{path}:{line}: the row cannot be read: {row.reason}. Mend it, or leave it out.")
        yield f"{path}:{line}", row


def _beside_labels(path: Path, columns: Sequence[str]) -> Iterator[Recorded]:
    """Replies in one or both orders, beside the label 1 or 2."""
    for where, row in _rows(path):
        right = read_recorded(_plain(row.get("label")))
        if right == "unparsed":
            raise AlignError(f"{where}: 'label' is {row.get('label')!r}; expected 1 or 2, the better output, or 0 for a tie.")
        ab, ba = (_in_order(row, columns, order, swapped, where) for order, swapped in ORDERS)
        yield Recorded(tuple(row.get(name) for name in GROUP), _as_right(right), (ab[0], ba[0]), (ab[1], ba[1]))


def _in_order(
    row: Mapping[str, Any], columns: Sequence[str], order: str, swapped: bool, where: str
) -> tuple[Verdict | None, Verdict | None]:
    """What was said in one order as we read it, and as the file has read it; both in terms of the outputs."""
    winner = _winner(row.get(f"winner_{order}")) if f"winner_{order}" in columns else None
    if f"raw_{order}" in columns:
        return verdict_of(_read(row.get(f"raw_{order}"), where, f"raw_{order}"), swapped), winner
    return winner, None


def _read(text: Any, where: str, column: str) -> Reply:
    if text is not None and not isinstance(text, str):
        raise AlignError(f"{where}: {column!r} is {shown(text)}; expected the reply as text.")
    return Reply(read_recorded(text or ""), text or "")


def _winner(value: Any) -> Verdict:
    """A verdict that a file has already read, in terms of the outputs 1 and 2."""
    return verdict_of(Reply(read_recorded(_plain(value)), ""), swapped=False)


def _plain(value: Any) -> str:
    """A label or a number of a pair as text, however the file's form writes it: 1, 1.0 and '1' are '1'."""
    number = number_of(value)
    return str(int(number)) if number is not None and number == int(number) else "" if value is None else str(value)


def _as_right(said: str) -> Right:
    return {"first": "a", "second": "b", "tie": "tie"}[said]  # type: ignore[return-value]


def _against_votes(path: Path, gold: Path, key: str, result: str) -> Iterator[Recorded]:
    """Verdicts in the one order that was asked, joined with votes by the pair's number."""
    votes = _votes(gold, key)
    judge = result.rpartition("_")[0] or path.name.partition(".")[0]
    missing = []
    for where, row in _rows(path):
        number = _plain(row.get(key))
        if number not in votes:
            missing.append(f"{where} ({key} {row.get(key)!r})")
            continue
        yield Recorded((gold.name.partition(".")[0], judge, None), votes[number], (_winner(row.get(result)), None), (None, None))
    if missing:
        raise AlignError(f"--gold {gold}: has no votes on {len(missing):,} of the pairs of {path}, the first at {missing[0]}.")


def _votes(gold: Path, key: str) -> dict[str, Right]:
    """What most people say of each pair: a side or a tie that more than half of them are for, else a tie."""
    first = first_rows(gold, SEEN_FOR_FORMAT)
    form = recognise(first, "preference", f"--gold {gold}")
    if form.name != "votes" or form.coding in ("counts", "one-hot") or key not in first[0]:
        raise AlignError(
            f"--gold {gold}: found {form.name} with the columns {', '.join(first[0])}; expected votes on two replies and {key!r}, "
            "by which they are joined with the verdicts."
        )
    found: dict[str, Right] = {}
    for where, row in _rows(gold):
        number = _plain(row.get(key))
        if number in found:
            raise AlignError(f"{where}: {key} {row.get(key)!r} is there already; expected each pair once.")
        found[number] = _majority(row, form, where)
    return found


def _majority(row: Mapping[str, Any], form: Format, where: str) -> Right:
    given = [share_of_first(row.get(column), form.coding, *form.several("replies")) for column in form.several("votes")]
    if None in given:
        raise AlignError(f"{where}: the votes are {shown([row.get(c) for c in form.several('votes')])}; one of them cannot be read.")
    share, count = Counter(given).most_common(1)[0]
    return {1.0: "a", 0.0: "b"}.get(share, "tie") if count * 2 > len(given) else "tie"  # type: ignore[arg-type, return-value]
