"""A stack of adapters as one: what the sum of their products is, without rounding it into the base's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.errors import AlignError

A, B = ".lora_A.weight", ".lora_B.weight"
WEIGHTS = "adapter_model.safetensors"


def compose(folders: Sequence[Path]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapters in some folders of peft's form as one adapter that adds what they add together.

    sum_i s_i B_i A_i = [s_1 B_1 ... s_n B_n] [A_1; ...; A_n]: matrices side by side, so ranks add up and nothing is
    approximated. A layer that only some of them adapt has zeros in the others' place.

    Args:
        folders: each with adapter_config.json and adapter_model.safetensors, on the same base; at least one.

    Returns:
        The config, whose scale is 1, and float32 weights named as peft names them in a file.

    Raises:
        AlignError: where one is not plain LoRA, for which no such sum exists.
    """
    configs = plain_configs(folders)
    tensors = [load_file(folder / WEIGHTS) for folder in folders]
    names = sorted({name.removesuffix(A) for weights in tensors for name in weights if name.endswith(A)})
    composed: dict[str, Tensor] = {}
    for name in names:
        wide = next(weights for weights in tensors if name + A in weights)
        inputs, outputs = wide[name + A].shape[1], wide[name + B].shape[0]
        a, b = [], []
        for weights, config in zip(tensors, configs, strict=True):
            a.append(weights[name + A].float() if name + A in weights else torch.zeros(config.r, inputs))
            b.append(weights[name + B].float() * scale_of(config) if name + B in weights else torch.zeros(outputs, config.r))
        composed[name + A], composed[name + B] = torch.cat(a), torch.cat(b, dim=1)
    rank = sum(config.r for config in configs)
    targets = sorted({_without_prefix(name) for name in names})
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=targets, inference_mode=True), composed


def plain_configs(folders: Sequence[Path]) -> list[LoraConfig]:
    """The adapters' configs.

    Raises:
        AlignError: where one is not plain LoRA.
    """
    configs = [LoraConfig.from_pretrained(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.use_dora or config.bias != "none" or config.modules_to_save:
            kind = "DoRA" if config.use_dora else "LoRA with biases or whole layers"
            raise AlignError(f"{folder}: is {kind}, which cannot be added to other adapters exactly. Train it with lora.dora=false.")
    return configs


def scale_of(config: LoraConfig) -> float:
    """What an adapter's product is multiplied by: alpha / rank, or alpha / sqrt(rank) (2312.03732)."""
    return config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)


def save_composed(folders: Sequence[Path], target: Path) -> None:
    """Write the composition of some adapters in peft's own form."""
    config, weights = compose(folders)
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(target)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / WEIGHTS)


def _without_prefix(name: str) -> str:
    """A layer's own name, as target_modules has it: model.layers.0.self_attn.q_proj."""
    return name.removeprefix("base_model.model.")
