"""The quick way through JSON Lines whose columns are plain text or plain messages: a block of lines is checked at once by Arrow.

Only rows that are right beyond doubt come out of it. Every other row, and every block that Arrow does not read as expected,
goes the plain way of `align.data.convert`, which decides and says why; both ways give the same columns.
"""

from __future__ import annotations

import re
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from xxhash import xxh3_64_intdigest

from align.data.instructions import NO_INPUT
from align.data.rows import SEPARATOR, Format

DEEP = b"[" * 100  # nested deeper than Python reads
_FIELDS = {"conversation": ({"prompt", "completion"}, {"prompt", "input", "completion"}), "preference": ({"prompt", "chosen", "rejected"},)}
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class Checked(NamedTuple):
    """What was found of a block's lines. Columns hold a value for every line; they mean something where `good` is True."""

    good: np.ndarray
    columns: dict[str, Any]  # key, prompt, digest, pair, characters, longer


def layout_of(format: Format) -> pa.Schema | None:
    """The columns to read of rows that can go the quick way, or None."""
    if format.gathers or format.coding or not all(isinstance(column, str) for column in format.columns.values()):
        return None
    if format.name == "messages" and format.kind == "conversation" and set(format.columns) == {"messages"}:
        return pa.schema([(format.column("messages"), _MESSAGES)])
    if set(format.columns) in _FIELDS.get(format.kind, ()) and not any("[]" in format.column(field) for field in format.columns):
        return pa.schema([(format.column(field), pa.string()) for field in format.columns])
    return None


def check(lines: list[bytes], format: Format, layout: pa.Schema) -> Checked | None:
    """Check lines of JSON, one row each.

    Returns:
        Which are right, with their columns; None where Arrow reads them in another way than line by line.
    """
    block = b"\n".join(lines)
    plain = "messages" not in format.columns
    objects = all(map(bytes.startswith, lines, repeat(b"{"))) and all(map(bytes.endswith, lines, repeat(b"}")))
    if not objects or _has_no_number(block) or DEEP in block:  # Arrow reads more than JSON has, and rows over two lines
        return None
    try:
        if not block.isascii():
            block.decode()
        table = pa.json.read_json(
            pa.BufferReader(block),
            pa.json.ReadOptions(use_threads=False, block_size=max(len(block) + 1, 1 << 16)),
            pa.json.ParseOptions(explicit_schema=layout, unexpected_field_behavior="ignore" if plain else "infer"),
        ).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        return None
    if len(table) != len(lines) or any(table.schema.field(field.name).type != field.type for field in layout):
        return None
    texts = {name: _whole(table[format.column(name)]) for name in format.columns}
    return _check_columns(texts, format) if plain else _check_messages(texts["messages"])


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
    joined = pc.binary_join_element_wise(prompt, *replies, SEPARATOR)
    good &= ~_true(_odd(joined, pa.scalar(len(replies), pa.int32())))
    sizes = {"characters": _numbers(pc.utf8_length(joined)) - len(replies)}
    if format.kind == "preference":
        chosen, rejected = replies
        good &= _true(pc.not_equal(pc.utf8_trim_whitespace(chosen), pc.utf8_trim_whitespace(rejected)))
        longer = pc.subtract(pc.utf8_length(chosen), pc.utf8_length(rejected))
        return Checked(good, {**_pair_hashes(joined), **sizes, "longer": _numbers(longer)})
    return Checked(good, {**_hashes(joined, np.zeros(len(joined), dtype=bool)), **sizes, **_none(len(joined), "pair", "longer")})


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
    right = (code == expected) & _true(pc.invert(_blank(contents)))
    wrong = np.bincount(row[~right], minlength=len(messages)) > 0
    good = ~wrong & ((counts - has_system) % 2 == 0) & (counts - has_system >= 2)
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    joined = pc.binary_join(pa.ListArray.from_arrays(offsets, pc.fill_null(contents, "")), SEPARATOR)
    good &= ~_true(_odd(joined, pa.array((counts - 1).astype(np.int32))))
    sizes = {"characters": _numbers(pc.utf8_length(joined)) - (counts - 1)}
    return Checked(good, {**_hashes(joined, has_system), **sizes, **_none(len(joined), "pair", "longer")})


def _blank(column: Any) -> Any:
    """True for no text, or nothing but white space. Null where the value is null."""
    return pc.or_(pc.equal(column, ""), pc.utf8_is_space(column))


def _odd(joined: Any, separators: Any) -> Any:
    """True where a row wants a closer look: braces may be a placeholder, a transcript has turns in it, a separator confuses hashes."""
    odd = pc.not_equal(pc.count_substring(joined, SEPARATOR), separators)
    for mark in ("{{", "\n\nHuman:", "\n\nAssistant:"):
        odd = pc.or_(odd, pc.match_substring(joined, mark))
    return odd


def _true(mask: Any) -> np.ndarray:
    """A mask as an array; False where it is null."""
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


def _numbers(numbers: Any, missing: int = 0) -> np.ndarray:
    return pc.fill_null(numbers, missing).to_numpy(zero_copy_only=False).astype(np.int64)


def _none(count: int, *names: str) -> dict[str, np.ndarray]:
    return {name: np.zeros(count, dtype=np.int64) for name in names}


def _hashes(joined: Any, has_system: np.ndarray) -> dict[str, np.ndarray]:
    """Of the first user turn, of all turns but the last, and of all."""
    separator = SEPARATOR.encode()
    texts = _bytes(joined)
    openings = [text.rpartition(separator)[0] for text in texts]
    prompts = _digests(openings)
    several = [at for at, opening in enumerate(openings) if separator in opening]
    keys = prompts.copy()
    keys[several] = _digests([openings[at].split(separator, 2)[1 if has_system[at] else 0] for at in several])
    return {"key": keys, "prompt": prompts, "digest": _digests(texts)}


def _pair_hashes(joined: Any) -> dict[str, np.ndarray]:
    """Of the prompt, of prompt, chosen and rejected, and of these whichever is chosen."""
    separator = SEPARATOR.encode()
    texts = _bytes(joined)
    parts = [text.split(separator) for text in texts]
    prompts = _digests([part[0] for part in parts])
    pairs = _digests([separator.join([part[0], *sorted(part[1:])]) for part in parts])
    return {"key": prompts, "prompt": prompts, "digest": _digests(texts), "pair": pairs}


def _bytes(joined: Any) -> list[bytes]:
    return pc.fill_null(joined, "").cast(pa.binary()).to_pylist()


def _digests(texts: list[bytes]) -> np.ndarray:
    """xxh3 less 2^63, as `align.data.convert` has it: Arrow's numbers are signed."""
    return (np.array([xxh3_64_intdigest(text) for text in texts], dtype=np.uint64) ^ np.uint64(1 << 63)).view(np.int64)
