"""The content of a file: decompressed, block by block or line by line, whole or a stretch of it."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

import numpy as np

from align.errors import AlignError

MB = 1 << 20
LONGEST_ROW = 64 * MB  # bytes or characters; what is longer is no row
BLOCK = MB  # bytes read at a time
_BOM = codecs.BOM_UTF8


class Unreadable(NamedTuple):
    """One row that could not be read."""

    reason: str  # a class that rows share, such as 'not JSON'
    detail: str
    raw: str  # its text, as far as it is text; cut after 1,000 characters


class Part(NamedTuple):
    """A stretch of a file that is read on its own, from `align.data.read.parts`."""

    path: Path
    form: str  # lines, text, list, object, csv, parquet
    packing: str | None = None
    start: int = 0  # bytes of lines and text, row groups of parquet
    stop: int | None = None
    first: int = 1  # the number of its first line or row


def open_file(path: Path) -> IO[bytes]:
    """A file to read bytes from, or what keeps it from being opened."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise AlignError(f"{path}: there is no such file; expected one that stays where it is during the run.") from None
    except IsADirectoryError:
        raise AlignError(f"{path}: is a folder; expected a file. Name the folder as a source of its own, or a glob.") from None
    except OSError as error:
        raise AlignError(f"{path}: cannot be opened ({error.strerror}); check its permissions and where it leads.") from None


def read_blocks(part: Part) -> Iterator[bytes]:
    """The content of a part, block by block, without a byte order mark."""
    import zlib
    from lzma import LZMAError

    left = part.stop - part.start if part.stop is not None else None
    with open_file(part.path) as file:
        file.seek(part.start)
        stream = _unpacked(file, part.packing)
        done = 0
        while True:
            try:
                block = stream.read(BLOCK if left is None else min(BLOCK, left - done))
            except (OSError, EOFError, zlib.error, LZMAError) as error:
                _cannot_go_on(part, done, error)
            if not block:
                return
            if done == 0 == part.start:
                done, block = len(block), block.removeprefix(_BOM)
            else:
                done += len(block)
            yield block


def line_blocks(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines of a part, about a megabyte at a time, and the number of the first of them. Lines end at newlines only."""
    number, held, size = part.first, list[bytes](), 0
    for block in read_blocks(part):
        end = block.rfind(b"\n") + 1
        if end:
            lines = b"".join([*held, block[:end]])
            yield number, lines
            number += newlines(lines)
            held, size = [], 0
        held.append(block[end:])
        size += len(block) - end
        if size > LONGEST_ROW:
            too_long(part.path, f"line {number}")
    if size:
        yield number, b"".join(held)


def read_lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines of a part without their newlines, numbered."""
    for number, lines in line_blocks(part):
        yield from enumerate(lines.removesuffix(b"\n").split(b"\n"), number)


def newlines(block: bytes) -> int:
    """How many there are. Numpy counts them three times as fast as `bytes.count`."""
    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))


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


def _cannot_go_on(part: Part, done: int, error: Exception) -> NoReturn:
    after = f"after {done:,} bytes of content"
    if part.packing is None:
        raise AlignError(f"{part.path}: cannot be read {after} ({error}); check the disk, or fetch the file again.") from None
    cut = isinstance(error, EOFError) or "Truncated" in str(error)
    state = "the file is cut off" if cut else f"the file is damaged: {error}"
    raise AlignError(f"{part.path}: the {part.packing} data ends or breaks {after} ({state}); fetch or compress the file again.") from None


def too_long(path: Path, place: str) -> NoReturn:
    """Refuse a file for a row that never ends."""
    raise AlignError(f"{path}: {place} is longer than {LONGEST_ROW // MB} MB; expected a row. The file may be damaged, or of another kind.")


def not_utf8(line: bytes, error: UnicodeDecodeError) -> Unreadable:
    """A row for its first byte that is not UTF-8."""
    found = f"{error.reason} at byte {error.start + 1} ({line[error.start : error.start + 1]!r}); save the file as UTF-8"
    return Unreadable("not UTF-8 text", found, beginning(line))


def beginning(line: bytes | str) -> str:
    """The beginning of what could not be read, as valid text."""
    line = line if isinstance(line, bytes) else line[:1000].encode("utf-8", "backslashreplace")
    return line[:4000].decode("utf-8", "backslashreplace")[:1000].rstrip("\r\n")
