"""The one way through the model: log-probabilities, values and scores of a packed row under a role."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from align.model.attention import Blocks, cut
from align.model.output import target_logprobs
from align.model.packing import Row

if TYPE_CHECKING:
    from align.model.trunk import Role, Trunk


class PolicyOutputs(NamedTuple):
    """What a role without a head says of each completion token, at the given temperature."""

    logprobs: Tensor  # (predicted,) float32
    entropy: Tensor  # (predicted,) float32; unknown (nan) where gradients are wanted


class HeadOutputs(NamedTuple):
    """What a role with a head says: before each completion token, and at the last token of each completion."""

    values: Tensor  # (predicted,) float32
    scores: Tensor  # (completion,) float32


def forward(trunk: Trunk, role: Role, row: Row, temperature: float = 1.0) -> PolicyOutputs:
    """Log-probabilities of the row's completion tokens, with the role's adapters on the base."""
    row = row.to(trunk.device)
    with trunk.computing(role):
        hidden = hidden_states(trunk, row, row.predicted_at)
        return PolicyOutputs(*target_logprobs(trunk, hidden, row.targets, temperature))


def forward_head(trunk: Trunk, role: Role, row: Row) -> HeadOutputs:
    """Values and scores of a row: the role's head on what the base with the role's adapters makes of it."""
    found = _head_at(trunk, role, row, torch.cat([row.predicted_at, row.last]))
    return HeadOutputs(*found.split([len(row.predicted_at), len(row.last)]))


def forward_scores(trunk: Trunk, role: Role, row: Row) -> Tensor:
    """The scores alone, which take less of the last layer. Shape (completion,), float32."""
    return _head_at(trunk, role, row, row.last)


def _head_at(trunk: Trunk, role: Role, row: Row, places: Tensor) -> Tensor:
    assert role.head is not None
    row = row.to(trunk.device)
    with trunk.computing(role):
        return trunk.heads[role.head](hidden_states(trunk, row, places.to(trunk.device)))


def picked(hidden: Tensor, places: Tensor) -> Tensor:
    """Hidden states at some places, with the same gradients to the bit every time.

    Not `hidden[places]`: a prompt's last token is picked once for each completion, and on a processor torch adds up the gradients of
    float32 indexing in the order in which its threads come.
    """
    return hidden.index_select(0, places)


def hidden_states(trunk: Trunk, row: Row, places: Tensor) -> Tensor:
    """The last hidden state at some places of the row, which may be named twice. Shape (places,) to (places, hidden)."""
    if not trunk.packs:
        return picked(_padded_hidden_states(trunk, row), places)
    return packed_hidden_states(trunk, row.ids, row.positions, lambda window: cut(row.segments, window, row.ids.device), places)


def packed_hidden_states(trunk: Trunk, ids: Tensor, positions: Tensor, blocks: Callable[[int | None], Blocks], places: Tensor) -> Tensor:
    """The last hidden state at some places of a row that is cut into blocks.

    Args:
        trunk: one that packs.
        ids: shape (length,).
        positions: shape (length,).
        blocks: gives the blocks for a sliding window, or for none.
        places: shape (places,).

    Returns:
        Shape (places, hidden).
    """
    return picked(row_hidden_states(trunk.decoder, ids, positions, row_blocks=cache(blocks), read=places.unique()), places)


def row_hidden_states(decoder: Module, ids: Tensor, positions: Tensor, **attending: Any) -> Tensor:
    """The last hidden state at every token of a row, under the packed attention, which is told by `attending` what each token sees.

    Args:
        decoder: of a model that packs.
        ids: shape (length,).
        positions: shape (length,).
        **attending: `row_blocks` or `slots` of `align.model.attention.packed_attention`; `read`, the places whose hidden states are
            asked for (`align.model.last_layer`).

    Returns:
        Shape (length, hidden); where nobody asked, it means nothing.
    """
    # A 4-D mask is taken as given, so transformers builds none. Ours is empty: any attention but the packed one fails on it.
    taken_as_given = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=ids.device)
    output = decoder(input_ids=ids[None], position_ids=positions[None], attention_mask=taken_as_given, use_cache=False, **attending)
    return output.last_hidden_state[0]


def _padded_hidden_states(trunk: Trunk, row: Row) -> Tensor:
    """The same, one padded sequence a completion: for models whose attention cannot be given segments."""
    places = [[*s.prompt, *range(c.start, c.stop)] for s in row.segments for c in s.completions]
    width = max(map(len, places))
    ids = torch.zeros(len(places), width, dtype=torch.long, device=row.ids.device)
    mask = torch.zeros_like(ids)
    for number, at in enumerate(places):
        ids[number, : len(at)] = row.ids[at]
        mask[number, : len(at)] = 1
    hidden = trunk.decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    sequence: dict[int, tuple[int, int]] = {}  # place in the row -> (sequence, column); a shared prompt is read from its first sequence
    for number, at in enumerate(places):
        for column, place in enumerate(at):
            sequence.setdefault(place, (number, column))
    numbers, columns = zip(*(sequence[place] for place in range(len(row.ids))), strict=True)
    return hidden[list(numbers), list(columns)]
