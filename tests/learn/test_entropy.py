import pytest
import torch
from conftest import make_model, make_trainee, randomise

from align import Lora
from align.learn.entropy import forward_with_entropy
from align.model.forward import forward
from align.model.packing import Example, make_row
from align.model.trunk import Role, Trunk

ROW = make_row([Example(0, (3, 50, 51, 4), ((9, 8, 7), (5, 1))), Example(1, (3, 4), (tuple(range(10, 100)),))])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_without_entropy_and_the_entropy_that_of_the_scoring_pass(temperature, chat):
    trainee = make_trainee(chat)
    randomise(trainee.trunk, trainee.adapter)
    plain = forward(trainee.trunk, trainee.role, ROW, temperature)
    both = forward_with_entropy(trainee.trunk, trainee.role, ROW, temperature)
    with torch.no_grad():
        scored = forward(trainee.trunk, trainee.role, ROW, temperature)
    assert torch.equal(both.logprobs, plain.logprobs)
    torch.testing.assert_close(both.entropy.detach(), scored.entropy)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_entropy_s_gradient_is_that_of_the_plain_formula(kind):
    """With a soft cap on the logits too."""
    changes = {"final_logit_softcapping": 5.0} if kind == "gemma2" else {}
    trunk = Trunk(make_model(kind, **changes))
    trunk.add_adapter("own", Lora(rank=4), seed=1)
    randomise(trunk, "own")
    parameters = trunk.parameters_of("own")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    role, row = Role(("own",)), make_row([Example(0, (3, 50, 51, 4), ((9, 8, 7),))])
    with trunk.switched_to(role):
        forward_with_entropy(trunk, role, row, 0.7).entropy.sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    trunk.model.set_attn_implementation(trunk.own_attention)  # the plain forward of the library
    with trunk.switched_to(role):
        logits = trunk.model(row.ids[None], use_cache=False).logits
        p = torch.softmax(logits[0, 3:6] / 0.7, -1)
        (-(p * p.log()).sum()).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, parameters[name].grad, atol=1e-5, rtol=1e-3)
