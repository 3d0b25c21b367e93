"""What the columns of a file hold, and which of them a field of ours can be: by their values, then by their names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.rows import number_of, parsed, shown
from align.data.turns import CONTENT_KEYS, ROLE_KEYS, ROLES
from align.data.votes import words_of


@dataclass(frozen=True)
class Column:
    """What one column holds, by most of its filled values.

    Attributes:
        holds: text, number, flag, turns (a conversation), turn, exchanges, texts, numbers, objects, object, lists or nothing.
        filled: share of the rows where it is not empty.
        length: of its texts, in characters on average.
        sample: its first filled value.
    """

    name: str
    words: tuple[str, ...]
    holds: str
    filled: float
    length: float
    sample: Any


# Our fields: the words that name one, best first, and what may stand beside them in a column's name.
WORDS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "prompt": (
        ("prompt", "instruction", "question", "query", "problem", "request", "input", "inputs", "user", "human", "q")
        + ("goal", "behavior", "prompts", "questions", "instructions", "history", "context", "post"),
        frozenset(("text", "user", "human", "original", "full", "input", "str", "string", "message", "content", "the", "initial", "turn")),
    ),
    "input": (("input", "context", "question", "query", "inputs"), frozenset(("text", "additional", "extra"))),
    "completion": (
        (
            "completion",
            "response",
            "answer",
            "output",
            "reply",
            "assistant",
            "solution",
            "bot",
            "target",
            "gpt",
            "chatgpt",
            "ai",
            "generation",
        )
        + ("a", "completions", "responses", "answers", "outputs", "replies", "solutions", "targets", "chosen"),
        frozenset(
            ("gold", "reference", "ideal", "expected", "final", "best", "correct", "model", "assistant", "bot", "target", "text", "gpt")
        )
        | frozenset(("generated", "message", "ai", "chosen", "preferred", "full", "str", "string", "content", "the", "4", "turn")),
    ),
    "system": (("system", "sys"), frozenset(("prompt", "message", "instruction", "instructions", "text", "content", "msg"))),
    "history": (("history",), frozenset(("chat", "conversation"))),
    "messages": (
        ("messages", "conversations", "conversation", "message", "chat", "dialogue", "dialog", "items", "turns", "contents", "data")
        + ("dialogues", "dialogs", "chats", "utterances", "history", "log"),
        frozenset(("openai", "chat", "conversation", "full", "chatml", "sharegpt", "formatted", "list", "message")),
    ),
    "tools": (("tools", "functions"), frozenset(("available", "json"))),
    "text": (("text", "content", "document", "body", "passage"), frozenset(("full", "raw"))),
    "passages": (("passages",), frozenset()),
    "chosen": (
        ("chosen", "preferred", "accepted", "winner", "winning", "win", "better", "good", "positive", "best", "pos"),
        frozenset(
            ("response", "answer", "output", "completion", "reply", "text", "message", "messages", "responses", "conversation", "turn")
        ),
    ),
    "rejected": (
        ("rejected", "dispreferred", "nonpreferred", "unpreferred", "loser", "losing", "lose", "worse", "bad", "negative", "incorrect")
        + ("wrong", "reject", "neg", "preferred", "worst"),
        frozenset(
            ("response", "answer", "output", "completion", "reply", "text", "message", "messages", "responses", "conversation", "turn")
        )
        | frozenset(("non", "not", "less", "best")),
    ),
    "label": (
        (
            "label",
            "kto",
            "desirable",
            "labels",
            "thumbs",
            "feedback",
            "accepted",
            "good",
            "liked",
            "preferred",
            "chosen",
            "rating",
            "score",
        ),
        frozenset(("is", "tag", "up", "human", "binary", "user")),
    ),
    "score": (
        ("overall", "score", "rating", "reward", "helpfulness", "quality", "rank", "grade"),
        frozenset(("score", "overall", "human", "average", "avg", "mean", "model", "rating", "quality", "reward", "gpt", "4", "pm")),
    ),
    "chosen_probability": (("probability", "prob"), frozenset(("chosen", "preference", "preferred"))),
    "margin": (("margin",), frozenset(("chosen", "preference", "score", "reward"))),
    "source": (("annotator", "judge", "labeler", "labeller", "rater", "grader"), frozenset(("id", "model", "name"))),
}
SPEECH = ("text", "turns", "turn")
_PLAIN_NAMES_FIRST = 10


def look(rows: Sequence[Mapping]) -> dict[str, Column]:
    """What each column holds, from a sample of rows, in the order they first come."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _column(name, [row.get(name) for row in rows]) for name in names}


def find(
    columns: Mapping[str, Column], field: str, holds: Iterable[str], pins: Mapping[str, str] | None = None, taken: Iterable[str] = ()
) -> str:
    """The column that is a field of ours, by name among those that hold what it should; empty if there is none.

    Args:
        columns: as `look` has them.
        field: one of `WORDS`.
        holds: what the column may hold.
        pins: the user's mapping, which settles it.
        taken: columns that are something else.
    """
    if pins and field in pins:
        return pins[field]
    allowed, others = set(holds), {*taken, *(pins or {}).values()}
    ranked = [
        (rank, len(column.words), index, name)
        for index, (name, column) in enumerate(columns.items())
        if column.holds in allowed and name not in others and (rank := fits(column.words, field)) is not None
    ]
    return min(ranked)[-1] if ranked else ""


def fits(words: tuple[str, ...], field: str) -> int | None:
    """How well a column's name says a field, 0 best; None if it does not."""
    names, beside = WORDS[field]
    single = next((i for i, name in enumerate(names) if words == (name,)), None)
    if single is not None:
        return single
    if len(words) > 1:
        for i, name in enumerate(names):
            if name in words and len(name) > 1 and all(word in beside for word in words if word != name):
                return i + _PLAIN_NAMES_FIRST
    return None


def named(columns: Mapping[str, Column], name: str, *holds: str) -> str:
    """The column of exactly that name, whatever its case, that holds one of these."""
    wanted = words_of(name)
    return next((found for found, column in columns.items() if column.words == wanted and (not holds or column.holds in holds)), "")


def what_it_holds(value: Any) -> str:
    """The class of one value; empty for none. Texts that are a conversation written as JSON are turns."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, str):
        if (
            value.lstrip()[:1] in ("[", "{")
            and len(value) < 1_000_000
            and any(f'{key}"' in value or f"{key}'" in value for key in ROLE_KEYS)
        ):
            inside = what_it_holds(parsed(value))
            return inside if inside == "turns" else "text"
        return "text"
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, Mapping):
        if is_turn(value):
            return "turn"
        return "turns" if isinstance(value.get("messages"), list) and what_it_holds(value["messages"]) == "turns" else "object"
    if isinstance(value, list | tuple):
        return _what_list_holds(value)
    return "other"


def is_turn(value: Any) -> bool:
    """Whether a value looks like one message: it says who spoke, and what."""
    if not isinstance(value, Mapping):
        return False
    roles = [value[key] for key in ROLE_KEYS if isinstance(value.get(key), str)]
    if not roles or not ({"role", "from"} & value.keys() or roles[0].lower() in ROLES):
        return False
    return any(key in value for key in (*CONTENT_KEYS, "tool_calls", "function_call"))


def exchange_keys(value: Any) -> tuple[str, str] | None:
    """The two keys of a dict that holds what a user asked and what was answered."""
    if not isinstance(value, Mapping):
        return None
    texts = {key: Column(key, words_of(key), "text", 1, 0, said) for key, said in value.items() if isinstance(said, str)}
    asked = find(texts, "prompt", ("text",))
    reply = find(texts, "completion", ("text",), taken=(asked,))
    return (asked, reply) if asked and reply else None


def described(column: Column) -> str:
    """A column for a person: what it holds and how it begins."""
    what = {"turns": "a list of messages", "turn": "a message", "flag": "true or false", "texts": "a list of texts"}
    article = {"text": "text", "nothing": "nothing", "object": "an object", "number": "a number"}
    held = what.get(column.holds) or article.get(column.holds) or f"a list of {column.holds}"
    return f"{column.name!r}: {held}" + ("" if column.holds == "nothing" else f" {shown(column.sample, 40)}")


def _column(name: str, values: list) -> Column:
    filled = [value for value in values if value is not None and value != "" and value != []]
    kinds = Counter(kind for value in filled[:200] if (kind := what_it_holds(value)))
    holds = kinds.most_common(1)[0][0] if kinds else "text" if any(value == "" for value in values) else "nothing"
    lengths = [len(value) for value in filled if isinstance(value, str)]
    sample = next((value for value in filled if what_it_holds(value) == holds), None)
    return Column(str(name), words_of(str(name)), holds, len(filled) / max(len(values), 1), sum(lengths) / max(len(lengths), 1), sample)


def _what_list_holds(values: Sequence) -> str:
    first = values[0]
    if isinstance(first, Mapping):
        if is_turn(first):
            return "turns"
        return "exchanges" if exchange_keys(first) and not any(number_of(value) is not None for value in first.values()) else "objects"
    if isinstance(first, list | tuple):
        return "exchanges" if len(first) == 2 and all(isinstance(said, str) for said in first) else "lists"
    if all(isinstance(value, str) for value in values):
        return "texts"
    return "numbers" if all(number_of(value) is not None for value in values) else "lists"


def distinct(rows: Sequence[Mapping], names: Iterable[str]) -> list[Any]:
    """The different filled values of these columns, those of lists one by one."""
    found: dict[str, Any] = {}
    for row in rows:
        for name in names:
            value = row.get(name)
            for one in value if isinstance(value, list | tuple) else [value]:
                if one is not None and one != "":
                    found.setdefault(json.dumps(one, default=str), one)
    return list(found.values())
