"""Running peft's LoRA layers in the base's own precision, all active adapters of a layer at once.

peft computes adapters one by one and in float32: it converts each layer's input and output on the way, which on a processor
costs more than the adapters' products. Here their matrices are laid side by side, so that a layer with any number of adapters
takes two narrow products more than the base, added by the product that makes them. The float32 weights are rounded to the
base's type at use, as autocast would; in a float32 base nothing is rounded. A weight in four bits is written out for each product.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


def is_plain(layer: LoraLayer) -> bool:
    """Whether the layer is plain LoRA on a plain linear layer: not DoRA, not a 4-bit base."""
    return isinstance(layer, LoraLinear) and type(layer.get_base_layer()) is nn.Linear and not any(layer.use_dora.values())


def in_four_bits(layer: LoraLayer) -> bool:
    """Whether the layer is plain LoRA on a linear layer of bitsandbytes' four bits."""
    return type(layer.get_base_layer()).__name__ == "Linear4bit" and not any(layer.use_dora.values())


def run_in_base_precision(layer: LoraLayer) -> None:
    """Replace a layer's forward, where it is plain or in four bits, by one that gives the same numbers up to the base's rounding."""
    if is_plain(layer) or in_four_bits(layer):
        layer.forward = lambda x: _forward(layer, x)  # type: ignore[method-assign]
    else:
        layer.__dict__.pop("forward", None)  # an adapter of another kind came on top


def _forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """W x + sum over active adapters of scaling * B A dropout(x). Shape (..., in) to (..., out)."""
    base = layer.get_base_layer()
    names = [] if layer._disable_adapters else [name for name in layer._active_adapter if name in layer.lora_A]
    if any(layer.lora_dropout[name].training and isinstance(layer.lora_dropout[name], nn.Dropout) for name in names):
        return _with_dropout(layer, names, x)
    if not names:
        return base(x)
    matrices = [adapters[name].weight for adapters in (layer.lora_A, layer.lora_B) for name in names]
    return _Adapted.apply(x, base.weight, base.bias, [layer.scaling[name] for name in names], *matrices)


def _with_dropout(layer: LoraLayer, names: list[str], x: Tensor) -> Tensor:
    """The same sum, one adapter after the other: each drops other inputs."""
    base = layer.get_base_layer()
    output = base(x)
    for name in names:
        narrow = linear(layer.lora_dropout[name](x), layer.lora_A[name].weight.to(output.dtype))
        output = output + linear(narrow * layer.scaling[name], layer.lora_B[name].weight.to(output.dtype))
    return output


def _written_out(weight: Tensor) -> Tensor:
    """The weight in the type that products are made in. Shape (out, in)."""
    if getattr(weight, "quant_state", None) is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


class _Adapted(torch.autograd.Function):
    """W x + bias + the sum of s B A x over some adapters, with A (rank, in) and B (out, rank).

    Each result is made in place by the product that adds to it, and gradients only of what is trained. Forward, the adapters
    come one by one: a fresh one, whose B is 0, must change nothing to the bit. Backward, their matrices lie side by side.
    """

    @staticmethod
    def forward(ctx, x: Tensor, frozen: Tensor, bias: Tensor | None, scaling: list[float], *matrices: Tensor):
        weight = _written_out(frozen)
        a = [part.to(weight.dtype) for part in matrices[: len(scaling)]]
        b = [(part * scale).to(weight.dtype) for part, scale in zip(matrices[len(scaling) :], scaling, strict=True)]
        rows = x.reshape(-1, x.shape[-1])
        output = linear(rows, weight, bias)
        narrow = [rows @ part.T for part in a]
        for part, wide in zip(narrow, b, strict=True):
            output.addmm_(part, wide.T)
        ctx.save_for_backward(rows, torch.cat(a), torch.cat(b, dim=1), *narrow)
        ctx.frozen, ctx.scaling = frozen, scaling  # with what tells how its four bits are read, which a saved tensor need not bring
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, a, b, *narrow = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        d_narrow = flat @ b
        d_x = (flat @ _written_out(ctx.frozen)).addmm_(d_narrow, a).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        trained_a, trained_b = ctx.needs_input_grad[4 : 4 + len(narrow)], ctx.needs_input_grad[4 + len(narrow) :]
        parts = d_narrow.split([part.shape[1] for part in narrow], dim=1)
        d_a = [(part.T @ rows).float() if wanted else None for part, wanted in zip(parts, trained_a, strict=True)]
        d_b = [
            (flat.T @ part).float() * scale if wanted else None for part, scale, wanted in zip(narrow, ctx.scaling, trained_b, strict=True)
        ]
        return d_x, None, None, None, *d_a, *d_b
