"""How well judgements agree with what is right, with each other and with 'the longer one'. Pure; imports no torch.

What cannot be read is never a tie and never left out in silence: accuracies are over all pairs that were asked, an unparsed one
counts as not right, and the share of unparsed replies stands beside them. A probability of exactly one half earns half a pair,
as a coin would on average; so does 'the longer one' where both sides are equally long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any, Literal

from align.confidence import Bin, calibration_error, reliability, sign_flip_test, wilson_interval
from align.judge.judgement import Judgement, Reply, Verdict, verdict_of

Right = Literal["a", "b", "tie"]
BINS = 10  # of the confidence, from one half to one


@dataclass(frozen=True)
class Judged:
    """A judgement beside what is right. `longer` is how many characters a has more than b."""

    judgement: Judgement
    right: Right
    longer: int

    @property
    def earned(self) -> float:
        """1 where the averaged probability is on the right side, 0.5 where it is exactly one half, 0 where it is not or is unknown.

        Where neither side is right, 1 where the judge read both orders and did not decide.
        """
        probability = self.judgement.probability
        if probability is None:
            return 0.0
        if self.right == "tie":
            return float(self.judgement.undecided is not None)
        return 0.5 if probability == 0.5 else float((probability > 0.5) == (self.right == "a"))

    @property
    def longer_earned(self) -> float:
        """What 'the longer one' earns."""
        return 0.5 if self.longer == 0 else float((self.longer > 0) == (self.right == "a"))

    def verdict(self, swapped: bool) -> Verdict:
        """What was said in one order; `swapped` where b was shown first."""
        return verdict_of(self.judgement.replies[swapped], swapped)


@dataclass(frozen=True)
class Share:
    """A part of n; halves may be counted."""

    count: float
    n: int

    @property
    def share(self) -> float | None:
        """The part, none of nothing."""
        return self.count / self.n if self.n else None

    @property
    def interval(self) -> list[float] | None:
        """Its 95 percent interval (Wilson 1927)."""
        return wilson_interval(self.count, self.n) if self.n else None


@dataclass(frozen=True)
class Statistics:
    """What the judgements of a group of pairs come to. None is what cannot be known of it."""

    pairs: int
    correct: Share  # both orders averaged
    correct_ab: Share | None  # a shown first; none for a panel, whose members were asked on their own
    correct_ba: Share | None
    correct_both: Share | None
    agree: Share | None  # pairs with the same verdict in both orders, of those read in both
    kappa: float | None  # Cohen's, between the orders
    first_position: Share | None  # how often the side shown first is taken, over pairs with a side taken in both orders
    longer_wins: Share  # pairs in which the longer side is preferred, of those that differ in length and are not even
    longer_is_right: Share | None  # the length-only baseline
    decided: Share
    decided_correct: Share | None
    undecided: dict[str, int]
    tied_replies: Share | None
    unparsed_replies: Share | None
    p_chance: float | None  # of an exact one-sided sign test against one half
    p_longer: float | None  # of an exact one-sided paired test against 'the longer one'
    calibration_error: float | None
    bins: list[Bin]
    price_per_thousand: float | None  # pairs, that is two thousand replies
    seconds_per_thousand: float | None  # of the judge's time, one reply after the other


def statistics(judged: Sequence[Judged], by_order: bool = True) -> Statistics:
    """All figures of a group of pairs, in which there is either a right side everywhere or nowhere.

    Args:
        judged: the pairs that were asked.
        by_order: whether the replies in each order are the judge's own; those of a panel are its first member's.
    """
    sided = [item for item in judged if item.right != "tie"]
    earned = [item.earned for item in judged]
    decided = [item for item in judged if item.judgement.undecided is None]
    preferred = [item for item in judged if item.longer != 0 and item.judgement.probability not in (None, 0.5)]
    bins = reliability(sure_and_right(sided), BINS)
    return Statistics(
        pairs=len(judged),
        correct=Share(sum(earned), len(judged)),
        longer_wins=_share(preferred, lambda item: (item.judgement.probability > 0.5) == (item.longer > 0)),
        longer_is_right=Share(sum(item.longer_earned for item in sided), len(sided)) if sided else None,
        decided=Share(len(decided), len(judged)),
        decided_correct=_share([item for item in decided if item.right != "tie"], lambda item: item.judgement.verdict == item.right)
        if sided
        else None,
        undecided=dict(Counter(item.judgement.undecided for item in judged if item.judgement.undecided)),
        p_chance=sign_flip_test([item.earned - 0.5 for item in sided]) if sided else None,
        p_longer=sign_flip_test([item.earned - item.longer_earned for item in sided]) if sided else None,
        calibration_error=calibration_error(bins),
        bins=bins,
        **(_of_orders(judged) if by_order else dict.fromkeys(_ORDER_FIELDS)),
        **_costs([reply for item in judged for reply in item.judgement.replies]),
    )


_ORDER_FIELDS = (*("correct_ab", "correct_ba", "correct_both", "agree", "kappa", "first_position", "tied_replies", "unparsed_replies"),)


def _of_orders(judged: Sequence[Judged]) -> dict[str, Any]:
    """What the replies say order by order."""
    verdicts = [(item.verdict(swapped=False), item.verdict(swapped=True), item.right) for item in judged]
    read = [(ab, ba) for ab, ba, _ in verdicts if "unparsed" not in (ab, ba)]
    sides = [(ab, ba) for ab, ba in read if "tie" not in (ab, ba)]
    replies = [verdict for ab, ba, _ in verdicts for verdict in (ab, ba)]
    return {
        "correct_ab": _share(verdicts, lambda v: v[0] == v[2]),
        "correct_ba": _share(verdicts, lambda v: v[1] == v[2]),
        "correct_both": _share(verdicts, lambda v: v[0] == v[1] == v[2]),
        "agree": _share(read, lambda v: v[0] == v[1]),
        "kappa": kappa([ab for ab, _ in read], [ba for _, ba in read]),
        "first_position": Share(sum(((ab == "a") + (ba == "b")) / 2 for ab, ba in sides), len(sides)),
        "tied_replies": _share(replies, lambda verdict: verdict == "tie"),
        "unparsed_replies": _share(replies, lambda verdict: verdict == "unparsed"),
    }


def kappa(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (Cohen 1960): 1 - observed disagreement / disagreement expected by chance.

    Returns:
        None where no disagreement is to be expected: nothing was rated, or both said one and the same thing always.
    """
    n = len(ours)
    mine, others = Counter(ours), Counter(theirs)
    classes = sorted(mine | others, key=str)
    expected = sum(mine[one] * others[other] / n for one in classes for other in classes if one != other)
    observed = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return 1 - observed / expected if expected else None


def sure_and_right(judged: Sequence[Judged]) -> list[tuple[float, float]]:
    """The judge's confidence max(p, 1 - p) in each pair that it read, and what that earned."""
    known = [(item.judgement.probability, item.earned) for item in judged]
    return [(max(p, 1 - p), earned) for p, earned in known if p is not None]


def _costs(replies: Sequence[Reply]) -> dict[str, Any]:
    """Price and seconds of a thousand pairs, by the replies of which they are known."""
    prices = [reply.price for reply in replies if reply.price is not None]
    seconds = [reply.seconds for reply in replies if reply.seconds is not None]
    return {
        "price_per_thousand": 2000 * fmean(prices) if prices else None,
        "seconds_per_thousand": 2000 * fmean(seconds) if seconds else None,
    }


def _share(items: Sequence[Any], holds: Callable[[Any], bool]) -> Share:
    return Share(sum(map(holds, items)), len(items))


def as_json(value: Any) -> Any:
    """Statistics as JSON has them; a share with its interval."""
    if isinstance(value, Share):
        return {"share": value.share, "count": value.count, "n": value.n, "interval": value.interval}
    if isinstance(value, Statistics | Bin):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    return [as_json(item) for item in value] if isinstance(value, list) else value
