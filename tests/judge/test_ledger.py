import json
import multiprocessing
import os
import signal
import sqlite3
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import AlignError
from align.judge import ledger as ledgers
from align.judge.judgement import Question, Reply
from align.judge.ledger import Key, Ledger, key_of

JUDGE = SimpleNamespace(name="local embedded", model="gguf:1", template="t1")
FULL = Reply("first", "A", 1.5, {"A": -0.1, "B": -1.6}, None, 120, 1, 0.25, 0.001)


def turn(text, role="assistant"):
    return [{"role": role, "content": text}]


def question(prompt="p", first="a", second="b", principle=None):
    return Question(turn(prompt, "user"), turn(first), None if second is None else turn(second), principle)


def key(number):
    return key_of(question(first=str(number)))


def test_a_reply_comes_back_as_it_was(tmp_path):
    bare = Reply("unparsed", "Both.\n\x00 'x' é")
    scored = Reply("tie", "7", score=6.75)
    keys = [key(i) for i in range(4)]
    ledger = Ledger(tmp_path / "deep" / "l.sqlite")
    ledger.add(JUDGE, zip(keys, [FULL, bare, scored], strict=False))
    assert ledger.find(JUDGE, keys) == [FULL, bare, scored, None]
    ledger.close()
    assert Ledger(tmp_path / "deep" / "l.sqlite").find(JUDGE, keys[::-1]) == [None, scored, bare, FULL]


def test_half_a_character_is_kept_as_its_number(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(JUDGE, [(key("\ud800"), Reply("first", "A\ud800"))])
    assert ledger.find(JUDGE, [key("\ud800")])[0].raw == "A\\ud800"


def test_each_part_of_what_was_asked_makes_another_key():
    asked = [question(), question("P"), question(first="A"), question(second="B"), question(principle="x"), question(second=None)]
    asked += [question(first="b", second="a"), question(second=""), Question(turn("p", "system"), turn("a"), turn("b"))]
    assert len({key_of(q) for q in asked}) == len(asked)
    assert key_of(question()) == key_of(question())


@given(st.text(), st.text())
def test_keys_are_of_content_alone(first, second):
    assert (key_of(question(first=first)) == key_of(question(first=second))) == (first == second)


@pytest.mark.parametrize("part", ["name", "model", "template"])
def test_another_judge_model_or_template_knows_nothing(tmp_path, part):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(JUDGE, [(key(1), FULL)])
    other = SimpleNamespace(**{**vars(JUDGE), part: "another"})
    assert ledger.find(other, [key(1)]) == [None]
    ledger.add(other, [(key(1), Reply("second", "B"))])
    assert [ledger.find(judge, [key(1)])[0].said for judge in (JUDGE, other)] == ["first", "second"]


def test_the_first_reply_to_a_question_stays(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(JUDGE, [(key(1), FULL)])
    ledger.add(JUDGE, [(key(1), Reply("second", "B")), (key(2), Reply("tie", "C"))])
    assert [reply.said for reply in ledger.find(JUDGE, [key(1), key(2)])] == ["first", "tie"]


def test_replies_that_cannot_be_added_leave_nothing_behind(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    with pytest.raises(AlignError):
        ledger.add(JUDGE, [(key(1), FULL), (key(2), Reply(object(), "x"))])
    assert ledger.find(JUDGE, [key(1)]) == [None]
    ledger.add(JUDGE, [(key(1), FULL)])
    assert Ledger(tmp_path / "l.sqlite").find(JUDGE, [key(1)]) == [FULL]


def test_a_row_can_be_read_by_anyone(tmp_path):
    Ledger(tmp_path / "l.sqlite").add(JUDGE, [(key(1), FULL)])
    rows = sqlite3.connect(tmp_path / "l.sqlite").execute(
        "SELECT name, model, template, said, raw, logprobs, price, time FROM replies JOIN judges ON judges.id = replies.judge"
    )
    *facts, logprobs, price, when = rows.fetchone()
    assert facts == ["local embedded", "gguf:1", "t1", "first", "A"]
    assert (json.loads(logprobs), price) == (FULL.logprobs, 0.001)
    assert 0 <= time.time() - when < 60


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path):
    text, other = tmp_path / "labels.jsonl", tmp_path / "other.sqlite"
    text.write_text("{}\n" * 500)
    database = sqlite3.connect(other)
    database.execute("CREATE TABLE replies (x)")
    database.commit()
    database.close()
    before = text.read_bytes(), other.read_bytes()
    with pytest.raises(AlignError, match=r"labels.jsonl: file is not a database. Expected a ledger of judgements, or no file yet"):
        Ledger(text)
    with pytest.raises(AlignError, match=r"other.sqlite: is an SQLite file of something else; expected a ledger"):
        Ledger(other)
    assert (text.read_bytes(), other.read_bytes()) == before


def test_a_ledger_of_a_newer_version_is_refused(tmp_path):
    Ledger(tmp_path / "l.sqlite").close()
    sqlite3.connect(tmp_path / "l.sqlite").execute("PRAGMA user_version = 7")
    with pytest.raises(AlignError, match=r"written by a newer align \(version 7; this one reads up to 1\). Upgrade align."):
        Ledger(tmp_path / "l.sqlite")


def test_a_damaged_ledger_is_refused(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.add(JUDGE, [(key(i), Reply("first", "A" * 500)) for i in range(200)])
    ledger.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(AlignError, match=r"l.sqlite: .*malformed"):
        Ledger(path).find(JUDGE, [key(i) for i in range(200)])


@pytest.mark.parametrize("path", ["/proc/align/l.sqlite", "/dev/null/l.sqlite", "/"])
def test_a_place_that_cannot_be_written_is_refused(path):
    with pytest.raises(AlignError, match=r"ledger /.*: .* Expected a file that can be read and written: give a path in a folder"):
        Ledger(path)


def test_a_full_disk_loses_nothing_that_was_kept(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(JUDGE, [(key(1), FULL)])
    pages = ledger._file.execute("PRAGMA page_count").fetchone()[0]
    ledger._file.execute(f"PRAGMA max_page_count = {pages}")  # SQLite says then what it says on a full disk
    with pytest.raises(AlignError, match=r"disk is full. Every reply before this one is kept. Make room and run the same command again."):
        ledger.add(JUDGE, [(key(2), Reply("first", "A" * 100_000))])
    assert Ledger(tmp_path / "l.sqlite").find(JUDGE, [key(1), key(2)]) == [FULL, None]


def test_a_process_that_never_stops_writing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ledgers, "PATIENCE", 0.1)
    ledger = Ledger(tmp_path / "l.sqlite")
    other = sqlite3.connect(tmp_path / "l.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(AlignError, match="locked. Another process has been writing to it for 0 seconds: end that one"):
        ledger.add(JUDGE, [(key(1), FULL)])
    other.execute("ROLLBACK")
    ledger.add(JUDGE, [(key(1), FULL)])


def _fill(path, first, count, told):
    ledger = Ledger(path)
    for number in range(first, first + count):
        ledger.add(JUDGE, [(key(number), Reply("first", str(number)))])
        told.send(number)
    ledger.close()


_context = multiprocessing.get_context("spawn")


def _start(*arguments):
    receive, send = _context.Pipe(duplex=False)
    process = _context.Process(target=_fill, args=(*arguments, send))
    process.start()
    send.close()
    return process, receive


def _drain(pipe):
    numbers = []
    while True:
        try:
            numbers.append(pipe.recv())
        except EOFError:
            return numbers


def test_several_processes_make_and_share_one_ledger(tmp_path):
    path = tmp_path / "l.sqlite"
    started = [_start(path, first, 100) for first in (0, 50, 100)]  # the second half of one is the first half of the next
    for process, pipe in started:
        assert len(_drain(pipe)) == 100
        process.join()
        assert process.exitcode == 0
    found = Ledger(path).find(JUDGE, [key(number) for number in range(201)])
    assert [reply and reply.raw for reply in found] == [*map(str, range(200)), None]


def test_a_killed_process_loses_no_reply(tmp_path):
    path = tmp_path / "l.sqlite"
    process, pipe = _start(path, 0, 1_000_000)
    told = [pipe.recv() for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    told += _drain(pipe)
    process.join()
    found = Ledger(path).find(JUDGE, [key(number) for number in told])
    assert [reply and reply.raw for reply in found] == list(map(str, told))


def test_a_key_is_short():
    assert [len(part) for part in key_of(question())] == [16, 16, 16]
    assert key_of(question(second=None)).second == b""
    assert isinstance(key_of(question()), Key)
