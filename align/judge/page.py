"""An audit as a page with plots, and as JSON. The page is one file that needs nothing else, and takes every text for text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.confidence import wilson_interval
from align.errors import AlignError
from align.progress import printable

TEMPLATE = Path(__file__).with_name("page.html")
PAGE, FACTS = "audit.html", "audit.json"
_SHARES = {
    "correct": "right, both orders averaged",
    "correct_ab": "right, a shown first",
    "correct_ba": "right, b shown first",
    "correct_both": "right in both orders",
    "agree": "same verdict in both orders",
    "first_position": "takes the side shown first",
    "longer_wins": "prefers the longer side",
    "longer_is_right": "'the longer one' is right",
    "decided": "decided",
    "decided_correct": "right where it decided",
    "tied_replies": "replies that say tie",
    "unparsed_replies": "replies that cannot be read",
}
_NUMBERS = {
    "kappa": ("kappa between the orders", "{:.2f}"),
    "p_chance": ("p, better than chance", "{:.3f}"),
    "p_longer": ("p, better than the longer one", "{:.3f}"),
    "calibration_error": ("expected calibration error", "{:.3f}"),
    "price_per_thousand": ("price of 1,000 pairs", "{:,.2f}"),
    "seconds_per_thousand": ("seconds for 1,000 pairs", "{:,.0f}"),
}


def write(facts: Mapping[str, Any], folder: Path) -> Path:
    """Write audit.json and audit.html.

    Args:
        facts: from `align.judge.audit.facts`.
        folder: made if it is not there.

    Returns:
        The page.

    Raises:
        AlignError: where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FACTS).write_text(json.dumps(facts, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(page(facts), encoding="utf-8")
    except OSError as error:
        raise AlignError(
            f"{folder}: the audit cannot be written there ({error.strerror}). Give another folder with --out, or make room."
        ) from None
    return folder / PAGE


def page(facts: Mapping[str, Any]) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_finalized, trim_blocks=True)
    environment.filters |= {"percent": _percent, "across": _across, "shorten": _shorten}
    columns = _columns(facts)
    measured = facts["all_people"] or facts["all_planted"] or {}
    bins = [{**each, "interval": wilson_interval(each["right"] * each["n"], each["n"])} for each in measured.get("bins", [])]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        names=" and ".join(judge["name"] for judge in facts["judges"]),
        accuracy=[
            {"name": c["name"], "share": c["correct"], "baseline": c["longer_is_right"]} for c in columns if c["kind"] != "panel member"
        ],
        position=[{"name": c["name"], "share": c["first_position"], "baseline": None} for c in columns if _known(c["first_position"])],
        bins=bins,
        most=max((each["n"] for each in bins), default=0),
        error=measured.get("calibration_error"),
        calibrated="Pairs that people judged" if facts["all_people"] else "Planted pairs",
        columns=columns,
        table=_table(columns),
        mistakes=[example for example in facts["examples"] if example["kind"] == "mistake"],
        unread=[example for example in facts["examples"] if example["kind"] == "unparsed"],
    )


def _columns(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The statistics of every group, each with its name and kind."""
    found = [{"name": name, "kind": "people", **figures} for name, figures in facts["people"].items()]
    if len(found) > 1:
        found.append({"name": "all people's pairs", "kind": "people", **facts["all_people"]})
    found += [{"name": name, "kind": "planted", **figures} for name, figures in facts["planted"].items()]
    return found + [{"name": name, "kind": "panel member", **figures} for name, figures in facts["members"].items()]


def _table(columns: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, str]]]]:
    """One row for each figure that any group has."""
    rows = [("pairs", [_cell(f"{column['pairs']:,}") for column in columns])]
    for key, name in _SHARES.items():
        rows.append((name, [_share_cell(column[key]) for column in columns]))
    reasons = list(dict.fromkeys(reason for column in columns for reason in column["undecided"]))
    rows += [(f"undecided: {reason}", [_cell(f"{column['undecided'].get(reason, 0):,}") for column in columns]) for reason in reasons]
    for key, (name, form) in _NUMBERS.items():
        rows.append((name, [_cell(_number(column[key], form)) for column in columns]))
    return [(name, cells) for name, cells in rows if any(cell["text"] for cell in cells)]


def _cell(text: str, under: str = "") -> dict[str, str]:
    return {"text": text, "under": under}


def _share_cell(share: Mapping[str, Any] | None) -> dict[str, str]:
    if not _known(share):
        return _cell("")
    assert share is not None
    low, high = share["interval"]
    return _cell(_percent(share["share"]), f"{_percent(low)} to {_percent(high)}")


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return "< 0.001" if form == "{:.3f}" and 0 < value < 0.0005 else form.format(value)


def _known(share: Mapping[str, Any] | None) -> bool:
    return share is not None and share["share"] is not None


def _percent(share: float) -> str:
    return f"{max(share, 0.0):.1%}"  # a bound may fall below zero by a rounding error, and would show as -0.0%


def _across(share: float) -> float:
    """A share's place on the horizontal axis of a plot."""
    return round(12 + 336 * min(max(share, 0.0), 1.0), 2)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _finalized(value: Any) -> Any:
    """Control characters in texts of others are written out; numbers of the plots are kept short."""
    if isinstance(value, float) and math.isfinite(value):
        return round(value, 2)
    return printable(value) if type(value) is str else value
