import json

import pytest
from conftest import write_rows

from align.errors import AlignError
from align.records import Conversation, Message, Preference, Prompt, first_user_turn, read_rows, write_jsonl

USER = {"role": "user", "content": "say red"}
SYSTEM = {"role": "system", "content": "be brief"}
RED, BLUE = ({"role": "assistant", "content": colour} for colour in ("red", "blue"))
GOOD = {
    Conversation: {"messages": [USER, RED]},
    Prompt: {"prompt": [USER]},
    Preference: {"prompt": [USER], "chosen": [RED], "rejected": [BLUE]},
}


def refused(path, kind):
    with pytest.raises(AlignError) as error:
        read_rows(path, kind)
    return str(error.value)


@pytest.fixture
def third_line(tmp_path):
    """Writes a file whose third line is the given one, after a good row and a blank line, and reads what is said of it."""

    def read(kind, line):
        path = tmp_path / "rows.jsonl"
        text = line if isinstance(line, str) else json.dumps(line)
        path.write_text(f"{json.dumps(GOOD[kind])}\n\n{text}\n{json.dumps(GOOD[kind])}\n")
        message = refused(path, kind)
        assert message.startswith(f"{path}:3: ")
        assert "xpected" in message
        return message.removeprefix(f"{path}:3: ")

    return read


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("line", ["{", "{'messages': []}", '{"messages": []', "say red", "{} {}"])
def test_a_line_that_is_not_json_is_named_with_the_columns_expected(third_line, kind, line):
    message = third_line(kind, line)
    assert message.startswith("not JSON (")
    assert all(repr(column) in message for column in GOOD[kind])


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("line", ["[]", "null", "3", '"text"', "true"])
def test_a_line_that_is_json_but_no_object_is_named(third_line, kind, line):
    assert "Expected one object a line" in third_line(kind, line)


@pytest.mark.parametrize(("kind", "column"), [(kind, column) for kind, row in GOOD.items() for column in row])
def test_a_missing_column_is_named_beside_those_found(third_line, kind, column):
    message = third_line(kind, {name: value for name, value in GOOD[kind].items() if name != column} | {"note": "x"})
    assert message.startswith(f"{column!r}: ")
    assert "Found the columns" in message
    assert "'note'" in message


def test_the_columns_expected_of_a_conversation_are_both_ways_to_write_one(third_line):
    message = third_line(Conversation, {"prompt": "say red", "response": "red"})
    assert all(name in message for name in ("'messages'", "'prompt'", "'completion'"))


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant", "user", "assistant"],
        ["user", "user", "assistant"],
        ["user", "assistant", "assistant"],
        ["user", "system", "assistant"],
        ["system", "system", "user", "assistant"],
        ["system", "assistant"],
        ["user", "assistant", "user"],
        ["user"],
        ["system"],
        [],
    ],
)
def test_turns_in_another_order_are_refused(third_line, roles):
    message = third_line(Conversation, {"messages": [{"role": role, "content": "x"} for role in roles]})
    assert "expected user, assistant" in message or "expected the assistant's" in message


@pytest.mark.parametrize("prompt", [[USER, RED], [RED], [SYSTEM], []])
def test_a_prompt_ends_with_the_users_turn(third_line, prompt):
    assert "expected" in third_line(Prompt, {"prompt": prompt})


@pytest.mark.parametrize("role", ["human", "tool", "User", "", None])
def test_an_unknown_role_is_refused_with_those_there_are(third_line, role):
    message = third_line(Prompt, {"prompt": [{"role": role, "content": "x"}]})
    assert message.startswith("'prompt.0.role': ")
    assert all(known in message for known in ("system", "user", "assistant"))


@pytest.mark.parametrize("content", ["", None, 3, ["red"]])
def test_content_must_be_a_text_that_is_not_empty(third_line, content):
    assert third_line(Conversation, {"messages": [USER, {"role": "assistant", "content": content}]}).startswith("'messages.1.content': ")


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("reply", ["", [], [USER], [RED, USER], [USER, RED], [SYSTEM]])
def test_a_reply_is_one_message_of_the_assistant(third_line, side, reply):
    assert side in third_line(Preference, GOOD[Preference] | {side: reply})


def test_equal_replies_are_refused(third_line):
    assert "'chosen' and 'rejected' are the same" in third_line(Preference, GOOD[Preference] | {"rejected": [RED]})
    assert "are the same" in third_line(Preference, {"prompt": "say red", "chosen": "red", "rejected": "red"})


@pytest.mark.parametrize("probability", [-0.1, 1.1, "likely", None, float("nan"), float("inf")])
def test_a_probability_out_of_range_is_refused(third_line, probability):
    assert third_line(Preference, GOOD[Preference] | {"chosen_probability": probability}).startswith("'chosen_probability': ")


@pytest.mark.parametrize("margin", ["wide", None, float("nan"), float("-inf")])
def test_a_margin_must_be_a_finite_number(third_line, margin):
    assert "margin" in third_line(Preference, GOOD[Preference] | {"margin": margin})


def test_half_a_character_is_refused(third_line):
    assert "content" in third_line(Prompt, r'{"prompt": [{"role": "user", "content": "\ud800"}]}')


@pytest.mark.parametrize("line", ["9" * 5000, "[" * 100_000], ids=["a number of 5000 digits", "100,000 brackets"])
def test_json_that_python_gives_up_on_is_a_message(third_line, line):
    third_line(Prompt, line)


@pytest.mark.parametrize("good_rows_before", [2, 2000])
def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path, good_rows_before):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD[Prompt]).encode() + b"\n"
    path.write_bytes(good * good_rows_before + b'{"prompt": "caf\xe9"}\n' + good)
    message = refused(path, Prompt)
    assert message.startswith(f"{path}:{good_rows_before + 1}: ")
    assert "UTF-8" in message


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD[Prompt]) + "\n", encoding="utf-8-sig")
    assert read_rows(path, Prompt) == [Prompt(prompt=[USER], source_line=1)]


@pytest.mark.parametrize("text", ["", "\n", " \n\n\t\n"])
def test_a_file_without_rows_is_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert refused(path, Prompt) == f"{path}: the file holds no rows; expected one JSON object a line."


def test_texts_become_messages(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "say red", "chosen": "red", "rejected": "blue"}])
    (row,) = read_rows(path, Preference)
    assert (row.prompt, row.chosen, row.rejected) == ([Message(**USER)], [Message(**RED)], [Message(**BLUE)])
    assert (row.chosen_probability, row.margin) == (1.0, 0.0)


@pytest.mark.parametrize("prompt", ["say red", [USER]])
@pytest.mark.parametrize("completion", ["red", [RED]])
def test_prompt_and_completion_make_the_conversation_that_messages_make(tmp_path, prompt, completion):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}, {"messages": [USER, RED]}])
    first, second = read_rows(path, Conversation)
    assert first.messages == second.messages == [Message(**USER), Message(**RED)]


def test_a_system_message_and_several_turns_are_a_conversation(tmp_path):
    messages = [SYSTEM, USER, RED, USER, BLUE]
    (row,) = read_rows(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]), Conversation)
    assert [message.model_dump() for message in row.messages] == messages
    assert first_user_turn(row.messages) == "say red"


def test_columns_that_are_not_known_are_left_alone(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [GOOD[Prompt] | {"source": {"id": [1, None]}, "source_line": "first", "messages": 3}])
    assert read_rows(path, Prompt) == [Prompt(prompt=[USER], source_line=1)]


def test_rows_know_their_line_whatever_ends_it(tmp_path):
    path = tmp_path / "a.jsonl"
    row = json.dumps(GOOD[Prompt])
    path.write_bytes(f"\n{row}\r\n\r\n{row}".encode())
    assert [row.source_line for row in read_rows(path, Prompt)] == [2, 4]


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"prompt": "one\u2028two\x85three\nfour"}] * 2)
    assert [row.prompt[0].content for row in read_rows(path, Prompt)] == ["one\u2028two\x85three\nfour"] * 2


def test_what_is_written_is_read_again(tmp_path):
    rows = [{"prompt": "Zürich 東京", "chosen": "ja", "rejected": "nein", "chosen_probability": 0.25}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (row,) = read_rows(tmp_path / "a.jsonl", Preference)
    write_jsonl(tmp_path / "b.jsonl", [row.model_dump()])
    assert read_rows(tmp_path / "b.jsonl", Preference) == [row]
