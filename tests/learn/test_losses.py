import math

import pytest
import torch

from align.learn.losses import PairLogps, bradley_terry_loss, dpo_loss, ppo_policy_loss, ppo_value_loss


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


def test_ppo_clips_what_would_earn_more_and_never_what_would_lose_more():
    """Ratios 1.5 and 0.5 at advantages +1 and -1, clip 0.2: losses -1.2, 1.5, -0.5, 0.8; clipped are the first and the last."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    mask = torch.ones(4, dtype=torch.bool)
    loss, clipped = ppo_policy_loss(ratio, torch.zeros(4), advantages, mask, 0.2)
    assert float(loss) == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8, abs=1e-6)
    assert int(clipped) == 2


def test_at_ratio_1_the_policy_gradient_is_minus_the_advantage():
    logprobs = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, clipped = ppo_policy_loss(logprobs, torch.zeros(3), advantages, torch.ones(3, dtype=torch.bool), 0.2)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert int(clipped) == 0


def test_the_value_loss_takes_the_worse_of_both():
    """Value 1, old value 0, return 1, clip 0.2: free error 0, clipped (0.2 - 1)^2 / 2 = 0.32."""
    one, zero = torch.ones(1), torch.zeros(1)
    loss, clipped = ppo_value_loss(one, zero, one, torch.ones(1, dtype=torch.bool), 0.2)
    assert float(loss) == pytest.approx(0.32, abs=1e-6)
    assert int(clipped) == 1


def test_masked_tokens_count_for_nothing():
    mask = torch.tensor([True, False])
    loss, _ = ppo_policy_loss(torch.tensor([0.0, 5.0]), torch.zeros(2), torch.tensor([1.0, 100.0]), mask, 0.2)
    assert float(loss) == -1.0
