"""What is said of a file that is not recognised: what it holds, what is nearest, and the mapping to try."""

from __future__ import annotations

from collections.abc import Mapping

from align.data.columns import SPEECH, WORDS, Column, described, find
from align.data.preference_formats import chosen_and_rejected, two_replies
from align.data.rows import Format, Kind
from align.errors import AlignError, did_you_mean

FIELDS: tuple[str, ...] = (
    "prompt",
    "completion",
    "system",
    "input",
    "history",
    "passages",
    "messages",
    "tools",
    "text",
    "chosen",
    "rejected",
)
FIELDS += ("response_a", "response_b", "label", "score", "chosen_probability", "margin", "source")
_NEEDS = {
    "conversation": "instructions with answers, or conversations",
    "preference": "preferences",
    "prompt": "prompts",
    "feedback": "replies that are each labelled good or bad, or preferences",
}
_USE = {"conversation": "data=", "preference": "preferences=", "prompt": "prompts=", "feedback": "data= of recipe.trl"}
_ABOUT_THE_ROW = {
    "id",
    "idx",
    "index",
    "key",
    "uuid",
    "hash",
    "url",
    "model",
    "source",
    "category",
    "type",
    "name",
    "lang",
    "language",
    "date",
}
_ABOUT_THE_ROW |= {"role", "topic", "subset", "split", "strategy", "judge", "winner", "label", "tags", "timestamp", "score"}


def mapping_to_try(mapping: Mapping[str, str]) -> str:
    """A mapping of columns as a recipe and as the command line take it."""
    recipe = ", ".join(f'"{field}": "{column}"' for field, column in mapping.items())
    line = ",".join(f"{field}={column}" for field, column in mapping.items())
    return f"columns={{{recipe}}}  or  --columns {f'{chr(34)}{line}{chr(34)}' if ' ' in line else line}"


def check_mapping(columns: Mapping[str, str], seen: Mapping[str, Column], where: str) -> None:
    """Refuses a mapping with fields that are none of ours, or columns that are not in the file.

    Raises:
        AlignError: naming them all, each with the nearest name.
    """
    problems = []
    for field, column in columns.items():
        if field not in FIELDS:
            problems.append(f"{field!r} is no field.{did_you_mean(field, FIELDS)}")
        if column not in seen:
            problems.append(f"{column!r} is no column of the file.{did_you_mean(column, seen)}")
    if problems:
        fields, names = ", ".join(FIELDS), ", ".join(map(repr, seen))
        raise AlignError(f"{where}: columns: {' '.join(problems)}\n  Fields: {fields}.\n  Columns of the file: {names}.")


def unknown(seen: Mapping[str, Column], kind: Kind | None, where: str, pins: Mapping[str, str]) -> AlignError:
    """The refusal of a file whose shape is not known."""
    nearest, lacks = _nearest_format(seen, kind, pins)
    shown = "\n".join(f"    {described(column)}" for column in list(seen.values())[:20])
    more = f"\n    and {len(seen) - 20} more" if len(seen) > 20 else ""
    wanted = _NEEDS[kind] if kind else "conversations, preferences or prompts"
    mapped = f" with the mapping {mapping_to_try(pins).partition('  or')[0]}" if pins else ""
    guess = _guess(seen, kind, pins)
    tried = (
        f"Try {mapping_to_try(guess)}"
        if guess
        else "No column holds text that could be mapped: bring the file into one of the known shapes."
    )
    what = f"{where}: the columns are not recognised as {wanted}{mapped}"
    return AlignError(f"{what}. Found:\n{shown}{more}\n  The nearest format is {nearest}; {lacks}.\n  {tried}")


def other_kind(found: Format, kind: Kind, where: str, seen: Mapping[str, Column]) -> AlignError:
    """The refusal of a file that is understood, but is not of the kind that is wanted."""
    about = f"{where}: holds {found.kind}s (format {found.name!r}: {found.why.rstrip('.')}); expected {_NEEDS[kind]}."
    if kind == "conversation" and found.kind == "preference":
        mapping = _chosen_side(found, seen)
        train = f", or train on the chosen side with {mapping_to_try(mapping)}" if mapping else ""
        if found.name == "unpaired":
            train = "; to train on the good replies, keep only their rows"
        return AlignError(f"{about}\n  A preference file is used as preferences={train}.")
    fields = {
        "prompt": found.column("prompt") or "...",
        **dict.fromkeys({"preference": ("chosen", "rejected"), "feedback": ("completion", "label")}.get(kind, ("completion",)), "..."),
    }
    lacks = {
        "preference": "no second reply to compare with, and nothing that says which is better",
        "feedback": "nothing that says which replies are good",
    }.get(kind, "no replies to train on")
    return AlignError(f"{about}\n  It has {lacks}. Use it as {_USE[found.kind]}, or name what is missing with {mapping_to_try(fields)}")


def _nearest_format(seen: Mapping[str, Column], kind: Kind | None, pins: Mapping[str, str]) -> tuple[str, str]:
    """The nearest format, and what it lacks."""
    chosen, rejected = chosen_and_rejected(seen, pins)
    replies = two_replies(seen, pins)
    prompt = find(seen, "prompt", ("text", "turns"), pins)
    if kind in (None, "preference") and (chosen or rejected):
        if chosen and rejected:
            return (
                "'prompt, chosen, rejected'",
                "it lacks the prompt: a column of its own, or one that both sides begin with as turns or transcripts",
            )
        return "'prompt, chosen, rejected'", f"it lacks {'rejected' if chosen else 'chosen'}: the other of two replies"
    if replies and (kind == "preference" or (kind is None and prompt)):
        lacks = f"it lacks a label that can be read: which of {replies[0]!r} and {replies[1]!r} is better"
        return "'two replies with votes'", lacks if prompt else f"{lacks}; and a prompt"
    if kind == "preference":
        return "'prompt, chosen, rejected'", f"it lacks {'' if prompt else 'a prompt column and '}two replies to compare"
    if kind == "prompt":
        return "'prompt'", f"it lacks a column of prompts as text (named {_names('prompt')})"
    completion = find(seen, "completion", SPEECH, pins, (prompt,))
    wrong = [
        name
        for name, column in seen.items()
        if column.holds not in ("nothing", *SPEECH) and find({name: _as_text(column)}, "completion", ("text",))
    ]
    if not completion and wrong:
        return "'prompt, completion'", f"it lacks a completion of text: {described(seen[wrong[0]])}"
    missing = [field for field, column in (("prompt", prompt), ("completion", completion)) if not column]
    named = " and ".join(f"a {field} column (named {_names(field)})" for field in missing) or "text in its columns"
    return "'prompt, completion'", f"it lacks {named}"


def _guess(seen: Mapping[str, Column], kind: Kind | None, pins: Mapping[str, str]) -> dict[str, str]:
    """The mapping that the values suggest: the columns that fit by name, else those of long texts, as they come."""
    texts = [
        name
        for name, column in seen.items()
        if column.holds in ("text", "turns") and name not in pins.values() and not set(column.words) & _ABOUT_THE_ROW
    ]
    longest = sorted(texts, key=lambda name: (seen[name].holds != "turns", -seen[name].length))
    replies = two_replies(seen, pins)
    chosen, rejected = chosen_and_rejected(seen, pins)
    prompt = find(seen, "prompt", ("text", "turns"), pins, replies or ())
    if replies and (kind == "preference" or (kind is None and prompt)):
        prompt = prompt or next((name for name in longest if name not in replies), "")
        short = [name for name, column in seen.items() if column.holds in ("number", "text", "flag") and "id" not in column.words]
        label = next((name for name in short if name not in (*replies, prompt)), "...")
        return {**({"prompt": prompt} if prompt else {}), "response_a": replies[0], "response_b": replies[1], "label": label}
    of_kind = {"preference": ("prompt", "chosen", "rejected"), "prompt": ("prompt",), "feedback": ("prompt", "completion", "label")}
    fields = of_kind.get(str(kind), ("prompt", "completion"))
    if kind is None and (chosen or rejected):
        fields = ("prompt", "chosen", "rejected")
    known = {"chosen": chosen, "rejected": rejected}
    guess = {**pins}
    for field in fields:
        if name := known.get(field) or find(seen, field, SPEECH, pins, guess.values()):
            guess[field] = name
    missing = [field for field in fields if field not in guess]
    free = [name for name in longest if name not in guess.values()][: len(missing)]
    guess.update(zip(missing, sorted(free, key=texts.index), strict=False))
    if (
        fields == ("prompt", "completion")
        and len(guess) == 1
        and longest
        and not pins
        and not prompt
        and not find(seen, "completion", SPEECH)
    ):
        return {"text": longest[0]}
    return {field: guess.get(field, "...") for field in (*fields, *(field for field in pins if field not in fields))} if guess else {}


def _chosen_side(found: Format, seen: Mapping[str, Column]) -> dict[str, str]:
    """The mapping that reads the chosen side of a preference file as conversations."""
    chosen, prompt = found.column("chosen"), found.column("prompt")
    if not chosen:
        return {}
    if seen[chosen].holds == "turns" and (not prompt or len(seen[chosen].sample) > 1):
        return {"messages": chosen}
    return {"prompt": prompt, "completion": chosen} if prompt else {"text": chosen}


def _names(field: str) -> str:
    return ", ".join(WORDS[field][0][:6])


def _as_text(column: Column) -> Column:
    return Column(column.name, column.words, "text", column.filled, column.length, column.sample)
