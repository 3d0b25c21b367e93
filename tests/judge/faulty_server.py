"""A real HTTP server that speaks as an OpenAI-compatible endpoint, and fails as a test's script says."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "planted"
GOOD = "GOOD"  # the planted truth: the completion that holds this word is better

Step = Callable[["Handler"], None]  # what is done about one request
Mind = Callable[[str], Mapping[str, float]]  # what was asked -> probabilities of what could be written


def knows_the_truth(asked: str) -> dict[str, float]:
    """Sure of the completion that holds GOOD: the first one where that comes before the other's BAD."""
    first = asked.find(GOOD) < asked.find("BAD")
    return {"A": 0.9 if first else 0.1, "B": 0.1 if first else 0.9}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Listener
    body: dict[str, Any]

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self.send_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.owner.step(self)(self)

    @property
    def asked(self) -> str:
        return self.body["messages"][-1]["content"]

    def send_json(self, code: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send(code, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, code: int, content: bytes, headers: Mapping[str, str], promised: int | None = None) -> None:
        """Send a reply whose Content-Length is `promised` bytes."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if promised is None else promised))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Silent."""


class Listener(ThreadingHTTPServer):
    """Takes a thread for each connection, and none of them holds up the end."""

    daemon_threads = True
    block_on_close = False
    owner: FaultyServer

    def handle_error(self, *_: Any) -> None:
        """A client that went away is what some tests are about."""


class FaultyServer:
    """Does the next step of its script at each request, then `afterwards` for ever. Keeps what it was asked.

    `requests` are the bodies, `keys` the Authorization headers and `times` the seconds (monotonic) at which they came;
    `busiest` is how many were being answered at one time.
    """

    def __init__(self, script: Iterable[Step] = (), afterwards: Step | None = None, port: int = 0):
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.busy = self.busiest = 0
        self._script, self._afterwards = iter(script), afterwards or ok()
        self._lock = threading.Lock()
        self._listener = Listener(("127.0.0.1", port), Handler)
        self._listener.owner = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}/v1"

    def step(self, handler: Handler) -> Step:
        """What to do about the request that a handler has read."""
        with self._lock:
            self.requests.append(handler.body)
            self.keys.append(handler.headers["Authorization"])
            self.times.append(time.monotonic())
            step = next(self._script, self._afterwards)

        def counted(handler: Handler) -> None:
            with self._lock:
                self.busy += 1
                self.busiest = max(self.busiest, self.busy)
            try:
                step(handler)
            finally:
                with self._lock:
                    self.busy -= 1

        return counted

    def times_asked(self) -> dict[str, int]:
        """How often each question came."""
        asked = [request["messages"][-1]["content"] for request in self.requests]
        return {text: asked.count(text) for text in asked}

    def stop_listening(self) -> None:
        """From here on connections are refused."""
        self._listener.socket.close()

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has stopped listening
            self._listener.serve_forever(poll_interval=0.02)

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()


def completion(content: str | None, finish_reason: str = "stop", logprobs: Any = None) -> dict[str, Any]:
    """The body of a chat completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason, "logprobs": logprobs}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102},
    }


def ok(mind: Mind = knows_the_truth) -> Step:
    """Answers with log-probabilities, where they are asked for."""

    def step(handler: Handler) -> None:
        probabilities = mind(handler.asked)
        said = max(probabilities, key=lambda token: probabilities[token])
        top = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in probabilities.items()]
        logprobs = {"content": [{**top[list(probabilities).index(said)], "top_logprobs": top[: handler.body.get("top_logprobs", 0)]}]}
        handler.send_json(200, completion(said, "length", logprobs if handler.body.get("logprobs") else None))

    return step


def text(mind: Callable[[str], str] = lambda asked: max(knows_the_truth(asked).items(), key=lambda item: item[1])[0]) -> Step:
    """Answers in writing, and ignores that log-probabilities are asked for."""
    return lambda handler: handler.send_json(200, completion(mind(handler.asked)))


def says(content: str | None, finish_reason: str = "stop", **more: Any) -> Step:
    """Answers with this, and what `more` puts beside the choices."""
    return lambda handler: handler.send_json(200, {**completion(content, finish_reason), **more})


def body(value: Any) -> Step:
    """Any JSON."""
    return lambda handler: handler.send_json(200, value)


def status(code: int, message: str = "made to fail", headers: Mapping[str, str] | None = None, **more: Any) -> Step:
    """Refuses, in the form of OpenAI's errors."""
    return lambda handler: handler.send_json(code, {"error": {"message": message, **more}}, headers)


def garbage(handler: Handler) -> None:
    """Something between answers with a web page."""
    handler.send(200, b"<html>\xff\xfe Gateway</html>", {"Content-Type": "text/html"})


def cut_json(handler: Handler) -> None:
    """A whole reply as HTTP has it, but of half the JSON."""
    content = json.dumps(completion("A")).encode()
    handler.send(200, content[: len(content) // 2], {"Content-Type": "application/json"})


def cut_body(handler: Handler) -> None:
    """The connection ends in the middle of the body."""
    content = json.dumps(completion("A")).encode()
    handler.send(200, content[: len(content) // 2], {"Content-Type": "application/json"}, promised=len(content))
    handler.hang_up()


def dropped(handler: Handler) -> None:
    """The connection ends without a reply."""
    handler.hang_up()


def slow(seconds: float) -> Step:
    """Answers, but late."""

    def step(handler: Handler) -> None:
        time.sleep(seconds)
        ok()(handler)

    return step


def trickling(seconds: float) -> Step:
    """Sends a byte every now and then, so that no single wait is long."""

    def step(handler: Handler) -> None:
        content = json.dumps(completion("A")).encode()
        handler.send(200, b"", {"Content-Type": "application/json"}, promised=len(content))
        for at in range(len(content)):
            handler.wfile.write(content[at : at + 1])
            handler.wfile.flush()
            time.sleep(seconds)

    return step


def refuses(word: str, otherwise: Step) -> Step:
    """Refuses requests that use a parameter, as some servers do."""

    def step(handler: Handler) -> None:
        if word in handler.body:
            status(400, f"Unsupported parameter: '{word}' is not supported with this model.", param=word)(handler)
        else:
            otherwise(handler)

    return step


def dies(handler: Handler) -> None:
    """The server's end: this connection is dropped, and no further one is taken."""
    handler.server.owner.stop_listening()
    handler.hang_up()
