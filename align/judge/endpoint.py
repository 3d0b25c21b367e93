"""A judge behind an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, `transformers serve`, hosted ones. Imports no torch."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rich.markup import escape

from align.errors import AlignError
from align.judge.completion import SHOWN, Trouble, read_completion, shown
from align.judge.judgement import Question, Reply
from align.judge.verdict import answer_logprobs
from align.progress import say
from align.prompts import PromptTemplate
from align.records import Message
from align.settings import JudgeSettings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

INSTALL = "pip install openai"
KEYS = ("ALIGN_JUDGE_KEY", "OPENAI_API_KEY")  # environment variables; the first that is set counts
BACKOFF = 1.0  # seconds before a question is asked again, twice as long each time
LONGEST_BACKOFF = 60.0
LONGEST_RETRY_AFTER = 600.0  # a server that wants a longer rest is left alone until the user comes back
TOP_LOGPROBS = 20  # the most that OpenAI gives
# What a server may refuse or leave out, and what is said when it is given up. Without max_tokens its newer name is sent.
WITHOUT = {
    "logprobs": "gives no log-probabilities; its written verdicts are read, which do not say how sure it is",
    "temperature": "takes no temperature; its replies may differ from one time to the next",
    "max_tokens": "",
}


class EndpointJudge:
    """Asks a server's chat completions, several questions at a time.

    A template that is answered with its first token is read from the log-probabilities of the answers, where the server gives them;
    everything else, and every other server, from what was written. Such replies have no `log_odds`.
    """

    def __init__(self, url: str, model: str, template: PromptTemplate, settings: JudgeSettings):
        """Name the endpoint; nothing is sent before the first question.

        Args:
            url: where the server's API begins, such as 'http://localhost:8000/v1'.
            model: as the server calls it.
            template: of a pair or a score.
            settings: time-outs, retries, prices, requests at one time.

        Raises:
            AlignError: where the url is none, or the package openai is not installed.
        """
        if importlib.util.find_spec("openai") is None:
            raise AlignError(f"judge {_checked(url)!r}: the package openai is not installed. Install it with:\n  {INSTALL}")
        self.url, self.model, self.settings = _checked(url), model, settings
        self.name = f"endpoint {self.url}"
        self.template = template.expect("pair", "score").fingerprint
        self.pointwise = template.kind == "score"
        self._template = template
        by_token = answer_logprobs(dict.fromkeys(template.answer_words, 0.0), template)
        self._uses = {"temperature", "max_tokens", *(["logprobs"] if by_token else [])}
        self._rests_until = -math.inf  # on the monotonic clock
        self._heard = self._told = self._stopping = False
        self._sending = set[asyncio.Task[None] | None]()  # workers whose request is under way

    def ask(self, questions: Sequence[Question], on_reply: Callable[[int, Reply], None]) -> None:
        """Answer every question, telling each reply as soon as it is there.

        Where the calling thread has a running event loop (a notebook), `on_reply` is called from a helper thread while it waits.

        Raises:
            AlignError: where the endpoint refuses, or still fails after all retries. Replies told before stay.
        """
        if questions:
            _run(self._ask_all(questions, on_reply))

    async def _ask_all(self, questions: Sequence[Question], on_reply: Callable[[int, Reply], None]) -> None:
        from openai import AsyncOpenAI

        left = iter(enumerate(questions))  # shared, so that no more than `concurrency` of them are being asked
        async with AsyncOpenAI(base_url=self.url, api_key=_key()[1], max_retries=0, timeout=None) as client:
            workers = [
                asyncio.create_task(self._work(client, left, on_reply)) for _ in range(min(self.settings.concurrency, len(questions)))
            ]
            self._stopping = False
            try:
                await asyncio.gather(*workers)
            except AlignError:
                self._stopping = True
                for waiting in set(workers) - self._sending:
                    waiting.cancel()
                await asyncio.gather(*workers, return_exceptions=True)  # replies on their way are told, and paid for
                raise
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, client: AsyncOpenAI, left: Iterator[tuple[int, Question]], on_reply: Callable[[int, Reply], None]) -> None:
        for place, question in left:
            reply = await self._answer(client, question)
            if reply is not None:
                on_reply(place, reply)
            if self._stopping:
                return

    async def _answer(self, client: AsyncOpenAI, question: Question) -> Reply | None:
        """Ask until there is a reply, or no hope of one; None where the asking has stopped in the meantime."""
        messages = self._template.fill(**question.fields())
        failed = 0
        while True:
            await self._let_rest()
            parameters = self._parameters()
            outcome = await self._attempt(client, messages, parameters)
            if isinstance(outcome, Reply):
                self._heard = True
                return outcome
            if self._stopping:
                return None
            if self._gives_up(outcome, parameters):
                continue
            if not outcome.passes:
                raise AlignError(await self._refused(client, outcome, question))
            failed += 1
            if failed > self.settings.retries or (outcome.rest or 0) > LONGEST_RETRY_AFTER:
                if outcome.instead and self._heard:  # a server that answers other questions means what it says
                    return outcome.instead
                raise AlignError(self._failed(outcome, failed))
            await self._back_off(outcome, failed)

    def _parameters(self) -> dict[str, Any]:
        by_token = "logprobs" in self._uses
        length = "max_tokens" if "max_tokens" in self._uses else "max_completion_tokens"
        return {
            length: 1 if by_token else self.settings.max_new_tokens,
            **({"temperature": 0} if "temperature" in self._uses else {}),
            **({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if by_token else {}),
        }

    async def _attempt(self, client: AsyncOpenAI, messages: list[Message], parameters: Mapping[str, Any]) -> Reply | Trouble:
        """One request."""
        from openai import APIConnectionError, APIStatusError

        begun, worker = time.perf_counter(), asyncio.current_task()
        self._sending.add(worker)
        try:
            async with asyncio.timeout(self.settings.timeout):  # the client's own is for each wait, and a trickle would pass it
                response = await client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]
                    **parameters,
                )
        except TimeoutError:
            return Trouble(f"no reply within {self.settings.timeout:g} s")
        except APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            said = " ".join(str(body[key]) for key in ("message", "detail", "param") if body.get(key)) or error.response.text
            status = error.status_code
            return Trouble(f"HTTP {status}: {_shown(said)}", status, _retry_after(error.response.headers.get("retry-after")))
        except APIConnectionError as error:
            why = error.__cause__ or error
            return Trouble(f"no connection ({type(why).__name__}: {_shown(str(why))})")
        finally:
            self._sending.discard(worker)
        content = _without_key(response.http_response.content)
        outcome = read_completion(content, self._template, "logprobs" in parameters)
        return self._counted(outcome, time.perf_counter() - begun) if isinstance(outcome, Reply) else outcome

    def _counted(self, reply: Reply, seconds: float) -> Reply:
        """A reply with its seconds and price."""
        parts = (reply.prompt_tokens, self.settings.prompt_price), (reply.completion_tokens, self.settings.completion_price)
        known = [tokens * price / 1e6 for tokens, price in parts if tokens is not None and price is not None]
        return replace(reply, seconds=seconds, price=sum(known) if len(known) == len(parts) else None)

    def _gives_up(self, trouble: Trouble, parameters: Mapping[str, Any]) -> bool:
        """Do without a parameter that the server refuses. Whether the question can be asked again now."""
        if trouble.status not in (400, 422):
            return False
        refused = next((name for name in WITHOUT if name in parameters and name in trouble.what.lower()), None)
        if refused in self._uses:  # else another question has found out in the meantime
            self._uses.discard(refused)
            if WITHOUT[refused]:
                self._say(WITHOUT[refused])
        return refused is not None

    async def _let_rest(self) -> None:
        """Wait until the server may be asked again, all questions alike."""
        while (rest := self._rests_until - time.monotonic()) > 0:
            await asyncio.sleep(rest * random.uniform(1, 1.25))

    async def _back_off(self, trouble: Trouble, failed: int) -> None:
        """Wait for as long as the server says; else twice as long as the last time. Never quite as long as others do."""
        if not self._told:
            self._told = True
            self._say(f"{trouble.what}. Asking again, up to {self.settings.retries} times a question")
        if trouble.rest:
            self._rests_until = max(self._rests_until, time.monotonic() + trouble.rest)
        else:
            await asyncio.sleep(min(BACKOFF * 2.0 ** (failed - 1), LONGEST_BACKOFF) * random.uniform(1, 1.25))

    def _say(self, what: str) -> None:
        say(escape(f"judge {self.name}, model {self.model!r}: {what}."))

    def _failed(self, trouble: Trouble, failed: int) -> str:
        """The message where retries did not help."""
        rest = f" It wants to be left alone for {trouble.rest:,.0f} s." if (trouble.rest or 0) > LONGEST_RETRY_AFTER else ""
        attempts = "1 attempt" if failed == 1 else f"{failed} attempts"
        return (
            f"judge {self.name}, model {self.model!r}: no reply after {attempts}; at the last there was {trouble.what}.{rest} "
            "Expected a chat completion.\n  See to the server, or give it more time (timeout, retries) or less to do at once "
            "(concurrency), and run the same again: what it has answered is kept, and only the rest is asked."
        )

    async def _refused(self, client: AsyncOpenAI, trouble: Trouble, question: Question) -> str:
        """The message where asking again does not help."""
        found = f"judge {self.name}, model {self.model!r}: {trouble.what}. "
        if trouble.status in (401, 403):
            name = _key()[0]
            sent = f"the one in {name} was sent" if name else f"none was sent, for neither {' nor '.join(KEYS)} is set"
            return f"{found}Expected a key that the endpoint takes; {sent}.\n  Set the environment variable {KEYS[0]}."
        if trouble.status == 404:
            models = await self._models(client)
            if models is None:
                return f"{found}Expected the url where a server's API begins.\n  It usually ends in /v1."
            return f"{found}Expected one of the models that it serves: {', '.join(map(repr, models)) or 'none'}.\n  Name one of them."
        asked = _shown(question.prompt[-1]["content"] if question.prompt else "", 80)
        return (
            f"{found}Expected a server that takes chat completions with {', '.join(self._parameters())}, and a question that fits its "
            f"model.\n  See what it says of this one: the prompt {asked!r}. What it has answered is kept."
        )

    async def _models(self, client: AsyncOpenAI) -> list[str] | None:
        """The models that the server lists; None where it doesn't."""
        from openai import OpenAIError

        try:
            async with asyncio.timeout(self.settings.timeout):
                listed = await client.models.list()
            return [_shown(str(model.id), 80) for model in listed.data[:20]]
        except (OpenAIError, TimeoutError, ValueError, TypeError, AttributeError):
            return None


def _retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """The seconds of a Retry-After header, which has seconds or a date."""
    try:
        seconds = float(value or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value or "").timestamp() - now()
        except (ValueError, OverflowError):
            return None
    return seconds if seconds > 0 else None


def _checked(url: str) -> str:
    """A url that can be asked, without a slash at its end."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise AlignError(
            f"judge {parts.scheme}://{parts.hostname}: the url holds a name, password, query or fragment, which would be kept with every "
            f"reply. Expected 'http://host:port/v1'.\n  Put the key into the environment variable {KEYS[0]}."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AlignError(f"judge {url!r}: is no url of an endpoint; expected one such as 'http://localhost:8000/v1'.")
    return url.rstrip("/")


def _key() -> tuple[str | None, str]:
    """The environment variable with the key, and the key. Read when it is needed, and kept nowhere."""
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    key = os.environ[name].strip() if name else "none"
    if not key.isascii() or not key.isprintable() or " " in key:
        raise AlignError(f"{name}: holds a space, a line end or a letter that no key has; expected the key alone.")
    return name, key


def _without_key(content: bytes) -> bytes:
    """What a server sent, in case it says our key."""
    key = _key()[1].encode()
    return content.replace(key, b"***") if len(key) >= 8 else content  # a shorter one is a word that servers without keys are given


def _shown(text: str, length: int = SHOWN) -> str:
    """The beginning of what a server sent, for a message."""
    return shown(_without_key(text.encode(errors="replace")).decode(errors="replace"), length)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end; in a thread of its own where this one's event loop is running already."""
    if not _loop_is_running():
        return asyncio.run(work)
    loop = asyncio.new_event_loop()

    def beside() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(work)

    with ThreadPoolExecutor(1) as pool:  # its end waits for the thread
        running = pool.submit(beside)
        try:
            return running.result()
        except KeyboardInterrupt:
            if not running.done():
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
            raise


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
