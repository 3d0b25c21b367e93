"""Messages to text: what a tokenizer's chat template renders, and what it has no place for. The only file that renders one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from align.files import shipped_file
from align.records import Message

Messages = Sequence[Message] | Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

USER = {"role": "user", "content": "Say seven."}
REPLY = {"role": "assistant", "content": "Seven 7"}
MARK = "zq7mark"  # in no template
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": MARK,
        "description": "Counts.",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer", "description": "How far."}}, "required": ["n"]},
    },
}
CALL, QUIET_CALL = (
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": {"n": n}}}]}
    for n in (MARK, 1)
)
RESULT = {"role": "tool", "content": MARK, "name": "count"}
# What a conversation may hold: messages in which it carries MARK, and what a refusal calls it.
_MARKED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "system": ([{"role": "system", "content": MARK}, USER, REPLY], "a system turn"),
    "tools": ([USER, REPLY], "tools"),
    "tool_calls": ([USER, CALL], "tool calls"),
    "tool": ([USER, QUIET_CALL, RESULT, REPLY], "the results of tools"),
}


class UnfitMessages(ValueError):
    """Messages that cannot be trained on. `reason` is the same text for all rows of one cause; `detail` says where or what."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id and text of every special token, those without a role of their own included."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches a control token, with the white space before it where that is part of it."""
    greedy = {token.content for token in tokenizer.added_tokens_decoder.values() if token.lstrip}
    texts = sorted(filter(None, control_tokens(tokenizer).values()), key=len, reverse=True)
    return re.compile("|".join(r"\s*" * (text in greedy) + re.escape(text) for text in texts) or r"(?!)")


def parting(expected: str, found: str) -> str:
    """Where two texts part and what each goes on with."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found)))
    return f"after {expected[max(0, at - 20) : at]!r} comes {found[at : at + 20]!r}, expected {expected[at : at + 20]!r}"


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template.

    `without` holds what it leaves out without a word, alone and beside tools; `call_ids` says that it asks for ids of tool calls.
    """

    tokenizer: PreTrainedTokenizerBase
    controls: re.Pattern[str]
    without: frozenset[tuple[str, bool]] = frozenset()
    call_ids: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Template:
        """Find out what the tokenizer's template knows. One without a template gets prompts/chat_template.jinja, which adds no tokens."""
        if not tokenizer.chat_template:
            plain = shipped_file("prompts/chat_template.jinja").read_text()
            begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
            tokenizer.chat_template = ("{{- bos_token -}}\n" if begins else "") + plain
        template = cls(tokenizer, _pattern(tokenizer))
        with_ids = cls(tokenizer, template.controls, call_ids=True)
        if not template._takes("tool_calls") and with_ids._takes("tool_calls"):
            template = with_ids
        without = {(kind, tools) for kind in _MARKED for tools in (False, True) if template._leaves_out(kind, tools)}
        return cls(tokenizer, template.controls, frozenset(without), template.call_ids)

    def _takes(self, kind: str) -> bool:
        try:
            return bool(self.text(self._plain(_MARKED[kind][0]), [TOOL]))
        except UnfitMessages:
            return False

    def _leaves_out(self, kind: str, tools: bool) -> bool:
        """Whether the template drops it without a word. One that refuses it says so each time, in its own words."""
        if kind == "tools" and not tools:
            return False
        messages = self._plain(_MARKED[kind][0])
        offered = {**TOOL, "function": {**TOOL["function"], "name": MARK if kind == "tools" else "count"}}
        try:
            return MARK not in self.text(messages, [offered] if tools else None)
        except UnfitMessages:
            return False

    def source(self, tools: Tools = None) -> str:
        """The Jinja text; a tokenizer may have one more for conversations with tools."""
        return self.tokenizer.get_chat_template(None, tools)

    def text(self, messages: list[dict[str, Any]], tools: Tools = None, opens_reply: bool = False) -> str:
        """Messages of `checked` as text, with the words that open the assistant's turn where asked for.

        Raises:
            UnfitMessages: where the template refuses them.
        """
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=opens_reply)
        except (TemplateError, TypeError, ValueError) as error:  # what templates raise, and the operators and filters they use
            raise UnfitMessages(f"the chat template refuses it: {error}") from None

    def checked(self, messages: Messages, tools: Tools = None) -> list[dict[str, Any]]:
        """Messages as the template takes them: dicts without empty keys.

        Raises:
            UnfitMessages: where a text contains a control token, or the template has no place for a turn or the tools.
        """
        plain = self._plain(messages)
        for message in plain:
            self.check_text(message["content"])
            if len(message) > 2:
                self.check_text(json.dumps({**message, "content": ""}, ensure_ascii=False))
        if tools:
            self.check_text(json.dumps(tools, ensure_ascii=False))
        if self.without:
            held = {message["role"] for message in plain}
            held |= {"tool_calls" for message in plain if "tool_calls" in message} | ({"tools"} if tools else set())
            for kind, (_, name) in _MARKED.items():
                if kind in held and (kind, bool(tools)) in self.without:
                    raise UnfitMessages(f"the chat template has no place for {name}")
        return plain

    def _plain(self, messages: Messages) -> list[dict[str, Any]]:
        plain: list[dict[str, Any]] = []
        calls = 0
        waiting: list[str] = []
        for message in messages:
            turn: dict[str, Any] = {"role": message["role"], "content": message.get("content") or ""}
            turn |= {key: message[key] for key in ("tool_calls", "name") if message.get(key)}
            if self.call_ids and "tool_calls" in turn:
                turn["tool_calls"] = [{"id": f"call{calls + i:05}", **call} for i, call in enumerate(turn["tool_calls"])]
                waiting = [call["id"] for call in turn["tool_calls"]]
                calls += len(waiting)
            if self.call_ids and turn["role"] == "tool" and waiting:
                turn["tool_call_id"] = waiting.pop(0)
            plain.append(turn)
        return plain

    def check_text(self, text: str) -> None:
        """Refuse a text that would become a control token."""
        if found := self.controls.search(text):
            raise UnfitMessages("its text contains the control token", found[0].strip())

    def last_control(self, text: str, begin: int) -> int:
        """Where the last control token of a text from `begin` on starts, or `begin`. Nothing in a token reaches over it."""
        start = begin
        for match in self.controls.finditer(text, begin):
            start = match.start()
        return start
