"""What there is to say of a run, read from its artifacts alone: plain values, as `align report --json` prints them. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.artifact import Artifact
from align.confidence import direction, in_words
from align.curves import SHOWN
from align.errors import AlignError
from align.settings import (
    CompareSettings,
    DPOSettings,
    EvaluateSettings,
    LabelSettings,
    PPOSettings,
    ReviseSettings,
    RewardSettings,
    SampleSettings,
    Settings,
    SFTSettings,
)
from align.show import open_run, parent_names, read_listing, was_begun
from align.trl_settings import settings_of

SETTINGS: dict[str, type[Settings]] = {
    "sft": SFTSettings,
    "reward": RewardSettings,
    "dpo": DPOSettings,
    "ppo": PPOSettings,
    "sample": SampleSettings,
    "revise": ReviseSettings,
    "label": LabelSettings,
    "compare": CompareSettings,
    "evaluate": EvaluateSettings,
}
KEY = {  # stage -> the numbers that say how it went: (metric, what it is called)
    "sft": (("heldout_loss_before", "held-out loss before"), ("heldout_loss", "held-out loss")),
    "reward": (("heldout_accuracy", "right on held-out pairs"), ("longer_is_better_accuracy", "'the longer one' is right")),
    "dpo": (("heldout_accuracy", "right on held-out pairs"), ("heldout_margin", "held-out margin")),
    "label": (("labelled", "pairs labelled"), ("price", "price of the judge's replies")),  # in the currency of its settings
    "ppo": (("score", "score in the last round"), ("kl", "KL, nats a completion"), ("length", "tokens a completion")),
}
POINTS = 200  # of a curve


def run_facts(run: Path) -> dict[str, Any]:
    """Everything the report shows of one run.

    Args:
        run: a run's folder; it need not be finished.

    Raises:
        AlignError: where it is no run, or a stage is damaged or was made by a newer align.
    """
    made = {artifact.name: artifact for artifact in open_run(run)}
    listing = read_listing(run)
    stages = [_stage(run, name, made.get(name)) for name in listing["stages"]]
    first = next(iter(made.values()), None)
    return {
        "run": str(run),
        "recipe": listing.get("recipe", run.name),
        "commands": [str(command) for command in listing.get("commands") or []],
        "base": first.facts["base"] if first else None,
        "versions": first.facts["versions"] if first else {},
        "created": max((a.facts["created"] for a in made.values()), default=None),
        "seconds": sum(a.facts["seconds"] for a in made.values()),
        "peak_gb": max((a.facts["peak_memory_gb"] for a in made.values()), default=None),
        "stages": stages,
        "missing": [stage["name"] for stage in stages if stage["state"] != "done"],
        "data": [row for a in made.values() for row in _data(a)],
        "curves": [curves for a in made.values() if (curves := _curves(a))["panels"]],
        "reward_models": [_graded(a) for a in made.values() if a.kind == "reward_model" and "heldout_by" in a.facts["metrics"]],
        "ppo": [_rounds(a) for a in made.values() if a.facts["stage"] == "ppo"],
        "audits": [found for name in made if (found := _audit(run, name))],
        "comparisons": [_comparison(a) for a in made.values() if a.kind == "comparison"],
        "evaluations": [_evaluation(a) for a in made.values() if a.kind == "evaluation"],
    }


# Stages ----------------------------------------------------------------------------------------------------------------------


def _stage(run: Path, name: str, artifact: Artifact | None) -> dict[str, Any]:
    if artifact is None:
        return {"name": name, "state": "stopped" if was_begun(run, name) else "not made", "parents": [], "key": [], "settings": {}}
    facts = artifact.facts
    return {
        "name": name,
        "state": "done",
        "stage": facts["stage"],
        "makes": facts["kind"],
        "parents": parent_names(facts["parents"]),
        "seconds": facts["seconds"],
        "peak_gb": facts["peak_memory_gb"],
        "key": [_key(facts["metrics"], *each) for each in KEY.get(facts["stage"], ()) if _is_number(facts["metrics"].get(each[0]))],
        "settings": _changed(facts),
        "warnings": [  # an artifact of before kept only the round
            text if isinstance(text, str) else f"round {text}: {sign}" for sign, text in (facts["checks"].get("warnings") or {}).items()
        ],
        "identity": artifact.identity,
        "created": facts["created"],
    }


def _key(metrics: Mapping[str, Any], metric: str, name: str) -> dict[str, Any]:
    return {"name": name, "metric": metric, "value": metrics[metric], "interval": metrics.get(f"{metric}_interval")}


def _changed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not their defaults."""
    kind = _trl_settings(facts["settings"]) if facts["stage"] == "trl" else SETTINGS.get(facts["stage"])
    defaults = kind.model_construct().model_dump(mode="json") if kind else {}
    return {name: value for name, value in facts["settings"].items() if kind is None or defaults.get(name) != value}


def _trl_settings(settings: Mapping[str, Any]) -> type[Settings] | None:
    """Those of a trainer of the installed TRL; none where it has no such trainer: then every setting is shown."""
    try:
        return settings_of(settings["trainer"])
    except AlignError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Data ------------------------------------------------------------------------------------------------------------------------


def _data(artifact: Artifact) -> Iterable[dict[str, Any]]:
    for role, facts in artifact.facts["data"].items():
        if "rows" not in facts:
            continue
        rejected = {**facts.get("rejected", {}), **facts.get("unfit", {})}
        if facts.get("overlong"):
            rejected["over the longest length"] = facts["overlong"]
        yield {
            "stage": artifact.name,
            "role": role,
            "path": facts["path"],
            "format": facts["format"],
            "rows": facts["rows"],
            "records": facts["records"],
            "training": facts.get("training"),
            "heldout": facts.get("heldout"),
            "rejected": rejected,
            "longer_is_better": (facts.get("pairs") or {}).get("longer_is_better"),
            "sha256": facts["sha256"],
        }


# Curves ----------------------------------------------------------------------------------------------------------------------


def _lines(artifact: Artifact) -> list[dict[str, Any]]:
    path = artifact.folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line] if path.is_file() else []


def _curves(artifact: Artifact) -> dict[str, Any]:
    """The stage's panels, each with its series as [step, value] pairs."""
    lines, panels = _lines(artifact), []
    for title, names in SHOWN.get(artifact.facts["stage"], ()):
        series = [
            {"name": name, "points": _thinned([[row["step"], row[name]] for row in lines if _is_number(row.get(name))])} for name in names
        ]
        if any(each["points"] for each in series):
            panels.append({"title": title, "series": [each for each in series if each["points"]]})
    return {"stage": artifact.name, "unit": "round" if artifact.facts["stage"] == "ppo" else "step", "panels": panels}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most POINTS of them, each the mean of its neighbours'."""
    if len(points) <= POINTS:
        return points
    edges = [round(i * len(points) / POINTS) for i in range(POINTS + 1)]
    parts = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [[part[-1][0], sum(y for _, y in part) / len(part)] for part in parts]


def _rounds(artifact: Artifact) -> dict[str, Any]:
    """What PPO paid for its reward: score against the square root of KL, which it grows along (Gao et al. 2022, arXiv 2210.10760)."""
    metrics = artifact.facts["metrics"]
    training = [{**row, "round": row["step"]} for row in _lines(artifact) if "kl" in row]
    heldout = metrics.get("evaluations") or []
    parts = sorted(name for name in (training[0] if training else {}) if name.startswith("score/"))
    choose_by = artifact.facts["settings"].get("choose_by")
    parts = parts if len(parts) > 1 or choose_by is not None else []  # one alone is the score
    kept = ("round", "kl", "score", "length", *parts)
    return {
        "stage": artifact.name,
        "training": [{name: row.get(name) for name in kept} for row in training],
        "heldout": [{name: point.get(name) for name in kept} for point in heldout],
        "rewards": [name.removeprefix("score/") for name in parts],
        "best_round": metrics.get("best_round"),
        "choose_by": choose_by,
    }


# Reward models, judges and evaluations ---------------------------------------------------------------------------------------


def _graded(artifact: Artifact) -> dict[str, Any]:
    """A reward model's held-out pairs, all and in groups, each with what 'the longer one' reaches."""
    metrics, by = artifact.facts["metrics"], artifact.facts["metrics"]["heldout_by"]
    every = {
        "pairs": metrics["heldout_pairs"],
        "accuracy": metrics["heldout_accuracy"],
        "accuracy_interval": metrics["heldout_accuracy_interval"],
        "longer_is_better_accuracy": metrics["longer_is_better_accuracy"],
    }
    groups = {"all": every, **by["by_length"], **by["by_source"]}
    return {"stage": artifact.name, "groups": groups, "calibration": by["calibration"], "calibration_error": by["calibration_error"]}


def _audit(run: Path, name: str) -> dict[str, Any] | None:
    folder = run / f"{name}-audit"
    if not (folder / "audit.json").is_file():
        return None
    try:
        facts = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
        return {
            "stage": name,
            "page": f"{folder.name}/audit.html",
            "judges": [judge["name"] for judge in facts["judges"]],
            "accepted": facts["accepted"],
            "verdict": facts["verdict"],
            "reasons": facts["reasons"],
            "figures": facts["all_people"] or facts["all_planted"],
            "measured_on": facts["measured_on"],
        }
    except (ValueError, KeyError, TypeError):
        raise AlignError(f"{folder / 'audit.json'}: cannot be read. Remove it and label again: --from {name}") from None


def _comparison(artifact: Artifact) -> dict[str, Any]:
    """A judge's win rates, with what each lets one say."""
    metrics = artifact.facts["metrics"]
    policies = [dict(policy) for policy in metrics["policies"]]
    for policy in policies:
        known = policy["win_rate"] is not None
        policy["direction"] = direction([end - 0.5 for end in policy["length_controlled_interval"]]) if known else None
    audit = artifact.facts["checks"].get("audit")
    return {**metrics, "name": artifact.name, "policies": policies, "judge_accepted": audit and audit["accepted"]}


def _evaluation(artifact: Artifact) -> dict[str, Any]:
    """An evaluation's table, with what each difference lets one say, and its samples."""
    metrics = artifact.facts["metrics"]
    of_before: dict[str, Any] = {"declined": {}, "repetition": None, "instructions": None}  # artifacts made before these were counted
    policies: list[dict[str, Any]] = [{**of_before, **policy} for policy in metrics["policies"]]
    for policy in policies[1:]:
        policy["direction"] = direction(policy["difference_interval"])
        policy["verdict"] = _words(policy, policies[0]["name"])
        policy["warning"] = (artifact.facts["checks"].get("warnings") or {}).get(policy["name"])
        policy["unseen"] = {name: _words(compared, policies[0]["name"]) for name, compared in policy.get("held_out", {}).items()}
    reward = artifact.facts["parents"].get("reward_model") or {"name": "?"}
    path = artifact.folder / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line] if path.is_file() else []
    return {"name": artifact.name, "prompts": metrics["prompts"], "reward_model": reward["name"], "policies": policies, "samples": samples}


def _words(compared: Mapping[str, Any], first: str) -> str:
    prompts = compared["compared"] if "compared" in compared else compared["scored"]  # the latter of artifacts made before the former was
    return in_words(compared["difference"], compared["difference_interval"], prompts, first)
