"""Attention over a packed row, segment by segment, so that nothing is paid for what examples may not see.

Registered with transformers' attention interface. With `row_segments` it takes one packed row; without, it is plain
scaled dot-product attention, which the decoding steps use.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
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
        module: the attention layer; its `num_key_value_groups` says how many queries share a key.
        query: shape (1, heads, length, head size).
        key: shape (1, key heads, length, head size).
        value: like key.
        attention_mask: not read for a packed row; passed on otherwise.
        scaling: factor of the products of queries and keys.
        dropout: of the attention weights. Zero here: the base stays in eval mode.
        sliding_window: tokens a query sees back, itself included; None sees all.
        row_segments: where the row's examples lie.

    Returns:
        Shape (1, length, heads, head size), and None for the weights.
    """
    if row_segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    parts = []
    for segment in row_segments:
        first = slice(segment.prompt.start, segment.completions[0].stop)  # the prompt and what follows it: plain causal
        parts.append(_attend(query[:, :, first], key[:, :, first], value[:, :, first], scaling, sliding_window))
        for completion in segment.completions[1:]:
            keys = torch.cat([key[:, :, segment.prompt], key[:, :, completion]], dim=2)
            values = torch.cat([value[:, :, segment.prompt], value[:, :, completion]], dim=2)
            parts.append(_attend(query[:, :, completion], keys, values, scaling, sliding_window))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of queries that are the last ones of the keys' sequence."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or keys <= window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    at = torch.arange(keys - queries, keys, device=query.device)[:, None]
    behind = at - torch.arange(keys, device=query.device)[None, :]
    mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
