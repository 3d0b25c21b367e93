"""Pairs that are made so that the better side is known."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import write_rows

from align.data.mix import load_data
from align.data.sources import Source, as_sources
from align.errors import AlignError
from align.judge.judgement import Pair
from align.judge.known import names, people
from align.judge.planted import SHORTEST, first_half, of_pairs, planted, read_completions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def completions(count):
    return [
        (user(f"What is thing {i}?"), assistant(f"Thing {i} is a thing with many sides, and this is all about it, number {i}."))
        for i in range(count)
    ]


def side(known, right):
    better, worse = (known.pair.a, known.pair.b) if known.right == "a" else (known.pair.b, known.pair.a)
    return (better if right else worse)[-1]["content"]


def of(kind, pairs):
    return [known for known in pairs if known.group == kind]


def test_every_kind_has_the_pairs_it_is_named_for():
    source = {json.dumps(prompt): reply[0]["content"] for prompt, reply in completions(30)}
    pairs = planted(completions(30), 20, seed=1)
    assert Counter(known.group for known in pairs) == dict.fromkeys(
        ("same text twice", "cut in half", "another prompt's", "padded copy"), 20
    )
    for known in pairs:
        own = source[json.dumps(known.pair.prompt)]
        if known.group == "same text twice":
            assert known.right == "tie"
            assert known.pair.a == known.pair.b == assistant(own)
            assert known.longer == 0
            continue
        better, worse = side(known, True), side(known, False)
        assert better == own
        if known.group == "cut in half":
            assert own.startswith(worse)
            assert len(own) / 3 < len(worse) <= len(own) / 2
        elif known.group == "another prompt's":
            assert worse != own
            assert worse in source.values()
        else:
            assert worse.startswith(own)
            assert worse.endswith(own)
            assert len(worse) > 2 * len(own)


def test_the_same_seed_makes_the_same_pairs_in_whatever_order_the_completions_come():
    forward, backward = planted(completions(30), 10, seed=1), planted(completions(30)[::-1], 10, seed=1)
    assert forward == backward
    assert planted(completions(30), 10, seed=2) != forward


def test_the_better_side_is_either_one_equally_often():
    sides = Counter(known.right for known in planted(completions(300), 300, seed=0) if known.group != "same text twice")
    assert abs(sides["a"] - sides["b"]) < 4 * sum(sides.values()) ** 0.5  # standard deviations


def test_one_reply_of_each_prompt_is_used_in_a_kind():
    twice = [(user("one prompt"), assistant(f"reply {i}, long enough to be cut in half and still to be something")) for i in range(5)]
    pairs = planted(twice, 10, seed=0)
    assert Counter(known.group for known in pairs) == {"same text twice": 1, "cut in half": 1, "padded copy": 1}


def test_a_reply_of_the_same_conversation_is_no_other_prompt_s():
    """Two prompts that begin with the same turn: a reply to one may well do for the other."""
    longer = [*user("Hello"), *assistant("Hi"), *user("Go on")]
    assert not of("another prompt's", planted([(user("Hello"), assistant("Hi there")), (longer, assistant("I go on"))], 5, seed=0))
    same_words = [(user("Yes or no?"), assistant("Yes.")), (user("No or yes?"), assistant("Yes."))]
    assert not of("another prompt's", planted(same_words, 5, seed=0))


def test_short_replies_are_not_cut_and_empty_ones_not_used():
    short = [(user(f"q{i}"), assistant("x" * (SHORTEST - 1))) for i in range(3)]
    assert not of("cut in half", planted(short, 5, seed=0))
    assert planted([(user("q"), assistant(" "))], 5, seed=0) == []


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("one two three four five six", "one two"),  # 13 of 27 characters are 'one two three'; to the last space in them
        ("  padded with space  ", "padded"),  # 'padded wi'
        ("unbroken" * 4, "unbroken" * 2),
        ("一二三四五六", "一二三"),
    ],
)
def test_first_half(text, half):
    assert first_half(text) == half


def test_pairs_that_are_to_be_labelled_give_both_sides():
    pair = Pair(user("q"), assistant("one"), assistant("two"))
    assert of_pairs([pair]) == [(user("q"), assistant("one")), (user("q"), assistant("two"))]


# Where completions come from


def read(path):
    return read_completions(Source(str(path)), "--prompts")


def test_completions_are_read_from_preferences_conversations_and_sampled_ones(tmp_path):
    preferences = write_rows(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    assert read(preferences) == [(user("q"), assistant("good"))]
    talk = [*user("q"), *assistant("r"), *user("again"), *assistant("s")]
    assert read(write_rows(tmp_path / "c.jsonl", [{"messages": talk}])) == [(talk[:-1], talk[-1:])]
    sampled = {
        "prompt": user("q"),
        "completions": [{"text": "one", "policy": "sft", "tokens": 2}, {"text": "two", "policy": "sft", "tokens": 2}],
    }
    assert read(write_rows(tmp_path / "completions.jsonl", [sampled])) == [(user("q"), assistant("one")), (user("q"), assistant("two"))]


def test_files_without_replies_are_refused(tmp_path):
    with pytest.raises(AlignError, match="holds prompts without replies; planted pairs are made of replies"):
        read(write_rows(tmp_path / "prompts.jsonl", [{"prompt": "q1"}, {"prompt": "q2"}]))
    with pytest.raises(AlignError, match="holds no prompt with a reply to it"):
        read(write_rows(tmp_path / "text.jsonl", [{"text": "a text by itself"}]))
    broken = [{"prompt": user("q"), "completions": [{"text": "one"}]}, {"prompt": user("q"), "completions": "none"}]
    with pytest.raises(AlignError, match=r"broken.jsonl:2: is no row of sampled completions"):
        read(write_rows(tmp_path / "broken.jsonl", broken))


# People's preferences


def preferences(tmp_path, rows, name="gold.jsonl"):
    return load_data(as_sources(str(write_rows(tmp_path / name, rows))), "preference", "--gold")


def test_people_s_pairs_keep_the_better_side_and_leave_ties_out(tmp_path):
    rows = [
        {"prompt": f"q{i}", "chosen": f"chosen {i}", "rejected": f"rejected {i}", "chosen_probability": p}
        for i, p in enumerate([1.0, 0.8, 0.5, 0.2])
    ]
    found = people(preferences(tmp_path, rows), 10, seed=0)
    better = {known.pair.prompt[0]["content"]: side(known, True) for known in found}
    assert better == {"q0": "chosen 0", "q1": "chosen 1", "q3": "rejected 3"}
    assert {known.group for known in found} == {"gold.jsonl"}


def test_a_sample_is_the_same_for_the_same_seed_and_mostly_stays_where_rows_are_added(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(220)]
    asked = [
        [known.pair.prompt[0]["content"] for known in people(preferences(tmp_path, rows[:n], f"{n}.jsonl"), 50, seed)]
        for n, seed in ((200, 0), (200, 0), (220, 0), (200, 1))
    ]
    assert len(asked[0]) == 50
    assert asked[0] == asked[1] != asked[3]
    assert len(set(asked[0]) & set(asked[2])) > 35


def test_only_those_that_may_be_used_are(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(10)]
    found = people(preferences(tmp_path, rows), 10, seed=0, among=np.arange(10) % 2 == 0)
    assert {known.pair.prompt[0]["content"] for known in found} == {f"q{i}" for i in range(0, 10, 2)}


def test_each_file_is_a_group_and_gives_its_own_sample(tmp_path):
    paths = [
        write_rows(tmp_path / name, [{"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no"} for i in range(30)])
        for name in ("x.jsonl", "y.jsonl")
    ]
    found = people(load_data(as_sources([str(path) for path in paths]), "preference", "--gold"), 20, seed=0)
    assert Counter(known.group for known in found) == {"x.jsonl": 20, "y.jsonl": 20}
    assert all(known.pair.prompt[0]["content"].startswith(known.group) for known in found)


def test_files_of_the_same_name_are_told_apart():
    assert names(["a/x.json", "b/x.json", "c/y.json"]) == ["a/x.json", "b/x.json", "y.json"]
