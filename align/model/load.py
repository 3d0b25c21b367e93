"""From artifacts to a trunk with their adapters and heads on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import Parameter

from align.artifact import Artifact
from align.base import Base, loading_explained, local_model
from align.chat import Chat
from align.errors import AlignError
from align.model.forward import forward, forward_scores
from align.model.generate import Completion, sample, suit_to_few_tokens
from align.model.packing import Example, make_row
from align.model.trunk import Head, Role, Trunk, native_dtype
from align.progress import say

if TYPE_CHECKING:
    from align.run import Job

ADAPTER, MODEL, HEAD, PROBES = "adapter", "model", "head.safetensors", "probes.json"


def root_identity(base: Base, artifact: Artifact | None) -> str:
    """The identity of the weights that a policy's adapters stand on: the base's, or a fully fine-tuned ancestor's."""
    first = artifact.chain()[0] if artifact else None
    return first.identity if first and first.facts["model"]["form"] == "full" else base.identity


def weights_below(base: Base, artifact: Artifact | None) -> tuple[str, str | None]:
    """Where the weights are that an artifact's adapters stand on, a folder or a hub id, and the revision of the latter."""
    first = artifact.chain()[0] if artifact else None
    location = str(first.folder / MODEL) if first and first.facts["model"]["form"] == "full" else local_model(base)
    return location, base.revision if location == base.location else None


def adapter_folders(artifact: Artifact | None) -> list[Path]:
    """The folders of the adapters that a policy is stacked of, first to last."""
    return [each.folder / ADAPTER for each in (artifact.chain() if artifact else ()) if each.facts["model"]["form"] != "full"]


def default_device() -> str:
    """Where models are loaded: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_trunk(base: Base, artifact: Artifact | None, dtype: str | None = None) -> tuple[Trunk, Chat]:
    """Load the weights that an artifact stands on, without its adapters, in the processor's native type unless told."""
    location, revision = weights_below(base, artifact)
    with loading_explained(base.source):
        trunk = Trunk.load(location, dtype if dtype == "nf4" else dtype and getattr(torch, dtype), revision, default_device())
        chat = Chat.load(location, revision)
    if not trunk.packs:
        say("  note: this model's attention cannot run packed rows exactly, so rows are padded (slower, same results)")
    if artifact is not None:
        _check_template(artifact, chat)
    return trunk, chat


def _check_template(artifact: Artifact, chat: Chat) -> None:
    for what, found in (("chat template", chat.template_fingerprint), ("tokenizer", chat.tokenizer_fingerprint)):
        wanted = artifact.facts["model"][what.replace(" ", "_")]
        if wanted != found:
            raise AlignError(
                f"{artifact.folder}: made with {what} {wanted}, but the base now has {found}. Restore the base it was made on."
            )


def load_role(trunk: Trunk, artifact: Artifact | None) -> Role:
    """Put an artifact's adapters (its own and those it was trained on) and its head on the trunk, and check a reward model.

    Raises:
        AlignError: where a reward model does not give the scores recorded with it.
    """
    if artifact is None:
        return Role()
    names = []
    for layer in artifact.chain():
        if layer.facts["model"]["form"] != "full":
            name = f"{layer.name}-{layer.identity[:8]}"
            if trunk.peft is None or name not in trunk.peft.peft_config:
                trunk.load_adapter(name, layer.folder / ADAPTER)
            names.append(name)
    if artifact.kind != "reward_model":
        return Role(tuple(names))
    head = f"{artifact.name}-{artifact.identity[:8]}"
    trunk.heads[head] = Head.load(artifact.folder / HEAD).to(trunk.device).requires_grad_(False)
    role = Role(tuple(names), head)
    check_probes(trunk, role, artifact)
    return role


def own_model(trunk: Trunk, chat: Chat, form: str) -> dict[str, Any]:
    """The `model` part of artifact.json: what a later load needs to know and check."""
    return {
        "form": form,
        "dtype": str(trunk.model.dtype).removeprefix("torch."),
        "packed": trunk.packs,
        "tokenizer": chat.tokenizer_fingerprint,
        "chat_template": chat.template_fingerprint,
    }


def save_model(trunk: Trunk, chat: Chat, adapter: str | None, folder: Path) -> None:
    """Write the adapter, or the whole model with its tokenizer where there is none."""
    if adapter is not None:
        trunk.save_adapter(adapter, folder / ADAPTER)
    else:
        trunk.model.save_pretrained(folder / MODEL)
        chat.tokenizer.save_pretrained(folder / MODEL)


def save_probes(trunk: Trunk, role: Role, examples: list[Example], folder: Path) -> list[float]:
    """Record the scores of a few completions, to be checked on every load."""
    scores = probe_scores(trunk, role, examples)
    probes = [{"prompt": e.prompt, "completions": e.completions} for e in examples]
    (folder / PROBES).write_text(json.dumps({"scores": scores, "probes": probes}) + "\n")
    return scores


def probe_scores(trunk: Trunk, role: Role, examples: list[Example]) -> list[float]:
    """Scores of the examples' completions, one example a row so that no packing can move them."""
    with torch.no_grad():
        rows = [make_row([example]) for example in examples]
        return [score for row in rows for score in forward_scores(trunk, role, row).tolist()]


def check_probes(trunk: Trunk, role: Role, artifact: Artifact) -> float:
    """Compare a loaded reward model's probe scores with the recorded ones; returns the largest difference.

    Raises:
        AlignError: where they differ by more than rounding: 1e-3 in float32, half their spread in bfloat16.
    """
    recorded = json.loads((artifact.folder / PROBES).read_text())
    examples = [Example(i, tuple(p["prompt"]), tuple(map(tuple, p["completions"]))) for i, p in enumerate(recorded["probes"])]
    wanted = torch.tensor(recorded["scores"])
    difference = float((torch.tensor(probe_scores(trunk, role, examples)) - wanted).abs().max())
    exact = trunk.model.dtype == torch.float32 and artifact.facts["model"]["dtype"] == "float32"
    allowed = 1e-3 if exact else max(0.5 * float(wanted.std(unbiased=False)), 1e-3)
    if not difference <= allowed:
        raise AlignError(
            f"{artifact.folder}: the reward model scores its recorded probes up to {difference:.3g} off; {allowed:.3g} could be rounding. "
            "Its files, its parent or the libraries have changed; make it again: --from " + artifact.name
        )
    return difference


@dataclass(frozen=True)
class Trainee:
    """A trunk with what a stage trains on it."""

    trunk: Trunk
    chat: Chat
    before: Role  # what it starts from; the reference
    role: Role  # what is trained
    adapter: str | None  # none: all weights
    parameters: dict[str, Parameter]


def open_trainee(job: Job, wants_head: bool = False) -> Trainee:
    """Load a stage's policy, add a fresh adapter (and head) on top, and make exactly these trainable.

    With lora=None the whole model is trained: its adapters are merged first, and the weights are float32 with matrix
    products in bfloat16 where that is native.
    """
    parent, settings = job.parents["policy"], job.settings
    full = settings.lora is None
    trunk, chat = open_trunk(job.base, parent, "float32" if full else job.dtype)
    before = load_role(trunk, parent)
    if full and before.adapters:
        copy = trunk.merged_copy()
        trunk.merge_into(copy, before)
        trunk, before = Trunk(copy), Role()
    adapter = None if full else f"{job.name}-new"  # not the name of any part of a layer
    torch.manual_seed(settings.seed)
    if adapter is not None:
        trunk.add_adapter(adapter, settings.lora, settings.seed)
    if wants_head:
        trunk.heads[job.name] = Head(trunk.hidden_size, settings.value_scale).to(trunk.device)
    head = job.name if wants_head else None
    parameters = trunk.parameters_of(adapter)
    if wants_head:
        parameters = {**parameters, **trunk.parameters_of(head=head)}
        if full:
            parameters.pop("lm_head.weight", None)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    trunk.autocast = full and job.dtype != "float32" and native_dtype(trunk.device) == torch.bfloat16
    if settings.gradient_checkpointing:
        trunk.checkpoint_activations()
    role = Role(before.adapters if adapter is None else (*before.adapters, adapter), head)
    trunk.rest_in(role)
    return Trainee(trunk, chat, before, role, adapter, parameters)


def largest_change_at_start(trainee: Trainee, examples: list[Example]) -> float:
    """The largest change of a log-probability that a fresh adapter makes: 0 exactly, for B is 0. DoRA's norms are rounded.

    Raises:
        AlignError: where it is more.
    """
    row = make_row(examples)
    with torch.no_grad():
        after = forward(trainee.trunk, replace(trainee.role, head=None), row).logprobs
        before = forward(trainee.trunk, trainee.before, row).logprobs
    change = float((after - before).abs().max())
    dora = any(any(layer.use_dora.values()) for layer in trainee.trunk.layers)
    if not change <= (0.5 if dora else 0):
        raise AlignError(
            f"before the first step the trained model differs from its parent by {change:.3g} in a log-probability; expected 0."
        )
    return change


class Sampler:
    """Samples from a role: from a merged copy where that is allowed and possible, else through the adapters."""

    def __init__(self, trunk: Trunk, merged: bool = True):
        """Make the copy, which shares everything with the trunk but the adapted weights."""
        self.trunk = trunk
        self.copy = trunk.merged_copy() if merged and trunk.peft is not None and trunk.can_merge() else None
        if self.copy is not None:
            suit_to_few_tokens(self.copy)

    def sample(self, role: Role, prompts: Sequence[Sequence[int]], *arguments: Any, **keywords: Any) -> list[list[Completion]]:
        """See `align.model.generate.sample`. Rounding makes the copy's law differ a little; log-probabilities are recomputed."""
        if self.copy is not None:
            self.trunk.merge_into(self.copy, role)
            return sample(self.copy, prompts, *arguments, **keywords)
        training = [module for module in self.trunk.model.modules() if module.training]
        self.trunk.model.eval()  # a layer that computes its activations again would drop the cache
        try:
            with self.trunk.switched_to(Role(role.adapters)):
                return sample(self.trunk.model, prompts, *arguments, **keywords)
        finally:
            for module in training:
                module.training = True


T = TypeVar("T")


def each_policy(
    base: Base, policies: Sequence[Artifact | None], dtype: str | None, use: Callable[[int, Artifact | None, Trunk, Chat], T]
) -> list[T]:
    """Call `use` with each policy's number and the trunk it stands on; weights that neighbours share are loaded once.

    One trunk is held at a time, so `use` must keep none.
    """
    results: list[T] = []
    opened: tuple[Trunk, Chat] | None = None
    for number, policy in enumerate(policies):
        if number and root_identity(base, policy) != root_identity(base, policies[number - 1]):
            opened = None  # let the former weights go before the next are loaded
        opened = opened or open_trunk(base, policy, dtype)
        results.append(use(number, policy, *opened))
    return results
