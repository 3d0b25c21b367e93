"""Several sources as one: duplicates, caps, weights, the split, what is said of them, and when a stage stops."""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from conftest import read_records, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import near
from align.data.mix import is_heldout, load_data, times_in_epoch
from align.data.near import near_duplicates, shingles
from align.data.report import first_of, pair_facts, refuse_if_too_bad, stop_if_bad
from align.data.sources import Source
from align.errors import AlignError

many_hashes = np.random.default_rng(0).integers(-(2**63), 2**63, 20_000)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def row(number, answer="a"):
    return {"prompt": f"q{number}", "completion": f"{answer}{number}"}


def rows(start, stop):
    return [row(number) for number in range(start, stop)]


def asked(data):
    return [int(record["messages"][0]["content"].removeprefix("q")) for record in data.records()]


def load(*sources, kind="conversation"):
    return load_data([source if isinstance(source, Source) else Source(str(source)) for source in sources], kind, "sft.data")


@pytest.fixture
def file(tmp_path):
    """Writes rows to a file by its name."""
    return lambda name, content: write_rows(tmp_path / name, content)


# Which records are used -----------------------------------------------------------------------------------------------


def test_sources_follow_each_other_and_the_first_of_a_duplicate_stays(file):
    a, b = file("a.jsonl", [*rows(0, 5), row(2)]), file("b.jsonl", [*rows(3, 8), row(6)])
    data = load(a, b)
    assert asked(data) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [data.place(i) for i in range(len(data))] == [*(f"{a}:{i}" for i in range(1, 6)), *(f"{b}:{i}" for i in range(3, 6))]
    assert data.chosen.tolist() == [*([0, i] for i in range(5)), *([1, i] for i in range(2, 5))]
    assert asked(load(b, a)) == [3, 4, 5, 6, 7, 0, 1, 2]


def test_the_same_source_twice_is_used_once(file):
    a = file("a.jsonl", rows(0, 5))
    assert asked(load(a, a)) == [0, 1, 2, 3, 4]
    assert load(a, a).facts["rejected"] == {"duplicate of another source's record": 5}


def test_refused_rows_hide_no_good_one(file):
    bad = file("bad.jsonl", [{"prompt": "q1", "completion": ""}, row(0), {"prompt": "q2", "completion": "{{a}}"}])
    assert asked(load(bad, file("good.jsonl", rows(0, 3)))) == [0, 1, 2]


def test_columns_are_those_of_the_records_used_in_their_order(file):
    data = load(file("a.jsonl", [row(0), row(0), row(1, "long")]), file("b.jsonl", [row(1, "long"), row(22, "longer")]))
    assert asked(data) == [0, 1, 22]
    assert data.column("characters").tolist() == [len("q0a0"), len("q1long1"), len("q22longer22")]
    assert [record["messages"][0]["content"] for record in data.records(2)] == ["q0", "q1"]


def test_a_cap_takes_the_same_records_in_their_order_and_a_smaller_one_a_part_of_them(file):
    path = file("a.jsonl", rows(0, 200))
    taken = {cap: asked(load(Source(str(path), cap=cap))) for cap in (1, 20, 50, 200, 500)}
    assert [len(of) for of in taken.values()] == [1, 20, 50, 200, 200]
    for smaller, larger in ((1, 20), (20, 50), (50, 200)):
        assert set(taken[smaller]) < set(taken[larger])
    assert all(of == sorted(of) for of in taken.values())
    assert taken[50] != list(range(50))
    assert asked(load(Source(str(path), cap=50))) == taken[50]


def test_adding_rows_moves_few_records_of_a_cap(file):
    """Ten rows more to 200: of 50 that are taken, about 50 * 10 / 210 = 2.4 leave for a new one."""
    before = set(asked(load(Source(str(file("a.jsonl", rows(0, 200))), cap=50))))
    after = set(asked(load(Source(str(file("b.jsonl", [*rows(200, 210), *rows(0, 200)])), cap=50))))
    assert len(before - after) <= 8
    assert after - before <= set(range(200, 210))


def test_a_cap_counts_what_is_left_after_duplicates(file):
    a, b = file("a.jsonl", rows(0, 30)), file("b.jsonl", rows(20, 50))
    data = load(a, Source(str(b), cap=10))
    assert len(data) == 40
    assert set(asked(data)[30:]) <= set(range(30, 50))
    assert data.facts["rejected"] == {"duplicate of another source's record": 10}
    assert [source["records"] for source in data.facts["sources"]] == [30, 10]


def test_weights_are_those_of_each_records_source(file):
    data = load(Source(str(file("a.jsonl", rows(0, 3))), weight=2.0), Source(str(file("b.jsonl", rows(3, 5))), weight=0.5))
    assert data.weights().tolist() == [2, 2, 2, 0.5, 0.5]


@pytest.mark.parametrize("weight", [1.0, 2.0, 7.0])
def test_a_whole_weight_shows_every_record_that_many_times(weight):
    times = times_in_epoch(np.full(len(many_hashes), weight), many_hashes, 0)
    assert (times == weight).all()


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.25, 2.5])
def test_a_part_of_a_weight_is_a_share_of_the_records_the_same_each_time(weight):
    """The share of 20,000 has a standard deviation of at most sqrt(0.25 / 20000) = 0.0035."""
    times = times_in_epoch(np.full(len(many_hashes), weight), many_hashes, 0)
    assert set(np.unique(times)) == {int(weight), int(weight) + 1}
    assert abs(times.mean() - weight) < 0.015
    assert (times == times_in_epoch(np.full(len(many_hashes), weight), many_hashes, 0)).all()
    assert (times[:100] == times_in_epoch(np.full(100, weight), many_hashes[:100], 0)).all()
    assert (times != times_in_epoch(np.full(len(many_hashes), weight), many_hashes, 1)).any()
    more = times_in_epoch(np.full(len(many_hashes), weight + 0.2), many_hashes, 0)
    assert (more >= times).all()


# The split ------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(0, 10))
def test_no_share_holds_out_nothing_and_all_of_it_everything(keys, seed):
    keys = np.array(keys, dtype=np.int64)
    assert not is_heldout(keys, 0.0, seed).any()
    assert is_heldout(keys, 1.0, seed).all()


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.permutations(range(40)), st.floats(0, 1), st.integers(0, 10))
def test_the_side_of_a_prompt_depends_on_nothing_but_itself(order, share, seed):
    keys = many_hashes[:40]
    held = is_heldout(keys, share, seed)
    assert (is_heldout(keys[order], share, seed) == held[order]).all()
    assert (is_heldout(keys[:7], share, seed) == held[:7]).all()
    assert (is_heldout(keys, min(1.0, share + 0.1), seed) >= held).all()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_about_the_share_is_held_out(share, seed):
    assert abs(is_heldout(many_hashes, share, seed).mean() - share) < 0.015


def test_seeds_and_the_fraction_of_a_weight_choose_independently():
    """Two choices of a half that know nothing of each other agree half of the time; also a split and a fractional weight."""
    first, second = is_heldout(many_hashes, 0.5, 0), is_heldout(many_hashes, 0.5, 1)
    shown = times_in_epoch(np.full(len(many_hashes), 0.5), many_hashes, 0) > 0
    assert abs((first == second).mean() - 0.5) < 0.015
    assert abs((first == shown).mean() - 0.5) < 0.015


@pytest.mark.parametrize("kind", ["prompt", "conversation"])
def test_a_cap_and_the_split_choose_independently(tmp_path, kind):
    """Of 60 records out of 600, half should be held out: 30, with a standard deviation of 3.9."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(600)))
    data = load(Source(str(path), cap=60), kind=kind)
    assert 12 < is_heldout(data.column("key"), 0.5, 0).sum() < 48


def test_rows_of_one_prompt_are_on_one_side_in_every_format(file):
    talk = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a"}]
    more = [*talk, {"role": "user", "content": "and"}, {"role": "assistant", "content": "b"}]
    files = [
        file("plain.jsonl", [{"prompt": "q1", "completion": "x"}]),
        file("talk.jsonl", [{"messages": talk}, {"messages": more}, {"messages": [{"role": "system", "content": "s"}, *talk]}]),
        file("alpaca.json", []),
    ]
    files[2].write_text(json.dumps([{"instruction": "q1", "input": "", "output": "y"}]))
    keys = load(*files).column("key")
    assert len(keys) == 5
    assert len(set(keys.tolist())) == 1
    pairs = file("pairs.jsonl", [{"prompt": "q1", "chosen": "a", "rejected": "b"}])
    assert load(pairs, kind="preference").column("key")[0] == load(pairs, kind="prompt").column("key")[0] == keys[0]


# Identity and facts ---------------------------------------------------------------------------------------------------


def test_the_identity_is_another_for_whatever_decides(file, tmp_path):
    a, b = (Source(str(file(name, [{**item, "other": "o"} for item in rows(0, 5)]))) for name in ("a.jsonl", "b.jsonl"))
    c = Source(str(file("c.jsonl", rows(5, 8))))
    identities = [
        load(a).identity,
        load(a, kind="prompt").identity,
        load(a, c).identity,
        load(c, a).identity,
        load(replace(a, cap=3)).identity,
        load(replace(a, cap=4)).identity,
        load(replace(a, weight=2.0)).identity,
        load(replace(a, columns={"completion": "other"})).identity,
        load(c).identity,
    ]
    assert len(set(identities)) == len(identities)
    assert load(a).identity == load(b).identity == identities[0]
    (tmp_path / "elsewhere").mkdir()
    assert load(shutil.copy(a.path, tmp_path / "elsewhere")).identity == identities[0]
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("a4", "a5"))
    assert load(a).identity != identities[0]


def test_facts_count_all_sources(file):
    a = file("a.jsonl", [*rows(0, 4), row(1), {"prompt": "", "completion": "a"}])
    b = file("b.csv", [])
    b.write_text("question,answer\nq0,a0\nwhy,so\nwhy,\n")
    facts = load(Source(str(a), weight=2.0), b).facts
    assert (facts["rows"], facts["records"]) == (9, 5)
    assert facts["rejected"] == {
        "duplicate of an earlier record": 1,
        "a turn of the user is empty": 1,
        "a turn of the assistant is empty": 1,
        "duplicate of another source's record": 1,
    }
    assert facts["rows"] == facts["records"] + sum(facts["rejected"].values())
    assert facts["format"] == "prompt/completion, question/answer"
    assert facts["path"] == f"{a}, {b}"
    assert facts["bytes"] == a.stat().st_size + b.stat().st_size
    assert [(s["path"], s["rows"], s["records"], s["weight"]) for s in facts["sources"]] == [(str(a), 6, 4, 2.0), (str(b), 3, 1, 1.0)]
    assert facts["sha256"] == load(Source(str(a), weight=2.0), b).identity
    assert "pairs" not in facts
    json.dumps(facts)


def test_rejected_rows_have_their_place_reason_and_beginning(file):
    bad = {"prompt": "q", "completion": 3}
    a = file("a.jsonl", [row(0), bad, row(0)])
    a.write_text(a.read_text() + "{\n")
    b = file("b.jsonl", [row(0), {"prompt": "{{x}}", "completion": "a"}])
    data = load(a, b)
    found = list(data.rejected())
    assert [(one["where"], one["reason"]) for one in found] == [
        (f"{a}:2", "completion is not text"),
        (f"{a}:3", "duplicate of an earlier record"),
        (f"{a}:4", "not JSON"),
        (f"{b}:1", "duplicate of another source's record"),
        (f"{b}:2", "a placeholder is left in the text"),
    ]
    assert found[0]["detail"] == "3"
    assert json.loads(found[0]["row"]) == bad
    assert found[2]["row"] == "{"
    assert data.bad == 3
    assert list(load(file("c.jsonl", rows(0, 3))).rejected()) == []


# Too many bad rows ----------------------------------------------------------------------------------------------------


def half_empty(file, good, bad):
    return file("a.jsonl", [*rows(0, good), *({"prompt": f"bad {i}", "completion": ""} for i in range(bad))])


@pytest.mark.parametrize(("good", "bad"), [(98, 2), (49, 1), (97, 3), (71, 29), (43, 57), (3, 1)])
def test_exactly_the_limit_is_allowed_and_one_row_more_is_not(file, good, bad):
    data = load(half_empty(file, good, bad))
    data.refuse_if_too_bad(bad / (good + bad), "sft.data")
    data.refuse_if_too_bad(round(bad / (good + bad), 2), "sft.data")
    with pytest.raises(AlignError):
        data.refuse_if_too_bad((bad - 0.5) / (good + bad), "sft.data")


def test_the_refusal_names_limit_reasons_counts_places_and_what_to_set(file):
    path = half_empty(file, 6, 4)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(AlignError) as error:
        load(path).refuse_if_too_bad(0.02, "sft.data")
    assert str(error.value) == (
        "sft.data: 5 of 11 rows cannot be used (45.5%; at most 2.0% may be left out):\n"
        f"       4  a turn of the assistant is empty: {path}:7, {path}:8, {path}:9, ...\n"
        f"       1  not JSON: {path}:11 (Expecting property name enclosed in double quotes at column 2)\n"
        f"  It was read as prompt/completion: {load(path).converted[0].report['why'].rstrip('.')}.\n"
        f"  See every row of it: align inspect {path}\n"
        "  To go on without them: --set sft.max_bad_rows=0.46"
    )


def test_duplicates_are_not_bad(file):
    data = load(file("a.jsonl", [row(0)] * 10))
    data.refuse_if_too_bad(0.0, "sft.data")
    assert data.bad == 0


def test_nothing_left_is_refused_whatever_the_limit(file):
    data = load(half_empty(file, 0, 3))
    with pytest.raises(AlignError, match="3 of 3 rows cannot be used") as error:
        data.refuse_if_too_bad(1.0, "sft.data")
    assert "--set" not in str(error.value)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 3000))
def test_the_limit_that_the_refusal_advises_is_enough(bad, good):
    count = bad + good + 1
    with pytest.raises(AlignError) as error:
        stop_if_bad("sft.data", {"bad": bad}, {}, bad, count, good + 1, 0.0, "sft")
    (advised,) = re.findall(r"--set sft\.max_bad_rows=([\d.]+)", str(error.value))
    stop_if_bad("sft.data", {"bad": bad}, {}, bad, count, good + 1, float(advised), "sft")
    if bad > 1:
        with pytest.raises(AlignError):
            stop_if_bad("sft.data", {"bad": bad}, {}, bad, count, good + 1, (bad - 1) / count, "sft")
    stop_if_bad("sft.data", {"bad": bad}, {}, bad, count, good + 1, bad / count, "sft")


def test_every_source_has_the_limit_of_its_own(file):
    good = file("good.jsonl", rows(100, 200))
    data = load(good, half_empty(file, 6, 4))
    with pytest.raises(AlignError, match="4 of 10 rows"):
        data.refuse_if_too_bad(0.1, "sft.data")


def test_a_report_with_more_records_than_rows_is_measured_by_records():
    report = {"rejected": {"bad": 3}, "places": {}, "files": [{"path": "a"}], "format": "f", "why": "w", "rows": 2, "records": 300}
    refuse_if_too_bad(report, 0.01, "sft.data", "sft")


# Facts of preferences -------------------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_facts_of_pairs_by_hand(file):
    """Decided and of different length: rows 1, 2, 4, 5. The longer side is the better one in 1 and 5, as 5's label says the
    rejected side is better with 0.8: 2 of 4."""
    path = file(
        "pairs.jsonl",
        [
            pair("a", "long one", "short"),
            pair("b", "tiny", "much longer"),
            pair("c", "same", "size"),  # no length
            pair("d", "xx", "yyy", chosen_probability=0.9),
            pair("e", "xx", "yyyy", chosen_probability=0.2),
            pair("f", "xxxxxx", "y", chosen_probability=0.5),  # a tie
            pair("c", "size", "same", margin=2.0),  # the other way round: no length
            pair("c", "size", "same"),  # a duplicate of it
            pair("z", "", "refused"),
        ],
    )
    data = load(path, kind="preference")
    assert data.facts["pairs"] == {
        "longer_is_better": 0.5,
        "same_length": 2,
        "ties": 1,
        "soft": 2,
        "margins": 1,
        "labelled_both_ways": 1,
    }
    assert data.facts["rejected"] == {"duplicate of an earlier record": 1, "chosen is empty": 1}


def table(**columns):
    count = len(columns["longer"])
    usual = {"probability": [1.0] * count, "margin": [0.0] * count, "pair": list(range(count))}
    return pa.table({**usual, **columns})


def test_nothing_decided_has_no_length_bias():
    facts = pair_facts(table(longer=[0, 3], probability=[1.0, 0.5]), np.array([True, True]))
    assert facts["longer_is_better"] is None


def test_swapping_sides_and_labels_changes_no_fact():
    longer, probability = np.array([3, -2, 5, 0, 1, 4]), np.array([0.9, 0.8, 0.1, 1.0, 0.5, 0.3])
    every = np.ones(6, dtype=bool)
    facts = pair_facts(table(longer=longer, probability=probability), every)
    swapped = pair_facts(table(longer=-longer, probability=1 - probability), every)
    assert facts["longer_is_better"] == swapped["longer_is_better"] == 0.25
    assert (facts["ties"], facts["same_length"]) == (swapped["ties"], swapped["same_length"]) == (1, 1)


def test_only_records_that_are_kept_count():
    kept = np.array([True, False, True])
    facts = pair_facts(table(longer=[1, -1, 1], pair=[7, 7, 8], probability=[1.0, 0.5, 1.0]), kept)
    assert facts == {"longer_is_better": 1.0, "same_length": 0, "ties": 0, "soft": 0, "margins": 0, "labelled_both_ways": 0}


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20))
def test_the_first_kept_of_each_digest_is_marked(items):
    digests, kept = np.array([digest for digest, _ in items], dtype=np.int64), np.array([keep for _, keep in items], dtype=bool)
    seen, expected = set(), []
    for digest, keep in items:
        expected.append(keep and digest not in seen)
        seen |= {digest} if keep else set()
    assert first_of(digests, kept).tolist() == expected


# Near duplicates ------------------------------------------------------------------------------------------------------

WORDS = [f"word{i}" for i in range(400)]


def text(seed, count=80):
    return np.random.default_rng(seed).choice(WORDS, count).tolist()


def with_planted(file):
    """Twenty records of random words; 5 and 6 of the second file are copies of the first's 3 and 8 with one word changed."""
    first = [{"prompt": f"q {i}", "completion": " ".join(text(i))} for i in range(10)]
    second = [{"prompt": f"q {i}", "completion": " ".join(text(i))} for i in range(10, 20)]
    for place, original in ((5, 3), (6, 8)):
        words = text(original)
        words[40] = "changed"
        second[place] = {"prompt": f"q {original}", "completion": " ".join(words)}
    return file("a.jsonl", first), file("b.jsonl", second)


def test_planted_near_copies_are_found_and_no_other(file):
    pytest.importorskip("rensa")
    a, b = with_planted(file)
    found = near_duplicates(load(a, b), 0.7)
    assert found == {
        "threshold": 0.7,
        "records": 2,
        "groups": 2,
        "places": [[f"{b}:6", f"{a}:4"], [f"{b}:7", f"{a}:9"]],
        "at": [15, 16],
    }
    assert near_duplicates(load(a, b), 0.99)["at"] == []


def test_near_copies_of_one_record_are_one_group(file):
    pytest.importorskip("rensa")
    words = text(1)
    copies = [{"prompt": f"{mark} {' '.join(words)}", "completion": "yes"} for mark in ("!", "?", "!?", ";")]
    found = near_duplicates(load(file("a.jsonl", copies)), 0.8)
    assert (found["records"], found["groups"], found["at"]) == (3, 1, [1, 2, 3])


def test_texts_and_pairs_are_compared_too(file):
    pytest.importorskip("rensa")
    words = " ".join(text(2))
    texts = file("a.jsonl", [{"text": words}, {"text": f"{words}!"}])
    assert near_duplicates(load(texts), 0.8)["at"] == [1]
    pairs = file("b.jsonl", [pair(words, "yes", "no"), pair(f"{words}.", "yes", "no"), pair(" ".join(text(3)), "yes", "no")])
    assert near_duplicates(load(pairs, kind="preference"), 0.8)["at"] == [1]


def test_shingles_are_runs_of_five_words_in_lower_case():
    assert shingles("One two, THREE four five six") == ["one two three four five", "two three four five six"]
    assert shingles("Too short") == ["too short"]
    assert shingles("") == [""]


def test_without_the_package_the_message_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    monkeypatch.setattr(near.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AlignError, match="rensa is not installed. Install it: pip install rensa"):
        near_duplicates(load(file("a.jsonl", rows(0, 2))), 0.8)


def test_a_file_of_one_source_reads_as_the_front_door_gives_it(file):
    path = file("a.jsonl", [*rows(0, 3), row(1)])
    assert list(load(path).records()) == read_records(path, "conversation")
