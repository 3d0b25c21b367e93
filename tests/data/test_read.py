"""From files to raw rows: every form, every packing, every way to be damaged."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from align.data import read_bytes, read_json
from align.data.read import Unreadable, first_rows, parts, rows
from align.errors import AlignError

ROWS = [{"prompt": 'Hi, "you"', "completion": "zwei\nZeilen ü"}, {"prompt": "b", "completion": ""}, {"prompt": "c", "completion": "🙂"}]


def zstd(data):
    import pyarrow

    return pyarrow.compress(data, "zstd", asbytes=True)


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


def jsonl(items):
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


def delimited(items, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, items[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(items)
    return text.getvalue().encode()


def parquet(items, **options):
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), sink, **options)
    return sink.getvalue()


@pytest.fixture
def file(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


def all_rows(path, count=1):
    return [row for part in parts(path, count) for row in rows(part)]


def only_rows(path):
    return [row for _, row in all_rows(path)]


# Forms and packings ---------------------------------------------------------------------------------------------------

FORMS = {
    ".jsonl": jsonl(ROWS),
    ".ndjson": jsonl(ROWS),
    ".json": json.dumps(ROWS).encode(),
    ".csv": delimited(ROWS),
    ".tsv": delimited(ROWS, "\t"),
    ".parquet": parquet(ROWS),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", FORMS)
def test_every_suffix_and_packing_gives_the_same_rows(file, suffix, packing):
    path = file(f"a{suffix}{packing}", PACK[packing](FORMS[suffix]))
    assert only_rows(path) == ROWS
    assert first_rows(path, 2) == ROWS[:2]


@pytest.mark.parametrize("packing", PACK)
def test_text(file, packing):
    path = file(f"a.txt{packing}", PACK[packing]("\ufeffone\r\n\n  \ntwo\u2028still two\n three".encode()))
    assert all_rows(path) == [(1, {"text": "one"}), (4, {"text": "two\u2028still two"}), (5, {"text": " three"})]


@pytest.mark.parametrize("packing", [name for name in PACK if name])
def test_packed_content_needs_no_suffix(file, packing):
    assert only_rows(file("a.jsonl", PACK[packing](jsonl(ROWS)))) == ROWS


def test_several_gzip_members_are_one_file(file):
    assert only_rows(file("a.jsonl.gz", gzip.compress(jsonl(ROWS[:1])) + gzip.compress(jsonl(ROWS[1:])))) == ROWS


def test_parquet_content_needs_no_suffix(file):
    assert only_rows(file("a.json", parquet(ROWS))) == ROWS


JSON = {
    "list": (json.dumps(ROWS), ROWS),
    "indented list": (json.dumps(ROWS, indent=2), ROWS),
    "list with a mark": ("\ufeff \n" + json.dumps(ROWS), ROWS),
    "one object a line": (jsonl(ROWS).decode(), ROWS),
    "one object a line, blank lines": ("\n\n" + jsonl(ROWS).decode().replace("\n", "\n\n"), ROWS),
    "one row": (json.dumps(ROWS[0]), ROWS[:1]),
    "one indented row": (json.dumps(ROWS[0], indent=2), ROWS[:1]),
    "indented objects": ("\n".join(json.dumps(row, indent=2) for row in ROWS), ROWS),
    "under a name": (json.dumps({"data": ROWS}), ROWS),
    "under a name, beside others": (json.dumps({"version": 1, "tags": ["a"], "data": ROWS, "info": {"x": 1}}, indent=1), ROWS),
    "keyed by id": (json.dumps({"a": ROWS[0], "b": {"id": 7, **ROWS[1]}}), [{"id": "a", **ROWS[0]}, {"id": 7, **ROWS[1]}]),
    "pandas columns": (json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}), ROWS),
    "columns": (json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}), ROWS),
    "columns of messages": (
        json.dumps({"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}),
        [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}],
    ),
    "one conversation": (
        json.dumps({"id": 1, "messages": [{"role": "user", "content": "a"}]}),
        [{"id": 1, "messages": [{"role": "user", "content": "a"}]}],
    ),
    "one preference": (
        json.dumps({"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}),
        [{"chosen": [{"from": "gpt", "value": "a"}], "rejected": [{"from": "gpt", "value": "b"}]}],
    ),
    "one seed task": (
        json.dumps({"instruction": "x", "instances": [{"input": "", "output": "y"}]}),
        [{"instruction": "x", "instances": [{"input": "", "output": "y"}]}],
    ),
    "one row of messages": (
        json.dumps({"prompt": {"role": "user", "content": "a"}, "completion": {"role": "assistant", "content": "b"}}),
        [{"prompt": {"role": "user", "content": "a"}, "completion": {"role": "assistant", "content": "b"}}],
    ),
}


@pytest.mark.parametrize(("text", "expected"), JSON.values(), ids=JSON)
def test_every_shape_of_json(file, text, expected):
    assert only_rows(file("a.json", text)) == expected


@pytest.mark.parametrize("shape", ["list", "indented list", "one indented row", "indented objects"])
def test_a_list_or_objects_over_several_lines_named_jsonl(file, shape):
    text, expected = JSON[shape]
    assert only_rows(file("a.jsonl", text)) == expected


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_that_of_the_header(file, delimiter):
    assert only_rows(file("a.csv", delimited(ROWS, delimiter))) == ROWS


def test_csv_cells_stay_text_and_rows_have_their_first_line(file):
    text = '\ufeff\n"a, b",n\r\nx,1\r\n"two\r\nlines",\r\n\r\n   \r\n"say ""hi""",nan\r\n'
    expected = [(3, {"a, b": "x", "n": "1"}), (4, {"a, b": "two\r\nlines", "n": ""}), (8, {"a, b": 'say "hi"', "n": "nan"})]
    assert all_rows(file("a.csv", text)) == expected


def test_the_row_numbers_that_pandas_saves_are_a_column(file):
    assert only_rows(file("a.csv", ",prompt\n0,x\n1,y\n")) == [{"index": "0", "prompt": "x"}, {"index": "1", "prompt": "y"}]


def test_a_csv_cell_of_more_than_the_usual_limit(file):
    assert only_rows(file("a.csv", "a\n" + "x" * 200_000))[0]["a"] == "x" * 200_000


def test_jsonl_reads_what_others_refuse_and_keeps_line_numbers(file):
    lines = [
        "\ufeff" + '{"a": NaN}',
        "",
        '{"a": [null, {"b": null}], "c": 5}',
        '  {"a": "\\ud800"}\r',
        "",
        '{"a": 12345678901234567890123}',
    ]
    found = all_rows(file("a.jsonl", "\n".join(lines)))
    assert [number for number, _ in found] == [1, 3, 4, 6]
    assert found[0][1]["a"] != found[0][1]["a"], "NaN"
    assert [row for _, row in found[1:]] == [{"a": [None, {"b": None}], "c": 5}, {"a": "\ud800"}, {"a": 1.2345678901234568e22}]


def test_first_rows_skip_what_cannot_be_read(file):
    assert first_rows(file("a.jsonl", "oops\n" + '{"a": 1}\n' * 5), 2) == [{"a": 1}, {"a": 1}]
    assert first_rows(file("b.jsonl", "oops\n" * 5), 2) == []


# Rows that cannot be read ---------------------------------------------------------------------------------------------

BAD_ROWS = {
    "half a line": (
        "a.jsonl",
        b'{"a": 1}\n{"a": "x\n{"a": 2}\n',
        2,
        "not JSON",
        "Invalid control character|Unterminated string",
    ),
    "cut off at the end": ("a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": 3, "b', 3, "not JSON", "Unterminated string starting at at column 10"),
    "two objects": ("a.jsonl", b'{"a": 1}\n{"a": 1}{"b": 1}\n', 2, "not JSON", "Extra data at column 9"),
    "NUL": ("a.jsonl", b'{"a": 1}' + b" " * 2000 + b"\n\0\0\0\0\n", 2, "not JSON", "it holds NUL bytes, as after a crash"),
    "huge number": ("a.jsonl", b'{"a": 1}\n{"a": NaN, "b": ' + b"1" * 5000 + b"}\n", 2, "not JSON", "digits"),
    "a list": ("a.jsonl", b'{"a": 1}\n["x"]\n', 2, "not an object", "a list; expected {...}"),
    "a text": ("a.jsonl", b'{"a": 1}\n"x"\n', 2, "not an object", "a text; expected {...}"),
    "a number": ("a.jsonl", b'{"a": 1}\n1\n', 2, "not an object", "a number; expected {...}"),
    "null": ("a.jsonl", b'{"a": 1}\nnull\n', 2, "not an object", "null; expected {...}"),
    "deep": ("a.jsonl", b'{"a": 1}\n' + b'{"a":' * 5000 + b"1" + b"}" * 5000, 2, "nested too deeply", "hundreds of times"),
    "Latin-1 line": ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', 2, "not UTF-8 text", r"invalid continuation byte at byte 11 (b'\xe9')"),
    "Latin-1 in a list": ("a.json", b'[{"a": 1},\n{"a": "caf\xe9"},\n{"a": 3}]', 2, "not UTF-8 text", r"at byte 11 (b'\xe9')"),
    "number in a list": ("a.json", b'[{"a": 1}, 2, {"a": 3}]', 2, "not an object", "a number; expected {...}"),
    "number under a name": ("a.json", b'{"data": [{"a": 1}, 2]}', 2, "not an object", "a number; expected {...}"),
    "few cells": ("a.csv", b"a,b\n1,2\n3\n4,5\n", 3, "wrong number of columns", "1 cell; the header has 2"),
    "many cells": ("a.csv", b"a,b\n1,2\n3,4,5\n", 3, "wrong number of columns", "3 cells; the header has 2"),
    "Latin-1 cell": ("a.csv", b'a,b\n"x\ny",2\ncaf\xe9,5\n', 4, "not UTF-8 text", r"invalid continuation byte at byte 4 (b'\xe9')"),
    "broken quotes": ("a.csv", b'a,b\n1,2\n"x" y,2\n3,4\n', 3, "broken quotes", "expected after '\"'; a quote inside a quoted cell is"),
    "broken quotes over lines": ("a.csv", b'a,b\n1,"2\n3,"4"\n5,6\n', 2, "broken quotes", "up to line 3: ',' expected after"),
    "Latin-1 text": ("a.txt", b"one\ncaf\xe9\n", 2, "not UTF-8 text", "at byte 4"),
    "NUL in text": ("a.txt", b"x" * 2000 + b"\n\0\0\n", 2, "not UTF-8 text", "NUL bytes"),
}


@pytest.mark.parametrize(("name", "data", "number", "reason", "detail"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_stands_in_its_place(file, name, data, number, reason, detail):
    found = all_rows(file(name, data))
    [(place, bad)] = [(place, row) for place, row in found if isinstance(row, Unreadable)]
    assert (place, bad.reason) == (number, reason)
    assert any(text in bad.detail for text in detail.split("|"))
    assert all(isinstance(row, dict) for _, row in found if row is not bad), "the others are read"
    json.dumps(bad.raw, ensure_ascii=False).encode()
    assert len(bad.raw) <= 1000


def test_the_raw_text_shows_bytes_that_are_none(file):
    found = all_rows(file("a.csv", b"a,b\ncaf\xe9,5,6\n"))
    assert found == [
        (2, Unreadable("not UTF-8 text", "invalid continuation byte at byte 4 (b'\\xe9'); save the file as UTF-8", "caf\\xe9,5,6"))
    ]


def test_a_parquet_text_that_is_not_unicode(file):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([b"a", b"caf\xe9", b"c"]).view(pyarrow.utf8())
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), sink)
    one, two, three = only_rows(file("a.parquet", sink.getvalue()))
    assert (one, two.reason, three) == ({"a": "a"}, "not UTF-8 text", {"a": "c"})


# Files that cannot be read --------------------------------------------------------------------------------------------

MANY = jsonl([{"a": str(i) * 20, "i": i} for i in range(20_000)])
TABLE = parquet(ROWS)
BAD_FILES = {
    "empty": ("a.jsonl", b"", "a.jsonl: the file is empty; expected rows."),
    "blank": ("a.jsonl", b"\n  \n\t\n", "a.jsonl: the file holds no rows, only blank lines; expected at least one."),
    "empty gzip": ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz: the file holds no rows"),
    "empty list": ("a.json", b"[ ]", "a.json: the file holds no rows; expected at least one."),
    "empty object": ("a.json", b"{}", "a.json: the file holds no rows; expected at least one."),
    "header only": ("a.csv", b"a,b\n", "a.csv: the file holds no rows; expected at least one."),
    "empty table": ("a.parquet", parquet(ROWS[:0]), "a.parquet: the file holds no rows; expected at least one."),
    "gzip cut off": (
        "a.jsonl.gz",
        gzip.compress(MANY)[:-3000],
        r"a.jsonl.gz: the gzip data ends or breaks after \d[\d,]* bytes of content \(the file is cut off\)",
    ),
    "gzip trailer cut off": ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-3], "a.jsonl.gz: the gzip data ends or breaks after"),
    "gzip head only": (
        "a.jsonl.gz",
        gzip.compress(MANY)[:12],
        r"a.jsonl.gz: the gzip data ends or breaks after 0 bytes of content \(the file is cut off\)",
    ),
    "gzip damaged": (
        "a.jsonl.gz",
        gzip.compress(MANY)[:5000] + bytes(100) + gzip.compress(MANY)[5100:],
        r"the gzip data .* \(the file is damaged: ",
    ),
    "gzip in a list": ("a.json.gz", gzip.compress(json.dumps(ROWS * 9999).encode())[:-500], r"the gzip data .* \(the file is cut off\)"),
    "gzip in a table": ("a.csv.gz", gzip.compress(b"a\n" + MANY)[:-500], r"the gzip data .* \(the file is cut off\)"),
    "zstd cut off": ("a.jsonl.zst", zstd(MANY)[:-300], r"a.jsonl.zst: the zstd data ends or breaks after .* \(the file is cut off\)"),
    "bz2 cut off": ("a.jsonl.bz2", bz2.compress(MANY)[:-300], r"a.jsonl.bz2: the bz2 data ends or breaks after .* \(the file is cut off\)"),
    "xz cut off": ("a.jsonl.xz", lzma.compress(MANY)[:-300], r"a.jsonl.xz: the xz data ends or breaks after .* \(the file is cut off\)"),
    "not gzip": (
        "a.jsonl.gz",
        jsonl(ROWS),
        r"a.jsonl.gz: holds content that begins b'\{\"prompt'; expected gzip, as its name says. Rename it",
    ),
    "zstd called gzip": ("a.jsonl.gz", zstd(jsonl(ROWS)), "a.jsonl.gz: holds zstd data; expected gzip, as its name says"),
    "unknown suffix": ("a.xlsx", b"PK", "a.xlsx: the suffix is '.xlsx'; expected one of .json, .jsonl"),
    "not parquet": ("a.parquet", jsonl(ROWS), r"a.parquet: is no Parquet file; it begins b'\{"),
    "parquet cut off": ("a.parquet", TABLE[:-20], "a.parquet: the Parquet file is damaged or cut off"),
    "parquet page damaged": ("a.parquet", TABLE[:30] + b"\xff" * 60 + TABLE[90:], "a.parquet: the Parquet file is damaged or cut off"),
    "packed parquet cut off": ("a.parquet.gz", gzip.compress(TABLE[:-20]), "a.parquet.gz: the Parquet file is damaged or cut off"),
    "UTF-16": ("a.jsonl", '{"a": "x"}\n'.encode("utf-16"), "a.jsonl: is UTF-16 text; expected UTF-8. Save it as UTF-8: iconv -f UTF-16"),
    "UTF-16 without a mark": ("a.csv", "a,b\n1,2\n".encode("utf-16-be"), "a.csv: is UTF-16 text; expected UTF-8"),
    "UTF-16 list": ("a.json", json.dumps(ROWS).encode("utf-16-le"), "a.json: is UTF-16 text; expected UTF-8"),
    "NUL bytes": ("a.txt", bytes(5000), "a.txt: holds nothing but NUL bytes, as after a crash; expected text in UTF-8"),
    "binary": ("a.csv", b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(range(256)) * 9, "a.csv: holds binary data .* expected text in UTF-8"),
    "web page": ("a.json", b"\n<!DOCTYPE html>\n<html>", "a.json: is a web page .* download the raw file"),
    "web page without doctype": ("a.csv", b"<html><body>", "a.csv: is a web page"),
    "LFS": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid",
        "a.parquet: is a pointer of Git LFS, not the data; .* git lfs pull",
    ),
    "texts": (
        "a.json",
        b'["x", "y"]',
        r"(?s)a.json:1: the list holds a text \(\"x\"\); expected objects, one a row.*one text a line in a .txt",
    ),
    "lists": ("a.json", b'[\n[{"role": 1}]]', r'(?s)a.json:2: the list holds a list .* Give each a name, such as \{"messages"'),
    "numbers": ("a.json", b"[1, 2]", r"(?s)a.json:1: the list holds a number \(1\); .*object with named columns"),
    "a text alone": ("a.json", b'"hello"', r"a.json: begins '\"hello\"'; expected a JSON list of objects, an object, or one object a line"),
    "half a list": ("a.json", b'[{"a": 1},\n{"a": 2},\n{"a": "x', "a.json:3: the file ends in the middle of a value .*cut off"),
    "list without bracket": (
        "a.json",
        b'[{"a": 1},\n{"a": 2}\n',
        "a.json:3: the list ends after row 2 without its closing bracket; it was cut off",
    ),
    "list ends at a comma": ("a.json", b'[{"a": 1},\n', "a.json:2: the file ends in the middle of a value"),
    "bracket only": ("a.json", b"[", "a.json:1: the file ends in the middle of a value"),
    "list without comma": ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json:2: '{' follows row 1; expected a comma or a bracket"),
    "comma too many": ("a.json", b'[{"a": 1},\n]', r"a.json:2: not JSON \(a comma before the closing bracket, after row 1\)"),
    "two lists": ("a.json", b'[{"a": 1}]{"b": 1}', "a.json:1: '{' follows the list; expected the end of the file"),
    "broken list": (
        "a.json",
        b'[{"a": 1},\n {"a" 2},\n' + b'{"a": 3},' * 300_000,
        r"a.json:2: not JSON \(Expecting ':' delimiter at column 7, found '2\},",
    ),
    "huge number in a list": ("a.json", b'[{"a": ' + b"1" * 5000 + b"}]", r"a.json:1: cannot be read \(Exceeds the limit"),
    "deep list": ("a.json", b"[" * 100_000, "a.json:1: is nested too deeply; expected rows of a few levels"),
    "deep object": ("a.json", b'{"a":' * 100_000, "a.json:1: is nested too deeply"),
    "half an object": ("a.json", b'{\n"a": {"b": 1},\n', "a.json:3: the file ends in the middle of a value"),
    "Latin-1 object": ("a.json", b'{\n"a": {"b": "caf\xe9"}}', "a.json: not UTF-8 text at line 2 of the object"),
    "objects and more": ("a.json", b'{\n"a": 1}\n{"a": 2}\n]', r"a.json:4: '\]' follows object 2; expected another object"),
    "two lists in an object": (
        "a.json",
        b'{"train": [{"a": 1}], "test": [{"a": 2}]}',
        r"a.json: the object holds several lists of objects \('train', 'test'\)",
    ),
    "uneven columns": ("a.json", b'{"a": [1, 2], "b": [3]}', r"a.json: the object's columns have different lengths \('a' 2, 'b' 1\)"),
    "quote never closed": (
        "a.csv",
        b'a,b\n1,2\n"3,4\n5,6\n',
        "a.csv:3: a quote that opens in this row is never closed; everything after it would be lost",
    ),
    "broken header": ("a.csv", b'"a"x,b\n1,2\n', "a.csv:1: the header cannot be read"),
    "header twice": ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: the header names 'a' twice; expected names that differ"),
    "header with a gap": ("a.csv", b"a,,b\n1,2,3\n", "a.csv:1: column 2 of the header has no name .* name it"),
    "Latin-1 header": ("a.csv", b"caf\xe9,b\n1,2\n", "a.csv:1: the header is not UTF-8 text"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_error_with_the_place(file, name, data, message):
    path = file(name, data)
    with pytest.raises(AlignError, match=message) as error:
        all_rows(path, count=3)
    assert str(error.value).startswith(str(path))


def test_a_table_with_a_name_twice(file):
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"]), sink)
    with pytest.raises(AlignError, match=r"a.parquet: has the columns 'a' twice; expected names that differ"):
        all_rows(file("a.parquet", sink.getvalue()))


def test_rows_before_the_damage_are_given(file):
    found = rows(parts(file("a.jsonl.gz", gzip.compress(MANY * 2, 1)[:-3000]), 1)[0])
    assert len(list(itertools.islice(found, 20_000))) == 20_000
    with pytest.raises(AlignError, match="cut off"):
        list(found)


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, message in {
        "folder.jsonl": "is a folder; expected a file",
        "none.jsonl": "there is no such file; expected one",
        "loop.jsonl": r"cannot be opened \(Too many levels of symbolic links\)",
    }.items():
        with pytest.raises(AlignError, match=f"{name}: {message}"):
            parts(tmp_path / name, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(file):
    path = file("a.jsonl", jsonl(ROWS))
    path.chmod(0)
    with pytest.raises(AlignError, match=r"a.jsonl: cannot be opened \(Permission denied\)"):
        parts(path, 1)


def test_a_disk_that_fails(file, monkeypatch):
    path = file("a.jsonl", jsonl(ROWS))
    [part] = parts(path, 1)

    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(read_bytes, "open_file", lambda path: Failing())
    with pytest.raises(AlignError, match=r"a.jsonl: cannot be read after 0 bytes of content \(.*Input/output error\); check the disk"):
        list(rows(part))


def test_limits(file, monkeypatch):
    monkeypatch.setattr(read_bytes, "LONGEST_ROW", 3 * read_bytes.MB)
    monkeypatch.setattr(read_json, "LARGEST_OBJECT", 3 * read_bytes.MB)
    long = "x" * (5 * read_bytes.MB)
    for name, text, message in [
        ("a.jsonl", '{"a": 1}\n{"a": "' + long + '"}\n', "a.jsonl: line 2 is longer than 3 MB; expected a row"),
        ("a.txt", "one\ntwo\n" + long, "a.txt: line 3 is longer than 3 MB"),
        ("a.json", '[{"a": 1},\n{"a": "' + long + '"}]', "a.json:2: one row is larger than 3 MB"),
        (
            "b.json",
            '{"data":\n[{"a": "' + long + '"}]}',
            "b.json:1: the file is one JSON object of more than 3 MB; only a list or one object a line",
        ),
        ("c.json", '{\n"a": 1}\n{"a":\n"' + long + '"}', "c.json:3: one row is larger than 3 MB"),
        ("a.csv", 'a,b\n1,"' + "x\n" * (2 * read_bytes.MB), "a.csv:2: a quote that opens in this row is never closed"),
        ("b.csv", "a,b\n1," + long, "b.csv: a line is longer than 3 MB"),
    ]:
        with pytest.raises(AlignError, match=message):
            all_rows(file(name, text))


# Parts ----------------------------------------------------------------------------------------------------------------

LINE = st.one_of(st.just(""), st.just("  "), st.integers(0, 60).map(lambda size: json.dumps({"a": "é" * size})), st.just("oops"))


@given(st.lists(LINE, max_size=30).map("\n".join), st.booleans(), st.integers(1, 40), st.sampled_from([".jsonl", ".txt"]))
@example('{"a": "x"}', False, 5, ".jsonl")
@settings(max_examples=150, deadline=None)
def test_parts_hold_every_line_once_with_its_number(tmp_path_factory, text, ends, count, suffix):
    if not text.strip():
        return
    path = tmp_path_factory.mktemp("parts") / f"a{suffix}"
    path.write_text(text + "\n" * ends)
    several = parts(path, count)
    assert 1 <= len(several) <= count
    assert all_rows(path, count) == all_rows(path, 1)
    assert [number for number, _ in all_rows(path)] == [i for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def test_lines_longer_than_a_part(file):
    path = file("a.jsonl", '{"a": "%s"}\n{"a": 2}\n' % ("x" * 3 * read_bytes.MB))
    assert [part.first for part in parts(path, 6)] == [1, 2]
    assert all_rows(path, 6) == all_rows(path, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_parts_of_a_table_are_row_groups(file, count):
    path = file("a.parquet", parquet([{"i": i} for i in range(95)], row_group_size=10))
    assert all_rows(path, count) == [(i + 1, {"i": i}) for i in range(95)]
    assert len(parts(path, count)) == min(count, 10)


def test_a_packed_file_is_one_part(file):
    assert len(parts(file("a.jsonl.gz", gzip.compress(MANY)), 4)) == 1


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.none() | st.floats(allow_nan=False), max_size=3), min_size=1)
)
@settings(max_examples=100, deadline=None)
def test_a_list_read_in_blocks_of_any_size_is_the_list(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("list") / "a.json"
    for indent, block in ((None, 1), (2, 7), (None, 64)):
        path.write_text(json.dumps(items, indent=indent, ensure_ascii=block == 1), encoding="utf-8", errors="surrogatepass")
        before, read_bytes.BLOCK = read_bytes.BLOCK, block
        try:
            assert only_rows(path) == items
        finally:
            read_bytes.BLOCK = before


@given(
    st.binary(max_size=300),
    st.sampled_from(["", "[", '{"a": ', "a,b\n", "PAR1", "\x1f\x8b\x08"]),
    st.sampled_from([*FORMS, ".txt", ".json.gz"]),
)
@settings(max_examples=400, deadline=None)
def test_garbage_is_rows_or_our_own_error(tmp_path_factory, data, start, suffix):
    path = tmp_path_factory.mktemp("garbage") / f"a{suffix}"
    path.write_bytes(start.encode("latin-1") + data)
    try:
        for _, row in all_rows(path, 2):
            assert isinstance(row, (dict, Unreadable))
        first_rows(path, 3)
    except AlignError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 (some garbage is read as rows)


# Memory ---------------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from align.data.read import parts, rows
n = sum(1 for part in parts(Path(sys.argv[1]), 2) for _ in rows(part))
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(n, peak // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """200 MB in one row group, which pyarrow by itself would read whole: within 150 MB, of which 75 are pyarrow's."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["p" * 1500] * 100_000, "completion": ["c" * 500] * 100_000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="none")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "a.parquet")], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == 100_000
    assert peak < 150


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """200 MB of rows are read within 80 MB, of which 25 are Python's."""
    path = tmp_path / f"a{suffix}"
    row = json.dumps({"prompt": "p" * 1500, "completion": "c" * 500})
    line = {".json": f",\n{row}", ".csv": "p" * 1500 + "," + "c" * 500 + "\n"}.get(suffix, f"{row}\n").encode()
    first = {".json": f"[{row}".encode(), ".csv": b"prompt,completion\n" + line}.get(suffix, line)
    with gzip.open(path, "wb", compresslevel=1) if suffix.endswith(".gz") else path.open("wb") as out:
        out.write(first)
        for _ in range(100):
            out.write(line * 1000)
        out.write(b"]" if suffix == ".json" else b"")
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == 100_001
    assert peak < 80
