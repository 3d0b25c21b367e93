"""A run's prompts: their tokens and rows, which of them are held out, and the order in which they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from align.chat import Chat
from align.data.mix import Data, is_heldout, stirred
from align.data.originals import original_rows, places_of
from align.data.tokenise import prompt_ids
from align.errors import AlignError
from align.records import Message
from align.run import Job
from align.settings import PPOSettings


@dataclass(frozen=True)
class PromptRow:
    """What is to be answered. `row` is the row of its file with every column, where a reward wants it."""

    ids: tuple[int, ...]
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    row: dict[str, Any]
    index: int  # in the data


def read_prompts(job: Job, chat: Chat, with_rows: bool) -> tuple[list[PromptRow], list[PromptRow]]:
    """The prompts to learn from and those held out.

    Raises:
        AlignError: see `align.data.tokenise.prompt_ids`; or where the split leaves one side empty.
    """
    settings: PPOSettings = job.settings
    data: Data = job.data["prompts"]
    kept = prompt_ids(job.name, data, chat, settings.max_bad_rows, settings.max_prompt_tokens, job.work)
    places = places_of(data, [record for record, _ in kept])
    rows = original_rows(data, places) if with_rows else [{} for _ in kept]
    prompts = [
        PromptRow(ids, record["prompt"], record.get("tools"), row, at) for (record, ids), row, at in zip(kept, rows, places, strict=True)
    ]
    if not settings.holdout:
        return prompts, []
    keys = data.column("key")[places]
    held = is_heldout(keys, settings.holdout, settings.seed)
    if held.all() or not held.any():
        raise AlignError(
            f"{job.name}: of {len(prompts)} prompts {int(held.sum())} are held out; expected some on both sides. "
            f"Change {job.name}.holdout ({settings.holdout}), or give more prompts."
        )
    chosen = np.flatnonzero(held)
    chosen = np.sort(chosen[np.argsort(stirred(keys[chosen], settings.seed), kind="stable")[: settings.max_heldout]])
    return [prompts[i] for i in np.flatnonzero(~held)], [prompts[i] for i in chosen]


def prompts_of_round(prompts: Sequence[PromptRow], iteration: int, settings: PPOSettings) -> list[PromptRow]:
    """A round's prompts, in an order that goes through all before any comes again."""
    first = iteration * settings.prompts_per_iteration
    chosen = []
    for place in range(first, first + settings.prompts_per_iteration):
        generator = torch.Generator().manual_seed(settings.seed + place // len(prompts))
        chosen.append(prompts[torch.randperm(len(prompts), generator=generator)[place % len(prompts)]])
    return chosen
