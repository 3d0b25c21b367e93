"""Pairs to be judged out of sampled completions, and preferences out of judged pairs. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from align.judge.judgement import Judgement, Pair, as_facts
from align.records import Message


def draw_pairs(rows: Iterable[dict[str, Any]], per_prompt: int, seed: int) -> list[Pair]:
    """Pairs of different completions of each prompt, drawn by lot; the lot depends on the prompt and the seed alone.

    Args:
        rows: `prompt` and its `completions`, each with a `text`.
        per_prompt: pairs of each prompt, at most.
        seed: of the lot.
    """
    pairs = []
    for row in rows:
        texts = list(dict.fromkeys(completion["text"] for completion in row["completions"]))
        lot = random.Random(f"{seed} {hashlib.sha256(json.dumps(row['prompt'], sort_keys=True).encode()).hexdigest()}")
        both = list(combinations(texts, 2))
        pairs += [Pair(row["prompt"], reply(a), reply(b)) for a, b in lot.sample(both, min(per_prompt, len(both)))]
    return pairs


def reply(text: str) -> list[Message]:
    """A completion's text as the side of a pair."""
    return [Message(role="assistant", content=text)]


def preferences(
    pairs: Sequence[Pair], judgements: Sequence[Judgement | None], hard: bool, keep_undecided: bool
) -> Iterator[dict[str, Any]]:
    """What was decided, as rows that any trainer of preferences reads: chosen, rejected, and how sure the judge is.

    Args:
        pairs: as they were judged.
        judgements: one for each pair; None where it was not asked.
        hard: give every label the probability 1.
        keep_undecided: keep pairs that were judged but not decided, at the judge's probability.
    """
    for pair, judgement in zip(pairs, judgements, strict=True):
        if judgement is None or judgement.probability is None or (judgement.undecided and not keep_undecided):
            continue
        a_is_better = judgement.probability >= 0.5
        chosen, rejected = (pair.a, pair.b) if a_is_better else (pair.b, pair.a)
        sure = judgement.probability if a_is_better else 1 - judgement.probability
        yield {
            "prompt": pair.prompt,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_probability": 1.0 if hard else sure,
            "judgement": {**as_facts(judgement), "a_is": "chosen" if a_is_better else "rejected", "principle": pair.principle},
        }


def left_out(pairs: Sequence[Pair], judgements: Sequence[Judgement | None]) -> Iterator[dict[str, Any]]:
    """Pairs that were judged but not decided, with the reason and everything the judge said."""
    for pair, judgement in zip(pairs, judgements, strict=True):
        if judgement is not None and judgement.undecided:
            yield {"prompt": pair.prompt, "a": pair.a, "b": pair.b, "reason": judgement.undecided, "judgement": as_facts(judgement)}
