"""PPO's optimizer steps: a round's rollouts in a fresh order each pass, cut into minibatches, each packed into rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from align.errors import AlignError
from align.learn.advantages import divisor
from align.learn.entropy import forward_with_entropy
from align.learn.losses import k2_loss, ppo_policy_loss, ppo_value_loss
from align.learn.optimise import Means, Sums, learning_rate, update
from align.learn.rollouts import Rollout
from align.model.forward import forward, forward_head
from align.model.load import Trainee
from align.model.packing import Row
from align.model.trunk import Role
from align.settings import PPOSettings


@dataclass
class Learner:
    """What the updates change, and how."""

    trainee: Trainee
    value: Role | None  # none: an estimator without one
    optimizer: torch.optim.Optimizer  # a group for the policy and, where there is a value, one for it
    settings: PPOSettings


@dataclass
class Update:
    """What one optimizer step found: metrics as sums and counts, the largest of others, and whether it was called off."""

    sums: Sums
    peaks: dict[str, float] = field(default_factory=dict)
    called_off: bool = False


class RowTensors(NamedTuple):
    """What the rollouts of a row say of its tokens. All (predicted,); values and returns are empty where none is learned."""

    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    old_values: Tensor
    returns: Tensor


def minibatches(count: int, settings: PPOSettings, iteration: int, epoch: int) -> Iterator[list[int]]:
    """A fresh order for every pass over a round's prompts, cut into `minibatches` parts."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + iteration * 1009 + epoch)
    order = torch.randperm(count, generator=generator)
    yield from (part.tolist() for part in order.tensor_split(min(settings.minibatches, count)))


def update_step(learner: Learner, rollouts: Sequence[Rollout], rows: Sequence[Row], iteration: int, kl_coef: float) -> Update:
    """One optimizer step on a minibatch: losses summed over its rows, divided by what the whole minibatch counts.

    Raises:
        AlignError: where a loss or a gradient is not finite.
    """
    settings, trunk = learner.settings, learner.trainee.trunk
    counts = [_counted(rollouts, row, settings) for row in rows]
    divide_by = max(1, sum(counts))
    kl_loss_coef = settings.kl_loss_coef + (kl_coef if settings.kl_in_loss else 0.0)
    trains_policy = iteration >= settings.value_warmup
    means, peaks = Means(), {"largest_log_ratio": 0.0, "ratio_max": 0.0}
    for row, count in zip(rows, counts, strict=True):
        row = row.to(trunk.device)
        of_row = [rollouts[index] for index in row.indices]
        tensors = RowTensors(*(torch.cat([getattr(r, name) for r in of_row]).to(trunk.device) for name in RowTensors._fields))
        # forward and backward of a role stay together, so that recomputed activations would use the same adapters
        if trains_policy:
            with trunk.switched_to(learner.trainee.role):
                loss, sums, log_ratio = policy_loss(learner, row, tensors, kl_loss_coef)
                (loss / divide_by).backward()
            means.add({"policy_loss": (float(loss.detach()), count), **sums})
            peaks["largest_log_ratio"] = max(peaks["largest_log_ratio"], float(log_ratio.abs().max()))
            peaks["ratio_max"] = max(peaks["ratio_max"], float(log_ratio.max().exp()))
        if learner.value is not None:
            with trunk.switched_to(learner.value):
                loss, sums = value_loss(learner, learner.value, row, tensors)
                (settings.value_coef * loss / divide_by).backward()
            means.add({"value_loss": (float(loss.detach()), count), **sums})
    found = {name: (total, count) for name, (total, count) in means.sums.items()}
    moved = means.means().get("approx_kl", 0.0)
    if settings.max_update_kl is not None and moved > settings.max_update_kl:
        learner.optimizer.zero_grad(set_to_none=True)
        return Update(found, peaks, called_off=True)
    found |= _step(learner, means.means(), iteration, trains_policy)
    return Update(found, peaks if trains_policy else {})


def _counted(rollouts: Sequence[Rollout], row: Row, settings: PPOSettings) -> int:
    """What a row adds to its step's divisor: tokens or completions that count."""
    parts = [part > 0 for i in row.indices for part in rollouts[i].weights.split(rollouts[i].lengths)]
    return divisor(settings.estimator, sum(int(part.sum()) for part in parts), sum(bool(part.any()) for part in parts))


def policy_loss(learner: Learner, row: Row, tensors: RowTensors, kl_loss_coef: float) -> tuple[Tensor, Sums, Tensor]:
    """A row's policy loss, summed by the tokens' weights, with metrics and log-ratios to the policy that sampled."""
    settings, trainee = learner.settings, learner.trainee
    through = forward_with_entropy if settings.entropy_coef else forward
    logprobs, entropy = through(trainee.trunk, trainee.role, row, settings.temperature)
    loss, below, above = ppo_policy_loss(
        logprobs, tensors.old_logprobs, tensors.advantages, settings.clip_range, settings.clip_range_high, settings.dual_clip
    )
    if kl_loss_coef:
        loss = loss + kl_loss_coef * k2_loss(logprobs, tensors.ref_logprobs)
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    log_ratio, counted = (logprobs - tensors.old_logprobs).detach(), tensors.weights > 0
    per_token = {
        "clip_share": below | above,
        "clip_share_below": below,
        "clip_share_above": above,
        "approx_kl": log_ratio**2 / 2,  # k2 of the policy that sampled to the policy now
        "approx_kl_k1": -log_ratio,
        "ratio": log_ratio.exp(),
    }
    sums: Sums = {name: (float(numbers[counted].sum()), int(counted.sum())) for name, numbers in per_token.items()}
    return (loss * tensors.weights).sum(), sums, log_ratio


def value_loss(learner: Learner, value: Role, row: Row, tensors: RowTensors) -> tuple[Tensor, Sums]:
    """A row's value loss, summed by the tokens' weights, with metrics."""
    values = forward_head(learner.trainee.trunk, value, row).values
    loss, clipped = ppo_value_loss(values, tensors.old_values, tensors.returns, learner.settings.value_clip)
    counted = tensors.weights > 0
    return (loss * tensors.weights).sum(), {"value_clip_share": (float(clipped[counted].sum()), int(counted.sum()))}


def _step(learner: Learner, found: dict[str, float], iteration: int, trains_policy: bool) -> Sums:
    """Clip the gradients, step, and say what was done."""
    settings = learner.settings
    peaks = (settings.learning_rate, settings.value_learning_rate)[: len(learner.optimizer.param_groups)]
    rates = [learning_rate(iteration, settings.iterations, peak, settings.warmup, "linear") for peak in peaks]
    norms = update(learner.optimizer, rates, settings.max_grad_norm)
    done = {"policy_grad_norm": norms[0], "learning_rate": rates[0]} if trains_policy else {}
    if learner.value is not None:
        done |= {"value_grad_norm": norms[1], "value_learning_rate": rates[1]}
    bad = [name for name, number in {**found, **done}.items() if not math.isfinite(number)]
    if bad:
        raise AlignError(
            f"PPO stopped: in round {iteration + 1} {', '.join(bad)} is not a finite number. Checkpoints of earlier rounds are kept. "
            "Lower its learning_rate and value_learning_rate or raise kl_coef (--set STAGE.SETTING=...), and run again."
        )
    return {name: (number, 1) for name, number in done.items()}
