"""From a source to checked records: two ways that agree, places, the cache, counts, and no traceback whatever the bytes."""

import gc
import gzip
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import SHARED, write_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st

from align.base import cache_folder
from align.data import convert, fast
from align.data.convert import convert_source
from align.data.sources import Source
from align.errors import AlignError

layout_of = fast.layout_of
KINDS = ("conversation", "preference", "prompt", None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, content):
    path.write_bytes(content)
    return path


def read(path, kind=None, **changes):
    return convert_source(Source(str(path), **changes), kind, "test")


def kept(converted):
    return [at for at, reason in enumerate(converted.table["reason"].to_pylist()) if reason is None]


def records(converted):
    return [converted.record(at) for at in kept(converted)]


def places(converted):
    return [
        converted.place(file, line) for file, line in zip(*(converted.table[name].to_pylist() for name in ("file", "line")), strict=True)
    ]


def in_cache():
    return sorted(path.name for path in (cache_folder() / "data").iterdir())


# The quick way and the plain way --------------------------------------------------------------------------------------

SHAPES = {
    "alpaca": ("conversation", {"instruction": "q", "input": "i", "output": "a"}),
    "prompt/completion": ("conversation", {"prompt": "q", "completion": "a"}),
    "pairs": ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
    "messages": ("conversation", {"messages": [user("q"), assistant("a")]}),
}
COMPARED = ["file", "line", "reason", "detail", "key", "prompt", "digest", "pair", "characters", "longer", "probability", "margin"]


def both_ways(lines, kind):
    """All that is known of lines, and how many went the quick way: first as they are, then with that way closed."""
    found = []
    for way in (layout_of, lambda format: None):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALIGN_CACHE", str(Path(folder, "cache")))
            patch.setattr(fast, "layout_of", way)
            path = write(Path(folder, "rows.jsonl"), b"\n".join(lines))
            try:
                converted = read(path, kind)
            except AlignError as error:
                found.append((str(error).replace(folder, ""), 0))
                continue
            report = {name: value for name, value in converted.report.items() if name != "files"}
            found.append(
                ((converted.table.select(COMPARED).to_pylist(), records(converted), report), sum(converted.table["raw"].to_pylist()))
            )
    return found


def assert_same(lines, kind):
    (quick, went_quick), (plain, went_plain) = both_ways(lines, kind)
    assert quick == plain
    assert went_plain == 0
    return went_quick


def line(row):
    return row if isinstance(row, bytes) else json.dumps(row).encode()


ODD = ["", " ", "\n\t", "\u2003", "{{name}}", "`{{name}}`", "${{ x }}", "a\x1fb", "\x1f", "n/a", "NaN", " N/A ", "<noinput>", "nan"]
ODD += [
    "\n\nHuman: q",
    "\n\nHuman: q\n\nAssistant: a",
    "x\n\nAssistant: y",
    "### Human: q",
    "q",
    "é ü 東京 🙂",
    "\x85",
    "a\r\nb",
    "\x00",
    "2020-01-01",
]
ODD += ["İ", "<noİnput>", "[1, 2]", '{"a": 1}', "good", " good", "good\u00a0", "123", "null", "\u200b", "\ufeff", "q" * 300]
texts = st.sampled_from(ODD) | st.text(max_size=6)
values = texts | st.sampled_from([None, 0, 1, 2.5, True, math.nan, math.inf, [], ["q"], {}, {"text": "q"}, [user("q")], "\ud800", 10**30])
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "User", "", None])
extras = st.dictionaries(st.sampled_from(["id", "z", "name", "tool_calls", "weight"]), values, max_size=1)
turn = st.builds(lambda role, content, more: {"role": role, "content": content, **more}, roles, values, extras)
conversations = st.builds(
    lambda start, rounds, end: [*start, *(turn for pair in rounds for turn in pair), *end],
    st.sampled_from([[], [], [{"role": "system", "content": "s"}], [{"role": "system", "content": "s"}] * 2, [assistant("a")]]),
    st.lists(st.tuples(st.builds(user, texts), st.builds(assistant, texts)), max_size=3),
    st.sampled_from(
        [[], [], [], [user("q")], [assistant("a")], [{"content": "a", "role": "assistant"}], [{"from": "gpt", "value": "a"}], [None]]
    ),
)
BROKEN = [
    b"",
    b" ",
    b"\r",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b"3",
    b'{"prompt": "caf\xe9", "completion": "a"}',
    b'{"prompt": "a", "prompt": "b"}',
]
BROKEN += [rb'{"prompt": "\ud800", "completion": "\ud83d\ude00"}', rb'{"prompt": "\ud83d\ude00", "completion": "\u00e9"}', b"[" * 3000]
BROKEN += [
    b'{"prompt": "b", "completion": "c"} {"prompt": "d", "completion": "e"}',
    b'{"prompt": "b",',
    b'"completion": "c"}',
    b"//",
    b"{} {}",
]
BROKEN += [b'{"prompt": "b", "completion": "c", "z": %b}' % value for value in (b"NaN", b"Inf", b"-Infinity", b"1e999", b"1.", b"[" * 2000)]
BROKEN += [
    b'{"prompt": "b", "completion": "c", "z": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"prompt": "a", "completion": "b"},',
    b"\xef\xbb\xbf{}",
]


@st.composite
def files(draw):
    """A kind, and lines of one shape: some as they should be, some with an odd value, some broken."""
    kind, good = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    if "messages" in good:
        row = st.builds(lambda messages, more: {"messages": messages, **more}, conversations | st.lists(turn, max_size=3) | values, extras)
    else:
        mostly = st.fixed_dictionaries({}, optional=dict.fromkeys(good, texts))
        row = st.builds(
            lambda new, odd, more: {**good, **new, **odd, **more},
            mostly,
            st.just({}) | st.dictionaries(st.sampled_from(list(good)), values, max_size=1),
            extras,
        )
    lines = draw(st.lists(row.map(line) | row.map(line) | st.sampled_from(BROKEN), max_size=8))
    return draw(st.sampled_from([kind, kind, kind, None])), [line(good), line(good), *lines]


@settings(derandomize=True, max_examples=80, deadline=None)
@given(files())
@example(("conversation", [line(SHAPES["prompt/completion"][1]), *BROKEN[-10:], b"", b"", line({"prompt": "b", "completion": "c"})]))
def test_the_quick_way_and_the_plain_way_agree_on_every_column_and_record(file):
    kind, lines = file
    assert_same(lines, kind)


@pytest.mark.parametrize("name", SHAPES)
def test_both_ways_agree_on_an_odd_text_in_any_place(name):
    kind, good = SHAPES[name]
    rows = [good]
    for odd in ODD:
        if name == "messages":
            shapes = [
                [user(odd), assistant("a")],
                [user("b"), assistant(odd)],
                [{"role": "system", "content": odd}, user("c"), assistant("a")],
            ]
            rows += [{"messages": messages} for messages in [*shapes, [user("q"), assistant(odd), user("d"), assistant("e")]]]
        else:
            rows += [{**good, column: odd} for column in good]
    assert assert_same([line(row) for row in rows], kind) > len(ODD)


@pytest.mark.parametrize("name", SHAPES)
def test_right_rows_go_the_quick_way_also_beside_wrong_ones(name):
    kind, good = SHAPES[name]
    right = [json.loads(json.dumps(good).replace('"q"', f'"q{i}"')) for i in range(20)]
    wrong = json.loads(json.dumps(good).replace('"q"', '""').replace('"i"', '""'))
    assert assert_same([line(row) for row in right], kind) == 20
    assert assert_same([line(row) for row in [*right[:10], wrong, *right[10:], {**right[0], "id": 3}]], kind) == 21


@pytest.mark.parametrize(
    "lines",
    [
        [b'{"prompt": "b", "completion": "c"} {"prompt": "d", "completion": "e"}', b""],  # two and none: as many rows as lines
        [b'{"prompt": "b",', b'"completion": "c"}', b'{"prompt": "d", "completion": "e"}{"prompt": "d", "completion": "e"}'],
        [b'{"prompt": "b", "completion": "c", "z": NaN}'],
        [b'{"prompt": "b", "completion": "c", "z": Inf}'],
        [b'{"prompt": "b", "completion": "c", "z": ' + b"[" * 2000 + b"]" * 2000 + b"}"],
    ],
    ids=["two rows on a line", "a row on two lines", "NaN", "Inf", "deeply nested"],
)
def test_what_arrow_reads_and_json_does_not_never_goes_the_quick_way(lines):
    good = line({"prompt": "q", "completion": "a"})
    assert assert_same([good, *lines, good, b""], "conversation") == 0  # a line that no newline ends is a block of its own


def test_every_space_there_is_counts_the_same_both_ways():
    spaces = [character for character in map(chr, range(1, 0x3100)) if character.isspace()] + ["\u180e", "\u200b", "\u2060", "\ufeff"]
    blank = [{"prompt": f"q{i}", "completion": space} for i, space in enumerate(spaces)]
    around = [{"prompt": f"q{i}", "chosen": f"x{space}", "rejected": "x"} for i, space in enumerate(spaces)]
    assert_same([line(row) for row in [SHAPES["prompt/completion"][1], *blank]], "conversation")
    assert_same([line(row) for row in [SHAPES["pairs"][1], *around]], "preference")


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def several_processes(monkeypatch):
    monkeypatch.setattr(convert, "SEVERAL_PROCESSES_FROM", 100)
    monkeypatch.setattr(convert.os, "cpu_count", lambda: 3)


def numbered_lines(count):
    """JSONL whose rows say on which line they are: every seventh blank, every fifth refused for its empty answer, every ninth broken."""
    lines = []
    for number in range(1, count + 1):
        row = {"prompt": f"line {number}", "completion": "" if number % 5 == 0 else f"answer {number}"}
        lines.append("" if number % 7 == 0 else json.dumps(row)[: -1 if number % 9 == 0 else None])
    return "\n".join(lines)


def check_numbered(converted, path, count, file=0):
    table = [row for row in converted.table.select(["file", "line", "reason"]).to_pylist() if row["file"] == file]
    expected = [number for number in range(1, count + 1) if number % 7]
    assert [row["line"] for row in table] == expected
    for row in table:
        assert row["reason"] == (
            "not JSON" if row["line"] % 9 == 0 else "a turn of the assistant is empty" if row["line"] % 5 == 0 else None
        )
    said = [f"{path}:{number}" for number in expected]
    assert [place for place in places(converted) if place.startswith(f"{path}:")] == said


def test_every_kept_and_refused_row_has_its_line_however_many_processes(tmp_path, several_processes):
    path = write(tmp_path / "rows.jsonl", numbered_lines(200).encode())
    converted = read(path, "conversation")
    assert len(list(converted.folder.glob("*.arrow"))) == 3
    check_numbered(converted, path, 200)
    for at in kept(converted):
        number = converted.table["line"][at].as_py()
        assert converted.record(at) == {"messages": [user(f"line {number}"), assistant(f"answer {number}")]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path / "other"))
        patch.setattr(convert, "SEVERAL_PROCESSES_FROM", 1 << 40)
        alone = read(path, "conversation")
    assert len(list(alone.folder.glob("*.arrow"))) == 1
    assert alone.table.to_pylist() == converted.table.to_pylist()
    assert alone.report == converted.report


def test_files_of_a_folder_follow_each_other_in_order(tmp_path, several_processes):
    folder = tmp_path / "data"
    folder.mkdir()
    counts = {"b.jsonl": 60, "a.jsonl": 90, "c.jsonl": 30}
    for name, count in counts.items():
        write(folder / name, numbered_lines(count).encode())
    converted = read(folder, "conversation")
    assert [Path(file["path"]).name for file in converted.report["files"]] == sorted(counts)
    for number, name in enumerate(sorted(counts)):
        check_numbered(converted, folder / name, counts[name], number)
    files = converted.table["file"].to_pylist()
    assert files == sorted(files)
    assert converted.report["rows"] == sum(n - n // 7 for n in counts.values())


def test_the_first_places_of_every_reason_are_in_the_report(tmp_path):
    path = write(tmp_path / "rows.jsonl", numbered_lines(100).encode())
    report = read(path, "conversation").report
    assert [place[:2] for place in report["places"]["a turn of the assistant is empty"]] == [[0, n] for n in (5, 10, 15, 20, 25)]
    assert report["rejected"] == {"a turn of the assistant is empty": 16, "not JSON": 10}
    assert report["rows"] == report["kept"] + sum(report["rejected"].values()) == 86


def test_rows_of_lists_tables_and_text_have_their_number(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "" if i == 2 else "a"} for i in range(4)]
    listed = write(tmp_path / "list.json", json.dumps(rows).encode())
    table = write(tmp_path / "table.csv", b'prompt,completion\nq0,"a\nb"\nq1,a\nq2,\nq3,a\n')
    assert [place for place, reason in refused(read(listed, "conversation"))] == [f"{listed}:3"]
    assert [place for place, reason in refused(read(table, "conversation"))] == [f"{table}:5"]


def refused(converted):
    return [(place, reason) for place, reason in zip(places(converted), converted.table["reason"].to_pylist(), strict=True) if reason]


def test_a_row_refused_keeps_the_beginning_of_what_it_was(tmp_path):
    bad = [{"prompt": "q", "completion": "", "lines": 3, "rows": 2}, {"completion": "b" * 5000, "lines": 3, "rows": 2}]
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}, *bad])
    converted = read(path, "conversation")
    raw = [converted.table["record"][at].as_py() for at in (1, 2)]
    assert json.loads(raw[0]) == {"messages": [user("q"), assistant("")]}
    assert raw[1] == json.dumps(bad[1])[: convert.RAW_KEPT].encode()


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_more_work(monkeypatch):
    def forbid():
        monkeypatch.setattr(convert, "convert_part", lambda work: pytest.fail("a source was converted again"))

    return forbid


ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]


def test_a_second_call_converts_nothing_and_says_the_same(tmp_path, no_more_work):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "", "completion": "a"}])
    first = read(path)
    no_more_work()
    second = read(path)
    assert second.report == first.report
    assert second.table.equals(first.table)
    assert len(in_cache()) == 1


def test_a_file_copied_elsewhere_reuses_the_records_and_has_its_own_place(tmp_path, no_more_work):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    read(path)
    no_more_work()
    (tmp_path / "b").mkdir()
    copy = write(tmp_path / "b" / "rows.jsonl", path.read_bytes())
    assert places(read(copy)) == [f"{copy}:{i}" for i in range(1, 6)]
    assert read(copy).report["files"][0]["path"] == str(copy)


@pytest.mark.parametrize("change", ["a byte", "the kind", "the mapping"])
def test_whatever_decides_the_records_makes_a_new_entry(tmp_path, change):
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "other": f"o{i}"} for i, row in enumerate(ROWS)])
    before = records(read(path, "conversation"))
    if change == "a byte":
        write(path, path.read_bytes().replace(b"a4", b"b4"))
        assert records(read(path, "conversation")) == [*before[:4], {"messages": [user("q4"), assistant("b4")]}]
    elif change == "the kind":
        assert records(read(path, "prompt"))[0] == {"prompt": [user("q0")]}
    else:
        assert records(read(path, "conversation", columns={"completion": "other"}))[0] == {"messages": [user("q0"), assistant("o0")]}
    assert len(in_cache()) == 2
    assert records(read(path, "conversation"))[:4] == before[:4]


@pytest.mark.parametrize("names", [("rows.csv", "rows.txt"), (f"{'long' * 20}.csv", f"{'long' * 20}.txt")])
@pytest.mark.parametrize("inside", ["a folder", "alone"])
def test_the_same_bytes_under_another_suffix_are_other_records(tmp_path, names, inside):
    """text,n as a table has one row; as lines of text, two."""
    for number, name in enumerate(names):
        folder = tmp_path / str(number) / "data"
        folder.mkdir(parents=True)
        write(folder / name, b"text,n\nsome words,1\n")
        found = records(read(folder if inside == "a folder" else folder / name, "conversation"))
        assert found == ([{"text": "some words"}] if number == 0 else [{"text": "text,n"}, {"text": "some words,1"}])


def test_a_crash_in_the_middle_leaves_nothing_half_made(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    real = convert.convert_part

    def crash(work):
        real(work)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_part", crash)
        with pytest.raises(KeyboardInterrupt):
            read(path)
    assert in_cache() == []
    assert gc.isenabled()
    assert len(records(read(path))) == 5


def test_two_that_convert_at_once_both_have_it(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    real, nested = convert.convert_part, []

    def with_another_inside(work):
        if not nested:
            nested.append(None)
            nested[0] = read(path)
        return real(work)

    monkeypatch.setattr(convert, "convert_part", with_another_inside)
    assert records(read(path)) == records(nested[0])
    assert len(in_cache()) == 1


def test_damage_in_the_middle_of_a_file_is_one_message_and_leaves_nothing(tmp_path, several_processes):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS * 20)
    packed = gzip.compress(
        "".join(json.dumps({"prompt": f"{i * 7919 % 10007}", "completion": f"{i**3}"}) + "\n" for i in range(100_000)).encode()
    )
    write(folder / "b.jsonl.gz", packed[: len(packed) // 2])
    with pytest.raises(AlignError, match="b.jsonl.gz: the gzip data ends or breaks"):
        read(folder)
    assert in_cache() == []


def test_an_entry_without_its_report_is_made_anew(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    (read(path).folder / "report.json").unlink()
    assert len(records(read(path))) == 5


# Gathered and mixed formats -------------------------------------------------------------------------------------------


def labelled(prompt, reply, good):
    return {"prompt": prompt, "completion": reply, "label": good}


def test_unpaired_labels_are_paired_where_a_prompt_has_both(tmp_path):
    rows = [
        labelled("a", "1", True),
        labelled("b", "2", True),
        labelled("a", "3", False),
        labelled("c", "4", False),
        labelled("c", "5", False),
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    converted = read(path)
    assert (converted.report["format"], converted.report["kind"]) == ("unpaired", "preference")
    assert records(converted) == [{"prompt": [user("a")], "chosen": [assistant("1")], "rejected": [assistant("3")]}]
    assert refused(converted) == [(f"{path}:{line}", "no pair: the prompt has only good (or only bad) replies") for line in (2, 4, 5)]
    report = converted.report
    assert (report["rows"], report["kept"], report["records"], sum(report["rejected"].values())) == (5, 2, 1, 3)


def oasst(id, parent, role, text, rank=None):
    return {"message_id": id, "parent_id": parent, "message_tree_id": "t", "role": role, "text": text, "rank": rank, "lang": "en"}


def test_messages_of_a_tree_are_gathered_wherever_they_are(tmp_path):
    tree = [oasst("q", None, "prompter", "why"), oasst("b", "q", "assistant", "worse", 1), oasst("a", "q", "assistant", "better", 0)]
    path = write_rows(tmp_path / "rows.jsonl", tree[::-1])
    converted = read(path, "conversation")
    assert (converted.report["format"], converted.report["rows"]) == ("oasst flat", 3)
    assert records(converted) == [{"messages": [user("why"), assistant("better")]}]
    pairs = records(read(path, "preference"))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [([assistant("better")], [assistant("worse")])]


def test_a_broken_line_among_gathered_rows_keeps_its_place(tmp_path):
    rows = [json.dumps(labelled("a", "1", True)), "{", json.dumps(labelled("a", "3", False)), '{"prompt": 3}']
    path = write(tmp_path / "rows.jsonl", "\n".join(rows).encode())
    converted = read(path, "preference")
    assert len(records(converted)) == 1
    assert [place for place, _ in refused(converted)] == [f"{path}:2", f"{path}:4"]
    assert converted.report["rows"] == 4


def test_files_of_several_formats_in_one_folder_become_one_kind(tmp_path, several_processes):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [{"instruction": f"do {i}", "input": "", "output": "done"} for i in range(10)])
    write(folder / "b.csv", b"question,answer\nwhy,so\n")
    write(folder / "c.json", json.dumps([{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}]).encode())
    converted = read(folder, "conversation")
    assert converted.report["format"] == "alpaca, question/answer, sharegpt"
    assert [record["messages"][0]["content"] for record in records(converted)] == [*(f"do {i}" for i in range(10)), "why", "hi"]
    assert places(converted)[-2:] == [f"{folder / 'b.csv'}:2", f"{folder / 'c.json'}:1"]


def test_files_of_two_kinds_in_one_folder_are_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "a.jsonl", ROWS)
    write_rows(folder / "b.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(AlignError, match=r"b\.jsonl"):
        read(folder)
    assert in_cache() == []


def test_the_same_record_twice_is_counted_once_whatever_it_is_written_like(tmp_path):
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "b"}, {"completion": "a", "prompt": "q", "id": 2}]
    report = read(write_rows(tmp_path / "rows.jsonl", rows)).report
    assert (report["rows"], report["kept"], report["rejected"]) == (3, 2, {"duplicate of an earlier record": 1})
    assert report["places"]["duplicate of an earlier record"] == [[0, 3, ""]]


def calling(city):
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "go", "arguments": {"to": city}}}]}


def test_records_that_differ_in_their_tools_or_calls_alone_are_no_duplicates(tmp_path):
    tools = [[{"type": "function", "function": {"name": name}}] for name in ("go", "stop")]
    talks = [{"messages": [user("q"), calling(city)], "tools": tools[0]} for city in ("Rome", "Bonn")]
    pairs = [{"prompt": [user("q")], "chosen": [calling(a)], "rejected": [calling(b)]} for a, b in (("Rome", "Bonn"), ("Oslo", "Lima"))]
    prompts = [{"prompt": [user("q")], "tools": tool} for tool in tools]
    for kind, rows in (("conversation", talks), ("preference", pairs), ("prompt", prompts)):
        report = read(write_rows(tmp_path / f"{kind}.jsonl", rows), kind).report
        assert (report["records"], report["rejected"]) == (2, {}), kind
    both_ways_round = [pairs[0], {**pairs[0], "chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"]}]
    assert read(write_rows(tmp_path / "both.jsonl", both_ways_round), "preference").report["pairs"]["labelled_both_ways"] == 1


# Real files -----------------------------------------------------------------------------------------------------------

DUPLICATE, PLACEHOLDER = "duplicate of an earlier record", "a placeholder is left in the text"
REAL = [  # file, format, rows, rows kept, records, rejected
    ("instruction/dolly_sample_22.jsonl", "dolly", 22, 22, 22, {}),
    ("instruction/fastchat_dummy_conversation.json", "sharegpt", 500, 500, 500, {}),
    ("instruction/glaive_toolcall_en_demo.json", "sharegpt", 300, 265, 265, {DUPLICATE: 35}),
    ("instruction/gpteacher_codegen_1000.json", "alpaca", 1000, 1000, 1000, {}),
    ("instruction/gsm8k_train_1500.jsonl.gz", "question/answer", 1500, 1500, 1500, {}),
    ("instruction/identity.json", "alpaca", 91, 6, 6, {PLACEHOLDER: 85}),
    ("instruction/oasst_openai_messages.jsonl", "messages", 56, 56, 56, {}),
    ("instruction/oasst_trees_a.jsonl.gz", "oasst", 56, 56, 56, {}),
    ("instruction/seed_tasks.jsonl", "self-instruct", 175, 175, 175, {}),
    ("instruction/seed_tasks_alpaca.json", "alpaca", 175, 175, 175, {}),
    ("preference/dpo_en_demo.json.gz", "pairs", 300, 295, 295, {DUPLICATE: 5}),
    ("preference/finegrained_qa_feedback_a.json.gz", "verdicts on pairs", 265, 265, 1590, {}),
    (
        "preference/hh_harmless_test_a.jsonl.gz",
        "hh",
        1181,
        1173,
        1173,
        {"chosen and rejected part before the last turn": 3, "roles are out of order": 3, "chosen is empty": 2},
    ),
    ("preference/kto_en_demo.json", "unpaired", 300, 2, 1, {"no pair: the prompt has only good (or only bad) replies": 298}),
    (
        "preference/pandalm_testset_a.json.gz",
        "votes",
        499,
        410,
        410,
        {DUPLICATE: 53, "rejected is empty": 30, "response1 is not text": 4, "response2 is not text": 2},
    ),
]


@pytest.mark.parametrize(("name", "format", "rows", "lines", "made", "rejected"), REAL)
def test_real_files_give_exact_counts(name, format, rows, lines, made, rejected):
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"real data is not here: {path} is missing")
    converted = read(path)
    report = converted.report
    assert (report["format"], report["rows"], report["kept"], report["records"], report["rejected"]) == (
        format,
        rows,
        lines,
        made,
        rejected,
    )
    assert report["rows"] == report["kept"] + sum(report["rejected"].values())
    assert Counter(reason for _, reason in refused(converted)) == {
        reason: count for reason, count in rejected.items() if reason != DUPLICATE
    }
    for reason, found in report["places"].items():
        assert 0 < len(found) == min(rejected[reason], 5)
        assert all(1 <= number <= rows for _, number, _ in found)


# Anything at all ------------------------------------------------------------------------------------------------------

SUFFIXES = ["json", "jsonl", "csv", "tsv", "txt", "parquet", "json.gz", "jsonl.gz", "csv.gz", "jsonl.zst"]
names = st.sampled_from(
    ["prompt", "completion", "chosen", "rejected", "messages", "text", "label", "instruction", "output", "rows", "lines", "id"]
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "\ud800", "{{x}}"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names | st.sampled_from(["role", "content", "from", "value"]), inner, max_size=4)
    ),
    max_leaves=12,
)
rows_of_json = st.lists(st.dictionaries(names, anything, max_size=5), max_size=5)
GOOD_ROWS = [row for _, row in SHAPES.values()]
json_bytes = st.builds(lambda value: json.dumps(value).encode(), anything | rows_of_json)
json_lines = st.builds(lambda good, rows: b"\n".join(map(line, [good] * 3 + rows)), st.sampled_from(GOOD_ROWS), rows_of_json)
cut = st.builds(lambda content, share: content[: int(len(content) * share)], json_bytes | json_lines, st.floats(0.3, 1))
cells = st.lists(st.lists(st.text(st.sampled_from('abq,"\n\r;\t\\{}é '), max_size=5), max_size=4), max_size=5)
tables = st.builds(lambda head, lines: "\n".join(",".join(cells) for cells in [head, *lines]).encode(), st.lists(names, max_size=3), cells)
contents = st.binary(max_size=60) | json_bytes | json_lines | cut | tables


@settings(derandomize=True, max_examples=120, deadline=None)
@given(contents, st.sampled_from(SUFFIXES), st.booleans(), st.sampled_from(KINDS))
def test_garbage_of_any_kind_is_an_error_of_ours_or_rows_that_can_be_read(content, suffix, packed, kind):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(Path(folder, "cache")))
        path = write(Path(folder, f"rows.{suffix}"), gzip.compress(content) if packed and suffix.endswith("gz") else content)
        try:
            converted = read(path, kind)
        except AlignError as error:
            told = str(error)
        else:
            told = None
        assert told is None or folder in told
        if told is not None:
            return
        report = converted.report
        assert len(records(converted)) == len(kept(converted)) >= report["records"]
        assert report["kind"] == (kind or report["kind"])
        assert report["rows"] >= report["kept"]
        assert len(converted.table) == report["records"] + sum(report["rejected"].values())


def nested(depth):
    return b"[" * depth + b'"x"' + b"]" * depth


DEEP = {
    "a text": (b'{"prompt": "q", "completion": "a"}', b'{"prompt": "q", "completion": %b}'),
    "another column": (b'{"prompt": "q", "completion": "a"}', b'{"prompt": "q", "completion": "", "z": %b}'),
    "a turn": (line(SHAPES["messages"][1]), b'{"messages": [{"role": "user", "content": %b}]}'),
    "tools": (
        line({**SHAPES["messages"][1], "tools": [{"name": "f"}]}),
        b'{"messages": [], "tools": [{"name": "f", "parameters": {"x": %b}}]}',
    ),
    "a side": (line(SHAPES["pairs"][1]), b'{"prompt": "q", "chosen": %b, "rejected": "b"}'),
    "a label": (b'{"prompt": "q", "completion": "a", "label": true}', b'{"prompt": %b, "completion": "a", "label": false}'),
}


@pytest.mark.parametrize("depth", [500, 960, 1000])
@pytest.mark.parametrize("shape", DEEP)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_of_a_thousand_levels_is_refused_alone_or_with_the_file(tmp_path, shape, depth, suffix):
    """Between what orjson reads (1,024 levels) and what Python can show (about as many calls as are left) there are rows."""
    good, deep = DEEP[shape]
    lines = [good, good, deep % nested(depth)]
    path = write(tmp_path / f"rows.{suffix}", b"\n".join(lines) if suffix == "jsonl" else b"[" + b",".join(lines) + b"]")
    for kind in ("prompt", None):
        try:
            converted = read(path, kind)
        except AlignError as error:
            told = str(error)
        else:
            told = None
            assert converted.report["rows"] == 3
        assert told is None or str(path) in told
