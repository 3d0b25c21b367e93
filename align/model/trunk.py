"""One frozen base in memory; everything trained is an adapter or a head on it. A role is a list of adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from align.errors import AlignError
from align.model import attention
from align.model.forward import hidden_states
from align.model.gated import keep_products, make_products_again
from align.model.last_layer import skip_what_nobody_reads
from align.model.lora import is_plain, run_in_base_precision
from align.model.norm import run_frozen_norms
from align.model.packing import Example, make_row
from align.settings import Lora


@dataclass(frozen=True)
class Role:
    """The adapters that are summed onto the base, and the head that reads the result (none: the output layer)."""

    adapters: tuple[str, ...] = ()
    head: str | None = None


class Head(nn.Module):
    """One number from a hidden state, in float32. `offset` is subtracted: the mean score of the demonstrations."""

    def __init__(self, hidden: int, scale: float = 1.0):
        """Start from N(0, scale / sqrt(hidden + 1)) (Huang et al. 2024, arXiv 2403.17031, detail 11)."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden) * scale / math.sqrt(hidden + 1))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """Shape (n, hidden) to (n,), float32."""
        return hidden.float() @ self.weight - self.offset

    def save(self, path: Path) -> None:
        """Write weight and offset as safetensors."""
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path) -> Head:
        """The head written by `save`."""
        tensors = load_file(path)
        head = cls(len(tensors["weight"]))
        head.load_state_dict(tensors)
        return head


def peft_config(lora: Lora) -> LoraConfig:
    """Our settings of an adapter as peft's."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        use_dora=lora.dora,
        use_rslora=lora.rslora,
    )


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Write one adapter of a model in peft's own form."""
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    if name != "default":  # which alone peft writes into the folder itself
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes in it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def _load_nf4(path: str | Path, revision: str | None, device: str) -> PreTrainedModel:
    """A base whose linear layers are in 4-bit NormalFloat, doubly quantised (QLoRA, arXiv 2305.14314), computed in the native type."""
    compute = native_dtype(torch.device(device))
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=compute,
        revision=revision,
        use_safetensors=True,
        trust_remote_code=False,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        ),
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 packs a layer anew in its first forward without gradients, and from then on gives none to what is below
            module.support_avx512bf16_for_cpu = False
    return model


class Trunk:
    """A base model with switchable adapters and heads."""

    def __init__(self, model: PreTrainedModel):
        """Take a causal language model, freeze it, and find out whether it can run packed rows."""
        self.model = model.eval().requires_grad_(False)
        self.peft: PeftModel | None = None
        self.heads = nn.ModuleDict()
        self.layers: list[LoraLayer] = []
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.dropout = False  # of the adapters, while they are trained
        self.autocast = False  # matrix products in bfloat16 on float32 weights, for full fine-tuning
        self.own_attention = model.config._attn_implementation
        skip_what_nobody_reads(self.model)
        self.packs = True
        self.packs = self._packing_is_exact()
        run_frozen_norms(self.model)
        make_products_again(self.model)

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype | Literal["nf4"] | None = None, revision: str | None = None, device: str = "cpu"
    ) -> Trunk:
        """Load a base from a folder or a hub id. Safetensors only, no remote code; bfloat16 where that is native."""
        if dtype == "nf4":
            return cls(_load_nf4(path, revision, device))
        dtype = dtype or native_dtype(torch.device(device))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, revision=revision, use_safetensors=True, trust_remote_code=False)
        return cls(model.to(device))

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.output_layer.weight.device

    @property
    def decoder(self) -> nn.Module:
        """The model without its output layer."""
        return self.model.get_decoder()

    @property
    def output_layer(self) -> nn.Module:
        """The layer that turns hidden states into logits."""
        return self.model.get_output_embeddings()

    @property
    def hidden_size(self) -> int:
        """Numbers in a hidden state."""
        return self.model.config.get_text_config().hidden_size

    def _packing_is_exact(self) -> bool:
        """Compare a packed row with the model's own plain forward on a probe; False sends the model the padded way."""
        vocabulary = self.model.config.get_text_config().vocab_size
        window = getattr(self.model.config.get_text_config(), "sliding_window", None) or 0
        ids = [(7919 * i) % vocabulary for i in range(24 + (8 if 16 < window < 64 else 0))]
        prompt, completions = tuple(ids[:9]), (tuple(ids[9:16]), tuple(ids[16:]))
        other = Example(0, (*prompt[:3], *ids[5:11]), (tuple(ids[2:6]),))  # whose first tokens the other prompt's are too
        row = make_row([other, Example(1, prompt, completions)]).to(self.device)
        own_attention = self.model.config._attn_implementation
        with torch.no_grad():
            plain = [
                self.model(torch.tensor([prompt + c], device=self.device), use_cache=False).logits[0, len(prompt) - 1 : -1]
                for c in completions
            ]
            try:
                self.model.set_attn_implementation(attention.NAME)
                packed = self.output_layer(hidden_states(self, row, row.predicted_at[row.owner > 0])).float()
            except (TypeError, ValueError, RuntimeError, AttributeError):
                packed = torch.full_like(torch.cat(plain).float(), float("nan"))
        expected = torch.cat(plain).float()
        exact = self._near(packed, expected)
        if not exact:
            self.model.set_attn_implementation(own_attention)
            self.packs = False
            with torch.no_grad():
                padded = self.output_layer(hidden_states(self, row, row.predicted_at[row.owner > 0])).float()
            if not self._near(padded, expected):
                raise AlignError(
                    f"{type(self.model).__name__}: its logits are not its output layer times its last hidden state (they are scaled, "
                    "perhaps), so log-probabilities would be wrong. Choose another base."
                )
        return exact

    def _near(self, logits: Tensor, expected: Tensor) -> bool:
        logits = self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.05
        return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())

    # Adapters ---------------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, lora: Lora, seed: int) -> None:
        """Add a fresh adapter. B is 0, so the role's output does not change until it is trained."""
        torch.manual_seed(seed)
        config = peft_config(lora)
        try:
            with self._adding_adapter():
                if self.peft is None:
                    self.peft = get_peft_model(self.model, config, adapter_name=name)
                else:
                    self.peft.add_adapter(name, config)
        except ValueError as error:
            raise AlignError(
                f"{name.removesuffix('-new')}.lora.targets: {lora.targets!r} fits no layer of this model.\n  {error}"
            ) from None

    def load_adapter(self, name: str, folder: Path) -> None:
        """Add a trained adapter, frozen."""
        with self._adding_adapter():
            if self.peft is None:
                self.peft = PeftModel.from_pretrained(self.model, folder, adapter_name=name, is_trainable=False)
            else:
                self.peft.load_adapter(folder, adapter_name=name, is_trainable=False)

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write one adapter in peft's own form: folder/adapter_model.safetensors and adapter_config.json."""
        assert self.peft is not None
        save_adapter(self.peft, name, folder)

    def copy_adapter(self, source: str, target: str) -> None:
        """Give `target` the weights of `source`; both exist and have the same shape."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                if f".{target}." in name and "lora_" in name:
                    parameter.copy_(parameters[name.replace(f".{target}.", f".{source}.")])

    @contextmanager
    def _adding_adapter(self) -> Iterator[None]:
        """Peft turns gradients on and off for whole adapters when one is added; here nothing but the new one may change."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        training = [module for module in self.model.modules() if module.training]  # layers that compute activations again
        yield
        self.model.eval().requires_grad_(False)
        for module in training:
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in self.layers:
            run_in_base_precision(layer)

    @contextmanager
    def switched_to(self, role: Role) -> Iterator[None]:
        """Run with exactly this role's adapters. Run a role's forward and backward inside when checkpointing activations.

        peft's own switching turns gradients on and off for whole adapters; this sets two fields of each layer and nothing else.
        """
        known = set(self.peft.peft_config) if self.peft else set()
        if unknown := set(role.adapters) - known:
            raise KeyError(f"no adapter {sorted(unknown)}; there are {sorted(known)}")
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        for layer in self.layers:
            if layer.merged:
                raise RuntimeError("an adapter is merged into the base")
            layer._active_adapter, layer._disable_adapters = list(role.adapters), not role.adapters
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self.layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def rest_in(self, role: Role) -> None:
        """Make a role the one outside of every switch, so that activations computed again in a backward pass are its own."""
        for layer in self.layers:
            layer._active_adapter, layer._disable_adapters = list(role.adapters), not role.adapters

    @contextmanager
    def computing(self, role: Role) -> Iterator[None]:
        """Switched to the role, in mixed precision where all weights are trained, with dropout only where gradients are wanted."""
        self.set_dropout(self.dropout and torch.is_grad_enabled())
        with self.switched_to(role), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            yield

    def parameters_of(self, adapter: str | None = None, head: str | None = None) -> dict[str, nn.Parameter]:
        """The trainable parameters of an adapter and a head, by name; the whole model where adapter is None and head too."""
        if adapter is None and head is None:
            return dict(self.model.named_parameters())
        found = {}
        if adapter is not None:
            found = {n: p for n, p in self.model.named_parameters() if "lora_" in n and f".{adapter}." in f"{n}."}
        if head is not None:
            found[f"head.{head}"] = self.heads[head].weight
        return found

    def set_dropout(self, active: bool) -> None:
        """Turn the adapters' dropout on or off; the base's stays off."""
        for layer in self.layers:
            layer.lora_dropout.train(active)

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        keep_products(self.model)
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # this one flag only: its children, and with them every dropout, stay in eval

    # A copy that only samples -------------------------------------------------------------------------------------------

    def merged_copy(self) -> PreTrainedModel:
        """A plain model that shares every tensor with the base but the adapted layers' weights. Fill it with `merge_into`."""
        config = deepcopy(self.model.config)  # the attention is chosen in the config: the trunk keeps its own
        with torch.device("meta"):
            copy = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME if self.packs else self.own_attention)
        tensors = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers()]
        own = {_plain_name(name): tensor for name, tensor in tensors if "lora_" not in name}
        adapted = {_plain_name(n) for n, m in self.model.named_modules() if isinstance(m, LoraLayer)}
        for module_name, module in copy.named_modules():
            for name in [n for n, _ in module.named_parameters(recurse=False)]:
                full = f"{module_name}.{name}"
                tensor = own[full].detach()
                tensor = tensor.clone() if module_name in adapted and name == "weight" else tensor
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
            for name in [n for n, _ in module.named_buffers(recurse=False)]:
                module._buffers[name] = own[f"{module_name}.{name}"]
        copy.tie_weights()
        copy.generation_config = self.model.generation_config
        return copy.eval()

    def merge_into(self, copy: PreTrainedModel, role: Role) -> None:
        """Set the copy's adapted weights to W + sum of the role's B A, added in float32 and rounded once."""
        targets = dict(copy.named_modules())
        with torch.no_grad():
            for name, layer in self.model.named_modules():
                if isinstance(layer, LoraLayer):
                    weight = layer.get_base_layer().weight.to(torch.float32, copy=True)
                    for adapter in role.adapters:
                        if adapter in layer.lora_A:
                            weight.addmm_(layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, alpha=layer.scaling[adapter])
                    targets[_plain_name(name)].weight.copy_(weight)

    def can_merge(self) -> bool:
        """Whether the adapters are plain LoRA on plain linear layers: no DoRA, no 4-bit base."""
        tied = self.model.config.get_text_config().tie_word_embeddings and isinstance(self.output_layer, LoraLayer)
        return not tied and all(is_plain(layer) for layer in self.layers)


def _plain_name(name: str) -> str:
    """A parameter's or module's name as it was before peft wrapped its layer."""
    return name.replace(".base_layer", "")
