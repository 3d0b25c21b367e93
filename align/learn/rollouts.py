"""Rollouts: completions of a round's prompts with what policy, reference and value say of every token, and their advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.learn.advantages import (
    generalised_advantages,
    grpo,
    minus_mean_of_others,
    reinforce_plus_plus,
    rloo,
    scale,
    token_rewards,
    token_weights,
    whiten,
)
from align.learn.prompts import PromptRow
from align.model.forward import forward, forward_head
from align.model.generate import Completion
from align.model.load import Trainee
from align.model.packing import Example, Row
from align.model.trunk import Role
from align.settings import PPOSettings

NONE = torch.empty(0)


@dataclass(frozen=True)
class Sampled:
    """A prompt with its completions. `example.index` is its place in the round."""

    prompt: PromptRow
    example: Example
    completions: list[Completion]
    texts: list[str]


@dataclass
class Rollout:
    """What is known of one prompt's completions, as 1-D tensors over their tokens in order."""

    sampled: Sampled
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    old_values: Tensor = NONE  # these two where a value is learned
    values_after: Tensor = NONE  # (completion,) of the state after the last token
    advantages: Tensor = NONE  # these three are filled in by `estimate_advantages`
    weights: Tensor = NONE
    returns: Tensor = NONE

    @property
    def completions(self) -> list[Completion]:
        """As sampled."""
        return self.sampled.completions

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion.ids) for completion in self.completions]


@torch.no_grad()
def score_rollouts(
    trainee: Trainee, value: Role | None, sampled: Sequence[Sampled], rows: Sequence[Row], temperature: float
) -> list[Rollout]:
    """A pass over each row under the policy, the reference and, where there is one, the value. In the order of `sampled`."""
    trunk = trainee.trunk
    found: dict[int, Rollout] = {}
    for row in rows:
        policy = forward(trunk, trainee.role, row, temperature)
        reference = forward(trunk, trainee.before, row, temperature)
        per_token = [policy.logprobs, reference.logprobs, policy.entropy]
        after = torch.zeros(len(row.last))
        if value is not None:
            values = forward_head(trunk, value, row)
            per_token.append(values.values)
            after = values.scores.cpu()
        sizes = [example.tokens - len(example.prompt) for example in row.examples]
        parts: Iterator[tuple[Tensor, ...]] = zip(*(tensor.cpu().split(sizes) for tensor in per_token), strict=True)
        counts = [len(example.completions) for example in row.examples]
        for index, tensors, last in zip(row.indices, parts, after.split(counts), strict=True):
            found[index] = Rollout(sampled[index], *tensors, **({"values_after": last} if value else {}))
    return [found[index] for index in range(len(sampled))]


def padded(rollouts: Sequence[Rollout], per_token: Sequence[Tensor]) -> Tensor:
    """Numbers of each rollout's tokens as (completion, token), with zeros at the right."""
    parts = [part for numbers, r in zip(per_token, rollouts, strict=True) for part in numbers.split(r.lengths)]
    return pad_sequence(parts, batch_first=True)


def ended(rollouts: Sequence[Rollout]) -> Tensor:
    """Which completions ended their turn. Shape (completion,)."""
    return torch.tensor([completion.ended for rollout in rollouts for completion in rollout.completions])


def lengths(rollouts: Sequence[Rollout]) -> Tensor:
    """Tokens of each completion. Shape (completion,)."""
    return torch.tensor([length for rollout in rollouts for length in rollout.lengths])


def estimate_advantages(rollouts: Sequence[Rollout], scores: Tensor, kl_coef: float, settings: PPOSettings) -> None:
    """Fill in every rollout's advantages, the weights of its tokens in the losses and, where a value is learned, returns.

    Args:
        rollouts: of the whole round.
        scores: of every completion, as the round optimises them. Shape (completion,).
        kl_coef: weight of the KL penalty; grpo and dr_grpo have it in the loss instead.
        settings: the estimator and what it needs.
    """
    mask = torch.arange(int(lengths(rollouts).max()))[None] < lengths(rollouts)[:, None]
    counted = mask & ended(rollouts)[:, None] if settings.on_cut == "leave_out" else mask
    logprobs, ref_logprobs = (padded(rollouts, [getattr(r, name) for r in rollouts]) for name in ("old_logprobs", "ref_logprobs"))
    group, returns = settings.completions_per_prompt, None
    if settings.estimator == "rloo":
        advantages = rloo(scores, logprobs, ref_logprobs, mask, kl_coef, group)
    elif settings.estimator in ("grpo", "dr_grpo"):
        advantages = grpo(scores, mask, group, by_deviation=settings.estimator == "grpo")
    else:
        centred = settings.compare_completions and group > 1
        scores = minus_mean_of_others(scores, group) if centred else scores
        if settings.on_cut == "bootstrap":
            after = torch.cat([r.values_after for r in rollouts])
            scores = torch.where(ended(rollouts), scores, settings.gamma * after)
        rewards = token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
        rewards = whiten(rewards, mask, keep_mean=True) if settings.whiten_rewards else rewards
        if settings.estimator == "gae":
            values = padded(rollouts, [r.old_values for r in rollouts])
            advantages, returns = generalised_advantages(rewards, values, mask, settings.gamma, settings.gae_lambda)
        else:
            advantages = reinforce_plus_plus(rewards, mask, settings.gamma)
        normalised = scale if centred else whiten
        advantages = normalised(advantages, counted) if counted.any() else torch.zeros_like(advantages)
    weights = token_weights(settings.estimator, counted, settings.max_new_tokens)
    sizes = [sum(r.lengths) for r in rollouts]
    for name, numbers in (("advantages", advantages), ("weights", weights), ("returns", returns)):
        for rollout, part in zip(rollouts, numbers[mask].split(sizes) if numbers is not None else [NONE] * len(sizes), strict=True):
            setattr(rollout, name, part)
