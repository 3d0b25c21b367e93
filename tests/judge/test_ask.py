import hashlib
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import AlignError
from align.judge import ask
from align.judge.ask import judge_pairs
from align.judge.judgement import Pair, Reply, sigmoid
from align.judge.ledger import Ledger
from align.settings import JudgeSettings


def turn(text, role="assistant"):
    return [{"role": role, "content": text}]


def pair(number, a="good", b="bad"):
    return Pair(turn(f"p{number}", "user"), turn(a), turn(b))


def truth(text):
    """How good a completion is: 'good' beats everything, then the text decides."""
    return (text == "good", int(hashlib.sha256(text.encode()).hexdigest()[:6], 16))


class Knowing:
    """A judge that knows the truth."""

    name, model, template = "knowing", "1", "t"

    def __init__(self, **changes):
        self.asked = []
        self.calls = 0
        self.__dict__.update(changes)

    def answer(self, question):
        first, second = (truth(side[0]["content"]) for side in (question.first, question.second))
        return Reply("first", "A", 3.0) if first > second else Reply("second", "B", -3.0)

    def ask(self, questions, on_reply):
        self.calls += 1
        for place in reversed(range(len(questions))):  # replies may come in any order
            self.asked.append(questions[place])
            on_reply(place, self.answer(questions[place]))


class Says(Knowing):
    """A judge that always says the same, or what a function of the count says."""

    name = "says"

    def __init__(self, reply, **changes):
        super().__init__(**changes)
        self.reply = reply

    def answer(self, question):
        return self.reply(len(self.asked)) if callable(self.reply) else self.reply


class Refuses(Knowing):
    def ask(self, questions, on_reply):
        raise AssertionError("asked")


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "l.sqlite")


PLAIN = JudgeSettings()
PAIRS = [pair(n, *(("good", f"bad{n}") if n % 3 else (f"bad{n}", "good"))) for n in range(40)]
RIGHT = ["a" if n % 3 else "b" for n in range(40)]


def test_a_judge_that_knows_the_truth_is_right_in_both_orders(ledger):
    judge = Knowing()
    judged = judge_pairs(judge, PAIRS, ledger, PLAIN)
    assert [j.verdict for j in judged] == RIGHT
    assert all(j.undecided is None and j.judge == "knowing" for j in judged)
    assert [j.replies[0].said for j in judged] == ["first" if right == "a" else "second" for right in RIGHT]
    assert [j.replies[1].said for j in judged] == ["second" if right == "a" else "first" for right in RIGHT]
    assert [j.probability for j in judged] == [sigmoid(3.0 if right == "a" else -3.0) for right in RIGHT]
    assert len(judge.asked) == 80


def test_a_judge_that_always_says_first_decides_nothing(ledger):
    judged = judge_pairs(Says(Reply("first", "A", 2.0)), PAIRS, ledger, PLAIN)
    assert {(j.verdict, j.undecided, j.probability) for j in judged} == {("tie", "flipped", 0.5)}
    written = judge_pairs(Says(Reply("first", "A"), model="2"), PAIRS, ledger, PLAIN)
    assert {(j.verdict, j.undecided, j.probability) for j in written} == {("tie", "flipped", 0.5)}


def test_asking_again_asks_nothing_and_says_the_same(ledger):
    judged = judge_pairs(Knowing(), PAIRS, ledger, PLAIN)
    assert judge_pairs(Refuses(), PAIRS, ledger, PLAIN) == judged
    assert judge_pairs(Refuses(), PAIRS, Ledger(ledger.path), PLAIN, replay=True) == judged


def test_only_what_is_missing_is_asked(ledger):
    judge_pairs(Knowing(), PAIRS[:10], ledger, PLAIN)
    judge = Knowing()
    judge_pairs(judge, PAIRS[5:15], ledger, PLAIN)
    assert {q.prompt[0]["content"] for q in judge.asked} == {f"p{n}" for n in range(10, 15)}


@pytest.mark.parametrize("part", ["name", "model", "template"])
def test_another_judge_model_or_template_asks_again(ledger, part):
    judge_pairs(Knowing(), PAIRS[:3], ledger, PLAIN)
    judge = Knowing(**{part: "another"})
    judge_pairs(judge, PAIRS[:3], ledger, PLAIN)
    assert len(judge.asked) == 6


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("xyz"), st.sampled_from("xyz")), max_size=12), st.floats(-4, 4))
@settings(max_examples=25, deadline=None)
def test_exchanging_completions_exchanges_judgements_whatever_the_judge(tmp_path_factory, some, bias):
    """A judge with an opinion of each completion, of each prompt, and a liking for a place."""

    class Biased(Knowing):
        def answer(self, question):
            first, second = (truth(f"{question.prompt}{side}")[1] / 2**22 for side in (question.first, question.second))
            odds = first - second + bias
            return Reply("first" if odds > 0 else "second", "", odds)

    pairs = [pair(*each) for each in some]
    exchanged = [Pair(p.prompt, p.b, p.a) for p in pairs]
    ledgers = [Ledger(tmp_path_factory.mktemp("l") / "l.sqlite") for _ in range(2)]
    one, other = (judge_pairs(Biased(), ps, ledger, PLAIN) for ps, ledger in zip((pairs, exchanged), ledgers, strict=True))
    for x, y in zip(one, other, strict=True):
        assert (x.replies, x.undecided) == (y.replies[::-1], y.undecided)
        assert x.verdict == {"a": "b", "b": "a"}.get(y.verdict, y.verdict)
        assert x.probability == pytest.approx(1 - y.probability)
    again = judge_pairs(Refuses(), exchanged, ledgers[0], PLAIN)  # an order is a key, a side is not
    assert again == other


def test_identical_questions_are_asked_once(ledger):
    judge = Knowing()
    same = pair(1, "good", "good")
    judged = judge_pairs(judge, [pair(1), pair(1), Pair(pair(1).prompt, pair(1).b, pair(1).a), same], ledger, PLAIN)
    assert len(judge.asked) == 3
    assert [j.verdict for j in judged] == ["a", "a", "b", "tie"]
    assert (judged[3].undecided, judged[3].probability) == ("flipped", 0.5)


def test_progress_counts_pairs_over_all_judges(ledger):
    told = []
    judge_pairs([Knowing(), Knowing(model="2")], PAIRS, ledger, PLAIN, on_progress=told.append)
    assert told[-1] == 40
    assert told == sorted(told)
    assert told[79] == 20


def test_replay_asks_nobody_and_leaves_out_what_is_not_known(ledger):
    judge_pairs(Knowing(), PAIRS[:2], ledger, PLAIN)
    judged = judge_pairs(Refuses(), PAIRS[:3], ledger, PLAIN, replay=True)
    assert [j and j.verdict for j in judged] == ["b", "a", None]


# Budgets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "pairs"), [(0, 0), (1, 0), (2, 1), (7, 3), (1000, 40)])
def test_after_so_many_requests_it_stops_with_whole_pairs(ledger, most, pairs):
    judge = Knowing()
    judged = judge_pairs(judge, PAIRS, ledger, PLAIN.model_copy(update={"max_requests": most}))
    assert [j is not None for j in judged] == [True] * pairs + [False] * (40 - pairs)
    assert len(judge.asked) == 2 * pairs
    rest = Knowing()
    assert all(judge_pairs(rest, PAIRS, ledger, PLAIN))
    assert len(rest.asked) == 80 - 2 * pairs


def test_requests_are_counted_over_a_panel_and_not_for_what_is_known(ledger):
    limited = PLAIN.model_copy(update={"max_requests": 80})
    judge_pairs(Knowing(), PAIRS[:20], ledger, PLAIN)
    judges = [Knowing(), Knowing(model="2")]
    judged = judge_pairs(judges, PAIRS, ledger, limited)
    assert [len(judge.asked) for judge in judges] == [40, 40]
    assert [j is not None for j in judged] == [True] * 20 + [False] * 20


def test_the_price_stays_below_its_limit(ledger):
    priced = Says(lambda n: Reply("first" if n % 2 else "second", "A", price=0.01 if n < 30 else 0.02))
    judged = judge_pairs(priced, PAIRS, ledger, PLAIN.model_copy(update={"max_cost": 0.5}))
    spent = sum(reply.price for j in judged if j for reply in j.replies)
    assert 0.4 < spent <= 0.5
    assert sum(j is not None for j in judged) == len(priced.asked) / 2


def test_a_limit_on_the_price_needs_prices(ledger):
    judge = Knowing()
    with pytest.raises(AlignError, match=r"judge knowing: max_cost is 1.0, but the price of its replies is unknown. Expected the settings"):
        judge_pairs(judge, PAIRS, ledger, PLAIN.model_copy(update={"max_cost": 1.0}))
    assert len(judge.asked) == 2


def test_time_runs_out(ledger, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ask.time, "monotonic", lambda: now[0])

    class Slow(Knowing):
        def answer(self, question):
            now[0] += 1.0
            return super().answer(question)

    judge = Slow()
    judged = judge_pairs(judge, PAIRS, ledger, PLAIN.model_copy(update={"max_seconds": 21.0}))
    assert 20 <= len(judge.asked) <= 22
    assert sum(j is not None for j in judged) == len(judge.asked) // 2


# Unparsed replies -------------------------------------------------------------------------------------------------------


def test_too_many_unparsed_replies_stop_it_with_everything_kept(ledger):
    judge = Says(lambda n: Reply("unparsed", "Both are\nfine. \x1b[1m") if n % 4 == 1 else Reply("first", "A"))
    with pytest.raises(AlignError) as stopped:
        judge_pairs(judge, PAIRS, ledger, PLAIN)
    assert str(stopped.value) == (
        "judge says: the reply was unreadable for 20 of 80 questions (25%; at most 20% allowed). First: 'Both are fine. \\x1b[1m'\n"
        f"  All replies are kept in {ledger.path}. Make the template clearer, take another judge, or raise max_unparsed."
    )
    lenient = PLAIN.model_copy(update={"max_unparsed": 0.25})
    judged = judge_pairs(Refuses(name="says"), PAIRS, ledger, lenient)
    assert sum(j.verdict == "unparsed" and j.probability is None for j in judged) == 20
    with pytest.raises(AlignError, match="unreadable for 20 of 80"):
        judge_pairs(Refuses(name="says"), PAIRS, ledger, PLAIN, replay=True)


def test_it_stops_early_when_there_is_no_doubt(ledger):
    judge = Says(Reply("unparsed", "I cannot judge."))
    with pytest.raises(AlignError, match=r"unreadable for 64 of 64 questions \(100%; at most 20% allowed\). First: 'I cannot judge.'"):
        judge_pairs(judge, [pair(n) for n in range(1000)], ledger, PLAIN)
    assert len(judge.asked) == 64


def test_some_unparsed_replies_are_counted_and_kept(ledger):
    judge = Says(lambda n: Reply("unparsed", "?") if n == 5 else Reply("first", "A"))
    judged = judge_pairs(judge, PAIRS, ledger, PLAIN)
    assert sum(j.undecided == "unparsed" for j in judged) == 1
    assert [reply.raw for j in judged for reply in j.replies].count("?") == 1


# Scores, panels, principles -----------------------------------------------------------------------------------------------


class Scores(Knowing):
    name, pointwise = "scores", True

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def answer(self, question):
        assert question.second is None
        score = self.scores[question.first[0]["content"]]
        return Reply("unparsed" if score is None else "tie", str(score), score=score)


def test_scores_are_asked_once_a_completion_and_compared_by_margin(ledger):
    judge = Scores({"a": 7.0, "b": 5.5, "c": 7.5, "d": None})
    judged = judge_pairs(
        judge, [pair(0, "a", "b"), pair(0, "b", "c"), pair(0, "a", "c"), pair(0, "a", "d")], ledger, JudgeSettings(max_unparsed=0.5)
    )
    assert len(judge.asked) == 4
    assert [j.verdict for j in judged] == ["a", "b", "tie", "unparsed"]
    assert [j.undecided for j in judged] == [None, None, "tie", "unparsed"]
    assert [j.probability for j in judged] == [sigmoid(1.5), sigmoid(-2.0), sigmoid(-0.5), None]
    assert [reply.raw for reply in judged[0].replies] == ["7.0", "5.5"]
    assert [reply.score for reply in judged[0].replies] == [7.0, 5.5]


def test_a_panel_is_its_members_together(ledger):
    panel = judge_pairs([Knowing(), Knowing(model="2"), Says(Reply("first", "A", 1.0))], PAIRS, ledger, PLAIN)
    assert [j.verdict for j in panel] == RIGHT
    assert panel[1].judge == "panel"
    assert panel[1].probability == pytest.approx((2 * sigmoid(3.0) + 0.5) / 3)


def test_each_pair_gets_a_principle_by_its_content_alone(ledger, tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(f"principle {n}" for n in range(5)))
    ruled = PLAIN.model_copy(update={"constitution": str(tmp_path / "c.txt")})

    def drawn(pairs, by=ruled, model="1"):
        judge = Knowing(model=model)
        judge_pairs(judge, pairs, Ledger(tmp_path / f"{model}.sqlite"), by)
        found = {}
        for question in judge.asked:
            sides = frozenset(side[0]["content"] for side in (question.first, question.second))
            found.setdefault((question.prompt[0]["content"], sides), set()).add(question.principle)
        return found

    found = drawn(PAIRS)
    assert all(len(principles) == 1 for principles in found.values())  # both orders by the same one
    assert {p for ps in found.values() for p in ps} == {f"principle {n}" for n in range(5)}
    assert drawn(PAIRS[::-1], model="2") == found
    assert drawn([Pair(p.prompt, p.b, p.a) for p in PAIRS], model="3") == found
    assert drawn(PAIRS, ruled.model_copy(update={"seed": 1}), model="4") != found
    own = drawn([replace(p, principle="mine") for p in PAIRS], model="5")
    assert {p for ps in own.values() for p in ps} == {"mine"}


# Faults -------------------------------------------------------------------------------------------------------------------


def test_what_a_judge_said_before_it_failed_is_kept(ledger):
    class Dies(Knowing):
        def answer(self, question):
            if len(self.asked) == 31:
                raise AlignError("the server is gone")
            return super().answer(question)

    with pytest.raises(AlignError, match="the server is gone"):
        judge_pairs(Dies(), PAIRS, ledger, PLAIN)
    judge = Knowing()
    assert [j.verdict for j in judge_pairs(judge, PAIRS, ledger, PLAIN)] == RIGHT
    assert len(judge.asked) == 80 - 30


def _label(path, told):
    class Telling(Knowing):
        def ask(self, questions, on_reply):
            for place, question in enumerate(questions):
                told.send(question.prompt[0]["content"])
                on_reply(place, self.answer(question))

    judge_pairs(Telling(), [pair(n) for n in range(2000)], Ledger(path), PLAIN)


def _drain(pipe):
    told = []
    while True:
        try:
            told.append(pipe.recv())
        except EOFError:
            return told


def test_killed_in_the_middle_nothing_is_lost_and_nothing_is_asked_again(tmp_path):
    path = tmp_path / "l.sqlite"
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_label, args=(path, send))
    process.start()
    send.close()
    asked = [receive.recv() for _ in range(101)]
    os.kill(process.pid, signal.SIGKILL)
    asked += _drain(receive)
    process.join()
    judge = Knowing()
    judged = judge_pairs(judge, [pair(n) for n in range(2000)], Ledger(path), PLAIN)
    assert all(j.verdict == "a" for j in judged)
    again = len(asked) - (4000 - len(judge.asked))  # questions that were asked, and are asked again
    assert 0 <= again <= 1  # the one that was on its way when the process was killed
