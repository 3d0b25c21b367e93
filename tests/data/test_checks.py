import json
import math
from itertools import product

import pytest
from conftest import read_records, write_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from align.data.checks import find_problem
from align.data.convert import convert_source
from align.data.sources import Source
from align.errors import AlignError
from align.records import write_jsonl

USER = {"role": "user", "content": "say red"}
SYSTEM = {"role": "system", "content": "be brief"}
RED, BLUE = ({"role": "assistant", "content": colour} for colour in ("red", "blue"))
CALL = {"type": "function", "function": {"name": "mix", "arguments": {"of": ["red", "blue"]}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
ANSWER = {"role": "tool", "content": "purple", "name": "mix"}
GOOD = {
    "conversation": {"messages": [USER, RED]},
    "prompt": {"prompt": [USER]},
    "preference": {"prompt": [USER], "chosen": [RED], "rejected": [BLUE]},
}
WANTED = {"conversation": ("messages", "assistant"), "prompt": ("prompt", "user")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def reason(record, kind="conversation"):
    problem = find_problem(record, kind)
    return problem.reason if problem else None


def said(role, content):
    return {"role": role, "content": content}


def with_text(kind, text):
    """A record of a kind, for each place where the text may be."""
    if kind == "conversation":
        return [{"messages": [said("user", text), RED]}, {"messages": [USER, said("assistant", text)]}]
    prompts = [{**GOOD[kind], "prompt": [said("user", text)]}, {**GOOD[kind], "prompt": [said("system", text), USER]}]
    return prompts + [{**GOOD[kind], side: [said("assistant", text)]} for side in ("chosen", "rejected") if kind == "preference"]


def turns(letters):
    """Messages of a short word: s system, u user, a assistant, c a call of tools, t a tool's answer."""
    return [{"s": SYSTEM, "u": USER, "a": RED, "c": CALLS, "t": ANSWER}[letter] for letter in letters]


def in_order(letters, last):
    """The rules, written as a walk from turn to turn."""
    may_follow = {"": "su", "s": "u", "u": "ac", "a": "u", "c": "t", "t": "tac"}
    before = ""
    for letter in letters:
        if letter not in may_follow[before]:
            return False
        before = letter
    return bool(before) and before in last


@pytest.mark.parametrize("kind", GOOD)
def test_good_records_have_no_problem(kind):
    assert find_problem(GOOD[kind], kind) is None


@pytest.mark.parametrize("length", range(6))
def test_turns_are_accepted_exactly_where_each_may_follow_the_one_before(length):
    """All 5^length orders. A conversation may end with an answer or a call; a prompt with the user's turn or tools' answers."""
    for letters in map("".join, product("suact", repeat=length)):
        assert (reason({"messages": turns(letters)}) is None) == in_order(letters, "ac"), letters
        assert (reason({"prompt": turns(letters)}, "prompt") is None) == in_order(letters, "ut"), letters


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("uau", "the last turn is not the assistant's"),
        ("u", "the last turn is not the assistant's"),
        ("uct", "the last turn is not the assistant's"),
        ("au", "roles are out of order"),
        ("uua", "roles are out of order"),
        ("uaa", "roles are out of order"),
        ("usa", "roles are out of order"),
        ("ssua", "roles are out of order"),
        ("sa", "roles are out of order"),
        ("s", "roles are out of order"),
        ("", "roles are out of order"),
        ("ucta", None),
        ("suctctta", None),
        ("uc", None),
        ("uta", "roles are out of order"),
        ("uca", "roles are out of order"),
    ],
)
def test_the_reason_tells_a_wrong_end_from_a_wrong_order(letters, expected):
    assert reason({"messages": turns(letters)}) == expected


@pytest.mark.parametrize(
    ("letters", "expected"),
    [("ua", "the last turn is not the user's"), ("uc", "the last turn is not the user's"), ("a", "roles are out of order"), ("uct", None)],
)
def test_a_prompt_ends_with_the_users_turn_or_a_tools_answer(letters, expected):
    assert reason({"prompt": turns(letters)}, "prompt") == expected
    assert reason({**GOOD["preference"], "prompt": turns(letters)}, "preference") == expected


def test_the_roles_found_are_shown():
    assert find_problem({"messages": turns("uua")}, "conversation").detail == "user, user, assistant"
    assert find_problem({"messages": []}, "conversation").detail == "no messages"


@pytest.mark.parametrize("role", ["human", "User", ""])
@pytest.mark.parametrize("kind", WANTED)
def test_an_unknown_role_is_refused_with_those_there_are(kind, role):
    record = {WANTED[kind][0]: [SYSTEM, said(role, "x")]}
    assert reason(record, kind) == "a role is not system, user, assistant or tool"


@pytest.mark.parametrize("message", [None, "say red", ["user", "say red"], {"content": "x"}, {"role": None, "content": "x"}, {"role": 3}])
@pytest.mark.parametrize("kind", WANTED)
def test_a_message_without_a_role_is_refused(kind, message):
    assert reason({WANTED[kind][0]: [USER, message]}, kind) == "a message is not an object with a role"


@pytest.mark.parametrize("messages", [None, "say red", 3, {"role": "user"}])
def test_messages_must_be_a_list(messages):
    assert reason({"messages": messages}) == "messages are not a list"
    assert reason({**GOOD["preference"], "chosen": messages}, "preference") == "messages are not a list"


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u2003\u00a0"])
@pytest.mark.parametrize("kind", GOOD)
def test_a_turn_without_text_is_empty(kind, text):
    for record in with_text(kind, text):
        assert reason(record, kind).endswith(" is empty")


@pytest.mark.parametrize("text", [None, 3, True, ["red"], {"text": "red"}])
@pytest.mark.parametrize("kind", GOOD)
def test_a_turn_that_is_not_text_is_named(kind, text):
    for record in with_text(kind, text):
        assert reason(record, kind).endswith(" is not text")
        assert find_problem(record, kind).detail == repr(text)


def test_the_reason_names_whose_turn_or_which_side_it_is():
    assert reason({"messages": [said("user", ""), RED]}) == "a turn of the user is empty"
    assert reason({"messages": [USER, said("assistant", None)]}) == "a turn of the assistant is not text"
    assert reason({**GOOD["preference"], "chosen": [said("assistant", "")]}, "preference") == "chosen is empty"
    assert reason({**GOOD["preference"], "rejected": [said("assistant", 3)]}, "preference") == "rejected is not text"


@pytest.mark.parametrize("text", ["", " \n", None, 3])
def test_plain_text_must_be_text(text):
    assert reason({"text": text}) in ("the text is empty", "the text is not text")


def test_a_call_of_tools_needs_no_text_but_its_answer_does():
    assert reason({"messages": [USER, CALLS]}) is None
    assert reason({"messages": [USER, CALLS, {**ANSWER, "content": ""}, RED]}) == "a turn of the tool is empty"
    assert reason({"messages": [USER, {**CALLS, "tool_calls": []}]}) == "a turn of the assistant is empty"


PLACEHOLDERS = [
    "{{name}}",
    "I am {{ name }}.",
    "{{author_1}}",
    "a\n{{x}}\n",
    "`code` and {{name}}",
    "é {{name}}",
    "x.{{y}}",
    "```\ncode\n``` {{name}}",
]
NO_PLACEHOLDERS = [
    "${{ secrets.X }}",
    "${{name}}",
    "`{{name}}`",
    "```\n{{name}}\n```",
    "```jinja\n{{ name }}",  # a fence that is never closed
    "see `{{a}}` and `{{ b }}`",
    "{{}}",
    "{name}",
    "{{1}}",
    "{{a b}}",
    "{{ name",
    "f(x)={{a}, {b}}",
    "\\frac{{a}}{b}{c",  # LaTeX
]


@pytest.mark.parametrize("text", PLACEHOLDERS)
@pytest.mark.parametrize("kind", GOOD)
def test_a_placeholder_left_in_any_text_is_refused_and_shown(kind, text):
    for record in [*with_text(kind, text), *([{"text": text}] if kind == "conversation" else [])]:
        problem = find_problem(record, kind)
        assert problem.reason == "a placeholder is left in the text"
        assert problem.detail in text
        assert problem.detail.startswith("{{")


@pytest.mark.parametrize("text", NO_PLACEHOLDERS)
def test_braces_that_are_no_placeholder_are_text(text):
    for record in [*with_text("conversation", text), {"text": text}]:
        assert find_problem(record, "conversation") is None


@pytest.mark.parametrize("kind", GOOD)
def test_half_a_character_is_no_valid_unicode_and_its_place_is_shown(kind):
    for record in with_text(kind, "é\ud800x"):
        problem = find_problem(record, kind)
        assert problem.reason == "not valid Unicode"
        assert "'\\ud800' at character 2 of " in problem.detail
    assert reason({"text": "\udfff"}) == "not valid Unicode"


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text(st.characters(codec=None)), st.sampled_from(sorted(GOOD)))
def test_any_text_that_is_unicode_not_blank_and_without_braces_is_fine(text, kind):
    assume("{{" not in text and text.strip() not in ("red", "blue"))
    half = any("\ud800" <= character <= "\udfff" for character in text)
    for record in with_text(kind, text):
        assert (find_problem(record, kind) is None) == (bool(text.strip()) and not half)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("reply", [[], [USER], [RED, USER], [USER, RED], [SYSTEM], [ANSWER], [RED, BLUE]])
def test_a_reply_is_one_turn_of_the_assistant(side, reply):
    assert reason({**GOOD["preference"], side: reply}, "preference") == f"{side} is not one turn of the assistant"


@pytest.mark.parametrize("same", ["red", " red", "red\n", "\u00a0red\u2003"])
def test_equal_replies_are_refused_also_up_to_the_space_around_them(same):
    assert reason({**GOOD["preference"], "rejected": [said("assistant", same)]}, "preference") == "chosen and rejected are the same"


def test_replies_that_differ_inside_in_case_or_in_their_calls_are_two():
    for other in ("re d", "Red"):
        assert reason({**GOOD["preference"], "rejected": [said("assistant", other)]}, "preference") is None
    other = {**CALLS, "tool_calls": [{"type": "function", "function": {"name": "mix", "arguments": {}}}]}
    assert reason({"prompt": [USER], "chosen": [CALLS], "rejected": [other]}, "preference") is None
    assert reason({"prompt": [USER], "chosen": [CALLS], "rejected": [RED]}, "preference") is None
    assert reason({"prompt": [USER], "chosen": [CALLS], "rejected": [dict(CALLS)]}, "preference") == "chosen and rejected are the same"


@pytest.mark.parametrize("probability", [-0.1, 1.1, "likely", None, math.nan, math.inf, True, False, [1], 10**400])
def test_a_probability_out_of_range_is_refused(probability):
    found = reason({**GOOD["preference"], "chosen_probability": probability}, "preference")
    assert found == "chosen_probability is not a number from 0 to 1"


@pytest.mark.parametrize("margin", ["wide", None, math.nan, -math.inf, True, 10**400])
def test_a_margin_must_be_a_finite_number(margin):
    assert reason({**GOOD["preference"], "margin": margin}, "preference") == "margin is not a finite number"


@pytest.mark.parametrize(("probability", "margin"), [(0, -3), (1, 0), (0.5, 1e300)])
def test_numbers_at_the_edges_are_fine(probability, margin):
    assert reason({**GOOD["preference"], "chosen_probability": probability, "margin": margin}, "preference") is None


# Through the front door -----------------------------------------------------------------------------------------------


@pytest.fixture
def third_line(tmp_path):
    """Writes a file whose third line is the given one, between good rows and after a blank line; the reason it is refused for."""

    def read(kind, line):
        path = tmp_path / "rows.jsonl"
        text = line if isinstance(line, str) else json.dumps(line)
        path.write_text(f"{json.dumps(GOOD[kind])}\n\n{text}\n{json.dumps(GOOD[kind])}\n", encoding="utf-8", errors="surrogatepass")
        report = convert_source(Source(str(path)), kind, "test").report
        assert read_records(path, kind) == [GOOD[kind]]
        assert report["rejected"].pop("duplicate of an earlier record") == 1
        ((found, count),) = report["rejected"].items()
        assert (count, report["rows"], report["kept"]) == (1, 3, 1)
        ((file, number, detail),) = report["places"][found]
        assert (file, number) == (0, 3)
        return f"{found}: {detail}"

    return read


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("line", ["{", "{'messages': []}", '{"messages": []', "say red", "{} {}", "9" * 5000])
def test_a_line_that_is_not_json_is_refused_alone(third_line, kind, line):
    assert third_line(kind, line).startswith("not JSON: ")


def test_json_that_python_gives_up_on_is_refused_alone(third_line):
    assert third_line("prompt", "[" * 100_000).startswith("nested too deeply: ")


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(
    ("line", "what"), [("[]", "a list"), ("null", "null"), ("3", "a number"), ('"text"', "a text"), ("true", "true or false")]
)
def test_a_line_that_is_json_but_no_object_says_what_it_is(third_line, kind, line, what):
    assert third_line(kind, line).startswith(f"not an object: {what}")


@pytest.mark.parametrize(("kind", "column"), [(kind, column) for kind, row in GOOD.items() for column in row])
@pytest.mark.parametrize("change", ["gone", "null"])
def test_a_row_without_a_column_is_refused_alone(third_line, kind, column, change):
    row = {name: value for name, value in GOOD[kind].items() if name != column} | ({column: None} if change == "null" else {"note": "x"})
    assert third_line(kind, row).startswith(f"{column} is missing")


@pytest.mark.parametrize("content", ["", None, 3])
def test_content_must_be_a_text_that_is_not_empty(third_line, content):
    said_of_it = {"": "a turn of the assistant is empty", None: "a turn of messages has no content", 3: "a turn of messages is not text"}
    assert third_line("conversation", {"messages": [USER, said("assistant", content)]}).startswith(said_of_it[content])


@pytest.mark.parametrize("role", ["wizard", "", None])
def test_a_role_nobody_knows_is_refused(third_line, role):
    assert "role" in third_line("prompt", {"prompt": [said(role, "x")]})


@pytest.mark.parametrize("probability", [-0.1, 1.1, "likely"])
def test_a_probability_out_of_range_is_refused_in_a_file(third_line, probability):
    assert "chosen_probability is not a number from 0 to 1" in third_line(
        "preference", GOOD["preference"] | {"chosen_probability": probability}
    )


def test_a_margin_must_be_a_number_in_a_file(third_line):
    assert "margin" in third_line("preference", GOOD["preference"] | {"margin": "wide"})


def test_half_a_character_is_refused_in_a_file(third_line):
    assert third_line("prompt", r'{"prompt": [{"role": "user", "content": "\ud800"}]}').startswith("not valid Unicode: '\\ud800'")


@pytest.mark.parametrize("good_rows_before", [2, 2000])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, good_rows_before):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD["prompt"]).encode() + b"\n"
    path.write_bytes(good * good_rows_before + b'{"prompt": "caf\xe9"}\n' + good)
    report = convert_source(Source(str(path)), "prompt", "test").report
    assert report["places"]["not UTF-8 text"][0][:2] == [0, good_rows_before + 1]


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD["prompt"]) + "\n", encoding="utf-8-sig")
    assert read_records(path, "prompt") == [GOOD["prompt"]]


@pytest.mark.parametrize("text", ["", "\n", " \n\n\t\n"])
def test_a_file_without_rows_is_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(AlignError, match="empty|no rows") as error:
        read_records(path, "prompt")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("prompt", ["say red", [USER]])
@pytest.mark.parametrize("completion", ["red", [RED]])
def test_prompt_and_completion_make_the_conversation_that_messages_make(tmp_path, prompt, completion):
    first = read_records(write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}]), "conversation")
    assert first == read_records(write_rows(tmp_path / "b.jsonl", [{"messages": [USER, RED]}]), "conversation") == [GOOD["conversation"]]


def test_columns_that_are_not_known_are_left_alone(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [GOOD["prompt"] | {"source": {"id": [1, None]}, "source_line": "first"}])
    assert read_records(path, "prompt") == [GOOD["prompt"]]


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path):
    texts = ["one\u2028two\x85three\nfour", "five\x0bsix\x1cseven"]
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    assert [record["prompt"][0]["content"] for record in read_records(tmp_path / "a.jsonl", "prompt")] == texts


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_written_is_read_again(tmp_path, kind):
    extra = {"chosen_probability": 0.25, "margin": 2.0, "source": "judge"} if kind == "preference" else {}
    rows = [
        {name: [*(turns("sua") if name != "chosen" and name != "rejected" else []), *value] for name, value in GOOD[kind].items()} | extra
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_records(tmp_path / "a.jsonl", kind) == rows
