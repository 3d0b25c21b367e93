"""Rows out of tables and text: CSV with any of the usual delimiters, Parquet, and plain text by its lines."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from align.data import read_bytes
from align.data.read_bytes import Part, Unreadable, beginning, not_utf8, read_blocks, read_lines, too_long
from align.data.read_json import object_row
from align.data.sources import data_suffix
from align.errors import AlignError


def csv_rows(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """Every value is text; a cell may span lines. A row's number is the line on which it begins."""
    csv.field_size_limit(read_bytes.LONGEST_ROW)
    # "surrogateescape": a byte that is not UTF-8 spoils its row and no other.
    text = io.TextIOWrapper(
        io.BufferedReader(_Raw(read_blocks(part)), read_bytes.BLOCK), encoding="utf-8", errors="surrogateescape", newline=""
    )
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
            yield number, Unreadable("broken quotes", detail, beginning(lines.taken_bytes()))
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
            yield number, object_row({}, "".join(lines.taken))
            continue
        if len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        elif cells[0].strip() or len(cells) > 1:  # else a blank line
            detail = f"{len(cells)} cell{'s' * (len(cells) != 1)}; the header has {len(names)}"
            yield number, Unreadable("wrong number of columns", detail, beginning(lines.taken_bytes()))


def text_lines(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """Every line that is not blank, as {"text": ...}."""
    for number, line in read_lines(part):
        if b"\0" in line:
            yield number, Unreadable("not UTF-8 text", "it holds NUL bytes, as after a crash", beginning(line))
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            yield number, not_utf8(line, error)
            continue
        if text.strip():
            yield number, {"text": text.removesuffix("\r")}


def parquet_rows(part: Part) -> Iterator[tuple[int, dict | Unreadable]]:
    """The rows of some row groups, a thousand at a time."""
    import pyarrow

    with parquet_file(part) as file:
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
        line, self._again = self._again or self._text.readline(read_bytes.LONGEST_ROW), ""
        if not line:
            raise StopIteration
        if len(line) >= read_bytes.LONGEST_ROW:
            too_long(self._path, "a line")
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


def parquet_file(part: Part) -> Any:
    """The open file; a compressed one is decompressed onto the disk first."""
    import tempfile

    import pyarrow
    import pyarrow.parquet

    place: Any = part.path
    try:
        if part.packing is not None:  # its table of contents is at the end
            place = tempfile.TemporaryFile()  # noqa: SIM115
            for block in read_blocks(part):
                place.write(block)
            place.seek(0)
        return pyarrow.parquet.ParquetFile(place, buffer_size=read_bytes.BLOCK, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        _bad_parquet(part.path, error)


def _bad_parquet(path: Path, error: Exception) -> NoReturn:
    raise AlignError(
        f"{path}: the Parquet file is damaged or cut off ({' '.join(str(error).split())[:200]}); write or fetch it again."
    ) from None


def _batch_rows(batch: Any) -> list[dict | Unreadable]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            text = isinstance(error, UnicodeDecodeError)
            return [Unreadable("not UTF-8 text" if text else "cannot be converted", str(error), "")]
        return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]
