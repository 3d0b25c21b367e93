"""Finding data files, the user's own and those that come with align."""

from __future__ import annotations

from pathlib import Path

from align.errors import AlignError

_PACKAGE = Path(__file__).parent


def shipped_file(name: str) -> Path:
    """A file of prompts/ or datasets/: inside the installed wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "shipped" / name
    return inside if inside.exists() else _PACKAGE.parent / name


def data_file(name: str | Path, where: str) -> Path:
    """The file a recipe names, from the current folder or, for datasets/..., from those that come with align.

    Raises:
        AlignError: where there is none, with the data files that are near.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_file(str(name))
    if not path.is_absolute() and shipped.is_file():
        return shipped
    near = sorted(p.name for p in path.parent.glob("*.jsonl")) if path.parent.is_dir() else []
    hint = f" In {str(path.parent)!r} there are: {', '.join(near[:8])}." if near else ""
    raise AlignError(f"{where}: there is no file {str(name)!r}.{hint}")
