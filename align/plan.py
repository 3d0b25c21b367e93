"""What a recipe would do in a folder: each stage's identity, whether it is done, and why not. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from align.artifact import ARCHIVE, FACTS, FORMAT, Artifact, identity_of
from align.base import Base, file_sha256, find_base
from align.data.mix import Data, load_data
from align.errors import AlignError
from align.files import shipped_file
from align.handles import BASE
from align.judge.open import judge_identity
from align.recipe import Recipe, Stage
from align.records import Kind
from align.settings import MeasuredJudge, PPOSettings, Training

MADE_FILES: dict[str, tuple[str, Kind]] = {  # kind of artifact -> (the file of rows in it, what they are)
    "preferences": ("preferences.jsonl", "preference"),
    "conversations": ("conversations.jsonl", "conversation"),
}
COMPLETIONS = "completions.jsonl"
SAMPLED = "sampled.jsonl"  # what a stopped sampling has so far
PARTIAL = ".partial"
CHECKPOINT = "checkpoint.safetensors"
LOOKED_AT = 200  # rows whose length stands for that of all


@dataclass
class Planned:
    """A stage with everything that decides its outcome looked up."""

    stage: Stage
    identity: str
    base: Base
    data: dict[str, Data]  # input -> its records
    parents: dict[str, dict[str, Any] | None]  # role -> name, identity, path; None for the base
    final: Path
    work: Path
    state: Literal["done", "archived", "resume", "run", "skip"] = "run"
    reason: str = ""
    again: bool = False  # asked for by --from
    former: Artifact | None = field(default=None, repr=False)
    rewards: list[dict[str, Any]] = field(default_factory=list)  # the parts of PPO's score: names, weights, what decides each

    @property
    def seconds(self) -> float | None:
        """How long the stage took when it last ran here, whatever its settings were."""
        return self.former.facts["seconds"] if self.former else None

    @property
    def learned(self) -> Data | None:
        """The rows that training learns from; none where there are none, or another stage makes them."""
        return self.data.get("data", self.data.get("preferences"))

    @cached_property
    def lengths(self) -> list[int]:
        """Characters of the first of those rows, or else of the prompts, names and brackets included."""
        rows = self.learned or self.data.get("prompts")
        return [len(str(record)) for record in rows.records(LOOKED_AT)] if rows else []

    @property
    def steps(self) -> int | None:
        """Optimizer steps or rounds; an upper bound, for held-out and dropped rows are not known yet. None where rows are not made."""
        settings = self.stage.settings
        if isinstance(settings, Training):
            if self.learned is None:
                return None
            rows = len(self.learned) * (1 - settings.holdout)
            return max(1, round(settings.epochs * rows / settings.batch_size))
        return getattr(settings, "iterations", 1)


def make_plan(recipe: Recipe, run: Path, only: Sequence[str] = (), start: str | None = None) -> list[Planned]:
    """Look up every stage of a recipe in a run's folder.

    Args:
        recipe: as declared and overridden.
        run: the run's folder.
        only: stages to run; others must be done if these need them.
        start: run this stage and those after it again, even where they are done.

    Raises:
        AlignError: for a missing or malformed data file, an unknown base or stage, or an input that is not there.
    """
    for name in [*only, *([start] if start else [])]:
        if name not in recipe.stages:
            raise AlignError(f"this recipe has no stage {name!r}. It has: {', '.join(recipe.stages)}.")
    base = find_base(recipe.base_model, recipe.revision)
    plans: dict[str, Planned] = {}
    names = list(recipe.stages)
    for name, stage in recipe.stages.items():
        again = start is not None and names.index(name) >= names.index(start)
        plans[name] = _plan_stage(stage, base, recipe.dtype, run, plans, again)
    for name in names:
        if only and name not in only:
            plans[name].state = "done" if plans[name].state == "done" else "skip"
    for name in only:
        needed = [h.name for h in recipe.stages[name].inputs.values() if h.recipe is not None and h.name not in only]
        missing = [n for n in needed if plans[n].state != "done"]
        if missing:
            raise AlignError(f"--only {name}: needs {', '.join(missing)}, which is not done in {run}. Run without --only first, or add it.")
    return list(plans.values())


def shared_prompts(plans: Sequence[Planned]) -> dict[str, dict[str, int]]:
    """How many of an evaluation's prompts each earlier stage trains on: evaluation -> stage -> prompts, where there are any."""
    import numpy as np

    found: dict[str, dict[str, int]] = {}
    for evaluation in (planned for planned in plans if planned.stage.kind == "evaluate"):
        prompts = np.unique(evaluation.data["prompts"].column("prompt"))
        for planned in plans:
            for role in ("data", "preferences", "prompts") if planned.stage.kind != "evaluate" else ():
                shared = np.isin(prompts, planned.data[role].column("prompt")).sum() if role in planned.data else 0
                if shared:
                    found.setdefault(evaluation.stage.name, {})[planned.stage.name] = int(shared)
    return found


def _plan_stage(stage: Stage, base: Base, dtype: str | None, run: Path, plans: dict[str, Planned], again: bool) -> Planned:
    if dtype == "nf4" and getattr(stage.settings, "lora", True) is None:
        raise AlignError(
            f"{stage.name}.lora: none trains all weights, which a base in four bits has not. Give it an adapter, or recipe.quantize=none."
        )
    data = {role: load_data(sources, kind, f"{stage.name}.{role}") for role, (sources, kind) in stage.data.items()}
    for role, rows in data.items():
        rows.refuse_if_too_bad(getattr(stage.settings, "max_bad_rows", 0.0), f"{stage.name}.{role}")
    if stage.kind == "reward" and "demonstrations" not in data:
        below = plans.get(stage.inputs["policy"].name) if stage.inputs["policy"].recipe else None
        if below and "data" in below.data:  # scores are centred on what the policy below was shown
            data["demonstrations"] = below.data["data"]
    parents: dict[str, dict[str, Any] | None] = {}
    for role, handle in stage.inputs.items():
        if handle is BASE:
            parents[role] = None
        elif handle.artifact is not None:
            parents[role] = {
                "name": handle.name,
                "identity": handle.artifact.identity,
                "path": str(handle.artifact.folder.resolve()),
            }
        else:
            parents[role] = {"name": handle.name, "identity": plans[handle.name].identity, "path": f"../{handle.name}"}
    rewards = _rewards(stage)
    identity = identity_of(
        {
            "format": FORMAT,
            "stage": stage.kind,
            "revision": stage.settings.revision,
            "settings": stage.settings.deciding(),
            "base": base.identity,
            "dtype": dtype,
            "parents": {role: parent and parent["identity"] for role, parent in parents.items()},
            "data": {role: rows.identity for role, rows in data.items()},
            **_texts(stage),
            **_judges(stage),
            **({"rewards": rewards} if rewards else {}),
        }
    )
    work = run / PARTIAL / f"{stage.name}-{identity[:12]}"
    planned = Planned(stage, identity, base, data, parents, run / stage.name, work, rewards=rewards)
    _find_state(planned, run, dtype, again)
    return planned


def _texts(stage: Stage) -> dict[str, Any]:
    """The content of the text files that a stage's settings name; nothing for stages that name none."""
    found = {}
    for name in stage.settings.texts:
        given = getattr(stage.settings, name)
        if given is not None:
            path = Path(given) if Path(given).is_file() else shipped_file(given)
            if not path.is_file():
                raise AlignError(f"{stage.name}.{name}: there is no file {given!r}.")
            found[name] = file_sha256(path)
    return {"texts": found} if found else {}


def _judges(stage: Stage) -> dict[str, Any]:
    """The identities of the judges that a stage's settings name; nothing for stages that name none."""
    if not isinstance(stage.settings, MeasuredJudge) or not stage.settings.judges:
        return {}
    return {"judges": [judge_identity(spec) for spec in stage.settings.judges]}


def _rewards(stage: Stage) -> list[dict[str, Any]]:
    """What decides PPO's score, once its settings are known to fit together."""
    if isinstance(stage.settings, PPOSettings):
        problems = stage.settings.contradictions([reward.name for reward in stage.rewards])
        if problems:
            raise AlignError("\n".join(f"{stage.name}: {problem} (--set {stage.name}.SETTING=...)." for problem in problems))
    return [reward.facts(stage.name) for reward in stage.rewards]


def _find_state(planned: Planned, run: Path, dtype: str | None, again: bool) -> None:
    name, identity = planned.stage.name, planned.identity
    if (planned.final / FACTS).is_file():
        planned.former = Artifact.open(planned.final)
    aside = run / ARCHIVE / f"{name}-{identity[:12]}"
    if again:
        planned.reason, planned.again = "asked for by --from", True
    elif planned.former and planned.former.identity == identity:
        planned.state = "done"
    elif (aside / FACTS).is_file() and Artifact.open(aside).identity == identity:
        planned.state, planned.reason = "archived", "made before with these settings; taken from the archive"
    elif any((planned.work / begun).is_file() for begun in (CHECKPOINT, SAMPLED)):
        planned.state, planned.reason = "resume", "stopped before; goes on from its last checkpoint"
    elif planned.former:
        planned.reason = _difference(planned, dtype)
    else:
        planned.reason = "not made yet"


def _difference(planned: Planned, dtype: str | None) -> str:
    """Why a stage that was made once must be made again."""
    assert planned.former is not None
    facts, now = planned.former.facts, planned.stage.settings.model_dump(mode="json")
    changes = [f"{key} {facts['settings'].get(key)} -> {now[key]}" for key in now if facts["settings"].get(key) != now[key]]
    changes += [f"data {role}" for role, rows in planned.data.items() if facts["data"].get(role, {}).get("sha256") != rows.identity]
    for role, parent in planned.parents.items():
        before = facts["parents"].get(role)
        if (before and before["identity"]) != (parent and parent["identity"]):
            changes.append(f"{role} {parent['name'] if parent else 'base'}")
    if facts.get("rewards", []) != planned.rewards:
        changes.append("its rewards")
    if facts["base"]["identity"] != planned.base.identity:
        changes.append("the base model")
    if facts.get("dtype") != dtype:
        changes.append(f"recipe.dtype {facts.get('dtype')} -> {dtype}")
    return "changed: " + ", ".join(changes or ["this version of align makes it differently"])
