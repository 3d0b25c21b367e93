"""Hashes of records: the same for the same texts, others for texts that are moved, swapped or cut elsewhere."""

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from align.data.measures import measures

NAMES = ("key", "prompt", "digest", "pair", "characters", "longer", "probability", "margin")
texts = st.text(st.sampled_from("ab\x1f é"), min_size=1, max_size=4)
replies = st.lists(texts, min_size=1, max_size=3)


def measured(record, kind):
    return dict(zip(NAMES, measures(record, orjson.dumps(record), kind), strict=True))


def conversation(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def preference(prompt, chosen, rejected):
    sides = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": conversation(*prompt)["messages"], **sides}


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(texts, min_size=2, max_size=4), st.lists(texts, min_size=2, max_size=4))
def test_two_conversations_have_one_digest_only_if_their_texts_are_the_same(first, second):
    one, other = measured(conversation(*first), "conversation"), measured(conversation(*second), "conversation")
    assert (one["digest"] == other["digest"]) == (first == second)
    assert (one["prompt"] == other["prompt"]) == (first[:-1] == second[:-1])
    assert (one["key"] == other["key"]) == (first[0] == second[0])


@settings(derandomize=True, max_examples=200, deadline=None)
@given(replies, texts, texts, texts)
def test_a_pair_is_the_same_whichever_side_is_chosen_and_its_digest_is_not(prompt, chosen, rejected, other):
    pair, swapped = (
        measured(preference(prompt, chosen, rejected), "preference"),
        measured(preference(prompt, rejected, chosen), "preference"),
    )
    assert pair["pair"] == swapped["pair"]
    assert (pair["digest"] == swapped["digest"]) == (chosen == rejected)
    changed = measured(preference(prompt, chosen, other), "preference")
    assert (pair["pair"] == changed["pair"]) == (pair["digest"] == changed["digest"]) == (rejected == other)


def test_a_prompt_has_one_hash_in_whatever_it_stands():
    said = ["a question", "a reply", "another question"]
    rows = [
        measured(conversation(*said, "good"), "conversation"),
        measured(preference(said, "good", "bad"), "preference"),
        measured({"prompt": conversation(*said)["messages"]}, "prompt"),
    ]
    assert len({row["prompt"] for row in rows}) == len({row["key"] for row in rows}) == 1
    assert rows[0]["key"] == xxh3_64_intdigest(b"a question") - 2**63


def test_a_sequence_is_the_polynomial_of_its_texts_hashes():
    """h("a") F^2 + h("b") F + h("c") modulo 2^64, less 2^63, with numpy's numbers that overflow by themselves."""
    a, b, c = (np.uint64(xxh3_64_intdigest(text)) for text in (b"a", b"b", b"c"))
    factor = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
    expected = (a * factor * factor + b * factor + c).astype(object)[0] - 2**63
    assert measured(conversation("a", "b", "c"), "conversation")["digest"] == expected


@pytest.mark.parametrize("change", ["tools", "calls"])
def test_what_differs_in_its_tools_or_calls_alone_has_another_digest(change):
    call = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    record = conversation("q", "a")
    other = {**record, "tools": [{}]} if change == "tools" else {"messages": [record["messages"][0], {**record["messages"][1], **call}]}
    one, two = measured(record, "conversation"), measured(other, "conversation")
    assert one["digest"] != two["digest"]
    assert one["prompt"] == two["prompt"]
