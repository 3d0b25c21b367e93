"""From data files to raw rows, each with its place: nothing is interpreted, and no file is held in memory whole.

Trouble with one row is an `Unreadable` in its place; trouble with the file is one AlignError.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import orjson

from align.data.sources import READ, data_suffix
from align.errors import AlignError

MB = 1 << 20
LONGEST_ROW = 64 * MB  # bytes or characters; what is longer is no row
LARGEST_OBJECT = 256 * MB  # of a .json file that is one object, which is parsed as a whole

_BLOCK = MB
_SPACE = b" \t\r\n"
_BOM = codecs.BOM_UTF8
_MAGIC = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),  # the latter skippable frames
    "bz2": tuple(b"BZh%d1AY&" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ\0",),
}
_NO_ROWS = "the file holds no rows"
_TURNS = ({"role", "content"}, {"from", "value"})  # what a turn has; a list of turns is a row's, not the rows
_NESTED = {"instances", "tools", "functions", "replies", "outputs", "responses", "completions", "candidates", "choices"}  # of one row


class Unreadable(NamedTuple):
    """One row that could not be read."""

    reason: str  # a class that rows share, such as 'not JSON'
    detail: str
    raw: str  # its text, as far as it is text; cut after 1,000 characters


class Part(NamedTuple):
    """A stretch of a file that is read on its own, from `parts`."""

    path: Path
    form: str  # lines, text, list, object, csv, parquet
    packing: str | None = None
    start: int = 0  # bytes of lines and text, row groups of parquet
    stop: int | None = None
    first: int = 1  # the number of its first line or row


def parts(path: Path, count: int) -> list[Part]:
    """A file as at most `count` parts that hold every row once: of JSONL and text by bytes, of Parquet by row groups, else one.

    Raises:
        AlignError: for a file that cannot be read, is empty, or is not what its name says.
    """
    whole = _look(path)
    if whole.packing is None and whole.form in ("lines", "text"):
        return _by_bytes(whole, count)
    if whole.packing is None and whole.form == "parquet":
        return _by_row_groups(whole, count)
    return [whole]


def rows(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """The rows of a part, each with its number: the line of JSONL, CSV and text, else the row, both from 1.

    Raises:
        AlignError: for trouble with the file, with the place; after the rows before it.
    """
    read: Callable[[Part], Iterator[tuple[int, dict | Unreadable]]] = _FORMS[part.form]
    if part.start or part.stop is not None:
        return read(part)
    return _some_rows(part, read(part))


def first_rows(path: Path, count: int) -> list[dict]:
    """The first rows that can be read, to recognise a format by; none where the first thousand cannot."""
    with closing(rows(parts(path, 1)[0])) as found:  # type: ignore[type-var]
        return list(itertools.islice((row for _, row in itertools.islice(found, count + 1000) if isinstance(row, dict)), count))


def _some_rows(part: Part, found: Iterator[tuple[int, dict | Unreadable]]) -> Iterator[tuple[int, dict | Unreadable]]:
    first = next(found, None)
    if first is None:
        raise AlignError(f"{part.path}: {_NO_ROWS}; expected at least one.")
    yield first
    yield from found


# Bytes ----------------------------------------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise AlignError(f"{path}: there is no such file; expected one that stays where it is during the run.") from None
    except IsADirectoryError:
        raise AlignError(f"{path}: is a folder; expected a file. Name the folder as a source of its own, or a glob.") from None
    except OSError as error:
        raise AlignError(f"{path}: cannot be opened ({error.strerror}); check its permissions and where it leads.") from None


def _unpacked(file: IO[bytes], packing: str | None) -> IO[bytes]:
    """The file's content, decompressed."""
    if packing == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if packing == "bz2":
        import bz2

        return bz2.BZ2File(file)
    if packing == "xz":
        import lzma

        return lzma.LZMAFile(file)
    if packing == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
    return file


def _blocks(part: Part) -> Iterator[bytes]:
    """The content of a part, block by block, without a byte order mark."""
    import zlib
    from lzma import LZMAError

    left = part.stop - part.start if part.stop is not None else None
    with _open(part.path) as file:
        file.seek(part.start)
        stream = _unpacked(file, part.packing)
        done = 0
        while True:
            try:
                block = stream.read(_BLOCK if left is None else min(_BLOCK, left - done))
            except (OSError, EOFError, zlib.error, LZMAError) as error:
                _cannot_go_on(part, done, error)
            if not block:
                return
            if done == 0 == part.start:
                done, block = len(block), block.removeprefix(_BOM)
            else:
                done += len(block)
            yield block


def _cannot_go_on(part: Part, done: int, error: Exception) -> NoReturn:
    after = f"after {done:,} bytes of content"
    if part.packing is None:
        raise AlignError(f"{part.path}: cannot be read {after} ({error}); check the disk, or fetch the file again.") from None
    cut = isinstance(error, EOFError) or "Truncated" in str(error)
    state = "the file is cut off" if cut else f"the file is damaged: {error}"
    raise AlignError(f"{part.path}: the {part.packing} data ends or breaks {after} ({state}); fetch or compress the file again.") from None


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines of a part without their newlines, numbered; split at newlines only."""
    number, held, size = part.first, [], 0
    for block in _blocks(part):
        pieces = block.split(b"\n")
        if len(pieces) == 1:
            held.append(block)
            size += len(block)
            if size > LONGEST_ROW:
                _too_long(part.path, f"line {number}")
            continue
        if held:
            pieces[0] = b"".join([*held, pieces[0]])
        rest = pieces.pop()
        yield from enumerate(pieces, number)
        number += len(pieces)
        held, size = [rest], len(rest)
    if size:
        yield number, b"".join(held)


def _too_long(path: Path, place: str) -> NoReturn:
    raise AlignError(f"{path}: {place} is longer than {LONGEST_ROW // MB} MB; expected a row. The file may be damaged, or of another kind.")


# Recognising a file by its content ------------------------------------------------------------------------------------


def _look(path: Path) -> Part:
    """The whole file as one part: what its content is, where its name leaves that open."""
    named = data_suffix(path)
    with _open(path) as file:
        magic = file.read(8)
    if not magic:
        raise AlignError(f"{path}: the file is empty; expected rows.")
    packing = next((name for name, starts in _MAGIC.items() if magic.startswith(starts)), None)
    if named is None:
        raise AlignError(f"{path}: the suffix is {path.suffix!r}; expected one of {READ}.")
    suffix, promised = named
    if promised is not None and packing != promised:
        actual = f"{packing} data" if packing else f"content that begins {magic!r}"
        raise AlignError(f"{path}: holds {actual}; expected {promised}, as its name says. Rename it to what it is, or fetch it again.")
    part = Part(path, "lines", packing)
    head = _head(part)
    if head.startswith(b"version https://git-lfs"):
        raise AlignError(f"{path}: is a pointer of Git LFS, not the data; in its repository run: git lfs pull")
    if head.startswith(b"PAR1"):
        return part._replace(form="parquet")
    if suffix == ".parquet":
        raise AlignError(f"{path}: is no Parquet file; it begins {head[:16]!r}, expected b'PAR1'. Rename it to what it is.")
    _check_text(path, head)
    if suffix in (".csv", ".tsv", ".txt"):
        return part._replace(form="text" if suffix == ".txt" else "csv")
    return part._replace(form=_json_form(path, suffix, head))


def _head(part: Part) -> bytes:
    """The content from the first that is no space, with a whole line where that line is a row's."""
    held = bytearray()
    with closing(_blocks(part)) as blocks:  # type: ignore[type-var]
        for block in blocks:
            held += block if held else block.lstrip(_SPACE)
            if held and (b"\n" in held or not held.startswith(b"{") or len(held) > LONGEST_ROW):
                break
    if not held:
        raise AlignError(f"{part.path}: {_NO_ROWS}, only blank lines; expected at least one.")
    return bytes(held)


def _check_text(path: Path, head: bytes) -> None:
    """Refuse what is not UTF-8 text as a whole; single bytes that are wrong are their row's trouble."""
    start = head[:1024]
    even, odd = sorted((start[::2].count(0), start[1::2].count(0)))
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (even == 0 and odd > len(start) // 3):
        raise AlignError(f"{path}: is UTF-16 text; expected UTF-8. Save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    if b"\0" in start:
        found = "nothing but NUL bytes, as after a crash" if not start.strip(b"\0") else f"binary data (it begins {head[:16]!r})"
        raise AlignError(f"{path}: holds {found}; expected text in UTF-8. Fetch the file again.")
    if start[:9].lower() == b"<!doctype" or start[:5].lower() == b"<html":
        raise AlignError(f"{path}: is a web page (it begins {head[:16]!r}), not the data; download the raw file.")


def _json_form(path: Path, suffix: str, head: bytes) -> str:
    """Whether JSON is one value a line, a list, or an object (or several, over several lines each)."""
    first, newline, rest = head.partition(b"\n")
    first, more = first.strip(), rest.strip(_SPACE)
    if first.startswith(b"["):
        return "lines" if more and more[:1] in b"[{" and _is_json(first) else "list"
    if first.startswith(b"{"):
        if suffix == ".json":
            return "lines" if more[:1] == b"{" and (_is_json(first) or first.endswith(b"}")) else "object"
        return "object" if first == b"{" else "lines"
    if suffix == ".json":
        raise AlignError(f"{path}: begins {_shown(first)}; expected a JSON list of objects, an object, or one object a line.")
    return "lines"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# JSON, one object a line ----------------------------------------------------------------------------------------------


def _json_lines(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    for number, line in _lines(part):
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
    return Unreadable("not an object", f"{_kind(row)}; expected {{...}}", _raw(line))


def line_blocks(part: Part) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a part of JSONL in blocks of a few megabytes, each with the number of its first line."""
    first, held, size = part.first, list[bytes](), 0
    for number, line in _lines(part):
        if size > 4 * MB:
            yield first, held
            first, held, size = number, [], 0
        held.append(line)
        size += len(line)
    if held:
        yield first, held


def _slow_json(line: bytes) -> Any:
    """What json reads, and orjson does not: NaN, lone surrogates; or why it cannot be read."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)
    except json.JSONDecodeError as error:
        nul = "; it holds NUL bytes, as after a crash" if b"\0" in line else ""
        return Unreadable("not JSON", f"{error.msg} at column {error.pos + 1}{nul}", _raw(line))
    except RecursionError:
        return Unreadable("nested too deeply", "a value inside a value, hundreds of times", _raw(line))
    except ValueError as error:  # a number of thousands of digits
        return Unreadable("not JSON", str(error), _raw(line))


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> Unreadable:
    found = f"{error.reason} at byte {error.start + 1} ({line[error.start : error.start + 1]!r}); save the file as UTF-8"
    return Unreadable("not UTF-8 text", found, _raw(line))


def _raw(line: bytes | str) -> str:
    """The beginning of what could not be read, as valid text."""
    line = line if isinstance(line, bytes) else line[:1000].encode("utf-8", "backslashreplace")
    return line[:4000].decode("utf-8", "backslashreplace")[:1000].rstrip("\r\n")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _shown(start: bytes) -> str:
    return repr(start[:40].decode("utf-8", "backslashreplace"))


# JSON as one list or object -------------------------------------------------------------------------------------------

_BYTES = re.compile("[\udc80-\udcff]")  # what bytes that are not UTF-8 became
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


class _Stream:
    """The values of a JSON text that is read block by block. Only what is not used yet is held.

    Text is decoded with bytes that are not UTF-8 as lone surrogates, so that one bad byte spoils one row.
    """

    def __init__(self, part: Part):
        self.path = part.path
        self.buffer, self.at, self.line = "", 0, 1  # `line` is that of the buffer's first character
        self.ended = self.damaged = False
        self._blocks = _blocks(part)
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


def _json_list(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    stream = _Stream(part)
    stream.next()
    stream.at += 1  # the bracket
    too_large = f"one row is larger than {LONGEST_ROW // MB} MB; the file may be damaged, or of another kind."
    if stream.next() != "]":
        for number in itertools.count(1):
            value, damaged = stream.value(LONGEST_ROW, too_large)
            if number == 1 and not isinstance(value, dict):
                _not_objects(stream.place, value)
            yield number, _object(value, damaged)
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


def _object(value: Any, damaged: str) -> dict | Unreadable:
    if damaged:
        data = damaged.encode("utf-8", "surrogateescape")
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return _not_utf8(data, error)
    if isinstance(value, dict):
        return value
    return Unreadable("not an object", f"{_kind(value)}; expected {{...}}", _raw(json.dumps(value, ensure_ascii=False)))


def _not_objects(place: str, value: Any) -> NoReturn:
    advice: dict[type, str] = {
        str: 'Write one text a line in a .txt, or objects such as {"text": ...}.',
        list: 'Give each a name, such as {"messages": [...]}.',
    }
    raise AlignError(
        f"{place}: the list holds {_kind(value)} ({json.dumps(value)[:40]}); expected objects, one a row.\n"
        f"  {advice.get(type(value), 'Write each row as an object with named columns.')}"
    )


def _json_object(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
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
        yield number, _object(value, damaged)
        following = stream.next()
        if not following:
            return
        if following != "{":
            raise AlignError(f"{stream.place}: {following!r} follows object {number}; expected another object, or the end of the file.")
        value, damaged = stream.value(LONGEST_ROW, f"one row is larger than {LONGEST_ROW // MB} MB; the file may be damaged.")


def _rows_of(whole: dict[str, Any], path: Path) -> list[dict | Unreadable]:
    """The rows in one object: a list of them under a name, rows keyed by id, columns as pandas writes them; else it is a row."""
    values = list(whole.values())
    lists = [name for name, value in whole.items() if _is_rows(value) and (len(whole) == 1 or name not in _NESTED)]
    if len(lists) == 1:
        return [_object(row, "") for row in whole[lists[0]]]
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


# CSV and plain text ---------------------------------------------------------------------------------------------------


class _Raw(io.RawIOBase):
    """Blocks as a file, for io to split into lines as csv wants them."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._held = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._held:
            self._held = memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size


def _csv(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """Every value is text; a cell may span lines. A row's number is the line on which it begins."""
    csv.field_size_limit(LONGEST_ROW)
    # "surrogateescape": a byte that is not UTF-8 spoils its row and no other.
    text = io.TextIOWrapper(io.BufferedReader(_Raw(_blocks(part)), _BLOCK), encoding="utf-8", errors="surrogateescape", newline="")
    lines = _Bounded(text, part.path)
    usual = "\t" if (data_suffix(part.path) or ("",))[0] == ".tsv" else ","
    delimiter, skipped = _delimiter(lines, usual)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        number = skipped + reader.line_num + 1
        lines.taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field larger" in str(error):
                raise AlignError(
                    f"{part.path}:{number}: a quote that opens in this row is never closed; everything after it would be lost.\n"
                    '  Close it; a quote inside a quoted cell is written twice ("").'
                ) from None
            if not names:
                raise AlignError(f"{part.path}:{number}: the header cannot be read ({error}).") from None
            until = f"up to line {number + len(lines.taken) - 1}: " if len(lines.taken) > 1 else ""
            detail = f"{until}{error}; a quote inside a quoted cell is written twice"
            yield number, Unreadable("broken quotes", detail, _raw(lines.taken_bytes()))
            continue
        if cells is None:
            return
        if not cells:
            continue
        if not names:
            names = _header(cells, f"{part.path}:{number}", delimiter)
            continue
        try:
            if not "".join(cells).isascii():
                "".join(cells).encode()
        except UnicodeEncodeError:
            yield number, _object({}, "".join(lines.taken))
            continue
        if len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        elif cells[0].strip() or len(cells) > 1:  # else a blank line
            detail = f"{len(cells)} cell{'s' * (len(cells) != 1)}; the header has {len(names)}"
            yield number, Unreadable("wrong number of columns", detail, _raw(lines.taken_bytes()))


class _Bounded:
    """Lines, with those of the row that is being read kept to show it by; a row that never ends is refused."""

    def __init__(self, text: io.TextIOWrapper, path: Path):
        self.taken: list[str] = []
        self._text, self._path, self._again = text, path, ""

    def taken_bytes(self) -> bytes:
        """The lines of the row as they are in the file."""
        return "".join(self.taken).encode("utf-8", "surrogateescape")

    def __iter__(self) -> _Bounded:
        return self

    def __next__(self) -> str:
        line, self._again = self._again or self._text.readline(LONGEST_ROW), ""
        if not line:
            raise StopIteration
        if len(line) >= LONGEST_ROW:
            _too_long(self._path, "a line")
        self.taken.append(line)
        return line

    def peek(self) -> str:
        self._again = self._again or next(self, "")
        return self._again


def _delimiter(lines: _Bounded, usual: str) -> tuple[str, int]:
    """The one among , ; tab | that the header holds most often outside quotes, and how many blank lines are before it."""
    skipped = 0
    while (header := lines.peek()) and not header.strip():
        next(lines)
        skipped += 1
    header = re.sub(r'"[^"]*"', "", header)
    return max((usual, ",", ";", "\t", "|"), key=header.count), skipped


def _header(cells: list[str], where: str, delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) > 1 and not names[0] and all(names[1:]) and "index" not in names:
        names[0] = "index"  # pandas' row numbers, saved without index=False
    if "" in names:
        raise AlignError(f"{where}: column {names.index('') + 1} of the header has no name (separated by {delimiter!r}: {names}); name it.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AlignError(f"{where}: the header names {', '.join(map(repr, twice))} twice; expected names that differ. Rename one.")
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        raise AlignError(f"{where}: the header is not UTF-8 text; save the file as UTF-8.") from None
    return names


def _text_lines(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    for number, line in _lines(part):
        if b"\0" in line:
            yield number, Unreadable("not UTF-8 text", "it holds NUL bytes, as after a crash", _raw(line))
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            yield number, _not_utf8(line, error)
            continue
        if text.strip():
            yield number, {"text": text.removesuffix("\r")}


# Parquet --------------------------------------------------------------------------------------------------------------


def _parquet_file(part: Part) -> Any:
    import tempfile

    import pyarrow
    import pyarrow.parquet

    place: Any = part.path
    try:
        if part.packing is not None:  # its table of contents is at the end
            place = tempfile.TemporaryFile()  # noqa: SIM115
            for block in _blocks(part):
                place.write(block)
            place.seek(0)
        return pyarrow.parquet.ParquetFile(place, buffer_size=_BLOCK, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        _bad_parquet(part.path, error)


def _bad_parquet(path: Path, error: Exception) -> NoReturn:
    raise AlignError(
        f"{path}: the Parquet file is damaged or cut off ({' '.join(str(error).split())[:200]}); write or fetch it again."
    ) from None


def _parquet(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    import pyarrow

    with _parquet_file(part) as file:
        names = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise AlignError(f"{part.path}: has the columns {', '.join(map(repr, twice))} twice; expected names that differ.")
        groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
        number = part.first
        try:
            for batch in file.iter_batches(batch_size=1000, row_groups=groups):
                yield from enumerate(_batch_rows(batch), number)
                number += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            _bad_parquet(part.path, error)


def _batch_rows(batch: Any) -> list[dict | Unreadable]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            text = isinstance(error, UnicodeDecodeError)
            return [Unreadable("not UTF-8 text" if text else "cannot be converted", str(error), "")]
        return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]


# Parts ----------------------------------------------------------------------------------------------------------------


def _by_bytes(whole: Part, count: int) -> list[Part]:
    """Ranges that end at newlines, and the number of each range's first line."""
    size = whole.path.stat().st_size
    if count <= 1:
        return [whole]
    bounds = [0]
    found, number = [], 1
    with _open(whole.path) as file:
        for i in range(1, count):
            file.seek(max(0, size * i // count - 1))
            while (line := file.readline(_BLOCK)) and not line.endswith(b"\n"):
                pass
            bounds.append(file.tell())
        bounds = sorted({*bounds, size})
        for start, stop in itertools.pairwise(bounds):
            found.append(whole._replace(start=start, stop=stop, first=number))
            file.seek(start)
            for at in range(start, stop, 4 * MB):
                number += file.read(min(4 * MB, stop - at)).count(b"\n")
    return found


def _by_row_groups(whole: Part, count: int) -> list[Part]:
    """Runs of row groups with about as many rows each."""
    with _parquet_file(whole) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    if count <= 1 or len(sizes) <= 1:
        return [whole]
    found: list[Part] = []
    total, start, before, done = sum(sizes), 0, 0, 0
    for stop, size in enumerate(sizes, 1):
        done += size
        if stop == len(sizes) or done * count >= total * (len(found) + 1):
            found.append(whole._replace(start=start, stop=stop, first=before + 1))
            start, before = stop, done
    return found


_FORMS = {
    "lines": _json_lines,
    "text": _text_lines,
    "list": _json_list,
    "object": _json_object,
    "csv": _csv,
    "parquet": _parquet,
}
