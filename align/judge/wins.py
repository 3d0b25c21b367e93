"""Win rates out of judged pairs, and what is left of them where length plays no part. Pure; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from align.confidence import wilson_interval
from align.judge.judgement import Verdict

RESAMPLES = 1000
RIDGE = 0.1  # weight of theta^2 and phi^2 in the loss: it keeps both finite where every pair is won


# of a policy whose answer is a; the verdict is a tie where the judge flips with the order or is unsure
OUTCOMES: dict[Verdict, float | None] = {"a": 1.0, "b": 0.0, "tie": 0.5, "unparsed": None}


def win_rate(by_prompt: Sequence[Sequence[float]], longer_by: Sequence[Sequence[float]], seed: int = 0) -> dict[str, Any]:
    """How often a policy wins, ties count half, with intervals over prompts; and the same if its answers were as long as the other's.

    Args:
        by_prompt: outcomes of each prompt's pairs, at least one in all.
        longer_by: how much longer the policy's answer is than the other's, pair by pair, in any unit.
        seed: of the resampling that gives the second interval.
    """
    kept = [(outcomes, lengths) for outcomes, lengths in zip(by_prompt, longer_by, strict=True) if outcomes]
    every = [outcome for outcomes, _ in kept for outcome in outcomes]
    means = [fmean(outcomes) for outcomes, _ in kept]
    share = fmean(means)
    controlled, interval = length_controlled(means, [fmean(lengths) for _, lengths in kept], seed)
    return {
        "prompts": len(kept),
        "wins": every.count(1.0),
        "ties": every.count(0.5),
        "losses": every.count(0.0),
        "win_rate": share,
        "win_rate_interval": wilson_interval(share * len(kept), len(kept)),
        "length_controlled": controlled,
        "length_controlled_interval": interval,
    }


def length_controlled(outcomes: Sequence[float], longer_by: Sequence[float], seed: int = 0) -> tuple[float, list[float]]:
    """The win rate at equal lengths: sigmoid(theta) of the fit P(win) = sigmoid(theta + phi tanh(d / s)).

    Dubois et al. 2024 (arXiv 2404.04475, sec. 3), without their term for a prompt's difficulty, which takes many models to fit. d is
    the difference in length and s its standard deviation.

    Args:
        outcomes: from 0 to 1, one a prompt.
        longer_by: d of each.
        seed: of the resampling of prompts.

    Returns:
        The rate and its 95 percent interval by the bootstrap's percentiles.
    """
    y, d = np.asarray(outcomes, dtype=float), np.asarray(longer_by, dtype=float)
    x = np.tanh(d / (d.std() or 1.0))
    resampled = np.random.default_rng(seed).multinomial(len(y), np.full(len(y), 1 / len(y)), size=RESAMPLES)
    rates = 1 / (1 + np.exp(-_fitted(y, x, np.vstack([np.ones(len(y)), resampled]))[:, 0]))
    low, high = np.quantile(rates[1:], [0.025, 0.975])
    return float(rates[0]), [float(low), float(high)]


def _fitted(y: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Theta and phi by Newton's method, for each row of weights on the points at once. Shape (rows, 2)."""
    design = np.stack([np.ones_like(x), x], axis=1)
    found = np.zeros((len(weights), 2))
    for _ in range(50):
        p = 1 / (1 + np.exp(-found @ design.T))
        gradient = (weights * (y - p)) @ design - 2 * RIDGE * found
        hessian = np.einsum("rn,ni,nj->rij", weights * p * (1 - p), design, design) + 2 * RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        found += step
        if math.isclose(np.abs(step).max(), 0, abs_tol=1e-10):
            break
    return found
