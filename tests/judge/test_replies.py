"""Replies recorded elsewhere: published figures come out again, and files that are no such replies are refused."""

import csv
import gzip
import json

import pytest
from conftest import write_rows

from align.errors import AlignError
from align.judge.replies import replay

VERDICTS = "judge/llmbar_verdicts.jsonl.gz"
NAMES = {"correct_ab": "correct_False", "correct_ba": "correct_True", "correct_both": "correct_both", "agree": "equal"}  # ours: LLMBar's


def recorded(raw_ab, raw_ba, label, **more):
    return {"raw_ab": raw_ab, "raw_ba": raw_ba, "label": label, **more}


def replayed(path, rows, gold=None):
    return replay(write_rows(path / "replies.jsonl", rows), gold)["groups"]


def test_llmbar_s_figures_come_out_exactly_for_every_subset_judge_and_strategy(shared_data):
    published = json.loads((shared_data / "judge/llmbar_statistics.json").read_text())
    groups = replay(shared_data / VERDICTS, None)["groups"]
    assert {(g["subset"], f"{g['judge']}/{g['strategy']}") for g in groups} == {(s, j) for s, judges in published.items() for j in judges}
    for group in groups:
        theirs = published[group["subset"]][f"{group['judge']}/{group['strategy']}"]
        for ours, name in NAMES.items():
            assert f"{group[ours]} / {group['n']} = {group[ours] / group['n'] * 100}%" == theirs[name]
            assert group["shares"][ours]["share"] == group[ours] / group["n"]
        assert group["kappa"] == theirs["kappa_agreement"]
        assert group["read_unlike_the_file"] == 0  # our reader says what the file says, reply by reply


def test_one_order_alone_leaves_the_other_s_figures_unknown(shared_data, tmp_path):
    with gzip.open(shared_data / VERDICTS, "rt") as file:
        rows = [json.loads(line) for line in file]
    both = replay(shared_data / VERDICTS, None)["groups"]
    for order, other in (("ab", "ba"), ("ba", "ab")):
        alone = replayed(tmp_path, [{k: v for k, v in row.items() if not k.endswith(other)} for row in rows])
        for group, whole in zip(alone, both, strict=True):
            assert group[f"correct_{order}"] == whole[f"correct_{order}"]
            assert group[f"kappa_gold_{order}"] == whole[f"kappa_gold_{order}"]
            for unknown in (f"correct_{other}", "correct_both", "agree", "kappa", "kappa_read", f"unparsed_{other}", f"kappa_gold_{other}"):
                assert group[unknown] is None
            assert group["shares"]["agree"] is None


def test_by_hand(tmp_path):
    """Right in both; flips; wrong in both; unreadable in one order; unreadable in both (the same, and right in neither)."""
    rows = [
        recorded("Output (a)", "Output (b)", 1),
        recorded("Output (a)", "Output (a)", 1),
        recorded("Output (a)", "Output (b)", 2),
        recorded("I can't say.", "Output (a)", 2),
        recorded("", None, 2),
    ]
    (group,) = replayed(tmp_path, rows)
    assert (group["subset"], group["judge"], group["strategy"]) == (None, None, None)
    assert (group["n"], group["correct_ab"], group["correct_ba"], group["correct_both"], group["agree"]) == (5, 2, 2, 1, 3)
    assert (group["unparsed_ab"], group["unparsed_ba"], group["tie_ab"]) == (2, 1, 0)
    assert group["gold"] == {"a": 2, "b": 3, "tie": 0}
    # Output 1 won in ab: yes yes yes no no; in ba: yes no yes no no. Observed 4/5; expected 3/5 * 2/5 + 2/5 * 3/5 = 12/25; 0.32/0.52.
    assert group["kappa"] == pytest.approx(8 / 13)
    # Read in both: a-a, a-b, a-a. Observed 2/3, expected 1 * 2/3: no more than chance.
    assert group["kappa_read"] == pytest.approx(0)
    assert group["first_position"]["count"] == 3 + 2
    assert group["first_position"]["n"] == 3 + 4
    assert group["read_unlike_the_file"] is None


def test_where_the_file_has_read_a_reply_otherwise_it_is_counted(tmp_path):
    rows = [recorded("Output (a)", "Output (b)", 1, winner_ab="2", winner_ba="1")]
    assert replayed(tmp_path, rows)[0]["read_unlike_the_file"] == 1


def test_winners_without_raw_replies_are_taken_as_they_are(tmp_path):
    """winner_ba is in terms of the outputs already; a reply that was not read has none."""
    (group,) = replayed(tmp_path, [{"winner_ab": "1", "winner_ba": "1", "label": 1}, {"winner_ab": "2", "winner_ba": None, "label": "2"}])
    assert (group["correct_ab"], group["correct_ba"], group["unparsed_ba"]) == (2, 1, 1)


def test_a_csv_file_will_do_too(tmp_path):
    with (tmp_path / "replies.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["subset", "judge", "strategy", "raw_ab", "raw_ba", "label"], ["s", "j", "CoT", "Output (a)", "Output (b)", 1]])
    (group,) = replay(tmp_path / "replies.csv", None)["groups"]
    assert (group["subset"], group["judge"], group["strategy"], group["correct_both"]) == ("s", "j", "CoT", 1)


def test_numbers_are_the_same_however_the_file_writes_them(tmp_path):
    votes = write_rows(tmp_path / "votes.jsonl", [voted(0, 1, 1, 2), voted(1, 2, 2, 2)])
    (tmp_path / "verdicts.csv").write_text("idx,x_result\n0.0,1.0\n1,2\n")
    (group,) = replay(tmp_path / "verdicts.csv", votes)["groups"]
    assert group["correct_ab"] == 2
    assert replayed(tmp_path, [recorded("Output (a)", "Output (b)", 1.0)])[0]["correct_both"] == 1


# Verdicts against people's votes


@pytest.mark.parametrize(
    ("name", "judge", "right", "ties", "unparsed"), [("pandalm_7b", "pandalm", 320, 54, 0), ("pandalm_gpt-3.5-turbo", "gpt", 334, 16, 15)]
)
def test_pandalm_s_verdicts_against_the_votes(shared_data, name, judge, right, ties, unparsed):
    """Counted here with nothing but the files: the majority of three, 'garbage' right for nobody."""
    path, votes = shared_data / f"judge/{name}_verdicts_a.json.gz", shared_data / "preference/pandalm_testset_a.json.gz"
    said = {row["idx"]: str(row[f"{judge}_result"]).replace("Tie", "0") for row in json.loads(gzip.decompress(path.read_bytes()))}
    rows = json.loads(gzip.decompress(votes.read_bytes()))
    gold = {row["idx"]: str(sorted(row[f"annotator{i}"] for i in (1, 2, 3))[1]) for row in rows}  # the middle of three is the majority
    read = [i for i in gold if said[i] != "garbage"]
    observed = sum(said[i] == gold[i] for i in read) / len(read)
    expected = sum(sum(said[i] == c for i in read) * sum(gold[i] == c for i in read) for c in "012") / len(read) ** 2
    (group,) = replay(path, votes)["groups"]
    assert (group["judge"], group["n"], group["tie_ab"], group["unparsed_ab"]) == (judge, 499, ties, unparsed)
    assert group["correct_ab"] == sum(said[i] == gold[i] for i in gold) == right
    assert group["kappa_gold_ab"] == pytest.approx((observed - expected) / (1 - expected))
    assert group["gold"] == {side: list(gold.values()).count(number) for side, number in (("a", "1"), ("b", "2"), ("tie", "0"))}
    assert group["correct_ba"] is group["kappa"] is None


def voted(idx, *votes, **more):
    named = {f"annotator{i}": vote for i, vote in enumerate(votes, 1)}
    return {"idx": idx, "instruction": f"do {idx}", "response1": "one", "response2": "two", **named, **more}


def test_a_majority_is_more_than_half_of_the_votes_and_else_it_is_a_tie(tmp_path):
    votes = write_rows(tmp_path / "votes.jsonl", [voted(0, 1, 1, 2), voted(1, 0, 1, 2), voted(2, 2, 2, 0), voted(3, 0, 0, 1)])
    rows = [{"idx": i, "result": said} for i, said in enumerate(["1", "Tie", "2", "2"])]
    (group,) = replayed(tmp_path, rows, votes)
    assert group["gold"] == {"a": 1, "b": 1, "tie": 2}
    assert (group["subset"], group["judge"], group["correct_ab"]) == ("votes", "replies", 3)


# What is refused


def test_unknown_columns_are_told(tmp_path):
    with pytest.raises(AlignError, match="the columns are not known. Found: question, answer") as error:
        replayed(tmp_path, [{"question": "q", "answer": "a"}])
    assert "raw_ab, raw_ba and label" in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(AlignError, match="there is no such file"):
        replay(tmp_path / "none.jsonl", None)


def test_votes_where_there_are_labels_already_and_none_where_there_are_not(tmp_path):
    votes = write_rows(tmp_path / "votes.jsonl", [voted(0, 1, 1, 1)])
    with pytest.raises(AlignError, match="has its labels beside the replies. Leave --gold out"):
        replayed(tmp_path, [recorded("Output (a)", "Output (b)", 1)], votes)
    with pytest.raises(AlignError, match=r"has verdicts \('gpt_result'\) by 'idx' and no labels. Add the people's votes: --gold FILE"):
        replayed(tmp_path, [{"idx": 0, "gpt_result": "1"}])


@pytest.mark.parametrize("label", [3, "good", None])
def test_a_label_that_is_none(tmp_path, label):
    rows = [recorded("Output (a)", "Output (b)", 1), recorded("Output (a)", "Output (b)", label)]
    with pytest.raises(AlignError, match=r"replies.jsonl:2: 'label' is .*; expected 1 or 2"):
        replayed(tmp_path, rows)


def test_a_reply_that_is_no_text(tmp_path):
    with pytest.raises(AlignError, match=r"replies.jsonl:1: 'raw_ab' is \[1\]; expected the reply as text"):
        replayed(tmp_path, [recorded([1], "Output (a)", 1)])


def test_a_row_that_cannot_be_read(tmp_path):
    path = write_rows(tmp_path / "replies.jsonl", [recorded("Output (a)", "Output (b)", 1)])
    path.write_text(path.read_text() + "{broken\n" + path.read_text())
    with pytest.raises(AlignError, match="replies.jsonl:2: the row cannot be read"):
        replay(path, None)


def test_votes_that_do_not_fit(tmp_path):
    rows = [{"idx": 0, "gpt_result": "1"}, {"idx": 9, "gpt_result": "1"}]
    with pytest.raises(AlignError, match=r"has no votes on 1 of the pairs of .*, the first at .*replies.jsonl:2 \(idx 9\)"):
        replayed(tmp_path, rows, write_rows(tmp_path / "votes.jsonl", [voted(0, 1, 1, 1), voted(1, 2, 2, 2)]))
    with pytest.raises(AlignError, match=r"votes.jsonl:2: idx 0 is there already"):
        replayed(tmp_path, rows, write_rows(tmp_path / "votes.jsonl", [voted(0, 1, 1, 1), voted(0, 2, 2, 2)]))
    with pytest.raises(AlignError, match=r"votes.jsonl:2: the votes are \[1, 'hm', 1\]; one of them cannot be read"):
        replayed(tmp_path, rows, write_rows(tmp_path / "votes.jsonl", [voted(0, 1, 1, 2), voted(9, 1, "hm", 1)]))
    with pytest.raises(AlignError, match="found pairs with the columns prompt, chosen, rejected; expected votes on two replies and 'idx'"):
        replayed(tmp_path, rows, write_rows(tmp_path / "votes.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]))
