"""The output layer: log-probabilities of tokens from hidden states, without ever holding the logits of a row.

A row of 1,024 tokens has 50 million logits at a vocabulary of 49,152: 200 MB, and several times that for a softmax and its gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from align.model.trunk import Trunk

CHUNK = 64  # tokens whose logits are in memory at one time where the output layer is trained, or its entropy
ROWS, LOGITS = 1024, 2**19  # tokens that share a pass over a frozen output layer, and logits at one time: few enough for the caches


def target_logprobs(trunk: Trunk, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log softmax(logits / temperature) at the targets, and the entropy.

    Args:
        trunk: gives the output layer.
        hidden: what predicts each target. Shape (predicted, hidden).
        targets: token ids. Shape (predicted,).
        temperature: divides the logits.
    """
    layer = trunk.output_layer
    frozen = isinstance(layer, torch.nn.Linear) and not layer.weight.requires_grad and layer.bias is None
    if frozen:
        return _FrozenHead.apply(hidden, layer.weight, targets, temperature, trunk.softcap)

    def chunk_logprobs(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = all_logprobs(trunk, h, temperature)
        return logprobs.gather(1, t[:, None])[:, 0], entropy(logprobs).detach()

    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    parts = [checkpoint(chunk_logprobs, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def all_logprobs(trunk: Trunk, hidden: Tensor, temperature: float) -> Tensor:
    """Log softmax(logits / temperature) of the whole vocabulary. Shape (predicted, hidden) to (predicted, vocabulary), float32."""
    logits = trunk.output_layer(hidden).float()
    logits = trunk.softcap * torch.tanh(logits / trunk.softcap) if trunk.softcap else logits
    return torch.log_softmax(logits / temperature, dim=-1)


def entropy(logprobs: Tensor) -> Tensor:
    """-sum of p log p. Shape (..., vocabulary) to (...)."""
    return -(logprobs.exp() * logprobs).sum(-1)


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities through a frozen output layer, keeping neither logits nor probabilities.

    log p_t depends on hidden state h_t alone, so its gradient J_t = W^T (onehot - softmax) / temperature is made in the
    forward pass, where the softmax is at hand; the backward pass only scales it. J takes (predicted, hidden), not (predicted, vocab).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None):
        wanted = ctx.needs_input_grad[0]
        chunks = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        parts = [_in_tiles(h, weight, t[:, None], temperature, softcap, wanted) for h, t in chunks]
        logprobs, entropy, jacobian = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        (jacobian,) = ctx.saved_tensors
        return (grad[:, None] * jacobian).to(jacobian.dtype), None, None, None, None


def _in_tiles(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and the gradient J where it is wanted or else the entropy, a tile of the vocabulary at a time.

    The softmax is the online one of Milakov and Gimelshein (2018, arXiv 1805.02867, algorithm 3): sums of exp(logit - the largest so
    far), which shrink as a larger one comes. What is summed so is 1 (the softmax's divisor), logit - largest (the entropy), and W (J).

    Returns:
        Shapes (predicted,), (predicted,) and (predicted, hidden); nan or empty where not wanted.
    """
    count, width = len(hidden), max(1, LOGITS // max(1, len(hidden)))
    every = hidden.new_empty(count, min(width, len(weight)), dtype=torch.float32)  # filled anew by every tile, as are the next two:
    spare = every if wanted else torch.empty_like(every)  # fresh memory costs more than what is done in it
    products = every if hidden.dtype == torch.float32 else torch.empty_like(every, dtype=hidden.dtype)
    of_target, total, below = (hidden.new_zeros(count, 1, dtype=torch.float32) for _ in range(3))
    largest = torch.full_like(total, torch.finfo(torch.float32).min)
    pulled = hidden.new_zeros(count if wanted else 0, hidden.shape[1], dtype=torch.float32)
    for start in range(0, len(weight), width):
        tile = weight[start : start + width]
        used = slice(len(tile))
        logits = torch.mm(hidden, tile.T, out=products[:, used])
        logits = logits if products is every else every[:, used].copy_(logits)
        if softcap:
            slope = 1 - logits.div_(softcap).tanh_() ** 2
            logits.mul_(softcap)
        if temperature != 1:
            logits.div_(temperature)
        at = targets - start
        of_target = torch.where((at >= 0) & (at < len(tile)), logits.gather(1, at.clamp(0, len(tile) - 1)), of_target)
        before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
        shrink = (before - largest).exp()
        weights = torch.exp(logits.sub_(largest), out=spare[:, used])
        added = weights.sum(-1, keepdim=True)
        if wanted:
            pull = weights.mul_(slope) if softcap else weights
            pulled.mul_(shrink).add_(torch.mm(products[:, used].copy_(pull) if products is not every else pull, tile))
        else:
            below = shrink * (below + total * (before - largest)) + torch.linalg.vecdot(weights, logits)[:, None]
        total = shrink * total + added
    logprobs = (of_target - largest - total.log())[:, 0]
    if not wanted:
        return logprobs, (total.log() - below / total)[:, 0], pulled
    own = weight[targets[:, 0]].float()
    own = own * (1 - (of_target * temperature / softcap) ** 2) if softcap else own
    return logprobs, torch.full_like(logprobs, float("nan")), ((own - pulled / total) / temperature).to(hidden.dtype)
