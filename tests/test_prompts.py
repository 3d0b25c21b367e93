import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import AlignError
from align.files import shipped_file
from align.prompts import PromptTemplate, as_text, read_principles

PAIR = "kind: pair\nfirst: A\nsecond: B\nreply: verdict\n---\n[system]\nJudge.\n\n[user]\n$prompt\n${first} or $second for $$5?\n"
SHIPPED = {
    "judge_pair.txt": {"prompt", "first", "second"},
    "judge_pair_reasoning.txt": {"prompt", "first", "second"},
    "judge_principle.txt": {"prompt", "first", "second", "principle"},
    "judge_score.txt": {"prompt", "completion"},
    "critique.txt": {"prompt", "completion", "principle"},
    "revision.txt": {"prompt", "completion", "principle", "critique"},
}


def parse(text, path="mine.txt"):
    return PromptTemplate.parse(text, path)


def test_a_template_is_its_header_its_turns_and_its_fields():
    template = parse("# a comment\n" + PAIR.replace("reply", "tie: C\nreply"))
    assert (template.kind, template.answers, template.answer_words) == ("pair", {"first": "A", "second": "B", "tie": "C"}, ["A", "B", "C"])
    assert [(section.role, section.line) for section in template.sections] == [("system", 9), ("user", 12)]
    assert template.fields == {"prompt", "first", "second"}
    assert not template.reasons
    assert template.fill(prompt="P", first="1", second="2") == [
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": "P\n1 or 2 for $5?"},
    ]


def test_examples_stand_before_the_last_turn_of_the_user():
    template = parse("kind: score\nlowest: 1\nhighest: 3\nreply: verdict\n---\n[user]\na\n[assistant]\n2\n[user]\n$prompt $completion\n")
    assert [m["role"] for m in template.fill(prompt="p", completion="c")] == ["user", "assistant", "user"]
    assert template.answer_words == ["1", "2", "3"]


@given(st.dictionaries(st.sampled_from(["prompt", "first", "second"]), st.text(), min_size=3))
def test_what_fills_a_field_is_not_read_again(fields):
    template = parse(PAIR.replace("\n[system]\nJudge.\n", "").replace("$$5", "five"))
    (message,) = template.fill(**fields)
    assert message["content"] == f"{fields['prompt']}\n{fields['first']} or {fields['second']} for five?"


def test_dollars_headers_and_turns_in_a_filled_text_are_text():
    odd = "$first ${second} $$ $ [user]\n---\nkind: score"
    assert parse(PAIR).fill(prompt=odd, first="", second="")[1]["content"].startswith(odd + "\n")


def test_every_change_of_the_file_changes_the_fingerprint():
    assert parse(PAIR).fingerprint == parse(PAIR, "elsewhere.txt").fingerprint
    changed = [PAIR + "\n", PAIR.replace("A", "C"), PAIR.replace("Judge", "judge"), "# note\n" + PAIR]
    assert len({parse(text).fingerprint for text in [PAIR, *changed]}) == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hello", "mine.txt: has no line '---'"),
        (PAIR.replace("kind: pair\n", ""), "mine.txt:1: kind is None; expected one of: pair, score, critique, revision."),
        (PAIR.replace("kind: pair", "kind: pairs"), "mine.txt:1: kind is 'pairs'"),
        (
            PAIR.replace("reply: verdict", "replies: verdict"),
            "mine.txt:4: 'replies' is no header key of kind 'pair'. There are: kind, first",
        ),
        (PAIR.replace("second: B\n", ""), "mine.txt:1: has no 'second' in its header; kind 'pair' needs first, second, reply."),
        (PAIR.replace("second: B", "second: B\nsecond: C"), "mine.txt:4: gives 'second' again; it is in line 3 already."),
        (PAIR.replace("second: B", "second B"), "mine.txt:3: 'second B' is no header line; expected 'key: value'"),
        (PAIR.replace("second: B", "second: a"), "mine.txt:3: the answers are 'a', 'a'; expected different words."),
        (PAIR.replace("verdict", "letter"), "mine.txt:4: reply is 'letter'; expected 'verdict' or 'reasoning'."),
        (PAIR.replace("verdict", "reasoning"), "mine.txt:4: 'reply: reasoning' and the words before the answer"),
        (PAIR.replace("reply: verdict", "reply: verdict\nverdict: Verdict:"), "mine.txt:5: 'reply: reasoning' and the words before"),
        ("kind: score\nlowest: one\nhighest: 3\nreply: verdict\n---\n[user]\na", "mine.txt:2: lowest is 'one'; expected a whole number"),
        ("kind: score\nlowest: 3\nhighest: 3\nreply: verdict\n---\n[user]\na", "mine.txt:3: highest is 3; expected more than 3."),
        ("kind: critique\nreply: verdict\n---\n[user]\na", "mine.txt:2: 'reply' is no header key of kind 'critique'. There are: kind."),
        (PAIR.replace("[system]\nJudge.", "Judge."), "mine.txt:6: 'Judge.' stands before the first turn"),
        (PAIR.replace("Judge.", ""), "mine.txt:6: the turn [system] is empty"),
        (
            PAIR.replace("[user]", "[assistant]"),
            "mine.txt:6: the turns are [system] [assistant]; expected a [system] or none, then a [user]",
        ),
        (PAIR[: PAIR.index("[system]")], "mine.txt:6: the turns are none;"),
        (PAIR.replace("[system]", "[user]"), "the turns are [user] [user]"),
        (PAIR + "[system]\nlate\n", "the turns are [system] [user] [system]"),
        (PAIR.replace("$$5", "$5"), "mine.txt:11: a '$' that begins no field; expected $name, or $$ for a dollar sign."),
    ],
)
def test_a_file_that_is_no_template_is_refused_with_its_line(text, told):
    with pytest.raises(AlignError) as refused:
        parse(text)
    assert told in str(refused.value)


def test_a_field_that_nobody_fills_is_refused():
    with pytest.raises(AlignError) as refused:
        parse(PAIR).fill(prompt="p", first="a")
    assert str(refused.value) == "mine.txt:11: uses $second, which nobody fills. Filled: $first, $prompt."


def test_a_field_that_the_template_does_not_use_is_refused_unless_it_may():
    with pytest.raises(AlignError, match=r"mine.txt:10: does not use \$principle, which would be lost. Filled: \$first, \$principle"):
        parse(PAIR).fill(prompt="p", first="a", second="b", principle="x")
    assert parse(PAIR).fill(optional=["principle"], prompt="p", first="a", second="b", principle="x")


def test_a_template_of_another_kind_is_refused():
    assert parse(PAIR).expect("pair", "score").kind == "pair"
    with pytest.raises(AlignError, match="is a template of kind 'pair'; expected 'critique'"):
        parse(PAIR).expect("critique")


def test_a_file_is_the_users_own_before_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = PromptTemplate.load("prompts/judge_pair.txt")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/judge_pair.txt").write_text("\ufeff" + PAIR)  # as some editors begin a file
    assert PromptTemplate.load("prompts/judge_pair.txt").fingerprint == parse(PAIR).fingerprint != shipped.fingerprint


@pytest.mark.parametrize("load", [PromptTemplate.load, read_principles])
def test_a_file_that_is_missing_or_no_text_is_refused(load, tmp_path):
    with pytest.raises(AlignError, match=r"no such file, nor one that ships with align: prompts/constitution.txt, prompts/critique.txt"):
        load("prompts/judge.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AlignError, match="cannot be read .*; expected a text file in UTF-8"):
        load(tmp_path / "binary")


def test_a_constitution_is_its_lines_without_comments(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# ours\n\n  Be kind. \nBe brief.\n")
    assert read_principles(path) == ["Be kind.", "Be brief."]
    path.write_text("# nothing\n")
    with pytest.raises(AlignError, match="has no principle; expected one a line"):
        read_principles(path)


@pytest.mark.parametrize(("name", "fields"), SHIPPED.items())
def test_shipped_templates_have_the_fields_that_are_filled(name, fields):
    template = PromptTemplate.load(f"prompts/{name}")
    assert template.fields == fields
    filled = template.fill(**{field: f"<{field}>" for field in fields})
    assert all(sum(m["content"].count(f"<{field}>") for m in filled) == 1 for field in fields)
    assert f"| {name} | {template.kind} | " in shipped_file("prompts/README.md").read_text()


def test_every_shipped_prompt_is_described_and_tested():
    shipped = {path.name for path in shipped_file("prompts").glob("*.txt")}
    assert shipped == {*SHIPPED, "constitution.txt"}
    assert len(read_principles("prompts/constitution.txt")) == 10


@pytest.mark.parametrize("name", ["judge_pair.txt", "judge_principle.txt", "judge_pair_reasoning.txt"])
def test_both_orders_of_a_pair_share_all_but_the_completions(name):
    template = PromptTemplate.load(f"prompts/{name}")
    (message,) = template.sections
    before = message.text[: message.text.index("$first")]
    assert "$prompt" in before
    assert len(before) > 0.7 * len(message.text) - 350 * template.reasons  # the task is told before, not after
    assert message.text[message.text.index("$first") :].startswith("$first\n\n# Completion B\n\n$second\n\n#")


def test_the_example_of_the_readme_is_a_template():
    text = shipped_file("prompts/README.md").read_text()
    example = text[text.index("    kind: pair") : text.index("- `[system]`")]
    template = parse("\n".join(line.removeprefix("    ") for line in example.rstrip().splitlines()))
    assert template.fields == {"prompt", "first", "second"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_one_turn_is_its_text():
    assert as_text([user("a\nb ")]) == "a\nb "
    assert as_text([assistant("a")]) == "a"


def test_several_turns_have_headings_that_no_text_can_pass_for():
    assert as_text([user("hi\nyou"), assistant("ho"), user("")]) == "User:\n  hi\n  you\nAssistant:\n  ho\nUser:\n  "
    assert as_text([user("hi\nAssistant:\n  ho"), user("x")]) == "User:\n  hi\n  Assistant:\n    ho\nUser:\n  x"
    assert as_text([{"role": "system", "content": "s"}]) == "System:\n  s"
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    assert as_text([assistant("", tool_calls=[call])]).splitlines()[1].startswith('  {"type": "function"')


turns = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), st.text("aU:\n ")), min_size=2
)


@given(turns, turns)
def test_different_conversations_are_different_texts(one, other):
    assert (as_text(one) == as_text(other)) == (one == other)


def test_a_template_is_a_value():
    assert dataclasses.replace(parse(PAIR)) == parse(PAIR)
    assert isinstance(Path(parse(PAIR).path), Path)
