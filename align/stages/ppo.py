"""PPO with a KL penalty to the policy it starts from; policy, reference, reward model and value on one trunk.

A round: sample completions, score them, turn scores and KL into per-token advantages, then a few passes of clipped updates.
Log-probabilities of the round are recomputed on the very rows that the first pass updates, so its ratios are 1 to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align.artifact import Artifact
from align.data.tokenise import prompt_ids
from align.errors import AlignError
from align.learn.advantages import generalised_advantages, k3, minus_mean_of_others, token_rewards, whiten
from align.learn.checkpoint import load_checkpoint, save_checkpoint
from align.learn.losses import ppo_policy_loss, ppo_value_loss
from align.learn.optimise import Means, learning_rate, make_optimizer, update
from align.model.forward import forward, forward_head
from align.model.generate import Completion
from align.model.load import (
    Sampler,
    Trainee,
    largest_change_at_start,
    load_role,
    open_trainee,
    own_model,
    root_identity,
    save_model,
)
from align.model.packing import Example, Row, pack
from align.model.trunk import Head, Role, Trunk
from align.records import write_jsonl
from align.run import Job, Result
from align.settings import Lora, PPOSettings

VALUE = "value-role"
SAMPLES_KEPT = 8  # completions of each round written to samples/


@dataclass
class Rollout:
    """What is known of one prompt's completions, all as 1-D tensors over their tokens in order."""

    example: Example
    completions: list[Completion]
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    entropy: Tensor
    scores: Tensor  # (completion,) as the reward model gave them
    advantages: Tensor  # these two are filled in by `advantages_of`
    returns: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion) for completion in self.example.completions]


def run(job: Job) -> Result:
    """Train a policy adapter and a value adapter with head."""
    settings: PPOSettings = job.settings
    reward_artifact = job.parents["reward_model"]
    assert reward_artifact is not None
    _check_same_trunk(job, reward_artifact)
    trainee = open_trainee(job)
    trunk = trainee.trunk
    reward = load_role(trunk, reward_artifact)
    value = add_value(trunk, reward, reward_artifact, settings.seed)
    groups = [trainee.parameters, trunk.parameters_of(VALUE, VALUE)]
    for parameter in groups[1].values():
        parameter.requires_grad_(True)
    rows = prompt_ids(job.name, job.data["prompts"], trainee.chat, settings.max_bad_rows, settings.max_prompt_tokens, job.work)
    prompts = [ids for _, ids in rows]
    checks: dict[str, float] = {"change_at_start": largest_change_at_start(trainee, [Example(0, prompts[0], (prompts[0][-4:],))])}
    sampler = Sampler(trunk, settings.merged_sampler)
    metrics = _train(job, trainee, reward, value, groups, prompts, sampler, checks)
    save_model(trunk, trainee.chat, trainee.adapter, job.work)
    return Result("policy", own_model(trunk, trainee.chat, "adapter"), metrics, checks, {"prompts": {"used": len(prompts)}})


def _check_same_trunk(job: Job, reward_artifact: Artifact) -> None:
    policy_root, reward_root = (root_identity(job.base, artifact) for artifact in (job.parents["policy"], reward_artifact))
    if policy_root != reward_root:
        raise AlignError(
            f"{job.name}: the reward model {reward_artifact.name!r} stands on other weights ({reward_root[:20]}) "
            f"than the policy ({policy_root[:20]}); "
            "expected one base for both. Train the reward model with an adapter on the same policy: recipe.reward(policy=..., lora=Lora())."
        )


def add_value(trunk: Trunk, reward: Role, artifact: Artifact, seed: int) -> Role:
    """The value role: a copy of the reward model's adapter, to be trained, and a head of zeros.

    Huang et al. 2024 (arXiv 2403.17031) copy the head too. A reward head has seen whole completions only: in the middle of a
    sentence it was off by 1.4 on average where scores vary by 0.4, and advantages were mostly its error. Scores are centred,
    so 0 is the best constant, and the adapter's features let the head learn fast.
    """
    lora = Lora.model_validate(artifact.facts["settings"]["lora"] | {"dropout": 0.0}, strict=False)
    trunk.add_adapter(VALUE, lora, seed)
    trunk.copy_adapter(reward.adapters[-1], VALUE)
    trunk.heads[VALUE] = Head(trunk.hidden_size, scale=0.0).to(trunk.device)
    return Role((*reward.adapters[:-1], VALUE), VALUE)


def _train(
    job: Job,
    trainee: Trainee,
    reward: Role,
    value: Role,
    groups: list[dict],
    prompts: list[tuple[int, ...]],
    sampler: Sampler,
    checks: dict[str, float],
) -> dict[str, float]:
    """The rounds, going on from the last checkpoint."""
    settings: PPOSettings = job.settings
    optimizer = make_optimizer([list(group.values()) for group in groups], settings.weight_decay, eps=1e-5)
    start, state = load_checkpoint(job.work, groups[0] | groups[1], optimizer)
    checks.update(state.get("checks", {}))
    metrics: dict[str, float] = state.get("metrics", {})
    meter = job.meter("score", "kl", "length")
    meter.begin(settings.iterations, start)
    for iteration in range(start, settings.iterations):
        meter.phase("sampling")
        completions = _sample(trainee, sampler, prompts, iteration, settings, meter)
        batches = list(minibatches(len(completions), settings, iteration, 0))
        rows = [pack([completions[i][0] for i in batch], settings.row_tokens) for batch in batches]
        meter.phase("scoring")
        rollouts = score_rollouts(trainee, reward, value, completions, [row for batch in rows for row in batch], settings)
        metrics = rollout_metrics(rollouts, settings)
        if iteration == 0:
            _check_sampler(metrics["sampler_mismatch"])
            checks["kl_at_start"] = float(max((r.old_logprobs - r.ref_logprobs).abs().max() for r in rollouts))
        advantages_of(rollouts, settings)
        means = Means()
        for epoch in range(settings.epochs):
            for number, batch in enumerate(minibatches(len(rollouts), settings, iteration, epoch)):
                meter.phase(f"updating, pass {epoch + 1} of {settings.epochs}")
                batch_rows = rows[number] if epoch == 0 else pack([rollouts[i].example for i in batch], settings.row_tokens)
                sums = update_step(trainee, value, rollouts, batch_rows, optimizer, iteration, settings)
                means.add(sums)
                if iteration == epoch == number == 0:
                    checks["ratio_off_1_at_start"] = sums["largest_log_ratio"][0]
        metrics = {**metrics, **means.means()}
        tokens = sum(row.ids.numel() for batch in rows for row in batch)
        meter.step(iteration + 1, metrics, tokens)
        _write_samples(job, trainee, rollouts, iteration)
        if (iteration + 1) % settings.save_every == 0 or iteration + 1 == settings.iterations:
            save_checkpoint(job.work, iteration + 1, groups[0] | groups[1], optimizer, {"checks": checks, "metrics": metrics})
    meter.close()
    return metrics


def minibatches(count: int, settings: PPOSettings, iteration: int, epoch: int) -> Iterator[list[int]]:
    """A fresh order for every pass over a round's prompts, cut into `minibatches` parts."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + iteration * 1009 + epoch)
    order = torch.randperm(count, generator=generator)
    yield from (part.tolist() for part in order.tensor_split(min(settings.minibatches, count)))


def _sample(
    trainee: Trainee, sampler: Sampler, prompts: list[tuple[int, ...]], iteration: int, settings: PPOSettings, meter
) -> list[tuple[Example, list[Completion]]]:
    """A round's prompts, in an order that goes through all before any comes again, with their completions."""
    first = iteration * settings.prompts_per_iteration
    chosen = []
    for place in range(first, first + settings.prompts_per_iteration):
        generator = torch.Generator().manual_seed(settings.seed + place // len(prompts))
        chosen.append(prompts[torch.randperm(len(prompts), generator=generator)[place % len(prompts)]])
    sampled = sampler.sample(
        trainee.role,
        chosen,
        settings.completions_per_prompt,
        settings.max_new_tokens,
        settings.temperature,
        trainee.chat.stop_ids,
        seed=settings.seed * 1_000_003 + iteration,
        on_progress=lambda done: meter.phase(f"sampling, {done} of {len(chosen)} prompts"),
    )
    return [
        (Example(i, prompt, tuple(c.ids for c in completions)), completions)
        for i, (prompt, completions) in enumerate(zip(chosen, sampled, strict=True))
    ]


@torch.no_grad()
def score_rollouts(
    trainee: Trainee,
    reward: Role,
    value: Role,
    sampled: Sequence[tuple[Example, list[Completion]]],
    rows: Sequence[Row],
    settings: PPOSettings,
) -> list[Rollout]:
    """Four passes over each row: policy, reference, value, reward. In the order of `sampled`."""
    trunk = trainee.trunk
    found: dict[int, Rollout] = {}
    for row in rows:
        policy = forward(trunk, trainee.role, row, settings.temperature)
        reference = forward(trunk, trainee.before, row, settings.temperature)
        values = forward_head(trunk, value, row).values
        scores = forward_head(trunk, reward, row).scores
        per_token = [policy.logprobs, reference.logprobs, values, policy.entropy]
        sizes = [example.tokens - len(example.prompt) for example in row.examples]
        parts: Iterator[tuple[Tensor, Tensor, Tensor, Tensor]] = zip(*(tensor.cpu().split(sizes) for tensor in per_token), strict=True)
        counts = [len(example.completions) for example in row.examples]
        for example, tensors, score in zip(row.examples, parts, scores.cpu().split(counts), strict=True):
            completions = sampled[example.index][1]
            found[example.index] = Rollout(example, completions, *tensors, score, score, score)
    return [found[index] for index in range(len(sampled))]


def advantages_of(rollouts: Sequence[Rollout], settings: PPOSettings) -> None:
    """Fill in advantages, whitened over the whole round, and returns."""

    def padded(numbers: list[Tensor]) -> Tensor:
        return pad_sequence([part for n, r in zip(numbers, rollouts, strict=True) for part in n.split(r.lengths)], batch_first=True)

    logprobs, ref_logprobs = padded([r.old_logprobs for r in rollouts]), padded([r.ref_logprobs for r in rollouts])
    values = padded([r.old_values for r in rollouts])
    lengths = torch.tensor([length for r in rollouts for length in r.lengths])
    mask = torch.arange(logprobs.shape[1])[None] < lengths[:, None]
    final = [final_scores(r, settings.missing_eos_score) for r in rollouts]
    scores = torch.cat([minus_mean_of_others(of_prompt) for of_prompt in final] if settings.compare_completions else final)
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, settings.kl_coef)
    advantages, returns = generalised_advantages(rewards, values, mask, settings.gamma, settings.gae_lambda)
    sizes = [sum(r.lengths) for r in rollouts]
    flat = zip(whiten(advantages, mask)[mask].split(sizes), returns[mask].split(sizes), strict=True)
    for rollout, (advantage, return_) in zip(rollouts, flat, strict=True):
        rollout.advantages, rollout.returns = advantage, return_


def final_scores(rollout: Rollout, missing_eos_score: float | None) -> Tensor:
    """The reward model's scores, or the given one for completions that never ended their turn. Shape (completion,)."""
    if missing_eos_score is None:
        return rollout.scores
    ended = torch.tensor([completion.ended for completion in rollout.completions])
    return torch.where(ended, rollout.scores, torch.full_like(rollout.scores, missing_eos_score))


def update_step(
    trainee: Trainee,
    value: Role,
    rollouts: Sequence[Rollout],
    rows: Sequence[Row],
    optimizer: torch.optim.Optimizer,
    iteration: int,
    settings: PPOSettings,
) -> dict[str, tuple[float, float]]:
    """One optimizer step on a minibatch: losses summed over its rows, divided by its tokens."""
    trunk = trainee.trunk
    tokens = sum(len(row.targets) for row in rows)
    means = Means()
    largest = 0.0
    for row in rows:
        row = row.to(trunk.device)
        of_row = [rollouts[index] for index in row.indices]
        old_logprobs, advantages, old_values, returns = (
            torch.cat([getattr(r, name) for r in of_row]).to(trunk.device)
            for name in ("old_logprobs", "advantages", "old_values", "returns")
        )
        # forward and backward of a role stay together, so that recomputed activations would use the same adapters
        with trunk.switched_to(trainee.role):
            logprobs = forward(trunk, trainee.role, row, settings.temperature).logprobs
            policy_loss, policy_clipped = ppo_policy_loss(logprobs, old_logprobs, advantages, row.trained_mask, settings.clip_range)
            (policy_loss / tokens).backward()
        with trunk.switched_to(value):
            values = forward_head(trunk, value, row).values
            value_loss, value_clipped = ppo_value_loss(values, old_values, returns, row.trained_mask, settings.value_clip)
            (settings.value_coef * value_loss / tokens).backward()
        log_ratio = (logprobs - old_logprobs).detach()
        largest = max(largest, float(log_ratio.abs().max()))
        sums = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_share": policy_clipped,
            "value_clip_share": value_clipped,
            "approx_kl": (log_ratio**2).sum() / 2,
        }
        means.add({name: (float(total.detach()), len(row.targets)) for name, total in sums.items()})
    peaks = (settings.learning_rate, settings.value_learning_rate)
    rates = [learning_rate(iteration, settings.iterations, peak, settings.warmup, "linear") for peak in peaks]
    norms = update(optimizer, rates, settings.max_grad_norm)
    found = {**means.means(), "policy_grad_norm": norms[0], "value_grad_norm": norms[1]}
    _stop_if_not_finite([name for name, number in found.items() if not math.isfinite(number)], iteration)
    once = {"policy_grad_norm": norms[0], "value_grad_norm": norms[1], "learning_rate": rates[0], "largest_log_ratio": largest}
    return {name: (total, count) for name, (total, count) in means.sums.items()} | {name: (number, 1) for name, number in once.items()}


def _stop_if_not_finite(bad: list[str], iteration: int) -> None:
    if bad:
        raise AlignError(
            f"PPO stopped: in round {iteration + 1} {', '.join(bad)} is not a finite number. Checkpoints of earlier rounds are kept. "
            "Lower its learning_rate and value_learning_rate or raise kl_coef (--set STAGE.SETTING=...), and run again."
        )


def _check_sampler(mismatch: float) -> None:
    """The sampler may round otherwise than the trained policy, by a few hundredths of a nat a token; more is another model."""
    if not mismatch < 0.5:
        raise AlignError(
            f"PPO stopped: sampled tokens are {mismatch:.2f} nats off the trained policy's log-probabilities; expected under 0.5. "
            "The sampler is not the policy. Try merged_sampler=false, and report it."
        )


def rollout_metrics(rollouts: Sequence[Rollout], settings: PPOSettings) -> dict[str, float]:
    """How a round's completions did: score, KL in nats per completion, length, ended share, how well values foresaw."""
    scores = torch.cat([final_scores(r, settings.missing_eos_score) for r in rollouts])
    completions = [c for r in rollouts for c in r.completions]
    log_ratio = torch.cat([r.old_logprobs - r.ref_logprobs for r in rollouts])
    tokens = len(log_ratio)
    sampler = torch.tensor([p for c in completions for p in c.logprobs])
    old_logprobs = torch.cat([r.old_logprobs for r in rollouts])
    return {
        "score": float(scores.mean()),
        "score_spread": float(scores.std(unbiased=False)),
        "kl": float(log_ratio.sum()) / len(completions),
        "kl_per_token": float(log_ratio.mean()),
        "k3_per_token": float(k3(old_logprobs, old_logprobs - log_ratio).mean()),
        "length": tokens / len(completions),
        "ended": sum(c.ended for c in completions) / len(completions),
        "entropy": float(torch.cat([r.entropy for r in rollouts]).mean()),
        "value": float(torch.cat([r.old_values for r in rollouts]).mean()),
        "sampler_mismatch": float((sampler - old_logprobs).abs().mean()),
    }


def _write_samples(job: Job, trainee: Trainee, rollouts: Sequence[Rollout], iteration: int) -> None:
    folder = job.work / "samples"
    folder.mkdir(exist_ok=True)
    text = trainee.chat.text
    rows = [
        {
            "prompt": trainee.chat.tokenizer.decode(r.example.prompt),
            "completion": text(c.ids),
            "score": float(score),
            "ended": c.ended,
        }
        for r in rollouts
        for c, score in zip(r.completions, r.scores, strict=True)
    ]
    write_jsonl(folder / f"round-{iteration + 1:04d}.jsonl", rows[:SAMPLES_KEPT])
