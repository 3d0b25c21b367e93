import gzip
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.judge.verdict import FLOOR, answer_logprobs, from_logprobs, read_recorded, read_reply, read_score
from align.prompts import PromptTemplate


def template(header, body="[user]\n$prompt"):
    return PromptTemplate.parse(f"{header}\n---\n{body}", "mine.txt")


PAIR = template("kind: pair\nfirst: A\nsecond: B\nreply: verdict")
TIED = template("kind: pair\nfirst: A\nsecond: B\ntie: C\nreply: verdict")
REASONS = template("kind: pair\nfirst: A\nsecond: B\ntie: C\nreply: reasoning\nverdict: Verdict:")
SCORE = template("kind: score\nlowest: 1\nhighest: 10\nreply: verdict")
DIGIT = template("kind: score\nlowest: 1\nhighest: 5\nreply: verdict")
RATED = template("kind: score\nlowest: 1\nhighest: 10\nreply: reasoning\nverdict: The score is")

WRITTEN = {
    "first": [
        "A",
        " a\n",
        "A.",
        "**A**",
        "(A)",
        '"A"',
        "[[A]]",
        "Completion A",
        "Answer: A",
        "The better completion is A.",
        "Completion A is better.",
        "A is better because it answers.",
        "A. It is shorter.",
        "A\n\nIt is shorter than B.",
        "I prefer Completion A",
        "My verdict is A, for it is right.",
        "A: right\nB: wrong\nAnswer: A",  # lines that name both are headings
        "**Completion A**\nRight.\n**Completion B**\nWrong.\n\nCompletion A is better.",
    ],
    "unparsed": [
        "",
        " \n",
        "Both are good.",
        "Neither.",
        "A or B",
        "A/B",
        "A and B",
        "Answer: A or B",
        "Answer: A, B",
        "Answer: A. Answer: B.",
        "A\n\nB",
        "A\n\nActually, Completion B is better.",
        "Completion A is better. Completion B is better.",
        "Completion A is not better.",
        "I cannot say whether Completion A is better",
        "It is not clear that Completion A is better.",
        "A better reply would be shorter.",  # an article
        "The better answer is a concise one.",
        "Answer: a short text",
        "Apple",
        "C",
        "ABBA",
        "Completion A stands out for its clear title.",  # praise is no verdict
        "As an AI I cannot judge.",
        "The answer is not A",
    ],
}


@pytest.mark.parametrize(("said", "text"), [(said, text) for said, texts in WRITTEN.items() for text in texts])
def test_a_written_verdict_is_read_or_left_unparsed(said, text):
    assert read_reply(text, PAIR).said == said
    assert read_reply(text, PAIR).raw == text


def swapped(text):
    return "".join({"A": "B", "B": "A", "a": "b", "b": "a"}.get(letter, letter) for letter in text)


@pytest.mark.parametrize("text", ["A", "(A)", "[[A]]", "Answer: A", "Output A", "A.", "**A**"])
def test_exchanging_the_letters_exchanges_the_verdict(text):
    assert read_reply(swapped(text).replace("Bnswer", "Answer"), PAIR).said == "second"


def test_a_tie_is_read_where_the_template_has_one():
    assert read_reply("C", TIED).said == "tie"
    assert read_reply("[[C]]", TIED).said == "tie"
    assert read_reply("Answer: A, B or C", TIED).said == "unparsed"


def test_answers_may_be_words():
    words = template("kind: pair\nfirst: Output (a)\nsecond: Output (b)\nreply: verdict")
    assert read_reply("Output (a)", words).said == "first"
    assert read_reply("Output (b) is better.", words).said == "second"
    assert read_reply("Output (c)", words).said == "unparsed"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A is long.\nVerdict: B", "second"),
        ("**Verdict:** A.", "first"),
        ("**Verdict**: A", "first"),
        ("verdict:\n\nCompletion B", "second"),
        ("Verdict: C", "tie"),
        ("Verdict: A\nVerdict: A", "first"),
        ("Verdict: A is better than B.", "first"),
        ("A", "unparsed"),  # without the announcement it is no verdict yet
        ("Completion A is better.", "unparsed"),
        ("Verdict: A or B", "unparsed"),
        ("Verdict: A, B", "unparsed"),
        ("Verdict: A\nNo. Verdict: B", "unparsed"),
        ("Verdict: both are good", "unparsed"),
        ("Verdict: not A", "unparsed"),
        ("Verdict: A concise text is better", "unparsed"),
        ("Verdict:", "unparsed"),
    ],
)
def test_after_reasons_the_announced_verdict_counts(text, said):
    assert read_reply(text, REASONS).said == said


@pytest.mark.parametrize(
    ("text", "score"),
    [("7", 7), ("7.", 7), ("10", 10), ("7/10", 7), ("7 out of 10", 7), ("Score: 7", 7), ("**7**", 7), ("6.5", 6.5), ("7\n\nIt is good.", 7)]
    + [(text, None) for text in ("11", "0", "-3", "seven", "", "7 or 8", "7/5", "about 7 of them", "7\n\n8", "I give 7 and 8")],
)
def test_a_written_score_is_read_within_its_bounds(text, score):
    assert read_score(text, SCORE) == score
    assert read_reply(text, SCORE).said == ("unparsed" if score is None else "tie")


@pytest.mark.parametrize(
    ("text", "score"),
    [("It is good. The score is 7.", 7), ("the score is: 7", 7), ("**The score is** 7/10", 7)]
    + [(text, None) for text in ("7", "The score is 7. The score is 8.", "The score is high: 7", "The score is 11", "The score is")],
)
def test_after_reasons_the_announced_score_counts(text, score):
    assert read_score(text, RATED) == score


def log(**p):
    return {word: math.log(value) for word, value in p.items()}


def test_log_odds_by_hand():
    """P(A) = 0.6, P(B) = 0.2: log 3. With P(C) = 0.2 shared, (0.6 + 0.1) / (0.2 + 0.1)."""
    reply = from_logprobs(log(A=0.6, B=0.2), PAIR, raw="A")
    assert (reply.said, reply.raw) == ("first", "A")
    assert reply.log_odds == pytest.approx(math.log(3))
    assert reply.logprobs == log(A=0.6, B=0.2)
    tied = from_logprobs(log(A=0.6, B=0.2, C=0.2), TIED)
    assert tied.log_odds == pytest.approx(math.log(0.7 / 0.3))
    assert from_logprobs(log(A=0.3, B=0.2, C=0.5), TIED).said == "tie"
    assert from_logprobs(log(A=0.3, B=0.3), PAIR).said == "tie"


@given(st.floats(0.01, 0.9), st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_exchanging_the_answers_turns_the_log_odds_round(a, b, c):
    total = a + b + c
    one = from_logprobs(log(A=a / total, B=b / total, C=c / total), TIED)
    other = from_logprobs(log(A=b / total, B=a / total, C=c / total), TIED)
    assert one.log_odds == -other.log_odds
    assert {one.said, other.said} in ({"first", "second"}, {"tie"})


def test_a_judge_that_would_not_answer_is_unparsed():
    little = FLOOR / 2.01
    reply = from_logprobs(log(A=little, B=little), PAIR, raw="I")
    assert (reply.said, reply.log_odds, reply.raw) == ("unparsed", None, "I")
    assert reply.logprobs == log(A=little, B=little)
    assert from_logprobs(log(A=FLOOR, B=little), PAIR).said == "first"
    assert from_logprobs({}, PAIR).said == "unparsed"


def test_an_answer_that_is_not_listed_is_no_likelier_than_the_last_that_is():
    reply = from_logprobs(log(A=0.9), PAIR, unseen=math.log(0.01))
    assert reply.log_odds == pytest.approx(math.log(90))
    assert reply.logprobs == log(A=0.9)  # what is not known is not written down
    assert from_logprobs(log(A=0.9), PAIR).said == "unparsed"


def test_the_expected_score_by_hand():
    """(2 * 0.5 + 4 * 0.25) / 0.75."""
    reply = from_logprobs(log(**{"2": 0.5, "4": 0.25}), DIGIT, raw="2")
    assert reply.score == pytest.approx(8 / 3)
    assert (reply.said, reply.log_odds) == ("tie", None)


def test_tokens_of_an_endpoint_that_are_the_same_answer_count_together():
    tokens = log(A=0.3, B=0.1) | {" A": math.log(0.2), "a": math.log(0.1), "Apple": math.log(0.1)}
    assert answer_logprobs(tokens, PAIR) == {"A": pytest.approx(math.log(0.5)), "B": math.log(0.1)}
    assert answer_logprobs(tokens, REASONS) == {}
    assert answer_logprobs(log(**{"1": 0.9}), SCORE) == {}  # it may be the beginning of 10
    assert answer_logprobs(log(**{"1": 0.9}), DIGIT) == log(**{"1": 0.9})


@pytest.mark.parametrize(
    ("text", "said"),
    [("Output (a)", "first"), ("Output (b)\n", "second"), ("1", "first"), ("2", "second"), ("0", "tie"), ("Tie", "tie"), ("[[C]]", "tie")]
    + [("[[B]]", "second"), ("Assistant A is better.", "first"), ("garbage", "unparsed"), ("", "unparsed"), ("3", "unparsed")]
    + [("Both Output (a) and Output (b) are good.", "unparsed"), ("Output (a) does not do it. Neither does Output (b).", "unparsed")]
    + [("2\n\n### Reason: it is shorter", "second"), ("None", "unparsed"), ("Response 1 is better", "first")],
)
def test_replies_recorded_elsewhere(text, said):
    assert read_recorded(text) == said


def test_every_reply_of_llmbars_judges_is_read_as_its_authors_read_it(shared_data):
    said = {"1": "first", "2": "second", None: "unparsed"}
    back = {"1": "2", "2": "1", None: None}  # winner_ba is told in terms of the pair, the reply in terms of the places
    with gzip.open(shared_data / "judge/llmbar_verdicts.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 1152
    replies = [(row["raw_ab"], row["winner_ab"]) for row in rows] + [(row["raw_ba"], back[row["winner_ba"]]) for row in rows]
    assert {winner for _, winner in replies} == set(said)
    assert [text for text, winner in replies if read_recorded(text) != said[winner]] == []


def test_pandalms_verdicts_are_read(shared_data):
    for name, column, unread in (("pandalm_7b", "pandalm_result", 0), ("pandalm_gpt-3.5-turbo", "gpt_result", 15)):
        with gzip.open(shared_data / f"judge/{name}_verdicts_a.json.gz", "rt") as file:
            verdicts = [str(row[column]) for row in json.load(file)]
        found = [read_recorded(verdict) for verdict in verdicts]
        assert found.count("unparsed") == unread
        assert [found.count(said) for said in ("first", "second")] == [verdicts.count("1"), verdicts.count("2")]
