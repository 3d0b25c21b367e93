"""Self-describing folders: what a stage made, from what, with what; checked when they are opened. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.base import Base, find_base
from align.errors import AlignError

FORMAT = 1
FACTS = "artifact.json"
NEEDED = ("name", "kind", "identity", "parents", "base", "settings", "model", "metrics", "seconds")
ARCHIVE = "archive"  # where a run keeps artifacts that a changed recipe has replaced


@dataclass(frozen=True)
class Artifact:
    """A finished stage. `facts` is its artifact.json."""

    folder: Path
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """The stage's name in its recipe."""
        return self.facts["name"]

    @property
    def kind(self) -> str:
        """policy, reward_model or evaluation."""
        return self.facts["kind"]

    @property
    def identity(self) -> str:
        """A hash over everything that decided the outcome."""
        return self.facts["identity"]

    @property
    def base(self) -> Base:
        """The base model under it, found again and checked.

        Raises:
            AlignError: where the base is gone or has other bytes than when the artifact was made.
        """
        wanted = self.facts["base"]
        base = find_base(wanted["source"], wanted["revision"])
        if base.identity != wanted["identity"]:
            raise AlignError(
                f"{self.folder}: made on base {wanted['source']!r} with identity {wanted['identity'][:24]}, "
                f"but that base is now {base.identity[:24]}. Give it the base it was made on."
            )
        return base

    def parent(self, role: str) -> Artifact | None:
        """The artifact it was made from, checked to be that one; None where it was the base itself.

        Raises:
            AlignError: where the parent is missing or is another one than recorded.
        """
        wanted = self.facts["parents"].get(role)
        if wanted is None:
            return None
        candidates = [self.folder / wanted["path"]]
        for run in list(self.folder.resolve().parents)[:2]:
            candidates += [run / wanted["name"], run / ARCHIVE / f"{wanted['name']}-{wanted['identity'][:12]}"]
        found = [Artifact.open(folder) for folder in candidates if (folder / FACTS).is_file()]
        for artifact in found:
            if artifact.identity == wanted["identity"]:
                return artifact
        there = f"found only {found[0].name} with identity {found[0].identity[:12]}" if found else "found nothing there"
        raise AlignError(
            f"{self.folder}: its {role} is {wanted['name']!r} with identity {wanted['identity'][:12]}, but {there}. "
            "An adapter works only on the parent it was trained on; run the recipe again to make it on the new one."
        )

    def chain(self) -> list[Artifact]:
        """The policies it is stacked on, first to last, itself included. The first may hold a whole model.

        One whose form is 'composed' holds all adapters below it in its own, and takes their place.
        """
        node: Artifact | None = self
        found: list[Artifact] = []
        composed = False
        while node is not None:
            form = node.facts["model"]["form"]
            if form == "full" or not composed:
                found.insert(0, node)
            composed = composed or form == "composed"
            node = None if form == "full" else node.parent("policy")
        return found

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> Artifact:
        """Open a folder that a stage made.

        Args:
            folder: holds artifact.json.
            verify: compare the hash of every file, not only its size.

        Raises:
            AlignError: where it is no artifact, was made by a newer version, or is damaged.
        """
        path = folder / FACTS
        if not path.is_file():
            raise AlignError(f"{folder}: not an artifact (no {FACTS}). A finished stage's folder has one; see `align show RUN`.")
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            newer = facts["format"] > FORMAT
            files = {name: (described["bytes"], described["sha256"]) for name, described in facts["files"].items()}
            if not newer and (missing := [key for key in NEEDED if key not in facts]):
                raise ValueError(f"no {', '.join(missing)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(folder, f"{FACTS} cannot be read ({error})") from None
        if newer:
            raise AlignError(f"{folder}: made by a newer align (format {facts['format']}; this one reads up to {FORMAT}). Upgrade align.")
        for name, (size, sha256) in files.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size != size:
                found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
                raise _damaged(folder, f"{name}: found {found}, expected {size} bytes")
            if verify and hash_file(file) != sha256:
                raise _damaged(folder, f"{name}: its content has changed since it was published")
        return cls(folder, facts)


def _damaged(folder: Path, why: str) -> AlignError:
    return AlignError(f"{folder}: damaged: {why}.\n  Remove the folder and run the recipe again; other stages are kept: rm -r {folder}")


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity_of(decides: dict[str, Any]) -> str:
    """A hash over a JSON value, the same for the same content."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def publish(work: Path, final: Path, facts: dict[str, Any]) -> Artifact:
    """Describe the working folder and give it its final name in one step. An older artifact there goes to the archive.

    Raises:
        AlignError: where the disk is full. The working folder stays, so a later run goes on from it.
    """
    with full_disk_explained(final):
        facts = {**facts, "files": {p.relative_to(work).as_posix(): _describe(p) for p in files_below(work)}}
        (work / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in files_below(work):
            _flush(path)
        archive(final)
        os.rename(work, final)
        _flush(final.parent)
    return Artifact(final, facts)


def archive(folder: Path) -> None:
    """Move an artifact aside, under its name and identity, so that going back to it costs nothing."""
    if not folder.exists():
        return
    try:
        label = json.loads((folder / FACTS).read_text())["identity"][:12]
    except (OSError, ValueError, KeyError):
        label = f"damaged-{int(folder.stat().st_mtime)}"
    target = folder.parent / ARCHIVE / f"{folder.name}-{label}"
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        target = target.with_name(f"{target.name}-{int(folder.stat().st_mtime_ns)}")
    os.rename(folder, target)


def files_below(folder: Path) -> list[Path]:
    """Every file of a folder but artifact.json itself, in a fixed order."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FACTS]


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


RESUMES = "Nothing that was finished is lost, and the stage goes on from its last checkpoint"


@contextmanager
def full_disk_explained(where: Path, kept: str = RESUMES) -> Iterator[None]:
    """Turn 'no space left' into a message that says what is `kept`. safetensors reports it as text, Python as an errno."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in full or any(f"os error {number}" in str(error) for number in full):
            raise AlignError(f"{where}: the disk is full. {kept}: make room and run the same command again.") from None
        raise
