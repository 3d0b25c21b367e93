"""What steers a run from round to round: the KL coefficient, and which evaluated round is the best and when to end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from align.settings import PPOSettings


def next_kl_coef(kl_coef: float, kl: float, completions: int, target: float, horizon: int) -> float:
    """The KL coefficient after a round, so that KL comes to its target (Ziegler et al. 2019, arXiv 1909.08593, sec. 2.2).

    Args:
        kl_coef: before.
        kl: of the round, in nats per completion.
        completions: in the round.
        target: nats per completion.
        horizon: completions.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


@dataclass
class Evaluations:
    """Held-out score and KL of the policy after some rounds, and which is the best."""

    points: list[dict[str, Any]] = field(default_factory=list)  # round, score, kl and what else was measured
    best: int | None = None  # its place among the points

    @property
    def best_round(self) -> int | None:
        """The best point's round; None where there is none."""
        return None if self.best is None else self.points[self.best]["round"]

    def worth(self, point: dict[str, Any], price: float) -> float:
        """Score less the price of its KL."""
        return point["score"] - price * point["kl"]

    def add(self, point: dict[str, Any], price: float, max_kl: float | None) -> bool:
        """Take in a point.

        Args:
            point: `round`, `score`, `kl` in nats per completion, and more.
            price: what a nat of KL costs, in units of the score.
            max_kl: a point with more is not the best.

        Returns:
            Whether it is the best so far.
        """
        self.points.append(point)
        if max_kl is not None and point["kl"] > max_kl:
            return False
        if self.best is None or self.worth(point, price) > self.worth(self.points[self.best], price):
            self.best = len(self.points) - 1
            return True
        return False

    def reason_to_end(self, settings: PPOSettings) -> str:
        """Why the run should go no further; empty where it should."""
        last = self.points[-1]
        if settings.max_kl is not None and last["kl"] > settings.max_kl:
            return f"held-out KL is {last['kl']:.1f} nats per completion, over max_kl={settings.max_kl}"
        since = len(self.points) - 1 - (self.best or 0)
        if settings.patience is not None and since >= settings.patience:
            return f"{since} evaluations in a row were not better than that after round {self.points[self.best or 0]['round']}"
        return ""
