"""What is said of a source: counts, refusals with their places, duplicates, contradictions, length bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import AlignError

if TYPE_CHECKING:
    from align.data.convert import Converted
    from align.data.formats import Format

DUPLICATE = "duplicate of an earlier record"
PLACES_SHOWN = 5
NOTHING_WRONG = (DUPLICATE, "nothing in it to make a record of")  # left out, but not bad: they do not count towards max_bad_rows


def describe(converted: Converted, formats: Sequence[Format], rows: int) -> dict[str, Any]:
    """Everything that can be said of a source without a tokenizer, as JSON.

    Args:
        converted: its Arrow files.
        formats: of each file.
        rows: how many rows the files hold.
    """
    import pyarrow.compute as pc

    table = converted.table
    kept = pc.is_null(table["reason"]).to_numpy()
    first = first_of(table["digest"].to_numpy(), kept)
    refused = {int(at): table["reason"][int(at)].as_py() or DUPLICATE for at in np.flatnonzero(~first)}  # in the order of the rows
    kind = formats[0].kind
    gathers = any(format.gathers for format in formats)  # then a record has the place of the first of its rows
    lines = rows - int((~kept).sum()) if gathers else _distinct_lines(table, first)
    report: dict[str, Any] = {
        "kind": kind,
        "format": ", ".join(dict.fromkeys(format.name for format in formats)),
        "why": formats[0].why,
        "columns": dict(formats[0].columns),
        "formats": [asdict(format) for format in formats],
        "rows": rows,
        "kept": lines,
        "records": int(first.sum()),
        "rejected": dict(Counter(refused.values()).most_common()),
        "places": _places(table, refused),
        "characters": _spread(table["characters"].to_numpy()[first]),
    }
    if kind == "preference":
        report["pairs"] = pair_facts(table, first)
    return report


def first_of(digests: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """True at the first kept record of each digest. Shape (records,)."""
    ordered = digests[kept]
    ordered.sort()
    if (ordered[1:] != ordered[:-1]).all():  # a third of the time that the places take below
        return kept
    at = np.flatnonzero(kept)
    _, firsts = np.unique(digests[at], return_index=True)
    first = np.zeros(len(digests), dtype=bool)
    first[at[firsts]] = True
    return first


def _distinct_lines(table: Any, kept: np.ndarray) -> int:
    """Rows of the files that gave at least one record."""
    file, line = table["file"].to_numpy()[kept], table["line"].to_numpy()[kept]
    return min(len(line), 1) + int(((file[1:] != file[:-1]) | (line[1:] != line[:-1])).sum())  # they are in order


def _places(table: Any, refused: dict[int, str]) -> dict[str, list[list]]:
    """[file, line, detail] of the first few records refused for each reason."""
    places: dict[str, list[list]] = {}
    for at, reason in refused.items():
        shown = places.setdefault(reason, [])
        if len(shown) < PLACES_SHOWN:
            shown.append([table["file"][at].as_py(), table["line"][at].as_py(), table["detail"][at].as_py() or ""])
    return places


def _spread(numbers: np.ndarray) -> dict[str, int]:
    """Smallest, median, 95th percentile, largest and sum."""
    if not len(numbers):
        return {}
    low, middle, high, top = np.percentile(numbers, [0, 50, 95, 100])
    return {"min": int(low), "median": int(middle), "p95": int(high), "max": int(top), "sum": int(numbers.sum(dtype=np.int64))}


def pair_facts(table: Any, kept: np.ndarray) -> dict[str, Any]:
    """Length bias, ties, soft labels and contradicting labels of preferences.

    `longer_is_better` is how often the longer side is the better one, over pairs that are decided and differ in length: what
    a reward model reaches that has learned nothing but length.
    """
    longer, probability = table["longer"].to_numpy()[kept], table["probability"].to_numpy()[kept]
    decided = (probability != 0.5) & (longer != 0)
    agrees = (longer > 0) == (probability > 0.5)
    pair = table["pair"].to_numpy()[kept][probability != 0.5]
    pair.sort()
    return {
        "longer_is_better": float(agrees[decided].mean()) if decided.any() else None,
        "same_length": int((longer == 0).sum()),
        "ties": int((probability == 0.5).sum()),
        "soft": int(((probability != 0.5) & (probability != 1.0)).sum()),
        "margins": int((table["margin"].to_numpy()[kept] != 0).sum()),
        "labelled_both_ways": int((pair[1:] == pair[:-1]).sum()),  # the same label twice is a duplicate, left out already
    }


def bad_rows(report: dict[str, Any]) -> int:
    """Refused records that something is wrong with."""
    return sum(count for reason, count in report["rejected"].items() if reason not in NOTHING_WRONG)


def refuse_if_too_bad(report: dict[str, Any], max_bad_rows: float, where: str, stage: str) -> None:
    """Stop a stage whose data is not what it seems.

    Args:
        report: of a source.
        max_bad_rows: largest share of bad rows that may be left out.
        where: the stage and its input, such as 'sft.data'.
        stage: the stage's name.

    Raises:
        AlignError: with the reasons, their counts and first places, or where no record is left.
    """
    places = {
        reason: [f"{report['files'][file]['path']}:{line}" + (f" ({detail})" if detail else "") for file, line, detail in places[:3]]
        for reason, places in report["places"].items()
    }
    path = report["files"][0]["path"]
    advice = f"  It was read as {report['format']}: {report['why'].rstrip('.')}.\n  See every row of it: align inspect {path}"
    rows = max(report["rows"], report["records"])
    stop_if_bad(where, report["rejected"], places, bad_rows(report), rows, report["records"], max_bad_rows, stage, advice)


def stop_if_bad(
    where: str,
    counts: dict[str, int],
    places: dict[str, list[str]],
    bad: int,
    rows: int,
    left: int,
    max_bad_rows: float,
    stage: str,
    advice: str = "",
) -> None:
    """Raise where `bad` of `rows` is over the limit or nothing is left, with reasons, counts and first places.

    Raises:
        AlignError: then.
    """
    if left and bad / max(rows, 1) <= max_bad_rows:  # not bad <= max_bad_rows * rows: 0.29 * 100 is less than 29
        return
    share = f"{bad} of {rows} rows cannot be used ({bad / max(rows, 1):.1%}; at most {max_bad_rows:.1%} may be left out)"
    lines = [f"{where}: {share if bad else 'no row is left to use'}:"]
    for reason, count in counts.items():
        lines.append(f"  {count:>6,}  {reason}: {', '.join(places.get(reason, []))}{', ...' if count > 3 else ''}")
    lines += [advice] if advice else []
    if left and bad:
        lines.append(f"  To go on without them: --set {stage}.max_bad_rows={min(1.0, bad / rows + 0.005):.2f}")
    raise AlignError("\n".join(lines))
