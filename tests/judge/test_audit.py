"""Judges whose worth is known go through the whole audit: the truthful one is accepted, and what only looks like a judge is not."""

import hashlib
import json
import math
import random

import pytest

from align.judge.agreement import Judged, Share, statistics
from align.judge.audit import LEVEL, Audit, audit, facts, measured_pairs, verdict
from align.judge.judgement import Reply, combine
from align.judge.known import known
from align.judge.ledger import Ledger
from align.judge.planted import planted
from align.settings import JudgeSettings

COUNT = 160


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def gold_pairs(count=COUNT, longer_is_better=0.5, seed=0):
    """Pairs of which the better one is marked 'good', and is the longer one in a given share."""
    lot = random.Random(seed)
    pairs = []
    for i in range(count):
        long, short = f"reply number {i} " * 6, f"reply number {i} " * 2
        better, worse = (long, short) if lot.random() < longer_is_better else (short, long)
        pairs.append(known(user(f"question {i}?"), assistant(f"good {better}"), assistant(f"poor {worse}"), "people.jsonl", seed))
    return pairs


def planted_pairs(count=40):
    replies = [f"This is the whole of the reply to question {i}, which goes on for a while." for i in range(count)]
    return planted([(user(f"planted question {i}?"), assistant(reply)) for i, reply in enumerate(replies)], count, seed=0)


class Scripted:
    """A judge that says what a function of the question says: log-odds, or a word."""

    model, template = "m", "t"

    def __init__(self, answer, name="scripted"):
        self.answer, self.name, self.asked = answer, name, 0

    def ask(self, questions, on_reply):
        for place, question in enumerate(questions):
            self.asked += 1
            said = self.answer(question)
            if isinstance(said, str):
                on_reply(place, Reply(said, f"I say {said}", seconds=0.25))
            else:
                word = "first" if said > 0 else "second" if said < 0 else "tie"
                on_reply(place, Reply(word, word, log_odds=said, seconds=0.25))


def text(side):
    return side[-1]["content"]


def truthful(question):
    """Knows the marks; of planted pairs it takes the whole, own and unpadded text."""
    first, second = text(question.first), text(question.second)
    if first == second:
        return "tie"
    return "first" if worth(question, first) > worth(question, second) else "second"


def worth(question, reply):
    if reply.startswith(("good", "poor")):
        return reply.startswith("good")
    number = text(question.prompt).removeprefix("planted question ").removesuffix("?")
    return (f"question {number}," in reply, reply.endswith("a while."), -len(reply))


def always_first(question):
    return "first"


def longer(question):
    return float(len(text(question.first)) - len(text(question.second)))


def coin(question):
    """Log-odds that depend on the two texts alone, and turn around with them."""
    key = lambda side: hashlib.sha256(text(side).encode()).digest()[0] / 64  # noqa: E731
    return key(question.first) - key(question.second)


@pytest.fixture
def run(tmp_path):
    """Puts pairs through a judge, with a ledger on disk."""

    def audited(judges, gold, planted=(), **settings):
        judges = judges if isinstance(judges, list) else [judges]
        ledger = Ledger(tmp_path / "ledger.sqlite")
        try:
            return audit(judges, gold, planted, ledger, JudgeSettings(**settings))
        finally:
            ledger.close()

    return audited


def test_a_judge_that_knows_the_truth_is_right_on_every_pair_in_both_orders_and_accepted(run):
    found = run(Scripted(truthful), gold_pairs(), planted_pairs())
    for figures in [found.all_people, found.all_planted, *found.planted.values()]:
        assert figures.correct.share == figures.correct_ab.share == figures.correct_ba.share == figures.correct_both.share == 1
    assert found.all_people.agree.share == found.all_people.decided.share == found.all_people.kappa == 1
    finding = verdict(found)
    assert finding.accepted
    assert (finding.headline, finding.measured_on, finding.remarks) == ("accepted", "people", [])


@pytest.mark.parametrize("log_odds", [None, 3.0])
def test_a_judge_that_always_says_first_decides_nothing_and_is_refused(run, log_odds):
    found = run(Scripted(lambda question: log_odds or always_first(question)), gold_pairs(), planted_pairs())
    figures = found.all_people
    assert figures.correct == Share(COUNT / 2, COUNT)
    assert figures.decided == Share(0, COUNT)
    assert figures.undecided == {"flipped": COUNT}
    assert figures.first_position.share == 1
    assert figures.agree.share == 0
    assert found.planted["same text twice"].correct.share == 1  # averaging over the orders saves it there, one order alone does not
    assert found.planted["same text twice"].correct_ab.share == 0
    finding = verdict(found)
    assert not finding.accepted
    assert "right on 50.0%" in finding.reasons[0]
    assert "not better than chance" in finding.reasons[0]
    assert any("takes the side shown first in 100% of its replies" in remark for remark in finding.remarks)
    assert any("decides only 0.0%" in remark for remark in finding.remarks)


def test_a_judge_of_length_is_refused_even_where_the_longer_side_mostly_is_better(run):
    found = run(Scripted(longer), gold_pairs(longer_is_better=0.75), planted_pairs())
    figures = found.all_people
    assert figures.longer_wins.share == 1
    assert figures.correct == figures.longer_is_right
    assert figures.p_chance < LEVEL  # right more often than chance
    assert figures.p_longer == 1  # but nothing else than 'the longer one'
    finding = verdict(found)
    assert not finding.accepted
    assert "better than chance" in finding.reasons[0]
    assert "not better than chance" not in finding.reasons[0]
    assert "the judge is not better" in finding.reasons[1]
    assert found.planted["cut in half"].correct.share == 1
    assert found.planted["padded copy"].correct.share == 0
    assert any("planted pairs, padded copy: right on 0.0%" in remark for remark in finding.remarks)


def test_a_judge_that_tosses_a_coin_is_refused(run):
    found = run(Scripted(coin), gold_pairs(), planted_pairs())
    assert found.all_people.agree.share == 1  # in both orders the same: no bias of position, no worth either
    assert not verdict(found).accepted


def test_without_people_s_pairs_the_planted_ones_decide_and_the_verdict_says_so(run):
    accepted = verdict(run(Scripted(truthful), [], planted_pairs()))
    assert accepted.accepted
    assert accepted.headline == "accepted, but not measured against people"
    assert any("not measured against people" in reason for reason in accepted.reasons)
    for name, answer in (("first", always_first), ("longer", longer), ("coin", coin)):
        assert not verdict(run(Scripted(answer, name), [], planted_pairs())).accepted, name


def test_without_any_pair_nothing_is_known_and_the_judge_is_refused(run):
    finding = verdict(run(Scripted(truthful), []))
    assert (finding.accepted, finding.measured_on) == (False, "nothing")
    assert "nothing is known of the judge" in finding.reasons[0]


def test_replies_that_cannot_be_read_count_as_not_right_and_too_many_refuse(run):
    def mumbling(question):
        return "unparsed" if int(text(question.prompt).split()[1].strip("?")) % 2 else truthful(question)

    found = run(Scripted(mumbling), gold_pairs(), max_unparsed=0.2)
    assert found.all_people.correct == Share(COUNT / 2, COUNT)
    assert found.unparsed == Share(COUNT, 2 * COUNT)
    finding = verdict(found)
    assert not finding.accepted
    assert any("of its replies cannot be read, at most 20% may be" in reason for reason in finding.reasons)
    assert [example["orders"][0]["raw"] for example in found.examples if example["kind"] == "unparsed"] == ["I say unparsed"] * 5
    rarely = run(Scripted(lambda q: "unparsed" if "question 7?" in text(q.prompt) else truthful(q), "rarely"), gold_pairs())
    assert verdict(rarely).accepted
    assert rarely.all_people.correct == Share(COUNT - 1, COUNT)


def test_a_panel_has_its_members_figures_beside_its_own(run):
    found = run([Scripted(truthful, "knows"), Scripted(always_first, "first")], gold_pairs(), planted_pairs())
    assert found.all_people.correct_ab is None
    assert found.all_people.correct.share == 1  # the one that knows tips the scales
    assert found.members["knows (m)"].correct.share == 1
    assert found.members["first (m)"].correct.share == 0.5
    assert verdict(found).accepted


def test_the_surest_mistakes_are_kept_to_be_looked_at(run):
    found = run(Scripted(lambda q: -5.0 if truthful(q) == "first" else 5.0), gold_pairs())
    assert [example["kind"] for example in found.examples] == ["mistake"] * 8
    example = found.examples[0]
    assert example["prompt"].startswith("question")
    assert example["right"] in "ab"
    assert example["verdict"] != example["right"]


def test_a_second_audit_asks_only_for_what_is_missing_and_a_budget_s_end_is_told(run):
    judge = Scripted(truthful)
    first = run(judge, gold_pairs(), max_requests=100)
    assert (first.asked, judge.asked) == (50, 100)
    assert any(f"{COUNT - 50} of {COUNT} pairs were not judged" in remark for remark in verdict(first).remarks)
    second = run(judge, gold_pairs())
    assert (second.asked, judge.asked) == (COUNT, 2 * COUNT)


def test_facts_are_json_with_the_verdict_and_every_group(run):
    told = json.loads(json.dumps(facts(run(Scripted(truthful), gold_pairs(), planted_pairs())), allow_nan=False))
    assert told["accepted"] is True
    assert told["judges"] == [{"name": "scripted", "model": "m", "template": "t"}]
    assert list(told["people"]) == ["people.jsonl"]
    assert set(told["planted"]) == {"same text twice", "cut in half", "another prompt's", "padded copy"}
    assert told["all_people"]["correct"]["share"] == 1
    assert told["all_people"]["seconds_per_thousand"] == 500


def test_measured_pairs_take_a_quarter_as_many_planted_ones_of_each_kind():
    completions = [(user(f"q{i}"), assistant(f"a reply of some length to question number {i}")) for i in range(50)]
    people, plants = measured_pairs(None, completions, 40, seed=0)
    assert people == []
    assert {kind: sum(each.group == kind for each in plants) for kind in {each.group for each in plants}} == dict.fromkeys(
        ("same text twice", "cut in half", "another prompt's", "padded copy"), 10
    )


# The rule, in many audits


def finding_of(judged):
    figures = statistics(judged)
    none = Share(0, 2 * len(judged))
    return verdict(Audit([], {"people": figures}, {}, figures, None, {}, len(judged), len(judged), 0.2, none, []))


def simulated(lot, count, longer_is_better, prefers):
    """Judgements of pairs that each have a longer side, by `prefers(a is right, a is longer)`, the log-odds of a."""
    judged = []
    for _ in range(count):
        a_is_right = lot.random() < 0.5
        a_is_longer = a_is_right == (lot.random() < longer_is_better)
        x = prefers(a_is_right, a_is_longer)
        replies = Reply("first" if x > 0 else "second", "", log_odds=x), Reply("second" if x > 0 else "first", "", log_odds=-x)
        judged.append(Judged(combine(*replies), "a" if a_is_right else "b", 10 if a_is_longer else -10))
    return judged


def signed(lot, side, reliability):
    """A side's log-odds, the other one's in some cases."""
    return (1 if side else -1) * (1 if lot.random() < reliability else -1) * lot.uniform(0.1, 3)


TRIALS = 400
MOST = LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / TRIALS)  # by chance, three standard deviations


@pytest.mark.parametrize(
    ("longer_is_better", "judge"),
    [
        (0.5, lambda lot: lambda right, longer: signed(lot, True, 0.5)),  # a coin
        (0.3, lambda lot: lambda right, longer: signed(lot, True, 0.5)),  # a coin, where 'the longer one' is easily beaten
        (0.7, lambda lot: lambda right, longer: signed(lot, longer, 1.0)),  # length alone
        (0.7, lambda lot: lambda right, longer: signed(lot, longer, 0.9)),  # length, not always
        (0.6, lambda lot: lambda right, longer: signed(lot, right, 0.6)),  # right as often as 'the longer one', for its own reasons
    ],
)
def test_a_judge_that_is_no_better_is_accepted_in_at_most_one_of_twenty_audits(longer_is_better, judge):
    lot = random.Random(0)
    accepted = sum(finding_of(simulated(lot, 150, longer_is_better, judge(lot))).accepted for _ in range(TRIALS))
    assert accepted / TRIALS <= MOST


def test_a_judge_that_is_better_is_accepted_in_most_audits():
    lot = random.Random(0)
    accepted = sum(finding_of(simulated(lot, 150, 0.55, lambda right, longer: signed(lot, right, 0.75))).accepted for _ in range(100))
    assert accepted >= 90
