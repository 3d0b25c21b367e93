"""A chat completion as an endpoint sends it, and the verdict in it. Whatever else comes is trouble, and trouble is text. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from align.judge.judgement import Reply
from align.judge.verdict import answer_logprobs, from_logprobs, read_reply
from align.progress import printable
from align.prompts import PromptTemplate

SHOWN = 300  # characters of what a server said


@dataclass(frozen=True)
class Trouble:
    """Why there is no reply. Text for the user, and never the client's error: that holds the request, and with it the key."""

    what: str
    status: int | None = None
    rest: float | None = None  # seconds that the server wants to be left alone
    instead: Reply | None = None  # what it said all the same

    @property
    def passes(self) -> bool:
        """Whether asking again may help."""
        return self.status is None or self.status in (408, 409, 429) or self.status >= 500


NO_LOGPROBS = Trouble("gave no logprobs", status=400)  # to a request for them: as if it had been refused


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: Any = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class _Candidate(BaseModel):
    token: str
    logprob: float = Field(le=1e-3, allow_inf_nan=False)


class _Token(_Candidate):
    top_logprobs: list[_Candidate] | None = None


class _Logprobs(BaseModel):
    content: list[_Token] = Field(min_length=1)


def read_completion(content: bytes, template: PromptTemplate, by_token: bool) -> Reply | Trouble:
    """The verdict in a reply's body, with its tokens.

    Args:
        content: the body.
        template: what was asked.
        by_token: read the first token's log-probabilities rather than the text.
    """
    try:
        completion = _Completion.model_validate_json(content)
    except ValidationError:
        return Trouble(f"no chat completion but {shown(content.decode(errors='replace'))!r}")
    choice, usage = completion.choices[0], completion.usage or _Usage()
    text = choice.message.content or choice.message.refusal or ""
    if not by_token:
        reply = read_reply(text, template)
    elif tokens := first_token(choice.logprobs):
        reply = from_logprobs(answer_logprobs(tokens, template), template, text, unseen=_most_unseen(tokens))
    else:
        return NO_LOGPROBS
    reply = replace(reply, prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
    if not by_token and not text.strip() and choice.finish_reason not in ("length", "content_filter"):
        return Trouble("an empty reply", instead=reply)
    return reply


def first_token(logprobs: Any) -> dict[str, float] | None:
    """Log-probabilities of what the first token could have been; None where there are none."""
    try:
        first = _Logprobs.model_validate(logprobs).content[0]
    except ValidationError:
        return None
    found = {first.token: first.logprob}
    for other in first.top_logprobs or []:
        found[other.token] = max(other.logprob, found.get(other.token, -math.inf))  # two tokens may read alike
    return found


def _most_unseen(tokens: dict[str, float]) -> float:
    """The most that the log-probability of a token can be that is not listed: the least listed, or all that is left of 1."""
    left = 1 - sum(map(math.exp, tokens.values()))
    return min(*tokens.values(), math.log(max(left, 1e-6)))


def shown(text: str, length: int = SHOWN) -> str:
    """The beginning of a server's text, for a message."""
    line = " ".join(printable(text).split())
    return line if len(line) <= length else line[:length] + "..."
