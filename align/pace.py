"""How long a stage will take, from how long its like took on this machine. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from statistics import mean
from typing import Any

from align.base import cached_facts, keep_fact
from align.plan import Planned
from align.progress import last_metrics
from align.settings import EvaluateSettings, PPOSettings, SampleSettings, Training

TOOK = "took.json"
LAST = 5  # stages of a kind that are remembered
LONG_ENOUGH = 10.0  # seconds; a shorter stage mostly loads and says little of the pace


def work(planned: Planned) -> float | None:
    """What a stage does, in a unit of its kind: characters trained on, or tokens at most that are sampled or pass by. None: not known."""
    settings, rows = planned.stage.settings, planned.data
    if isinstance(settings, Training):
        return settings.epochs * len(planned.learned) * mean(planned.lengths) if planned.learned else None
    if isinstance(settings, PPOSettings):
        return _tokens(settings.model_dump()) * settings.iterations
    if isinstance(settings, EvaluateSettings | SampleSettings):
        policies = sum(role.startswith("policies") for role in planned.stage.inputs)
        prompts = min(len(rows["prompts"]), settings.max_prompts or len(rows["prompts"]))
        if isinstance(settings, EvaluateSettings):
            each = policies * settings.samples_per_prompt + (settings.best_of or 0)
        else:
            each = policies * settings.completions_per_prompt * len(settings.temperatures)
        return float(prompts * each * settings.max_new_tokens)
    return None


def _tokens(ppo: Mapping[str, Any]) -> float:
    """What passes by in a round of PPO: its completions, sampled and scored (about two passes' time) and in every pass of updates."""
    return ppo["prompts_per_iteration"] * ppo["completions_per_prompt"] * ppo["max_new_tokens"] * (2.0 + ppo["epochs"])


def remember(planned: Planned, dtype: str | None, seconds: float) -> None:
    """Keep how long a stage took, for the plans of others."""
    if seconds >= LONG_ENOUGH and (done := work(planned)):
        with suppress(OSError):  # the stage is made; a cache that cannot be written takes nothing from it
            kind = _kind(planned, dtype)
            keep_fact(TOOK, kind, [*cached_facts(TOOK).get(kind, []), (done, seconds)][-LAST:])


def expected_seconds(planned: Planned, dtype: str | None) -> float | None:
    """How long what is left of a stage would take.

    At its own pace of the last time in this folder: training and PPO by their steps, others as they took. A stage that was not made
    here yet goes at the pace of the last few of its kind on this machine with this base, the long ones counting most. None where
    there was none.
    """
    former, settings = planned.former, planned.stage.settings
    done = last_metrics(planned.work / "metrics.jsonl")["step"] if planned.state == "resume" else 0
    if former is None:
        took, todo = cached_facts(TOOK).get(_kind(planned, dtype)), work(planned)
        left = 1 - done / planned.steps if planned.steps else 1.0
        if not took or todo is None:
            return None
        return sum(seconds for _, seconds in took) / sum(units for units, _ in took) * todo * max(0.0, left)
    before = last_metrics(former.folder / "metrics.jsonl")["step"]
    if not isinstance(settings, Training | PPOSettings) or planned.steps is None or not before:
        return planned.seconds
    seconds = former.facts["seconds"] * max(0, planned.steps - done) / before
    if isinstance(settings, PPOSettings):  # a step is a round, which may have become another
        seconds *= _tokens(settings.model_dump()) / _tokens(former.facts["settings"])
    return seconds


def _kind(planned: Planned, dtype: str | None) -> str:
    """What must be alike for one stage's pace to be another's."""
    settings = planned.stage.settings
    what = "" if getattr(settings, "lora", True) else " of all weights"
    what += " with a value" if isinstance(settings, PPOSettings) and settings.has_value else ""
    return f"{planned.stage.kind}{what}, {planned.base.identity}, {dtype or 'native'}"
