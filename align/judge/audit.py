"""A judge is measured before it is trusted: pairs with a known better side go through it, and the figures decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.judge.agreement import Judged, Share, Statistics, as_json, statistics
from align.judge.ask import judge_pairs
from align.judge.judgement import Judge, Judgement, as_facts
from align.judge.known import Known, people
from align.judge.ledger import Ledger
from align.judge.planted import Completion
from align.judge.planted import planted as plant
from align.prompts import as_text
from align.settings import JudgeSettings

if TYPE_CHECKING:
    import numpy as np

    from align.data.mix import Data

PLANTED_SHARE = 4  # people's pairs to one planted pair of each kind
LEVEL = 0.05  # a p-value below it is 95 percent confidence
BIASED = 0.65  # share of one position from which on it is worth a word
MISTAKES, UNREADABLE = 8, 5  # shown
SHOWN = 1500  # characters of a text that is shown


@dataclass(frozen=True)
class Audit:
    """What an audit found. Statistics are none where there were no such pairs."""

    judges: list[dict[str, str]]  # name, model, template
    people: dict[str, Statistics]  # by file
    planted: dict[str, Statistics]  # by kind
    all_people: Statistics | None
    all_planted: Statistics | None  # those with a right side
    members: dict[str, Statistics]  # of a panel, on all pairs with a right side
    asked: int  # pairs that were judged
    wanted: int
    max_unparsed: float
    unparsed: Share  # of the replies; of a panel's judgements, those that no member could give
    examples: list[dict[str, Any]]  # the surest mistakes, and replies that could not be read


@dataclass(frozen=True)
class Finding:
    """Whether a judge may label. `measured_on` is people, planted or nothing."""

    accepted: bool
    measured_on: str
    reasons: list[str]
    remarks: list[str]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        word = "accepted" if self.accepted else "refused"
        return f"{word}, but not measured against people" if self.accepted and self.measured_on != "people" else word


def measured_pairs(
    gold: Data | None, completions: Iterable[Completion], count: int, seed: int, unseen: np.ndarray | None = None
) -> tuple[list[Known], list[Known]]:
    """What a judge is measured on: a sample of people's preferences, and planted pairs.

    Args:
        gold: people's preferences, if there are any.
        completions: the user's prompts and replies, of which pairs are made; none for no planted pairs.
        count: people's pairs of each source, at most; a quarter as many planted pairs of each kind.
        seed: of the sample.
        unseen: True where a judge that was trained on preferences has not learned that one; none for all.
    """
    found = people(gold, count, seed, unseen) if gold is not None else []
    return found, plant(completions, max(1, count // PLANTED_SHARE), seed)


def audit(
    judges: Sequence[Judge],
    gold: Sequence[Known],
    planted: Sequence[Known],
    ledger: Ledger,
    settings: JudgeSettings,
    replay: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Audit:
    """Put pairs with a known better side to a judge, or to a panel, and count.

    Args:
        judges: one, or a panel.
        gold: people's preferences.
        planted: pairs made from the user's own completions.
        ledger: where replies are looked up and kept.
        settings: how the judge is asked. Replies that cannot be read don't stop an audit; they are what it measures.
        replay: answer from the ledger alone.
        on_progress: called with the number of pairs answered.
    """
    lenient = settings.model_copy(update={"max_unparsed": 1.0})
    pairs = [*gold, *planted]
    judgements = judge_pairs(judges, [known.pair for known in pairs], ledger, lenient, replay, on_progress) if pairs else []
    asked = [(known, judgement) for known, judgement in zip(pairs, judgements, strict=True) if judgement is not None]
    alone = len(judges) == 1
    members: dict[str, list[Judged]] = {}
    if not alone:
        for judge in judges:
            own = judge_pairs(judge, [known.pair for known, _ in asked], ledger, lenient, replay=True)
            members[_name(judge)] = [
                _judged(known, said) for (known, _), said in zip(asked, own, strict=True) if said and known.right != "tie"
            ]
    return Audit(
        judges=[{"name": judge.name, "model": judge.model, "template": judge.template} for judge in judges],
        people=_by_group(asked, gold, alone),
        planted=_by_group(asked, planted, alone),
        all_people=_of(asked, gold, alone),
        all_planted=_of(asked, [known for known in planted if known.right != "tie"], alone),
        members={name: statistics(judged) for name, judged in members.items()},
        asked=len(asked),
        wanted=len(pairs),
        max_unparsed=settings.max_unparsed,
        unparsed=_unparsed([judgement for _, judgement in asked], alone),
        examples=[*_mistakes(asked), *_unreadable(asked)],
    )


def _name(judge: Judge) -> str:
    return f"{judge.name} ({judge.model[:16]})" if judge.model else judge.name


def _judged(known: Known, judgement: Judgement) -> Judged:
    return Judged(judgement, known.right, known.longer)


def _by_group(asked: Sequence[tuple[Known, Judgement]], among: Sequence[Known], alone: bool) -> dict[str, Statistics]:
    groups = {known.group: [each for each in among if each.group == known.group] for known in among}
    found = {group: _of(asked, members, alone) for group, members in groups.items()}
    return {group: figures for group, figures in found.items() if figures is not None}


def _of(asked: Sequence[tuple[Known, Judgement]], among: Iterable[Known], alone: bool) -> Statistics | None:
    wanted = {id(known) for known in among}
    judged = [_judged(known, judgement) for known, judgement in asked if id(known) in wanted]
    return statistics(judged, by_order=alone) if judged else None


def _unparsed(judgements: Sequence[Judgement], alone: bool) -> Share:
    said = [reply.said for each in judgements for reply in each.replies] if alone else [each.verdict for each in judgements]
    return Share(said.count("unparsed"), len(said))


# The verdict ----------------------------------------------------------------------------------------------------------


def verdict(found: Audit) -> Finding:
    """Whether the judge may label.

    It may where, on people's preferences, the probability averaged over both orders is on the right side more often than one half,
    and more often than 'the longer one' on the same pairs, each at 95 percent confidence: an exact one-sided sign test and an exact
    one-sided paired test (McNemar's; `align.confidence.sign_flip_test`) with p < 0.05. A judge that guesses, and one that only sees
    length, are each accepted in at most one of twenty audits. Without people's preferences the planted pairs decide in the same way.
    """
    measured = found.all_people or found.all_planted
    if measured is None:
        return Finding(False, "nothing", ["no pair was judged, so nothing is known of the judge"], _remarks(found))
    on = "people" if found.all_people else "planted"
    what = "pairs that people judged" if on == "people" else "planted pairs"
    assert measured.p_chance is not None
    assert measured.p_longer is not None
    assert measured.longer_is_right is not None
    chance, longer = measured.p_chance < LEVEL, measured.p_longer < LEVEL
    readable = not found.unparsed.share or found.unparsed.share <= found.max_unparsed
    reasons = [
        f"right on {told(measured.correct)} of {measured.pairs:,} {what}, both orders averaged: "
        f"{'better' if chance else 'not better'} than chance (exact sign test, {_p(measured.p_chance)})",
        f"'the longer one' is right on {told(measured.longer_is_right)} of them: "
        f"the judge is {'better' if longer else 'not better'} (exact paired test, {_p(measured.p_longer)})",
    ]
    if not readable:
        reasons.append(f"{told(found.unparsed)} of its replies cannot be read, at most {found.max_unparsed:.0%} may be")
    if on == "planted":
        reasons.append("not measured against people: these pairs show that it sees the obvious, no more. Give --gold for a real measure")
    return Finding(chance and longer and readable, on, reasons, _remarks(found))


def _remarks(found: Audit) -> list[str]:
    """What else a user should know: of position, decisions, planted pairs and pairs that were not asked."""
    remarks = []
    whole = found.all_people or found.all_planted
    if whole and whole.first_position and whole.first_position.share is not None:
        first = whole.first_position.share
        if max(first, 1 - first) >= BIASED:
            place = "first" if first > 0.5 else "second"
            remarks.append(
                f"takes the side shown {place} in {max(first, 1 - first):.0%} of its replies; what flips with the order is left undecided"
            )
    if whole and whole.decided.share is not None and whole.decided.share < 0.5:
        remarks.append(f"decides only {told(whole.decided)} of the pairs")
    for kind, figures in found.planted.items():
        if figures.p_chance is not None and figures.p_chance >= LEVEL:
            remarks.append(f"planted pairs, {kind}: right on {told(figures.correct)} of {figures.pairs:,}, not better than chance")
    if found.asked < found.wanted:
        remarks.append(
            f"{found.wanted - found.asked:,} of {found.wanted:,} pairs were not judged: a budget ended, or the ledger lacks them"
        )
    return remarks


def told(share: Share) -> str:
    """A share in words, with its interval."""
    if share.share is None or share.interval is None:
        return "none"
    low, high = share.interval
    return f"{share.share:.1%} (95% interval {max(low, 0):.1%} to {high:.1%})"


def _p(value: float) -> str:
    return f"p = {value:.3f}" if value >= 0.001 else "p < 0.001"


# What is written down -------------------------------------------------------------------------------------------------


def facts(found: Audit) -> dict[str, Any]:
    """An audit and its verdict as JSON: for audit.json and for the artifact of a stage."""
    finding = verdict(found)
    return {
        "accepted": finding.accepted,
        "verdict": finding.headline,
        "measured_on": finding.measured_on,
        "reasons": finding.reasons,
        "remarks": finding.remarks,
        "judges": found.judges,
        "asked": found.asked,
        "wanted": found.wanted,
        "unparsed_replies": as_json(found.unparsed),
        "people": {name: as_json(figures) for name, figures in found.people.items()},
        "planted": {name: as_json(figures) for name, figures in found.planted.items()},
        "all_people": as_json(found.all_people),
        "all_planted": as_json(found.all_planted),
        "members": {name: as_json(figures) for name, figures in found.members.items()},
        "examples": found.examples,
    }


def _mistakes(asked: Sequence[tuple[Known, Judgement]]) -> list[dict[str, Any]]:
    """Pairs on which the judge was surest of the wrong side."""
    wrong = [
        (known, said) for known, said in asked if known.right != "tie" and _judged(known, said).earned == 0 and said.probability is not None
    ]
    surest = sorted(wrong, key=lambda each: -abs((each[1].probability or 0) - 0.5))
    return [_example("mistake", known, said) for known, said in surest[:MISTAKES]]


def _unreadable(asked: Sequence[tuple[Known, Judgement]]) -> list[dict[str, Any]]:
    unread = [(known, said) for known, said in asked if said.verdict == "unparsed"]
    return [_example("unparsed", known, said) for known, said in unread[:UNREADABLE]]


def _example(kind: str, known: Known, said: Judgement) -> dict[str, Any]:
    texts = {"prompt": as_text(known.pair.prompt), "a": as_text(known.pair.a), "b": as_text(known.pair.b)}
    cut = {name: text if len(text) <= SHOWN else f"{text[:SHOWN]} …" for name, text in texts.items()}
    return {"kind": kind, "group": known.group, "right": known.right, **cut, **as_facts(said)}
