"""What the label stage and `align label` share: the judge is measured, pairs are judged, and what came of it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from align.artifact import Artifact
from align.data.mix import Data, is_heldout
from align.errors import AlignError
from align.judge import page
from align.judge.ask import judge_pairs
from align.judge.audit import audit, facts, measured_pairs
from align.judge.judgement import Judge, Judgement, Pair
from align.judge.ledger import Ledger
from align.judge.planted import of_pairs
from align.progress import say
from align.records import Message
from align.settings import MeasuredJudge

if TYPE_CHECKING:
    from align.progress import Meter

LEFT_OUT = {"flipped": "flipped with the order", "abstained": "too close", "tie": "ties", "unparsed": "unreadable"}


def measure(
    name: str,
    judges: Sequence[Judge],
    pairs: Sequence[Pair],
    gold: Data | None,
    unseen: np.ndarray | None,
    ledger: Ledger,
    settings: MeasuredJudge,
    report: Path,
) -> dict[str, Any]:
    """Measure a judge on people's preferences, and on pairs planted in what it is to label.

    Args:
        name: of the stage or command, for messages.
        judges: one, or a panel.
        pairs: what it is to label.
        gold: people's preferences, if there are any.
        unseen: which of them the judge has not learned from; none for all.
        ledger: of what judges have said.
        settings: how many pairs, and whether the judge is to be trusted whatever comes of it.
        report: the folder for audit.html and audit.json.

    Returns:
        The verdict with its reasons, for the artifact.

    Raises:
        AlignError: where the audit refuses the judge, unless it is to be trusted.
    """
    people, planted = measured_pairs(gold, of_pairs(pairs), settings.audit_pairs, settings.seed, unseen)
    say(f"  {name}: measuring the judge on {len(people)} pairs of people's and {len(planted)} planted ones")
    found = facts(audit(judges, people, planted, ledger, settings))
    written = page.write(found, report)
    told = f"the judge is {found['verdict']}: {'; '.join(found['reasons'])}"
    if not found["accepted"] and not settings.trust_judge:
        raise AlignError(
            f"{name}: {told}.\n  See {written}. Take another judge or template, or label all the same: --set {name}.trust_judge=true"
        )
    say(f"  {name}: {told}")
    return {key: found[key] for key in ("accepted", "verdict", "measured_on", "reasons", "remarks")}


def unseen_by(artifacts: Sequence[Artifact], gold: Data) -> np.ndarray:
    """Which of people's preferences no reward model among the artifacts was trained on: of files that it read, the held-out share."""
    unseen = np.ones(len(gold), dtype=bool)
    for artifact in artifacts:
        if artifact.kind == "reward_model":
            learned = _contents(artifact.facts["data"]["preferences"]["sources"])
            read = [bool(learned & _contents([source])) for source in gold.facts["sources"]]
            heldout = is_heldout(gold.column("key"), artifact.facts["settings"]["holdout"], artifact.facts["settings"]["seed"])
            unseen &= heldout | ~np.array(read)[gold.chosen[:, 0]]
    return unseen


def _contents(sources: Sequence[dict[str, Any]]) -> set[str]:
    """What tells the files of sources apart: their bytes, or a hub data set's name."""
    return {file["sha256"] or file["path"] for source in sources for file in source["files"]}


def judge_all(
    name: str,
    judges: Sequence[Judge],
    pairs: Sequence[Pair],
    ledger: Ledger,
    settings: MeasuredJudge,
    meter: Meter,
    replay: bool = False,
) -> list[Judgement | None]:
    """Judge every pair, with a bar, and say what was not asked."""
    meter.begin(len(pairs))
    before = 0

    def tell(done: int) -> None:
        nonlocal before
        meter.step(done, {}, done - before)
        before = done

    judgements = judge_pairs(judges, pairs, ledger, settings, replay, tell)
    meter.close()
    unasked = sum(judgement is None for judgement in judgements)
    if unasked:
        why = "the ledger does not have them" if replay else "a budget ended"
        say(f"[yellow]  {name}: {unasked} of {len(pairs)} pairs were not judged, because {why}[/]")
    return judgements


def summary(judgements: Sequence[Judgement | None], labelled: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of what was decided and why the rest was not, agreement of the orders, and what it took."""
    judged = [judgement for judgement in judgements if judgement is not None]
    reasons = Counter(judgement.undecided for judgement in judged)
    read = [judgement for judgement in judged if judgement.undecided != "unparsed"]
    replies = [reply for judgement in judged for reply in judgement.replies]
    longer = [_characters(row["chosen"]) - _characters(row["rejected"]) for row in labelled]
    prices = [reply.price for reply in replies if reply.price is not None]
    return {
        "pairs": len(judgements),
        "judged": len(judged),
        "labelled": len(labelled),
        **{reason: reasons[reason] for reason in ("flipped", "abstained", "tie", "unparsed")},
        "orders_agree": 1 - reasons["flipped"] / len(read) if read else None,
        "longer_chosen": fmean((d > 0) + 0.5 * (d == 0) for d in longer) if longer else None,
        "seconds": sum(reply.seconds or 0.0 for reply in replies),
        "price": sum(prices) if len(prices) == len(replies) and replies else None,
    }


def tell_result(name: str, metrics: dict[str, Any]) -> None:
    """How many pairs were labelled and why the others were not.

    Raises:
        AlignError: where none was.
    """
    if not metrics["labelled"]:
        raise AlignError(
            f"{name}: the judge decided none of {metrics['judged']} pairs ({metrics['flipped']} flipped with the order, "
            f"{metrics['abstained'] + metrics['tie']} were too close). Take another judge or template, or train on its doubts: "
            f"--set {name}.undecided=keep"
        )
    parts = [f"{metrics[reason]} {words}" for reason, words in LEFT_OUT.items() if metrics[reason]]
    say(f"  {name}: {metrics['labelled']} of {metrics['pairs']} pairs labelled; undecided: {', '.join(parts) or 'none'}")


def _characters(side: list[Message]) -> int:
    return sum(len(message["content"]) for message in side)
