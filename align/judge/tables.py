"""Audits and recorded replies as tables in the terminal."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rich.table import Table

from align.inspect import escape
from align.progress import console, say


def show_audit(told: dict[str, Any]) -> None:
    """The audit as a table and the verdict in words."""
    table = _table("", "pairs", "right", "95%", "longer", "ab", "ba", "kappa", "first", "decided", "unread")
    for name, figures in [*told["people"].items(), *told["planted"].items(), *told["members"].items()]:
        shares = [_share(figures[key]) for key in ("longer_is_right", "correct_ab", "correct_ba")]
        table.add_row(
            escape(name),
            f"{figures['pairs']:,}",
            _share(figures["correct"], "{:.1%}"),
            _interval(figures["correct"]),
            *shares,
            _number(figures["kappa"]),
            *(_share(figures[key]) for key in ("first_position", "decided", "unparsed_replies")),
        )
    console.print(table)
    if measured := told["all_people"] or told["all_planted"]:
        seconds, price = measured["seconds_per_thousand"], measured["price_per_thousand"]
        shown = "unknown" if seconds is None else f"{seconds:,.0f} s of the judge's time, one reply after the other"
        console.print(f"1,000 pairs: {shown}; price {'unknown' if price is None else f'{price:,.2f}'}")
    colour = "green" if told["accepted"] else "red"
    console.print(f"[bold {colour}]{told['verdict']}[/]: {escape(_sentence(told['reasons']))}")
    for remark in told["remarks"]:
        console.print(f"[yellow]note[/]: {escape(remark)}")


def show_replies(groups: list[dict[str, Any]]) -> None:
    """The figures of recorded replies as a table."""
    table = _table("", "pairs", "ab", "ba", "both", "agree", "kappa", "gold", "ties", "unread")
    for group in groups:
        name = " ".join(str(group[key]) for key in ("subset", "judge", "strategy") if group[key] is not None)
        shares = (_share(group["shares"][key], "{:.1%}") for key in ("correct_ab", "correct_ba", "correct_both", "agree"))
        with_gold = [kappa for order in ("ab", "ba") if (kappa := group[f"kappa_gold_{order}"]) is not None]
        counts = (str(sum(group[f"{what}_{order}"] or 0 for order in ("ab", "ba"))) for what in ("tie", "unparsed"))
        table.add_row(
            escape(name), f"{group['n']:,}", *shares, _number(group["kappa"]), _number(fmean(with_gold) if with_gold else None), *counts
        )
    console.print(table)
    say("ab, ba: right with output 1 shown first, and second; kappa: between the orders; gold: kappa with what is right")


def _sentence(parts: list[str]) -> str:
    return "; ".join(parts) + "."


def _table(*columns: str) -> Any:
    """A table whose first column is names, and the others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
    return table


def _share(share: dict[str, Any] | None, form: str = "{:.0%}") -> str:
    return "-" if share is None or share["share"] is None else form.format(share["share"])


def _interval(share: dict[str, Any]) -> str:
    return "-" if share["interval"] is None else f"{max(share['interval'][0], 0) * 100:.0f} to {share['interval'][1] * 100:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
