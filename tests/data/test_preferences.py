import math
from collections import Counter

import pytest
from test_formats import assistant, converted, needs_shared, shared_rows, user

from align.data.formats import Unfit, convert, recognise
from align.data.votes import coding_of, share_of_first

PAIR = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


def only(rows):
    _, records, unfit = converted(rows, "preference")
    assert not unfit
    assert len(records) == 1
    return records[0]


SIDES = {
    "strings": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "messages": {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    "sides that repeat the prompt": {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    "implicit": {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
    "hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "hh with a prompt": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"},
    "hh that repeats its prompt": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "chosen": "\n\nHuman: q\n\nAssistant: a",
        "rejected": "\n\nHuman: q\n\nAssistant: b",
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "openai": {
        "input": {"messages": [user("q")], "tools": []},
        "preferred_output": [assistant("a")],
        "non_preferred_output": [assistant("b")],
    },
    "other names": {"instruction": "q", "input": "", "chosen_response": "a", "rejected_response": "b"},
}


@pytest.mark.parametrize("name", SIDES)
def test_every_form_of_two_sides_is_the_same_preference(name):
    assert only([SIDES[name]]) == PAIR


def test_the_system_column_and_the_scores_of_the_sides():
    row = {"system": "s", "question": "q", "chosen": "a", "rejected": "b", "score_chosen": 8.5, "score_rejected": 5.0}
    assert only([row]) == {**PAIR, "prompt": [{"role": "system", "content": "s"}, user("q")], "margin": 3.5}


def test_a_probability_out_of_range_is_unfit():
    found = recognise([{**SIDES["strings"], "chosen_probability": 0.9}], None, "x")
    with pytest.raises(Unfit, match="chosen_probability is not a number from 0 to 1: 1.5"):
        convert(found, {**SIDES["strings"], "chosen_probability": 1.5})


@pytest.mark.parametrize("name", ["implicit", "hh"])
def test_sides_that_part_early_are_unfit(name):
    found = recognise([SIDES[name]], None, "x")
    turns = [user("q"), assistant("a"), user("r"), assistant("b")]
    text = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"
    long, short = (turns, turns[:1] + [assistant("c")]) if name == "implicit" else (text, "\n\nHuman: q\n\nAssistant: c")
    for chosen, rejected in ((long, short), (short, long)):
        with pytest.raises(Unfit) as error:
            convert(found, {"chosen": chosen, "rejected": rejected})
        assert error.value.reason == "chosen and rejected part before the last turn"


FLIPS = {
    "1/2": ({"response1": "a", "response2": "b"}, {1: 2, 2: 1, 0: 0}),
    "0/1": ({"response_0": "a", "response_1": "b"}, {0: 1, 1: 0}),
    "names": ({"answer_a": "a", "answer_b": "b"}, {"A": "B", "B": "A", "tie": "tie"}),
    "signed": ({"output_1": "a", "output_2": "b"}, {-2: 2, 2: -2, 0: 0}),
    "models": ({"response_a": "a", "response_b": "b"}, {"model_a": "model_b", "model_b": "model_a", "tie (bothbad)": "tie (bothbad)"}),
}


@pytest.mark.parametrize("name", FLIPS)
def test_swapping_the_replies_and_flipping_the_vote_is_the_same_record_and_ties_stay_visible(name):
    replies, flip = FLIPS[name]
    first, second = replies
    rows = [{"prompt": "q", **replies, "label": vote} for vote in flip]
    swapped = [{"prompt": "q", first: "b", second: "a", "label": flip[row["label"]]} for row in rows]
    (format, records, _), (_, others, _) = converted(rows, "preference"), converted(swapped, "preference")
    assert format.name == "votes"
    for record, other in zip(records, others, strict=True):
        assert record["chosen_probability"] == other["chosen_probability"]
        assert record == other or record["chosen_probability"] == 0.5
    assert records[0]["chosen"] == [assistant("a")]
    assert {record["chosen_probability"] for record in records} == ({1.0, 0.5} if len(flip) == 3 else {1.0})


def test_several_annotators_give_the_share_of_their_votes_with_half_of_a_tie():
    """Of 2, 2, 0 the second has 1 + 1 + 1/2 of 3 votes; of 1, 2, 0 both have 3/2."""
    row = {"instruction": "q", "input": "", "response1": "b", "response2": "a"}
    rows = [row | {f"annotator{i}": vote for i, vote in enumerate(votes, 1)} for votes in ((2, 2, 0), (1, 2, 0), (1, 1, 1))]
    _, records, _ = converted(rows)
    assert [record["chosen"][0]["content"] for record in records] == ["a", "b", "b"]
    assert [record["chosen_probability"] for record in records] == [pytest.approx(2.5 / 3), 0.5, 1.0]


@pytest.mark.parametrize("vote", ["garbage", 7, {}, True])
def test_a_vote_that_cannot_be_read_is_unfit_and_no_tie(vote):
    found = recognise([{"input": "q", "output_1": "a", "output_2": "b", "label": label} for label in (1, 2)], None, "x")
    with pytest.raises(Unfit, match="label is no vote that can be read"):
        convert(found, {"input": "q", "output_1": "a", "output_2": "b", "label": vote})
    with pytest.raises(Unfit, match="no vote in label"):
        convert(found, {"input": "q", "output_1": "a", "output_2": "b", "label": None})


def test_one_hot_winners():
    row = {"prompt": "q", "response_a": "b", "response_b": "a", "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    assert only([row]) == {**PAIR, "chosen_probability": 1.0}
    tie = {**row, "winner_model_b": 0, "winner_tie": 1}
    assert only([tie])["chosen_probability"] == 0.5
    with pytest.raises(Unfit, match="not exactly one winner"):
        convert(recognise([row], None, "x"), {**row, "winner_tie": 1})


def test_whole_conversations_with_a_winner_share_their_prompt():
    row = {"winner": "model_b", "conversation_a": [user("q"), assistant("b")], "conversation_b": [user("q"), assistant("a")]}
    assert only([row]) == {**PAIR, "chosen_probability": 1.0}


def test_a_label_of_one_means_the_first_where_the_scores_say_so():
    """SHP: labels is 1 where A is preferred, which other files write as 0."""
    row = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 2}
    other = {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 1, "score_B": 2}
    _, records, _ = converted([row, other])
    assert [record["chosen"][0]["content"] for record in records] == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "first", "second", "coding"),
    [
        ([1, 2, 0], "response1", "response2", "1/2"),
        ([1, 2], "output_1", "output_2", "1/2"),
        (["1", "2", "Tie", "garbage"], "output_1", "output_2", "1/2"),
        ([0, 1], "response_0", "response_1", "0/1"),
        ([1], "response_0", "response_1", "0/1"),
        ([0, 1], "output_a", "output_b", "0/1"),
        ([-3, 1, 0], "response1", "response2", "signed"),
        (["A", "B", "C"], "a", "b", "names"),
        (["answer_0", "answer_1"], "answer_0", "answer_1", "names"),
        ([1, 5, 9], "response1", "response2", ""),
        ([0.5, 0.7], "response1", "response2", ""),
        (["because it is longer", "hard to say"], "response1", "response2", ""),
    ],
)
def test_codings_are_told_by_all_values_and_the_counting_of_the_columns(values, first, second, coding):
    assert coding_of(values, first, second) == coding


@pytest.mark.parametrize(
    ("said", "share"), [("A", 1.0), ("[[B]]", 0.0), ("A>>B", 1.0), ("A=B", 0.5), ("both", 0.5), ("A or B", None), ("", None)]
)
def test_what_a_judge_says(said, share):
    assert share_of_first(said, "names", "answer_a", "answer_b") == share


def test_counted_votes_are_a_share_and_scores_a_margin():
    row = {"prompt": "q", "output_1": "b", "output_2": "a"}
    assert only([row | {"votes_1": 1, "votes_2": 3}]) == {**PAIR, "chosen_probability": 0.75}
    assert only([row | {"score_1": -0.5, "score_2": 0.5}]) == {**PAIR, "margin": 1.0}
    assert only([row | {"score_1": 0, "score_2": 0}])["chosen_probability"] == 0.5
    question = {"question": {"id": "1", "full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": 0.0}
    assert only([question]) == {**PAIR, "margin": 1.0}


LISTS = {
    "scored items": {"instruction": "q", "completions": [{"response": t, "overall_score": s} for t, s in (("b", 2), ("a", 5), ("c", 2))]},
    "parallel lists": {"input": "q", "generation_models": ["x", "y", "z"], "generations": ["b", "a", "c"], "ratings": [2, 5, 2]},
    "columns": {"prompt": "q", **{f"response_{i}": t for i, t in enumerate("bac")}, **{f"score_{i}": s for i, s in enumerate((2, 5, 2))}},
    "by author": {"question": "q", "answers": [{"author": "x", "text": t, "pm_score": s} for t, s in (("b", 2), ("a", 5), ("c", 2))]},
}


@pytest.mark.parametrize("name", LISTS)
def test_rated_replies_give_every_two_with_different_scores(name):
    _, records, _ = converted([LISTS[name]])
    assert records == [{**PAIR, "margin": 3.0}, {**PAIR, "rejected": [assistant("c")], "margin": 3.0}]


def test_in_ranks_the_lowest_is_the_best_and_no_margin():
    answers = [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}]
    assert only([{"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": answers}]) == PAIR


def test_a_choice_of_two_summaries():
    row = {"info": {"post": "q", "title": "t"}, "summaries": [{"text": "b", "policy": "x"}, {"text": "a", "policy": "y"}], "choice": 1}
    assert only([row]) == {**PAIR, "chosen_probability": 1.0}


def test_unpaired_labels_are_paired_where_a_prompt_has_both():
    rows = [
        {"prompt": p, "completion": c, "label": good}
        for p, c, good in (("q", "a", True), ("r", "x", True), ("q", "b", False), ("q", "c", False))
    ]
    _, records, unfit = converted(rows)
    assert records == [PAIR, {**PAIR, "rejected": [assistant("c")]}]
    assert unfit == {"no pair: the prompt has only good (or only bad) replies": 1}


def test_unpaired_labels_as_text_and_as_messages():
    rows = [{"messages": [user("q"), assistant(text)], "kto_tag": good} for text, good in (("b", "False"), ("a", "True"))]
    assert only(rows) == PAIR


def test_one_rated_reply_a_row():
    rows = [{"prompt": "q", "response": text, "helpfulness": score, "verbosity": 1} for text, score in (("b", 1), ("a", 4))]
    assert only(rows) == {**PAIR, "margin": 3.0}
    assert converted(rows, "conversation")[0].name == "prompt/completion"


@needs_shared
def test_real_verdicts_on_pairs():
    rows = shared_rows("preference/finegrained_qa_feedback_a.json.gz")
    _, records, _ = converted(rows)
    ties = sum(record["chosen_probability"] == 0.5 for record in records)
    replies = [[row[f"prediction {i}"] for i in (1, 2, 3, 4)] for row in rows]
    firsts = [text for four in replies for i, text in enumerate(four) for _ in four[i + 1 :]]
    seconds = [other for four in replies for i in range(4) for other in four[i + 1 :]]
    decided = [(r["chosen"][0]["content"], a, b) for r, a, b in zip(records, firsts, seconds, strict=True) if r["chosen_probability"] == 1]
    assert ties == 216
    assert len(decided) == 833 + 541
    assert sum(chosen == a for chosen, a, b in decided if a != b) - sum(a != b for _, a, b in decided) <= -500
    assert records[0]["prompt"][0]["content"].startswith("Drag Me to Hell\n")
    assert records[0]["prompt"][0]["content"].endswith(rows[0]["question"])


@needs_shared
def test_real_votes_are_counted_as_the_annotators_gave_them():
    rows = [row for row in shared_rows("preference/pandalm_testset_a.json.gz") if isinstance(row["response1"], str)]
    rows = [row for row in rows if isinstance(row["response2"], str)]
    _, records, _ = converted(rows)
    for row, record in zip(rows, records, strict=True):
        votes = Counter(row[f"annotator{i}"] for i in (1, 2, 3))
        more = (votes[1] >= votes[2]) + 0
        assert record["chosen"][0]["content"] == row["response1" if more else "response2"]
        assert math.isclose(record["chosen_probability"], (max(votes[1], votes[2]) + votes[0] / 2) / 3)


@needs_shared
def test_real_transcripts_and_turns():
    _, hh, _ = converted(shared_rows("preference/hh_harmless_test_a.jsonl.gz"))
    assert sum(not record[side][0]["content"] for record in hh for side in ("chosen", "rejected")) == 2
    assert all(record["prompt"][-1]["role"] == "user" for record in hh)
    _, dpo, _ = converted(shared_rows("preference/dpo_en_demo.json.gz"))
    assert sum(record["prompt"][0]["role"] == "system" for record in dpo) == 80


@needs_shared
def test_real_trees_have_114_turns_with_ranked_replies():
    _, records, unfit = converted(shared_rows("instruction/oasst_trees_a.jsonl.gz"), "preference")
    assert len(records) == 426
    assert len({str(record["prompt"]) for record in records}) == 114
    assert not unfit
