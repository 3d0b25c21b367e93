"""The gated product of a block (Shazeer 2020, arXiv 2002.05202), of which the backward pass finds less kept.

act(gate) and act(gate) * up are as wide as gate and up themselves, a seventh each of what a step would keep, and are made from those in
no time. So they are made again where the backward pass asks for them, by the same operations: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel


def make_products_again(model: PreTrainedModel) -> None:
    """Replace the forward of the model's gated blocks, where it is the usual one, by one that keeps gate and up alone."""
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")) and _is_usual(module, model.dtype):
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]


def keep_products(model: PreTrainedModel) -> None:
    """Undo that, where whole layers are computed again: what is kept within one of them does not last."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "func", None) is _forward:
            del module.forward


def _is_usual(block: Any, dtype: torch.dtype) -> bool:
    """Whether the block computes what is computed here, to the bit."""
    width = block.gate_proj.in_features
    probe = torch.linspace(-3, 5, 2 * width, dtype=dtype, device=block.gate_proj.weight.device).view(1, 2, width)
    with torch.no_grad():
        return torch.equal(block(probe), block.down_proj(block.act_fn(block.gate_proj(probe)) * block.up_proj(probe)))


def _forward(block: Any, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """down(act(gate x) * up x). Shape (..., hidden) to the same."""
    if not torch.is_grad_enabled():
        return plain(x)
    gate, up = block.gate_proj(x), block.up_proj(x)
    kept_gate, kept_up = gate.detach(), up.detach()
    made: dict[int, Callable[[], Tensor]] = {}  # where a tensor lies -> how it is made again

    def pack(tensor: Tensor) -> Any:
        again = made.get(tensor.data_ptr())
        return tensor if again is None else (again, tensor.shape)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0]().view(packed[1])

    with saved_tensors_hooks(pack, unpack):
        active = block.act_fn(gate)
        made[active.data_ptr()] = lambda: block.act_fn(kept_gate)
        product = active * up
        made[product.data_ptr()] = lambda: block.act_fn(kept_gate) * kept_up
        return block.down_proj(product)
