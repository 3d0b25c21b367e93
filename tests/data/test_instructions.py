import json

import pytest
from test_formats import assistant, converted, needs_shared, shared_rows, user

from align.data.formats import Unfit, convert, recognise
from align.data.transcripts import transcript_turns
from align.data.turns import read_tools, read_turns


def only(row, kind="conversation"):
    found, records, unfit = converted([row], kind)
    assert not unfit
    assert len(records) == 1
    return records[0]


def unfit(turns):
    with pytest.raises(Unfit) as error:
        read_turns(turns, "messages")
    return error.value


@pytest.mark.parametrize("field", ["input", "context"])
def test_an_input_comes_after_the_instruction_and_an_empty_one_leaves_no_trace(field):
    row = {"instruction": "Add.", field: "1 2", "output": " 3 "}
    assert only(row) == {"messages": [user("Add.\n\n1 2"), assistant(" 3 ")]}
    for nothing in ("", "  ", None, "<noinput>"):
        kept = recognise([row], "conversation", "x")
        assert convert(kept, {**row, field: nothing}) == [{"messages": [user("Add."), assistant(" 3 ")]}]


def test_history_and_system_come_before():
    row = {"instruction": "i", "input": "", "output": "o", "system": "s", "history": [["u", "a"]]}
    system = {"role": "system", "content": "s"}
    assert only(row) == {"messages": [system, user("u"), assistant("a"), user("i"), assistant("o")]}
    assert only(row, "prompt") == {"prompt": [system, user("u"), assistant("a"), user("i")]}


def test_a_reply_that_is_not_text_is_unfit_with_what_was_found():
    kept = recognise([{"instruction": "i", "output": "o"}], None, "x")
    for value, reason, detail in ((True, "output is not text", "True"), (None, "output is missing", ""), (3, "output is not text", "3")):
        with pytest.raises(Unfit) as error:
            convert(kept, {"instruction": "i", "output": value})
        assert (error.value.reason, error.value.detail) == (reason, detail)


def test_sharegpt_and_openai_tell_the_same_conversation():
    openai = [{"role": "developer", "content": "s"}, user("q"), {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "function", "content": "2"}, assistant("two")]  # fmt: skip
    sharegpt = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "two"},
    ]
    turns = read_turns(openai, "messages")
    assert turns == read_turns(sharegpt, "conversations") == read_turns(turns, "messages")
    assert turns[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert read_turns(json.dumps(openai), "messages") == turns


def test_typed_parts_are_joined_and_what_is_not_text_is_unfit():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_turns([{"role": "user", "content": parts}], "messages") == [user("ab")]
    error = unfit([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert error.reason == "a turn of messages has a part that is not text"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "narrator", "content": "x"}, "a turn of messages has an unknown role"),
        ({"role": "user", "content": None}, "a turn of messages has no content"),
        ({"role": "user", "content": 3}, "a turn of messages is not text"),
        ({"content": "x"}, "a turn of messages has no role"),
        ("x", "a turn of messages has a turn that is not a message"),
        ({"from": "function_call", "value": "not JSON"}, "a tool call of messages has no name"),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": "[1]"}'},
            "the arguments of a tool call of messages are not a JSON object",
        ),
    ],
)
def test_turns_that_cannot_be_messages(turn, reason):
    assert unfit([turn]).reason == reason.replace("a turn of messages has a turn", "messages has a turn")


@pytest.mark.parametrize("nothing", [None, "", "[]", []])
def test_no_tools(nothing):
    assert read_tools(nothing, "tools") == []


def test_tools_are_read_from_text_and_wrapped_once():
    bare = {"name": "f", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": bare}]
    assert read_tools(json.dumps([bare]), "tools") == read_tools([bare], "tools") == read_tools(wrapped, "tools") == wrapped


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("hh", "\n\nHuman: q \n\nAssistant:  a\n\nb\n\nHuman: r\n\nAssistant: c"),
        ("guanaco", "### Human: q### Assistant: a\n\nb### Human: r### Assistant: c"),
        (
            "chatml",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na\n\nb<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nc",
        ),
        ("inst", "<s>[INST] q [/INST] a\n\nb </s><s>[INST] r [/INST] c </s>"),
        ("zephyr", "<|user|>\nq</s>\n<|assistant|>\na\n\nb</s>\n<|user|>\nr</s>\n<|assistant|>\nc</s>"),
        ("colon", "USER: q\nASSISTANT: a\n\nb\nUSER: r\nASSISTANT: c"),
    ],
)
def test_transcripts_of_every_style_hold_the_same_turns(style, text):
    assert transcript_turns(text, style, "text") == [user("q"), assistant("a\n\nb"), user("r"), assistant("c")]


def test_alpaca_text_has_its_preamble_as_system_and_its_input_in_the_prompt():
    row = {"text": "Below is a task.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"}
    assert only(row) == {"messages": [{"role": "system", "content": "Below is a task."}, user("Add.\n\n1 2"), assistant("3")]}


def test_seeds_give_a_record_for_each_instance():
    row = {"id": "s", "instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}]}
    _, records, _ = converted([row])
    assert records == [{"messages": [user("Add.\n\n1 2"), assistant("3")]}, {"messages": [user("Add."), assistant("0")]}]


def node(text, role="assistant", rank=None, replies=(), **more):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}


def test_a_tree_is_read_along_its_best_ranked_replies_and_cut_after_the_last_of_the_assistant():
    replies = [
        node("unranked"),
        node("second", rank=1),
        node("best", rank=0, replies=[node("and then?", "prompter")]),
        node("gone", rank=-1, deleted=True),
        node("failed", rank=-1, review_result=False),
    ]
    tree = {"message_tree_id": "1", "prompt": node("q", "prompter", replies=replies)}
    assert only(tree) == {"messages": [user("q"), assistant("best")]}
    _, _, bad = converted([{**tree, "prompt": node("q", "prompter")}])
    assert bad == {"the tree has no reply": 1}


def test_a_flat_tree_is_the_nested_one():
    def row(key, parent, text, role, rank=None):
        return {"message_id": key, "parent_id": parent, "message_tree_id": "t", "text": text, "role": role, "rank": rank}

    rows = [row("3", "1", "a", "assistant", 0), row("1", None, "q", "prompter"), row("2", "1", "b", "assistant", 1)]
    found, records, _ = converted(rows)
    assert found.gathers
    assert records == [{"messages": [user("q"), assistant("a")]}]
    pair = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert converted(rows, "preference")[1] == [pair]


@needs_shared
def test_real_trees_give_the_conversations_that_were_converted_independently():
    assert converted(shared_rows("instruction/oasst_trees_a.jsonl.gz"))[1] == shared_rows("instruction/oasst_openai_messages.jsonl")


@needs_shared
def test_real_seeds_give_what_their_alpaca_form_gives():
    assert converted(shared_rows("instruction/seed_tasks.jsonl"))[1] == converted(shared_rows("instruction/seed_tasks_alpaca.json"))[1]


@needs_shared
def test_real_tool_calls_have_names_arguments_and_schemas():
    _, records, _ = converted(shared_rows("instruction/glaive_toolcall_en_demo.json"))
    assert sum("tools" not in record for record in records) == 109
    calls = [call["function"] for record in records for turn in record["messages"] for call in turn.get("tool_calls", [])]
    assert calls
    assert all(isinstance(call["arguments"], dict) for call in calls)
    assert {turn["role"] for record in records for turn in record["messages"]} == {"user", "assistant", "tool"}
