"""Pairs made from a user's own prompts and completions so that the better side is known. Imports no torch.

A judge that fails on these fails on what it is about to label; one that passes has shown no more than that it sees the obvious.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from align.data.convert import convert_source
from align.data.mix import Data
from align.data.read import first_rows, parts, rows
from align.data.sources import Source, find_files
from align.errors import AlignError
from align.judge.judgement import Pair
from align.judge.known import Known, known, lot
from align.records import Message, first_user_turn

SAME = "same text twice"
SHORTEST = 40  # characters of a reply that is cut in half; half of a short one may still be all there is to say
AGAIN = ("To say that again:", "In other words:", "Once more, to sum up:", "To repeat:")

Completion = tuple[list[Message], list[Message]]  # a prompt and a reply to it


def planted(completions: Iterable[Completion], count: int, seed: int) -> list[Known]:
    """Pairs of four kinds, of at most `count` prompts each: a text twice, half of it, another prompt's, and twice as long for nothing.

    Args:
        completions: prompts with their replies. One of each prompt is used in each kind.
        count: pairs of each kind, at most.
        seed: decides which, and which side is the better one. The same completions and seed give the same pairs.
    """
    pool = [(prompt, reply) for prompt, reply in completions if reply[-1]["content"].strip()]
    pairs = []
    for kind, make in _KINDS.items():
        pairs += make(_drawn(pool, kind, seed), count, seed, kind)
    return pairs


def _drawn(pool: Sequence[Completion], kind: str, seed: int) -> list[Completion]:
    """One reply of each prompt, in an order that depends on the seed and the texts alone."""
    ordered = sorted(pool, key=lambda each: lot(seed, kind, str(each[0]), str(each[1])))
    return list({json.dumps(prompt, sort_keys=True): (prompt, reply) for prompt, reply in ordered}.values())


def _same(drawn: list[Completion], count: int, seed: int, kind: str) -> list[Known]:
    return [Known(Pair(prompt, reply, reply), "tie", kind) for prompt, reply in drawn[:count]]


def _halved(drawn: list[Completion], count: int, seed: int, kind: str) -> list[Known]:
    long = [(prompt, reply) for prompt, reply in drawn if len(reply[-1]["content"].strip()) >= SHORTEST]
    return [known(prompt, reply, _with(reply, first_half(reply[-1]["content"])), kind, seed) for prompt, reply in long[:count]]


def _swapped(drawn: list[Completion], count: int, seed: int, kind: str) -> list[Known]:
    found = []
    for at, (prompt, reply) in enumerate(drawn):
        others = (drawn[(at + step) % len(drawn)] for step in range(1, len(drawn)))
        theirs = (other for asked, other in others if first_user_turn(asked) != first_user_turn(prompt) and other != reply)
        if (other := next(theirs, None)) is not None:
            found.append(known(prompt, reply, other, kind, seed))
    return found[:count]


def _padded(drawn: list[Completion], count: int, seed: int, kind: str) -> list[Known]:
    found = []
    for prompt, reply in drawn[:count]:
        text = reply[-1]["content"]
        again = AGAIN[lot(seed, kind, text) % len(AGAIN)]
        found.append(known(prompt, reply, _with(reply, f"{text}\n\n{again} {text}"), kind, seed))
    return found


_KINDS: dict[str, Callable[[list[Completion], int, int, str], list[Known]]] = {
    SAME: _same,
    "cut in half": _halved,
    "another prompt's": _swapped,
    "padded copy": _padded,
}


def first_half(text: str) -> str:
    """The first half of a text, up to the last white space in it; to the middle where there is none."""
    half = text.strip()[: len(text.strip()) // 2]
    return half.rsplit(maxsplit=1)[0] if len(half.split()) > 1 else half


def _with(reply: list[Message], text: str) -> list[Message]:
    return [*reply[:-1], {**reply[-1], "content": text}]


# Where the completions come from --------------------------------------------------------------------------------------


def of_pairs(pairs: Iterable[Pair]) -> list[Completion]:
    """Both sides of pairs that are to be labelled."""
    return [(pair.prompt, side) for pair in pairs for side in (pair.a, pair.b)]


def read_completions(source: Source, where: str) -> list[Completion]:
    """Prompts and replies of a file: of conversations, of preferences (the chosen ones), or of sampled completions.

    Raises:
        AlignError: where it holds no replies, or cannot be read.
    """
    files = find_files(source, where)
    if files and _sampled(files[0]):
        return [each for file in files for each in _of_sampled(file)]
    converted = convert_source(source, None, where)
    data = Data(converted.report["kind"], (source,), (converted,))
    if data.kind == "prompt":
        raise AlignError(
            f"{where}: {source.path} holds prompts without replies; planted pairs are made of replies. "
            "Give conversations, preferences, or the completions.jsonl of a sample stage."
        )
    found = []
    for record in data.records():
        if "prompt" in record:
            found.append((record["prompt"], record["chosen"]))
        elif "messages" in record and len(record["messages"]) > 1:
            found.append((record["messages"][:-1], record["messages"][-1:]))
    if not found:
        raise AlignError(f"{where}: {source.path} holds no prompt with a reply to it; planted pairs are made of replies.")
    return found


def _sampled(path: Path) -> bool:
    """Whether a file is one of a sample stage's: a prompt and several completions a row."""
    first = first_rows(path, 1)
    return bool(first) and _is_sampled(first[0])


def _is_sampled(row: Any) -> bool:
    completions = row.get("completions") if isinstance(row, dict) else None
    turns = isinstance(completions, list) and isinstance(row.get("prompt"), list)
    return turns and all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in completions)  # type: ignore[union-attr]


def sampled_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a sample stage's completions.jsonl; none where the file is something else.

    Raises:
        AlignError: where its first row is one and a later one is not.
    """
    if not _sampled(path):
        return None
    found = []
    for line, row in rows(parts(path, 1)[0]):
        if not isinstance(row, dict) or not _is_sampled(row):
            raise AlignError(f"{path}:{line}: is no row of sampled completions; expected 'prompt', a list of messages, and 'completions'.")
        found.append(row)
    return found


def _of_sampled(path: Path) -> list[Completion]:
    return [(row["prompt"], [Message(role="assistant", content=c["text"])]) for row in sampled_rows(path) or [] for c in row["completions"]]
