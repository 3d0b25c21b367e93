"""Sequences laid out as a tree: what several of them begin with is in the row once, however deep they part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.model.attention import grouped
from align.model.forward import hidden_states, packed_hidden_states
from align.model.packing import Example, make_row

if TYPE_CHECKING:
    from align.model.trunk import Trunk


@dataclass(frozen=True)
class Tree:
    """A row of sequences. Each adds a block: the tokens it doesn't share with the one before it, which see those it does."""

    sequences: tuple[tuple[int, ...], ...]
    ids: Tensor  # (length,)
    positions: Tensor  # (length,)
    blocks: tuple[tuple[list[int], list[int]], ...]  # places of queries and of keys
    last: Tensor  # (sequence,) place of each sequence's last token


def trees(sequences: Iterable[tuple[int, ...]], row_tokens: int) -> Iterator[Tree]:
    """Rows of at most `row_tokens` tokens that hold every sequence once; a longer one has a row to itself.

    Sorted, every sequence shares more with its neighbour than with any other.

    Args:
        sequences: token ids, none empty; equal ones are one.
        row_tokens: largest row.
    """
    row: list[tuple[int, ...]] = []
    tokens = 0
    for sequence in sorted(set(sequences)):
        new = len(sequence) - (len(commonprefix([row[-1], sequence])) if row else 0)
        if row and tokens + new > row_tokens:
            yield _lay_out(row)
            row, tokens, new = [], 0, len(sequence)
        row.append(sequence)
        tokens += new
    if row:
        yield _lay_out(row)


def _lay_out(sequences: list[tuple[int, ...]]) -> Tree:
    ids: list[int] = []
    positions: list[int] = []
    blocks: list[tuple[list[int], list[int]]] = []
    last: list[int] = []
    path: list[int] = []  # the places of the sequence's tokens
    before: tuple[int, ...] = ()
    for sequence in sequences:
        shared = len(commonprefix([before, sequence]))
        new = [*range(len(ids), len(ids) + len(sequence) - shared)]
        path = path[:shared] + new
        ids += sequence[shared:]
        positions += range(shared, len(sequence))
        blocks.append((new, path))
        last.append(path[-1])
        before = sequence
    return Tree(tuple(sequences), torch.tensor(ids), torch.tensor(positions), tuple(blocks), torch.tensor(last))


def last_hidden_states(trunk: Trunk, tree: Tree) -> Tensor:
    """The last hidden state at the end of each sequence. Run it inside `trunk.computing(role)`.

    A model that cannot run packed rows computes each sequence by itself, padded.

    Returns:
        Shape (sequence, hidden).
    """
    device = trunk.device
    if not trunk.packs:
        row = make_row([Example(i, ids[:1], (ids[1:],)) for i, ids in enumerate(tree.sequences)]).to(device)
        return hidden_states(trunk, row, row.last)
    ids, positions, last = (tensor.to(device) for tensor in (tree.ids, tree.positions, tree.last))
    return packed_hidden_states(trunk, ids, positions, lambda window: grouped(tree.blocks, window, device), last)
