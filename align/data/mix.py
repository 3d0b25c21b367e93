"""All sources of one input of a stage, as one sequence of records: duplicates left out, caps and weights applied, split by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from align.artifact import identity_of
from align.data.convert import REVISION, Converted, convert_source
from align.data.report import DUPLICATE, bad_rows, first_of, refuse_if_too_bad
from align.data.sources import Source
from align.records import Kind

ELSEWHERE = "duplicate of another source's record"
CAP = -1  # the seed of caps: no split has it, so what a cap keeps says nothing of what is held out


@dataclass(frozen=True)
class Data:
    """What a stage reads: sources in the order of the recipe, each converted."""

    kind: Kind
    sources: tuple[Source, ...]
    converted: tuple[Converted, ...]

    @cached_property
    def identity(self) -> str:
        """A hash over everything that decides the records: the files' bytes, how they are mapped, caps and weights."""
        each = [
            {**asdict(source), "path": None, "files": [_content(file) for file in converted.report["files"]]}
            for source, converted in zip(self.sources, self.converted, strict=True)
        ]
        return identity_of({"revision": REVISION, "kind": self.kind, "sources": each})

    @cached_property
    def chosen(self) -> np.ndarray:
        """(source, place among its records) of every record that is used, in the order of the sources. Shape (records, 2)."""
        digests = [converted.column("digest") for converted in self.converted]
        places = []
        for number, part in enumerate(np.split(self._first, np.cumsum([len(d) for d in digests])[:-1])):
            at = np.flatnonzero(part)
            cap = self.sources[number].cap
            if cap is not None and len(at) > cap:  # by hash, so that adding rows moves few others
                at = np.sort(at[np.argsort(stirred(digests[number][at], CAP), kind="stable")[:cap]])
            places.append(np.stack([np.full(len(at), number), at], axis=1))
        return np.concatenate(places)

    def __len__(self) -> int:
        """Records that are used."""
        return len(self.chosen)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers over the records that are used. Shape (records,)."""
        parts = [converted.column(name) for converted in self.converted]
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        return np.concatenate(parts)[starts[self.chosen[:, 0]] + self.chosen[:, 1]]

    def records(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The records that are used, one after the other."""
        for source, place in self.chosen[:limit]:
            yield self.converted[source].record(int(place))

    def place(self, index: int) -> str:
        """Where a record came from: file:line."""
        source, at = self.chosen[index]
        table = self.converted[source].table
        return self.converted[source].place(table["file"][int(at)].as_py(), table["line"][int(at)].as_py())

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What artifact.json and the plan say of it."""
        reports = [converted.report for converted in self.converted]
        rejected: dict[str, int] = {}
        for report in reports:
            for reason, count in report["rejected"].items():
                rejected[reason] = rejected.get(reason, 0) + count
        kept = [int(n) for n in np.bincount(self.chosen[:, 0], minlength=len(reports))]
        across = sum(report["records"] for report in reports) - len(self) - self._capped
        if across:
            rejected[ELSEWHERE] = across
        facts: dict[str, Any] = {
            "sha256": self.identity,
            "path": ", ".join(source.path for source in self.sources),
            "format": ", ".join(dict.fromkeys(report["format"] for report in reports)),
            "rows": sum(report["rows"] for report in reports),
            "records": len(self),
            "rejected": rejected,
            "bytes": sum(file["bytes"] for report in reports for file in report["files"]),
            "sources": [
                {
                    "path": source.path,
                    "files": report["files"],
                    "format": report["format"],
                    "rows": report["rows"],
                    "records": number,
                    "weight": source.weight,
                }
                for source, report, number in zip(self.sources, reports, kept, strict=True)
            ],
        }
        if self.kind == "preference" and len(reports) == 1:
            facts["pairs"] = reports[0]["pairs"]
        return facts

    @property
    def _capped(self) -> int:
        """Records left out by caps."""
        return int(self._first.sum()) - len(self)

    def weights(self) -> np.ndarray:
        """How often each used record counts in an epoch: its source's weight. Shape (records,)."""
        return np.array([source.weight for source in self.sources])[self.chosen[:, 0]]

    def refuse_if_too_bad(self, max_bad_rows: float, where: str) -> None:
        """Stop where more than that share of a source's rows is bad. See `align.data.report.refuse_if_too_bad`."""
        for converted in self.converted:
            refuse_if_too_bad(converted.report, max_bad_rows, where, where.partition(".")[0])

    def rejected(self) -> Iterator[dict[str, Any]]:
        """Every record that was refused or left out as a duplicate: where, reason, detail and the beginning of the row."""
        first = np.split(self._first, np.cumsum([len(converted.table) for converted in self.converted])[:-1])
        for converted, used in zip(self.converted, first, strict=True):
            own = first_of(converted.column("digest"), _kept(converted))
            for at in np.flatnonzero(~used).tolist():
                row = {name: converted.table[name][at].as_py() for name in ("file", "line", "reason", "detail", "record")}
                yield {
                    "where": converted.place(row["file"], row["line"]),
                    "reason": row["reason"] or (ELSEWHERE if own[at] else DUPLICATE),
                    "detail": row["detail"] or "",
                    "row": row["record"].decode("utf-8", "replace").rstrip("\n"),  # a line as it was read
                }

    @cached_property
    def _first(self) -> np.ndarray:
        """True where a record was not refused and repeats no earlier one, over all sources. Shape (records of all,)."""
        kept = np.concatenate([_kept(converted) for converted in self.converted])
        if len(self.converted) == 1 and DUPLICATE not in self.converted[0].report["rejected"]:
            return kept
        return first_of(np.concatenate([converted.column("digest") for converted in self.converted]), kept)

    @property
    def bad(self) -> int:
        """Refused records that something is wrong with."""
        return sum(bad_rows(converted.report) for converted in self.converted)


def load_data(sources: Sequence[Source], kind: Kind, where: str) -> Data:
    """Convert every source that is not converted yet.

    Raises:
        AlignError: see `align.data.convert.convert_source`.
    """
    return Data(kind, tuple(sources), tuple(convert_source(source, kind, where) for source in sources))


def _content(file: dict[str, Any]) -> str:
    """A file's bytes and how they are read, or the hub data set's name."""
    return f"{file['sha256']}{''.join(Path(file['path']).suffixes[-2:])}" if file["sha256"] else file["path"]


def _kept(converted: Converted) -> np.ndarray:
    """True where a record was not refused."""
    import pyarrow.compute as pc

    return pc.is_null(converted.table["reason"]).to_numpy()


def stirred(hashes: np.ndarray, seed: int) -> np.ndarray:
    """The hashes with a seed in them, as uniform unsigned 64-bit numbers (splitmix64, Steele et al. 2014). Shape like `hashes`."""
    salt = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big")
    with np.errstate(over="ignore"):
        z = hashes.astype(np.uint64) + np.uint64(salt)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def is_heldout(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which prompts belong to the held-out share: by their hash, so adding rows moves no other row. Shape like `keys`."""
    return stirred(keys, seed) < np.uint64(share * 2**64) if share < 1 else np.ones(len(keys), dtype=bool)


def times_in_epoch(weights: np.ndarray, digests: np.ndarray, seed: int) -> np.ndarray:
    """How many times each record is shown in an epoch: its weight, a fraction of a time decided by its hash. Shape (records,)."""
    whole = np.floor(weights)
    fraction = stirred(digests, seed + 1).astype(np.float64) / 2**64 < weights - whole
    return whole.astype(np.int64) + fraction
