"""What rows of data become: conversations, preferences, prompts, feedback. Plain dictionaries, as JSON and chat templates have them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

Kind = Literal["conversation", "preference", "prompt", "feedback"]


class Message(TypedDict):
    """One turn. A call of tools is an assistant's turn with `tool_calls`, whose content may be empty."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]  # {"type": "function", "function": {"name": ..., "arguments": {...}}}
    name: NotRequired[str]  # of the tool that answers


class Conversation(TypedDict):
    """An instruction with its answer: messages that end with the assistant's."""

    messages: list[Message]
    tools: NotRequired[list[dict[str, Any]]]  # JSON schemas


class Prompt(TypedDict):
    """Messages up to the turn to be answered."""

    prompt: list[Message]
    tools: NotRequired[list[dict[str, Any]]]


class Preference(Prompt):
    """Two replies to one prompt; `chosen_probability` (1 where absent) says how sure the labeller is that chosen is better."""

    chosen: list[Message]
    rejected: list[Message]
    chosen_probability: NotRequired[float]
    margin: NotRequired[float]
    source: NotRequired[str]


class Feedback(Prompt):
    """One reply to a prompt, and whether it is good."""

    completion: list[Message]
    label: bool


def first_user_turn(messages: list[Message]) -> str:
    """The text that decides to which side of a split a row goes, so that a prompt never lands on both."""
    return next((message["content"] for message in messages if message["role"] == "user"), "")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
