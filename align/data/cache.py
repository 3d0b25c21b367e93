"""The cache of records and tokens, kept to a size: what was not used for longest goes first.

A process that uses the cache holds a lock on it for as long as it lives, shared with others. It is cleaned when a process begins to use
it and no other does, so that nothing is taken away from a run.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from pathlib import Path
from typing import IO, Any, Literal

from align.base import cache_folder
from align.errors import AlignError

GB = 10**9
LIMIT_GB = 20.0
FINGERPRINT = 32  # characters that the files of one set of tokens begin with, one for each process that made it
_held: IO[Any] | None = None  # the lock; the system releases it however the process ends


def cache_for(what: Literal["data", "tokens"]) -> Path:
    """Where records or tokens are kept. The first call of a process cleans both.

    Raises:
        AlignError: where the environment's ALIGN_CACHE_GB is no size.
    """
    global _held
    cache = cache_folder()
    (cache / what).mkdir(parents=True, exist_ok=True)
    lock = cache / ".lock"
    if _held is None or _held.name != str(lock):
        limit = _limit()
        _held = lock.open("a")
        try:
            fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            clean(cache, limit)
        except BlockingIOError:  # another process is using it
            pass
        fcntl.flock(_held, fcntl.LOCK_SH)
    return cache / what


def clean(cache: Path, limit: float) -> None:
    """Remove the entries that were not used for longest until the others take at most `limit` bytes."""
    entries: dict[Path, list[Path]] = {}
    for path in [*(cache / "data").glob("*"), *(cache / "tokens").glob("*")]:
        entries.setdefault(path if path.is_dir() else path.with_name(path.name[:FINGERPRINT]), []).append(path)
    measured = []
    for paths in entries.values():
        files = [file for path in paths for file in (path, *path.rglob("*"))]
        size = sum(file.stat().st_size for file in files if file.is_file())
        measured.append((max(file.stat().st_mtime for file in files), size, paths))
    total = sum(size for _, size, _ in measured)
    for _, size, paths in sorted(measured):
        if total <= limit:
            break
        for path in paths:
            (path / "report.json").unlink(missing_ok=True) if path.is_dir() else path.unlink()  # without it an entry is made anew
            shutil.rmtree(path, ignore_errors=True)
        total -= size


def _limit() -> float:
    """The largest size of the cache in bytes."""
    given = os.environ.get("ALIGN_CACHE_GB", str(LIMIT_GB))
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise AlignError(f"ALIGN_CACHE_GB: {given!r}; expected the largest size of the cache in gigabytes, such as {LIMIT_GB:.0f}.")
    return limit * GB
