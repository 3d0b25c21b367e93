"""What a long stage shows while it runs, and the metrics it leaves behind."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

console = Console(highlight=False, soft_wrap=True, emoji=False)
SECONDS_BETWEEN_LINES = 10.0  # without a terminal


class Meter:
    """A progress bar with a rate and the metrics that matter, `metrics.jsonl`, and optionally a tracker."""

    def __init__(self, name: str, folder: Path | None, shown: tuple[str, ...], unit: str = "tokens", tracker: Any = None):
        """Report for a stage.

        Args:
            name: the stage's name.
            folder: where metrics.jsonl goes; none writes none.
            shown: metrics to show beside the bar, those that are there.
            unit: what the rate counts.
            tracker: anything with `log(values, step=)`, such as an Accelerator with trackers.
        """
        self.name, self.shown, self.unit, self.tracker = name, shown, unit, tracker
        self.path = None if folder is None else folder / "metrics.jsonl"
        self._bar: Progress | None = None
        self._total = 0
        self._begun = self._spoke = time.monotonic()
        self._counted = self._before = 0.0
        self._latest: dict[str, float] = {}

    def begin(self, total: int, start: int = 0) -> None:
        """Start at step `start` of `total`, dropping metrics of later steps that a killed run left."""
        self._total, self._begun, self._counted = total, time.monotonic(), 0.0
        if self.path is not None:
            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
            self.path.write_text("".join(line + "\n" for line in kept))
            self._before = last_metrics(self.path)["seconds"]
        if start:
            console.print(f"  {self.name}: going on from step {start} of {total}")
        if console.is_terminal:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=total, completed=start, text="")

    def step(self, step: int, metrics: dict[str, float], counted: float) -> None:
        """Record a step's metrics; `counted` units were worked through since the last call."""
        self._counted += counted
        seconds = time.monotonic() - self._begun
        self._latest.update(metrics)
        if self.path is not None:
            row = {"step": step, **metrics, "seconds": round(self._before + seconds, 3)}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            self.tracker.log(metrics, step=step)
        rate = f"{self._counted / max(seconds, 1e-9):,.0f} {self.unit}/s"
        text = "  ".join([rate, *(f"{name} {self._latest[name]:.3g}" for name in self.shown if name in self._latest)])
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES or step == self._total:
            self._spoke = time.monotonic()
            console.print(f"  {self.name} {step}/{self._total}  {text}")

    def phase(self, text: str) -> None:
        """Say what is going on inside a step."""
        if self._bar:
            self._bar.update(self._task, text=text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def tracked(steps: Iterable[Any], total: int, text: str) -> Iterator[Any]:
    """The steps, with a bar on a terminal while they are worked through."""
    yield from track(steps, text, total=total, console=console, transient=True, disable=not console.is_terminal)


def last_metrics(metrics: Path) -> dict[str, Any]:
    """The last whole line of a stage's metrics.jsonl, with its step and the seconds so far; both 0 where nothing is written yet."""
    lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.is_file() else []
    return json.loads(lines[-1]) if lines else {"step": 0, "seconds": 0.0}


OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # by terminals: controls, and what turns text around


def printable(text: str) -> str:
    """Text whose control characters are written out, as a terminal would obey them; tabs and line ends stay."""
    return OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def say(text: str) -> None:
    """A line for the user."""
    console.print(text)
    sys.stdout.flush()
