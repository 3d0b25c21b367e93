"""How long a stage will take, from how long its like took on this machine. Imports no torch."""

from __future__ import annotations

from contextlib import suppress

from align.base import cached_facts, keep_fact
from align.plan import Planned
from align.progress import last_metrics
from align.settings import EvaluateSettings, PPOSettings, SampleSettings, Training

PACES = "paces.json"
LONG_ENOUGH = 10.0  # seconds; a shorter stage mostly loads and says little of the pace
LOOKED_AT = 200  # rows whose length stands for that of all


def work(planned: Planned) -> float | None:
    """What a stage does, in a unit of its kind: characters that are trained on, or tokens that are sampled at most. None: not known."""
    settings, rows = planned.stage.settings, planned.data
    if isinstance(settings, Training):
        if not planned.learned:
            return None
        looked_at = [len(str(record)) for record in planned.learned.records(LOOKED_AT)]
        return settings.epochs * len(planned.learned) * sum(looked_at) / len(looked_at)
    if isinstance(settings, PPOSettings):
        completions = settings.prompts_per_iteration * settings.completions_per_prompt
        return float(settings.iterations * completions * settings.max_new_tokens)
    if isinstance(settings, EvaluateSettings | SampleSettings):
        policies = sum(role.startswith("policies") for role in planned.stage.inputs)
        prompts = min(len(rows["prompts"]), settings.max_prompts or len(rows["prompts"]))
        if isinstance(settings, EvaluateSettings):
            each = policies * settings.samples_per_prompt + (settings.best_of or 0)
        else:
            each = policies * settings.completions_per_prompt * len(settings.temperatures)
        return float(prompts * each * settings.max_new_tokens)
    return None


def remember(planned: Planned, dtype: str | None, seconds: float) -> None:
    """Keep how long a stage took, for the plans of others."""
    if seconds >= LONG_ENOUGH and (done := work(planned)):
        with suppress(OSError):  # the stage is made; a cache that cannot be written takes nothing from it
            keep_fact(PACES, _kind(planned, dtype), seconds / done)


def expected_seconds(planned: Planned, dtype: str | None) -> float | None:
    """How long what is left of a stage would take.

    At its own pace of the last time in this folder: training and PPO by their steps, others as they took. A stage that was not made
    here yet goes at the pace of the last of its kind on this machine with this base. None where there was none.
    """
    former, settings = planned.former, planned.stage.settings
    done = last_metrics(planned.work / "metrics.jsonl")["step"] if planned.state == "resume" else 0
    if former is None:
        pace, todo = cached_facts(PACES).get(_kind(planned, dtype)), work(planned)
        left = 1 - done / planned.steps if planned.steps else 1.0
        return None if pace is None or todo is None else pace * todo * max(0.0, left)
    before = last_metrics(former.folder / "metrics.jsonl")["step"]
    if not isinstance(settings, Training | PPOSettings) or planned.steps is None or not before:
        return planned.seconds
    return former.facts["seconds"] * max(0, planned.steps - done) / before


def _kind(planned: Planned, dtype: str | None) -> str:
    """What must be alike for one stage's pace to be another's."""
    settings = planned.stage.settings
    what = "" if getattr(settings, "lora", True) else " of all weights"
    what += " with a value" if isinstance(settings, PPOSettings) and settings.has_value else ""
    return f"{planned.stage.kind}{what}, {planned.base.identity}, {dtype or 'native'}"
