"""Log-probabilities through the output layer are those of a softmax over all logits, and so are the gradients."""

import pytest
import torch
from conftest import make_model

from align.model import output
from align.model.trunk import Trunk

VOCABULARY, HIDDEN = 261, 64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """More tokens than share a pass, and a vocabulary of several tiles, the last a narrow one."""
    monkeypatch.setattr(output, "ROWS", 128)
    monkeypatch.setattr(output, "LOGITS", 128 * 50)


def tokens(count, spread=2.0):
    generator = torch.Generator().manual_seed(0)
    hidden = spread * torch.randn(count, HIDDEN, generator=generator)
    return hidden, torch.randint(VOCABULARY, (count,), generator=generator), torch.randn(count, generator=generator)


def plain(hidden, weight, targets, softcap=None, temperature=1.0):
    """Log-probabilities and entropies through all logits."""
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_output_layer_gives_what_autograd_through_the_logits_gives(frozen, softcap, temperature):
    """Frozen, the gradient is made in the forward pass; else chunks are computed again."""
    trunk = Trunk(make_model(tie_word_embeddings=False))
    trunk.softcap = softcap
    weight = trunk.output_layer.weight.requires_grad_(not frozen)
    hidden, targets, scale = tokens(300)
    hidden.requires_grad_(True)
    wanted = [hidden] if frozen else [hidden, weight]
    expected, expected_entropy = plain(hidden, weight, targets, softcap, temperature)
    expected_gradients = torch.autograd.grad((expected * scale).sum(), wanted)
    logprobs, entropy = output.target_logprobs(trunk, hidden, targets, temperature)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-6)
    assert not entropy.requires_grad
    for found, correct in zip(torch.autograd.grad((logprobs * scale).sum(), wanted), expected_gradients, strict=True):
        largest = float(correct.abs().max())
        assert largest > 0
        torch.testing.assert_close(found, correct, atol=1e-5 * largest, rtol=0)
    with torch.no_grad():
        again, entropy = output.target_logprobs(trunk, hidden.detach(), targets, temperature)
    assert torch.equal(again, logprobs)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_output_layer_rounds_no_more_than_its_products():
    trunk = Trunk(make_model(tie_word_embeddings=False))
    hidden, targets, scale = tokens(300)
    exact = hidden.clone().requires_grad_(True)
    (plain(exact, trunk.output_layer.weight, targets)[0] * scale).sum().backward()
    trunk.output_layer.to(torch.bfloat16)
    rounded = hidden.to(torch.bfloat16).requires_grad_(True)
    (output.target_logprobs(trunk, rounded, targets, 1.0)[0] * scale).sum().backward()
    assert rounded.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.grad.float(), exact.grad, atol=0.01 * float(exact.grad.abs().max()), rtol=0)


def test_logits_far_apart_are_no_trouble():
    """The largest so far may be thousands below the next tile's."""
    trunk = Trunk(make_model(tie_word_embeddings=False))
    hidden, targets, _ = tokens(50, spread=1e4)
    with torch.no_grad():
        logprobs, entropy = output.target_logprobs(trunk, hidden, targets, 1.0)
        expected, expected_entropy = plain(hidden, trunk.output_layer.weight, targets)
    torch.testing.assert_close(logprobs, expected, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-2, rtol=1e-3)


def test_an_output_layer_with_a_bias_is_used_whole():
    trunk = Trunk(make_model(tie_word_embeddings=False))
    trunk.output_layer.bias = torch.nn.Parameter(torch.randn(VOCABULARY), requires_grad=False)
    hidden, targets, _ = tokens(10)
    expected = torch.log_softmax(hidden @ trunk.output_layer.weight.T + trunk.output_layer.bias, -1)
    logprobs, _ = output.target_logprobs(trunk, hidden, targets, 1.0)
    torch.testing.assert_close(logprobs, expected[torch.arange(10), targets], atol=1e-5, rtol=1e-6)
