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


class PolicyLoss(NamedTuple):
    """The policy's loss and which tokens' ratio had moved too far to earn, downwards and upwards. All (predicted,)."""

    loss: Tensor
    clipped_below: Tensor
    clipped_above: Tensor


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    Args:
        logprobs: under the policy now. Shape (predicted,).
        old_logprobs: under the policy that sampled. Shape (predicted,).
        advantages: Shape (predicted,).
        clip_range: how far the ratio may move from 1 before it stops earning.
        clip_range_high: the same upwards, where it differs (Yu et al. 2025, arXiv 2503.14476, eq. 10).
        dual_clip: where the advantage is negative, ratios above this stop losing too (Ye et al. 2019, arXiv 1912.09729, eq. 5).
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-20, 20))
    free = ratio * advantages
    above = clip_range if clip_range_high is None else clip_range_high
    objective = torch.minimum(free, ratio.clamp(1 - clip_range, 1 + above) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    clipped = (objective != free).detach()
    return PolicyLoss(-objective, clipped & (ratio < 1), clipped & (ratio > 1))


class ValueLoss(NamedTuple):
    """The value's loss and which tokens were clipped. Both (predicted,)."""

    loss: Tensor
    clipped: Tensor


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> ValueLoss:
    """Half the squared error, the worse of the value and the value clipped to its rollout's.

    Args:
        values: now. Shape (predicted,).
        old_values: at the rollout. Shape (predicted,).
        returns: advantage + value, before whitening. Shape (predicted,).
        clip: how far a value may move from its rollout's.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    free, clipped = (values - returns) ** 2, (near - returns) ** 2
    return ValueLoss(0.5 * torch.maximum(free, clipped), (clipped > free).detach())


def k2_loss(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio, whose gradient on-policy is that of KL(policy, reference) (arXiv 2510.01555). Shape (predicted,)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2
