"""What must be true of one record, whatever file it came from. Runs once for every row, so plain and quick."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from align.records import Kind

PLACEHOLDER = re.compile(r"(?<![$\w])\{\{\s*[A-Za-z_]\w*\s*\}\}")  # {{name}}, not ${{ secrets.TOKEN }}
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
# Letters of `_letter`: s system, u user, a assistant, c a call of tools, t a tool's answer.
PROMPT = re.compile(r"s?(u(ct+)*a)*u(ct+)*")
LETTERS = {"user": "u", "assistant": "a", "system": "s", "tool": "t"}
CONVERSATION = re.compile(r"s?(u(ct+)*a)*u(ct+)*[ac]")


class Problem(NamedTuple):
    """Why a record cannot be used: a reason that records share, and what was found in this one."""

    reason: str
    detail: str = ""


def find_problem(record: Mapping[str, Any], kind: Kind) -> Problem | None:
    """The first thing that is wrong with a record, or None.

    Args:
        record: in the form of align.records; its values may be anything.
        kind: what it must be.
    """
    if "text" in record:
        return _bad_text(record["text"], "the text")
    if kind == "conversation":
        return _bad_turns(record["messages"]) or _out_of_order(record["messages"], CONVERSATION, "assistant")
    problem = _bad_turns(record["prompt"]) or _out_of_order(record["prompt"], PROMPT, "user")
    if problem or kind == "prompt":
        return problem
    return _bad_preference(record) if kind == "preference" else _bad_reply(record["completion"], "completion")


def _bad_preference(record: Mapping[str, Any]) -> Problem | None:
    chosen, rejected = record["chosen"], record["rejected"]
    if problem := _bad_reply(chosen, "chosen") or _bad_reply(rejected, "rejected"):
        return problem
    if chosen == rejected or (
        chosen[0]["content"].strip() == rejected[0]["content"].strip() and chosen[0].get("tool_calls") == rejected[0].get("tool_calls")
    ):
        return Problem("chosen and rejected are the same")
    probability, margin = record.get("chosen_probability", 1.0), record.get("margin", 0.0)
    if not (_is_number(probability) and 0 <= probability <= 1):
        return Problem("chosen_probability is not a number from 0 to 1", repr(probability))
    if not _is_number(margin):
        return Problem("margin is not a finite number", repr(margin))
    return None


def _bad_reply(messages: Any, side: str) -> Problem | None:
    if problem := _bad_turns(messages, side):
        return problem
    if [_letter(message) for message in messages] not in (["a"], ["c"]):
        return Problem(f"{side} is not one turn of the assistant", _roles(messages))
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max  # also of 10**400


def _bad_turns(messages: Any, side: str = "") -> Problem | None:
    """Every message must hold text that can be trained on, or call a tool."""
    if not isinstance(messages, list):
        return Problem("messages are not a list", repr(messages)[:80])
    for message in messages:
        content, role = (message.get("content"), message.get("role")) if isinstance(message, dict) else (None, None)
        if type(content) is str and type(role) is str and content.isascii() and "{{" not in content and content and not content.isspace():
            continue  # nearly every turn
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return Problem("a message is not an object with a role", repr(message)[:80])
        if message.get("tool_calls") and content == "":
            continue
        what = side or f"a turn of the {message['role']}"
        if problem := _bad_text(content, what):
            return problem
    return None


def _bad_text(text: Any, what: str) -> Problem | None:
    if not isinstance(text, str):
        return Problem(f"{what} is not text", repr(text)[:80])
    if not text or text.isspace():
        return Problem(f"{what} is empty")
    if "{{" in text and (found := PLACEHOLDER.search(CODE.sub("", text) if "`" in text else text)):
        return Problem("a placeholder is left in the text", found[0])
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Problem("not valid Unicode", f"{text[error.start]!r} at character {error.start + 1} of {what}")
    return None


def _letter(message: Mapping[str, Any]) -> str:
    if message.get("tool_calls") and message["role"] == "assistant":
        return "c"
    return LETTERS.get(message["role"], "?")


def _out_of_order(messages: list[dict], pattern: re.Pattern[str], last: str) -> Problem | None:
    letters = "".join([LETTERS.get(message["role"], "?") if len(message) == 2 else _letter(message) for message in messages])
    reason = _order_reason(letters, pattern, last)
    return Problem(reason, _roles(messages)) if reason else None


@lru_cache(maxsize=4096)
def _order_reason(letters: str, pattern: re.Pattern[str], last: str) -> str | None:
    if pattern.fullmatch(letters):
        return None
    if "?" in letters:
        return "a role is not system, user, assistant or tool"
    other = CONVERSATION if pattern is PROMPT else PROMPT
    if other.fullmatch(letters):
        return f"the last turn is not the {last}'s"
    return "roles are out of order"


def _roles(messages: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(str(message["role"]) for message in messages) or "no messages"
