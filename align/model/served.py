"""Sampling from a vLLM server: it holds the base, and is handed the policy's adapters, joined into one, before every round."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.model.compose import save_composed
from align.model.generate import Completion
from align.model.trunk import Role, Trunk

START = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 64 --logprobs-mode processed_logprobs, "
    "where it can read this machine's files"
)
SECONDS = 1800.0  # for one round


class ServedSampler:
    """Has the interface of `align.model.load.Sampler`. Completions are the server's; what they are worth is computed here."""

    def __init__(self, url: str, trunk: Trunk, below: Sequence[Path], seconds: float = SECONDS):
        """Find the server.

        Args:
            url: of its API, such as http://localhost:8000/v1.
            trunk: has the adapter that is trained.
            below: the folders of the adapters under it.
            seconds: that a round may take.

        Raises:
            AlignError: where no server answers there.
        """
        self.url, self.trunk, self.below, self.seconds = url.rstrip("/"), trunk, list(below), seconds
        self.folder = Path(tempfile.mkdtemp(prefix="align-served-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.loaded: str | None = None
        self.rounds = 0
        self._ask("models", None)

    def sample(
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        completions_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        stop_ids: frozenset[int],
        seed: int,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[list[Completion]]:
        """See `align.model.generate.sample`. All prompts go in one request: the server batches them.

        Raises:
            AlignError: where the server is gone, takes no adapters, or answers with something else than asked for.
        """
        name = self._hand_over(role.adapters[-1])
        found = self._ask(
            "completions",
            {
                "model": name,
                "prompt": [list(prompt) for prompt in prompts],
                "n": completions_per_prompt,
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": 1.0,  # these four are said, because a server takes what is not from the model's own generation_config.json
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": seed,
                "stop_token_ids": sorted(stop_ids),
                "logprobs": 0,
                "return_token_ids": True,
                "skip_special_tokens": False,
            },
        )
        try:
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            completions = [_completion(choice, stop_ids) for choice in choices]
        except (KeyError, TypeError) as error:
            raise AlignError(
                f"sampler {self.url}: a choice has no {error}; expected token_ids and logprobs, as vLLM 0.10 or newer gives."
            ) from None
        if len(completions) != len(prompts) * completions_per_prompt:
            raise AlignError(f"sampler {self.url}: gave {len(completions)} completions; expected {len(prompts) * completions_per_prompt}.")
        on_progress(len(prompts))
        return [completions[i : i + completions_per_prompt] for i in range(0, len(completions), completions_per_prompt)]

    def _hand_over(self, adapter: str) -> str:
        """Give the server the policy as it is now, and take back the one before. Returns its name there."""
        self.rounds += 1
        name = f"{self.folder.name}-{self.rounds}"
        own, joined = self.folder / "own", self.folder / name
        shutil.rmtree(own, ignore_errors=True)
        self.trunk.save_adapter(adapter, own)
        save_composed([*self.below, own], joined)
        self._ask("load_lora_adapter", {"lora_name": name, "lora_path": str(joined)})
        if self.loaded is not None:
            self._ask("unload_lora_adapter", {"lora_name": self.loaded})
            shutil.rmtree(self.folder / self.loaded, ignore_errors=True)
        self.loaded = name
        return name

    def _ask(self, what: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """One request: GET without a body, else POST. An empty object where the answer is no JSON, as adapters' answers are."""
        request = urllib.request.Request(f"{self.url}/{what}", headers={"Content-Type": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise AlignError(f"sampler {self.url}: {what} was refused ({error.code}): {said}\n  Start it so: {START}") from None
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise AlignError(
                f"sampler {self.url}: no server answers there ({why}). Start one: {START}; or --set STAGE.sampler=local"
            ) from None
        try:
            return json.loads(text)
        except ValueError:
            return {}


def _completion(choice: dict[str, Any], stop_ids: frozenset[int]) -> Completion:
    ids, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
    ended = choice["finish_reason"] == "stop"
    if ended and ids and ids[-1] not in stop_ids:
        raise KeyError("token that ended it")
    return Completion(tuple(ids), tuple(logprobs[: len(ids)]), ended)
