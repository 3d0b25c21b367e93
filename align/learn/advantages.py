"""From scores to advantages: per-token rewards, generalised advantages, and the estimators that need no value. Pure functions.

Per-token tensors are (completion, token), padded on the right; `mask` is True where a token counts, a run of True from the left.
Scores are (completion,); those of one prompt stand together, `group` of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Per-token rewards ----------------------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * k1 at each token, plus the score at the last one (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).

    Args:
        scores: one per completion. Shape (completion,).
        logprobs: of the policy that sampled. Shape (completion, token).
        ref_logprobs: of the reference. Shape (completion, token).
        mask: True where a token counts. Shape (completion, token).
        kl_coef: weight of the KL penalty.

    Returns:
        Shape (completion, token), 0 where the mask is False.
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), torch.zeros_like(logprobs))
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's estimate of KL that is never negative: exp(-log r) - 1 + log r with log r = logprobs - ref_logprobs."""
    log_ratio = logprobs - ref_logprobs
    return torch.exp(-log_ratio) - 1 + log_ratio


def whiten(numbers: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """Scale to variance 1 over the tokens that count, and shift to mean 0 or keep the mean; 0 elsewhere.

    Args:
        numbers: any shape.
        mask: True where a token counts. The same shape.
        keep_mean: add the mean back: rewards keep their sign (Ziegler et al. 2019).
    """
    mean = numbers[mask].mean()
    white = scale(numbers - mean, mask)
    return torch.where(mask, white + mean, white) if keep_mean else white


def scale(numbers: Tensor, mask: Tensor) -> Tensor:
    """Divide by the root mean square over the tokens that count, so that 0 stays 0; 0 elsewhere.

    For what is centred already. Whitening's shift to the mean would give every token of a prompt whose completions all earned the
    same a small gradient of noise, and Adam, which divides by the gradient's size, a step as large as the one for a success.

    Args:
        numbers: any shape.
        mask: True where a token counts. The same shape.
    """
    size = torch.rsqrt(numbers[mask].square().mean() + 1e-8)
    return torch.where(mask, numbers * size, torch.zeros_like(numbers))


# With a value -----------------------------------------------------------------------------------------------------------------


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16), backwards from the last token.

    Args:
        rewards: per token. Shape (completion, token).
        values: of the state before each token. Shape (completion, token).
        mask: True where a token counts. Shape (completion, token).
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


# Without a value --------------------------------------------------------------------------------------------------------------


def minus_mean_of_others(scores: Tensor, group: int) -> Tensor:
    """Each score less the mean of the other completions' of its prompt (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    Args:
        scores: Shape (completion,).
        group: completions of each prompt.

    Returns:
        The same shape; unchanged where a completion has no others.
    """
    if group == 1:
        return scores
    of_prompt = scores.double().view(-1, group)  # in float64 equal scores differ by exactly 0, which is all that Adam forgives
    return ((of_prompt - of_prompt.mean(1, keepdim=True)) * group / (group - 1)).flatten().to(scores.dtype)


def rloo(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, group: int) -> Tensor:
    """REINFORCE leave-one-out (2402.14740, eq. 8): the completion is one action, and its reward is score - kl_coef * log-ratio.

    Returns:
        Advantages, the same at every token of a completion. Shape (completion, token).
    """
    kl = torch.where(mask, logprobs - ref_logprobs, torch.zeros_like(logprobs)).sum(1)
    return minus_mean_of_others(scores - kl_coef * kl, group)[:, None] * mask


def grpo(scores: Tensor, mask: Tensor, group: int, by_deviation: bool) -> Tensor:
    """A score's distance from its prompt's mean, in standard deviations (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.2).

    Args:
        scores: Shape (completion,).
        mask: True where a token counts. Shape (completion, token).
        group: completions of each prompt.
        by_deviation: divide by the prompt's standard deviation. Dr. GRPO does not, as that favours prompts whose completions
            hardly differ (Liu et al. 2025, arXiv 2503.20783, sec. 3).

    Returns:
        Advantages, the same at every token of a completion. Shape (completion, token).
    """
    of_prompt = scores.double().view(-1, group)
    distance = of_prompt - of_prompt.mean(1, keepdim=True)
    if by_deviation:
        distance = distance / (of_prompt.std(1, keepdim=True) + 1e-4)
    return distance.flatten().to(scores.dtype)[:, None] * mask


def reinforce_plus_plus(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The rest of the rewards from each token on (Hu et al. 2025, arXiv 2501.03262, sec. 3). Whiten them over the round.

    Args:
        rewards: per token, the KL penalty in them. Shape (completion, token).
        mask: True where a token counts. Shape (completion, token).
        gamma: discount.
    """
    return generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def token_weights(estimator: str, mask: Tensor, max_new_tokens: int) -> Tensor:
    """What each token counts in the losses: a share of its completion for GRPO and Dr. GRPO, else 1. Divide by `divisor`.

    GRPO takes the mean over a completion's tokens (2402.03300, eq. 3), so that a token of a long one counts less; Dr. GRPO divides
    by a constant instead (2503.20783, sec. 3).

    Args:
        estimator: the setting's name.
        mask: True where a token counts. Shape (completion, token).
        max_new_tokens: the longest a completion may be; Dr. GRPO's constant.

    Returns:
        Shape (completion, token), 0 where the mask is False.
    """
    if estimator == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    return mask / max_new_tokens if estimator == "dr_grpo" else mask.float()


def divisor(estimator: str, tokens: int, completions: int) -> int:
    """What an optimizer step's summed losses are divided by: its completions for GRPO and Dr. GRPO, else its tokens."""
    return completions if estimator in ("grpo", "dr_grpo") else tokens
