import json
import math
import random
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from align.artifact import Artifact
from align.base import find_base
from align.errors import AlignError
from align.judge import local
from align.judge.ask import judge_pairs
from align.judge.judgement import Pair, Question
from align.judge.ledger import Ledger
from align.judge.local import LocalJudge, windows
from align.judge.verdict import read_reply
from align.model.forward import forward
from align.model.packing import Example, make_row
from align.prompts import PromptTemplate
from align.settings import JudgeSettings

PAIR = PromptTemplate.parse(
    "kind: pair\nfirst: A\nsecond: B\nreply: verdict\n---\n[user]\nBetter?\n$prompt\nA: $first\nB: $second", "pair.txt"
)
TIED = PromptTemplate.parse(
    "kind: pair\nfirst: A\nsecond: B\ntie: C\nreply: verdict\n---\n[system]\nJ\n[user]\n$prompt|$first|$second", "tied.txt"
)
SCORE = PromptTemplate.parse("kind: score\nlowest: 1\nhighest: 12\nreply: verdict\n---\n[user]\n$prompt\n$completion", "score.txt")
REASONS = PromptTemplate.parse(
    "kind: pair\nfirst: A\nsecond: B\nreply: reasoning\nverdict: Verdict:\n---\n[user]\n$prompt|$first|$second", "reasons.txt"
)


def turn(text, role="assistant"):
    return [{"role": role, "content": text}]


def pair(prompt, a, b):
    return Pair(turn(prompt, "user"), turn(a), turn(b))


PAIRS = [pair("say red", "red", "blue"), pair("say red", "red", "reddish"), pair("sing", "la la la", "no"), pair("say it", "x", "y" * 40)]
QUESTIONS = [question for each in PAIRS for question in each.questions()]


@pytest.fixture(scope="module")
def base(tiny_base):
    return find_base(str(tiny_base))


@pytest.fixture(scope="module")
def plain(tiny_base):
    """The model as transformers loads it: what every log-probability is held against."""
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def judge_with(base, template, artifact=None, **settings):
    return LocalJudge(base, artifact, template, JudgeSettings(**settings), "float32")


def answers(judge, questions):
    found = {}

    def on_reply(place, reply):
        assert place not in found
        found[place] = reply

    judge.ask(questions, on_reply)
    return [found[place] for place in range(len(questions))]


@torch.no_grad()
def next_logprobs(plain, ids):
    return torch.log_softmax(plain(torch.tensor([ids])).logits[0].float(), dim=-1)


@pytest.mark.parametrize("template", [PAIR, TIED])
def test_log_probabilities_are_those_of_the_plain_model(base, plain, chat, template):
    judge = judge_with(base, template)
    for question, reply in zip(QUESTIONS, answers(judge, QUESTIONS), strict=True):
        ids = chat.prompt_ids(template.fill(**question.fields()))
        expected = next_logprobs(plain, ids)[-1]
        for word in template.answer_words:
            (token,) = chat.tokenizer.encode(word, add_special_tokens=False)
            assert reply.logprobs[word] == pytest.approx(expected[token].item(), abs=1e-4)
        assert reply.raw == chat.tokenizer.decode([int(expected.argmax())])
        assert (reply.prompt_tokens, reply.completion_tokens, reply.price) == (len(ids), 0, 0.0)
        assert reply.seconds > 0
        mass = sum(map(math.exp, reply.logprobs.values()))
        assert (reply.said == "unparsed") == (mass < 0.1)


def test_neither_order_nor_company_nor_row_size_changes_a_reply(base):
    together = answers(judge_with(base, PAIR), QUESTIONS)
    order = random.Random(1).sample(range(len(QUESTIONS)), len(QUESTIONS))
    shuffled = answers(judge_with(base, PAIR, row_tokens=128), [QUESTIONS[i] for i in order])
    for place, reply in zip(order, shuffled, strict=True):
        assert reply.logprobs == pytest.approx(together[place].logprobs, abs=1e-4)
    judge = judge_with(base, PAIR, row_tokens=16)
    for question, reply in zip(QUESTIONS, together, strict=True):
        assert answers(judge, [question])[0].logprobs == pytest.approx(reply.logprobs, abs=1e-4)


def test_the_padded_way_gives_the_same(base):
    packed, padded = judge_with(base, PAIR), judge_with(base, PAIR)
    trunk = padded._loaded[0]
    trunk.model.set_attn_implementation(trunk.own_attention)
    trunk.packs = False
    for one, other in zip(answers(packed, QUESTIONS), answers(padded, QUESTIONS), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def rows_of(monkeypatch):
    """The rows that are computed from here on."""
    rows, compute = [], local.last_hidden_states
    monkeypatch.setattr(local, "last_hidden_states", lambda trunk, tree: rows.append(tree) or compute(trunk, tree))
    return rows


def test_the_same_question_twice_is_computed_once_and_answered_twice(base, monkeypatch):
    rows = rows_of(monkeypatch)
    same = Question(turn("p", "user"), turn("x"), turn("x"))
    replies = answers(judge_with(base, PAIR), [same, same])
    assert replies[0] == replies[1]
    assert [row.sequences for row in rows] == [(rows[0].sequences[0],)]


def test_both_orders_of_a_pair_share_their_prompt(base, chat, monkeypatch):
    rows = rows_of(monkeypatch)
    prompt = "a long prompt " * 5
    judge = judge_with(base, PAIR)
    replies = answers(judge, list(pair(prompt, "red", "blue").questions()))
    assert len(rows) == 1
    apart = sum(reply.prompt_tokens for reply in replies)
    assert len(rows[0].ids) < apart - len(prompt)


def test_a_score_is_expected_over_whole_answers(base, plain, chat):
    """Each answer is taken with the token that ends the turn, so 1 is not mistaken for the beginning of 10."""
    judge = judge_with(base, SCORE)
    questions = [Question(q.prompt, q.first) for q in QUESTIONS[:4]]
    for question, reply in zip(questions, answers(judge, questions), strict=True):
        ids = list(chat.prompt_ids(SCORE.fill(**question.fields())))
        expected = {}
        for word in map(str, range(1, 13)):
            answer = [*chat.tokenizer.encode(word, add_special_tokens=False), chat.end_of_turn]
            logprobs = next_logprobs(plain, ids + answer)[len(ids) - 1 : -1]
            expected[word] = sum(logprobs[i, token].item() for i, token in enumerate(answer))
        assert reply.logprobs == pytest.approx(expected, abs=1e-3)
        p = {int(word): math.exp(logprob) for word, logprob in expected.items()}
        if sum(p.values()) >= 0.1:
            assert reply.score == pytest.approx(sum(n * p[n] for n in p) / sum(p.values()), abs=1e-3)
        else:
            assert (reply.said, reply.score) == ("unparsed", None)


def test_a_written_reply_is_the_likeliest_and_read_by_the_template(base, plain, chat):
    judge = judge_with(base, REASONS, max_new_tokens=8)
    for question, reply in zip(QUESTIONS, answers(judge, QUESTIONS), strict=True):
        ids = list(chat.prompt_ids(REASONS.fill(**question.fields())))
        written = []
        while len(written) < 8 and written[-1:] != [chat.end_of_turn]:
            written.append(int(next_logprobs(plain, ids + written)[-1].argmax()))
        assert reply.raw == chat.text(written)
        assert (reply.said, reply.completion_tokens, reply.prompt_tokens) == (read_reply(reply.raw, REASONS).said, len(written), len(ids))


def test_answers_that_begin_alike_are_refused(base):
    alike = PromptTemplate.parse("kind: pair\nfirst: Yes\nsecond: Yep\nreply: verdict\n---\n[user]\n$prompt $first $second", "alike.txt")
    with pytest.raises(AlignError) as refused:
        answers(judge_with(base, alike), QUESTIONS[:1])
    assert str(refused.value).startswith("alike.txt: with the tokenizer of ")
    assert "the answers 'Yes' and 'Yep' both begin with 'Y'" in str(refused.value)
    assert "Write single letters, such as 'first: A' and 'second: B', or 'reply: reasoning'." in str(refused.value)


def test_an_answer_that_can_be_no_reply_is_refused(base):
    odd = PromptTemplate.parse("kind: pair\nfirst: <|end|>\nsecond: B\nreply: verdict\n---\n[user]\n$prompt $first $second", "odd.txt")
    with pytest.raises(AlignError, match=r"odd.txt: the answer '<\|end\|>' can be no reply of .*: its text contains the control token"):
        answers(judge_with(base, odd), QUESTIONS[:1])


@pytest.mark.parametrize("template", [PAIR, REASONS])
def test_a_question_over_the_context_is_unparsed_and_says_so(base, template):
    long = Question(turn("p", "user"), turn("x" * 500), turn("y"))
    replies = answers(judge_with(base, template, max_new_tokens=8), [QUESTIONS[0], long, QUESTIONS[1]])
    assert replies[1].said == "unparsed"
    assert replies[1].raw.startswith("[not asked: 5")
    assert replies[1].raw.endswith("are over the model's 512]")
    alone = answers(judge_with(base, template, max_new_tokens=8), QUESTIONS[:2])
    assert [replies[0].raw, replies[2].raw] == [reply.raw for reply in alone]


def test_a_control_token_in_a_text_is_unparsed_and_says_so(base):
    (reply,) = answers(judge_with(base, PAIR), [Question(turn("p", "user"), turn("x<|end|>"), turn("y"))])
    assert (reply.said, reply.raw) == ("unparsed", "[not asked: its text contains the control token: <|end|>]")


def test_nothing_is_loaded_before_it_is_asked(base, monkeypatch, tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    lenient = JudgeSettings(max_unparsed=1.0)
    judged = judge_pairs(judge_with(base, PAIR), PAIRS, ledger, lenient)
    assert all(judged)
    monkeypatch.setattr(local, "open_trunk", None)
    judge = judge_with(base, PAIR)
    assert (judge.name, judge.model, judge.template) == (f"local {base.source}", base.identity, PAIR.fingerprint)
    judge.ask([], None)
    assert judge_pairs(judge, PAIRS, ledger, lenient, replay=True) == judged
    assert judge_pairs(judge, PAIRS, ledger, lenient) == judged


def test_a_policy_judges_with_its_adapters(base, small_run, chat):
    folder = Path(small_run) / "sft"
    artifact = Artifact.open(folder)
    judge = judge_with(base, PAIR, artifact)
    assert (judge.name, judge.model) == ("local sft", artifact.identity)
    trunk, _, role = judge._loaded
    assert role.adapters
    plain = answers(judge_with(base, PAIR), QUESTIONS)
    for question, reply, before in zip(QUESTIONS, answers(judge, QUESTIONS), plain, strict=True):
        ids = chat.prompt_ids(PAIR.fill(**question.fields()))
        a, b = (chat.tokenizer.encode(word, add_special_tokens=False)[0] for word in "AB")
        with torch.no_grad():
            expected = forward(trunk, role, make_row([Example(0, ids, ((a,), (b,)))])).logprobs.tolist()
        assert list(reply.logprobs.values()) == pytest.approx(expected, abs=1e-4)
        assert reply.logprobs != pytest.approx(before.logprobs, abs=1e-4)


@given(st.lists(st.integers(0, 5), max_size=60))
def test_windows_hold_each_question_once_and_keep_prompts_together(prompts):
    questions = [Question(turn(f"p{n}", "user"), turn("a"), turn("b")) for n in prompts]
    places = [place for window in windows(questions) for place in window]
    assert sorted(places) == list(range(len(prompts)))
    assert [key for key, _ in groupby(prompts[place] for place in places)] == list(dict.fromkeys(prompts))


def test_windows_are_bounded():
    questions = [Question(turn(f"p{n // 600}", "user"), turn(f"a{n}"), turn("b")) for n in range(1300)]
    sizes = [len(window) for window in windows(questions)]
    assert sum(sizes) == 1300
    assert max(sizes) == local.WINDOW


@pytest.mark.slow
def test_the_real_model_agrees_with_plain_forward_passes(smollm2, shared_data):
    template = PromptTemplate.load("prompts/judge_pair.txt")
    rows = json.loads((shared_data / "judge/llmbar_Natural.json").read_text())[:3]
    questions = [q for row in rows for q in pair(row["input"], row["output_1"], row["output_2"]).questions()]
    judge = judge_with(find_base("embedded"), template)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    chat = judge._loaded[1]
    for question, reply in zip(questions, answers(judge, questions), strict=True):
        expected = next_logprobs(model, chat.prompt_ids(template.fill(**question.fields())))[-1]
        a, b = (chat.tokenizer.encode(word, add_special_tokens=False)[0] for word in "AB")
        assert reply.logprobs == pytest.approx({"A": expected[a].item(), "B": expected[b].item()}, abs=2e-3)
