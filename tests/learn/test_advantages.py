import torch

from align.learn.advantages import generalised_advantages, k3, minus_mean_of_others, token_rewards, whiten


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


def test_each_score_is_compared_with_the_mean_of_the_others():
    """Scores 1, 2, 6: 1 - (2 + 6) / 2 = -3, 2 - (1 + 6) / 2 = -1.5, 6 - (1 + 2) / 2 = 4.5."""
    torch.testing.assert_close(minus_mean_of_others(torch.tensor([1.0, 2.0, 6.0])), torch.tensor([-3.0, -1.5, 4.5]))


def test_a_single_completion_keeps_its_score():
    assert minus_mean_of_others(torch.tensor([2.0])).tolist() == [2.0]
