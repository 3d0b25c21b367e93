"""What a judge is asked, what it replies, and what both orders say together. Pure; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, Protocol

from align.prompts import as_text
from align.records import Message

Said = Literal["first", "second", "tie", "unparsed"]  # by position, as the judge saw the pair
Verdict = Literal["a", "b", "tie", "unparsed"]
Undecided = Literal["flipped", "abstained", "tie", "unparsed"]


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, not labelled yet. `principle` is what to compare them by, where one was drawn."""

    prompt: list[Message]
    a: list[Message]
    b: list[Message]
    principle: str | None = None

    def questions(self) -> tuple[Question, Question]:
        """The pair in both orders: a first, then b first."""
        return Question(self.prompt, self.a, self.b, self.principle), Question(self.prompt, self.b, self.a, self.principle)


@dataclass(frozen=True)
class Question:
    """What is asked once: a pair in one order, or one completion by itself (`second` is none)."""

    prompt: list[Message]
    first: list[Message]
    second: list[Message] | None = None
    principle: str | None = None

    def fields(self) -> dict[str, str]:
        """What fills a judge's template."""
        if self.second is None:
            completions = {"completion": as_text(self.first)}
        else:
            completions = {"first": as_text(self.first), "second": as_text(self.second)}
        principle = {} if self.principle is None else {"principle": self.principle}
        return {"prompt": as_text(self.prompt), **completions, **principle}


@dataclass(frozen=True)
class Reply:
    """What a judge said to one question.

    `log_odds` is log p(first) - log p(second) where the judge gives log-probabilities, unknown where it only wrote a verdict.
    `score` is for a completion judged by itself. Tokens, seconds and price (in the currency of the user's price) are this
    question's; unknown stays none.
    """

    said: Said
    raw: str
    log_odds: float | None = None
    logprobs: dict[str, float] | None = None  # of the answers, as the judge would write them
    score: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None
    price: float | None = None


@dataclass(frozen=True)
class Judgement:
    """Both orders of a pair together. `probability` is how sure the judge is that a is better; none where that is unknown."""

    verdict: Verdict
    probability: float | None
    undecided: Undecided | None
    replies: tuple[Reply, Reply]  # a first, b first
    judge: str = ""


class Judge(Protocol):
    """Anything that answers questions. Its three names are what the ledger keys a reply by.

    One that scores completions by themselves has `pointwise = True` besides.
    """

    name: str  # kind and where it is: 'local embedded', 'endpoint http://localhost:8000/v1'
    model: str  # the revision, identity or endpoint model
    template: str  # the fingerprint of the template; empty where none is used

    def ask(self, questions: Sequence[Question], on_reply: Callable[[int, Reply], None]) -> None:
        """Answer every question, in any order, telling each reply (by the question's place) as soon as it is there.

        Raises:
            AlignError: where the judge cannot go on. Replies told before stay.
        """
        ...


_SAID: dict[Said, Verdict] = {"first": "a", "second": "b", "tie": "tie", "unparsed": "unparsed"}
_SWAPPED: dict[Said, Verdict] = {"first": "b", "second": "a", "tie": "tie", "unparsed": "unparsed"}


def verdict_of(reply: Reply, swapped: bool) -> Verdict:
    """A reply's verdict in terms of the pair; `swapped` where b was shown first."""
    return (_SWAPPED if swapped else _SAID)[reply.said]


def combine(a_first: Reply, b_first: Reply, abstain: float = 0.0, judge: str = "") -> Judgement:
    """Both orders of a pair as one judgement.

    The log-probabilities of a and of b are averaged over the orders: p(a) = sigmoid of the mean log-odds. Without
    log-probabilities it is the mean of what was written (1, 0.5 for a tie, 0).

    Args:
        a_first: the reply where a was shown first.
        b_first: the reply where b was shown first.
        abstain: a probability this near 0.5, or nearer, is undecided.
        judge: who said it.
    """
    verdicts = verdict_of(a_first, swapped=False), verdict_of(b_first, swapped=True)
    replies = (a_first, b_first)
    if "unparsed" in verdicts:
        return Judgement("unparsed", None, "unparsed", replies, judge)
    if a_first.log_odds is not None and b_first.log_odds is not None:
        probability = sigmoid((a_first.log_odds - b_first.log_odds) / 2)
    else:
        probability = fmean({"a": 1.0, "tie": 0.5, "b": 0.0}[verdict] for verdict in verdicts)
    undecided: Undecided | None = None
    if verdicts[0] != verdicts[1]:
        undecided = "flipped"
    elif verdicts[0] == "tie":
        undecided = "tie"
    elif abs(probability - 0.5) <= abstain:
        undecided = "abstained"
    verdict = "tie" if undecided else verdicts[0]
    return Judgement(verdict, probability, undecided, replies, judge)


def together(judgements: Sequence[Judgement], abstain: float = 0.0) -> Judgement:
    """A panel's judgement of a pair: the mean of its members' probabilities, those that could be read.

    A member that is undecided counts with its probability, so it neither decides nor blocks. The replies are the first member's.
    """
    read = [j for j in judgements if j.probability is not None]
    if not read:
        return Judgement("unparsed", None, "unparsed", judgements[0].replies, "panel")
    probability = fmean(j.probability for j in read if j.probability is not None)
    decided = [j for j in read if j.undecided is None]
    undecided: Undecided | None = None
    if not decided:
        undecided = read[0].undecided
    elif abs(probability - 0.5) <= abstain:
        undecided = "abstained"
    verdict: Verdict = "tie" if undecided else ("a" if probability > 0.5 else "b")
    return Judgement(verdict, probability, undecided, judgements[0].replies, "panel")


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def as_facts(judgement: Judgement) -> dict[str, Any]:
    """A judgement as the `judgement` of a preference row: who said so, the verdict and log-odds in each order, raw replies."""
    a_first, b_first = judgement.replies
    return {
        "judge": judgement.judge,
        "verdict": judgement.verdict,
        "undecided": judgement.undecided,
        "probability": judgement.probability,
        "orders": [
            {"order": order, "verdict": verdict_of(reply, swapped), "log_odds": reply.log_odds, "raw": reply.raw}
            for order, reply, swapped in (("ab", a_first, False), ("ba", b_first, True))
        ],
    }
