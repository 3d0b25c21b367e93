"""Win rates: a judge compares the answers of an evaluation's policies with the first policy's, in both orders."""

from __future__ import annotations

import json
from typing import Any

from align.errors import AlignError
from align.judge.ask import with_principles
from align.judge.judgement import Judgement, Pair, as_facts
from align.judge.pairs import reply
from align.judge.wins import OUTCOMES, win_rate
from align.progress import say
from align.records import write_jsonl
from align.run import Job, Result
from align.stages.label import ask_judges, open_judges

SAMPLES = "samples.jsonl"


def run(job: Job) -> Result:
    """Measure the judge where there is something to measure it by, ask it, and count."""
    source = job.parents["evaluation"]
    assert source is not None
    first, *others = [policy["name"] for policy in source.facts["metrics"]["policies"]]
    if not others:
        raise AlignError(f"{job.name}: {source.name} has answers of {first} alone; expected two policies or more to compare.")
    rows = [json.loads(line) for line in (source.folder / SAMPLES).read_text(encoding="utf-8").splitlines()]
    duels = [duel for name in others for number, row in enumerate(rows) for duel in _duels(row, name, first, number)]
    asked = [duel for duel in duels if duel["settled"] is None]
    pairs = with_principles([Pair(duel["prompt"], reply(duel["text"]), reply(duel["against"])) for duel in asked], job.settings)
    judges = open_judges(job)
    judgements, checks = ask_judges(job, judges, pairs)
    for duel, judgement in zip(asked, judgements, strict=True):
        duel |= _judged(judgement)
    write_jsonl(job.work / "duels.jsonl", duels)
    policies = [{"name": name, **_counted([duel for duel in duels if duel["policy"] == name], len(rows))} for name in others]
    for policy in policies:
        say(f"  {job.name}: {in_words(policy, first)}")
    names = [judge.name for judge in judges]
    return Result("comparison", {"form": "none"}, {"first": first, "judges": names, "prompts": len(rows), "policies": policies}, checks)


def in_words(policy: dict[str, Any], first: str) -> str:
    """A policy's line: what was won, and no more than that."""
    if policy["win_rate"] is None:
        return f"{policy['name']} against {first}: nothing was judged"
    low, high = policy["win_rate_interval"]
    even, at = policy["length_controlled"], policy["length_controlled_interval"]
    return (
        f"{policy['name']} against {first}: wins {policy['wins']}, ties {policy['ties']}, loses {policy['losses']}; "
        f"win rate {policy['win_rate']:.0%} (95% {low:.0%} to {high:.0%}), at equal lengths {even:.0%} ({at[0]:.0%} to {at[1]:.0%})"
    )


def _duels(row: dict[str, Any], name: str, first: str, number: int) -> list[dict[str, Any]]:
    """The answers of two policies to a prompt, side by side. The same text is a tie, and no answer loses to one: nobody is asked."""
    found = []
    for ours, theirs in zip(row["answers"][name], row["answers"][first], strict=False):
        text, against = ours["text"].strip(), theirs["text"].strip()
        settled = 0.5 if text == against else 0.0 if not text else 1.0 if not against else None
        found.append({"number": number, "prompt": row["prompt"], "policy": name, "text": text, "against": against, "settled": settled})
    return found


def _judged(judgement: Judgement | None) -> dict[str, Any]:
    if judgement is None:
        return {}
    return {"settled": OUTCOMES[judgement.verdict], "judgement": as_facts(judgement)}


def _counted(duels: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """A policy's win rate; unknown where nothing could be judged."""
    known = [duel for duel in duels if duel["settled"] is not None]
    found: dict[str, Any] = {"unknown": len(duels) - len(known), "win_rate": None}
    if known:
        outcomes: list[list[float]] = [[] for _ in range(prompts)]
        longer: list[list[float]] = [[] for _ in range(prompts)]
        for duel in known:
            outcomes[duel["number"]].append(duel["settled"])
            longer[duel["number"]].append(len(duel["text"]) - len(duel["against"]))
        found |= win_rate(outcomes, longer)
    return found
