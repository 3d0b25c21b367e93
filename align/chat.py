"""Messages to token ids, and which of them are trained. The only file that assembles tokens from messages.

A conversation is rendered as text, cut before the control token that opens each turn of the assistant, and tokenised piece by
piece; nothing in a piece reaches over a control token, so the pieces make the tokens of the whole text. A reply begins where
the words that open its turn end, so a completion has the same ids whether it is trained on, scored, or sampled after its prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.errors import AlignError
from align.model.packing import Example
from align.records import Preference
from align.templates import CALL, REPLY, RESULT, TOOL, USER, Messages, Template, Tools, UnfitMessages, parting

__all__ = ["Chat", "Ids", "JoinedReply", "UnfitMessages"]

Ids = tuple[int, ...]
SHORT, KEPT = 64, 64  # characters of an opening whose ids are kept, and how many are


class Parted(UnfitMessages):
    """The assembled tokens are not the tokenizer's own: a fault of the template, or of this file, not of the row."""


class JoinedReply(UnfitMessages):
    """A token reaches over the seam between the words that open a turn and its reply: white space there, as a rule."""


class Turn(NamedTuple):
    """A turn of the assistant as text: the words that open it, from their last control token on, and those with what follows.

    The text goes on to the next turn of the assistant, or to the token that ends the last one.
    """

    opening: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the token that ends a turn."""

    tokenizer: PreTrainedTokenizerBase
    end_of_turn: int
    stop_ids: frozenset[int]
    template: Template
    _known: dict[str, list[int]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _end_text(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.end_of_turn)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": {}}

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> Chat:
        """The tokenizer of a base. One without a chat template gets prompts/chat_template.jinja, which adds no tokens."""
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        return cls.of(tokenizer)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Chat:
        """Find out how the tokenizer's template ends a turn of the assistant, and hold it against the tokenizer's own rendering.

        Raises:
            AlignError: if the template cannot be trained on, with the place where it parts from what was expected.
        """
        try:
            template = Template.of(tokenizer)
            _, found, after = template.text([USER, REPLY]).rpartition(REPLY["content"])
            if not found:
                raise UnfitMessages("it does not render the assistant's reply", f"no {REPLY['content']!r} in {after!r}")
        except UnfitMessages as error:
            raise _refusal(tokenizer, error) from None
        end = template.controls.search(after)
        if not end:
            raise AlignError(
                f"base {tokenizer.name_or_path!r}: after the assistant's reply its chat template gives {after!r}; "
                "expected a special token, without which nothing ends a turn. Give it a template that ends turns, or another base."
            )
        end_of_turn = tokenizer.convert_tokens_to_ids(end[0].strip())
        stop_ids = {end_of_turn} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
        chat = cls(tokenizer, end_of_turn, frozenset(stop_ids), template)
        try:
            chat._verify_probes()
        except UnfitMessages as error:
            raise _refusal(tokenizer, error) from None
        return chat

    @property
    def template_fingerprint(self) -> str:
        """A short hash of the chat template."""
        source = self.tokenizer.chat_template
        return _short_hash(source if isinstance(source, str) else json.dumps(source, sort_keys=True))

    @property
    def tokenizer_fingerprint(self) -> str:
        """A short hash of everything that decides how text becomes ids."""
        return _short_hash(self.tokenizer.backend_tokenizer.to_str())

    def text(self, ids: Ids | list[int]) -> str:
        """A completion's text, without the token that ended it."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=True).strip()

    def prompt_ids(self, messages: Messages, tools: Tools = None) -> Ids:
        """Messages up to and with the words that open the assistant's turn."""
        text = self.template.text(self.template.checked(messages, tools), tools, opens_reply=True)
        return tuple(self._encode([text])[text])

    def conversation(self, index: int, messages: Messages, last_turn_only: bool = False, tools: Tools = None) -> Example:
        """A conversation as an example that trains the assistant's turns, each with the token that ends it.

        Raises:
            UnfitMessages: where there is no such turn, or the template renders earlier turns differently once later ones follow.
        """
        plain = self.template.checked(messages, tools)
        turns = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
        if not turns:
            raise UnfitMessages("it has no turn of the assistant to train on")
        before, pieces = self._cut(plain, turns[-1:] if last_turn_only else turns, tools)
        ids = self._encode([before, *(piece.text for piece in pieces)], [piece.opening for piece in pieces])
        prompt = (*ids[before], *ids[pieces[0].opening])
        completion, trained = self._join(pieces, ids)
        return Example(index, prompt, (completion,), (trained,))

    def preference(
        self,
        index: int,
        prompt: Preference | Messages,
        chosen: Messages = (),
        rejected: Messages = (),
        tools: Tools = None,
    ) -> Example:
        """A preference as an example with two completions: chosen, rejected. Takes a row, or its columns."""
        if isinstance(prompt, Mapping):
            return self.preference(index, prompt["prompt"], prompt["chosen"], prompt["rejected"], prompt.get("tools"))
        opening = len(prompt)
        sides = []
        for side in (chosen, rejected):
            plain = self.template.checked([*prompt, *side], tools)
            turns = [i for i in range(opening, len(plain)) if plain[i]["role"] == "assistant"]
            if turns[:1] != [opening]:
                raise UnfitMessages("a side does not begin with a turn of the assistant")
            sides.append(self._cut(plain, turns, tools))
        texts = [text for before, pieces in sides for text in (before, *(piece.text for piece in pieces))]
        ids = self._encode(texts, [piece.opening for _, pieces in sides for piece in pieces])
        completions, trained = zip(*(self._join(pieces, ids) for _, pieces in sides), strict=True)
        before, pieces = sides[0]
        shared = (*ids[before], *ids[pieces[0].opening])
        return Example(index, shared, completions, () if all(map(all, trained)) else trained)

    def plain_text(self, index: int, text: str, max_tokens: int) -> list[Example]:
        """A plain text for language modelling, in consecutive pieces of at most `max_tokens` tokens.

        The prompt of a piece is the token that begins texts, or the piece's first token where the tokenizer has none. The last
        piece ends with the token that ends texts.
        """
        if max_tokens < 4:
            raise ValueError(f"max_tokens is {max_tokens}; expected at least 4")
        self.template.check_text(text)
        ids = list(self._encode([text])[text])
        if not ids:
            raise UnfitMessages("it has no text to train on")
        ids.append(self.end_of_turn if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id)
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        room = max_tokens - len(begin)
        starts = list(range(0, len(ids), room))
        if not begin and len(ids) - starts[-1] == 1:
            starts[-1] -= 1  # a last token alone would have nothing that predicts it
        pieces = [begin + ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
        return [Example(index, tuple(piece[:1]), (tuple(piece[1:]),)) for piece in pieces]

    def verify(self, messages: Messages, tools: Tools = None, last_turn_only: bool = False) -> None:
        """Hold a conversation's tokens and trained spans against the tokenizer's own rendering of the whole.

        Raises:
            UnfitMessages: with the place where they part; or as `conversation` does.
        """
        example = self.conversation(0, messages, last_turn_only, tools)
        ids = example.prompt + example.completions[0]
        trained = (False,) * len(example.prompt) + example.trained[0]
        plain = self.template.checked(messages, tools)
        turns = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
        plain = plain[: turns[-1] + 1]
        own = self.tokenizer.apply_chat_template(plain, tools=tools, tokenize=True, return_dict=False)
        self._compare("the tokens part from the tokenizer's own rendering", own[: len(ids)], ids)
        for turn in turns[-1:] if last_turn_only else turns:
            prompt = self.prompt_ids(messages[:turn], tools)
            self._compare("the tokens part from those of the prompt alone", prompt, ids[: len(prompt)])
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.template.source(tools)):
            marked = self.tokenizer.apply_chat_template(plain, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
            self._compare_spans(ids, trained, marked["assistant_masks"], len(example.prompt) if last_turn_only else 0)

    def _verify_probes(self) -> None:
        """The plainest conversation must come out right, and every other one that can be assembled at all."""
        self.verify([USER, REPLY])
        for messages, tools in _probes():
            for last_turn_only in (False, True):
                try:
                    self.verify(messages, tools, last_turn_only)
                except Parted:
                    raise
                except UnfitMessages:
                    continue  # what a template cannot do with some conversations is said row by row

    def _cut(self, messages: list[dict[str, Any]], turns: list[int], tools: Tools) -> tuple[str, list[Turn]]:
        """The text before the first of these turns, and the turns."""
        render, whole = self.template.text, self.template.text(messages[: turns[-1] + 1], tools)
        cuts, opened, end = [], [0], 0
        for turn in turns:
            opening = render(messages[:turn], tools, opens_reply=True)
            rendered = whole if turn == turns[-1] else render(messages[: turn + 1], tools)
            if not rendered.startswith(opening):
                raise UnfitMessages("the chat template renders the prompt differently once a reply follows", parting(opening, rendered))
            cuts.append(self.template.last_control(opening, opened[-1]))
            opened.append(len(opening))
            end = self._end(rendered, len(opening))
            if not whole.startswith(rendered[:end]):
                raise UnfitMessages(
                    "the chat template renders earlier turns differently once later ones follow; set train_on='last'",
                    parting(rendered[:end], whole),
                )
        pieces = zip(cuts, opened[1:], [*cuts[1:], end], strict=True)
        return whole[: cuts[0]], [Turn(whole[cut:opening], whole[cut:stop]) for cut, opening, stop in pieces]

    def _end(self, rendered: str, opening: int) -> int:
        """Where the token ends that ends the last turn of a rendered conversation."""
        place = rendered.find(self._end_text, opening)
        if place < 0:
            raise UnfitMessages(f"its rendered reply has no {self._end_text} at its end")
        end = place + len(self._end_text)
        if after := self.template.controls.sub("", rendered[end:]).strip():
            raise UnfitMessages(f"its rendered reply goes on after {self._end_text}", repr(after[:20]))
        return end

    def _join(self, turns: list[Turn], ids: dict[str, list[int]]) -> tuple[Ids, tuple[bool, ...]]:
        """The tokens from the first reply on, and which of them are trained."""
        flat: list[int] = []
        begins: list[int] = []
        for opening, text in turns:
            if ids[text][: len(ids[opening])] != ids[opening]:
                reason = "the tokenizer joins the beginning of a reply to the words that open its turn (white space there, as a rule)"
                raise JoinedReply(reason, repr(text[len(opening) :][:20]))
            begins.append(len(flat) + len(ids[opening]))
            flat += ids[text]
        trained = [False] * len(flat)
        for begin in begins:
            end = flat.index(self.end_of_turn, begin) + 1
            trained[begin:end] = [True] * (end - begin)
        return tuple(flat[begins[0] :]), tuple(trained[begins[0] :])

    def _encode(self, texts: list[str], openings: Sequence[str] = ()) -> dict[str, list[int]]:
        """Ids of each text, in one call and without a token that begins texts. Openings come again and again: a few are kept."""
        known = {text: self._known[text] for text in openings if text in self._known}
        new = [text for text in dict.fromkeys([*texts, *openings]) if text not in known]
        backend = self.tokenizer.backend_tokenizer  # several times as fast as the tokenizer around it
        if backend.truncation or backend.padding:  # left by someone's call of that tokenizer
            backend.no_truncation()
            backend.no_padding()
        found = backend.encode_batch_fast(new, add_special_tokens=False)
        ids = known | {text: encoding.ids for text, encoding in zip(new, found, strict=True)}
        if len(self._known) < KEPT:
            self._known.update((text, ids[text]) for text in openings if len(text) <= SHORT)
        return ids

    def _compare(self, what: str, own: Sequence[int], ours: Sequence[int]) -> None:
        if list(own) != list(ours):
            at = next((i for i, (a, b) in enumerate(zip(own, ours, strict=False)) if a != b), min(len(own), len(ours)))
            before, found, expected = (
                self.tokenizer.decode(ids) for ids in (own[max(0, at - 6) : at], ours[at : at + 6], own[at : at + 6])
            )
            raise Parted(what, f"at token {at}, after {before!r}, comes {found!r}, expected {expected!r}")

    def _compare_spans(self, ids: Ids, trained: Sequence[bool], marked: Sequence[int], begin: int) -> None:
        """Hold the trained spans against the template's {% generation %} blocks. White space and the end of a turn may differ."""
        for at in range(begin, len(ids)):
            if bool(marked[at]) != trained[at] and ids[at] != self.end_of_turn and self.tokenizer.decode([ids[at]]).strip():
                before, token = self.tokenizer.decode(ids[max(0, at - 6) : at]), self.tokenizer.decode([ids[at]])
                inside = "inside" if marked[at] else "outside"
                place = f"at token {at}, after {before!r}, {token!r} is {inside} of it"
                raise Parted("the turns of the assistant part from the template's {% generation %}", place)


def _probes() -> Iterator[tuple[list[dict[str, Any]], Tools]]:
    """Conversations of one and of three turns, with system turns and with tools, whose contents are as odd as data's."""
    for texts in (
        ("Blue. 12", "a é", "b", "c 3", "?", "d"),
        (" a\n", "\n\n b \n", "<think>\nx\n</think>\n\n7", " 7\n", "\tb", "<think>\nx\n</think>\n\n7"),
        ("東京 🙂", "🙂 8", "'s", ")", "1", ":"),
    ):
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        system = {"role": "system", "content": f"{texts[0]}."}
        for messages in (turns[:2], turns, [system, *turns[:2]], [system, *turns]):
            yield messages, None
    for tools in (None, [TOOL]):
        yield [USER, CALL, RESULT, REPLY], tools


def _refusal(tokenizer: PreTrainedTokenizerBase, error: UnfitMessages) -> AlignError:
    return AlignError(
        f"base {tokenizer.name_or_path!r}: its chat template cannot be trained on: {error}.\n"
        "  Expected every turn in its place, a reply right after the words that open its turn, and a special token at its end. "
        "Give the tokenizer such a template, or take another base."
    )


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
