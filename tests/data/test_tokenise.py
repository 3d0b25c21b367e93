"""From records to examples with the tiny tokenizer, held against a rendering written out here."""

import json
import re

import pytest
import torch
from conftest import TEMPLATE, make_tokenizer, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from align.chat import Chat
from align.data import tokenise
from align.data.mix import load_data
from align.data.sources import Source
from align.data.tokenise import prepare, prompt_ids, render
from align.errors import AlignError
from align.settings import DPOSettings, RewardSettings, SFTSettings

KINDS = {"conversation": SFTSettings, "preference": DPOSettings}
ROLES = {"conversation": "data", "preference": "preferences"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def turns(*texts, system=None):
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said] if system else said


def conversation(*texts, system=None):
    return {"messages": turns(*texts, system=system)}


def preference(prompt, chosen, rejected, **more):
    sides = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": turns(prompt) if isinstance(prompt, str) else prompt, **sides, **more}


def load(rows, folder, kind="conversation", name="rows.jsonl"):
    return load_data((Source(str(write_rows(folder / name, rows))),), kind, "test")


def prepared(rows, folder, chat, kind="conversation", out=None, **changes):
    """What a stage named `stage` would get of these rows, none of them held out unless asked for."""
    given = KINDS[kind](**{"holdout": 0.0, **changes})
    return prepare("stage", ROLES[kind], load(rows, folder, kind), chat, given, out)


def everything(examples):
    """Every example once, in the order of the rows."""
    return sorted({example.index: example for part in (examples.training, examples.heldout) for example in part}.items())


# An independent rendering -------------------------------------------------------------------------------------------------


def ids_of(text):
    """TEMPLATE's tokenizer has no merges: the ids of a text are those of its parts."""
    return tuple(make_tokenizer().encode(text)) if text else ()


def plain(messages, trained="all"):
    """(prompt, completion, trained) of a conversation under TEMPLATE, written without the code under test."""
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    replies = replies[-1:] if trained == "last" else replies
    ids, counts, begin = [], [], None
    for i, message in enumerate(messages):
        opening, reply = ids_of(f"<|{message['role']}|>\n"), ids_of(message["content"] + "<|end|>")
        begin = len(ids) + len(opening) if i == replies[0] else begin
        after = ids_of("\n") if i + 1 < len(messages) else ()
        ids += [*opening, *reply, *after]
        counts += [False] * len(opening) + [i in replies] * len(reply) + [False] * len(after)
    return tuple(ids[:begin]), tuple(ids[begin:]), tuple(counts[begin:])


def size(*texts, system=None):
    prompt, completion, _ = plain(turns(*texts, system=system))
    return len(prompt) + len(completion)


TALKS = [
    conversation("say red", "red"),
    conversation("say blue", "blue", "again", "blue blue"),
    conversation("say é", "é", "und?", " ja\n", "東京", "🙂", system="be brief"),
]


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_conversations_are_what_a_plain_rendering_gives(chat, tmp_path, train_on):
    examples = prepared(TALKS, tmp_path, chat, train_on=train_on)
    assert len(examples.training) == len(TALKS)
    for example, record in zip(examples.training, TALKS, strict=True):
        prompt, completion, trained = plain(record["messages"], train_on)
        assert (example.prompt, example.completions, example.trained) == (prompt, (completion,), (trained,))


def test_preferences_are_what_a_plain_rendering_gives(chat, tmp_path):
    rows = [preference("say red", "red", "a blue one"), preference(turns("a", "b", "c", system="s"), "d", "ee")]
    examples = prepared(rows, tmp_path, chat, "preference")
    for example, row in zip(examples.training, rows, strict=True):
        sides = [plain([*row["prompt"], *row[side]], "last") for side in ("chosen", "rejected")]
        assert {prompt for prompt, _, _ in sides} == {example.prompt}
        assert example.completions == tuple(completion for _, completion, _ in sides)
        assert not example.trained


def test_facts_count_what_there_is(chat, tmp_path):
    examples = prepared(TALKS, tmp_path, chat)
    assert examples.facts == {
        "training": 3,
        "heldout": 0,
        "overlong": 0,
        "cut": 0,
        "unfit": {},
        "tokens": sum(example.tokens for example in examples.training),
    }


# Places ---------------------------------------------------------------------------------------------------------------------


def test_the_index_of_every_example_finds_its_place_probability_and_margin(chat, tmp_path):
    """Rows that are refused, before and after tokenisation, move nothing."""
    rows = [preference(f"say {i}", f"{i}", "x" * (i % 7 + 3), chosen_probability=1 - i / 100, margin=i / 2) for i in range(40)]
    rows[3]["chosen"] = rows[3]["rejected"]
    rows[8]["prompt"][0]["content"] = "say <|end|>"
    examples = prepared(rows, tmp_path, chat, "preference", holdout=0.3, max_bad_rows=0.1)
    seen = everything(examples)
    assert len(seen) == len(examples.training) + len(examples.heldout) == 38
    assert len(examples.heldout) > 3
    for index, example in seen:
        path, _, line = examples.where[index].rpartition(":")
        row = rows[int(line) - 1]
        assert path == str(tmp_path / "rows.jsonl")
        assert chat.text(example.completions[0]) == row["chosen"][0]["content"]
        assert examples.probability[index] == pytest.approx(row["chosen_probability"])
        assert examples.margin[index] == row["margin"]
    assert examples.probability.dtype == examples.margin.dtype == torch.float32


def test_examples_that_are_no_pairs_are_sure(chat, tmp_path):
    examples = prepared(TALKS, tmp_path, chat)
    assert examples.probability.tolist() == [1.0] * 3
    assert examples.margin.tolist() == [0.0] * 3


def test_stored_examples_are_a_sequence(chat, tmp_path):
    stored = prepared([conversation(f"say {i}", str(i)) for i in range(9)], tmp_path, chat).training
    listed = list(stored)
    assert len(stored) == len(listed) == 9
    assert [stored[i] for i in range(9)] == listed
    assert [example.index for example in listed] == list(range(9))
    assert stored[-1] == listed[-1]
    for part in (slice(2, 5), slice(None, None, 3), slice(None, None, -1), slice(0, 0), slice(7, 99)):
        assert list(stored[part]) == listed[part]
        assert len(stored[part]) == len(listed[part])
    assert list(stored[2:8][1:3]) == listed[3:5]
    with pytest.raises(IndexError):
        stored[9]


# Held out --------------------------------------------------------------------------------------------------------------------


MANY = [conversation(f"say {i // 2}", f"{i} words") for i in range(400)]  # every prompt twice


def prompts_of(chat, part):
    return {chat.tokenizer.decode(example.prompt) for example in part}


def test_the_split_is_by_prompt_and_has_about_its_share(chat, tmp_path):
    examples = prepared(MANY, tmp_path, chat, holdout=0.25)
    training, heldout = prompts_of(chat, examples.training), prompts_of(chat, examples.heldout)
    assert not training & heldout
    assert len(training | heldout) == 200
    assert 30 <= len(heldout) <= 70
    assert examples.facts["training"] + examples.facts["heldout"] == 400


def test_rows_that_are_added_move_no_other(chat, tmp_path):
    before = prompts_of(chat, prepared(MANY[:200], tmp_path, chat, holdout=0.25).heldout)
    added = [conversation(f"new {i}", "yes") for i in range(50)]
    after = prompts_of(chat, prepared([*added, *MANY[:200]], tmp_path, chat, holdout=0.25).heldout)
    old = prompts_of(chat, prepared(MANY[:200], tmp_path, chat).training)
    assert before == after & old


def test_another_seed_holds_out_others(chat, tmp_path):
    first, second = (prompts_of(chat, prepared(MANY, tmp_path, chat, holdout=0.25, seed=seed).heldout) for seed in (0, 1))
    assert first != second


def test_further_heldout_rows_are_kept_out_of_training_too(chat, tmp_path):
    whole = prepared(MANY, tmp_path, chat, holdout=0.25)
    few = prepared(MANY, tmp_path, chat, holdout=0.25, max_heldout=10)
    assert len(few.heldout) == 10
    assert {example.index for example in few.heldout} < {example.index for example in whole.heldout}
    assert list(few.training) == list(whole.training)
    assert few.facts["heldout"] == whole.facts["heldout"] == len(whole.heldout)


def test_data_that_is_all_held_out_is_refused(chat, tmp_path):
    with pytest.raises(AlignError, match=r"stage.data: no row is left to train on \(0 over stage.max_length, 1 held out\)"):
        prepared(TALKS[:1], tmp_path, chat, holdout=0.999999)


# Weights ---------------------------------------------------------------------------------------------------------------------


def test_weights_repeat_training_examples_and_never_held_out_ones(chat, tmp_path):
    weights = {"a": 2.0, "b": 1.0, "c": 0.5, "d": 2.5}
    sources = []
    for name, weight in weights.items():
        path = write_rows(tmp_path / f"{name}.jsonl", [conversation(f"{name} {i}", str(i)) for i in range(200)])
        sources.append(Source(str(path), weight=weight))
    examples = prepare("stage", "data", load_data(tuple(sources), "conversation", "test"), chat, SFTSettings(holdout=0.2))
    times = {name: {} for name in weights}
    for example in examples.training:
        name = examples.where[example.index].rpartition("/")[2][0]
        times[name][example.index] = times[name].get(example.index, 0) + 1
    assert set(times["a"].values()) == {2}
    assert set(times["b"].values()) == {1}
    assert set(times["c"].values()) == {1}
    assert set(times["d"].values()) == {2, 3}
    assert 0.35 < len(times["c"]) / len(times["b"]) < 0.65
    assert 2.3 < sum(times["d"].values()) / len(times["d"]) < 2.7
    heldout = [example.index for example in examples.heldout]
    assert len(heldout) == len(set(heldout)) > 100
    assert not set(heldout) & {index for part in times.values() for index in part}
    assert examples.facts["training"] == len(examples.training) == sum(sum(part.values()) for part in times.values())


# Longer than the limit ---------------------------------------------------------------------------------------------------------


SHORT, LONG = conversation("say red", "red"), conversation("say red and blue", "red and blue")
LIMIT = size("say red", "red")


def test_too_long_is_an_error_that_has_the_place_and_both_cures(chat, tmp_path):
    with pytest.raises(AlignError) as error:
        prepared([SHORT, LONG, conversation("say green and blue", "no")], tmp_path, chat, on_overlong="error", max_length=LIMIT)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/rows.jsonl:2: over stage.max_length of {LIMIT} tokens, with 1 more of 3 records.")
    assert "--set stage.max_length=" in message
    assert "--set stage.on_overlong=drop" in message


def test_too_long_is_left_out_and_counted(chat, tmp_path):
    examples = prepared([SHORT, LONG], tmp_path, chat, on_overlong="drop", max_length=LIMIT)
    assert [examples.where[example.index].rpartition(":")[2] for example in examples.training] == ["1"]
    assert (examples.facts["overlong"], examples.facts["cut"], examples.facts["unfit"]) == (1, 0, {})


def test_a_length_that_just_fits_is_kept(chat, tmp_path):
    assert prepared([SHORT], tmp_path, chat, on_overlong="error", max_length=LIMIT).facts["training"] == 1
    with pytest.raises(AlignError, match="over stage.max_length"):
        prepared([SHORT], tmp_path, chat, on_overlong="error", max_length=LIMIT - 1)


def test_only_too_long_rows_are_no_bad_rows_but_leave_nothing(chat, tmp_path):
    with pytest.raises(AlignError, match=r"no row is left to train on \(1 over stage.max_length, 0 held out\)"):
        prepared([LONG], tmp_path, chat, max_length=LIMIT)


def test_a_prompt_is_shortened_at_a_turn_and_keeps_its_system_message(chat, tmp_path):
    texts = ("say a", "a", "say b", "b", "say c", "c")
    limit = size(*texts[2:], system="be brief")
    examples = prepared([conversation(*texts, system="be brief")], tmp_path, chat, on_overlong="shorten_prompt", max_length=limit)
    (example,) = examples.training
    prompt, completion, trained = plain(turns(*texts[2:], system="be brief"))
    assert (example.prompt, example.completions, example.trained) == (prompt, (completion,), (trained,))
    assert (examples.facts["overlong"], examples.facts["cut"]) == (0, 1)


def test_a_last_exchange_that_is_too_long_alone_is_left_out(chat, tmp_path):
    rows = [SHORT, conversation("a", "b", "say red and blue", "red and blue")]
    examples = prepared(rows, tmp_path, chat, on_overlong="shorten_prompt", max_length=LIMIT)
    assert (examples.facts["training"], examples.facts["overlong"], examples.facts["cut"]) == (1, 1, 0)


def test_the_prompt_of_a_preference_is_shortened_for_its_longer_side(chat, tmp_path):
    row = preference(turns("say a", "a", "say b", system="s"), "b", "bbbb")
    limit = size("say b", "bbbb", system="s")
    (example,) = prepared([row], tmp_path, chat, "preference", on_overlong="shorten_prompt", max_length=limit).training
    assert example.prompt == plain(turns("say b", "b", system="s"))[0]
    assert example.longest == limit


def test_a_completion_is_cut_and_unfinished(chat, tmp_path):
    examples = prepared([SHORT, LONG], tmp_path, chat, on_overlong="cut_completion", max_length=26)
    whole, cut = examples.training
    prompt, completion, _ = plain(LONG["messages"])
    assert whole.completions[0][-1] == chat.end_of_turn
    assert cut.longest == 26
    assert cut.prompt == prompt
    assert cut.completions == (completion[: 26 - len(prompt)],)
    assert cut.trained == ((True,) * (26 - len(prompt)),)
    assert chat.end_of_turn not in cut.completions[0]
    assert (examples.facts["overlong"], examples.facts["cut"]) == (0, 1)


def test_only_the_longer_side_of_a_preference_is_cut(chat, tmp_path):
    limit = size("say a", "abc")
    (example,) = prepared(
        [preference("say a", "abc", "abcd")], tmp_path, chat, "preference", on_overlong="cut_completion", max_length=limit
    ).training
    assert [chat.tokenizer.decode(ids) for ids in example.completions] == ["abc<|end|>", "abcd"]


def test_a_prompt_that_fills_the_limit_is_left_out(chat, tmp_path):
    filled = conversation("say red, say it twice", "red")
    limit = len(plain(filled["messages"])[0])
    examples = prepared([SHORT, filled], tmp_path, chat, on_overlong="cut_completion", max_length=limit)
    assert (examples.facts["training"], examples.facts["overlong"], examples.facts["cut"]) == (1, 1, 0)
    assert prepared([SHORT, filled], tmp_path, chat, on_overlong="cut_completion", max_length=limit + 1).facts["cut"] == 1


def test_a_preference_whose_sides_become_equal_is_left_out_as_too_long_and_not_as_bad(chat, tmp_path):
    rows = [preference("say a", "ab", "b"), preference("say a", "abcdef", "abcdeg")]
    limit = size("say a", "abcd")
    facts = prepared(rows, tmp_path, chat, "preference", on_overlong="cut_completion", max_length=limit, max_bad_rows=0.0).facts
    assert (facts["training"], facts["overlong"], facts["cut"], facts["unfit"]) == (1, 1, 0, {})


def test_sides_that_the_template_makes_the_same_are_bad(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | replace('colour', 'color') }}")
    rows = [preference(f"say {i}", "red", "blue") for i in range(3)] + [preference("say a", "a colour", "a color")]
    facts = prepared(rows, tmp_path, Chat.of(tokenizer), "preference", max_bad_rows=0.3).facts
    assert facts["unfit"] == {"chosen and rejected are the same in tokens": 1}


POLICIES = ["error", "drop", "shorten_prompt", "cut_completion"]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=8).map(lambda found: found[: len(found) // 2 * 2]),
    system=st.sampled_from([None, "s", "a long system"]),
    limit=st.integers(8, 90),
    policy=st.sampled_from(POLICIES),
    train_on=st.sampled_from(["all", "last"]),
)
def test_no_example_is_over_the_limit_and_each_policy_keeps_what_it_can(chat, lengths, system, limit, policy, train_on):
    messages = turns(*("x" * length for length in lengths), system=system)
    (example, cut, problem), *more = render(chat, "conversation", {"messages": messages}, limit, policy, train_on)
    assert not more
    prompt, completion, trained = plain(messages, train_on)
    expected = (prompt, completion, trained)
    if len(prompt) + len(completion) > limit:
        opening = messages[:1] if system else []
        shorter = [[*opening, *messages[at:]] for at in range(len(opening) + 2, len(messages), 2)]
        fitting = [found for talk in shorter if len((found := plain(talk, train_on))[0] + found[1]) <= limit]
        room = limit - len(prompt)
        if policy == "shorten_prompt":
            expected = fitting[0] if fitting else None
        elif policy == "cut_completion" and room > 0:
            expected = (prompt, completion[:room], trained[:room])
        else:
            expected = None
        assert cut == (expected is not None)
    if expected is None:
        assert example is None
        assert problem.reason == tokenise.OVERLONG
    else:
        assert (example.prompt, example.completions[0], example.trained[0]) == expected
        assert example.longest <= limit
        assert problem is None


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda found: found[: (len(found) - 1) // 2 * 2 + 1]),
    sides=st.tuples(st.text("ab", min_size=1, max_size=9), st.text("ab", min_size=1, max_size=9)),
    limit=st.integers(8, 70),
    policy=st.sampled_from(POLICIES),
)
def test_no_preference_is_over_the_limit_and_its_sides_differ(chat, prompt, sides, limit, policy):
    record = preference(turns(*("x" * length for length in prompt)), *sides)
    ((example, cut, problem),) = render(chat, "preference", record, limit, policy)
    assert (example is None) == (problem is not None)
    if example:
        assert example.longest <= limit
        assert example.completions[0] != example.completions[1]
        whole = [plain([*record["prompt"], *record[side]], "last")[1] for side in ("chosen", "rejected")]
        assert all(ours == theirs[: len(ours)] for ours, theirs in zip(example.completions, whole, strict=True))
        assert cut or list(example.completions) == whole


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_examples_of_data_are_within_the_limit_and_every_row_is_counted(chat, tmp_path, policy):
    rows = [conversation(*("x" * (i * j % 14 + 1) for j in range(1, 2 * (i % 4) + 3))) for i in range(1, 60)]
    examples = prepared(rows, tmp_path, chat, on_overlong=policy, max_length=LIMIT)
    assert max(example.longest for example in examples.training) <= LIMIT
    assert examples.facts["training"] + examples.facts["overlong"] == len(load(rows, tmp_path))
    assert examples.facts["overlong"] > 0
    assert (examples.facts["cut"] > 0) == (policy != "drop")


# Rows that do not fit the base ---------------------------------------------------------------------------------------------------


def with_unfit(good):
    """Rows of which the last three do not fit, for two reasons."""
    bad = [conversation("say <|end|>", "x"), conversation("say <|user|>", "y"), {**conversation("add", "z"), "tools": [TOOL]}]
    return [*(conversation(f"say {i}", str(i)) for i in range(good)), *bad]


def test_rows_that_do_not_fit_stop_the_stage_with_reason_place_and_setting(chat, tmp_path):
    with pytest.raises(AlignError) as error:
        prepared(with_unfit(7), tmp_path, chat)
    message = str(error.value)
    assert message.startswith("stage.data: 3 of 10 rows cannot be used (30.0%; at most 2.0% may be left out):")
    assert f"2  its text contains the control token: {tmp_path}/rows.jsonl:8 (<|end|>), {tmp_path}/rows.jsonl:9 (<|user|>)" in message
    assert f"1  the chat template has no place for tools: {tmp_path}/rows.jsonl:10" in message
    limit = float(re.search(r"--set stage.max_bad_rows=([\d.]+)", message)[1])
    assert prepared(with_unfit(7), tmp_path, chat, max_bad_rows=limit).facts["training"] == 7


def test_rows_that_do_not_fit_are_left_out_under_the_limit_and_listed(chat, tmp_path, capsys):
    out = tmp_path / "artifact"
    out.mkdir()
    rows = [*with_unfit(60), conversation("say <|end|>", ""), conversation("say 0", "0")]
    examples = prepared(rows, tmp_path, chat, out=out, max_bad_rows=0.1)
    assert examples.facts["training"] == 60
    assert examples.facts["unfit"] == {"its text contains the control token": 2, "the chat template has no place for tools": 1}
    listed = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {(row["where"].rpartition(":")[2], row["reason"]) for row in listed} == {
        ("61", "its text contains the control token"),
        ("62", "its text contains the control token"),
        ("63", "the chat template has no place for tools"),
        ("64", "a turn of the assistant is empty"),
        ("65", "duplicate of an earlier record"),
    }
    assert "60 examples to train on" in capsys.readouterr().out


def test_too_long_rows_are_listed(chat, tmp_path):
    prepared([SHORT, LONG], tmp_path, chat, out=tmp_path, max_length=LIMIT)
    (row,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert row == {"where": f"{tmp_path}/rows.jsonl:2", "reason": "over the longest length"}


def test_nothing_is_written_where_nothing_is_rejected(chat, tmp_path):
    prepared(TALKS, tmp_path, chat, out=tmp_path)
    assert not (tmp_path / "rejected.jsonl").exists()


def test_rows_that_all_do_not_fit_leave_nothing_whatever_the_limit(chat, tmp_path):
    with pytest.raises(AlignError, match="its text contains the control token"):
        prepared(with_unfit(0)[:2], tmp_path, chat, max_bad_rows=1.0)


def test_a_reason_with_brackets_is_said_literally(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].content == 'no' %}{{ raise_exception('expected [INST] before [/INST]') }}{% endif %}" + TEMPLATE
    )
    rows = [*(conversation(f"say {i}", str(i)) for i in range(5)), conversation("no", "x")]
    prepared(rows, tmp_path, Chat.of(tokenizer), out=tmp_path, max_bad_rows=1.0)
    assert "expected [INST] before [/INST]" in capsys.readouterr().out


# Plain text, white space, near duplicates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [8, 9, 20, 1000])
def test_plain_text_becomes_pieces_that_make_the_text(chat, tmp_path, limit):
    texts = ["a plain text of some words, é and 東京", "b", "exactly"]
    examples = prepared([{"text": text} for text in texts], tmp_path, chat, max_length=limit)
    pieces = {}
    for example in examples.training:
        assert example.longest <= limit
        assert not example.trained
        pieces.setdefault(examples.where[example.index].rpartition(":")[2], []).extend(example.prompt + example.completions[0])
    assert pieces == {str(line): [*ids_of(text), chat.end_of_turn] for line, text in enumerate(texts, 1)}
    assert examples.facts["overlong"] == examples.facts["cut"] == 0
    assert len(examples.where) == len(examples.probability) == len(examples.training)


def test_pieces_of_one_text_are_on_one_side_of_the_split(chat, tmp_path):
    examples = prepared([{"text": f"{i} " * 30} for i in range(30)], tmp_path, chat, max_length=16, holdout=0.5)
    training, heldout = ({examples.where[example.index] for example in part} for part in (examples.training, examples.heldout))
    assert not training & heldout
    assert len(heldout) > 3


def joining_chat():
    """A tokenizer that makes one token of two line ends, so that a reply's own join those that open its turn."""
    from tokenizers import Tokenizer, models

    tokenizer = make_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {**backend["model"]["vocab"], "ĊĊ": 261}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")])
    assert isinstance(tokenizer.backend_tokenizer, Tokenizer)
    return Chat.of(tokenizer)


def test_white_space_before_a_reply_is_left_out_only_where_it_joins_the_opening(chat, tmp_path):
    rows = [conversation("say red", "\n\nred"), conversation("say blue", " blue")]
    kept = prepared(rows, tmp_path, chat).training
    assert [chat.tokenizer.decode(example.completions[0]) for example in kept] == ["\n\nred<|end|>", " blue<|end|>"]
    joining = joining_chat()
    trimmed = prepared(rows, tmp_path, joining).training
    assert [joining.tokenizer.decode(example.completions[0]) for example in trimmed] == ["red<|end|>", " blue<|end|>"]
    pair = preference("say red", "\n\nred", "\n\nblue")
    (example,) = prepared([pair], tmp_path, joining, "preference").training
    assert [joining.tokenizer.decode(ids) for ids in example.completions] == ["red<|end|>", "blue<|end|>"]


def test_near_duplicates_are_left_out_where_asked_for(chat, tmp_path):
    text = "the quick brown fox jumps over the lazy dog and runs far away into the deep dark wood until night falls"
    rows = [conversation(f"tell {i}", f"{i} {text[i:]}" if i == 9 else str(i) * 9) for i in range(10)]
    rows += [conversation("tell me a story", text), conversation("tell me a story", text + " again")]
    assert prepared(rows, tmp_path, chat).facts["training"] == 12
    out = tmp_path / "artifact"
    out.mkdir()
    examples = prepared(rows, tmp_path, chat, out=out, near_duplicates=0.7)
    assert examples.facts["training"] == 11
    assert examples.facts["unfit"] == {"near duplicate of an earlier record": 1}
    (row,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert row == {"where": f"{tmp_path}/rows.jsonl:12", "reason": "near duplicate of an earlier record"}


# Prompts ---------------------------------------------------------------------------------------------------------------------------


def test_prompts_are_what_a_plain_rendering_gives(chat, tmp_path):
    rows = [{"prompt": turns("say red")}, {"prompt": turns("a", "b", "c", system="s")}]
    found = [ids for _, ids in prompt_ids("ppo", load(rows, tmp_path, "prompt"), chat, 0.0)]
    assert found == [plain([*row["prompt"], {"role": "assistant", "content": "x"}], "last")[0] for row in rows]


def test_prompts_that_do_not_fit_are_counted_stopped_and_listed(chat, tmp_path):
    rows = [*({"prompt": turns(f"say {i}")} for i in range(9)), {"prompt": turns("say <|pad|>")}]
    with pytest.raises(AlignError) as error:
        prompt_ids("ppo", load(rows, tmp_path, "prompt"), chat, 0.02)
    assert str(error.value).startswith("ppo.prompts: 1 of 10 rows cannot be used (10.0%; at most 2.0% may be left out):")
    assert f"its text contains the control token: {tmp_path}/rows.jsonl:10 (<|pad|>)" in str(error.value)
    assert "--set ppo.max_bad_rows=" in str(error.value)
    assert len(prompt_ids("ppo", load(rows, tmp_path, "prompt"), chat, 0.1, folder=tmp_path)) == 9
    (row,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert row["reason"] == "its text contains the control token"
    assert row["where"].startswith(f"{tmp_path}/rows.jsonl:10")


# The cache ---------------------------------------------------------------------------------------------------------------------------


class Rendered(Exception):
    pass


@pytest.fixture
def no_rendering(monkeypatch, tmp_path):
    """A cache of its own, and a switch after which nothing may be rendered."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))

    def refuse(*_, **__):
        raise Rendered

    return lambda: monkeypatch.setattr(tokenise, "render", refuse)


def test_a_second_time_renders_nothing(chat, tmp_path, no_rendering):
    before = everything(prepared(MANY[:50], tmp_path, chat, holdout=0.2))
    no_rendering()
    again = prepared(MANY[:50], tmp_path, chat, holdout=0.2)
    assert everything(again) == before
    (tmp_path / "moved").mkdir()
    moved = prepared(MANY[:50], tmp_path / "moved", chat, holdout=0.2)
    assert everything(moved) == before
    assert moved.where[0] == f"{tmp_path}/moved/rows.jsonl:1"


def test_what_does_not_change_tokens_renders_nothing(chat, tmp_path, no_rendering):
    prepared(MANY[:50], tmp_path, chat)
    no_rendering()
    for change in ({"holdout": 0.5}, {"seed": 3}, {"max_heldout": 1}, {"epochs": 3.0}, {"near_duplicates": 0.9}, {"max_bad_rows": 0.5}):
        prepared(MANY[:50], tmp_path, chat, **change)


@pytest.mark.parametrize("change", [{"max_length": 99}, {"train_on": "last"}, {"on_overlong": "cut_completion"}])
def test_what_changes_tokens_renders_again(chat, tmp_path, no_rendering, change):
    prepared(TALKS, tmp_path, chat)
    no_rendering()
    with pytest.raises(Rendered):
        prepared(TALKS, tmp_path, chat, **change)


def test_another_template_tokenizer_or_row_renders_again(chat, tmp_path, no_rendering):
    prepared(TALKS, tmp_path, chat)
    no_rendering()
    other = make_tokenizer()
    other.chat_template = "<|system|>\nhi<|end|>\n" + TEMPLATE
    with pytest.raises(Rendered):
        prepared(TALKS, tmp_path, Chat.of(other))
    with pytest.raises(Rendered):
        prepared(TALKS, tmp_path, joining_chat())
    with pytest.raises(Rendered):
        prepared([*TALKS, SHORT | {"id": 1}], tmp_path, chat)


def test_another_token_that_ends_texts_renders_again(chat, tmp_path):
    """It is no part of the tokenizer's vocabulary, but ends plain texts and may be written by templates."""
    other = make_tokenizer()
    other.eos_token = "<|pad|>"
    ends = [prepared([{"text": "some words"}], tmp_path, base).training[0].completions[0][-1] for base in (chat, Chat.of(other))]
    assert ends == [1, 0]


def test_several_processes_give_the_same(chat, tmp_path, monkeypatch):
    rows = [*MANY[:120], *with_unfit(10), LONG]
    kept = []
    for number, least in enumerate((10**9, 1)):
        monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / f"cache{number}"))
        monkeypatch.setattr(tokenise, "SEVERAL_PROCESSES_FROM", least)
        monkeypatch.setattr(tokenise, "PIECE", 7)
        monkeypatch.setattr(tokenise.os, "cpu_count", lambda: 3)
        examples = prepared(rows, tmp_path, chat, holdout=0.2, max_bad_rows=0.1, max_length=30)
        kept.append((everything(examples), list(examples.training), examples.facts, examples.where[5], examples.margin.tolist()))
    assert kept[0] == kept[1]
    assert len(list((tmp_path / "cache1" / "tokens").iterdir())) == 3


def test_what_is_sent_to_a_process_does_not_hold_the_records(chat, tmp_path, monkeypatch):
    """Neither the renderer nor the data set that it is mapped over, of which a process gets its share: eight bytes a row at most."""
    import dill

    import datasets

    sizes, real = [], datasets.Dataset.map

    def measured(self, function, **options):
        sizes.append(len(dill.dumps((self, function), recurse=True)))
        return real(self, function, **options)

    monkeypatch.setattr(datasets.Dataset, "map", measured)
    for count in (10, 2000):
        data = load([conversation(f"say {i}", "x" * 100) for i in (0, *range(count))], tmp_path)  # one is there twice
        assert len(tokenise.tokenised(data, chat, SFTSettings())) == count
    assert sizes[1] < sizes[0] * 1.1 + 2000 * 8


# Any conversation --------------------------------------------------------------------------------------------------------------------


ODD = [
    "<|end|>",
    "{{name}}",
    " \n",
    "\x00",
    "\u2028",
    "### Human: hi",
    "<|im_start|>",
    "[INST]",
    "\ufeff",
    "🙂",
    "é",
    "\\n",
    '"',
    "\r\n",
    "null",
    "`{{x}}`",
]
CONTENT = st.one_of(st.text(max_size=12), st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=4)), max_size=3).map("".join))
CONVERSATIONS = st.tuples(st.none() | CONTENT, st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))


def is_usable(messages):
    texts = [message["content"] for message in messages]
    return not any(
        not text.strip() or "<|end|>" in text or re.search(r"\{\{\s*[A-Za-z_]\w*\s*\}\}", text.replace("`{{x}}`", "")) for text in texts
    )


@pytest.fixture(scope="module")
def trimming_chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
    return Chat.of(tokenizer)


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@settings(derandomize=True, max_examples=60, deadline=None)
@given(talks=st.lists(CONVERSATIONS, min_size=1, max_size=5), train_on=st.sampled_from(["all", "last"]), trims=st.booleans())
def test_any_conversation_survives_conversion_rendering_and_mask_checks(chat, trimming_chat, anywhere, talks, train_on, trims):
    rows = []
    for system, exchanges in talks:
        opening = [] if system is None else [{"role": "system", "content": system}]
        rows.append({"messages": [*opening, *turns(*(text for exchange in exchanges for text in exchange))]})
    expected = {}
    for line, row in enumerate(rows, 1):
        if is_usable(row["messages"]):
            expected.setdefault(json.dumps(row), (line, row["messages"]))
    base = trimming_chat if trims else chat
    data = load(rows, anywhere)
    assert len(data) + sum(data.facts["rejected"].values()) == len(rows)
    if not expected:
        if len(data):
            with pytest.raises(AlignError, match="no row is left|cannot be used"):
                prepare("stage", "data", data, base, SFTSettings(holdout=0.0, max_bad_rows=1.0))
        return
    examples = prepare("stage", "data", data, base, SFTSettings(holdout=0.0, max_bad_rows=1.0, train_on=train_on))
    found = {int(examples.where[example.index].rpartition(":")[2]): example for example in examples.training}
    assert set(found) == {line for line, _ in expected.values()}
    for line, messages in expected.values():
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        replies = [reply.strip() if trims else reply for reply in (replies[-1:] if train_on == "last" else replies)]
        assert trained_runs(base, found[line]) == [ids_of(reply) + (base.end_of_turn,) for reply in replies]


def trained_runs(chat, example):
    """The trained tokens, run by run."""
    runs, before = [], False
    for token, counts in zip(example.completions[0], example.trained[0], strict=True):
        if counts:
            runs[-1:] = [(*runs[-1], token)] if before else [*runs[-1:], (token,)]
        before = counts
    return runs


def test_rewards_take_the_same_examples_as_dpo(chat, tmp_path):
    rows = [preference(f"say {i}", str(i), "no") for i in range(9)]
    data = load(rows, tmp_path, "preference")
    both = [prepare("stage", "preferences", data, chat, kind(holdout=0.2)) for kind in (DPOSettings, RewardSettings)]
    assert everything(both[0]) == everything(both[1])
