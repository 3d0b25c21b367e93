"""The shapes of data files: recognised from their columns and values, refused with what to do, and their converters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from align.data.columns import Column, look
from align.data.conversation_formats import ends_with_user, recognise_conversation, recognise_prompts, recognise_tree
from align.data.instructions import from_columns, from_messages, from_seeds, from_text
from align.data.preference_formats import chosen_and_rejected, has_unread_replies, recognise_preference
from align.data.preferences import (
    from_columns_of_replies,
    from_labelled,
    from_labels,
    from_lists_of_replies,
    from_rated_rows,
    from_sides,
    from_transcripts,
    from_votes,
    prompt_key,
    sides_apart,
)
from align.data.refusal import check_mapping, other_kind, unknown
from align.data.rows import Convert, Format, Kind, Unfit
from align.data.trees import from_trees
from align.errors import AlignError

__all__ = ["Format", "Kind", "Unfit", "convert", "converter", "group_key", "recognise"]

# A mapping with one of these sets of fields says all that there is to say; one with less is filled by recognition.
_WHOLE = ({"chosen", "rejected"}, {"response_a", "response_b"}, {"messages"}, {"text"}, {"prompt", "completion"})
_BY_NAME: dict[str, Callable[[Format], Convert]] = {
    **dict.fromkeys(("alpaca", "dolly", "question/answer", "prompt/completion", "prompts"), from_columns),
    **dict.fromkeys(("messages", "sharegpt", "exchanges", "alternating"), from_messages),
    **dict.fromkeys(("oasst", "oasst flat"), from_trees),
    **dict.fromkeys(("pairs", "implicit prompt"), from_sides),
    **dict.fromkeys(("scored replies", "verdicts on pairs"), from_columns_of_replies),
    "self-instruct": from_seeds,
    "text": from_text,
    "hh": from_transcripts,
    "votes": from_votes,
    "choice": from_lists_of_replies,
    "unpaired": from_labels,
    "rated rows": from_rated_rows,
}


def recognise(rows: Sequence[Mapping], kind: Kind | None, where: str, columns: Mapping[str, str] | None = None) -> Format:
    """What the rows of a file are, from their columns and values.

    Args:
        rows: the first thousand or so.
        kind: what is wanted of them; None to find out, where preferences come before conversations and these before
            prompts, and message trees are conversations.
        where: the file, for messages.
        columns: the user's mapping, our field to their column, which overrides what the names say.

    Raises:
        AlignError: what was found, what is nearest and what it lacks, and the mapping to try.
    """
    if not rows:
        raise AlignError(f"{where}: there are no rows to recognise a format from.")
    if odd := next((row for row in rows if not isinstance(row, Mapping)), None):
        raise AlignError(f"{where}: a row is {type(odd).__name__} {str(odd)[:40]!r}; expected objects with columns.")
    seen = look(rows)
    pins = dict(columns or {})
    check_mapping(pins, seen, where)
    if any(whole <= pins.keys() for whole in _WHOLE) or (kind == "prompt" and "prompt" in pins):
        seen = {name: column for name, column in seen.items() if name in pins.values()}
    found = _find(rows, seen, "preference" if kind == "feedback" else kind, pins)
    if found is not None and kind == "feedback" and found.kind == "preference":
        return _one_by_one(found)
    if found is None:
        raise unknown(look(rows), kind, where, pins)
    if kind and found.kind != kind:
        raise other_kind(found, kind, where, look(rows))
    return found


def converter(format: Format) -> Callable[[Mapping], list[dict]]:
    """Turns a row into canonical records; all that depends only on the format is looked up here, once.

    The records are {"messages": [...]} or {"text": ...}, {"prompt", "chosen", "rejected"}, {"prompt": [...]}, or {"prompt",
    "completion", "label"}, and the function raises `Unfit` for a row that cannot be one. Where the format gathers, its rows
    are {"rows": [row, ...]}.
    """
    if format.kind == "feedback":
        return from_labelled(format) if format.name == "unpaired" else sides_apart(converter(replace(format, kind="preference")))
    build = _builder(format)
    if format.kind != "prompt" or build in (from_columns, from_messages, from_seeds, from_text, from_trees):
        return build(format)
    compare = build(replace(format, kind="preference"))

    def prompts(row: Mapping) -> list[dict]:
        record = compare(row)[0]
        return [{field: record[field] for field in ("prompt", "tools") if field in record}]

    return prompts


def convert(format: Format, row: Mapping) -> list[dict]:
    """The canonical records of one row; `converter` is the fast way for many.

    Raises:
        Unfit: with the reason, if the row cannot be a record.
    """
    return converter(format)(row)


def group_key(format: Format, row: Mapping) -> str:
    """Where the format gathers: rows with the same key go together to `convert` as {"rows": [...]}."""
    if format.name == "oasst flat":
        return str(row.get(format.column("group"))) if "group" in format.columns else ""
    return prompt_key(format)(row)


def _builder(format: Format) -> Callable[[Format], Convert]:
    if format.name in _BY_NAME:
        return _BY_NAME[format.name]
    if format.name.endswith("transcript"):
        return from_text
    if format.name.endswith("transcripts"):
        return from_transcripts
    return from_lists_of_replies if "[]." in format.column("replies") or len(format.several("replies")) == 1 else from_columns_of_replies


def _find(rows: Sequence[Mapping], seen: Mapping[str, Column], kind: Kind | None, pins: Mapping[str, str]) -> Format | None:
    """The format of the wanted kind; or else one of another kind, for the refusal to tell."""
    if not pins and (tree := recognise_tree(seen, kind or "conversation")):
        return tree
    if kind == "prompt":
        return _find_prompts(rows, seen, pins)
    preference = recognise_preference(rows, seen, pins)
    if preference and (kind != "conversation" or preference.name != "rated rows"):
        return preference
    if kind == "preference" and any(chosen_and_rejected(seen, pins)):
        return None
    if pins.keys() & {"label", "score", "chosen", "rejected", "response_a", "response_b"}:
        return None
    talk = recognise_conversation(rows, seen, pins)
    unanswered = talk and talk.name in ("messages", "sharegpt") and ends_with_user(rows, talk.column("messages"))
    if talk and (kind == "conversation" or not unanswered):
        return talk
    return None if has_unread_replies(seen, pins) else recognise_prompts(rows, seen, pins)


def _one_by_one(found: Format) -> Format:
    """Preferences read as replies that are each good or bad."""
    if found.name == "unpaired":
        return replace(found, kind="feedback", gathers=False, why=f"{found.why.partition(';')[0]}.")
    return replace(found, kind="feedback", why=f"{found.why[:-1]}; the better is good, the other bad.")


def _find_prompts(rows: Sequence[Mapping], seen: Mapping[str, Column], pins: Mapping[str, str]) -> Format | None:
    if found := recognise_prompts(rows, seen, pins):
        return found
    other = recognise_preference(rows, seen, pins) or recognise_conversation(rows, seen, pins)
    if other is None:
        return None
    return replace(other, kind="prompt", why=f"{other.why[:-1]}; the prompt is what comes before the reply.")
