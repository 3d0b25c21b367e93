"""What is known of a record by numbers: hashes of its texts, and how long they are.

A text's hash is its xxh3. A sequence of texts has the polynomial of their hashes in 64 bits, which `align.data.fast` takes of many at
once. All are kept less 2^63: hashes are unsigned, Arrow's numbers signed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from xxhash import xxh3_64_intdigest

from align.records import Kind, first_user_turn

HALF = 1 << 63
FACTOR = 0x9E3779B97F4A7C15  # of the polynomial: 2^64 by the golden ratio, odd so that no bit is lost
REFUSED = (0, 0, 0, 0, 0, 0, 1.0, 0.0)  # the measures of a record that is refused


def measures(record: Mapping[str, Any], text: bytes, kind: Kind) -> tuple:
    """Key, prompt, digest, pair, characters, longer, probability and margin of a record whose JSON is `text`."""
    if "text" in record:
        key = _hash(record["text"]) - HALF
        return key, key, key, 0, len(record["text"]), 0, 1.0, 0.0
    messages = record["messages" if kind == "conversation" else "prompt"]
    if kind == "feedback":
        messages = [*messages, *record["completion"]]
    contents = [message["content"] for message in messages]
    key, characters, hashes = _hash(first_user_turn(messages)) - HALF, sum(map(len, contents)), list(map(_hash, contents))
    plain = "tools" not in record and max(map(len, messages)) == 2
    if kind != "preference":
        prompt = _sequence(hashes if kind == "prompt" else hashes[:-1])
        whole = _sequence(hashes) if plain and kind != "feedback" else xxh3_64_intdigest(text) - HALF
        return key, prompt, whole, 0, characters, 0, 1.0, 0.0
    sides = record["chosen"][0], record["rejected"][0]
    chosen, rejected = (side["content"] for side in sides)
    prompt = _sequence(hashes)
    characters, longer = characters + len(chosen) + len(rejected), len(chosen) - len(rejected)
    if not plain or any(len(side) > 2 for side in sides):  # they may differ in their tools and calls alone
        hashes = [xxh3_64_intdigest(orjson.dumps([messages, record.get("tools")]))]
        chosen, rejected = (orjson.dumps(side).decode() for side in sides)
    better, worse = _hash(chosen), _hash(rejected)
    whole, pair = _sequence([*hashes, better, worse]), _sequence([*hashes, better + worse])  # the pair has no order
    return key, prompt, whole, pair, characters, longer, record.get("chosen_probability", 1.0), record.get("margin", 0.0)


def _hash(text: str) -> int:
    return xxh3_64_intdigest(text.encode())


def _sequence(hashes: Iterable[int]) -> int:
    """The polynomial of some hashes, less 2^63."""
    total = 0
    for number in hashes:
        total = (total * FACTOR + number) % (1 << 64)
    return total - HALF
