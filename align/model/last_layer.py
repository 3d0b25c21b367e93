"""The feed-forward block of the last layer, computed only where somebody reads what comes of it.

Nothing after it looks at another token. A reward model reads one hidden state a completion, SFT and DPO those that predict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def skip_what_nobody_reads(model: PreTrainedModel) -> None:
    """Have the last layer's `mlp` leave out all places of a row but those in the keyword `read` that a forward pass is given.

    Elsewhere it gives 0, and hidden states there mean nothing. The keyword comes with the attention's, which are given again where a
    layer is computed again in the backward pass. A model without such a layer computes everything, as all do without the keyword.
    """
    layer = getattr(model.get_decoder(), "layers", [None])[-1]
    if not all(isinstance(getattr(layer, name, None), torch.nn.Module) for name in ("self_attn", "mlp")):
        return
    now: dict[str, Any] = {}  # from the layer's attention to the end of its mlp

    def begin(*_: Any) -> None:
        now.clear()

    def attend(_attention: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        now["read"] = keywords.get("read")

    def narrow(_mlp: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if now.get("read") is None:
            return arguments
        (x,) = arguments
        now["shape"] = x.shape
        return (x.index_select(-2, now["read"]),)

    def widen(_mlp: Any, _arguments: Any, output: Tensor) -> Tensor:
        read, shape = now.pop("read", None), now.pop("shape", None)
        return output if read is None else output.new_zeros(shape).index_copy(-2, read, output)

    layer.register_forward_pre_hook(begin)
    layer.self_attn.register_forward_pre_hook(attend, with_kwargs=True)
    layer.mlp.register_forward_pre_hook(narrow)
    layer.mlp.register_forward_hook(widen)
