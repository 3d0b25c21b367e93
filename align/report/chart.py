"""Charts as inline SVG: axes with round numbers, lines and points in the page's colours, every point with its numbers as a tooltip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 38


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low to high: 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def lines(series: Sequence[Mapping[str, Any]], x: str, y: str, marked: Sequence[float] | None = None) -> Markup:
    """A chart of points, joined by lines where their order along the axis is theirs in time.

    Args:
        series: each with `name`, `points` (a list of [x, y]) and perhaps `joined` (false: points alone); at least one point in all.
        x: what the horizontal axis is.
        y: what the vertical one is.
        marked: a point to draw a ring around.
    """
    points = [point for each in series for point in each["points"]]
    across, up = ticks(min(p[0] for p in points), max(p[0] for p in points)), ticks(min(p[1] for p in points), max(p[1] for p in points))

    def place(point: Sequence[float]) -> tuple[float, float]:
        left = LEFT + (point[0] - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT)
        return round(left, 1), round(HEIGHT - BOTTOM - (point[1] - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y)} against {escape(x)}" data-points="{len(points)}">']
    for tick in up:
        height = place((across[0], tick))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text class="small end" x="{LEFT - 5}" y="{height + 4}">{tick:g}</text>')
    for tick in across:
        parts.append(f'<text class="small mid" x="{place((tick, up[0]))[0]}" y="{HEIGHT - BOTTOM + 15}">{tick:g}</text>')
    parts.append(f'<text class="small mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}">{escape(x)}</text>')
    for number, each in enumerate(series):
        placed = [place(point) for point in each["points"]]
        if each.get("joined", True) and len(placed) > 1:
            parts.append(f'<polyline class="line s{number}" points="{" ".join(f"{a},{b}" for a, b in placed)}"/>')
        radius = 3 if len(placed) <= 40 else 1.5
        for (a, b), point in zip(placed, each["points"], strict=True):
            title = escape(f"{each['name']}: {point[1]:.4g} at {x} {point[0]:.4g}")
            parts.append(f'<circle class="dot s{number}" cx="{a}" cy="{b}" r="{radius}"><title>{title}</title></circle>')
    if marked is not None:
        a, b = place(marked)
        parts.append(f'<circle class="ring" cx="{a}" cy="{b}" r="7"><title>best</title></circle>')
    return Markup("".join(map(str, [*parts, "</svg>"])))


def intervals(rows: Sequence[Mapping[str, Any]], x: str) -> Markup:
    """Means with their 95 percent intervals, a row each: `name`, `value`, `interval`; a line at 0."""
    known = [row for row in rows if row["value"] is not None]
    ends = [end for row in known for end in (row["interval"] or [row["value"]])] + [0.0]
    across = ticks(min(ends), max(ends))
    height = 34 * len(known) + BOTTOM

    def place(value: float) -> float:
        return round(12 + (value - across[0]) / (across[-1] - across[0]) * (WIDTH - 24), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(x)}" data-points="{len(known)}">']
    for tick in across:
        parts.append(
            f'<line class="{"zero" if tick == 0 else "grid"}" x1="{place(tick)}" x2="{place(tick)}" y1="0" y2="{height - BOTTOM}"/>'
        )
        parts.append(f'<text class="small mid" x="{place(tick)}" y="{height - BOTTOM + 15}">{tick:g}</text>')
    for number, row in enumerate(known):
        at = 34 * number
        parts.append(f'<text x="12" y="{at + 13}">{escape(row["name"])}</text>')
        if row["interval"]:
            low, high = row["interval"]
            parts.append(f'<line class="span" x1="{place(low)}" x2="{place(high)}" y1="{at + 23}" y2="{at + 23}"/>')
        parts.append(f'<circle class="dot s0" cx="{place(row["value"])}" cy="{at + 23}" r="4"><title>{row["value"]:.3g}</title></circle>')
    parts.append(f'<text class="small mid" x="{WIDTH / 2}" y="{height - 5}">{escape(x)}</text></svg>')
    return Markup("".join(map(str, parts)))


def chain(stages: Sequence[Mapping[str, Any]]) -> Markup:
    """The recipe as boxes from left to right, each stage after those it was made from."""
    depth = {"base": 0} if any("base" in stage["parents"] for stage in stages) else {}
    for stage in stages:
        depth[stage["name"]] = 1 + max((depth.get(parent, 0) for parent in stage["parents"]), default=0)
    columns: dict[int, list[str]] = {}
    for name, at in depth.items():
        columns.setdefault(at, []).append(name)
    box, gap, tall, space = 132, 34, 58, 16
    rows = max(map(len, columns.values()))
    skips = any(depth[stage["name"]] - depth.get(parent, 0) > 1 for stage in stages for parent in stage["parents"])
    over = 34 if skips else 2  # room for the arcs of what is used further on
    width, height = len(columns) * (box + gap) - gap + 4, rows * (tall + space) - space + 2 + over
    corner: dict[str, tuple[float, float]] = {}
    for at, names in columns.items():
        top = over + (height - over - (len(names) * (tall + space) - space)) / 2
        corner |= {name: (2 + at * (box + gap), top + i * (tall + space)) for i, name in enumerate(names)}
    style = f"min-width:{width}px;max-width:{1.4 * width:.0f}px"  # readable on a phone, and few boxes are not blown up
    parts = [f'<svg class="chain" style="{style}" viewBox="0 0 {width} {height}" role="img" aria-label="the recipe">']
    for stage in stages:
        for parent in stage["parents"]:
            if parent in corner:
                (a, b), (c, d) = corner[parent], corner[stage["name"]]
                if depth[stage["name"]] - depth[parent] > 1:
                    a, c, above = a + box - 24, c + 24, min(b, d) - 38
                    parts.append(f'<path class="edge" d="M{a},{b} C{a},{above} {c},{above} {c},{d}"/>')
                    continue
                a, b, d = a + box, b + tall / 2, d + tall / 2
                middle = (a + c) / 2
                parts.append(f'<path class="edge" d="M{a},{b} C{middle},{b} {middle},{d} {c},{d}"/>')
    for name, (left, top) in corner.items():
        found = next((stage for stage in stages if stage["name"] == name), None)
        state = "done" if found is None else found["state"].replace(" ", "-")
        lines = ["the base model"] if found is None else _box_lines(found)
        parts.append(f'<rect class="box {state}" x="{left}" y="{top}" width="{box}" height="{tall}" rx="7"/>')
        parts.append(f'<text class="name" x="{left + 9}" y="{top + 18}">{escape(_short(name, 17))}</text>')
        for number, line in enumerate(lines):
            parts.append(f'<text class="small" x="{left + 9}" y="{top + 34 + 14 * number}">{escape(_short(line, 23))}</text>')
    return Markup("".join(map(str, [*parts, "</svg>"])))


def _box_lines(stage: Mapping[str, Any]) -> list[str]:
    if stage["state"] != "done":
        return [stage["state"]]
    cost = f"{duration(stage['seconds'])}, {stage['peak_gb']:.1f} GB"
    key = stage["key"][-1] if stage["key"] else None
    shown = {"ppo": "score", "reward": "heldout_accuracy", "dpo": "heldout_accuracy", "label": "labelled"}.get(stage["stage"])
    key = next((each for each in stage["key"] if each["metric"] == shown), key)
    words = {"heldout_accuracy": "right", "heldout_loss": "loss", "score": "score"}
    return [cost, f"{words.get(key['metric'], key['metric'])} {key['value']:.3g}"] if key else [cost]


def duration(seconds: float) -> str:
    """Seconds as text, in minutes where there are many."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
