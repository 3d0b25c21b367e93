import pytest
import torch
from conftest import make_model
from torch import nn

from align.model.attention import cut
from align.model.forward import row_hidden_states
from align.model.last_layer import skip_what_nobody_reads
from align.model.packing import Example, make_row
from align.model.trunk import Trunk

ROW = make_row([Example(0, tuple(range(1, 9)), (tuple(range(9, 30)), (3, 5)))])
READ = torch.tensor([4, 11, 30])


class Layer(nn.Module):
    """One whose attention comes first, as in every layout that packs, or last."""

    def __init__(self, attends_first):
        super().__init__()
        self.self_attn, self.mlp, self.attends_first = Attention(), nn.Linear(3, 3), attends_first

    def forward(self, x, **keywords):
        x = x + self.self_attn(x, **keywords) if self.attends_first else x
        x = x + self.mlp(x)
        return x if self.attends_first else x + self.self_attn(x, **keywords)


class Attention(nn.Module):
    """Whose keywords tell what is read."""

    def forward(self, x, read=None):
        return x.cumsum(-2)


class Decoder(nn.Module):
    """Of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def get_decoder(self):
        return self

    def forward(self, x, **keywords):
        return self.layers[0](x, **keywords)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_what_is_read_is_what_a_whole_pass_gives_there(kind):
    trunk = Trunk(make_model(kind))
    given = {"row_blocks": lambda window: cut(ROW.segments, window, ROW.ids.device)}
    with torch.no_grad():
        whole = row_hidden_states(trunk.decoder, ROW.ids, ROW.positions, **given)
        some = row_hidden_states(trunk.decoder, ROW.ids, ROW.positions, **given, read=READ)
        again = row_hidden_states(trunk.decoder, ROW.ids, ROW.positions, **given)
    torch.testing.assert_close(some[READ], whole[READ], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(some[5], whole[5], atol=1e-3)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("attends_first", [True, False])
def test_gradients_are_those_of_a_whole_pass(attends_first):
    """And a layer that is laid out in another order computes everything."""
    decoder = Decoder(Layer(attends_first))
    seen = []
    decoder.layers[0].mlp.register_forward_hook(lambda _mlp, arguments, _output: seen.append(arguments[0].shape[-2]))
    x, read = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True), torch.tensor([1, 5])
    found = []
    for _ in range(2):
        decoder(x, read=read)[0, read].square().sum().backward()
        found.append([x.grad, decoder.layers[0].mlp.weight.grad])
        x.grad = decoder.layers[0].mlp.weight.grad = None
        skip_what_nobody_reads(decoder)
    assert seen == [6, 2 if attends_first else 6]
    torch.testing.assert_close(found[1], found[0])


def test_a_failed_pass_leaves_nothing_behind():
    decoder = Decoder(Layer(True))
    skip_what_nobody_reads(decoder)
    x = torch.randn(1, 6, 3)
    with pytest.raises(RuntimeError, match="out of DATA bounds"):
        decoder(x, read=torch.tensor([9]))
    assert decoder(x).shape == x.shape
    assert torch.equal(decoder(x), decoder(x, read=torch.arange(6)))


def test_a_model_without_such_a_layer_is_left_alone():
    skip_what_nobody_reads(make_model("gpt2"))
    other = Decoder(nn.Linear(3, 3))
    skip_what_nobody_reads(other)
    assert not other.layers[0]._forward_pre_hooks
