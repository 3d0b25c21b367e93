"""The report as one HTML file that needs nothing else. Every text of a model or a data file is shown as text."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.errors import AlignError
from align.progress import printable
from align.report.chart import chain, duration, intervals, lines
from align.report.facts import run_facts

TEMPLATE = Path(__file__).with_name("page.html")
PAGE = "report.html"
SHOWN = 8  # samples before a filter is used


def write_report(run: Path, other: Path | None = None, out: Path | None = None) -> Path:
    """Write the report of a run, or of two side by side, and return its file.

    Raises:
        AlignError: see `align.report.facts.run_facts`; or where it cannot be written.
    """
    runs = [run_facts(run)] + ([run_facts(other)] if other else [])
    target = out or run / PAGE
    try:
        target.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise AlignError(f"{target}: the report cannot be written ({error.strerror}). Give another file: --out FILE") from None
    return target


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """One or two runs' facts as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_finalized, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"signed": _signed, "percent": _percent, "time": duration, "number": _number}
    drawn = [{**facts, **_drawn(facts)} for facts in runs]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(runs=drawn, apart=_apart(runs), shown=SHOWN)


def _drawn(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's facts look like: charts, headlines, samples in the order of how much they changed."""
    return {
        "chain": chain(facts["stages"]),
        "curves": [
            {
                **stage,
                "panels": [
                    {"title": p["title"], "names": _names(p), "chart": lines(p["series"], stage["unit"], p["title"])}
                    for p in stage["panels"]
                ],
            }
            for stage in facts["curves"]
        ],
        "ppo": [{**rounds, "charts": _cost_charts(rounds)} for rounds in facts["ppo"] if rounds["training"]],
        "reward_models": [{**graded, "chart": _calibration_chart(graded["calibration"])} for graded in facts["reward_models"]],
        "evaluations": [_drawn_evaluation(evaluation) for evaluation in facts["evaluations"]],
    }


def _names(panel: Mapping[str, Any]) -> list[str]:
    return [series["name"] for series in panel["series"]] if len(panel["series"]) > 1 else []


def _cost_charts(rounds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The score, each of its parts where there are several, and length against the square root of KL; the round that was kept is ringed.

    Where `choose_by` makes another reward the score of held-out prompts, the score in training has its chart to itself.
    """
    sets = [("in training", rounds["training"])] + ([("held out", rounds["heldout"])] if rounds["heldout"] else [])
    charts = []
    of_parts = [(f"score/{name}", f"score by {name}") for name in rounds["rewards"]]
    for key, title in (("score", "score"), *of_parts, ("length", "tokens a completion")):
        shown = sets[:1] if key == "score" and rounds["choose_by"] is not None else sets
        series = [
            {"name": name, "points": [[math.sqrt(max(p["kl"], 0.0)), p[key]] for p in points], "joined": name == "held out"}
            for name, points in shown
        ]
        best = next((p for p in shown[-1][1] if p["round"] == rounds["best_round"]), None) if len(shown) > 1 else None
        marked = [math.sqrt(max(best["kl"], 0.0)), best[key]] if best else None
        names = [name for name, _ in shown] if len(shown) > 1 else []
        charts.append({"title": title, "names": names, "chart": lines(series, "square root of KL to the reference", title, marked)})
    return charts


def _calibration_chart(bins: Sequence[Mapping[str, Any]]) -> Markup:
    """How often right by how sure; one that is as often right as it is sure lies on the second line."""
    points = [[each["confidence"], each["right"]] for each in bins]
    return lines(
        [{"name": "right", "points": points}, {"name": "as sure as right", "points": [[0.5, 0.5], [1.0, 1.0]]}],
        "how sure the reward model is",
        "share of pairs it is right on",
    )


def _drawn_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    rows = [{"name": p["name"], "value": p["score"], "interval": p["score_interval"]} for p in evaluation["policies"]]
    known = [row for row in rows if row["value"] is not None]
    return {
        **evaluation,
        "chart": intervals(known, "reward model's score, 95% interval") if known else None,
        "samples": _samples(evaluation),
    }


def _samples(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each prompt with the first policy's answer and every other's, the most changed score first."""
    found = []
    names = [policy["name"] for policy in evaluation["policies"]]
    for sample in evaluation["samples"]:
        first = _answer(sample, names[0])
        for name in names[1:] or names[:1]:
            other = _answer(sample, name)
            change = None if first["score"] is None or other["score"] is None else other["score"] - first["score"]
            before, after = _marked(first["text"], other["text"])
            found.append(
                {
                    "prompt": "\n".join(message["content"] for message in sample["prompt"]),
                    "first": {**first, "words": before, "name": names[0]},
                    "other": {**other, "words": after, "name": name},
                    "change": change,
                    "kind": _kind(change, other["ended"]),
                }
            )
    return sorted(found, key=lambda one: -abs(one["change"] or 0))


def _answer(sample: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The first of a policy's answers; an empty one where it gave none."""
    answers = sample["answers"].get(name) or [{"text": "", "score": None, "ended": False}]
    return answers[0]


def _kind(change: float | None, ended: bool) -> str:
    if change is None:
        return "unscored" if ended else "cut"
    return "better" if change > 0 else "worse" if change < 0 else "same"


def _marked(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces, each with whether the other text lacks it."""
    old, new = before.split(" "), after.split(" ")
    left, right = list[tuple[str, bool]](), list[tuple[str, bool]]()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        left += [(" ".join(old[a:b]), tag != "equal")] if b > a else []
        right += [(" ".join(new[c:d]), tag != "equal")] if d > c else []
    return left, right


def _apart(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What differs between two runs: settings of stages of the same name, their key numbers, and policies' scores."""
    if len(runs) < 2:
        return []
    rows = []
    stages = [{stage["name"]: stage for stage in run["stages"] if stage["state"] == "done"} for run in runs]
    for name in dict.fromkeys([*stages[0], *stages[1]]):
        pair = [each.get(name) for each in stages]
        for key in dict.fromkeys(key for stage in pair if stage for key in stage["settings"]):
            values = [
                json.dumps(stage["settings"][key]) if stage and key in stage["settings"] else "default" if stage else "" for stage in pair
            ]
            rows += [{"what": f"{name}.{key}", "values": values}] if values[0] != values[1] else []
        for metric in dict.fromkeys((each["metric"], each["name"]) for stage in pair if stage for each in stage["key"]):
            numbers = [next((_number(e["value"]) for e in stage["key"] if e["metric"] == metric[0]), "") if stage else "" for stage in pair]
            rows += [{"what": f"{name}: {metric[1]}", "values": numbers}] if numbers[0] != numbers[1] else []
    tables = [{(e["name"], p["name"]): p for e in run["evaluations"] for p in e["policies"]} for run in runs]
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        rows.append({"what": f"{key[0]}: score of {key[1]}", "values": [_number(t[key]["score"]) if key in t else "" for t in tables]})
    return rows


# Numbers ---------------------------------------------------------------------------------------------------------------------


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.2f}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _finalized(value: Any) -> Any:
    """Control characters in texts of others are written out."""
    return printable(value) if type(value) is str else value
