"""A model on this machine as a judge: the answers' log-probabilities where its reply would begin, or a reply that it writes.

What questions begin with alike is computed once: the template's first words for all of a row, the prompt for both orders of its pairs,
a completion for all pairs that show it first. Only the last token of each question goes through the output layer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch

from align.artifact import Artifact
from align.base import Base
from align.chat import Chat, Ids, UnfitMessages
from align.errors import AlignError
from align.judge.judgement import Question, Reply
from align.judge.verdict import from_logprobs, read_reply
from align.model.generate import SEQUENCES
from align.model.load import Sampler, load_role, open_trunk
from align.model.output import CHUNK
from align.model.tree import Tree, last_hidden_states, trees
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

    def stand_on(self, trunk: Trunk, chat: Chat) -> None:
        """Judge on weights that are in memory already, which must be those it would load."""
        self._loaded = trunk, chat, load_role(trunk, self.artifact)

    @cached_property
    def _answers(self) -> dict[str, Ids]:
        """The tokens that tell each answer: its first of a pair, all of a score with the one that ends the turn."""
        chat, ids, begins = self._loaded[1], dict[str, Ids](), dict[int, str]()
        for word in self._template.answer_words:
            turns = [Message(role="user", content="?"), Message(role="assistant", content=word)]
            try:
                tokens = ids[word] = chat.conversation(0, turns, last_turn_only=True).completions[0]
            except UnfitMessages as error:
                raise AlignError(f"{self._template.path}: the answer {word!r} can be no reply of {self.base.source!r}: {error}.") from None
            twin = begins.setdefault(tokens[0], word)
            if twin != word and self._template.kind == "pair":
                raise AlignError(
                    f"{self._template.path}: with the tokenizer of {self.base.source!r} the answers {twin!r} and {word!r} both begin with "
                    f"{chat.tokenizer.decode(tokens[:1])!r}, so their first tokens do not tell them apart. Expected ones that differ.\n"
                    "  Write single letters, such as 'first: A' and 'second: B', or 'reply: reasoning'."
                )
        return {word: tokens[:1] for word, tokens in ids.items()} if self._template.kind == "pair" else ids

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
        for places in windows(questions):
            room = max(map(len, self._answers.values())) - 1  # nothing is read after an answer's last token
            self._read(self._tokens(questions, places, on_reply, room), on_reply)

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

    def _read(self, asked: dict[int, Ids], on_reply: Tell) -> None:
        """Verdicts and scores by the log-probabilities of the answers, over the whole vocabulary in float32."""
        trunk, chat, role = self._loaded
        stems = {answer[:n] for answer in self._answers.values() for n in range(len(answer))}  # what an answer's token may come after
        columns = sorted({token for answer in self._answers.values() for token in answer})
        places: dict[Ids, list[int]] = {}
        for place, ids in asked.items():
            places.setdefault(ids, []).append(place)
        known: dict[Ids, _Next] = {}
        for tree in trees((ids + stem for ids in places for stem in stems), self.settings.row_tokens):
            known |= zip(tree.sequences, _next_tokens(trunk, role, tree, columns), strict=True)
            for ids in [ids for ids in places if all(ids + stem in known for stem in stems)]:
                after = {stem: known.pop(ids + stem) for stem in stems}
                logprobs = {
                    word: sum(after[answer[:n]].logprobs[token] for n, token in enumerate(answer)) for word, answer in self._answers.items()
                }
                reply = from_logprobs(logprobs, self._template, chat.tokenizer.decode([after[()].likeliest]))
                if reply.score is not None:
                    reply = replace(reply, raw=max(logprobs, key=logprobs.__getitem__))
                seconds = sum(each.seconds for each in after.values()) / len(places[ids])
                for place in places.pop(ids):
                    on_reply(place, replace(reply, prompt_tokens=len(ids), completion_tokens=0, seconds=seconds, price=0.0))

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


class _Next(NamedTuple):
    """What may come after a sequence: log-probabilities by token, the likeliest of all, and the seconds it took to know."""

    logprobs: dict[int, float]
    likeliest: int
    seconds: float


def _next_tokens(trunk: Trunk, role: Role, tree: Tree, columns: list[int]) -> list[_Next]:
    """What comes after each sequence of a row; log-probabilities of the tokens `columns`."""
    begun = time.perf_counter()
    found: list[tuple[list[float], int]] = []
    with trunk.computing(role):
        for hidden in last_hidden_states(trunk, tree).split(CHUNK):
            logits = trunk.output_layer(hidden).float()
            if type(trunk.output_layer) is torch.nn.Linear and trunk.output_layer.bias is None:
                # bfloat16 logits of this size come in steps of an eighth: the few that decide are made again, in float32
                logits[:, columns] = hidden.float() @ trunk.output_layer.weight[columns].float().T
            logits = trunk.softcap * torch.tanh(logits / trunk.softcap) if trunk.softcap else logits
            logprobs = logits[:, columns] - logits.logsumexp(-1, keepdim=True)
            found += zip(logprobs.tolist(), logits.argmax(-1).tolist(), strict=True)
    seconds = (time.perf_counter() - begun) / len(found)
    return [_Next(dict(zip(columns, logprobs, strict=True)), likeliest, seconds) for logprobs, likeliest in found]


def windows(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Places of questions, those of the same prompt and principle next to each other, some hundred at a time."""
    groups: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(json.dumps([question.prompt, question.principle], sort_keys=True), []).append(place)
    places = [place for group in groups.values() for place in group]
    for start in range(0, len(places), WINDOW):
        yield places[start : start + WINDOW]


def _messages(question: Question) -> list[Message]:
    return [*question.prompt, *question.first, *(question.second or [])]
