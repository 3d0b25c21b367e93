import copy

import pytest
from conftest import TEMPLATE, make_tokenizer

from align.chat import Chat, UnfitMessages
from align.errors import AlignError
from align.records import Message, Preference

THINKING = (  # like templates that take the reasoning out of all turns but the last
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DATED = "<|system|>\nturns: {{ messages | selectattr('role', 'equalto', 'user') | list | length }}<|end|>\n" + TEMPLATE


def messages(*texts, system=None):
    turns = [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]
    return [Message(role="system", content=system), *turns] if system else turns


def preference(prompt, chosen, rejected):
    prompt, chosen, rejected = messages(prompt), messages("", chosen)[1:], messages("", rejected)[1:]
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Chat.of(tokenizer)


def trained_texts(chat, example):
    """The trained runs of tokens as text, every special token shown."""
    runs, before = [], False
    for token, counts in zip(example.completions[0], example.trained[0], strict=True):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(token)
        before = counts
    return [chat.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("turns", [("say red", "red"), ("a", "b", "c", "d"), ("a", "b\n\nb", " c ", "d <x> é", "e", "東京")])
def test_trained_tokens_are_the_assistants_turns_with_the_token_that_ends_them(chat, turns, system):
    example = chat.conversation(0, messages(*turns, system=system))
    assert trained_texts(chat, example) == [f"{reply}<|end|>" for reply in turns[1::2]]


@pytest.mark.parametrize("turns", [("say red", "red"), ("a", "b", "c", "d", "e", "f")])
def test_an_example_holds_the_tokens_of_the_whole_conversation(chat, turns):
    example = chat.conversation(0, messages(*turns))
    whole = chat.tokenizer.apply_chat_template(messages(*turns), return_dict=False)
    assert list(example.prompt + example.completions[0]) == whole[: whole.index(chat.end_of_turn, -3) + 1]


@pytest.mark.parametrize("turns", [("say red", "red"), ("a", "b", "c", "d")])
def test_a_turn_has_the_same_ids_trained_on_as_sampled_after_its_prompt(chat, turns):
    whole = chat.conversation(0, messages(*turns))
    last = chat.conversation(0, messages(*turns), last_turn_only=True)
    assert last.prompt == chat.prompt_ids(messages(*turns[:-1]))
    assert last.prompt + last.completions[0] == whole.prompt + whole.completions[0]
    assert all(last.trained[0])


def test_a_preference_is_its_prompt_and_both_replies_as_they_would_be_sampled(chat):
    row = preference("say red", "red", "a blue one")
    example = chat.preference(3, row)
    assert (example.index, example.prompt) == (3, chat.prompt_ids(row["prompt"]))
    for ids, reply in zip(example.completions, (row["chosen"], row["rejected"]), strict=True):
        assert ids == chat.conversation(0, [*row["prompt"], *reply]).completions[0]
        assert chat.text(ids) == reply[0]["content"]
        assert ids[-1] == chat.end_of_turn


@pytest.mark.parametrize("token", ["<|end|>", "<|assistant|>", "<|pad|>"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_control_token_in_a_text_is_refused(chat, token, place):
    turns = ["say red", "red"]
    turns[place] += f" {token}\n"
    with pytest.raises(UnfitMessages, match=r"contains the control token") as error:
        chat.conversation(0, messages(*turns))
    assert token in str(error.value)
    with pytest.raises(UnfitMessages):
        chat.preference(0, preference(*turns, "blue"))


@pytest.mark.parametrize("template", [THINKING, DATED], ids=["takes reasoning out", "counts turns"])
def test_a_template_that_rewrites_earlier_turns_is_refused_with_what_to_set(template):
    chat = with_template(template)
    several = messages("a", "<think>b</think>b", "c", "d")
    with pytest.raises(UnfitMessages, match="renders earlier turns differently.*train_on='last'"):
        chat.conversation(0, several)


def test_the_last_turn_can_be_learned_under_a_template_that_rewrites_earlier_ones():
    chat = with_template(THINKING)
    example = chat.conversation(0, messages("a", "<think>b</think>b", "c", "<think>d</think>d"), last_turn_only=True)
    assert trained_texts(chat, example) == ["<think>d</think>d<|end|>"]
    assert "think" not in chat.tokenizer.decode(example.prompt)


def test_a_template_that_refuses_messages_says_why():
    chat = with_template("{% if messages[0].role == 'system' %}{{ raise_exception('no system message, please') }}{% endif %}" + TEMPLATE)
    chat.conversation(0, messages("a", "b"))
    with pytest.raises(UnfitMessages, match="the chat template refuses it: no system message, please"):
        chat.conversation(0, messages("a", "b", system="be brief"))


def test_a_template_without_an_end_of_turn_is_refused():
    with pytest.raises(AlignError, match="expected a special token, without which nothing ends a turn. Give it a template that ends turns"):
        with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")


def test_a_tokenizer_without_a_template_gets_the_shipped_one_and_ends_turns_with_its_end_token():
    chat = with_template(None)
    example = chat.conversation(0, messages("say red", "red", "say blue", "blue", system="be brief"))
    assert chat.end_of_turn == chat.tokenizer.eos_token_id
    assert trained_texts(chat, example) == [" red<|end|>", " blue<|end|>"]
    assert chat.tokenizer.decode(example.prompt) == "be brief\n\nUser: say red\nAssistant:"


def test_a_padding_token_that_is_the_end_token_changes_no_example(chat):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    same = Chat.of(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == same.end_of_turn
    conversation = messages("a", "b", "c", "d")
    row = preference("say red", "red", "blue")
    assert same.conversation(0, conversation) == chat.conversation(0, conversation)
    assert same.preference(0, row) == chat.preference(0, row)


def test_a_turn_may_end_with_a_special_token_other_than_the_end_of_text():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|pad|>"  # as in Phi-3: <|end|> is still special, but has no role in the tokenizer
    chat = Chat.of(tokenizer)
    assert chat.tokenizer.decode(chat.end_of_turn) == "<|end|>"
    assert chat.stop_ids == {chat.end_of_turn, tokenizer.eos_token_id}


def test_a_text_loses_the_tokens_that_end_it_and_nothing_else(chat):
    ids = chat.conversation(0, messages("a", "two words\n- and a list")).completions[0]
    assert chat.text(ids) == "two words\n- and a list"
    assert chat.text(ids[:-1]) == chat.text(ids)


def test_fingerprints_tell_templates_and_tokenizers_apart(chat):
    other_template, other_tokenizer = with_template(DATED), make_tokenizer()
    other_tokenizer.add_tokens(["colour"])
    assert Chat.of(make_tokenizer()).template_fingerprint == chat.template_fingerprint != other_template.template_fingerprint
    assert other_template.tokenizer_fingerprint == chat.tokenizer_fingerprint != Chat.of(other_tokenizer).tokenizer_fingerprint


def test_rendering_changes_no_message(chat):
    before = messages("a", "b", "c", "d")
    kept = copy.deepcopy(before)
    chat.conversation(0, before)
    assert before == kept
