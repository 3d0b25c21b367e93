"""The endpoint judge against a real HTTP server that fails in every way there is."""

import asyncio
import gc
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from contextlib import closing
from email.utils import formatdate
from pathlib import Path

import faulty_server as made
import pytest
from faulty_server import MODEL, FaultyServer

from align.errors import AlignError
from align.judge import endpoint
from align.judge.ask import judge_pairs
from align.judge.endpoint import EndpointJudge
from align.judge.judgement import Pair, combine
from align.judge.ledger import Ledger
from align.prompts import PromptTemplate
from align.settings import JudgeSettings

KEY = "sk-planted-0123456789abcdef"
PAIR = "kind: pair\nfirst: A\nsecond: B\nreply: verdict\n---\n[user]\n$prompt\nA: $first\nB: $second\nOne letter."
REASONING = PAIR.replace("reply: verdict", "reply: reasoning\nverdict: Verdict:")
TIES = PAIR.replace("reply:", "tie: C\nreply:")
SCORE = "kind: score\nlowest: 1\nhighest: 10\nreply: verdict\n---\n[user]\n$prompt\n$completion\nA number."


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses, and no key and no proxy of whoever runs the tests."""
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ctrl_c():
    """As at a terminal: a shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_when_asked(server, count):
    """Ctrl-C, as soon as the server has been asked so often."""

    def wait():
        while len(server.requests) < count:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def judge_at(server, template=PAIR, model=MODEL, **settings):
    settings = {"retries": 2, "timeout": 10.0, "concurrency": 1, **settings}
    return EndpointJudge(server.url, model, PromptTemplate.parse(template, "test.txt"), JudgeSettings(**settings))


def make_pairs(count):
    """Pairs whose a is better where the number is even."""
    pairs = []
    for number in range(count):
        good, bad = ([{"role": "assistant", "content": f"{word} {number}"}] for word in ("GOOD", "BAD"))
        a, b = (good, bad) if number % 2 == 0 else (bad, good)
        pairs.append(Pair([{"role": "user", "content": f"question {number}"}], a, b))
    return pairs


def make_questions(count):
    return [question for pair in make_pairs((count + 1) // 2) for question in pair.questions()][:count]


def ask(judge, questions):
    """All replies, in the order of the questions; each is told once."""
    told = {}

    def tell(place, reply):
        assert place not in told
        told[place] = reply

    judge.ask(questions, tell)
    assert sorted(told) == list(range(len(questions)))
    return [told[place] for place in range(len(questions))]


def refused(judge, questions, told=None):
    """The message the judge stops with."""
    told = {} if told is None else told
    with pytest.raises(AlignError) as stop:
        judge.ask(questions, told.__setitem__)
    return str(stop.value)


def truth(questions):
    return ["first" if question.first[0]["content"].startswith("GOOD") else "second" for question in questions]


# What is asked, and how replies are read


def test_log_probabilities_are_read_and_every_label_is_right_in_both_orders():
    pairs = make_pairs(6)
    with FaultyServer() as server:
        replies = ask(judge_at(server, concurrency=3), [q for pair in pairs for q in pair.questions()])
    judgements = [combine(*replies[2 * i : 2 * i + 2]) for i in range(6)]
    assert [j.verdict for j in judgements] == ["a", "b"] * 3
    assert [j.probability for j in judgements] == pytest.approx([0.9, 0.1] * 3)
    assert replies[0].log_odds == pytest.approx(math.log(9))
    assert replies[0].logprobs == pytest.approx({"A": math.log(0.9), "B": math.log(0.1)})
    request = server.requests[0]
    assert {name: value for name, value in request.items() if name != "messages"} == {
        "model": MODEL,
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 1,
        "temperature": 0,
    }
    assert [{"role": "user", "content": "question 0\nA: GOOD 0\nB: BAD 0\nOne letter."}] in [r["messages"] for r in server.requests]


def test_tokens_are_matched_with_white_space_around_them_and_ties_are_shared():
    def mind(asked):
        return {"A": 0.2, " A": 0.3, "B\n": 0.1, "C": 0.2, "The": 0.2}

    with FaultyServer([made.ok(mind)] * 2) as server:
        reply, shared = (ask(judge_at(server, template), make_questions(1))[0] for template in (PAIR, TIES))
    assert reply.logprobs == pytest.approx({"A": math.log(0.5), "B": math.log(0.1)})
    assert reply.log_odds == pytest.approx(math.log(5))
    assert shared.log_odds == pytest.approx(math.log(0.6 / 0.2))


@pytest.mark.parametrize(("listed", "odds"), [({"A": 0.9}, 9.0), ({"A": 0.9, "The": 0.02}, 45.0), ({"A": 1.0}, 1e6)])
def test_an_answer_that_is_not_listed_is_as_likely_as_it_can_be(listed, odds):
    """No likelier than the least that is listed, nor than what is left of 1: 0.1, 0.02, and for lack of digits a millionth."""
    with FaultyServer([made.ok(lambda asked: listed)]) as server:
        [reply] = ask(judge_at(server), make_questions(1))
    assert reply.log_odds == pytest.approx(math.log(odds))
    assert list(reply.logprobs) == ["A"]


def test_a_judge_that_would_write_something_else_is_unparsed():
    with FaultyServer([made.ok(lambda asked: {"The": 0.93, "A": 0.05, "B": 0.02})]) as server:
        [reply] = ask(judge_at(server), make_questions(1))
    assert (reply.said, reply.raw, reply.log_odds) == ("unparsed", "The", None)


def test_a_server_that_ignores_logprobs_is_read_from_what_it_writes(capsys):
    questions = make_questions(6)
    with FaultyServer(afterwards=made.text()) as server:
        replies = ask(judge_at(server, max_new_tokens=9), questions)
    assert [reply.said for reply in replies] == truth(questions)
    assert {(reply.log_odds, reply.logprobs) for reply in replies} == {(None, None)}
    assert len(server.requests) == 7  # the first question is asked again, for its reply was cut to one token
    assert all("logprobs" not in request and request["max_tokens"] == 9 for request in server.requests[1:])
    assert capsys.readouterr().out.count("gives no log-probabilities") == 1


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}, {"tokens": ["A"]}, {"content": [{"token": "A"}]}, "x"])
def test_any_form_of_no_logprobs_is_none(logprobs):
    with FaultyServer(afterwards=made.body(made.completion("B", logprobs=logprobs))) as server:
        [reply] = ask(judge_at(server), make_questions(1))
    assert (reply.said, reply.log_odds) == ("second", None)


def test_a_server_that_refuses_logprobs_is_asked_without_them_from_then_on(capsys):
    questions = make_questions(12)
    with FaultyServer(afterwards=made.refuses("logprobs", made.text())) as server:
        judge = judge_at(server, concurrency=4)
        replies = ask(judge, questions) + ask(judge, questions)
    assert [reply.said for reply in replies] == truth(questions) * 2
    assert sum("logprobs" in request for request in server.requests) <= 4  # those under way when the first was refused
    assert len([request for request in server.requests if "logprobs" not in request]) == 24
    assert capsys.readouterr().out.count("gives no log-probabilities") == 1


def test_newer_models_are_asked_as_they_want_it(capsys):
    with FaultyServer(afterwards=made.refuses("max_tokens", made.refuses("temperature", made.ok()))) as server:
        replies = ask(judge_at(server), make_questions(3))
    assert [reply.said for reply in replies] == truth(make_questions(3))
    last = server.requests[-1]
    assert last["max_completion_tokens"] == 1
    assert not {"max_tokens", "temperature"} & set(last)
    assert len(server.requests) == 5
    assert "takes no temperature" in capsys.readouterr().out


def test_reasons_are_written_and_the_verdict_follows_them():
    def mind(asked):
        return f"They differ.\nVerdict: {'A' if made.knows_the_truth(asked)['A'] > 0.5 else 'B'}"

    questions = make_questions(4)
    with FaultyServer(afterwards=made.text(mind)) as server:
        replies = ask(judge_at(server, REASONING, max_new_tokens=77), questions)
    assert [reply.said for reply in replies] == truth(questions)
    assert replies[0].raw == "They differ.\nVerdict: A"
    assert len(server.requests) == 4
    assert all(request["max_tokens"] == 77 and "logprobs" not in request for request in server.requests)


@pytest.mark.parametrize("cut", ["Completion A is well meant, but", "I think. Verdict:", ""])
def test_reasons_cut_before_the_verdict_are_unparsed_and_kept(cut):
    with FaultyServer([made.says(cut, "length")]) as server:
        [reply] = ask(judge_at(server, REASONING), make_questions(1))
    assert (reply.said, reply.raw) == ("unparsed", cut)


def test_a_refusal_is_unparsed_and_kept():
    choice = {"message": {"role": "assistant", "content": None, "refusal": "I cannot compare these."}, "finish_reason": "stop"}
    with FaultyServer([made.body({"choices": [choice]})]) as server:
        [reply] = ask(judge_at(server, REASONING), make_questions(1))
    assert (reply.said, reply.raw, reply.prompt_tokens) == ("unparsed", "I cannot compare these.", None)


def test_scores_are_written_as_1_begins_10():
    questions = [make_questions(1)[0].__class__(q.prompt, q.first) for q in make_questions(2)]
    with FaultyServer(afterwards=made.text(lambda asked: "10" if "GOOD" in asked else "3")) as server:
        replies = ask(judge_at(server, SCORE), questions)
    assert [reply.score for reply in replies] == [10, 3]
    assert "logprobs" not in server.requests[0]


def test_tokens_seconds_and_price_are_each_questions_own():
    with FaultyServer([made.slow(0.5), made.ok()]) as server:
        slow, quick = ask(judge_at(server, prompt_price=2.0, completion_price=10.0), make_questions(2))
        [free] = ask(judge_at(server, prompt_price=2.0), make_questions(1))
    assert (slow.prompt_tokens, slow.completion_tokens) == (100, 2)
    assert slow.price == pytest.approx((100 * 2 + 2 * 10) / 1e6)
    assert free.price is None
    assert slow.seconds > 0.5
    assert slow.seconds > quick.seconds > 0


def test_without_usage_tokens_and_price_are_unknown():
    with FaultyServer([made.body({"choices": [{"message": {"content": "Verdict: A"}}]})]) as server:
        [reply] = ask(judge_at(server, REASONING, prompt_price=1.0, completion_price=1.0), make_questions(1))
    assert (reply.said, reply.prompt_tokens, reply.completion_tokens, reply.price) == ("first", None, None, None)


# Faults that pass

PASSING = {
    "429": made.status(429, "slow down"),
    "500": made.status(500),
    "502": made.status(502),
    "503": made.status(503),
    "504": made.status(504),
    "overloaded": made.status(529),
    "dropped": made.dropped,
    "garbage": made.garbage,
    "cut JSON": made.cut_json,
    "cut body": made.cut_body,
    "not an object": made.body(["A"]),
    "no choices": made.body({"id": "x", "choices": []}),
    "an error with status 200": made.body({"error": {"message": "out of memory"}}),
    "no message": made.body({"choices": [{"finish_reason": "stop"}]}),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_asked_again(fault, capsys):
    questions = make_questions(3)
    with FaultyServer([made.ok(), PASSING[fault], PASSING[fault], made.ok()]) as server:
        replies = ask(judge_at(server), questions)
    assert [reply.said for reply in replies] == truth(questions)
    assert list(server.times_asked().values()) == [1, 3, 1]
    assert server.times[2] - server.times[1] >= 0.01
    assert server.times[3] - server.times[2] >= 0.02
    assert capsys.readouterr().out.count("Asking again, up to 2 times a question.") == 1


def test_what_a_server_says_is_shown_as_it_is(capsys):
    with FaultyServer([made.status(500, "[/red] \x1b[2J [bold]no[/bold]")]) as server:
        ask(judge_at(server), make_questions(1))
    assert r"HTTP 500: [/red] \x1b[2J [bold]no[/bold]. Asking" in capsys.readouterr().out


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_stops_and_what_came_before_was_told(fault):
    told, questions = {}, make_questions(4)
    with FaultyServer([made.ok(), made.ok()], afterwards=PASSING[fault]) as server:
        message = refused(judge_at(server), questions, told)
    assert sorted(told) == [0, 1]
    assert list(server.times_asked().values()) == [1, 1, 3]
    assert f"judge endpoint {server.url}, model 'planted': no reply after 3 attempts; at the last there was " in message
    assert "run the same again: what it has answered is kept" in message


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("429", "HTTP 429: slow down"),
        ("dropped", "no connection (RemoteProtocolError: "),
        ("garbage", "no chat completion but '<html>"),
        ("cut JSON", 'no chat completion but \'{"id": "chatcmpl-1"'),
        ("an error with status 200", "out of memory"),
    ],
)
def test_the_message_says_what_there_was(fault, said):
    with FaultyServer(afterwards=PASSING[fault]) as server:
        assert said in refused(judge_at(server, retries=0), make_questions(1))
        assert len(server.requests) == 1


def test_no_reply_in_time():
    questions = make_questions(2)
    with FaultyServer([made.slow(60), made.ok(), made.slow(60)], afterwards=made.trickling(0.05)) as server:
        told, begun = {}, time.monotonic()
        message = refused(judge_at(server, timeout=1.0, retries=1), questions, told)
        assert time.monotonic() - begun < 30
    assert [told[0].said] == truth(questions)[:1]
    assert told[0].seconds < 1  # of the request that was answered
    assert list(server.times_asked().values()) == [2, 2]
    assert "no reply within 1 s" in message
    assert "(timeout, retries)" in message


def test_an_empty_reply_is_asked_again():
    questions = make_questions(2)
    with FaultyServer([made.says("")] * 2 + [made.says("Verdict: B"), made.says(None), made.says("Verdict: A")]) as server:
        replies = ask(judge_at(server, REASONING), questions)
    assert [reply.said for reply in replies] == ["second", "first"]
    assert list(server.times_asked().values()) == [3, 2]


def test_a_server_that_only_sends_empty_replies_stops():
    with FaultyServer(afterwards=made.says(" \n")) as server:
        message = refused(judge_at(server, REASONING), make_questions(4))
    assert "no reply after 3 attempts; at the last there was an empty reply." in message
    assert len(server.requests) == 3


def test_one_question_with_nothing_but_empty_replies_is_unparsed():
    """A server that answers other questions may have nothing to say to this one: it must not keep the rest from being asked."""
    with FaultyServer([made.says("Verdict: A"), *[made.says("")] * 3, made.says("Verdict: B")]) as server:
        replies = ask(judge_at(server, REASONING), make_questions(3))
    assert [reply.said for reply in replies] == ["first", "unparsed", "second"]
    assert (replies[1].raw, replies[1].prompt_tokens) == ("", 100)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_holds_for_all_questions(form):
    """A date has whole seconds, so it may be up to one second early."""
    wait = {"seconds": lambda: "1", "date": lambda: formatdate(time.time() + 2, usegmt=True)}[form]

    def limited(handler):
        made.status(429, headers={"Retry-After": wait()})(handler)

    questions = make_questions(8)
    with FaultyServer([limited, made.slow(0.4)]) as server:  # the second question is under way when the first is turned away
        replies = ask(judge_at(server, concurrency=2, retries=1), questions)
    assert [reply.said for reply in replies] == truth(questions)
    assert len(server.requests) == 9
    assert server.times[2] - server.times[0] > 0.95


def test_retry_after_in_every_form():
    now = 1_700_000_000.0
    wait = {
        "3": 3.0,
        "0.5": 0.5,
        formatdate(now + 60, usegmt=True): 60.0,
        formatdate(now - 60, usegmt=True): None,
        "0": None,
        "-1": None,
        "soon": None,
        "nan": None,
        "": None,
        None: None,
    }
    assert {value: endpoint._retry_after(value, lambda: now) for value in wait} == wait


def test_a_server_that_wants_a_long_rest_is_left_alone():
    with FaultyServer(afterwards=made.status(429, "quota", {"Retry-After": "86400"})) as server:
        message = refused(judge_at(server), make_questions(2))
    assert len(server.requests) == 1
    assert "no reply after 1 attempt; at the last there was HTTP 429: quota. It wants to be left alone for 86,400 s." in message


def test_a_server_that_dies_half_way_stops_and_every_reply_was_told():
    told, questions = {}, make_questions(9)
    with FaultyServer([made.ok()] * 5, afterwards=made.dies) as server:
        message = refused(judge_at(server), questions, told)
    assert [told[place].said for place in range(5)] == truth(questions)[:5]
    assert len(told) == 5
    assert "no connection (ConnectError: " in message


# Refusals, which stay


@pytest.mark.parametrize("code", [400, 402, 413, 422])
def test_a_bad_request_stops_at_once(code):
    told = {}
    with FaultyServer([made.ok()], afterwards=made.status(code, "context length exceeded")) as server:
        message = refused(judge_at(server), make_questions(3), told)
    assert len(server.requests) == 2
    assert list(told) == [0]
    assert f"judge endpoint {server.url}, model 'planted': HTTP {code}: context length exceeded." in message
    assert "the prompt 'question 0'" in message


def test_replies_on_their_way_are_told_before_it_stops(monkeypatch):
    """Of three questions one is refused while two are being answered; a fourth waits to be asked again, and others have not been asked."""
    told, questions = {}, make_questions(9)
    late_refusal = [made.slow(0.8), made.slow(0.9), made.status(500), lambda handler: (time.sleep(0.3), made.status(400)(handler))]
    monkeypatch.setattr(endpoint, "BACKOFF", 30.0)
    with FaultyServer(late_refusal) as server:
        judge = judge_at(server, concurrency=4)
        begun = time.monotonic()
        message = refused(judge, questions, told)
        assert 0.9 < time.monotonic() - begun < 20
        assert len(server.requests) == 4
    assert "HTTP 400" in message
    assert len(told) == 2
    assert all(reply.said == truth(questions)[place] for place, reply in told.items())


def test_a_model_that_is_not_there_stops_at_once_and_those_that_are_there_are_named():
    with FaultyServer(afterwards=made.status(404, "The model `plantain` does not exist")) as server:
        message = refused(judge_at(server, model="plantain"), make_questions(3))
    assert len(server.requests) == 1
    assert f"judge endpoint {server.url}, model 'plantain': HTTP 404: The model `plantain` does not exist." in message
    assert "Expected one of the models that it serves: 'planted'." in message


def test_a_url_that_is_not_the_apis_is_told_by_its_missing_list():
    with FaultyServer(afterwards=made.status(404, "Not Found")) as server:
        judge = EndpointJudge(f"{server.url}/elsewhere/", MODEL, PromptTemplate.parse(PAIR, "t"), JudgeSettings(retries=0))
        message = refused(judge, make_questions(1))
    assert f"judge endpoint {server.url}/elsewhere, model" in message
    assert "It usually ends in /v1." in message


@pytest.mark.parametrize("code", [401, 403])
def test_a_bad_key_stops_at_once_and_is_nowhere(code, monkeypatch, caplog, capsys):
    monkeypatch.setenv("ALIGN_JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with FaultyServer([made.ok()], afterwards=made.status(code, f"Incorrect API key provided: {KEY}")) as server:
        judge = judge_at(server)
        with pytest.raises(AlignError) as stop:
            judge.ask(make_questions(4), lambda place, reply: None)
    assert server.keys == [f"Bearer {KEY}"] * 2
    assert f"HTTP {code}: Incorrect API key provided: ***. Expected a key that the endpoint takes; the one in ALIGN_JUDGE_KEY" in str(
        stop.value
    )
    error = stop.value
    assert error.__cause__ is None
    assert error.__context__ is None
    inside = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    told = capsys.readouterr()
    assert "create" in caplog.text or "HTTP Request" in caplog.text
    for text in (str(error), inside, repr(judge), str(vars(judge)), caplog.text, told.out, told.err):
        assert KEY not in text


@pytest.mark.parametrize("fault", [made.dropped, made.status(500, KEY), made.body({"error": KEY}), made.slow(2)])
def test_the_key_is_in_no_message_about_a_fault(fault, monkeypatch):
    monkeypatch.setenv("ALIGN_JUDGE_KEY", KEY)
    with FaultyServer(afterwards=fault) as server, pytest.raises(AlignError) as stop:
        judge_at(server, retries=1, timeout=0.5).ask(make_questions(2), lambda place, reply: None)
    assert stop.value.__context__ is None
    assert KEY not in "".join(traceback.TracebackException.from_exception(stop.value, capture_locals=True).format())


def test_a_server_that_repeats_the_key_puts_it_in_no_reply(monkeypatch):
    monkeypatch.setenv("ALIGN_JUDGE_KEY", KEY)
    with FaultyServer([made.says(f"You sent {KEY}.\nVerdict: A")]) as server:
        [reply] = ask(judge_at(server, REASONING), make_questions(1))
    assert reply.raw == "You sent ***.\nVerdict: A"


def test_the_key_comes_from_the_environment(monkeypatch):
    with FaultyServer() as server:
        ask(judge_at(server), make_questions(1))
        monkeypatch.setenv("OPENAI_API_KEY", "theirs")
        ask(judge_at(server), make_questions(1))
        monkeypatch.setenv("ALIGN_JUDGE_KEY", "ours\n")
        ask(judge_at(server), make_questions(1))
    assert server.keys == ["Bearer none", "Bearer theirs", "Bearer ours"]


@pytest.mark.parametrize("key", ["two words-0123", "two\nlines-0123", "schlüssel-0123"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with FaultyServer() as server:
        message = refused(judge_at(server), make_questions(1))
    assert message.startswith("OPENAI_API_KEY: holds a space, a line end or a letter that no key has")
    assert "0123" not in message


def test_without_a_key_the_message_says_so():
    with FaultyServer(afterwards=made.status(401, "no key")) as server:
        message = refused(judge_at(server), make_questions(1))
    assert (
        "none was sent, for neither ALIGN_JUDGE_KEY nor OPENAI_API_KEY is set.\n  Set the environment variable ALIGN_JUDGE_KEY." in message
    )


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http:///v1", "embedded"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(AlignError, match="is no url of an endpoint; expected one such as"):
        EndpointJudge(url, MODEL, PromptTemplate.parse(PAIR, "t"), JudgeSettings())


@pytest.mark.parametrize("url", [f"https://me:{KEY}@host/v1", f"https://host/v1?api_key={KEY}", f"https://{KEY}@host/v1"])
def test_a_url_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(AlignError, match="judge https://host: the url holds a name, password, query or fragment") as stop:
        EndpointJudge(url, MODEL, PromptTemplate.parse(PAIR, "t"), JudgeSettings())
    assert KEY not in str(stop.value)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(AlignError, match="the package openai is not installed. Install it with:\n  pip install openai"):
        EndpointJudge("http://localhost:1/v1", MODEL, PromptTemplate.parse(PAIR, "t"), JudgeSettings())


def test_a_template_that_is_no_judges_is_refused():
    template = PromptTemplate.parse("kind: critique\n---\n[user]\n$prompt", "critique.txt")
    with pytest.raises(AlignError, match="critique.txt:1: is a template of kind 'critique'; expected 'pair' or 'score'"):
        EndpointJudge("http://localhost:1/v1", MODEL, template, JudgeSettings())


# Many at once


def test_no_more_questions_are_under_way_than_said():
    questions = make_questions(24)
    with FaultyServer(afterwards=made.slow(0.2)) as server:
        begun = time.monotonic()
        replies = ask(judge_at(server, concurrency=6), questions)
        seconds = time.monotonic() - begun
    assert [reply.said for reply in replies] == truth(questions)
    assert 2 <= server.busiest <= 6
    assert seconds < 24 * 0.2  # which is the least they would take one after another


class Endless:
    """A million questions, of which only those that were looked at exist."""

    def __init__(self):
        self.made = 0

    def __len__(self):
        return 1_000_000

    def __getitem__(self, place):
        self.made += 1
        return make_questions(1)[0]


def test_a_million_questions_are_not_under_way_at_once():
    questions, told = Endless(), []

    def tell(place, reply):
        told.append((len(asyncio.all_tasks()), questions.made))
        if len(told) == 20:
            raise AlignError("enough")

    with FaultyServer() as server, pytest.raises(AlignError, match="enough"):
        judge_at(server, concurrency=5).ask(questions, tell)
    assert max(tasks for tasks, _ in told) <= 6
    assert all(made <= number + 5 for number, (_, made) in enumerate(told))
    assert len(server.requests) <= 26


def test_what_on_reply_raises_comes_out_as_it_is():
    """A full disk, a budget: nobody is asked any more."""

    class Full(Exception):
        pass

    def full(place, reply):
        raise Full

    with FaultyServer(afterwards=made.slow(0.05)) as server:
        with pytest.raises(Full):
            judge_at(server, concurrency=4).ask(make_questions(40), full)
        asked = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == asked <= 8


def test_an_interrupt_cancels_what_is_under_way(ctrl_c):
    threads, told = threading.active_count(), {}
    with FaultyServer([made.ok()] * 3, afterwards=made.slow(120)) as server:
        judge, begun = judge_at(server, concurrency=2, timeout=100.0), time.monotonic()
        interrupt_when_asked(server, 5)
        with pytest.raises(KeyboardInterrupt):
            judge.ask(make_questions(20), told.__setitem__)
        assert time.monotonic() - begun < 60
        assert len(server.requests) == 5
    assert len(told) == 3
    gc.collect()  # an event loop left open would warn here
    assert threading.active_count() <= threads + 3  # the server's
    with FaultyServer() as server:
        assert len(ask(judge, [])) == 0
        assert len(ask(judge_at(server), make_questions(2))) == 2


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux lists them")
def test_no_event_loop_and_no_connection_is_left():
    with FaultyServer() as server:
        judge = judge_at(server)
        ask(judge, make_questions(2))
        before = open_files()
        for _ in range(3):
            ask(judge, make_questions(2))
        deadline = time.monotonic() + 5
        while open_files() > before and time.monotonic() < deadline:  # the server's ends of the connections close a moment later
            time.sleep(0.02)
        assert open_files() <= before


def test_it_works_where_a_loop_is_running_already():
    questions = make_questions(4)

    async def notebook(judge):
        return ask(judge, questions)

    with FaultyServer() as server:
        replies = asyncio.run(notebook(judge_at(server)))
    assert [reply.said for reply in replies] == truth(questions)


def test_errors_and_interrupts_come_out_of_a_running_loop_too(ctrl_c):
    async def notebook(judge):
        judge.ask(make_questions(4), lambda place, reply: None)

    with FaultyServer(afterwards=made.status(403)) as server, pytest.raises(AlignError, match="HTTP 403"):
        asyncio.run(notebook(judge_at(server)))

    with FaultyServer(afterwards=made.slow(120)) as server:
        begun = time.monotonic()
        interrupt_when_asked(server, 1)
        signal.signal(signal.SIGINT, lambda *_: signal.default_int_handler(*_))  # as in a notebook: asyncio leaves it alone
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(notebook(judge_at(server, timeout=100.0)))
        assert time.monotonic() - begun < 60


def test_the_names_are_what_a_ledger_keeps():
    template = PromptTemplate.parse(PAIR, "t")
    judge = EndpointJudge("http://localhost:1/v1/", "m", template, JudgeSettings())
    assert (judge.name, judge.model, judge.template) == ("endpoint http://localhost:1/v1", "m", template.fingerprint)


# Through the ledger

JUDGE = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
import faulty_server
from test_endpoint import KEY, PAIR, make_pairs
from align.errors import AlignError
from align.judge import endpoint
from align.judge.ask import judge_pairs
from align.judge.ask import judge_pairs
from align.judge.endpoint import EndpointJudge
from align.judge.ledger import Ledger
from align.prompts import PromptTemplate
from align.settings import JudgeSettings

endpoint.BACKOFF = 0.01
settings = JudgeSettings(retries=1, timeout=20.0, concurrency=4)
judge = EndpointJudge(sys.argv[1], faulty_server.MODEL, PromptTemplate.parse(PAIR, "test.txt"), settings)
judgements = judge_pairs(judge, make_pairs(40), Ledger(Path(sys.argv[2])), settings)
print("verdicts", "".join(judgement.verdict for judgement in judgements))
"""


def judge_in_a_process(server, ledger):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "ALIGN_JUDGE_KEY": KEY}
    return subprocess.Popen(
        [sys.executable, "-c", JUDGE, server.url, str(ledger)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def answered(ledger):
    with closing(sqlite3.connect(ledger)) as file:
        return file.execute("SELECT count(*) FROM replies").fetchone()[0]


def no_key_in(folder):
    return not any(KEY.encode() in path.read_bytes() for path in folder.iterdir())


def test_killed_nothing_answered_is_lost_and_nothing_answered_is_asked_again(tmp_path):
    """80 questions, killed twice. Only those under way when it was killed, 4 at most, may be asked a second time."""
    ledger = tmp_path / "ledger.sqlite"
    with FaultyServer(afterwards=made.slow(0.02)) as server:
        known = []
        for enough in (20, 50):
            running = judge_in_a_process(server, ledger)
            deadline = time.monotonic() + 60
            while len(server.requests) < enough and running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(running.pid, signal.SIGKILL)
            assert running.wait(30) == -signal.SIGKILL, running.stderr.read()
            running.communicate()
            known.append((answered(ledger), len(server.requests)))
            assert no_key_in(tmp_path)
        running = judge_in_a_process(server, ledger)
        out, err = running.communicate(timeout=120)
        assert running.returncode == 0, err
        times = server.times_asked()
    assert out.split()[-1] == "ab" * 20
    assert answered(ledger) == len(times) == 80
    assert 20 - 5 <= known[0][0] < known[1][0] < 80
    assert all(asked - kept <= 4 * (number + 1) for number, (kept, asked) in enumerate(known))
    assert len(server.requests) <= 80 + 2 * 4
    assert max(times.values()) <= 3
    assert no_key_in(tmp_path)


def test_when_the_server_dies_the_ledger_has_every_reply_and_only_the_rest_is_asked_of_the_next(tmp_path):
    ledger = tmp_path / "ledger.sqlite"
    with FaultyServer([made.ok()] * 30, afterwards=made.dies) as server:
        url = server.url
        out, err = judge_in_a_process(server, ledger).communicate(timeout=120)
    assert err.startswith(f"error: judge endpoint {url}, model 'planted': no reply after 2 attempts; at the last there was no connection")
    assert "Traceback" not in err
    assert answered(ledger) == 30
    with FaultyServer(port=int(url.split(":")[2].split("/")[0])) as again:  # another server at the same address
        assert again.url == url
        out, err = judge_in_a_process(again, ledger).communicate(timeout=120)
    assert out.split()[-1] == "ab" * 20, err
    assert len(again.requests) == 80 - 30
    assert not set(again.times_asked()) & {request["messages"][-1]["content"] for request in server.requests[:30]}
    assert no_key_in(tmp_path)


def test_every_label_is_right_through_the_ledger_in_spite_of_every_passing_fault(tmp_path):
    faults = [step for fault in PASSING.values() for step in (fault, made.ok())]
    pairs = make_pairs(16)
    with FaultyServer(faults) as server:
        judge = judge_at(server, concurrency=3, retries=6)
        with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
            judgements = judge_pairs(judge, pairs, ledger, judge.settings)
            asked = len(server.requests)
            again = judge_pairs(judge, pairs, ledger, judge.settings)
    assert asked == len(server.requests) == 32 + len(PASSING)
    assert [judgement.verdict for judgement in judgements] == ["a", "b"] * 8
    assert [judgement.probability for judgement in judgements] == pytest.approx([0.9, 0.1] * 8)
    assert again == judgements


def test_scores_become_verdicts_through_the_ledger(tmp_path):
    with FaultyServer(afterwards=made.text(lambda asked: "8" if "GOOD" in asked else "3")) as server:
        judge = judge_at(server, SCORE)
        with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
            judgements = judge_pairs(judge, make_pairs(4), ledger, judge.settings)
    assert [judgement.verdict for judgement in judgements] == ["a", "b"] * 2
    assert len(server.requests) == 8


def test_an_interrupt_keeps_what_was_answered(tmp_path, ctrl_c):
    with FaultyServer([made.ok()] * 10, afterwards=made.slow(30)) as server:
        running = judge_in_a_process(server, tmp_path / "ledger.sqlite")
        deadline = time.monotonic() + 60
        while len(server.requests) < 14 and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=10)
    assert running.returncode != 0
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert answered(tmp_path / "ledger.sqlite") == 10
