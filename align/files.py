"""Finding the files that come with align: prompts, data and recipes."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped_file(name: str) -> Path:
    """A file of prompts/ or datasets/: inside the installed wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "shipped" / name
    return inside if inside.exists() else _PACKAGE.parent / name
