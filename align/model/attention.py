"""Attention over a packed row, block by block, so that nothing is paid for what examples may not see.

Registered with transformers' attention interface. With `row_segments` it takes one packed row; without, it is plain
scaled dot-product attention, which the decoding steps use.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.model.packing import Segment

NAME = "align_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    row_segments: tuple[Segment, ...] | None = None,
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
        row_segments: where the row's examples lie.
        **kwargs: what transformers passes along.

    Returns:
        Shape (1, length, heads, size), and None for the weights.
    """
    if row_segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise TypeError("softcapped scores and attention sinks cannot be computed block by block")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):  # one precision for the products of both passes: the backward one knows no autocast
        query, key, value = (tensor.to(torch.get_autocast_dtype(device)) for tensor in (query, key, value))
    with torch.autocast(device, enabled=False):
        output = _RowAttention.apply(query[0], key[0], value[0], scaling, sliding_window, row_segments)
    return output.transpose(0, 1)[None], None


class _RowAttention(torch.autograd.Function):
    """softmax(q k^T) v for each block of the row; the backward pass makes the weights again instead of keeping them.

    Blocks are short, so plain batched products and one fused softmax beat the processor's flash kernel (Dao et al. 2022,
    arXiv 2205.14135) on them. Queries that share a key head are laid side by side, so keys and values are never repeated.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, segments: tuple[Segment, ...]):
        heads, length, size = query.shape
        grouped = query.reshape(len(key), heads // len(key), length, size)
        output = torch.empty_like(grouped)
        for at, places in _blocks(segments):
            weights = _weights(_flat(grouped, at), _take(key, places), scaling, at, window)
            output[:, :, at] = torch.bmm(weights, _take(value, places)).view(output[:, :, at].shape)
        ctx.save_for_backward(grouped, key, value)
        ctx.rest = (scaling, window, segments)
        return output.view(heads, length, size)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grouped, key, value = ctx.saved_tensors
        scaling, window, segments = ctx.rest
        grad = grad.reshape(grouped.shape)
        d_query, d_key, d_value = torch.empty_like(grouped), torch.zeros_like(key), torch.zeros_like(value)
        for at, places in _blocks(segments):
            q, k, v, g = _flat(grouped, at), _take(key, places), _take(value, places), _flat(grad, at)
            weights = _weights(q, k, scaling, at, window)
            _add(d_value, places, torch.bmm(weights.transpose(1, 2), g))
            d_scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), weights, -1, weights.dtype)
            d_query[:, :, at] = torch.bmm(d_scores, k).view(d_query[:, :, at].shape)
            _add(d_key, places, torch.bmm(d_scores.transpose(1, 2), q))
        return d_query.mul_(scaling).view(-1, *d_query.shape[2:]), d_key.mul_(scaling), d_value, None, None, None


def _blocks(segments: tuple[Segment, ...]) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """(queries, keys) of each block: a prompt with its first completion, then every other completion after the prompt."""
    for segment in segments:
        first = slice(segment.prompt.start, segment.completions[0].stop)
        yield first, (first,)
        for completion in segment.completions[1:]:
            yield completion, (segment.prompt, completion)


def _flat(grouped: Tensor, at: slice) -> Tensor:
    """(key heads, group, length, size) to (key heads, group * block, size)."""
    part = grouped[:, :, at]
    return part.reshape(len(part), -1, part.shape[-1])


def _take(tensor: Tensor, places: tuple[slice, ...]) -> Tensor:
    parts = [tensor[:, place] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add(tensor: Tensor, places: tuple[slice, ...], grad: Tensor) -> None:
    start = 0
    for place in places:
        size = place.stop - place.start
        tensor[:, place] += grad[:, start : start + size]
        start += size


def _weights(query: Tensor, key: Tensor, scaling: float, at: slice, window: int | None) -> Tensor:
    """Attention weights of a block, 0 where a query may not see. Shape (key heads, group * block, keys), in the query's type."""
    scores = torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scaling)
    queries, keys = at.stop - at.start, key.shape[1]
    by_query = scores.view(len(scores), -1, queries, keys)
    if window is None or window >= keys:  # every query sees the whole prompt: only the block itself has a future
        by_query[..., keys - queries :] += _mask(queries, None, query.dtype, query.device)[:queries, :queries]
    else:
        by_query += _mask(keys, window, query.dtype, query.device)[keys - queries : keys, :keys]
    return torch.softmax(scores, dim=-1)


def _mask(size: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where a token sees another, -inf for the future and for what is further back than the window. At least (size, size)."""
    return _whole_mask(-(-size // 256) * 256, window, dtype, device)


@lru_cache(maxsize=8)
def _whole_mask(size: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    behind = torch.arange(size, device=device)[:, None] - torch.arange(size, device=device)[None]
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    return torch.zeros(size, size, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
