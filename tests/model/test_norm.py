import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from align.model.norm import _FrozenNorm, run_frozen_norms


class Doubled(LlamaRMSNorm):
    """Looks like the usual one."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def norm_of(kind=LlamaRMSNorm, dtype=torch.float32, width=24):
    norm = kind(width, 1e-3).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, width))
    return norm


def replaced(norm):
    run_frozen_norms(nn.Sequential(norm))
    return "forward" in norm.__dict__


def through(norm, x, weights):
    x = x.clone().requires_grad_()
    out = norm(x)
    return out.detach(), torch.autograd.grad((out * weights).sum(), x)[0]


@pytest.mark.parametrize("shape", [(1, 7, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_outputs_are_the_models_own_to_the_bit_and_gradients_to_rounding(shape, dtype, near):
    x, weights = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    norm = norm_of(dtype=dtype)
    expected, expected_grad = through(norm, x, weights)
    assert replaced(norm)
    found, grad = through(norm, x, weights)
    assert torch.equal(found, expected)
    torch.testing.assert_close(grad, expected_grad, atol=near, rtol=near)
    with torch.no_grad():
        assert torch.equal(norm(x), expected)


def test_the_gradient_is_that_of_finite_differences():
    norm = norm_of().double()
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    grad = torch.autograd.grad(_FrozenNorm.apply(x.float(), norm.weight.float(), 1e-3).sum(), x)[0]
    step = 1e-4 * torch.eye(72, dtype=torch.float64).view(72, 3, 24)

    def plain(x):
        return (norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)).sum((-1, -2))

    with torch.no_grad():
        slopes = (plain(x + step) - plain(x - step)).view(3, 24) / 2e-4
    torch.testing.assert_close(grad, slopes, atol=1e-5, rtol=1e-5)


def test_a_weight_that_is_trained_gets_its_gradient():
    norm = norm_of()
    assert replaced(norm)
    norm.weight.requires_grad_(True)
    norm(torch.randn(5, 24, requires_grad=True)).sum().backward()
    assert norm.weight.grad.abs().min() > 0


def test_a_norm_that_computes_something_else_is_left_alone():
    norm = norm_of(Doubled)
    assert not replaced(norm)
    x = torch.ones(2, 24)
    assert torch.equal(norm(x), 2 * LlamaRMSNorm.forward(norm, x))
