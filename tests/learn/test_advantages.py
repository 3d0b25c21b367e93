import statistics

import pytest
import torch

from align.learn.advantages import (
    divisor,
    generalised_advantages,
    grpo,
    k3,
    minus_mean_of_others,
    reinforce_plus_plus,
    rloo,
    scale,
    token_rewards,
    token_weights,
    whiten,
)


def ragged(seed, lengths=(5, 1, 3)):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return torch.randn(mask.shape, generator=generator), mask


def test_advantages_equal_a_brute_force_double_sum():
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, each delta written out (1506.02438, eq. 16)."""
    rewards, mask = ragged(0)
    values, _ = ragged(1)
    gamma, lam = 0.9, 0.7
    advantages, returns = generalised_advantages(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(mask.shape[1]):
            expected = sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length)) if t < length else 0.0
            assert abs(float(advantages[row, t]) - expected) < 1e-5
            assert abs(float(returns[row, t]) - (expected + v[t] if t < length else 0.0)) < 1e-5


def test_with_lambda_1_and_gamma_1_the_return_is_the_rest_of_the_rewards():
    rewards, mask = ragged(2)
    values, _ = ragged(3)
    _, returns = generalised_advantages(rewards, values, mask, 1.0, 1.0)
    rest = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, rest)


def test_what_lies_past_the_end_changes_nothing():
    rewards, mask = ragged(4)
    values, _ = ragged(5)
    noise = torch.where(mask, 0.0, 1e6)
    plain = generalised_advantages(rewards, values, mask, 0.9, 0.9)
    noisy = generalised_advantages(rewards + noise, values + noise, mask, 0.9, 0.9)
    for a, b in zip(plain, noisy, strict=True):
        assert torch.equal(a, b)


def test_the_score_falls_on_the_last_token_and_kl_on_every_token():
    """Two completions of 2 and 1 tokens, kl_coef 0.5: rewards -0.5 * (logprob - ref), plus the score at the last token."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 9.0]])
    ref = torch.tensor([[-2.0, -1.0], [-3.0, 0.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, mask, 0.5)
    assert rewards.tolist() == [[-0.5, 10.5], [20.0, 0.0]]


def test_whitening_counts_only_the_mask():
    numbers, mask = ragged(6)
    white = whiten(numbers + torch.where(mask, 3.0, 1e6), mask)
    assert abs(float(white[mask].mean())) < 1e-5
    assert abs(float(white[mask].var(unbiased=False)) - 1) < 1e-4
    assert float(white[~mask].abs().sum()) == 0


def test_scaling_counts_only_the_mask_and_leaves_0_where_it_was():
    """3, 0, 4 have the root mean square 5 / sqrt(3); what is not counted is 0 however large it was."""
    mask = torch.tensor([[True, True], [True, False]])
    scaled = scale(torch.tensor([[3.0, 0.0], [-4.0, 1e6]]), mask)
    torch.testing.assert_close(scaled, torch.tensor([[3.0, 0.0], [-4.0, 0.0]]) * 3**0.5 / 5)
    assert scaled[0, 1] == 0
    assert scale(torch.zeros(2, 2), mask).abs().sum() == 0


def test_k3_is_never_negative_and_0_only_where_the_policies_agree():
    log_ratio = torch.linspace(-3, 3, 61)
    estimate = k3(log_ratio, torch.zeros(61))
    assert float(estimate.min()) >= -1e-6
    assert float(k3(torch.zeros(1), torch.zeros(1))) == 0


def test_k3_has_the_mean_of_k1_under_the_policy():
    """Over all outcomes of a small categorical distribution both means are the exact KL."""
    p = torch.tensor([0.5, 0.3, 0.2]).log()
    q = torch.tensor([0.2, 0.5, 0.3]).log()
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), exact)


def test_whitening_that_keeps_the_mean_changes_the_spread_alone():
    """1, 3, 8: mean 4, variance 26 / 3."""
    mask = torch.tensor([[True, True], [True, False]])
    white = whiten(torch.tensor([[1.0, 3.0], [8.0, 99.0]]), mask, keep_mean=True)
    deviation = (26 / 3) ** 0.5
    torch.testing.assert_close(white, torch.tensor([[4 - 3 / deviation, 4 - 1 / deviation], [4 + 4 / deviation, 0.0]]))


# Without a value ----------------------------------------------------------------------------------------------------------


def groups(seed, prompts=3, group=4):
    """Scores, log-probabilities of two policies and a ragged mask for some prompts' completions."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (prompts * group,), generator=generator)
    mask = torch.arange(5)[None] < lengths[:, None]
    logprobs, ref = torch.randn(2, *mask.shape, generator=generator).unbind()
    return torch.randn(len(mask), generator=generator), logprobs, ref, mask


def test_each_score_is_compared_with_the_mean_of_the_others():
    """Scores 1, 2, 6: 1 - (2 + 6) / 2 = -3, 2 - (1 + 6) / 2 = -1.5, 6 - (1 + 2) / 2 = 4.5; and of another prompt 0, 1, 5 the like."""
    found = minus_mean_of_others(torch.tensor([1.0, 2.0, 6.0, 0.0, 1.0, 5.0]), 3)
    torch.testing.assert_close(found, torch.tensor([-3.0, -1.5, 4.5, -3.0, -1.5, 4.5]))


def test_a_single_completion_keeps_its_score():
    assert minus_mean_of_others(torch.tensor([2.0, 3.0]), 1).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("score", [0.1, 0.3, 1 / 3, 1e-8, 12345.678])
@pytest.mark.parametrize("group", [2, 3, 5, 7])
def test_equal_scores_differ_by_exactly_nothing(score, group):
    """A difference of rounding would be a direction to learn from, since Adam takes the same step for any size."""
    scores, mask = torch.full((2 * group,), score), torch.ones(2 * group, 1, dtype=torch.bool)
    assert not minus_mean_of_others(scores, group).any()
    assert not grpo(scores, mask, group, by_deviation=True).any()
    assert not grpo(scores, mask, group, by_deviation=False).any()


def test_rloo_is_the_paper_s_double_sum():
    """(1 / (k - 1)) sum over j != i of (R_i - R_j), R = score - kl_coef * sum of log-ratios (2402.14740, eq. 8, in another order)."""
    scores, logprobs, ref, mask = groups(0)
    rewards = [float(s) - 0.3 * float((p - q)[m].sum()) for s, p, q, m in zip(scores, logprobs, ref, mask, strict=True)]
    found = rloo(scores, logprobs, ref, mask, 0.3, 4)
    for i in range(12):
        first = i // 4 * 4
        expected = sum(rewards[i] - rewards[j] for j in range(first, first + 4) if j != i) / 3
        assert found[i].tolist() == pytest.approx([expected if counts else 0.0 for counts in mask[i]], abs=1e-5)


@pytest.mark.parametrize("by_deviation", [True, False])
def test_grpo_is_a_z_score_in_its_prompt_s_group(by_deviation):
    scores, _, _, mask = groups(1)
    found = grpo(scores, mask, 4, by_deviation)
    for i in range(12):
        own = scores[i // 4 * 4 : i // 4 * 4 + 4].tolist()
        expected = (float(scores[i]) - statistics.fmean(own)) / (statistics.stdev(own) + 1e-4 if by_deviation else 1)
        assert found[i].tolist() == pytest.approx([expected if counts else 0.0 for counts in mask[i]], abs=1e-5)


def test_reinforce_plus_plus_is_the_score_less_the_kl_that_is_still_to_come():
    """A_t = score - kl_coef * sum of log-ratios from t to the end, where gamma is 1 (2501.03262, eq. 6)."""
    scores, logprobs, ref, mask = groups(2)
    found = reinforce_plus_plus(token_rewards(scores, logprobs, ref, mask, 0.3), mask, 1.0)
    for i in range(12):
        ratios = (logprobs - ref)[i][mask[i]].tolist()
        expected = [float(scores[i]) - 0.3 * sum(ratios[t:]) for t in range(len(ratios))]
        assert found[i].tolist() == pytest.approx(expected + [0.0] * (5 - len(ratios)), abs=1e-5)


def test_weights_make_means_over_tokens_over_completions_or_by_a_constant():
    """Completions of 2 and 4 tokens whose per-token losses are 1, 2 and 3, 4, 5, 6; at most 8 tokens.

    Mean over tokens: 21 / 6. GRPO: (3 / 2 + 18 / 4) / 2 = 3. Dr. GRPO: (3 / 8 + 18 / 8) / 2 = 1.3125.
    """
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    losses = torch.tensor([[1.0, 2.0, 99.0, 99.0], [3.0, 4.0, 5.0, 6.0]])
    expected = {"gae": 3.5, "rloo": 3.5, "reinforce++": 3.5, "grpo": 3.0, "dr_grpo": 1.3125}
    for estimator, mean in expected.items():
        weighted = losses * token_weights(estimator, mask, 8)
        assert float(weighted.sum()) / divisor(estimator, tokens=6, completions=2) == pytest.approx(mean), estimator
