"""From a source to checked records: read, recognise, convert and check every row once, in several processes, and keep the result.

The result is a folder in the cache, named by a hash over the files' bytes and the mapping: Arrow files with one line per record
(refused rows too, with their reason) and report.json with everything that `--plan` and `align inspect` say of it.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import orjson
from xxhash import xxh3_64_intdigest

from align.base import file_sha256
from align.data.cache import cache_for
from align.data.checks import Problem, find_problem
from align.data.formats import converter, group_key, recognise
from align.data.measures import REFUSED, measures
from align.data.read import Part, Unreadable, first_rows, parts, rows
from align.data.read_bytes import line_blocks
from align.data.read_json import json_row
from align.data.rows import Format, Unfit
from align.data.sources import Source, data_suffix, find_files, hub_rows
from align.errors import AlignError
from align.progress import tracked
from align.records import Kind

if TYPE_CHECKING:
    import numpy as np

REVISION = 2  # raised when the same files begin to give other records
BATCH = 5000  # records written at one time
SEVERAL_PROCESSES_FROM = 8_000_000  # bytes; below, starting processes costs more than it saves
REMEMBERED = 0.05  # seconds in which the hashes of files that were seen before are known
PART = 64_000_000  # bytes of a large file that are converted at one time
SEEN_FOR_FORMAT = 1000  # rows looked at to recognise a file
RAW_KEPT = 2000  # characters of a refused row kept for rejected.jsonl
NO_RECORD = "nothing in it to make a record of"


@dataclass(frozen=True)
class Converted:
    """A source's records in the cache. `report` says what was found."""

    folder: Path
    report: dict[str, Any]

    def column(self, name: str) -> np.ndarray:
        """One column over all records, kept and refused, as numbers."""
        return self.table[name].to_numpy()

    @cached_property
    def table(self) -> Any:
        """All records, kept and refused, as an Arrow table in mapped memory, in the order of the source's rows."""
        import pyarrow as pa

        return pa.concat_tables([pa.ipc.open_stream(pa.memory_map(str(path))).read_all() for path in self.files])

    @property
    def files(self) -> list[Path]:
        """The Arrow files."""
        return sorted(self.folder.glob("*.arrow"))

    def record(self, at: int) -> dict[str, Any]:
        """A kept record by its place in the table."""
        return self.read(self.table["record"][at].as_py(), self.table["raw"][at].as_py(), self.table["file"][at].as_py())

    def read(self, text: bytes, raw: bool, file: int) -> dict[str, Any]:
        """The record that an Arrow line stands for."""
        if not raw:
            return orjson.loads(text)
        row = json_row(text)
        if not isinstance(row, dict):
            raise AlignError(f"{self.report['files'][file]['path']}: a row cannot be read ({row and row.reason}): {text[:80]!r}")
        return self._converters[file](row)[0]

    @cached_property
    def _converters(self) -> list[Any]:
        return [converter(Format(**format)) for format in self.report["formats"]]

    def place(self, file: int, line: int) -> str:
        """Where a record came from: file:line (or row)."""
        return f"{self.report['files'][file]['path']}:{line}"


class Gathered(dict):
    """Rows that make records together, under `rows`, with their `lines`."""


class Work(NamedTuple):
    """What one process converts."""

    part: Part | None  # none: `gathered` or hub rows that are already here
    rows: list[tuple[int, Any]] | None
    file: int
    format: Format
    target: str


def convert_source(source: Source, kind: Kind | None, where: str) -> Converted:
    """Convert a source, or find it converted.

    Args:
        source: what a recipe names.
        kind: what its rows must become; None takes what they are.
        where: stage and input, which starts every error.

    Raises:
        AlignError: for files that are missing or cannot be read, and for a format that is not known.
    """
    files = find_files(source, where)
    with ThreadPoolExecutor(1) as thread:
        hashes = [thread.submit(file_sha256, path) for path in files]
        if wait(hashes, timeout=REMEMBERED).not_done:
            _load_pyarrow()
    known = [
        {"path": str(path), "sha256": sha256.result(), "bytes": path.stat().st_size} for path, sha256 in zip(files, hashes, strict=True)
    ]
    hub = [source.path, source.split, source.revision, source.config]
    contents = [(file["sha256"], data_suffix(path)) for file, path in zip(known, files, strict=True)]
    decides = [REVISION, kind, sorted((source.columns or {}).items()), contents or hub]
    name = f"{xxh3_64_intdigest(json.dumps(decides).encode()):016x}-{_safe(source.path)}"
    folder = cache_for("data") / name
    if not (folder / "report.json").is_file():
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
        try:
            _convert(source, kind, where, files, work)
            try:
                os.replace(work, folder)
            except OSError:  # another process was faster, or somebody cleaned up in part
                if not (folder / "report.json").is_file():
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report = json.loads((folder / "report.json").read_text())
    os.utime(folder)  # what is used stays in the cache
    report["files"] = known or [{"path": source.path, "sha256": "", "bytes": 0}]  # the same bytes may lie elsewhere now
    return Converted(folder, report)


def _load_pyarrow() -> None:
    """Load what conversion needs: once, while large new files are hashed and before processes part, instead of in each of them."""
    import pyarrow as pa

    import align.data.fast  # noqa: F401

    pa.array([0])  # pyarrow loads pandas at its first array


def _safe(path: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in Path(path).name)[:40]


def _convert(source: Source, kind: Kind | None, where: str, files: list[Path], folder: Path) -> None:
    from align.data.report import describe

    jobs: list[tuple[Part | None, list[tuple[int, Any]] | None, int, Format]] = []
    formats: list[Format] = []
    for number, path in enumerate(files):
        format = _recognised(first_rows(path, SEEN_FOR_FORMAT) or _no_row(path), kind, str(path), source)
        kind = kind or format.kind  # all files of a source become one kind
        formats.append(format)
        if format.gathers:
            found = _gathered(((line, row) for part in parts(path, 1) for line, row in rows(part)), format)
            jobs.append((None, found, number, format))
        else:
            jobs += [(part, None, number, format) for part in parts(path, _parts(path))]
    if not files:
        found = list(hub_rows(source, where))
        format = _recognised([row for _, row in found[:SEEN_FOR_FORMAT]], kind, source.path, source)
        formats.append(format)
        jobs.append((None, _gathered(iter(found), format) if format.gathers else found, 0, format))
    works = [Work(*job, str(folder / f"part-{i:05d}.arrow")) for i, job in enumerate(jobs)]
    if len(works) == 1 or sum(path.stat().st_size for path in files) < SEVERAL_PROCESSES_FROM:
        counts = [convert_part(work) for work in works]
    else:
        _load_pyarrow()
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(min(len(works), os.cpu_count() or 1), context) as pool:
            counts = list(tracked(pool.map(convert_part, works), len(works), f"reading {source.path}"))
    report = describe(Converted(folder, {"files": []}), formats, sum(counts))
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False) + "\n")


def _recognised(rows: list[dict], kind: Kind | None, path: str, source: Source) -> Format:
    try:
        return recognise(rows, kind, path, source.columns)
    except RecursionError:
        raise AlignError(f"{path}: holds values inside values, hundreds of times; expected rows of a few levels.") from None


def _no_row(path: Path) -> NoReturn:
    """Say why not one row of a file can be read."""
    line, row = next((line, row) for part in parts(path, 1) for line, row in rows(part) if isinstance(row, Unreadable))
    raise AlignError(f"{path}:{line}: {row.reason} ({row.detail}), and no row after it can be read either.")


def _parts(path: Path) -> int:
    """Parts of a file: as many as there are processors, and more of a large one, so that a bar shows how far it is."""
    size, cores = path.stat().st_size, os.cpu_count() or 1
    return cores * -(-size // (PART * cores)) if size >= SEVERAL_PROCESSES_FROM else 1


def _gathered(numbered: Iterable[tuple[int, Any]], format: Format) -> list[tuple[int, Any]]:
    """Rows of one key (a tree's messages, a prompt's replies) as one row, at the place of the first. They are held in memory."""
    groups: dict[Any, tuple[int, Any]] = {}
    for line, row in numbered:
        if isinstance(row, Unreadable):
            groups[line, None] = (line, row)
            continue
        try:
            key = group_key(format, row)
        except (Unfit, KeyError, TypeError, AttributeError, RecursionError):
            key = f"\0{line}"  # alone: the converter says what is wrong with it
        group = groups.setdefault(key, (line, Gathered(rows=[], lines=[])))[1]
        group["rows"].append(row)
        group["lines"].append(line)
    return list(groups.values())


def convert_part(work: Work) -> int:
    """Convert some rows into an Arrow file; returns how many rows there were."""
    import pyarrow as pa

    gc.disable()  # millions of small objects without a cycle: collecting costs a seventh of the time
    count = 0
    try:
        with pa.OSFile(work.target, "wb") as sink, pa.ipc.new_stream(sink, schema()) as writer:
            for rows_read, batch in _batches(work):
                count += rows_read
                writer.write_batch(batch)
    finally:
        gc.enable()
    return count


def _batches(work: Work) -> Iterator[tuple[int, Any]]:
    """(rows, their records) of some rows at a time; rows whose columns are plain go the quick way."""
    from align.data.fast import layout_of

    layout = layout_of(work.format) if work.part is not None and work.part.form == "lines" else None
    if work.part is not None and layout is not None:
        for first, block in line_blocks(work.part):
            yield _quick_batch(work, first, block, layout)
        return
    convert, lines, count = converter(work.format), list[tuple](), 0
    for line, row in work.rows if work.rows is not None else rows(work.part):  # type: ignore[arg-type]
        count += len(row["lines"]) if isinstance(row, Gathered) else 1
        lines += _lines(work.file, line, row, convert, work.format.kind)
        if len(lines) >= BATCH:
            yield count, _batch(lines)
            lines, count = [], 0
    yield count, _batch(lines)


def _batch(lines: list[tuple]) -> Any:
    import pyarrow as pa

    columns = zip(zip(*lines, strict=True) if lines else [()] * len(schema()), schema(), strict=True)
    return pa.record_batch([pa.array(values, field.type, size=len(lines)) for values, field in columns], schema())


def _quick_batch(work: Work, first: int, block: bytes, layout: Any) -> tuple[int, Any]:
    """Records of a block of lines: those that are right beyond doubt as they are, the others converted one by one."""
    import numpy as np
    import pyarrow as pa

    from align.data.fast import Lines, check

    block_lines = Lines(block)
    checked = check(block_lines, work.format, layout)
    convert, kind = converter(work.format), work.format.kind
    good = checked.good if checked else np.zeros(len(block_lines), dtype=bool)
    lines, count = list[tuple](), int(good.sum())
    for at in np.flatnonzero(~good).tolist():
        row = json_row(block_lines[at])
        if row is not None:
            count += 1
            lines += _lines(work.file, first + at, row, convert, kind)
    slow = _batch(lines)
    if checked is None or not good.any():
        return count, slow
    constant = {"file": work.file, "reason": None, "detail": None, "raw": True, "probability": 1.0, "margin": 0.0}
    given = {"line": np.arange(first, first + len(good)), "record": block_lines.whole(), **checked.columns}
    arrays = []
    for field in schema():
        if field.name in constant:
            arrays.append(pa.repeat(pa.scalar(constant[field.name], field.type), len(good)))
        else:
            arrays.append(pa.array(given[field.name], field.type))
    quick = pa.record_batch(arrays, schema())
    if good.all():
        return count, quick
    both = pa.Table.from_batches([quick.filter(pa.array(good)), slow]).sort_by("line").combine_chunks()
    return count, both.to_batches()[0]


@cache
def schema() -> Any:
    """Columns of the Arrow files. Hashes are of the record's text; `reason` is null where the record is kept."""
    import pyarrow as pa

    numbers = ("key", "prompt", "digest", "pair")
    return pa.schema(
        [
            ("file", pa.int32()),
            ("line", pa.int64()),
            ("record", pa.binary()),  # JSON; of the row as it is in the file where `raw` is true, else of the record
            ("raw", pa.bool_()),
            ("reason", pa.string()),
            ("detail", pa.string()),
            *((name, pa.int64()) for name in numbers),  # first user turn, whole prompt, whole record, pair whatever side is chosen
            ("characters", pa.int32()),
            ("longer", pa.int32()),  # characters that chosen has more than rejected
            ("probability", pa.float32()),
            ("margin", pa.float32()),
        ]
    )


def _lines(file: int, line: int, row: Any, convert: Any, kind: Kind) -> list[tuple]:
    """The columns of every record that a row gives, or of its refusal."""
    if isinstance(row, Unreadable):
        return [(file, line, row.raw[:RAW_KEPT].encode("utf-8", "replace"), False, row.reason, row.detail, *REFUSED)]
    try:
        records = convert(row)
    except Unfit as error:
        return _refused(file, line, row, error.reason, error.detail)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        return _refused(file, line, row, "does not fit the format", f"{type(error).__name__}: {error}"[:200])
    return [_line(file, line, record, kind) for record in records] or _refused(file, line, row, NO_RECORD, "")


def _refused(file: int, line: int, row: Mapping[str, Any], reason: str, detail: str) -> list[tuple]:
    """The columns of a row that gives no record; of each of its rows where it was gathered."""
    each = zip(row["lines"], row["rows"], strict=True) if isinstance(row, Gathered) else [(line, row)]
    return [(file, at, _raw(one), False, reason, detail, *REFUSED) for at, one in each]


def _line(file: int, line: int, record: dict[str, Any], kind: Kind) -> tuple:
    problem = find_problem(record, kind)
    if problem is None:
        try:
            text = orjson.dumps(record)
            return (file, line, text, False, None, None, *measures(record, text, kind))
        except TypeError as error:  # a lone surrogate in a tool's schema, a number beyond 64 bits
            problem = Problem("not valid Unicode or JSON", str(error))
    return (file, line, _raw(record), False, problem.reason, problem.detail, *REFUSED)


def _raw(row: Any) -> bytes:
    try:
        return json.dumps(row, default=repr)[:RAW_KEPT].encode()
    except RecursionError:
        return b"nested too deeply to be shown"
