"""Packed rows: several examples in one row, the completions of an example sharing its prompt, and all what every prompt begins with.

Dimension words: `length` tokens in a row, `completion` its completions, `predicted` its completion tokens that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from os.path import commonprefix

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One prompt and its completions as token ids.

    `trained` marks the completion tokens that count (all of them where it is empty): in a conversation of several
    turns, everything after the first prompt is one completion, of which the later turns of the user do not count.
    `index` is the example's place in its data set.
    """

    index: int
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[bool, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens the example takes in a row: the prompt once, and every completion."""
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(map(len, self.completions))

    @property
    def trained_tokens(self) -> int:
        """Completion tokens that count."""
        return sum(map(sum, self.trained)) if self.trained else self.tokens - len(self.prompt)


@dataclass(frozen=True)
class Segment:
    """Where one example lies in its row: the places of its prompt, the first of which others may share, and each completion's slice."""

    prompt: tuple[int, ...]
    completions: tuple[slice, ...]


@dataclass(frozen=True)
class Row:
    """Examples laid end to end, with what the forward pass needs to keep them apart.

    What all their prompts begin with, as a chat template's system prompt, comes first and is there once.

    The token at `predicted_at[i]` predicts `targets[i]`, which belongs to completion `owner[i]` of the row; a token that does not
    count, as those of the user's later turns, is nobody's target. Completions are numbered in the order of the examples.
    """

    examples: tuple[Example, ...]
    segments: tuple[Segment, ...]
    ids: Tensor  # (length,)
    positions: Tensor  # (length,), a token's place in its own prompt and completion
    predicted_at: Tensor  # (predicted,) places in the row
    targets: Tensor  # (predicted,) token ids
    owner: Tensor  # (predicted,) number of the completion in the row
    last: Tensor  # (completion,) place of each completion's last token

    @property
    def indices(self) -> list[int]:
        """The examples' places in their data set."""
        return [example.index for example in self.examples]

    def to(self, device: torch.device | str) -> Row:
        """The same row with its tensors on `device`."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Row(**moved)

    def sum_per_completion(self, per_token: Tensor) -> Tensor:
        """Sum (predicted,) numbers over each completion. Shape (completion,)."""
        return per_token.new_zeros(len(self.last)).index_add(0, self.owner, per_token)

    def tokens_per_completion(self) -> Tensor:
        """Tokens that count in each completion. Shape (completion,)."""
        return self.sum_per_completion(torch.ones(len(self.targets), device=self.targets.device))


@dataclass
class _Layout:
    """A row while it is laid out, as plain lists."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    predicted_at: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def add(self, example: Example, shared: int) -> Segment:
        """Lay out what is an example's own: its prompt from `shared` on, which the row begins with, and its completions."""
        prompt = (*range(shared), *range(len(self.ids), len(self.ids) + len(example.prompt) - shared))
        self.ids += example.prompt[shared:]
        self.positions += range(shared, len(example.prompt))
        completions = []
        for number, completion in enumerate(example.completions):
            begin = len(self.ids)
            completions.append(slice(begin, begin + len(completion)))
            before = [prompt[-1], *range(begin, begin + len(completion) - 1)]
            counted = [i for i in range(len(completion)) if not example.trained or example.trained[number][i]]
            self.predicted_at += [before[i] for i in counted]
            self.targets += [completion[i] for i in counted]
            self.owner += [len(self.last)] * len(counted)
            self.last.append(begin + len(completion) - 1)
            self.ids += completion
            self.positions += range(len(example.prompt), len(example.prompt) + len(completion))
        return Segment(prompt, tuple(completions))


def make_row(examples: Sequence[Example]) -> Row:
    """Lay examples out as one row.

    Raises:
        ValueError: if a prompt or a completion is empty; nothing would predict or be predicted.
    """
    for example in examples:
        if not example.prompt or not all(example.completions):
            raise ValueError(f"example {example.index} has an empty prompt or completion")
    shared = shared_start([example.prompt for example in examples])
    layout = _Layout([*shared], [*range(len(shared))])
    segments = tuple(layout.add(example, len(shared)) for example in examples)
    tensors = {name: torch.tensor(value) for name, value in vars(layout).items()}
    return Row(tuple(examples), segments, **tensors)


def shared_start(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What several prompts begin with. One by itself shares nothing."""
    return tuple(commonprefix(prompts)) if len(prompts) > 1 else ()


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices whose sizes add up to at most `budget` (first fit, largest first); one larger stands alone."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((b for b, left in enumerate(room) if left >= sizes[index]), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= sizes[index]
    return [sorted(members) for members in bins]


def pack(examples: Sequence[Example], row_tokens: int) -> list[Row]:
    """Rows of at most `row_tokens` tokens that hold every example once; a larger example has a row to itself."""
    shared = len(shared_start([example.prompt for example in examples]))
    bins = fill([example.tokens - shared for example in examples], row_tokens - shared)
    return [make_row([examples[i] for i in members]) for members in bins]


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Indices 0 to count - 1 in random order, cut into batches; the last may be smaller."""
    order = torch.randperm(count, generator=generator).tolist()
    starts = accumulate([batch_size] * (-(-count // batch_size) - 1), initial=0)
    return [order[start : start + batch_size] for start in starts] if count else []
