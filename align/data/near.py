"""Records that are almost the same as an earlier one, by MinHash (Broder 1997) from the package rensa."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from align.errors import AlignError

if TYPE_CHECKING:
    from align.data.mix import Data

WORDS = 5  # in a shingle
HASHES, BANDS = 128, 32  # 32 bands of 4: a pair alike to 0.8 is found with probability 1 - (1 - 0.8^4)^32 > 0.9999
SHOWN = 5


def near_duplicates(data: Data, threshold: float, among: set[int] | None = None) -> dict[str, Any]:
    """Find records alike to an earlier one.

    Args:
        data: records; exact duplicates are out already.
        among: places of the records that count; None for all.
        threshold: Jaccard similarity of the sets of five-word shingles, estimated with a standard error of at most 0.045.

    Returns:
        threshold; records: how many there are; at: their places; groups: how many earlier ones they repeat; places: the first few pairs.

    Raises:
        AlignError: where the package is not installed.
    """
    if importlib.util.find_spec("rensa") is None:
        raise AlignError("near duplicates: the package rensa is not installed. Install it: pip install rensa")
    from rensa import RMinHash, RMinHashLSH

    index, hashes, earlier_of = RMinHashLSH(threshold, HASHES, BANDS), dict[int, Any](), dict[int, int]()
    for place, record in enumerate(data.records()):
        if among is not None and place not in among:
            continue
        minhash = RMinHash(HASHES, 0)
        minhash.update(shingles(_text(record)))
        alike = [other for other in sorted(index.query(minhash)) if hashes[other].jaccard(minhash) >= threshold]
        if alike:
            earlier_of[place] = alike[0]
        else:
            index.insert(place, minhash)
            hashes[place] = minhash
    places = [[data.place(later), data.place(earlier)] for later, earlier in list(earlier_of.items())[:SHOWN]]
    return {
        "threshold": threshold,
        "records": len(earlier_of),
        "groups": len(set(earlier_of.values())),
        "places": places,
        "at": list(earlier_of),
    }


def shingles(text: str) -> list[str]:
    """Every run of five words in lower case; the whole text where it is shorter."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]


def _text(record: dict[str, Any]) -> str:
    if "text" in record:
        return record["text"]
    turns = [record[name] for name in ("messages", "prompt", "chosen", "rejected") if name in record]
    return "\n".join(message["content"] for messages in turns for message in messages)
