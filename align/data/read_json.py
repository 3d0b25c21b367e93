"""Rows out of JSON: one object a line, a list that is read piece by piece, or one object that holds the rows."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import orjson

from align.data import read_bytes
from align.data.read_bytes import MB, Part, Unreadable, beginning, not_utf8, read_blocks, read_lines
from align.errors import AlignError

LARGEST_OBJECT = 256 * MB  # of a .json file that is one object, which is parsed as a whole
_TURNS = ({"role", "content"}, {"from", "value"})  # what a turn has; a list of turns is a row's, not the rows
_NESTED = {"instances", "tools", "functions", "replies", "outputs", "responses", "completions", "candidates", "choices"}  # of one row
_BYTES = re.compile("[\udc80-\udcff]")  # what bytes that are not UTF-8 became
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def json_lines(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """One object a line; blank lines are passed over."""
    for number, line in read_lines(part):
        row = json_row(line)
        if row is not None:
            yield number, row


def json_row(line: bytes) -> dict | Unreadable | None:
    """The row that a line of JSONL holds; None for a blank line."""
    try:
        row = orjson.loads(line)  # four times the speed of json, which has the last word on what orjson refuses
    except orjson.JSONDecodeError:
        if not line.strip():
            return None
        row = _slow_json(line)
    if type(row) is dict or type(row) is Unreadable:
        return row
    return Unreadable("not an object", f"{_kind(row)}; expected {{...}}", beginning(line))


def json_list(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """A list of objects, each parsed on its own."""
    stream = _Stream(part)
    stream.next()
    stream.at += 1  # the bracket
    too_large = f"one row is larger than {read_bytes.LONGEST_ROW // MB} MB; the file may be damaged, or of another kind."
    if stream.next() != "]":
        for number in itertools.count(1):
            value, damaged = stream.value(read_bytes.LONGEST_ROW, too_large)
            if number == 1 and not isinstance(value, dict):
                _not_objects(stream.place, value)
            yield number, object_row(value, damaged)
            after = stream.next()
            if after == "]":
                break
            if after != ",":
                found = f"{after!r} follows row {number}; expected a comma or a bracket" if after else f"the list ends after row {number}"
                raise AlignError(
                    f"{stream.place}: {found}{'' if after else ' without its closing bracket; it was cut off, fetch it again'}."
                )
            stream.at += 1
            if stream.next() == "]":
                raise AlignError(f"{stream.place}: not JSON (a comma before the closing bracket, after row {number}); remove the comma.")
    stream.at += 1
    if after := stream.next():
        raise AlignError(
            f"{stream.place}: {after!r} follows the list; expected the end of the file. Make it one list, or one object a line."
        )


def json_object(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """One object that is or holds the rows; or several objects, one after the other."""
    stream = _Stream(part)
    stream.next()
    too_large = (
        f"the file is one JSON object of more than {LARGEST_OBJECT // MB} MB; only a list or one object a line is read piece by piece.\n"
        "  Write one object a line, such as with: jq -c '.data[]' FILE > NEW.jsonl"
    )
    value, damaged = stream.value(LARGEST_OBJECT, too_large)
    if not stream.next():
        if damaged:
            line = 1 + damaged.count("\n", 0, _BYTES.search(damaged).start())  # type: ignore[union-attr]
            raise AlignError(f"{part.path}: not UTF-8 text at line {line} of the object; save the file as UTF-8.")
        yield from enumerate(_rows_of(value, part.path), 1)
        return
    for number in itertools.count(1):
        yield number, object_row(value, damaged)
        following = stream.next()
        if not following:
            return
        if following != "{":
            raise AlignError(f"{stream.place}: {following!r} follows object {number}; expected another object, or the end of the file.")
        value, damaged = stream.value(
            read_bytes.LONGEST_ROW, f"one row is larger than {read_bytes.LONGEST_ROW // MB} MB; the file may be damaged."
        )


def _slow_json(line: bytes) -> Any:
    """What json reads, and orjson does not: NaN, lone surrogates; or why it cannot be read."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return not_utf8(line, error)
    except json.JSONDecodeError as error:
        nul = "; it holds NUL bytes, as after a crash" if b"\0" in line else ""
        return Unreadable("not JSON", f"{error.msg} at column {error.pos + 1}{nul}", beginning(line))
    except RecursionError:
        return Unreadable("nested too deeply", "a value inside a value, hundreds of times", beginning(line))
    except ValueError as error:  # a number of thousands of digits
        return Unreadable("not JSON", str(error), beginning(line))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def object_row(value: Any, damaged: str) -> dict | Unreadable:
    """A value as a row, which must be an object; `damaged` is its text where bytes of it are not UTF-8."""
    if damaged:
        data = damaged.encode("utf-8", "surrogateescape")
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return not_utf8(data, error)
    if isinstance(value, dict):
        return value
    return Unreadable("not an object", f"{_kind(value)}; expected {{...}}", beginning(json.dumps(value, ensure_ascii=False)))


def _not_objects(place: str, value: Any) -> NoReturn:
    advice: dict[type, str] = {
        str: 'Write one text a line in a .txt, or objects such as {"text": ...}.',
        list: 'Give each a name, such as {"messages": [...]}.',
    }
    raise AlignError(
        f"{place}: the list holds {_kind(value)} ({json.dumps(value)[:40]}); expected objects, one a row.\n"
        f"  {advice.get(type(value), 'Write each row as an object with named columns.')}"
    )


class _Stream:
    """The values of a JSON text that is read block by block. Only what is not used yet is held.

    Text is decoded with bytes that are not UTF-8 as lone surrogates, so that one bad byte spoils one row.
    """

    def __init__(self, part: Part):
        self.path = part.path
        self.buffer, self.at, self.line = "", 0, 1  # `line` is that of the buffer's first character
        self.ended = self.damaged = False
        self._blocks = read_blocks(part)
        self._tail = b""
        self._decode = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        """Drop what is used and read on, at least as much as is held; False at the end."""
        if self.ended:
            return False
        self.line += self.buffer.count("\n", 0, self.at)
        held = [self.buffer[self.at :]]
        goal, size = len(held[0]), 0
        while not size or size < goal:
            block = next(self._blocks, None)
            self.ended = block is None
            data = self._tail + (block or b"")
            try:
                text, used = codecs.utf_8_decode(data, "strict", self.ended)
            except UnicodeDecodeError:
                text, used = codecs.utf_8_decode(data, "surrogateescape", self.ended)
                self.damaged = True
            self._tail = data[used:]
            held.append(text)
            size += len(text)
            if self.ended:
                break
        self.buffer, self.at = "".join(held), 0
        return True

    def next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self.at = _JSON_SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def value(self, limit: int, too_large: str) -> tuple[Any, str]:
        """The value that begins here, and its text where bytes of it are not UTF-8."""
        while True:
            try:
                value, end = self._decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                short = "Unterminated string" in error.msg or error.pos > len(self.buffer) - 16
                if self.ended or not short:
                    self._refuse(error)
            except RecursionError:
                raise AlignError(f"{self.path}:{self._line(self.at)}: is nested too deeply; expected rows of a few levels.") from None
            except ValueError as error:  # a number of thousands of digits
                raise AlignError(f"{self.path}:{self._line(self.at)}: cannot be read ({error}).") from None
            else:
                if end < len(self.buffer) or self.ended or isinstance(value, (dict, list, str)):
                    break
            if len(self.buffer) - self.at > limit:
                raise AlignError(f"{self.path}:{self._line(self.at)}: {too_large}")
            self._more()
        text = self.buffer[self.at : end] if self.damaged and _BYTES.search(self.buffer, self.at, end) else ""
        self.at = end
        return value, text

    def _refuse(self, error: json.JSONDecodeError) -> NoReturn:
        line = self._line(error.pos)
        if self.ended and (error.pos >= len(self.buffer.rstrip()) or "Unterminated string" in error.msg):
            raise AlignError(
                f"{self.path}:{line}: the file ends in the middle of a value ({error.msg}); it was cut off, fetch it again."
            ) from None
        column = error.pos - self.buffer.rfind("\n", 0, error.pos)
        found = self.buffer[error.pos : error.pos + 20]
        raise AlignError(f"{self.path}:{line}: not JSON ({error.msg} at column {column}, found {found!r}).") from None

    def _line(self, at: int) -> int:
        return self.line + self.buffer.count("\n", 0, at)

    @property
    def place(self) -> str:
        return f"{self.path}:{self._line(self.at)}"


def _rows_of(whole: dict[str, Any], path: Path) -> list[dict | Unreadable]:
    """The rows in one object: a list of them under a name, rows keyed by id, columns as pandas writes them; else it is a row."""
    values = list(whole.values())
    lists = [name for name, value in whole.items() if _is_rows(value) and (len(whole) == 1 or name not in _NESTED)]
    if len(lists) == 1:
        return [object_row(row, "") for row in whole[lists[0]]]
    if len(lists) > 1:
        names = ", ".join(map(repr, lists))
        raise AlignError(f"{path}: the object holds several lists of objects ({names}); expected one. Write each to a file of its own.")
    if values and all(isinstance(value, list) for value in values) and not any(map(_is_turns, values)):
        if len(set(map(len, values))) == 1:
            return [dict(zip(whole, cells, strict=True)) for cells in zip(*values, strict=True)]
        sizes = ", ".join(f"{name!r} {len(value)}" for name, value in itertools.islice(whole.items(), 8))
        raise AlignError(f"{path}: the object's columns have different lengths ({sizes}); expected a cell of each column for each row.")
    if values and all(isinstance(value, dict) and value for value in values) and not any(map(_is_turn, values)):
        keys = values[0].keys()
        if all(key.isdecimal() for key in keys) and all(value.keys() == keys for value in values):
            return [{name: column[key] for name, column in whole.items()} for key in keys]
        return [value if "id" in value else {"id": key, **value} for key, value in whole.items()]
    return [whole] if whole else []


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(turn <= value.keys() for turn in _TURNS)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not _is_turns(value)
