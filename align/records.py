"""The rows of data files, and reading them with errors that say file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from align.errors import AlignError


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Row(BaseModel):
    """What every kind of row shares. Columns that are not known are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    source_line: int = Field(0, exclude=True)


def _as_messages(value: Any, role: str) -> Any:
    """A plain text is one message of that role."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _check_order(messages: list[Message], last: str) -> None:
    """Turns alternate from the user's, after at most one system message, and end with `last`."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))] or not turns:
        raise ValueError(f"roles are {', '.join(roles)}; expected user, assistant, user, ... (after at most one system message)")
    if turns[-1] != last:
        raise ValueError(f"the last turn is the {turns[-1]}'s; expected the {last}'s")


class Conversation(Row):
    """An instruction with its answer: `messages` that end with the assistant's, or `prompt` and `completion`."""

    messages: list[Message]

    @model_validator(mode="before")
    @classmethod
    def _join(cls, row: Any) -> Any:
        if isinstance(row, dict) and "messages" not in row and {"prompt", "completion"} <= row.keys():
            prompt, completion = _as_messages(row["prompt"], "user"), _as_messages(row["completion"], "assistant")
            if isinstance(prompt, list) and isinstance(completion, list):
                return {**row, "messages": prompt + completion}
        return row

    @model_validator(mode="after")
    def _ordered(self) -> Conversation:
        _check_order(self.messages, "assistant")
        return self


class Prompt(Row):
    """Messages up to the turn to be answered."""

    prompt: list[Message]

    @field_validator("prompt", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return _as_messages(value, "user")

    @model_validator(mode="after")
    def _ordered(self) -> Prompt:
        _check_order(self.prompt, "user")
        return self


class Preference(Prompt):
    """Two replies to one prompt; `chosen_probability` says how sure the labeller is that chosen is the better one."""

    chosen: list[Message]
    rejected: list[Message]
    chosen_probability: float = Field(1.0, ge=0, le=1)
    margin: float = 0.0

    @field_validator("chosen", "rejected", mode="before")
    @classmethod
    def _reply(cls, value: Any) -> Any:
        return _as_messages(value, "assistant")

    @model_validator(mode="after")
    def _one_reply_each(self) -> Preference:
        for side in ("chosen", "rejected"):
            if [message.role for message in getattr(self, side)] != ["assistant"]:
                raise ValueError(f"{side!r} must be one message of the assistant")
        if self.chosen == self.rejected:
            raise ValueError("'chosen' and 'rejected' are the same")
        if not math.isfinite(self.margin):
            raise ValueError("'margin' is not a finite number")
        return self


R = TypeVar("R", bound=Row)


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """All rows of a JSONL file.

    Raises:
        AlignError: at the first line that does not fit, with what was found and the columns that are expected.
    """
    rows: list[R] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = f"{error.reason} at byte {error.start + 1} of the line"
                raise AlignError(f"{path}:{number}: not UTF-8 text ({place}); expected a JSONL file in UTF-8.") from None
            if line.strip():
                rows.append(_parse(line, kind, f"{path}:{number}"))
    if not rows:
        raise AlignError(f"{path}: the file holds no rows; expected one JSON object a line.")
    return rows


def _parse(line: str, kind: type[R], where: str) -> R:
    columns = ", ".join(repr(name) for name in kind.model_fields if name != "source_line")
    columns += " (or 'prompt', 'completion')" if kind is Conversation else ""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise AlignError(f"{where}: not JSON ({error.msg} at column {error.colno}); expected one object a line with {columns}.") from None
    except (ValueError, RecursionError) as error:
        raise AlignError(f"{where}: cannot be read ({error}); expected one object a line with {columns}.") from None
    try:
        return kind.model_validate(row | {"source_line": int(where.rpartition(":")[2])} if isinstance(row, dict) else row)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        found = f" Found the columns {', '.join(map(repr, row))}." if problem["type"] == "missing" and isinstance(row, dict) else ""
        raise AlignError(
            f"{where}: {f'{name!r}: ' if name else ''}{message}.{found}\n  Expected one object a line with {columns}."
        ) from None


def first_user_turn(messages: list[Message]) -> str:
    """The text that decides to which side of a split a row goes, so that a prompt never lands on both."""
    return next(message.content for message in messages if message.role == "user")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
