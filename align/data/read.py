"""From data files to raw rows, each with its place: nothing is interpreted, and no file is held in memory whole.

Trouble with one row is an `Unreadable` in its place; trouble with the file is one AlignError. What a file is, its content says where
its name leaves that open.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from align.data import read_bytes
from align.data.read_bytes import Part, Unreadable, newlines, open_file, read_blocks
from align.data.read_json import json_lines, json_list, json_object
from align.data.read_table import csv_rows, parquet_file, parquet_rows, text_lines
from align.data.sources import READ, data_suffix
from align.errors import AlignError

__all__ = ["Part", "Unreadable", "first_rows", "parts", "rows"]

_SPACE = b" \t\r\n"
_MAGIC = {
    "gzip": (b"\x1f\x8b",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),  # the latter skippable frames
    "bz2": tuple(b"BZh%d1AY&" % level for level in range(1, 10)),
    "xz": (b"\xfd7zXZ\0",),
}
_NO_ROWS = "the file holds no rows"


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


# Recognising a file by its content ------------------------------------------------------------------------------------


def _look(path: Path) -> Part:
    """The whole file as one part: what its content is, where its name leaves that open."""
    named = data_suffix(path)
    with open_file(path) as file:
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
    with closing(read_blocks(part)) as blocks:  # type: ignore[type-var]
        for block in blocks:
            held += block if held else block.lstrip(_SPACE)
            if held and (b"\n" in held or not held.startswith(b"{") or len(held) > read_bytes.LONGEST_ROW):
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


def _shown(start: bytes) -> str:
    return repr(start[:40].decode("utf-8", "backslashreplace"))


# Parts ----------------------------------------------------------------------------------------------------------------


def _by_bytes(whole: Part, count: int) -> list[Part]:
    """Ranges that end at newlines, and the number of each range's first line."""
    size = whole.path.stat().st_size
    if count <= 1:
        return [whole]
    bounds = [0]
    found, number = [], 1
    with open_file(whole.path) as file:
        for i in range(1, count):
            file.seek(max(0, size * i // count - 1))
            while (line := file.readline(read_bytes.BLOCK)) and not line.endswith(b"\n"):
                pass
            bounds.append(file.tell())
        for start, stop in itertools.pairwise(sorted({*bounds, size})):
            found.append(whole._replace(start=start, stop=stop, first=number))
            number += sum(map(newlines, read_blocks(found[-1])))
    return found


def _by_row_groups(whole: Part, count: int) -> list[Part]:
    """Runs of row groups with about as many rows each."""
    with parquet_file(whole) as file:
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
    "lines": json_lines,
    "text": text_lines,
    "list": json_list,
    "object": json_object,
    "csv": csv_rows,
    "parquet": parquet_rows,
}
