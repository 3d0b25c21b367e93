"""Losses as pure functions: one number per pair or per token, in float32. Sums and divisions are the training loop's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, probability: Tensor, margin: Tensor, centering: float) -> Tensor:
    """Cross-entropy of the labeller's probability and sigmoid(chosen - rejected).

    Bradley & Terry 1952 as in Ouyang et al. 2022 (arXiv 2203.02155, eq. 1), with a soft target; the margin is Llama 2's
    (2307.09288, eq. 2) and the centring term is Eisenstein et al.'s (2312.09244, sec. 2).

    Args:
        chosen: scores. Shape (pairs,).
        rejected: scores. Shape (pairs,).
        probability: how sure the labeller is that chosen is better, 0 to 1. Shape (pairs,).
        margin: subtracted from the difference in favour of chosen. Shape (pairs,).
        centering: weight of (chosen + rejected)^2.

    Returns:
        Shape (pairs,).
    """
    difference = chosen - rejected
    right, wrong = -logsigmoid(difference - margin), -logsigmoid(-difference - margin)
    return probability * right + (1 - probability) * wrong + centering * (chosen + rejected) ** 2


class PairLogps(NamedTuple):
    """Log-probabilities of whole completions, summed over their tokens, with the numbers of tokens. All (pairs,)."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


def dpo_loss(kind: str, logps: PairLogps, probability: Tensor, beta: float, simpo_gamma: float = 0.0) -> Tensor:
    """A loss of the DPO family; with probability p, p times the loss of the pair and 1 - p times that of the swapped pair.

    Args:
        kind: sigmoid, ipo, hinge, apo_zero, sigmoid_norm or simpo.
        logps: of the policy and the reference.
        probability: how sure the labeller is that chosen is better. Shape (pairs,).
        beta: strength; IPO's tau.
        simpo_gamma: simpo's target margin.

    Returns:
        Shape (pairs,).
    """
    swapped = PairLogps(logps.rejected, logps.chosen, logps.ref_rejected, logps.ref_chosen, logps.rejected_tokens, logps.chosen_tokens)
    one_way = _one_way(kind, logps, beta, simpo_gamma)
    other_way = _one_way(kind, swapped, beta, simpo_gamma)
    return probability * one_way + (1 - probability) * other_way


def _one_way(kind: str, logps: PairLogps, beta: float, simpo_gamma: float) -> Tensor:
    """The loss of taking `chosen` for the better one."""
    chosen, rejected = implicit_rewards(logps)
    per_token = chosen / logps.chosen_tokens - rejected / logps.rejected_tokens
    if kind == "sigmoid":  # Rafailov et al. 2023, 2305.18290, eq. 7
        return -logsigmoid(beta * (chosen - rejected))
    if kind == "ipo":  # Azar et al. 2023, 2310.12036, eq. 17, per token
        return (per_token - 1 / (2 * beta)) ** 2
    if kind == "hinge":  # Zhao et al. 2023, 2305.10425, with DPO's rewards
        return torch.relu(1 - beta * (chosen - rejected))
    if kind == "apo_zero":  # D'Oosterlinck et al. 2024, 2408.06266, eq. 7
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    if kind == "sigmoid_norm":  # Lambert et al. 2024, 2411.15124, eq. 6
        return -logsigmoid(beta * per_token)
    if kind == "simpo":  # Meng et al. 2024, 2405.14734, eq. 6
        plain = logps.chosen / logps.chosen_tokens - logps.rejected / logps.rejected_tokens
        return -logsigmoid(beta * plain - simpo_gamma)
    raise ValueError(f"no DPO loss {kind!r}")


def implicit_rewards(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Log pi / pi_ref of chosen and rejected: DPO's rewards without beta (2305.18290, eq. 5). Both (pairs,)."""
    return logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected


def ppo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss (Schulman et al. 2017, arXiv 1707.06347, eq. 7), summed over the tokens that count.

    Args:
        logprobs: under the policy now. Shape (predicted,).
        old_logprobs: under the policy that sampled. Shape (predicted,).
        advantages: already whitened. Shape (predicted,).
        mask: True where a token counts. Shape (predicted,).
        clip_range: how far the ratio may move from 1 before it stops earning.

    Returns:
        The sum of the loss and the number of tokens that were clipped, both scalars.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-20, 20))
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return -torch.minimum(free, clipped)[mask].sum(), (clipped < free)[mask].sum()


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, the worse of the value and the value clipped to its rollout's, summed over tokens that count.

    Args:
        values: now. Shape (predicted,).
        old_values: at the rollout. Shape (predicted,).
        returns: advantage + value, before whitening. Shape (predicted,).
        mask: True where a token counts. Shape (predicted,).
        clip: how far a value may move from its rollout's.

    Returns:
        The sum of the loss and the number of tokens that were clipped, both scalars.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(free, clipped)[mask].sum(), (clipped > free)[mask].sum()
