"""How much a policy's words repeat themselves: within an answer, and over its answers."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams (Li et al. 2016, arXiv 1510.03055); unknown where no text has n words."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(text: str, n: int = 3) -> float:
    """The share of a text's n-grams of words that were there before; 0 for a text of fewer than n words."""
    grams = _grams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False)) if len(words) >= n else []
