import math

import pytest
import torch

from align.learn.losses import PairLogps, bradley_terry_loss, dpo_loss, k2_loss, ppo_policy_loss, ppo_value_loss


def pairs(*columns):
    return PairLogps(*(torch.tensor(column, dtype=torch.float32) for column in columns))


def test_bradley_terry_by_hand():
    """score difference 1: -ln sigmoid(1) = 0.31326; with probability 0.75: 0.75 * 0.31326 + 0.25 * 1.31326 = 0.56326."""
    loss = bradley_terry_loss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.75]), torch.zeros(2), 0.0)
    assert loss.tolist() == pytest.approx([0.31326, 0.56326], abs=1e-5)


def test_bradley_terry_centring_and_margin_by_hand():
    """difference 1, margin 1: ln 2; plus 0.1 * (2 + 1)^2 = 0.9."""
    loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0]), torch.ones(1), torch.ones(1), 0.1)
    assert float(loss) == pytest.approx(math.log(2) + 0.9, abs=1e-6)


def test_swapping_a_pair_and_its_probability_changes_nothing():
    chosen, rejected, p = torch.randn(3, 5).unbind()
    p = torch.sigmoid(p)
    zero = torch.zeros(5)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, p, zero, 0.3), bradley_terry_loss(rejected, chosen, 1 - p, zero, 0.3))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # chosen reward 3 - 1 = 2 over 2 tokens, rejected -1 - 0 = -1 over 4 tokens; beta 0.5
        ("sigmoid", math.log1p(math.exp(-0.5 * 3))),
        ("ipo", (2 / 2 + 1 / 4 - 1 / (2 * 0.5)) ** 2),
        ("hinge", 0.0),
        ("apo_zero", 1 - 1 / (1 + math.exp(-1.0)) + 1 / (1 + math.exp(0.5))),
        ("sigmoid_norm", math.log1p(math.exp(-0.5 * (1 + 0.25)))),
        # without a reference: 3 / 2 - (-1) / 4 = 1.75; gamma 0.25
        ("simpo", math.log1p(math.exp(-(0.5 * 1.75 - 0.25)))),
    ],
)
def test_dpo_losses_by_hand(kind, expected):
    logps = pairs([3.0], [-1.0], [1.0], [0.0], [2.0], [4.0])
    assert float(dpo_loss(kind, logps, torch.ones(1), 0.5, 0.25)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "apo_zero", "sigmoid_norm", "simpo"])
def test_a_soft_label_is_a_mix_of_both_ways(kind):
    logps = pairs([3.0], [-1.0], [1.0], [0.0], [2.0], [4.0])
    swapped = pairs([-1.0], [3.0], [0.0], [1.0], [4.0], [2.0])
    soft = dpo_loss(kind, logps, torch.tensor([0.7]), 0.5, 0.1)
    hard = 0.7 * dpo_loss(kind, logps, torch.ones(1), 0.5, 0.1) + 0.3 * dpo_loss(kind, swapped, torch.ones(1), 0.5, 0.1)
    torch.testing.assert_close(soft, hard)


def test_an_unsure_label_pulls_back_a_policy_that_is_too_sure():
    """At p = 0.5 the gradient of the margin points to 0."""
    chosen = torch.tensor([2.0], requires_grad=True)
    zero = torch.zeros(1)
    logps = PairLogps(chosen, zero, zero, zero, zero + 1, zero + 1)
    dpo_loss("sigmoid", logps, torch.tensor([0.5]), 1.0).sum().backward()
    assert float(chosen.grad) > 0


# PPO ----------------------------------------------------------------------------------------------------------------------


def test_ppo_clips_what_would_earn_more_and_never_what_would_lose_more():
    """Ratios 1.5 and 0.5 at advantages +1 and -1, clip 0.2: losses -1.2, 1.5, -0.5, 0.8; clipped are the first and the last."""
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]).log(), torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, below, above = ppo_policy_loss(ratio, torch.zeros(4), advantages, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    assert above.tolist() == [True, False, False, False]
    assert below.tolist() == [False, False, False, True]


def test_a_wider_bound_above_lets_a_ratio_earn_more():
    """Ratio 1.5, advantage 1: 1.2 with one bound of 0.2, 1.4 where it is 0.4 above, 1.5 where it is 0.6."""
    ratio, one = torch.tensor([1.5]).log(), torch.ones(1)
    losses = [float(ppo_policy_loss(ratio, torch.zeros(1), one, 0.2, high).loss) for high in (None, 0.4, 0.6)]
    assert losses == pytest.approx([-1.2, -1.4, -1.5])


def test_dual_clip_bounds_what_a_bad_token_that_became_likely_can_cost():
    """Ratio 10 at advantage -1: 10 without, 3 with a bound of 3; at advantage +1 nothing changes, nor at ratio 2."""
    ratio, advantages = torch.tensor([10.0, 10.0, 2.0]).log().requires_grad_(), torch.tensor([-1.0, 1.0, -1.0])
    free, dual = (ppo_policy_loss(ratio, torch.zeros(3), advantages, 0.2, dual_clip=bound) for bound in (None, 3.0))
    assert free.loss.tolist() == pytest.approx([10.0, -1.2, 2.0])
    assert dual.loss.tolist() == pytest.approx([3.0, -1.2, 2.0])
    assert free.clipped_above.tolist() == [False, True, False]
    assert dual.clipped_above.tolist() == [True, True, False]
    dual.loss.sum().backward()
    assert ratio.grad.tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_the_policy_loss_is_the_formula_token_by_token():
    """-min(r A, clip(r) A), or for A < 0 -max(that, c A), in plain Python over random numbers."""
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 200, generator=generator).unbind()
    found = ppo_policy_loss(new, old, advantages, 0.2, 0.3, 2.0)
    for i in range(200):
        ratio, advantage = math.exp(float(new[i] - old[i])), float(advantages[i])
        earned = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
        if advantage < 0:
            earned = max(earned, 2.0 * advantage)
        assert float(found.loss[i]) == pytest.approx(-earned, rel=1e-5)
        outside = ratio > 1.3 if advantage > 0 else (ratio < 0.8 or ratio > 2.0)
        assert bool(found.clipped_below[i] or found.clipped_above[i]) == outside


def test_a_ratio_beyond_all_measure_stays_a_number():
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    loss = ppo_policy_loss(logprobs, torch.tensor([-500.0, 0.0]), torch.tensor([-1.0, -1.0]), 0.2).loss.sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprobs.grad).all()


def test_at_ratio_1_the_policy_gradient_is_minus_the_advantage():
    logprobs = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, below, above = ppo_policy_loss(logprobs, torch.zeros(3), advantages, 0.2)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not (below | above).any()


def test_the_value_loss_takes_the_worse_of_both():
    """Value 1, old value 0, return 1, clip 0.2: free error 0, clipped (0.2 - 1)^2 / 2 = 0.32. Return 2: free 0.5, clipped 1.62."""
    one, zero = torch.ones(2), torch.zeros(2)
    loss, clipped = ppo_value_loss(one, zero, torch.tensor([1.0, 2.0]), 0.2)
    assert loss.tolist() == pytest.approx([0.32, 1.62])
    assert clipped.tolist() == [True, True]


def test_a_value_within_its_bound_has_the_plain_squared_error():
    """Value 0.1, old value 0, returns -1 and 3: 1.21 / 2 and 8.41 / 2."""
    loss, clipped = ppo_value_loss(torch.full((2,), 0.1), torch.zeros(2), torch.tensor([-1.0, 3.0]), 0.2)
    assert loss.tolist() == pytest.approx([0.605, 4.205])
    assert clipped.tolist() == [False, False]


def test_k2_has_the_gradient_of_kl_on_policy():
    """Over all outcomes of a small categorical law: the mean of k2's gradients is the exact KL's gradient (2510.01555)."""
    logits, ref = torch.tensor([0.3, -0.2, 0.9]), torch.tensor([0.2, 0.5, 0.3]).log()
    free = logits.clone().requires_grad_()
    p = torch.log_softmax(free, 0)
    (p.exp() * (p - ref)).sum().backward()
    expected, mean = free.grad, torch.zeros(3)
    for outcome in range(3):
        one = logits.clone().requires_grad_()
        k2_loss(torch.log_softmax(one, 0)[outcome], ref[outcome]).backward()
        mean += torch.softmax(logits, 0)[outcome] * one.grad
    torch.testing.assert_close(mean, expected)
