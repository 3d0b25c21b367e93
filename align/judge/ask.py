"""Pairs through a judge, in both orders: what the ledger knows is looked up, the rest is asked, and every reply is kept as it comes."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from align.confidence import wilson_interval
from align.errors import AlignError
from align.judge.judgement import Judge, Judgement, Pair, Question, Reply, Said, combine, together
from align.judge.ledger import Key, Ledger, key_of
from align.prompts import read_principles
from align.settings import JudgeSettings

FIRST_SLICE, LARGEST_SLICE = 64, 4096  # questions asked in one go; between slices the budgets and the unparsed replies are counted
ENOUGH = 20  # replies before too many unparsed ones can stop the asking early
SURE = 4.0  # standard deviations: how sure it must be then that there are too many


def judge_pairs(
    judges: Judge | Sequence[Judge],
    pairs: Sequence[Pair],
    ledger: Ledger,
    settings: JudgeSettings,
    replay: bool = False,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Judgement | None]:
    """Judge every pair in both orders.

    Args:
        judges: one, or a panel whose judgements are put together.
        pairs: to be judged. One without a principle gets one of the settings' constitution, if there is one.
        ledger: where replies are looked up and kept.
        settings: budgets and limits. The budgets are for all judges together, and for what is asked, not for what is looked up.
        replay: answer from the ledger alone; no judge is asked.
        on_progress: called with the number of pairs done.

    Returns:
        One judgement for each pair; None for one that was not asked because a budget ended, or, with `replay`, is not in the ledger.

    Raises:
        AlignError: where more than settings.max_unparsed of the replies cannot be read. They are all in the ledger.
    """
    members = list(judges) if isinstance(judges, Sequence) else [judges]
    pairs = with_principles(pairs, settings)
    budget = _Budget(settings)
    each: list[list[Judgement | None]] = []

    def tell(done: int) -> None:
        on_progress((len(each) * len(pairs) + done) // len(members))

    for judge in members:
        asking = _Asking(judge, pairs, ledger, settings, budget)
        if not replay:
            asking.ask(tell)
        asking.stop_if_unreadable()
        each.append(asking.judgements())
    if len(members) == 1:
        return each[0]
    return [together(said, settings.abstain) if all(said) else None for said in zip(*each, strict=True)]  # type: ignore[arg-type]


class _Asking:
    """One judge and all pairs: what is to be known, and what is known."""

    def __init__(self, judge: Judge, pairs: Sequence[Pair], ledger: Ledger, settings: JudgeSettings, budget: _Budget):
        """Find out what the ledger knows."""
        self.judge, self.ledger, self.settings, self.budget = judge, ledger, settings, budget
        self.pointwise = getattr(judge, "pointwise", False)
        questions = [_alone(pair) if self.pointwise else pair.questions() for pair in pairs]
        self.keys = [self._keys(*both) for both in questions]
        self.questions = {key: q for keys, both in zip(self.keys, questions, strict=True) for key, q in zip(keys, both, strict=True)}
        found = ledger.find(judge, list(self.questions))
        self.replies: dict[Key, Reply] = {key: reply for key, reply in zip(self.questions, found, strict=True) if reply is not None}

    def _keys(self, one: Question, other: Question) -> tuple[Key, Key]:
        key = key_of(one)
        return key, key_of(other) if self.pointwise else Key(key.prompt, key.second, key.first)

    def ask(self, on_progress: Callable[[int], None]) -> None:
        """Ask for what is missing, both orders of a pair in one slice, as long as the budgets last."""
        missing = self._missing()
        at, size = 0, FIRST_SLICE
        while at < len(missing):
            batch: list[Key] = []
            room = min(size, self.budget.room())
            while at < len(missing) and len(batch) + len(missing[at]) <= room:
                batch += missing[at]
                at += 1
            if not batch:
                return
            self._ask_slice(batch, on_progress)
            self.budget.check_price([self.replies[key] for key in batch if key in self.replies], self.judge)
            if len(self.replies) >= ENOUGH:
                self.stop_if_unreadable(z=SURE)
            size = min(2 * size, LARGEST_SLICE)

    def _ask_slice(self, batch: list[Key], on_progress: Callable[[int], None]) -> None:
        def on_reply(place: int, reply: Reply) -> None:
            self.ledger.add(self.judge, [(batch[place], reply)])
            self.replies[batch[place]] = reply
            self.budget.spend(reply)
            on_progress(len(self.replies) * len(self.keys) // len(self.questions))

        self.judge.ask([self.questions[key] for key in batch], on_reply)

    def _missing(self) -> list[list[Key]]:
        """The questions of each pair that nobody has answered; one that several pairs share is the first one's."""
        known = set(self.replies)
        missing = []
        for keys in self.keys:
            new = [key for key in dict.fromkeys(keys) if key not in known]
            known.update(new)
            missing.append(new)
        return [new for new in missing if new]

    def stop_if_unreadable(self, z: float = 0.0) -> None:
        """Raise where too many replies cannot be read; with `z`, only where so many standard deviations leave no doubt of it."""
        unread = [reply.raw for reply in self.replies.values() if reply.said == "unparsed"]
        allowed = self.settings.max_unparsed
        if unread and wilson_interval(len(unread), len(self.replies), z)[0] > allowed:
            first = " ".join(unread[0].split())
            raise AlignError(
                f"judge {self.judge.name}: the reply was unreadable for {len(unread)} of {len(self.replies)} questions "
                f"({len(unread) / len(self.replies):.0%}; at most {allowed:.0%} allowed). First: {first[:200]!r}\n"
                f"  All replies are kept in {self.ledger.path}. Make the template clearer, take another judge, or raise max_unparsed."
            )

    def judgements(self) -> list[Judgement | None]:
        """What is known, pair by pair."""
        found: list[Judgement | None] = []
        for one, other in self.keys:
            if one not in self.replies or other not in self.replies:
                found.append(None)
                continue
            replies = self.replies[one], self.replies[other]
            if self.pointwise:
                replies = compare_scores(*replies, self.settings.margin)
            found.append(combine(*replies, self.settings.abstain, self.judge.name))
        return found


def compare_scores(a: Reply, b: Reply, margin: float) -> tuple[Reply, Reply]:
    """Two scores as the replies of a pair in both orders. Their difference is the log-odds; a smaller one than `margin` is a tie."""
    if a.score is None or b.score is None:
        return a, b
    difference = a.score - b.score
    sides: tuple[Said, Said] = (
        ("tie", "tie") if abs(difference) < margin else ("first", "second") if difference > 0 else ("second", "first")
    )
    return replace(a, said=sides[0], log_odds=difference), replace(b, said=sides[1], log_odds=-difference)


def _alone(pair: Pair) -> tuple[Question, Question]:
    """Each completion by itself."""
    return Question(pair.prompt, pair.a, None, pair.principle), Question(pair.prompt, pair.b, None, pair.principle)


def with_principles(pairs: Sequence[Pair], settings: JudgeSettings) -> list[Pair]:
    """The pairs, each with a principle of the settings' constitution, if there is one; a pair that has one keeps it."""
    principles = read_principles(settings.constitution) if settings.constitution else []
    return [_with_principle(pair, principles, settings.seed) for pair in pairs]


def _with_principle(pair: Pair, principles: Sequence[str], seed: int) -> Pair:
    """The pair with a principle drawn by lot: the seed and the pair decide, not its place or the order of its completions."""
    if not principles or pair.principle is not None:
        return pair
    prompt, a, b = key_of(Question(pair.prompt, pair.a, pair.b))
    lot = random.Random(hashlib.sha256(b"".join([str(seed).encode(), prompt, *sorted([a, b])])).digest())
    return replace(pair, principle=lot.choice(principles))


class _Budget:
    """What may still be asked."""

    def __init__(self, settings: JudgeSettings):
        """The clock starts now."""
        self.settings = settings
        self.begun = time.monotonic()
        self.asked, self.spent, self.dearest = 0, 0.0, 0.0

    def spend(self, reply: Reply) -> None:
        """Count a reply."""
        self.asked += 1
        self.spent += reply.price or 0.0
        self.dearest = max(self.dearest, reply.price or 0.0)

    def room(self) -> float:
        """Questions that may be asked in one go. Half of what the time and the money should last for, so that neither is overdrawn."""
        limits, rooms = self.settings, [math.inf]
        if limits.max_requests is not None:
            rooms.append(limits.max_requests - self.asked)
        if limits.max_seconds is not None:
            gone = time.monotonic() - self.begun
            left = limits.max_seconds - gone
            rooms.append(0 if left <= 0 else max(2, left / 2 / (gone / self.asked)) if self.asked else 2)
        if limits.max_cost is not None:
            affordable = (limits.max_cost - self.spent) / self.dearest if self.dearest else 2 if not self.asked else math.inf
            rooms.append(max(affordable / 2, min(affordable, 2)))
        return min(rooms)

    def check_price(self, replies: Iterable[Reply], judge: Judge) -> None:
        """A limit on the price needs prices.

        Raises:
            AlignError: where a reply has none.
        """
        if self.settings.max_cost is not None and any(reply.price is None for reply in replies):
            raise AlignError(
                f"judge {judge.name}: max_cost is {self.settings.max_cost}, but the price of its replies is unknown. Expected the settings "
                "prompt_price and completion_price, and an endpoint that tells how many tokens it read and wrote.\n"
                "  Set them (price of a million tokens), or limit max_requests instead."
            )
