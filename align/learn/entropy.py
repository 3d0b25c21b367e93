"""The policy's entropy at each predicted token with gradients, for an entropy bonus. Without it nobody pays for this."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from align.model.forward import PolicyOutputs, hidden_states
from align.model.output import CHUNK, all_logprobs, entropy, target_logprobs
from align.model.packing import Row
from align.model.trunk import Role, Trunk


def forward_with_entropy(trunk: Trunk, role: Role, row: Row, temperature: float) -> PolicyOutputs:
    """As `align.model.forward.forward`, with gradients through the entropy too: one more product with the output layer."""
    row = row.to(trunk.device)
    with trunk.computing(role):
        hidden = hidden_states(trunk, row, row.predicted_at)
        logprobs, _ = target_logprobs(trunk, hidden, row.targets, temperature)
        parts = [checkpoint(_entropy, trunk, part, temperature, use_reentrant=False) for part in hidden.split(CHUNK)]
        return PolicyOutputs(logprobs, torch.cat(parts))


def _entropy(trunk: Trunk, hidden: Tensor, temperature: float) -> Tensor:
    """At each hidden state; logits are not kept but computed again in the backward pass."""
    return entropy(all_logprobs(trunk, hidden, temperature))
