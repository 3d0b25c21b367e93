"""The quick way through JSON Lines whose columns are plain text or plain messages: a block of lines is checked at once by Arrow.

Only rows that are right beyond doubt come out of it. Every other row, and every block that Arrow does not read as expected,
goes the plain way of `align.data.convert`, which decides and says why; both ways give the same columns.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from xxhash import xxh3_64_intdigest

from align.data.instructions import NO_INPUT
from align.data.measures import FACTOR, HALF
from align.data.rows import Format

DEEP = b"[" * 100  # nested deeper than Python reads
ODD = (b"{{", b"\n\nHuman:", b"\n\nAssistant:")  # a placeholder perhaps, or a transcript that has turns in it
_FIELDS = {"conversation": ({"prompt", "completion"}, {"prompt", "input", "completion"}), "preference": ({"prompt", "chosen", "rejected"},)}
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Checked(NamedTuple):
    """What was found of a block's lines. Columns hold a value for every line; they mean something where `good` is True."""

    good: np.ndarray
    columns: dict[str, np.ndarray]  # key, prompt, digest, pair, characters, longer


class Lines:
    """The lines of a block of bytes, where they lie in it."""

    def __init__(self, block: bytes):
        """Find where they begin and end."""
        self.block = block
        self.ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        if not block.endswith(b"\n"):
            self.ends = np.append(self.ends, len(block))
        self.starts = np.concatenate([[0], self.ends[:-1] + 1])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at: int) -> bytes:
        return self.block[self.starts[at] : self.ends[at]]

    def whole(self) -> pa.BinaryArray:
        """All of them with their newlines, without a copy."""
        offsets = np.append(self.starts, len(self.block)).astype(np.int32)
        return pa.Array.from_buffers(pa.binary(), len(self), [None, pa.py_buffer(offsets), pa.py_buffer(self.block)])


def layout_of(format: Format) -> pa.Schema | None:
    """The columns to read of rows that can go the quick way, or None."""
    if format.gathers or format.coding or not all(isinstance(column, str) for column in format.columns.values()):
        return None
    if format.name == "messages" and format.kind == "conversation" and set(format.columns) == {"messages"}:
        return pa.schema([(format.column("messages"), _MESSAGES)])
    if set(format.columns) in _FIELDS.get(format.kind, ()) and not any("[]" in format.column(field) for field in format.columns):
        return pa.schema([(format.column(field), pa.string()) for field in format.columns])
    return None


def check(lines: Lines, format: Format, layout: pa.Schema) -> Checked | None:
    """Check lines of JSON, one row each.

    Returns:
        Which are right, with their columns; None where Arrow reads them in another way than line by line.
    """
    characters = np.frombuffer(lines.block, np.uint8)
    objects = (characters[lines.starts] == ord("{")) & (characters[lines.ends - 1] == ord("}"))
    if not objects.all() or DEEP in lines.block:  # Arrow reads rows over two lines
        return None
    table = _table(lines.block, layout, "messages" not in format.columns)
    if table is None or len(table) != len(lines) or any(table.schema.field(field.name).type != field.type for field in layout):
        return None
    texts = {name: _whole(table[format.column(name)]) for name in format.columns}
    return _check_messages(texts["messages"]) if "messages" in texts else _check_columns(texts, format)


def _table(block: bytes, layout: pa.Schema, plain: bool) -> pa.Table | None:
    """The rows as Arrow reads them; None where it cannot, or reads what is no JSON.

    Other columns are read too: in a turn they matter, and they tell whether there are numbers. Beside plain columns they may be
    anything.
    """
    for others in ("infer", "ignore") if plain else ("infer",):
        try:
            if not block.isascii():
                block.decode()
            table = pa.json.read_json(
                pa.BufferReader(block),
                pa.json.ReadOptions(use_threads=False, block_size=max(len(block) + 1, 1 << 16)),
                pa.json.ParseOptions(explicit_schema=layout, unexpected_field_behavior=others),
            ).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
            continue
        may_have_numbers = others == "ignore" or "double" in str(table.schema)
        return None if may_have_numbers and _has_no_number(block) else table
    return None


def _has_no_number(block: bytes) -> bool:
    """Whether a value is NaN or infinite, which Arrow reads and JSON has not. A text may hold these words."""
    return any(word in block and re.search(rb"[:,\[]\s*-?" + word, block) is not None for word in (b"NaN", b"Inf"))


def _whole(column: pa.ChunkedArray) -> Any:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _check_columns(texts: dict[str, Any], format: Format) -> Checked:
    prompt = texts["prompt"]
    good = np.ones(len(prompt), dtype=bool)
    for field, column in texts.items():
        if field != "input":
            good &= _true(pc.invert(_blank(column)))
    if "input" in texts:
        extra = pc.fill_null(texts["input"], "")
        empty = pc.equal(extra, "")
        none = pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(extra)), pa.array(["", *NO_INPUT]))
        good &= _true(pc.or_(empty, pc.invert(none)))
        prompt = pc.if_else(empty, prompt, pc.binary_join_element_wise(prompt, extra, "\n\n"))
    replies = [texts[field] for field in ("chosen", "rejected", "completion") if field in texts]
    for column in (prompt, *replies):
        good &= ~_odd(column)
    opening, *hashes = (_hashes(column) for column in (prompt, *replies))
    size, *sizes = (_numbers(pc.utf8_length(column)) for column in (prompt, *replies))
    known = {"key": opening, "prompt": opening}
    if format.kind == "conversation":
        return _checked(good, {**known, "digest": opening * FACTOR + hashes[0]}, characters=size + sizes[0])
    good &= _true(pc.not_equal(*map(pc.utf8_trim_whitespace, replies)))
    better, worse = hashes
    known |= {"digest": (opening * FACTOR + better) * FACTOR + worse, "pair": opening * FACTOR + (better + worse)}
    return _checked(good, known, characters=size + sum(sizes), longer=sizes[0] - sizes[1])


def _check_messages(messages: Any) -> Checked:
    """Turns alternate from the user's to the assistant's, perhaps after a system turn, and all have text."""
    turns = messages.flatten()
    roles, contents = turns.field("role"), turns.field("content")
    counts = _numbers(pc.list_value_length(messages))
    ends = np.cumsum(counts)
    row = np.repeat(np.arange(len(messages)), counts)
    at = np.arange(len(turns)) - np.repeat(ends - counts, counts)
    code = _numbers(pc.index_in(roles, pa.array(["user", "assistant", "system"])), missing=9)
    has_system = np.zeros(len(messages), dtype=bool)
    has_system[row[(at == 0) & (code == 2)]] = True
    expected = np.where((at == 0) & has_system[row], 2, (at - has_system[row]) % 2)
    right = (code == expected) & _true(pc.invert(_blank(contents))) & ~_odd(contents)
    wrong = np.bincount(row[~right], minlength=len(messages)) > 0
    good = ~wrong & ((counts - has_system) % 2 == 0) & (counts - has_system >= 2)
    hashes = np.append(_hashes(contents), np.uint64(0))  # for rows without a turn
    prompts = np.zeros(len(messages), dtype=np.uint64)
    for turn in range(counts.max(initial=0) - 1):
        more = np.flatnonzero(counts - 1 > turn)
        prompts[more] = prompts[more] * FACTOR + hashes[(ends - counts)[more] + turn]
    known = {"key": hashes[ends - counts + has_system], "prompt": prompts, "digest": prompts * FACTOR + hashes[ends - 1]}
    sizes = np.bincount(row, _numbers(pc.utf8_length(contents)), minlength=len(messages))
    return _checked(good, known, characters=sizes.astype(np.int64))


def _blank(column: Any) -> Any:
    """True for no text, or nothing but white space. Null where the value is null."""
    return pc.or_(pc.equal(column, ""), pc.utf8_is_space(column))


def _odd(texts: Any) -> np.ndarray:
    """True where a text wants a closer look. Most blocks have none, which is seen several times as fast over all texts at once."""
    content, odd = texts.buffers()[2], np.zeros(len(texts), dtype=bool)
    joined = content.to_pybytes() if content else b""
    for mark in ODD:
        if mark[:1] in joined and mark in joined:
            odd |= _true(pc.match_substring(texts, mark.decode()))
    return odd


def _true(mask: Any) -> np.ndarray:
    """A mask as an array; False where it is null."""
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


def _numbers(numbers: Any, missing: int = 0) -> np.ndarray:
    return pc.fill_null(numbers, missing).to_numpy(zero_copy_only=False).astype(np.int64)


def _hashes(texts: Any) -> np.ndarray:
    """The hash of each text. Shape (texts,)."""
    return np.array(list(map(xxh3_64_intdigest, pc.fill_null(texts, "").cast(pa.binary()).to_pylist())), dtype=np.uint64)


def _checked(good: np.ndarray, hashes: dict[str, np.ndarray], **sizes: np.ndarray) -> Checked:
    """The columns: hashes less 2^63, and zero for what there is not."""
    none = np.zeros(len(good), dtype=np.int64)
    signed = {name: (of_all ^ HALF).view(np.int64) for name, of_all in hashes.items()}
    return Checked(good, {"pair": none, "longer": none, **signed, **sizes})
