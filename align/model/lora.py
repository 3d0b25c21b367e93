"""Running peft's LoRA layers in the base's own precision.

peft computes an adapter in float32: it converts each layer's input and output on the way, which on a processor costs more
than the adapter's products. Here the float32 weights are rounded to the base's type at use, as autocast would, and the
adapter's output is added by the same product that makes it. In a float32 base nothing is rounded.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


def runs_plainly(layer: LoraLayer) -> bool:
    """Whether the layer is plain LoRA on a plain linear layer: not DoRA, not a 4-bit base."""
    return isinstance(layer, LoraLinear) and type(layer.get_base_layer()) is nn.Linear and not any(layer.use_dora.values())


def run_in_base_precision(layer: LoraLayer) -> None:
    """Replace a layer's forward, where it is plain, by one that gives the same numbers up to the base's rounding."""
    if runs_plainly(layer):
        layer.forward = lambda x: _forward(layer, x)  # type: ignore[method-assign]
    else:
        layer.__dict__.pop("forward", None)  # an adapter of another kind came on top


def _forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """W x + sum over active adapters of scaling * B A dropout(x). Shape (..., in) to (..., out)."""
    base = layer.get_base_layer()
    output = linear(x, base.weight, base.bias)
    if layer._disable_adapters:
        return output
    shape, output = output.shape, output.flatten(0, -2)
    for name in layer._active_adapter:
        if name in layer.lora_A:
            narrow = linear(layer.lora_dropout[name](x), layer.lora_A[name].weight.to(output.dtype)).flatten(0, -2)
            output = torch.addmm(output, narrow * layer.scaling[name], layer.lora_B[name].weight.to(output.dtype).T)
    return output.view(shape)
