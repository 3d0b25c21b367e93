"""A model on this machine as a judge: the answers' log-probabilities where its reply would begin, or a reply that it writes.

Both orders of a pair, and other pairs of the same prompt, are one packed example whose prompt is the tokens they share; so what they
share is computed once. Only the last token of each question goes through the output layer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from align.artifact import Artifact
from align.base import Base
from align.chat import Chat, Ids, UnfitMessages
from align.errors import AlignError
from align.judge.judgement import Question, Reply
from align.judge.verdict import from_logprobs, read_reply
from align.model.forward import CHUNK, forward, hidden_states
from align.model.generate import SEQUENCES
from align.model.load import Sampler, load_role, open_trunk
from align.model.packing import Example, Row, pack
from align.model.trunk import Role, Trunk
from align.prompts import PromptTemplate
from align.records import Message
from align.settings import JudgeSettings

WINDOW = 256  # questions whose tokens are in memory at one time

Tell = Callable[[int, Reply], None]


class LocalJudge:
    """A base, or a policy on it. The weights are loaded when it is first asked.

    The answers of a pair are told apart by their first token. Those of a score need not be (1 and 10), so each is taken whole, with the
    token that ends the turn: exactly the probability that the judge would write it and nothing else.
    """

    def __init__(self, base: Base, artifact: Artifact | None, template: PromptTemplate, settings: JudgeSettings, dtype: str | None = None):
        """Name the judge; nothing is loaded yet.

        Args:
            base: a base model.
            artifact: a policy that stands on it, or none for the base itself.
            template: of a pair or a score.
            settings: rows and lengths.
            dtype: of the weights; the processor's native one unless given.
        """
        self.base, self.artifact, self.settings, self.dtype = base, artifact, settings, dtype
        self._template = template.expect("pair", "score")
        self.name = f"local {artifact.name if artifact else base.source}"
        self.model = artifact.identity if artifact else base.identity
        self.template = template.fingerprint
        self.pointwise = template.kind == "score"

    @cached_property
    def _loaded(self) -> tuple[Trunk, Chat, Role]:
        trunk, chat = open_trunk(self.base, self.artifact, self.dtype)
        return trunk, chat, load_role(trunk, self.artifact)

    @cached_property
    def _answers(self) -> dict[str, Ids]:
        """The tokens of each answer as a reply, with the one that ends the turn."""
        chat = self._loaded[1]
        opening = [Message(role="user", content="?")]
        ids = {
            word: chat.conversation(0, [*opening, Message(role="assistant", content=word)], last_turn_only=True).completions[0]
            for word in self._template.answer_words
        }
        begins: dict[int, str] = {}
        for word, tokens in ids.items():
            twin = begins.setdefault(tokens[0], word)
            if twin != word and self._template.kind == "pair":
                raise AlignError(
                    f"{self._template.path}: with the tokenizer of {self.base.source!r} the answers {twin!r} and {word!r} both begin with "
                    f"{chat.tokenizer.decode(tokens[:1])!r}, so their first tokens do not tell them apart. Expected ones that differ.\n"
                    "  Write single letters, such as 'first: A' and 'second: B', or 'reply: reasoning'."
                )
        return ids

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], on_reply: Tell) -> None:
        """Answer every question.

        One that the chat template has no place for, or that is longer than the model's context, is unparsed, and its raw reply says so.
        """
        if self._template.reasons:
            order = sorted(range(len(questions)), key=lambda i: -sum(len(m["content"]) for m in _messages(questions[i])))
            for start in range(0, len(order), SEQUENCES):
                self._write(self._tokens(questions, order[start : start + SEQUENCES], on_reply, self.settings.max_new_tokens), on_reply)
            return
        for window in windows(questions):
            longest = max(map(len, self._answers.values())) if self.pointwise else 0
            asked = [self._tokens(questions, places, on_reply, longest) for places in window]
            (self._read_scores if self.pointwise else self._read_pairs)([ids for ids in asked if ids], on_reply)

    def _tokens(self, questions: Sequence[Question], places: list[int], on_reply: Tell, room: int) -> dict[int, Ids]:
        """Token ids of the questions at these places, those that can be asked; `room` is for what comes after."""
        trunk, chat, _ = self._loaded
        context = getattr(trunk.model.config.get_text_config(), "max_position_embeddings", None)
        asked = {}
        for place in places:
            try:
                ids = chat.prompt_ids(self._template.fill(**questions[place].fields()))
            except UnfitMessages as error:
                on_reply(place, Reply("unparsed", f"[not asked: {error}]"))
                continue
            if context is not None and len(ids) + room > context:
                needed = f"{len(ids)} tokens" + (f" and {room} for the reply" if room else "")
                on_reply(place, Reply("unparsed", f"[not asked: {needed} are over the model's {context}]", prompt_tokens=len(ids)))
                continue
            asked[place] = ids
        return asked

    def _read_pairs(self, groups: list[dict[int, Ids]], on_reply: Tell) -> None:
        """Verdicts by the log-probabilities of the answers' first tokens, over the whole vocabulary in float32."""
        trunk, chat, role = self._loaded
        words = list(self._answers)
        columns = torch.tensor([self._answers[word][0] for word in words], device=trunk.device)
        examples, members = share_prefixes(groups, self.settings.row_tokens)
        for row in pack(examples, self.settings.row_tokens):
            begun = time.perf_counter()
            logprobs, likeliest = _next_tokens(trunk, role, row, columns)
            places = [place for example in row.examples for place in members[example.index]]
            seconds = (time.perf_counter() - begun) / sum(map(len, places))
            for same, row_logprobs, token in zip(places, logprobs.tolist(), likeliest.tolist(), strict=True):
                reply = from_logprobs(dict(zip(words, row_logprobs, strict=True)), self._template, chat.tokenizer.decode([token]))
                for place, length in same.items():
                    on_reply(place, replace(reply, prompt_tokens=length, completion_tokens=0, seconds=seconds, price=0.0))

    def _read_scores(self, groups: list[dict[int, Ids]], on_reply: Tell) -> None:
        """Scores by the log-probabilities of whole answers."""
        trunk, _, role = self._loaded
        words, answers = list(self._answers), tuple(self._answers.values())
        asked = {place: ids for group in groups for place, ids in group.items()}
        for row in pack([Example(place, ids, answers) for place, ids in asked.items()], self.settings.row_tokens):
            begun = time.perf_counter()
            per_answer = row.to(trunk.device).sum_per_completion(forward(trunk, role, row).logprobs).view(-1, len(words)).tolist()
            seconds = (time.perf_counter() - begun) / len(row.examples)
            for place, logprobs in zip(row.indices, per_answer, strict=True):
                likeliest = max(zip(logprobs, words, strict=True))[1]
                reply = from_logprobs(dict(zip(words, logprobs, strict=True)), self._template, likeliest)
                on_reply(place, replace(reply, prompt_tokens=len(asked[place]), completion_tokens=0, seconds=seconds, price=0.0))

    def _write(self, asked: dict[int, Ids], on_reply: Tell) -> None:
        """Let the judge write its replies, the likeliest token each time, and read them."""
        if not asked:
            return
        trunk, chat, role = self._loaded
        begun = time.perf_counter()
        completions = self._sampler.sample(role, list(asked.values()), 1, self.settings.max_new_tokens, 0.0, chat.stop_ids, seed=0)
        seconds = (time.perf_counter() - begun) / len(asked)
        for (place, ids), (completion,) in zip(asked.items(), completions, strict=True):
            reply = read_reply(chat.text(completion.ids), self._template)
            counted = replace(reply, prompt_tokens=len(ids), completion_tokens=len(completion.ids))
            on_reply(place, replace(counted, seconds=seconds, price=0.0))

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self._loaded[0])


def _next_tokens(trunk: Trunk, role: Role, row: Row, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of some tokens, and the likeliest of all, after each completion of a row.

    Returns:
        Shapes (completion, columns), float32, and (completion,).
    """
    row = row.to(trunk.device)
    found = []
    with trunk.computing(role):
        for hidden in hidden_states(trunk, row)[row.last].split(CHUNK):
            logits = trunk.output_layer(hidden).float()
            logits = trunk.softcap * torch.tanh(logits / trunk.softcap) if trunk.softcap else logits
            found.append((logits[:, columns] - logits.logsumexp(-1, keepdim=True), logits.argmax(-1)))
    logprobs, likeliest = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(likeliest)


def share_prefixes(groups: Sequence[dict[int, Ids]], row_tokens: int) -> tuple[list[Example], list[list[dict[int, int]]]]:
    """Questions as examples that compute what they begin with once.

    A group's questions share its prompt, and all groups the template's first words. An example has one shared beginning, so each group
    takes the one that saves it more tokens.

    Args:
        groups: token ids by place; the questions of a group begin alike.
        row_tokens: an example that would be larger is cut.

    Returns:
        The examples, each with its number as index, and for each completion of each example the places it answers, with their length.
    """
    groups = [group for group in groups if group]
    everywhere = len(os.path.commonprefix([ids for group in groups for ids in group.values()]))
    pooled: dict[Ids, dict[int, int]] = {}
    alone: list[dict[Ids, dict[int, int]]] = []
    for group in groups:
        same: dict[Ids, dict[int, int]] = {}
        for place, ids in group.items():
            same.setdefault(ids, {})[place] = len(ids)
        if len(same) * everywhere > (len(same) - 1) * len(os.path.commonprefix(list(same))):
            pooled |= same
        else:
            alone.append(same)
    examples: list[Example] = []
    members: list[list[dict[int, int]]] = []
    for same in [pooled, *alone]:
        sequences = list(same)
        shared = min(len(os.path.commonprefix(sequences)), min(map(len, sequences), default=1) - 1)  # no completion may be empty
        for part in _parts(sequences, shared, row_tokens):
            examples.append(Example(len(examples), part[0][:shared], tuple(ids[shared:] for ids in part)))
            members.append([same[ids] for ids in part])
    return examples, members


def _parts(sequences: list[Ids], shared: int, row_tokens: int) -> Iterator[list[Ids]]:
    """Sequences in order, as many at a time as fit a row beside what they share; one at least."""
    part: list[Ids] = []
    tokens = shared
    for ids in sequences:
        if part and tokens + len(ids) - shared > row_tokens:
            yield part
            part, tokens = [], shared
        part.append(ids)
        tokens += len(ids) - shared
    if part:
        yield part


def windows(questions: Sequence[Question]) -> Iterator[list[list[int]]]:
    """Places of questions, those of the same prompt and principle together, some hundred at a time."""
    groups: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(json.dumps([question.prompt, question.principle], sort_keys=True), []).append(place)
    window: list[list[int]] = []
    for group in groups.values():
        for start in range(0, len(group), WINDOW):
            window.append(group[start : start + WINDOW])
            if sum(map(len, window)) >= WINDOW:
                yield window
                window = []
    if window:
        yield window


def _messages(question: Question) -> list[Message]:
    return [*question.prompt, *question.first, *(question.second or [])]
