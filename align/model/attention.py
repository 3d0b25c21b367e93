"""Attention over a packed row, block by block, so that nothing is paid for what examples may not see.

Registered with transformers' attention interface. With `row_blocks` it takes one packed row, with `slots` the tokens of a decoding
step, which lie in one row too; without, it is plain scaled dot-product attention.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.model.packing import Segment, shared_start

NAME = "align_packed"
QUERIES = 128  # of a block, about
KEPT = 256  # keys a token sees on average, up to which the backward pass finds the attention weights kept
SMALL = 4096  # scores that cost less than the products they would take by themselves


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_blocks: Callable[[int | None], Blocks] | None = None,
    slots: Keeper | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend within each example: the prompt to itself, each completion to its prompt and itself, causally.

    Args:
        module: the attention layer.
        query: shape (1, heads, length, size).
        key: shape (1, key heads, length, size).
        value: like key.
        attention_mask: not read for a packed row; passed on otherwise.
        scaling: factor of the products of queries and keys.
        dropout: of the attention weights. Zero here: the base stays in eval mode.
        sliding_window: tokens a query sees back, itself included; None sees all.
        row_blocks: gives the row's blocks for a sliding window; see `cut`.
        slots: keeps the row's keys and values, in decoding, and attends to those it has.
        **kwargs: what transformers passes along.

    Returns:
        Shape (1, length, heads, size), and None for the weights.
    """
    if row_blocks is None and slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise TypeError("softcapped scores and attention sinks cannot be computed block by block")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if slots is not None:
        return slots.attend(module.layer_idx, query, key, value, scaling, sliding_window), None
    assert row_blocks is not None
    return row_attention(query, key, value, scaling, row_blocks(sliding_window)), None


class Keeper(Protocol):
    """What keeps keys and values of sequences that are being decoded."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        """Keep a row's keys and values in a layer, and attend. Shapes as in `packed_attention`."""


def row_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, blocks: Blocks) -> Tensor:
    """Attention of a row that is cut into blocks. Shapes as in `packed_attention`."""
    device = query.device.type
    if torch.is_autocast_enabled(device):  # one precision for the products of both passes: the backward one knows no autocast
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    with torch.autocast(device, enabled=False):
        by_place = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return _RowAttention.apply(*by_place, scaling, blocks)[None]


@dataclass(frozen=True)
class Group:
    """Blocks of a row that are computed together, padded to the longest of them. Padding points to place 0."""

    blocks: int
    queries: Tensor  # (blocks * longest,) places in the row
    keys: Tensor  # (blocks * longest,) places in the row
    padded_queries: Tensor  # which of the queries are padding
    hiding: Tensor  # (blocks, 1, 1, queries, keys) added to scores: 0, or -inf where a query may not see a key; exact in bfloat16


@dataclass(frozen=True)
class Blocks:
    """A row cut into blocks, and the way back: where each place's results lie among those of all groups, one after the other.

    A block is what the prompts of a row share, the rest of one with its first completion, or a further completion. A prompt's place
    is a key in each of its completions' blocks, so the ways back of keys are sorted by how many blocks a place is in.
    """

    groups: tuple[Group, ...]
    query_of: Tensor  # (length,)
    keys_of: tuple[tuple[Tensor, Tensor], ...]  # (places,) of the row, and (places, blocks they are in)

    @property
    def keys_of_a_query(self) -> float:
        """How many keys each place sees on average, padding and hidden ones included."""
        return sum(group.hiding.numel() for group in self.groups) / len(self.query_of)


def cut(segments: Sequence[Segment], window: int | None, device: torch.device) -> Blocks:
    """Cut a row of examples into blocks: what their prompts share, the rest of a prompt with its first completion, each further one.

    A long one is several blocks of its own, each of which sees what came before and itself, so that little of it is hidden.
    """
    shared = shared_start([segment.prompt for segment in segments])
    seen = [(*segment.prompt, *range(c.start, c.stop)) for segment in segments for c in segment.completions]
    blocks: list[tuple[Sequence[int], Sequence[int]]] = []
    laid = 0  # places that are queries by now
    for sees in [shared, *seen] if shared else seen:
        first, laid = bisect_left(sees, laid), sees[-1] + 1
        count = max(1, round((len(sees) - first) / QUERIES))
        ends = [first + (len(sees) - first) * i // count for i in range(count + 1)]
        for start, stop in pairwise(ends):
            begin = 0 if window is None else max(0, start - window + 1)
            blocks.append((sees[start:stop], sees[begin:stop]))
    return grouped(blocks, window, device)


def grouped(blocks: Sequence[tuple[Sequence[int], Sequence[int]]], window: int | None, device: torch.device) -> Blocks:
    """Group a row's blocks of like size, so that few products are made and little is padded.

    Args:
        blocks: places of the queries and of the keys; a block's queries are its last keys, and each place is a query once.
        window: tokens a query sees back, itself included; None sees all.
        device: where the row is.
    """
    length = sum(len(queries) for queries, _ in blocks)
    groups, query_of, key_of = [], [0] * length, [list[int]() for _ in range(length)]
    queries_before = keys_before = 0
    for members in _alike([(len(queries), len(keys)) for queries, keys in blocks]):
        some = [blocks[i] for i in members]
        widest, longest = max(len(queries) for queries, _ in some), max(len(keys) for _, keys in some)
        for number, (queries, keys) in enumerate(some):
            for i, place in enumerate(queries):
                query_of[place] = queries_before + number * widest + i
            for i, place in enumerate(keys):
                key_of[place].append(keys_before + number * longest + i)
        groups.append(_group(some, widest, longest, window, device))
        queries_before, keys_before = queries_before + len(some) * widest, keys_before + len(some) * longest
    keys_of = []
    for times in sorted(set(map(len, key_of))):
        places = [place for place, among in enumerate(key_of) if len(among) == times]
        keys_of.append((torch.tensor(places, device=device), torch.tensor([key_of[place] for place in places], device=device)))
    return Blocks(tuple(groups), torch.tensor(query_of, device=device), tuple(keys_of))


def _alike(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """Blocks by (queries, keys), the largest first, in groups whose padded scores are at most a quarter more."""
    groups: list[list[int]] = []
    real, widest, longest = 0, 0, 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        queries, keys = sizes[i]
        padded = (len(groups[-1]) + 1) * max(widest, queries) * max(longest, keys) if groups else 0
        if not groups or padded > 1.25 * (real + queries * keys) + SMALL:
            groups.append([])
            real, widest, longest = 0, 0, 0
        groups[-1].append(i)
        real, widest, longest = real + queries * keys, max(widest, queries), max(longest, keys)
    return groups


def _group(blocks: list[tuple[Sequence[int], Sequence[int]]], widest: int, longest: int, window: int | None, device: torch.device) -> Group:
    query_counts, key_counts = (torch.tensor([len(places) for places in side])[:, None, None] for side in zip(*blocks, strict=True))
    query, key = torch.arange(widest)[None, :, None], torch.arange(longest)[None, None, :]
    behind = query + (key_counts - query_counts) - key  # a block's queries are its last keys
    hidden = (behind < 0) | (key >= key_counts)
    if window is not None:
        hidden |= behind >= window
    padding = (query >= query_counts)[..., 0]
    hidden[padding] = key[0] > 0  # padding must see something; nothing reads what comes of it
    queries = [[*places, *[0] * (widest - len(places))] for places, _ in blocks]
    keys = [[*places, *[0] * (longest - len(places))] for _, places in blocks]
    tensors = (torch.tensor(queries).flatten(), torch.tensor(keys).flatten(), padding.flatten().nonzero()[:, 0], hiding(hidden))
    return Group(len(blocks), *(tensor.to(device) for tensor in tensors))


def hiding(hidden: Tensor) -> Tensor:
    """What is added to scores: 0, or -inf where `hidden`. Shape (sequences, ...) to (sequences, 1, 1, ...)."""
    return torch.zeros(hidden.shape, dtype=torch.bfloat16, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None, None]


class _RowAttention(torch.autograd.Function):
    """softmax(q k^T) v for each block of the row; the backward pass makes the weights again where keeping them would take much.

    Blocks are short, so plain batched products and one fused softmax beat the processor's flash kernel (Dao et al. 2022,
    arXiv 2205.14135) on them. Queries that share a key head are laid side by side, so keys and values are never repeated.
    Queries, keys and values are (length, heads, size).
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float, blocks: Blocks):
        heads, key_heads = query.shape[1], key.shape[1]
        parts, kept = list[Tensor](), list[Tensor]()
        keeps = any(ctx.needs_input_grad) and blocks.keys_of_a_query <= KEPT
        for group in blocks.groups:
            q = _taken(query, group.queries, group.blocks, key_heads)
            k, v = (_taken(tensor, group.keys, group.blocks, key_heads) for tensor in (key, value))
            weights = _weights(q, k, scaling, group)
            kept += [weights] if keeps else []
            parts.append(_laid_flat(torch.bmm(weights, v), group.blocks, heads))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.rest = (scaling, blocks)
        return _joined(parts).index_select(0, blocks.query_of)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *kept = ctx.saved_tensors
        scaling, blocks = ctx.rest
        heads, key_heads = query.shape[1], key.shape[1]
        d_query, d_key, d_value = list[Tensor](), list[Tensor](), list[Tensor]()
        for number, group in enumerate(blocks.groups):
            q = _taken(query, group.queries, group.blocks, key_heads)
            g = _taken(grad, group.queries, group.blocks, key_heads, group.padded_queries)
            k, v = (_taken(tensor, group.keys, group.blocks, key_heads) for tensor in (key, value))
            weights = kept[number] if kept else _weights(q, k, scaling, group)
            d_value.append(_laid_flat(torch.bmm(weights.transpose(1, 2), g), group.blocks, key_heads))
            d_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), weights, -1, weights.dtype)
            d_query.append(_laid_flat(torch.bmm(d_scores, k), group.blocks, heads))
            d_key.append(_laid_flat(torch.bmm(d_scores.transpose(1, 2), q), group.blocks, key_heads))
        by_query = _joined(d_query).index_select(0, blocks.query_of)
        return by_query.mul_(scaling), _summed(d_key, blocks).mul_(scaling), _summed(d_value, blocks), None, None


def _taken(tensor: Tensor, places: Tensor, blocks: int, key_heads: int, zero: Tensor | None = None) -> Tensor:
    """Places of a row, block by block. (length, heads, size) to (blocks * key heads, heads / key heads * places, size)."""
    taken = tensor.index_select(0, places)
    if zero is not None:
        taken.index_fill_(0, zero, 0)
    heads, size = tensor.shape[1:]
    by_head = taken.view(blocks, -1, key_heads, heads // key_heads, size).permute(0, 2, 3, 1, 4)
    return by_head.reshape(blocks * key_heads, -1, size)


def _laid_flat(tensor: Tensor, blocks: int, heads: int) -> Tensor:
    """The way back of `_taken`: to (blocks * places, heads, size)."""
    key_heads = len(tensor) // blocks
    by_head = tensor.view(blocks, key_heads, heads // key_heads, -1, tensor.shape[-1])
    return by_head.permute(0, 3, 1, 2, 4).reshape(-1, heads, tensor.shape[-1])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _summed(parts: list[Tensor], blocks: Blocks) -> Tensor:
    """Sum over the blocks that a key is in. (keys of all groups, heads, size) to (length, heads, size)."""
    joined = _joined(parts)
    summed = joined.new_empty(len(blocks.query_of), *joined.shape[1:])
    for places, among in blocks.keys_of:
        of_each = joined.index_select(0, among.flatten()).view(*among.shape, *joined.shape[1:])
        summed.index_copy_(0, places, of_each.sum(1))
    return summed


def _weights(query: Tensor, key: Tensor, scaling: float, group: Group) -> Tensor:
    """Attention weights of a group, 0 where a query may not see. Shape (blocks * key heads, group * queries, keys)."""
    scores = torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scaling)
    queries, keys = group.hiding.shape[-2:]
    by_block = scores.view(group.blocks, len(scores) // group.blocks, -1, queries, keys)
    by_block.add_(group.hiding.to(scores.dtype))  # seven times as fast as filling under a mask
    return torch.softmax(scores, dim=-1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
