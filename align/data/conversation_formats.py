"""Recognition of files of conversations and of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from align.data.columns import SPEECH, Column, exchange_keys, find, named
from align.data.rows import Format, Kind, parsed
from align.data.transcripts import style_of
from align.data.turns import ROLE_KEYS, ROLES

Columns = Mapping[str, Column]
Pins = Mapping[str, str]
_FULL = {"messages", "conversations", "conversation", "dialogue", "dialog", "chat"}
_ALTERNATING = {"data", "dialog", "dialogue", "dialogs", "conversation", "conversations", "messages", "utterances", "chat"}


def recognise_tree(seen: Columns, kind: Kind) -> Format | None:
    """Message trees of OpenAssistant, nested or one message a row."""
    what = {"preference": "ranked replies to one turn are compared", "conversation": "the best-ranked path is the conversation"}
    told = what.get(kind, "the best-ranked path up to its last question is the prompt")
    for name, column in seen.items():
        if column.holds in ("turn", "object") and isinstance(column.sample, Mapping) and isinstance(column.sample.get("replies"), list):
            return Format("oasst", kind, {"tree": name}, f"{name!r} holds messages with 'replies' nested in them: {told}.")
    key, parent = named(seen, "message_id"), named(seen, "parent_id")
    if key and parent and named(seen, "text", "text") and named(seen, "role", "text"):
        tree = named(seen, "message_tree_id")
        columns: dict[str, str | tuple[str, ...]] = {"id": key, "parent": parent, **({"group": tree} if tree else {})}
        return Format("oasst flat", kind, columns, f"each row is a message that names its parent in {parent!r}: {told}.", gathers=True)
    if named(seen, "replies", "turns", "objects") and named(seen, "text", "text") and named(seen, "role", "text"):
        return Format("oasst", kind, {"tree": ""}, f"each row is a message with its 'replies' nested in it: {told}.")
    return None


def prompt_columns(seen: Columns, pins: Pins, taken: Sequence[str] = ()) -> dict[str, str | tuple[str, ...]]:
    """The columns a prompt is made of; empty if there is none."""
    asked = find(seen, "prompt", ("text", "turns"), pins, taken)
    if not asked:
        asked = next((name for name in ("question", "prompt", "info") if (column := seen.get(name)) and _says_text(column)), "")
    if not asked:
        return {}
    found: dict[str, str | tuple[str, ...]] = {"prompt": asked}
    words, used = seen[asked].words, [asked, *taken]
    if extra := find(seen, "input", ("text",), pins, used):
        question_too = set(seen[extra].words) & {"question", "query"}
        if (
            "input" in pins
            or {"instruction", "prompt"} & set(words)
            or (not question_too and {"question", "query", "problem"} & set(words))
        ):
            found["input"] = extra
    if system := find(seen, "system", ("text", "turn", "object"), pins, used):
        found["system"] = system
    if history := find(seen, "history", ("exchanges", "lists", "turns", "nothing"), pins, used):
        found["history"] = history
    if passages := find(seen, "passages", ("lists", "exchanges", "texts"), pins, used):
        found["passages"] = passages
    return found


def recognise_conversation(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    """Conversations: messages in any form, instruction and answer, seeds, or plain text."""
    return _seeds(seen, pins) or _messages(seen, pins) or _columns(seen, pins) or _text(rows, seen, pins)


def recognise_prompts(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    """A file's prompts: a column of them, or the beginning of its conversations."""
    if found := _seeds(seen, pins) or ("prompt" not in pins and _messages(seen, pins)) or None:
        return replace(found, kind="prompt", why=f"{found.why[:-1]}; the prompt is all up to the user's last turn.")
    if asked := prompt_columns(seen, pins):
        return Format(
            "prompts",
            "prompt",
            {**asked, **_tools(seen, pins)},
            f"{asked['prompt']!r} holds the prompts as {_held(seen, str(asked['prompt']))}.",
        )
    turns = named(seen, "turns", "texts")
    if turns and "prompt" not in pins:
        why = f"{turns!r} holds what a user says one after the other; the first of it is the prompt."
        return Format("prompts", "prompt", {"prompt": turns}, why, coding="first of turns")
    if text := _text(rows, seen, pins):
        why = text.why if text.coding else f"{text.column('text')!r} holds text: each row is a prompt."
        return replace(text, kind="prompt", why=why)
    return None


def ends_with_user(rows: Sequence[Mapping], column: str) -> bool:
    """Whether every conversation of the sample ends with a turn of the user's."""
    ends = []
    for row in rows[:200]:
        value = row.get(column)
        turns = parsed(value) if isinstance(value, str) else value
        if isinstance(turns, list | tuple) and turns and isinstance(turns[-1], Mapping):
            role = next((turns[-1][key] for key in ROLE_KEYS if isinstance(turns[-1].get(key), str)), "")
            ends.append(ROLES.get(role.lower(), "assistant"))
    return set(ends) == {"user"}


def _messages(seen: Columns, pins: Pins) -> Format | None:
    name = find(seen, "messages", ("turns",), pins)
    prompt = find(seen, "prompt", SPEECH, pins)
    paired = bool(prompt and find(seen, "completion", SPEECH, pins, (prompt,)))
    if paired and name and "messages" not in pins and seen[name].words[-1] not in _FULL:
        return None
    if not name and not pins:
        turns = [name for name, column in seen.items() if column.holds == "turns" and name != prompt]
        name = turns[0] if len(turns) == 1 and not paired else ""
    found: dict[str, str | tuple[str, ...]] = {"messages": name}
    if system := find(seen, "system", ("text", "turn", "object"), pins, (name,)):
        found["system"] = system
    found |= _tools(seen, pins)
    if name and seen[name].holds == "turns":
        sample = seen[name].sample
        turns = parsed(sample) if isinstance(sample, str) else sample
        first = turns[0] if isinstance(turns, list | tuple) else {}
        sharegpt = "from" in first
        keys = (
            "from and value" if sharegpt else "role and content" if "role" in first and "content" in first else ", ".join(map(repr, first))
        )
        return Format("sharegpt" if sharegpt else "messages", "conversation", found, f"{name!r} holds lists of turns with {keys}.")
    if paired:
        return None
    name = name or find(seen, "messages", ("exchanges",), pins)
    if name and seen[name].holds == "exchanges":
        first = seen[name].sample[0]
        found["messages"] = name
        if keys_of := exchange_keys(first):
            found["exchange"] = keys_of
        return Format("exchanges", "conversation", found, f"{name!r} holds lists of exchanges: what was asked, what was answered.")
    name = name or find(seen, "messages", ("texts",), pins)
    if (
        name
        and seen[name].holds == "texts"
        and ("messages" in pins or (_ALTERNATING & set(seen[name].words) and len(seen[name].sample) > 1))
    ):
        why = f"{name!r} holds lists of texts: user and assistant by turns."
        return Format("alternating", "conversation", {**found, "messages": name}, why)
    return None


def _seeds(seen: Columns, pins: Pins) -> Format | None:
    asked = "" if pins else find(seen, "prompt", ("text",))
    instances = named(seen, "instances", "exchanges", "objects") or named(seen, "examples", "exchanges")
    keys = exchange_keys(seen[instances].sample[0]) if asked and instances else None
    if not keys:
        return None
    columns: dict[str, str | tuple[str, ...]] = {
        "prompt": asked,
        "input": f"{instances}[].{keys[0]}",
        "completion": f"{instances}[].{keys[1]}",
    }
    return Format("self-instruct", "conversation", columns, f"{asked!r} has {instances!r} of {keys[0]} and {keys[1]} nested under it.")


def _columns(seen: Columns, pins: Pins) -> Format | None:
    reply = find(seen, "completion", SPEECH, pins)
    asked = prompt_columns(seen, pins, (reply,) if reply else ())
    if not reply or not asked or (seen[reply].words == ("a",) and seen[str(asked["prompt"])].words != ("q",) and not pins):
        return None
    prompt = str(asked["prompt"])
    words, extra = set(seen[prompt].words), str(asked.get("input", ""))
    if words & {"instruction", "instructions"}:
        name = "dolly" if extra and "context" in seen[extra].words else "alpaca"
    elif "question" in words and "answer" in seen[reply].words:
        name = "question/answer"
    else:
        name = "prompt/completion"
    with_input = f" (with {extra!r})" if extra else ""
    why = f"{prompt!r}{with_input} holds {_held(seen, prompt)} and {reply!r} {_held(seen, reply)}: what is asked and what is answered."
    return Format(name, "conversation", {**asked, "completion": reply, **_tools(seen, pins)}, why)


def _text(rows: Sequence[Mapping], seen: Columns, pins: Pins) -> Format | None:
    name = pins.get("messages", "") if "messages" in pins else find(seen, "text", ("text",), pins)
    if not name or seen[name].holds != "text":
        return None
    if style := style_of(str(row.get(name) or "") for row in rows):
        return Format(
            f"{style} transcript", "conversation", {"text": name}, f"{name!r} holds transcripts whose turns are marked.", coding=style
        )
    if "messages" in pins or ("text" not in pins and (find(seen, "completion", SPEECH) or find(seen, "prompt", ("text",), taken=(name,)))):
        return None
    return Format("text", "conversation", {"text": name}, f"{name!r} is the one column of text: plain text, all of it trained on.")


def _tools(seen: Columns, pins: Pins) -> dict[str, str | tuple[str, ...]]:
    name = find(seen, "tools", ("text", "texts", "objects", "object", "exchanges", "nothing"), pins)
    if not name or ("tools" not in pins and isinstance(seen[name].sample, str) and seen[name].sample.lstrip()[:1] not in ("[", "{")):
        return {}
    return {"tools": name}


def _says_text(column: Column) -> bool:
    return column.holds == "object" and any(isinstance(column.sample.get(key), str) for key in ("full_text", "text", "post", "article"))


def _held(seen: Columns, name: str) -> str:
    return {"text": "text", "turns": "messages", "turn": "a message"}.get(seen[name].holds, "text")
