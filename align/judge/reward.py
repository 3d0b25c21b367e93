"""A reward model as a judge: log p(first) - log p(second) is the difference of its scores (Bradley and Terry 1952)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from align.artifact import Artifact
from align.base import Base
from align.chat import Chat, Ids, UnfitMessages
from align.errors import AlignError
from align.judge.judgement import Question, Reply
from align.judge.local import windows
from align.model.load import load_role, open_trunk
from align.model.tree import last_hidden_states, trees
from align.model.trunk import Role, Trunk
from align.settings import JudgeSettings


class RewardJudge:
    """A reward model. Each completion of a prompt is scored once, however many pairs and orders it is in; no template is used."""

    template = ""
    pointwise = False

    def __init__(self, base: Base, artifact: Artifact, settings: JudgeSettings, dtype: str | None = None):
        """Name the judge; nothing is loaded yet.

        Args:
            base: what the reward model stands on.
            artifact: the reward model.
            settings: rows.
            dtype: of the weights; the processor's native one unless given.

        Raises:
            AlignError: where it should judge by principles, which it cannot read.
        """
        if settings.constitution:
            raise AlignError(
                f"judge {artifact.folder}: is a reward model, which compares by what it has learned and reads no principle of "
                f"{settings.constitution!r}. Leave constitution out, or take a policy or an endpoint as judge."
            )
        self.base, self.artifact, self.settings, self.dtype = base, artifact, settings, dtype
        self.name, self.model = f"reward_model {artifact.name}", artifact.identity

    @cached_property
    def _loaded(self) -> tuple[Trunk, Chat, Role]:
        trunk, chat = open_trunk(self.base, self.artifact, self.dtype)
        return trunk, chat, load_role(trunk, self.artifact)

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], on_reply: Callable[[int, Reply], None]) -> None:
        """Score what is new of each prompt's completions. A pair that the chat template has no place for is unparsed."""
        for places in windows(questions):
            asked = {place: self._tokens(place, questions[place], on_reply) for place in places}
            self._score({place: both for place, both in asked.items() if both is not None}, on_reply)

    def _tokens(self, place: int, question: Question, on_reply: Callable[[int, Reply], None]) -> tuple[Ids, Ids] | None:
        """Both completions after their prompt, as they were trained on."""
        trunk, chat, _ = self._loaded
        context = getattr(trunk.model.config.get_text_config(), "max_position_embeddings", None)
        try:
            example = chat.preference(0, question.prompt, question.first, question.second or [])
        except UnfitMessages as error:
            on_reply(place, Reply("unparsed", f"[not scored: {error}]"))
            return None
        if context is not None and example.longest > context:
            on_reply(place, Reply("unparsed", f"[not scored: {example.longest} tokens are over the model's {context}]"))
            return None
        first, second = (example.prompt + completion for completion in example.completions)
        return first, second

    def _score(self, sides: dict[int, tuple[Ids, Ids]], on_reply: Callable[[int, Reply], None]) -> None:
        """Answer each question as soon as both of its completions have a score."""
        trunk, _, role = self._loaded
        scores: dict[Ids, float] = {}
        seconds: dict[Ids, float] = {}
        for tree in trees({ids for both in sides.values() for ids in both}, self.settings.row_tokens):
            begun = time.perf_counter()
            with trunk.computing(role):
                found = trunk.heads[role.head](last_hidden_states(trunk, tree)).tolist()
            took = (time.perf_counter() - begun) / len(found)
            scores |= zip(tree.sequences, found, strict=True)
            seconds |= dict.fromkeys(tree.sequences, took)
            for place, (first, second) in [(place, both) for place, both in sides.items() if both[0] in scores and both[1] in scores]:
                on_reply(place, _reply(scores[first], scores[second], len(first) + len(second), seconds[first] + seconds[second]))
                del sides[place]


def _reply(first: float, second: float, tokens: int, seconds: float) -> Reply:
    said = "first" if first > second else "second" if second > first else "tie"
    return Reply(
        said,  # type: ignore[arg-type]
        f"{first:.4f} {second:.4f}",
        log_odds=first - second,
        prompt_tokens=tokens,
        completion_tokens=0,
        seconds=seconds,
        price=0.0,
    )
