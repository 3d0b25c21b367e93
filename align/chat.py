"""Messages to token ids, and which of them are trained. The only file that knows chat templates.

A conversation is rendered as text by the tokenizer's template, cut where each turn of the assistant begins and ends, and
tokenised piece by piece. So a completion has the same ids whether it is trained on, scored, or sampled after its prompt.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.errors import AlignError
from align.files import shipped_file
from align.model.packing import Example
from align.records import Message, Preference

Ids = tuple[int, ...]


class UnfitMessages(ValueError):
    """Messages that cannot be rendered; the text says why."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the token that ends a turn."""

    tokenizer: PreTrainedTokenizerBase
    end_of_turn: int
    stop_ids: frozenset[int]

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> Chat:
        """The tokenizer of a base. One without a chat template gets prompts/chat_template.jinja, which adds no tokens."""
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        return cls.of(tokenizer)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Chat:
        """Find out how the tokenizer's template ends a turn of the assistant."""
        if not tokenizer.chat_template:
            tokenizer.chat_template = shipped_file("prompts/chat_template.jinja").read_text()
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(probe, tokenize=False)
        tail = tokenizer.encode(text[text.rindex("b") + 1 :], add_special_tokens=False)
        special = [token for token in tail if token in _control_tokens(tokenizer)]
        if not special:
            raise AlignError(
                f"base {tokenizer.name_or_path!r}: after the assistant's reply its chat template gives {text[text.rindex('b') + 1 :]!r}; "
                "expected a special token, without which nothing ends a turn. Give it a template that ends turns, or another base."
            )
        stop_ids = {special[0]} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
        return cls(tokenizer, special[0], frozenset(stop_ids))

    @property
    def template_fingerprint(self) -> str:
        """A short hash of the chat template."""
        return hashlib.sha256(self.tokenizer.chat_template.encode()).hexdigest()[:16]

    @property
    def tokenizer_fingerprint(self) -> str:
        """A short hash of everything that decides how text becomes ids."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]

    def text(self, ids: Ids | list[int]) -> str:
        """A completion's text, without the token that ended it."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=True).strip()

    def prompt_ids(self, messages: list[Message]) -> Ids:
        """Messages up to and with the words that open the assistant's turn."""
        return self._ids(self._render(messages, opens_reply=True))

    def conversation(self, index: int, messages: list[Message], last_turn_only: bool = False) -> Example:
        """A conversation as an example that trains the assistant's turns, each with the token that ends it.

        Raises:
            UnfitMessages: where there is no such turn, or the template renders earlier turns differently once later ones follow.
        """
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        turns = turns[-1:] if last_turn_only else turns
        if not turns:
            raise UnfitMessages("it has no turn of the assistant to train on")
        messages = messages[: turns[-1] + 1]
        whole, at = self._render(messages), 0
        completion: list[int] = []
        trained: list[bool] = []
        prompt: Ids = ()
        for turn in turns:
            opening = self._render(messages[:turn], opens_reply=True)
            ending = self._render(messages[: turn + 1])
            if not whole.startswith(opening) or not whole.startswith(ending):
                raise UnfitMessages("the chat template renders earlier turns differently once later ones follow; set train_on='last'")
            before, reply = self._ids(opening[at:]), self._reply_ids(ending[len(opening) :])
            prompt, completion = (before, completion) if turn == turns[0] else (prompt, completion + list(before))
            trained += [False] * (len(completion) - len(trained)) + [True] * len(reply)
            completion += reply
            at = len(opening) + self._reply_length(ending[len(opening) :])
        return Example(index, prompt, (tuple(completion),), (tuple(trained),))

    def preference(self, index: int, row: Preference) -> Example:
        """A preference as an example with two completions: chosen, rejected."""
        opening = self._render(row.prompt, opens_reply=True)
        completions = []
        for side in (row.chosen, row.rejected):
            whole = self._render([*row.prompt, *side])
            if not whole.startswith(opening):
                raise UnfitMessages("the chat template renders the prompt differently once a reply follows")
            completions.append(self._reply_ids(whole[len(opening) :]))
        return Example(index, self._ids(opening), tuple(completions))

    def _reply_length(self, text: str) -> int:
        """Characters of a rendered reply up to and with the token that ends it."""
        end = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
        place = text.find(end)
        if place < 0:
            raise UnfitMessages(f"its rendered reply has no {end} at its end")
        return place + len(end)

    def _reply_ids(self, text: str) -> Ids:
        return self._ids(text[: self._reply_length(text)])

    def _ids(self, text: str) -> Ids:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _render(self, messages: list[Message], opens_reply: bool = False) -> str:
        for message in messages:
            if found := next((t for t in _control_tokens(self.tokenizer).values() if t in message.content), None):
                raise UnfitMessages(f"its text contains the control token {found}")
        try:
            return self.tokenizer.apply_chat_template(
                [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=opens_reply
            )
        except TemplateError as error:
            raise UnfitMessages(f"the chat template refuses it: {error}") from None


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id and text of every special token, those without a role of their own included."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
