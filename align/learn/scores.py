"""Scoring completions: by a reward model on the trunk, a Python function, a judge, or a sequence classifier of any tokenizer."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.errors import AlignError
from align.judge.judgement import Judge, Question, Reply
from align.judge.open import fitting_template
from align.learn.prompts import PromptRow
from align.learn.rollouts import Sampled
from align.model.forward import forward_scores
from align.model.packing import Row
from align.model.trunk import Role, Trunk
from align.records import Message
from align.settings import JudgeSettings

Scorer = Callable[[Sequence[Sampled], Sequence[Row]], Tensor]  # a round's prompts and their packed rows -> (completion,)
TEXTS_AT_ONCE = 8


@dataclass(frozen=True)
class Scores:
    """Scores of a round's completions, in its order. All (completion,)."""

    parts: dict[str, Tensor]  # each reward's, by its name
    raw: Tensor  # their weighted sum
    final: Tensor  # what the round optimises


class RewardFailure(AlignError):
    """A completion could not be scored. What was learned so far is kept before this is told."""


def score_parts(
    scorers: dict[str, Scorer], sampled: Sequence[Sampled], rows: Sequence[Row], where: Callable[[PromptRow], str]
) -> dict[str, Tensor]:
    """Every part's score of every completion, by the part's name. Each (completion,), in the order of `sampled`.

    Raises:
        RewardFailure: where a score is not a finite number, with the row.
    """
    found = {}
    for name, scorer in scorers.items():
        found[name] = scorer(sampled, rows)
        bad = (~torch.isfinite(found[name])).nonzero()
        if len(bad):
            each = [(one.prompt, text) for one in sampled for text in one.texts]
            prompt, text = each[int(bad[0])]
            raise _failure(name, where(prompt), text, f"is {float(found[name][bad[0]])}; expected a finite number")
    return found


def _failure(name: str, place: str, text: str, what: str) -> RewardFailure:
    return RewardFailure(
        f"{place}: reward {name!r} {what}. The completion: {text[:200]!r}\n"
        "  The rounds before are kept. Where the cause lies outside of the reward itself, mend it and run the same command again: it "
        "goes on from there. A reward that is changed is another one, and its stage begins anew."
    )


class TrunkReward:
    """A reward model that is an adapter and a head on the policy's own base: it sees the very tokens that were sampled."""

    def __init__(self, trunk: Trunk, role: Role):
        """Score in a role."""
        self.trunk, self.role = trunk, role

    @torch.no_grad()
    def __call__(self, sampled: Sequence[Sampled], rows: Sequence[Row]) -> Tensor:
        """One pass over the rows."""
        found: dict[int, Tensor] = {}
        for row in rows:
            scores = forward_scores(self.trunk, self.role, row).cpu()
            found |= zip(row.indices, scores.split([len(example.completions) for example in row.examples]), strict=True)
        return torch.cat([found[one.example.index] for one in sampled])


class FunctionReward:
    """A Python function of the prompt's messages, the completion's text and the prompt's row."""

    def __init__(self, name: str, function: Callable, where: Callable[[PromptRow], str]):
        """`where` gives a prompt's file and line."""
        self.name, self.function, self.where = name, function, where

    def __call__(self, sampled: Sequence[Sampled], rows: Sequence[Row]) -> Tensor:
        """Call it for every completion."""
        return torch.tensor([self.score(one.prompt, text) for one in sampled for text in one.texts])

    def score(self, prompt: PromptRow, text: str) -> float:
        """Call it for one.

        Raises:
            RewardFailure: where it raises, or gives no number.
        """
        try:
            score = self.function(prompt.messages, text, prompt.row)
        except Exception as error:  # a recipe's function may raise anything, and an hour's work must outlive it
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
            raise _failure(self.name, self.where(prompt), text, what) from None
        try:
            return float(score)
        except (TypeError, ValueError):
            raise _failure(self.name, self.where(prompt), text, f"returned {score!r}; expected a number") from None


class JudgedReward:
    """A judge's score of each completion by its rubric, from -1 to 1. One whose reply cannot be read gets the mean of the others.

    The mean neither rewards nor punishes: unknown is not zero. Too many of them stop the run.
    """

    def __init__(self, name: str, judge: Judge, settings: JudgeSettings):
        """`judge` scores completions by themselves."""
        self.name, self.judge, self.settings = name, judge, settings
        template = fitting_template(settings)
        self.middle, self.half = (template.lowest + template.highest) / 2, (template.highest - template.lowest) / 2

    def __call__(self, sampled: Sequence[Sampled], rows: Sequence[Row]) -> Tensor:
        """Ask about every completion.

        Raises:
            RewardFailure: where more than `max_unparsed` of the replies say no score.
        """
        questions = [Question(one.prompt.messages, [Message(role="assistant", content=text)]) for one in sampled for text in one.texts]
        scores, raw = [float("nan")] * len(questions), ""

        def on_reply(place: int, reply: Reply) -> None:
            nonlocal raw
            if reply.score is not None:
                scores[place] = (reply.score - self.middle) / self.half
            else:
                raw = reply.raw

        self.judge.ask(questions, on_reply)
        found = torch.tensor(scores)
        unread = found.isnan()
        if unread.all() or float(unread.float().mean()) > self.settings.max_unparsed:
            raise RewardFailure(
                f"reward {self.name!r}: of {len(questions)} replies of the judge {int(unread.sum())} say no score, such as {raw[:80]!r}; "
                f"max_unparsed is {self.settings.max_unparsed:g}. The rounds before are kept. Ask a stronger judge, or in other words "
                "(judged(..., template=...))."
            )
        return found.where(~unread, found[~unread].mean())


class ClassifierReward:
    """A sequence classifier with one output, of any tokenizer: the conversation is rendered again in its own chat template."""

    def __init__(self, name: str, source: str, dtype: torch.dtype, device: torch.device):
        """Load it.

        Raises:
            AlignError: where it is no such model, or has no chat template to render a conversation with.
        """
        self.name = name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            what = " ".join(str(error).split())[:300]
            raise AlignError(f"reward {name!r}: {source!r} cannot be loaded as a sequence classifier ({what}).") from None
        if info["missing_keys"] or model.config.num_labels != 1:
            found = f"no {', '.join(sorted(info['missing_keys']))}" if info["missing_keys"] else f"{model.config.num_labels} outputs"
            raise AlignError(f"reward {name!r}: {source!r} has {found}; expected a reward model, that is a classifier with one output.")
        if self.tokenizer.chat_template is None:
            raise AlignError(
                f"reward {name!r}: {source!r} has no chat template, so a conversation cannot be shown to it as it was trained. "
                "Call it in a function of your own, which lays out the text: reward=my_function."
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, sampled: Sequence[Sampled], rows: Sequence[Row]) -> Tensor:
        """Render every completion and score them, alike lengths together."""
        ids = [
            self.render(one.prompt, text, completion.ended)
            for one in sampled
            for text, completion in zip(one.texts, one.completions, strict=True)
        ]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        if self.longest is not None and len(ids[order[-1]]) > self.longest:
            raise RewardFailure(
                f"reward {self.name!r}: a conversation has {len(ids[order[-1]])} of its tokens; it takes {self.longest}. "
                "Lower the stage's max_prompt_tokens or max_new_tokens."
            )
        scores = torch.empty(len(ids))
        for start in range(0, len(order), TEXTS_AT_ONCE):
            batch = order[start : start + TEXTS_AT_ONCE]
            scores[batch] = self.scores([ids[i] for i in batch])
        return scores

    def render(self, prompt: PromptRow, text: str, ended: bool) -> list[int]:
        """The conversation's tokens. One that was cut stops with its last word: it ended no turn, so none is shown to end."""
        messages: list[Any] = [*prompt.messages, {"role": "assistant", "content": text}]
        whole: Any = self.tokenizer.apply_chat_template(messages, tools=prompt.tools, tokenize=False)
        if not ended and not text:
            whole = self.tokenizer.apply_chat_template(prompt.messages, tools=prompt.tools, tokenize=False, add_generation_prompt=True)
        elif not ended:
            before, found, _ = whole.rpartition(text)
            if not found:
                raise RewardFailure(
                    f"reward {self.name!r}: its chat template changes the reply {text[:80]!r}, so a cut one cannot be shown."
                )
            whole = before + text
        return self.tokenizer(whole, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def scores(self, batch: list[list[int]]) -> Tensor:
        """Scores of some token sequences, padded on the right and pooled at their last token by length. Shape (sequence,)."""
        width, device = max(map(len, batch)), self.model.device
        ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in batch], device=device)
        sizes = torch.tensor([len(sequence) for sequence in batch], device=device)
        mask = (torch.arange(width, device=device)[None] < sizes[:, None]).long()
        if not hasattr(self.model, "score"):  # an encoder, which pools at its first token
            return self.model(ids, attention_mask=mask).logits[:, 0].float().cpu()
        # transformers pools at the last token that is not the pad token: the wrong one where a text ends with it
        hidden = self.model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.model.score(hidden[torch.arange(len(batch)), sizes - 1])[:, 0].float().cpu()
