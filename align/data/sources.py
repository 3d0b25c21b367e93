"""What a recipe writes as its data, and the files or the hub data set that it stands for. Cheap to import."""

from __future__ import annotations

import difflib
import glob
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from align.errors import AlignError, did_you_mean
from align.files import shipped_file

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
PACKINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}  # each may follow any of SUFFIXES
READ = f"{', '.join(SUFFIXES)}, each also with {', '.join(PACKINGS)}"  # for messages

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
_HUB_TEXT = re.compile(rf"(?P<path>{_HUB.pattern})(@(?P<revision>[^:@]+))?(:(?P<split>\w+))?")
_BESIDE_DATA = ("readme", "license", "licence", "notice", "copying", "changelog", "requirements")  # .txt files of a folder that are no data
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # written by `datasets` beside the rows


@dataclass(frozen=True)
class Source:
    """One source of rows, as a recipe writes it: `data=Source("org/name", split="train", weight=0.5, columns={"prompt": "question"})`.

    Args:
        path: a file, a folder, a glob, or a hub id 'org/name'.
        split: of a hub data set; 'train' by default.
        revision: of a hub data set: a branch, tag or commit.
        config: of a hub data set that has several.
        columns: align's name of a column -> the file's.
        weight: how often each of its rows counts in an epoch: 2 shows each twice, 0.5 a fixed random half.
        cap: at most this many rows, a fixed random choice; None for all.
    """

    path: str
    split: str | None = None
    revision: str | None = None
    config: str | None = None
    columns: Mapping[str, str] | None = None
    weight: float = 1.0
    cap: int | None = None


_KEYS = tuple(field.name for field in fields(Source))


def as_sources(value: Any, where: str = "data") -> tuple[Source, ...]:
    """The sources that a recipe's `data=`, `preferences=` or `prompts=` stands for.

    Args:
        value: a path or hub id (also 'org/name@revision:split'), a Source, a dict with a Source's keys, or a list of these.
        where: starts every error, such as 'sft.data'.

    Raises:
        AlignError: for anything else.
    """
    if isinstance(value, (list, tuple)):
        if not value:
            raise AlignError(f"{where}: the list of sources is empty; expected at least one file, folder, glob or hub id.")
        return tuple(_as_source(item, f"{where}[{i}]") for i, item in enumerate(value))
    return (_as_source(value, where),)


def _as_source(value: Any, where: str) -> Source:
    if isinstance(value, Source):
        return _checked(value, where)
    if isinstance(value, (str, os.PathLike)):
        return _checked(_from_text(os.fspath(value)), where)
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in _KEYS]
        if unknown:
            raise AlignError(f"{where}: a source has no {unknown[0]!r}.{did_you_mean(unknown[0], _KEYS)} There are: {', '.join(_KEYS)}.")
        if "path" not in value:
            raise AlignError(f"{where}: the source has no 'path'; expected a file, a folder, a glob or a hub id 'org/name' there.")
        return _checked(Source(**value), where)
    raise AlignError(
        f"{where}: {value!r} ({type(value).__name__}) is no source of rows; expected a path, a hub id 'org/name', Source(...), "
        "a dict with a Source's keys, or a list of these."
    )


def _from_text(text: Any) -> Source:
    """A path, or the shorthand of a hub id with its revision and split, where no such file exists."""
    match = _HUB_TEXT.fullmatch(text) if isinstance(text, str) else None
    if match and (match["revision"] or match["split"]) and not _exists(text) and data_suffix(text) is None:
        return Source(match["path"], revision=match["revision"], split=match["split"])
    return Source(text)


def _checked(source: Source, where: str) -> Source:
    """The source, its path a text and each of its values sensible."""
    path = os.fspath(source.path) if isinstance(source.path, os.PathLike) else source.path
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise AlignError(f"{where}: 'path' is {path!r}; expected a file, a folder, a glob or a hub id 'org/name'.")
    for name in ("split", "revision", "config"):
        text = getattr(source, name)
        if text is not None and (not isinstance(text, str) or not text):
            raise AlignError(f"{where}: {name!r} is {text!r}; expected a text, or None.")
    columns = source.columns
    if columns is not None and not (
        isinstance(columns, Mapping) and all(isinstance(name, str) and name for pair in columns.items() for name in pair)
    ):
        raise AlignError(f"{where}: 'columns' is {columns!r}; expected names to names, such as {{'prompt': 'question'}}.")
    weight, cap = source.weight, source.cap
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight <= 0:
        raise AlignError(f"{where}: 'weight' is {weight!r}; expected a number above 0 (leave the source out to have none of it).")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise AlignError(f"{where}: 'cap' is {cap!r}; expected a whole number of rows from 1, or None for all.")
    return replace(source, path=path, weight=float(weight))


def data_suffix(name: str | os.PathLike) -> tuple[str, str | None] | None:
    """What a file's name says it is: ('.jsonl', 'gzip') for 'a.jsonl.gz', (..., None) unpacked; None where it is no data file."""
    path = Path(os.fspath(name).lower())
    packing = PACKINGS.get(path.suffix)
    suffix = Path(path.stem).suffix if packing else path.suffix
    return (suffix, packing) if suffix in SUFFIXES else None


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # such as a name that is too long
        return False


def _shipped(path: str) -> Path | None:
    """What comes with align under that name."""
    try:
        found = shipped_file(path)
        return found if not Path(path).is_absolute() and found.exists() else None
    except OSError:
        return None


def is_hub_id(source: Source) -> bool:
    """Whether the path reads as 'org/name', and neither is there on this machine nor looks like a data file."""
    path = source.path
    return bool(_HUB.fullmatch(path)) and data_suffix(path) is None and not _exists(path) and not _shipped(path)


# Files ----------------------------------------------------------------------------------------------------------------


def find_files(source: Source, where: str) -> list[Path]:
    """The data files that a source names, in a fixed order; none for a hub id.

    A folder stands for all data files below it. 'datasets/...' are files that come with align where the current folder has none.

    Raises:
        AlignError: where there is nothing, or nothing that can be read.
    """
    if is_hub_id(source):
        return []
    for name in ("split", "revision", "config"):
        if getattr(source, name) is not None:
            raise AlignError(
                f"{where}: {name}={getattr(source, name)!r} belongs to a hub data set, and {source.path!r} is none.\n"
                f"  Leave {name!r} out; of a folder, choose files with a glob such as 'folder/train*.jsonl'."
            )
    path = Path(source.path).expanduser()
    if not _exists(path):
        path = _shipped(source.path) or path
    if _exists(path):
        return _in_folder(path, where) if path.is_dir() else [_readable(path, where)]
    if glob.has_magic(str(path)):
        return _in_glob(str(path), where)
    raise AlignError(f"{where}: there is no file {source.path!r}.{_near(path)}")


def _readable(path: Path, where: str) -> Path:
    if not path.is_file():
        raise AlignError(f"{where}: {str(path)!r} is neither a file nor a folder (a pipe or a device); save the rows to a file first.")
    if data_suffix(path) is None:
        raise AlignError(f"{where}: {str(path)!r} has the suffix {path.suffix!r}; expected one of {READ}.\n  Rename or convert the file.")
    return path


def _in_folder(folder: Path, where: str) -> list[Path]:
    """All data files below a folder, sorted; not hidden ones, and not what only describes data."""

    def refuse(error: OSError) -> None:
        raise AlignError(f"{where}: the folder {error.filename!r} cannot be read ({error.strerror}); allow it, or name files.")

    found: list[Path] = []
    others: list[str] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            if not name.startswith("."):
                (found if _is_data(name) else others).append(Path(parent, name))  # type: ignore[arg-type]
    if found:
        return sorted(found)
    if any(Path(name).suffix == ".arrow" for name in others):
        raise AlignError(
            f"{where}: the folder {str(folder)!r} holds .arrow files, as `save_to_disk` of `datasets` writes them; expected {READ}.\n"
            f"  Write it again: datasets.load_from_disk({str(folder)!r}).to_parquet('rows.parquet')."
        )
    holds = f"holds {_some([str(Path(name).relative_to(folder)) for name in others])}" if others else "is empty"
    raise AlignError(f"{where}: the folder {str(folder)!r} has no data files; expected {READ}.\n  It {holds}.")


def _is_data(name: str) -> bool:
    lower = name.lower()
    if lower in _ABOUT_DATA or (lower.endswith(".txt") and lower.startswith(_BESIDE_DATA)):
        return False
    return data_suffix(name) is not None


def _in_glob(pattern: str, where: str) -> list[Path]:
    matches = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 (which leaves out hidden files)
    files = [path for path in matches if path.is_file() and data_suffix(path) is not None]
    found = [path for path in files if _is_data(path.name)] or files
    if found:
        return found
    if not matches:
        start = Path(pattern)
        while glob.has_magic(str(start)):
            start = start.parent
        hint = _near(start / "*") if start.is_dir() else f" There is no folder {str(start)!r}."
        raise AlignError(f"{where}: nothing matches {pattern!r}.{hint}")
    hint = f"\n  For all files below a folder: '{pattern.rstrip('/*') or '.'}'." if all(path.is_dir() for path in matches) else ""
    raise AlignError(f"{where}: {pattern!r} matches {_some([str(p) for p in matches])}; expected files in {READ}.{hint}")


def _near(path: Path) -> str:
    """What may have been meant by a path that is not there: a hint to end an error with, or nothing."""
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    try:
        entries = [entry for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return ""
    names = sorted(entry.name for entry in entries if entry.is_dir() or _is_data(entry.name))
    close = difflib.get_close_matches(path.name, names, n=3)
    data = [name for name in names if _is_data(name)]
    meant = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    return meant + (f" In {str(path.parent)!r} there are: {_some(data)}." if data else "")


def _some(names: list[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# The hub --------------------------------------------------------------------------------------------------------------


def hub_rows(source: Source, where: str) -> Iterator[tuple[int, dict]]:
    """The rows of a hub data set, numbered from 1, from the hub or from what was fetched earlier. No code of the data set is run.

    Raises:
        AlignError: at once where it cannot be had, with how to get it.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    import datasets

    name = f"the hub data set {source.path!r}"
    local, offline = _fetched_or_reachable(source, where)
    # A folder that `hf download` made is read in place: offline, `datasets` itself looks only in its own cache.
    place = {"path": local} if local else {"path": source.path, "revision": source.revision}
    try:
        rows = datasets.load_dataset(**place, name=source.config, split=source.split or "train", streaming=False)  # type: ignore[attr-defined]
    except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        if offline and not local:
            raise AlignError(_unreachable(source, where, "HF_HUB_OFFLINE is set")) from None
        reason = " ".join(str(error).split())
        raise AlignError(
            f"{where}: {name} cannot be read: {reason[:500] or type(error).__name__}\n"
            f"  Asked for: split {source.split or 'train'!r}, revision {source.revision or 'main'!r}, config {source.config!r}."
        ) from None
    return enumerate(rows, 1)


def _fetched_or_reachable(source: Source, where: str) -> tuple[str | None, bool]:
    """The folder of an earlier `hf download` where the hub is out of reach, and whether it was told to stay so.

    One question with a time limit, because `load_dataset` itself tries for half a minute.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    offline = False
    try:
        HfApi().dataset_info(source.path, revision=source.revision, timeout=10)
        return None, False
    except HFValidationError as error:
        raise AlignError(f"{where}: {source.path!r} is no file here and no hub id ({' '.join(str(error).split())}).") from None
    except RevisionNotFoundError:
        raise AlignError(f"{where}: the hub data set {source.path!r} has no revision {source.revision!r}.") from None
    except RepositoryNotFoundError:
        raise AlignError(
            f"{where}: there is no {source.path!r}: no such file here, and no data set of that name on the hub that is open to you.\n"
            f"  Correct the name, or log in with: hf auth login.{_near(Path(source.path))}"
        ) from None
    except OfflineModeIsEnabled:
        offline, reason = True, "HF_HUB_OFFLINE is set"
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    try:
        return snapshot_download(source.path, repo_type="dataset", revision=source.revision, local_files_only=True), offline
    except (HTTPError, OSError, ValueError):
        if offline:  # `datasets` may have it in its own cache, and does not try the network
            return None, True
        raise AlignError(_unreachable(source, where, reason)) from None


def _unreachable(source: Source, where: str, reason: str) -> str:
    revision = f" --revision {source.revision}" if source.revision else ""
    return (
        f"{where}: {source.path!r} is no file here, and as a hub data set it was not fetched yet and the hub is out of reach ({reason}).\n"
        f"  Fetch it where there is a network: hf download {source.path} --repo-type dataset{revision}; or give a local file "
        f"({', '.join(SUFFIXES)}).{_near(Path(source.path))}"
    )
