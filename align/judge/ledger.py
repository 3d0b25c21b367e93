"""Everything judges have said, in one SQLite file: nothing answered is lost, and nothing answered is asked again.

A reply is on its way to the disk when `add` returns: a process that is killed loses none. (A power cut can lose the last moment's.)
Several processes may use one file; who comes second with a reply to the same question keeps the first one's.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from align.errors import AlignError
from align.judge.judgement import Judge, Question, Reply

VERSION = 1
APPLICATION = 0x616C676E  # 'algn', in the header of the file
PATIENCE = 60.0  # seconds to wait for another process that writes
SCHEMA = """
CREATE TABLE judges (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, model TEXT NOT NULL, template TEXT NOT NULL, UNIQUE (name, model, template)
);
CREATE TABLE replies (
    judge INTEGER NOT NULL REFERENCES judges, prompt BLOB NOT NULL, first BLOB NOT NULL, second BLOB NOT NULL,
    said TEXT NOT NULL, raw TEXT NOT NULL, log_odds REAL, logprobs TEXT, score REAL,
    prompt_tokens INTEGER, completion_tokens INTEGER, seconds REAL, price REAL, time REAL NOT NULL,
    PRIMARY KEY (judge, prompt, first, second)
);
"""
FIND = """
SELECT said, raw, log_odds, logprobs, score, prompt_tokens, completion_tokens, seconds, price FROM replies
WHERE judge = ? AND prompt = ? AND first = ? AND second = ?
"""
ADD = f"INSERT OR IGNORE INTO replies VALUES ({', '.join('?' * 14)})"


class Key(NamedTuple):
    """Hashes of what was asked: the prompt with its principle, and each completion in its place (second is empty for a score)."""

    prompt: bytes
    first: bytes
    second: bytes


def key_of(question: Question) -> Key:
    """The question's place in a ledger."""
    second = b"" if question.second is None else _hash(question.second)
    return Key(_hash([question.prompt, question.principle]), _hash(question.first), second)


def _hash(content: object) -> bytes:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


class Ledger:
    """Replies by judge, model, template and question."""

    def __init__(self, path: str | Path):
        """Open the file, or make it.

        Raises:
            AlignError: where it is something else, was written by a newer align, or cannot be written.
        """
        self.path = Path(path)
        self._lock = threading.Lock()  # an endpoint's replies may come from another thread
        self._judges: dict[tuple[str, str, str], int] = {}
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._file.close()
                raise

    def _prepare(self) -> None:
        """Make the tables in a new file, and check an old one."""
        self._file.execute("PRAGMA synchronous = NORMAL")
        (application,), (version,) = (self._file.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
        if application == 0 and not self._file.execute("SELECT 1 FROM sqlite_master").fetchone():
            self._file.execute("PRAGMA journal_mode = WAL")
            with self._writing():
                if not self._file.execute("SELECT 1 FROM sqlite_master").fetchone():  # another process may have been first
                    for statement in (*SCHEMA.split(";\n"), f"PRAGMA user_version = {VERSION}", f"PRAGMA application_id = {APPLICATION}"):
                        self._file.execute(statement)
        elif application != APPLICATION:
            raise AlignError(f"{self.path}: is an SQLite file of something else; expected a ledger of judgements, or no file yet.")
        elif version > VERSION:
            raise AlignError(f"{self.path}: written by a newer align (version {version}; this one reads up to {VERSION}). Upgrade align.")

    def find(self, judge: Judge, keys: Sequence[Key]) -> list[Reply | None]:
        """The reply of this judge, model and template to each question; None where there is none."""
        with self._lock, self._explained():
            number = self._number(judge)
            if number is None:
                return [None] * len(keys)
            found = (self._file.execute(FIND, (number, *key)).fetchone() for key in keys)
            return [row and _reply(row) for row in found]

    def add(self, judge: Judge, replies: Iterable[tuple[Key, Reply]]) -> None:
        """Keep replies to questions, all of them or none."""
        with self._lock, self._explained(), self._writing():
            number = self._number(judge)
            if number is None:
                names = (judge.name, judge.model, judge.template)
                self._file.execute("INSERT INTO judges (name, model, template) VALUES (?, ?, ?)", names)
                number = self._number(judge)
            self._file.executemany(ADD, ((number, *key, *_columns(reply), time.time()) for key, reply in replies))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _number(self, judge: Judge) -> int | None:
        names = (judge.name, judge.model, judge.template)
        if names not in self._judges:
            row = self._file.execute("SELECT id FROM judges WHERE name = ? AND model = ? AND template = ?", names).fetchone()
            if row is None:
                return None
            if self._file.in_transaction:  # it may be rolled back
                return row[0]
            self._judges[names] = row[0]
        return self._judges[names]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        except BaseException:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite and the system say into a message."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            what = str(error)
            if "disk is full" in what or getattr(error, "errno", None) == 28:
                cure = "Every reply before this one is kept. Make room and run the same command again."
            elif "not a database" in what or "malformed" in what or "no such table" in what or "no such column" in what:
                cure = "Expected a ledger of judgements, or no file yet: give another path, or move the file away."
            elif "locked" in what:
                cure = f"Another process has been writing to it for {PATIENCE:.0f} seconds: end that one, then run the same command again."
            else:
                cure = "Expected a file that can be read and written: give a path in a folder where you may write (not on a network drive)."
            raise AlignError(f"ledger {self.path}: {what}. {cure}") from None


def _columns(reply: Reply) -> tuple:
    logprobs = None if reply.logprobs is None else json.dumps(reply.logprobs)
    tokens = (reply.prompt_tokens, reply.completion_tokens)
    raw = reply.raw.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair, as broken servers send, is no text
    return (reply.said, raw, reply.log_odds, logprobs, reply.score, *tokens, reply.seconds, reply.price)


def _reply(row: tuple) -> Reply:
    said, raw, log_odds, logprobs, *rest = row
    return Reply(said, raw, log_odds, logprobs and json.loads(logprobs), *rest)
