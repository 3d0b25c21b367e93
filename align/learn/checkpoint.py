"""Training state in one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from align.plan import CHECKPOINT


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: dict[str, Parameter],
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Any],
    kept: dict[str, Tensor] | None = None,
) -> None:
    """Write trained parameters, their optimizer state, the random state, `extra` (JSON) and tensors to keep after `step` steps."""
    tensors: dict[str, Tensor] = {"random": torch.get_rng_state(), **{f"kept/{name}": tensor for name, tensor in (kept or {}).items()}}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    temporary = folder / f"{CHECKPOINT}.new"
    save_file(tensors, temporary, metadata={"step": str(step), "extra": json.dumps(extra)})
    os.replace(temporary, folder / CHECKPOINT)


def load_checkpoint(
    folder: Path, parameters: dict[str, Parameter], optimizer: torch.optim.Optimizer, kept: dict[str, Tensor] | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore what `save_checkpoint` wrote, in place.

    Returns:
        The step and `extra`; (0, {}) where there is no checkpoint.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return 0, {}
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
            state = {
                key: file.get_tensor(f"optimizer/{key}/{name}").to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer/{key}/{name}" in names
            }
            if state:
                optimizer.state[parameter] = state
        if kept is not None:
            kept |= {name.removeprefix("kept/"): file.get_tensor(name) for name in sorted(names) if name.startswith("kept/")}
        torch.set_rng_state(file.get_tensor("random"))
    return int(metadata["step"]), json.loads(metadata["extra"])
