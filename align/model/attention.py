"""Attention over a packed row, block by block, so that nothing is paid for what examples may not see.

Registered with transformers' attention interface. With `row_blocks` it takes one packed row, with `slots` the tokens of a decoding
step, which lie in one row too; without, it is plain scaled dot-product attention.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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

    queries: Tensor  # (blocks, queries) places in the row
    keys: Tensor  # (blocks, keys) places in the row
    real_queries: Tensor  # (blocks, queries): False for padding
    real_keys: Tensor  # (blocks, keys): False for padding
    hiding: Tensor  # (blocks, 1, 1, queries, keys) added to scores: 0, or -inf where a query may not see a key; exact in bfloat16


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a row's heads lie, for all groups at once: block after block, and of a block head after head.

    Those of the row itself lie place after place, and of a place head after head.
    """

    queries: Tensor  # (blocks * heads * queries,) in the row
    keys: Tensor  # (blocks * key heads * keys,) in the row
    padded_queries: Tensor  # which of the queries are padding
    query_of: Tensor  # (length * heads,) the way back of queries
    keys_of: tuple[tuple[Tensor, Tensor], ...]  # the way back of keys: see `_ways_back`
    query_shapes: list[tuple[int, int]]  # of each group: (blocks * key heads, heads of a key head * queries)
    key_shapes: list[tuple[int, int]]  # of each group: (blocks * key heads, keys)

    def by_group(self, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Views of what is laid out, group by group, as batches of matrices: (taken, size) to (blocks * key heads, rows, size)."""
        return zip(*(_split(t, self.query_shapes) for t in of_queries), *(_split(t, self.key_shapes) for t in of_keys), strict=True)


@dataclass(frozen=True)
class Blocks:
    """A row cut into blocks: what the prompts of a row share, the rest of one with its first completion, or a further completion.

    Each place is a query once. A prompt's place is a key in each of its completions' blocks.
    """

    length: int
    groups: tuple[Group, ...]
    layouts: dict[tuple[int, int], Layout] = field(default_factory=dict)

    @property
    def keys_of_a_query(self) -> float:
        """How many keys each place sees on average, padding and hidden ones included."""
        return sum(group.hiding.numel() for group in self.groups) / self.length

    def layout(self, heads: int, key_heads: int) -> Layout:
        """Where the numbers of so many heads lie: the same for every layer, so it is found once."""
        if (heads, key_heads) not in self.layouts:
            queries, real_queries = _of_heads([(group.queries, group.real_queries) for group in self.groups], heads)
            keys, real_keys = _of_heads([(group.keys, group.real_keys) for group in self.groups], key_heads)
            ((_, query_of),) = _ways_back(queries, real_queries)
            self.layouts[heads, key_heads] = Layout(
                queries,
                keys,
                (~real_queries).nonzero()[:, 0],
                query_of[:, 0],
                tuple(_ways_back(keys, real_keys)),
                [(len(group.queries) * key_heads, heads // key_heads * group.queries.shape[1]) for group in self.groups],
                [(len(group.keys) * key_heads, group.keys.shape[1]) for group in self.groups],
            )
        return self.layouts[heads, key_heads]


def _split(tensor: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = tensor.split([batch * rows for batch, rows in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _of_heads(groups: Sequence[tuple[Tensor, Tensor]], heads: int) -> tuple[Tensor, Tensor]:
    """Of each group the places (blocks, places) and which are real, as those of every head, one after the other."""
    head = torch.arange(heads, device=groups[0][0].device)[:, None]
    places = [(at[:, None] * heads + head).flatten() for at, _ in groups]
    real = [is_real[:, None].expand(-1, heads, -1).flatten() for _, is_real in groups]
    return torch.cat(places), torch.cat(real)


def _ways_back(taken: Tensor, real: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Where what is `taken` from a row lies, sorted by how often it is: pairs of (n,) in the row and (n, times) among the taken."""
    where = real.nonzero()[:, 0]
    taken, order = taken[where].sort(stable=True)
    counts = taken.bincount()  # everything is taken
    first = counts.cumsum(0) - counts
    back = []
    for times in counts.unique().tolist():
        places = (counts == times).nonzero()[:, 0]
        back.append((places, where[order[first[places][:, None] + torch.arange(times, device=taken.device)]]))
    return back


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
    sizes = [(len(queries), len(keys)) for queries, keys in blocks]
    groups = tuple(_group([blocks[i] for i in members], window, device) for members in _alike(sizes))
    return Blocks(sum(queries for queries, _ in sizes), groups)


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


def _group(blocks: Sequence[tuple[Sequence[int], Sequence[int]]], window: int | None, device: torch.device) -> Group:
    (queries, real_queries), (keys, real_keys) = (_padded(side) for side in zip(*blocks, strict=True))
    query, key = torch.arange(queries.shape[1])[None, :, None], torch.arange(keys.shape[1])[None, None, :]
    behind = query + (real_keys.sum(1) - real_queries.sum(1))[:, None, None] - key  # a block's queries are its last keys
    hidden = (behind < 0) | ~real_keys[:, None]
    if window is not None:
        hidden |= behind >= window
    hidden[~real_queries] = key[0] > 0  # padding must see something; nothing reads what comes of it
    return Group(*(tensor.to(device) for tensor in (queries, keys, real_queries, real_keys, hiding(hidden))))


def _padded(places: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lists of places as (lists, longest), and which are real."""
    counts, longest = torch.tensor([len(own) for own in places]), max(map(len, places))
    return torch.tensor([[*own, *[0] * (longest - len(own))] for own in places]), torch.arange(longest) < counts[:, None]


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
        layout = blocks.layout(query.shape[1], key.shape[1])
        keeps, kept = any(ctx.needs_input_grad) and blocks.keys_of_a_query <= KEPT, list[Tensor]()
        queries, keys, values = _taken(query, layout.queries), _taken(key, layout.keys), _taken(value, layout.keys)
        attended = queries.new_empty(len(queries), value.shape[-1])
        of_groups = layout.by_group([queries, attended], [keys, values])
        for group, (q, out, k, v) in zip(blocks.groups, of_groups, strict=True):
            weights = _weights(q, k, scaling, group)
            kept += [weights] if keeps else []
            torch.bmm(weights, v, out=out)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.rest = (scaling, blocks)
        return attended.index_select(0, layout.query_of).view(*query.shape[:2], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *kept = ctx.saved_tensors
        scaling, blocks = ctx.rest
        layout = blocks.layout(query.shape[1], key.shape[1])
        queries, keys, values = _taken(query, layout.queries), _taken(key, layout.keys), _taken(value, layout.keys)
        grads = _taken(grad, layout.queries).index_fill_(0, layout.padded_queries, 0)
        d_queries, d_keys, d_values = (torch.empty_like(tensor) for tensor in (queries, keys, values))
        of_groups = layout.by_group([queries, grads, d_queries], [keys, values, d_keys, d_values])
        for number, (group, (q, g, d_q, k, v, d_k, d_v)) in enumerate(zip(blocks.groups, of_groups, strict=True)):
            weights = kept[number] if kept else _weights(q, k, scaling, group)
            torch.bmm(weights.transpose(1, 2), g, out=d_v)
            d_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), weights, -1, weights.dtype)
            torch.bmm(d_scores, k, out=d_q)
            torch.bmm(d_scores.transpose(1, 2), q, out=d_k)
        d_query = d_queries.index_select(0, layout.query_of).view(query.shape)
        d_key, d_value = _summed(d_keys, layout).view(key.shape), _summed(d_values, layout).view(value.shape)
        return d_query.mul_(scaling), d_key.mul_(scaling), d_value, None, None


def _taken(tensor: Tensor, where: Tensor) -> Tensor:
    """Numbers of a row as they lie for the products. (length, heads, size) to (taken, size)."""
    return tensor.reshape(-1, tensor.shape[-1]).index_select(0, where)


def _summed(tensor: Tensor, layout: Layout) -> Tensor:
    """Sum over the blocks that a key is in. (taken, size) to (length * key heads, size)."""
    summed = tensor.new_empty(sum(len(places) for places, _ in layout.keys_of), tensor.shape[-1])
    for places, among in layout.keys_of:
        of_each = tensor.index_select(0, among.flatten()).view(*among.shape, -1)
        summed.index_copy_(0, places, of_each.sum(1))
    return summed


def _weights(query: Tensor, key: Tensor, scaling: float, group: Group) -> Tensor:
    """Attention weights of a group, 0 where a query may not see. Shape (blocks * key heads, group * queries, keys)."""
    scores = torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scaling)
    queries, keys = group.hiding.shape[-2:]
    by_block = scores.view(len(group.hiding), -1, scores.shape[1] // queries, queries, keys)
    by_block.add_(group.hiding.to(scores.dtype))  # seven times as fast as filling under a mask
    return torch.softmax(scores, dim=-1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
