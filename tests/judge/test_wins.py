"""Win rates against brute force and against simulated policies whose strength is known."""

import numpy as np
import pytest
import torch

from align.confidence import wilson_interval
from align.judge.wins import RIDGE, length_controlled, win_rate


def simulated(rng, prompts, theta, phi, longer):
    """Outcomes of a policy that wins with sigmoid(theta + phi tanh(d / s)), where d is N(longer, 40) characters."""
    d = rng.normal(longer, 40, prompts)
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(d / d.std()))))
    return (rng.random(prompts) < p).astype(float), d


def test_counts_and_the_mean_over_prompts():
    found = win_rate([[1.0, 0.5], [0.0], [], [1.0]], [[3, -2], [1], [], [0]])
    assert (found["prompts"], found["wins"], found["ties"], found["losses"]) == (3, 2, 1, 1)
    assert found["win_rate"] == pytest.approx((0.75 + 0 + 1) / 3)
    low, high = found["win_rate_interval"]
    assert 0 < low < found["win_rate"] < high < 1


def test_the_fit_is_the_minimum_of_the_loss():
    """Against torch's own optimiser on the written-out loss."""
    outcomes, d = simulated(np.random.default_rng(0), 80, 0.4, 1.2, 10)
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x, y = torch.tanh(torch.tensor(d / d.std())), torch.tensor(outcomes)

    def loss():
        logits = parameters[0] + parameters[1] * x
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") + RIDGE * (parameters**2).sum()

    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    assert length_controlled(outcomes, d)[0] == pytest.approx(torch.sigmoid(parameters.detach()[0]).item(), abs=1e-6)


def test_from_the_other_side_it_is_the_rest():
    outcomes, d = simulated(np.random.default_rng(1), 60, 0.5, 1.0, 20)
    assert length_controlled(1 - outcomes, -d)[0] == pytest.approx(1 - length_controlled(outcomes, d)[0], abs=1e-9)


def test_a_pure_length_effect_is_taken_out():
    """Longer answers win and nothing else does: about 64 percent are won, and the interval at equal lengths holds one half."""
    rng, holds, won = np.random.default_rng(2), 0, []
    for _ in range(100):
        outcomes, d = simulated(rng, 150, 0.0, 1.5, 30)
        _, (low, high) = length_controlled(outcomes, d)
        holds += low <= 0.5 <= high
        won.append(outcomes.mean())
    assert np.mean(won) > 0.6
    assert holds / 100 > 0.88  # 95 percent but for chance: 3.2 standard deviations


def test_what_length_does_not_explain_stays():
    rng, rates = np.random.default_rng(3), []
    for _ in range(50):
        outcomes, d = simulated(rng, 400, 0.8, 0.0, 30)
        rates.append(length_controlled(outcomes, d)[0])
    assert np.mean(rates) == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.02)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_the_interval_covers_the_truth_at_its_rate(share):
    """1,000 simulated policies on 60 prompts."""
    rng, holds = np.random.default_rng(4), 0
    for outcomes in rng.random((1000, 60)) < share:
        rate = float(outcomes.mean())
        low, high = wilson_interval(rate * 60, 60)
        holds += low <= share <= high
    assert 0.92 < holds / 1000 < 0.98  # an exact share of 60 is never covered at just 95 percent


@pytest.mark.parametrize("outcomes", [[1.0], [1.0, 1.0, 1.0], [0.5, 0.5]], ids=["one prompt", "all won", "all even"])
def test_few_prompts_and_the_same_outcome_everywhere_stay_finite(outcomes):
    found = win_rate([[each] for each in outcomes], [[0.0] for _ in outcomes])
    for name in ("win_rate", "length_controlled"):
        assert 0 <= found[f"{name}_interval"][0] <= found[name] <= found[f"{name}_interval"][1] <= 1
