import pytest
import torch
from conftest import make_model, randomise
from transformers.models.llama.modeling_llama import LlamaMLP

from align import Lora
from align.model.forward import forward
from align.model.gated import keep_products, make_products_again
from align.model.packing import Example, make_row
from align.model.trunk import Role, Trunk

ROLE = Role(("mine",))
ROW = make_row([Example(0, tuple(range(1, 9)), (tuple(range(9, 30)), (3, 5)))])


class Doubled(LlamaMLP):
    """Looks like the usual one."""

    def forward(self, x):
        return 2 * super().forward(x)


def made(kind="llama", lora=None, full=False):
    trunk = Trunk(make_model(kind))
    trunk.add_adapter("mine", lora or Lora(rank=3, dropout=0.25), seed=0)
    randomise(trunk, "mine")
    trained = dict(trunk.model.named_parameters()) if full else trunk.parameters_of("mine")
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trunk, trained


def gradients(trunk, trained):
    torch.manual_seed(0)
    trunk.dropout = True
    forward(trunk, ROLE, ROW).logprobs.sum().backward()
    found = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    trunk.model.zero_grad()
    return found


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",), ("down_proj",)])
def test_gradients_are_those_of_kept_products_to_the_bit(kind, targets, full):
    trunk, trained = made(kind, Lora(rank=3, dropout=0.25, targets=targets), full)
    found = gradients(trunk, trained)
    keep_products(trunk.model)
    expected = gradients(trunk, trained)
    assert found.keys() == expected.keys()
    assert len(found) > 0
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_backward_pass_makes_both_products_again(checkpointed):
    """Each takes one more call of the activation; where the layer is computed again, as a whole, that is one for both."""
    trunk, _ = made()
    calls = []
    trunk.decoder.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    if checkpointed:
        trunk.checkpoint_activations()
    with trunk.switched_to(ROLE):
        logprobs = forward(trunk, ROLE, ROW).logprobs.sum()
        assert len(calls) == 1
        logprobs.backward()
    assert len(calls) == (2 if checkpointed else 3)
    with torch.no_grad():
        forward(trunk, ROLE, ROW)
    assert len(calls) == (3 if checkpointed else 4)


def test_a_block_that_computes_something_else_is_left_alone():
    model = make_model()
    block = Doubled(model.config)
    model.model.layers[0].mlp = block
    make_products_again(model)
    assert "forward" not in block.__dict__
    assert "forward" in model.model.layers[1].mlp.__dict__
    x = torch.ones(1, 2, model.config.hidden_size)
    assert torch.equal(block(x), 2 * LlamaMLP.forward(block, x))
