import copy
import csv
import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from align.data.formats import Unfit, convert, converter, group_key, recognise
from align.errors import AlignError

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data files are not at {SHARED}")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def shared_rows(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not at {SHARED}")
    data = (SHARED / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if kind == "json":
        found = json.loads(text)
        return found if isinstance(found, list) else list(found.values())
    return list(csv.DictReader(io.StringIO(text))) if kind == "csv" else [{"text": line} for line in text.splitlines()]


def converted(rows, kind=None, columns=None):
    """The format of rows, their records, and the count of each reason why one is unfit."""
    found = recognise(rows, kind, "rows.jsonl", columns)
    if found.gathers:
        groups = {}
        for row in rows:
            groups.setdefault(group_key(found, row), []).append(row)
        rows = [{"rows": group} for group in groups.values()]
    records, unfit, read = [], Counter(), converter(found)
    for row in rows:
        try:
            records += read(row)
        except Unfit as error:
            unfit[error.reason] += 1
    return found, records, dict(unfit)


def refused(rows, kind=None, columns=None):
    with pytest.raises(AlignError) as error:
        recognise(rows, kind, "rows.jsonl", columns)
    return str(error.value)


REAL = [
    ("eval/gsm8k_test_a.jsonl", "question/answer", "conversation", 658, {}),
    ("eval/ifeval_input_data.jsonl", "prompts", "prompt", 541, {}),
    ("eval/mt_bench_question.jsonl", "prompts", "prompt", 80, {}),
    ("eval/truthfulqa.csv.gz", "pairs", "preference", 790, {}),
    ("instruction/dolly_sample_22.jsonl", "dolly", "conversation", 22, {}),
    ("instruction/fastchat_dummy_conversation.json", "sharegpt", "conversation", 500, {}),
    ("instruction/glaive_toolcall_en_demo.json", "sharegpt", "conversation", 300, {}),
    ("instruction/gpteacher_codegen_1000.json", "alpaca", "conversation", 1000, {}),
    ("instruction/gsm8k_train_1500.jsonl.gz", "question/answer", "conversation", 1500, {}),
    ("instruction/identity.json", "alpaca", "conversation", 91, {}),
    ("instruction/oasst_openai_messages.jsonl", "messages", "conversation", 56, {}),
    ("instruction/oasst_trees_a.jsonl.gz", "oasst", "conversation", 56, {}),
    ("instruction/seed_tasks.jsonl", "self-instruct", "conversation", 175, {}),
    ("instruction/seed_tasks_alpaca.json", "alpaca", "conversation", 175, {}),
    ("judge/biggen_rubrics_instruction_following_safety.json.gz", "prompt/completion", "conversation", 169, {}),
    ("judge/llmbar_GPTInst.json", "votes", "preference", 92, {}),
    ("judge/llmbar_Natural.json", "votes", "preference", 100, {}),
    ("preference/dpo_en_demo.json.gz", "pairs", "preference", 300, {}),
    ("preference/finegrained_qa_feedback_a.json.gz", "verdicts on pairs", "preference", 1590, {}),
    ("preference/hh_harmless_test_a.jsonl.gz", "hh", "preference", 1178, {"chosen and rejected part before the last turn": 3}),
    ("preference/kto_en_demo.json", "unpaired", "preference", 1, {"no pair: the prompt has only good (or only bad) replies": 296}),
    ("preference/pandalm_testset_a.json.gz", "votes", "preference", 493, {"response1 is not text": 4, "response2 is not text": 2}),
    ("pretrain/wiki_demo.txt.gz", "text", "conversation", 30, {}),
    ("redteam/xstest_prompts.csv", "prompts", "prompt", 450, {}),
]


@needs_shared
@pytest.mark.parametrize(("name", "format", "kind", "records", "unfit"), REAL)
def test_real_files_are_recognised_and_converted_with_exact_counts(name, format, kind, records, unfit):
    rows = shared_rows(name)
    found, made, bad = converted(rows)
    assert (found.name, found.kind, len(made), bad) == (format, kind, records, unfit)
    if kind != "prompt":
        assert recognise(rows[:1000], kind, name) == recognise(rows[:1000], None, name)
    _, prompts, _ = converted(rows, "prompt")
    assert all(set(record) <= {"prompt", "tools"} and record["prompt"][-1]["role"] == "user" for record in prompts)


@needs_shared
@pytest.mark.parametrize(
    "name", ["eval/mt_bench_reference_gpt-4.jsonl", "judge/llmbar_verdicts.jsonl.gz", "judge/pandalm_7b_verdicts_a.json.gz"]
)
def test_real_files_of_another_purpose_are_refused(name):
    for kind in (None, "conversation", "preference", "prompt"):
        assert "are not recognised as" in refused(shared_rows(name), kind)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CANONICAL = [
    {"messages": [{"role": "system", "content": "be brief"}, user(" hi "), assistant("yes\n")]},
    {"messages": [user("1+1"), assistant("") | {"tool_calls": [CALL]}, {"role": "tool", "content": "2", "name": "add"}], "tools": [TOOL]},
    {"text": "plain ### text"},
    {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    {
        "prompt": [user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
        "chosen_probability": 0.5,
        "margin": 1.5,
        "tools": [TOOL],
    }
    | {"source": "judge"},
    {"prompt": [user("q"), assistant("a"), user("r")]},
    {"prompt": [user("q")], "tools": [TOOL]},
]


@pytest.mark.parametrize("record", CANONICAL)
def test_our_own_records_come_back_unchanged(record):
    _, records, unfit = converted([record])
    assert records == [record]
    assert not unfit


# Rows of the formats that are met outside: each with what they are recognised as, and a record of the first row.
NEAR = {
    "orca": ([{"system_prompt": "be", "question": "q", "response": "a"}], "prompt/completion"),
    "rewritten question": ([{"original_question": "old", "query": "q", "response": "a", "type": "t"}], "prompt/completion"),
    "context and response": ([{"Context": "q", "Response": "a"}], "prompt/completion"),
    "completion of messages": ([{"prompt": [user("q")], "completion": [assistant("a")]}], "prompt/completion"),
    "texts by turns": ([{"id": "1", "data": ["q", "a"]}], "alternating"),
    "exchanges of dicts": ([{"conversation": [{"human": "q", "assistant": "a"}]}], "exchanges"),
    "exchanges of input and output": ([{"conversation": [{"input": "q", "output": "a"}]}], "exchanges"),
    "prompt beside messages": ([{"prompt": "q", "prompt_id": "1", "messages": [user("q"), assistant("a")]}], "messages"),
    "gemini": ([{"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}], "messages"),
    "messages as JSON": ([{"messages": json.dumps([user("q"), assistant("a")])}], "messages"),
    "messages as Python": ([{"messages": str([user("q"), assistant("a")])}], "messages"),
    "guanaco": ([{"text": "### Human: q### Assistant: a"}], "guanaco transcript"),
    "llama 2": ([{"text": "<s>[INST] q [/INST] a </s>"}], "inst transcript"),
    "chatml": ([{"text": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"}], "chatml transcript"),
    "hh as text": ([{"text": "\n\nHuman: q\n\nAssistant: a"}], "hh transcript"),
}


@pytest.mark.parametrize("name", NEAR)
def test_conversations_near_the_known_ones(name):
    rows, format = NEAR[name]
    found, records, _ = converted(rows)
    assert (found.name, found.kind) == (format, "conversation")
    assert [turn for turn in records[0]["messages"] if turn["role"] != "system"] == [user("q"), assistant("a")]
    assert converted(rows, "prompt")[1][0]["prompt"][-1] == user("q")


@pytest.mark.parametrize("kind", ["conversation", "preference", "prompt", None])
def test_nothing_but_our_errors_whatever_the_values(kind):
    """Rows of known shapes with values replaced by junk: recognised or refused, converted or unfit, and never changed."""
    chance = random.Random(0)
    junk = [None, "", 0, 2.5, float("nan"), True, [], {}, [None], ["x"], [[]], {"role": None}, "\ud800", "[" * 2000, "[]", b"x", 10**400]
    shapes = [rows for rows, _ in NEAR.values()] + [[record] for record in CANONICAL] + list(PREFERENCES.values())

    def damaged(value):
        if isinstance(value, dict) and value and chance.random() < 0.8:
            key = chance.choice(list(value))
            return {**value, key: damaged(value[key])}
        if isinstance(value, list) and value and chance.random() < 0.7:
            place = chance.randrange(len(value))
            return [*value[:place], damaged(value[place]), *value[place + 1 :]]
        return copy.deepcopy(chance.choice(junk))

    for _ in range(1500):
        good = chance.choice(shapes)
        rows = [new if isinstance(new := damaged(row), dict) else {"text": new} for row in good]
        try:
            found = recognise(chance.choice([good, rows]), kind, "rows.jsonl")
        except AlignError:
            continue
        for row in rows:
            try:
                given = {"rows": [row]} if found.gathers and group_key(found, row) is not None else row
                before = repr(given)
                records = convert(found, given)
                assert repr(given) == before
                assert all(isinstance(record, dict) for record in records)
            except Unfit:
                continue


PREFERENCES = {
    "sides": [{"prompt": "q", "chosen": "a", "rejected": "b"}],
    "implicit": [{"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}],
    "hh": [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}],
    "votes": [{"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1}],
    "rated": [{"instruction": "q", "completions": [{"response": "b", "overall_score": 1}, {"response": "a", "overall_score": 4}]}],
    "unpaired": [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}],
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_file_is_no_conversation_file_and_says_how_to_go_on(name):
    message = refused(PREFERENCES[name], "conversation")
    assert message.startswith("rows.jsonl: holds preferences (format ")
    assert "used as preferences=" in message


def test_the_chosen_side_can_be_trained_on_with_the_mapping_that_the_refusal_gives():
    told = {"sides": {"prompt": "prompt", "completion": "chosen"}, "implicit": {"messages": "chosen"}, "hh": {"text": "chosen"}}
    for name, mapping in told.items():
        written = ", ".join(f'"{field}": "{column}"' for field, column in mapping.items())
        assert f"columns={{{written}}}" in refused(PREFERENCES[name], "conversation")
        _, records, _ = converted(PREFERENCES[name], "conversation", mapping)
        assert records == [{"messages": [user("q"), assistant("a")]}]


def test_conversations_where_preferences_are_wanted():
    message = refused([{"question": "q", "answer": "a"}], "preference")
    assert "holds conversations (format 'question/answer'" in message
    assert 'Use it as data=, or name what is missing with columns={"prompt": "question", "chosen": "...", "rejected": "..."}' in message


def test_prompts_where_conversations_are_wanted():
    assert "It has no replies to train on. Use it as prompts=" in refused([{"prompt": "q"}], "conversation")


def test_an_unknown_file_shows_its_columns_the_nearest_format_and_the_mapping_to_try():
    rows = [{"id": 7, "ask_text": "how do I tie a knot?", "my_text_back": "over, under, and pull it tight", "ok": True}]
    message = refused(rows, "conversation")
    assert "'ask_text': text 'how do I tie a knot?'" in message
    assert "'id': a number 7" in message
    assert "'ok': true or false True" in message
    assert "The nearest format is 'prompt, completion'; it lacks a prompt column" in message
    assert 'Try columns={"prompt": "ask_text", "completion": "my_text_back"}' in message
    assert "--columns prompt=ask_text,completion=my_text_back" in message
    mapped = {"prompt": "ask_text", "completion": "my_text_back"}
    assert converted(rows, "conversation", mapped)[1] == [{"messages": [user(rows[0]["ask_text"]), assistant(rows[0]["my_text_back"])]}]


@pytest.mark.parametrize(
    ("rows", "kind", "lacks"),
    [
        ([{"question": "2+2", "answer": 4}], None, "lacks a completion of text: 'answer': a number 4"),
        ([{"question": "2+2", "comment": "x"}], "preference", None),
        ([{"prompt": "q", "response_a": "a", "response_b": "b"}], None, "which of 'response_a' and 'response_b' is better"),
        ([{"prompt": "q", "chosen": "a"}], "preference", "it lacks rejected"),
        ([{"chosen": "the sky is blue", "rejected": "the sky is green"}], "preference", "it lacks the prompt"),
        ([{"n": 1}], "prompt", "No column holds text"),
        ([], None, "no rows"),
        ([{"messages": 3}], "conversation", "'messages': a number 3"),
        (["one", "two"], None, "a row is str 'one'"),
    ],
)
def test_what_a_refused_file_lacks(rows, kind, lacks):
    assert (lacks or "expected preferences") in refused(rows, kind)


def test_a_mapping_is_checked_for_fields_and_columns_all_at_once():
    message = refused([{"question": "q", "reply": "a"}], "conversation", {"promt": "question", "completion": "replay"})
    assert "'promt' is no field. Did you mean 'prompt'?" in message
    assert "'replay' is no column of the file. Did you mean 'reply'?" in message
    assert "Columns of the file: 'question', 'reply'." in message


def test_a_mapping_overrides_what_the_names_say():
    rows = [{"prompt": "not this", "question": "q", "reply": "a", "response": "not this", "system": "nor this"}]
    _, records, _ = converted(rows, "conversation", {"prompt": "question", "completion": "reply"})
    assert records == [{"messages": [user("q"), assistant("a")]}]


def test_a_mapping_of_one_column_leaves_the_others_to_recognition():
    _, records, _ = converted([{"instruction": "q", "input": "", "said": "a"}], "conversation", {"completion": "said"})
    assert records == [{"messages": [user("q"), assistant("a")]}]


def test_two_replies_and_their_label_can_be_mapped():
    rows = [{"ask": "q", "left one": "a", "right one": "b", "who": who} for who in (1, 2)]
    mapping = {"prompt": "ask", "response_a": "left one", "response_b": "right one", "label": "who"}
    assert [record["chosen"][0]["content"] for record in converted(rows, "preference", mapping)[1]] == ["a", "b"]


def test_a_mapped_label_that_cannot_be_read_is_refused_rather_than_ignored():
    rows = [{"q": "x", "a": "y", "mark": "who knows"}]
    assert "with the mapping" in refused(rows, None, {"prompt": "q", "completion": "a", "label": "mark"})


@pytest.mark.parametrize("kind", [None, "prompt"])
def test_conversations_that_all_end_with_the_user_are_prompts(kind):
    found, records, _ = converted([{"messages": [user("q"), assistant("a"), user("r")]}], kind)
    assert found.kind == "prompt"
    assert records == [{"prompt": [user("q"), assistant("a"), user("r")]}]


def test_prompts_of_preferences_without_a_prompt_column_come_from_what_both_sides_share():
    for name in ("implicit", "hh"):
        assert converted(PREFERENCES[name], "prompt")[1] == [{"prompt": [user("q")]}]


def test_lines_of_text_are_prompts_or_plain_text():
    rows = [{"text": "Write a poem."}]
    assert converted(rows, "prompt")[1] == [{"prompt": [user("Write a poem.")]}]
    assert converted(rows, "conversation")[1] == rows


def test_file_names_do_not_matter_and_rows_decide_with_a_few_bad_ones():
    rows = [{"prompt": "q", "completion": "a"}] * 9 + [{"prompt": 3, "completion": None}]
    found, records, unfit = converted(rows)
    assert (found.name, len(records), unfit) == ("prompt/completion", 9, {"prompt is not text": 1})
