"""Per-token rewards, advantages and their whitening, as pure functions on padded (completion, token) tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * k1 at each token, plus the score at the last one (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).

    Args:
        scores: one per completion. Shape (completion,).
        logprobs: of the policy that sampled. Shape (completion, token).
        ref_logprobs: of the reference. Shape (completion, token).
        mask: True where a token counts; a run of True from the left. Shape (completion, token).
        kl_coef: weight of the KL penalty.

    Returns:
        Shape (completion, token), 0 where the mask is False.
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), torch.zeros_like(logprobs))
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def minus_mean_of_others(scores: Tensor) -> Tensor:
    """Each score less the mean of the other completions' (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    Args:
        scores: of one prompt's completions. Shape (completion,).

    Returns:
        The same shape; unchanged for a single completion, which has no others.
    """
    count = len(scores)
    return scores if count == 1 else (scores - scores.mean()) * count / (count - 1)


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16), backwards from the last token.

    Args:
        rewards: per token. Shape (completion, token).
        values: of the state before each token. Shape (completion, token).
        mask: True where a token counts; a run of True from the left. Shape (completion, token).
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        Advantages and returns (advantages + values, before whitening), both (completion, token) and 0 where the mask is False.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # delta_t = r_t + gamma V_{t+1} - V_t
        following = torch.where(mask[:, t], delta + gamma * gae_lambda * following, torch.zeros_like(delta))
        next_value = torch.where(mask[:, t], values[:, t], torch.zeros_like(delta))
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


def whiten(numbers: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the tokens that count; 0 elsewhere.

    Args:
        numbers: any shape.
        mask: True where a token counts. The same shape.
    """
    counted = numbers[mask]
    centred = (counted - counted.mean()) * torch.rsqrt(counted.var(unbiased=False) + 1e-8)
    return torch.zeros_like(numbers).masked_scatter(mask, centred)


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL that is never negative: exp(-log r) - 1 + log r with log r = logprobs - ref_logprobs."""
    log_ratio = logprobs - ref_logprobs
    return torch.exp(-log_ratio) - 1 + log_ratio
