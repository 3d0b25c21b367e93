"""What a round shows: how its completions did, what the policy and the value are like, and a table of samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from align.chat import Chat
from align.errors import AlignError
from align.learn.advantages import k3
from align.learn.rollouts import Rollout, ended, lengths
from align.learn.scores import Scores
from align.ngrams import repetition


def rollout_metrics(rollouts: Sequence[Rollout], scores: Scores, kl_coef: float) -> dict[str, float]:
    """How a round's completions did. KL is to the reference, in nats per completion unless it says per token.

    Args:
        rollouts: of the whole round.
        scores: of every completion.
        kl_coef: weight of the KL penalty in this round.
    """
    log_ratio = torch.cat([r.old_logprobs - r.ref_logprobs for r in rollouts])
    old_logprobs = torch.cat([r.old_logprobs for r in rollouts])
    sampler = torch.tensor([p for r in rollouts for c in r.completions for p in c.logprobs])
    estimate, size, finished = k3(old_logprobs, old_logprobs - log_ratio), lengths(rollouts), ended(rollouts).float()
    kl, score = float(log_ratio.sum()) / len(size), float(scores.final.mean())
    texts = [text for r in rollouts for text in r.sampled.texts]
    return {
        "score": score,  # as the round optimises it
        "score_spread": float(scores.final.std(unbiased=False)),
        "objective": score - kl_coef * kl,
        "raw_score": float(scores.raw.mean()),
        "raw_score_spread": float(scores.raw.std(unbiased=False)),
        **{f"score/{name}": float(part.mean()) for name, part in scores.parts.items()},
        "kl": kl,
        "kl_k3": float(estimate.sum()) / len(size),
        "kl_per_token": float(log_ratio.mean()),
        "k3_per_token": float(estimate.mean()),
        "kl_coef": kl_coef,
        "length": float(size.float().mean()),
        "length_min": float(size.min()),
        "length_max": float(size.max()),
        "ended": float(finished.mean()),
        "cut": 1 - float(finished.mean()),
        "repetition": fmean(map(repetition, texts)),
        "entropy": float(torch.cat([r.entropy for r in rollouts]).mean()),
        "sampler_mismatch": float((sampler - old_logprobs).abs().mean()),
    }


def value_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How well the values foresaw the returns, over the tokens that count: 1 - Var(R - V) / Var(R) is what they explain."""
    counted = torch.cat([r.weights for r in rollouts]) > 0
    values, returns = (torch.cat([getattr(r, name) for r in rollouts])[counted] for name in ("old_values", "returns"))
    found = {"value": float(values.mean()), "return": float(returns.mean())} if len(values) else {}
    spread = float(returns.var(unbiased=False)) if len(values) else 0.0
    if spread > 1e-12:
        found["explained_variance"] = 1 - float((returns - values).var(unbiased=False)) / spread
    return found


def check_sampler(mismatch: float) -> None:
    """The sampler may round otherwise than the trained policy, by a few hundredths of a nat a token; more is another model."""
    if not mismatch < 0.5:
        raise AlignError(
            f"PPO stopped: sampled tokens are {mismatch:.2f} nats off the trained policy's log-probabilities; expected under 0.5. "
            "The sampler is not the policy. Try merged_sampler=false, and report it; a server must give log-probabilities at the "
            "temperature it samples at (vLLM: --logprobs-mode processed_logprobs)."
        )


def sample_rows(rollouts: Sequence[Rollout], scores: Scores, chat: Chat, limit: int) -> list[dict[str, Any]]:
    """The first completions of a round as rows of a table."""
    kl: list[Tensor] = [part.sum() for r in rollouts for part in (r.old_logprobs - r.ref_logprobs).split(r.lengths)]
    each = [(r.sampled, number) for r in rollouts for number in range(len(r.completions))][:limit]
    return [
        {
            "prompt": chat.tokenizer.decode(sampled.prompt.ids),
            "completion": sampled.texts[number],
            "score": float(scores.raw[at]),
            **{f"score/{name}": float(part[at]) for name, part in scores.parts.items() if len(scores.parts) > 1},
            "kl": float(kl[at]),
            "length": len(sampled.completions[number].ids),
            "ended": sampled.completions[number].ended,
        }
        for at, (sampled, number) in enumerate(each)
    ]


class Clock:
    """Tokens per second of each phase of a round."""

    def __init__(self) -> None:
        """Start the first phase."""
        self.rates: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, phase: str, tokens: int) -> None:
        """End a phase in which `tokens` were worked through."""
        now = time.monotonic()
        self.rates[f"{phase}_tokens_per_second"] = tokens / max(now - self._since, 1e-9)
        self._since = now
