"""How much memory a stage will hold at most, from the base's shape and the stage's settings, before anything is loaded.

Of a processor's memory: on a machine with a GPU nothing is estimated. Imports no torch.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, pstdev

from rich.markup import escape

from align.base import Base, converted_folder
from align.errors import AlignError
from align.plan import Planned
from align.progress import say
from align.settings import EvaluateSettings, Lora, Optimiser, PPOSettings, SampleSettings, Training

PROCESS = 0.45e9  # Python with torch, transformers, peft and datasets imported
TRAINED = 16  # bytes of a trained number: itself, its gradient and AdamW's two means, all float32
SIDE_BY_SIDE = 128  # sequences that are decoded at one time (align.model.generate.SEQUENCES)
ROOM = 1e9  # bytes of their keys and values at most, or as many as the weights have (align.model.generate.ROOM)
MARGIN = 1.25  # an estimate may be this far off
REGROWN = 1.6  # resident memory of keys and values, in what they hold at last: their room is made anew as they grow
SEEN = 128  # keys that a token of a training row sees, about; weights of many more are not kept (align.model.attention.KEPT)
CHARACTERS = 4  # of a row of data, its names and brackets included, to a token of a chat, about
GROWN = 1.25  # resident memory of a training step's activations, in what its graph holds
HOLES = {4: 470, 2: 1900}  # bytes of a number -> tokens whose activations would fill the holes between what is held


@dataclass(frozen=True)
class Shape:
    """What of a base decides its memory: widths in numbers, and the linear layers of all blocks by their last name."""

    layers: int
    heads: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    parameters: int
    linear: tuple[tuple[str, int, int], ...]  # name, numbers in, numbers out

    def adapter(self, lora: Lora) -> int:
        """Numbers in an adapter."""
        mine = [(n, m) for name, n, m in self.linear if isinstance(lora.targets, str) or name in lora.targets]
        return sum(lora.rank * (n + m) + (m if lora.dora else 0) for n, m in mine)

    def activations(self, ranks: int, itemsize: int) -> float:
        """Bytes that a training step holds for each token of its row.

        Its graph keeps, a layer, both norms' inputs and outputs, queries, keys, values, the weights of attention and what it makes of
        them, what the gated product is made of, and each adapter's middle: counted by hooks on the saved tensors (SmolLM2: 33 kB
        a layer in float32, half of that in bfloat16).
        """
        kept = 4 * self.hidden + 2 * self.queries + self.heads * SEEN + 2 * self.intermediate + 2 * self.keys + ranks
        return self.layers * itemsize * kept


def shape_of(base: Base) -> Shape | None:
    """The shape of a base in the usual layout; none where it isn't on this machine yet or is laid out in another way."""
    folder = Path(base.location)
    if base.kind == "gguf":
        folder = converted_folder(base)
        if not folder.is_dir():
            return None
    if base.kind == "hub":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(base.location, revision=base.revision, local_files_only=True))
        except (LocalEntryNotFoundError, OSError):
            return None
    try:
        config = json.loads((folder / "config.json").read_text())
        config = {**config, **config.get("text_config", {})}
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        tensors = _tensors(folder)
        return Shape(
            config["num_hidden_layers"],
            heads,
            config["hidden_size"],
            config["intermediate_size"],
            heads * size,
            config.get("num_key_value_heads", heads) * size,
            config["vocab_size"],
            sum(math.prod(shape) for _, shape in tensors),
            tuple((name.split(".")[-2], s[1], s[0]) for name, s in tensors if len(s) == 2 and any(p.isdigit() for p in name.split("."))),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tensors(folder: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of a folder's weights, from the files' headers."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found += [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
    return found


def estimates(plans: Sequence[Planned], dtype: str | None) -> dict[str, float]:
    """Peak resident memory of stages in bytes, by name; stages of which nothing is known are left out.

    Args:
        plans: a whole recipe's, in its order.
        dtype: of the recipe; none for what the processor computes in.
    """
    shape = shape_of(plans[0].base) if plans and not _has_gpu() else None
    if shape is None:
        return {}
    stacks: dict[str, dict[str, Lora]] = {}  # stage -> the adapters that its result is stacked of, each by the stage that made it
    found = {}
    for planned in plans:
        name, settings = planned.stage.name, planned.stage.settings
        parents = [stacks.get(parent["name"], {}) if parent else {} for parent in planned.parents.values()]
        own = getattr(settings, "lora", None)
        stacks[name] = {**(parents[0] if parents else {}), **({name: own} if own else {})}
        peak = _peak(shape, planned, list(stacks[name].values()), dtype)
        if peak is not None:
            below = {maker: lora for stack in parents for maker, lora in stack.items()}
            found[name] = PROCESS + peak + 4 * sum(map(shape.adapter, below.values()))
    return found


def _peak(shape: Shape, planned: Planned, stack: Sequence[Lora], dtype: str | None) -> float | None:
    """Bytes of a stage's weights and of what it does with them; none for kinds of which nothing is known."""
    settings = planned.stage.settings
    itemsize = 2 if _computes_in_bfloat16(dtype) else 4
    if isinstance(settings, Training) and settings.lora is None:
        return _weights(shape, "float32", 4) + _training(shape, planned, settings, stack, 4)
    weights = _weights(shape, dtype, itemsize)
    if isinstance(settings, Training):
        return weights + _training(shape, planned, settings, stack, itemsize)
    if isinstance(settings, PPOSettings):
        return weights + _ppo(shape, planned, settings, stack, itemsize)
    if isinstance(settings, EvaluateSettings):
        each, limit = max(settings.samples_per_prompt, settings.best_of or 0), math.inf
    elif isinstance(settings, SampleSettings):
        each, limit = settings.completions_per_prompt, settings.max_prompt_tokens
    else:
        return None
    prompts = min(len(planned.data["prompts"]), settings.max_prompts or math.inf)
    longest = max(_prompts(planned, limit), default=0) + settings.max_new_tokens
    return weights + _copy(shape, itemsize) + _decoding(shape, each * prompts, longest, itemsize)


def _weights(shape: Shape, dtype: str | None, itemsize: int) -> float:
    """Bytes of the base. In four bits: half a byte and a scale for every 64 of a linear layer's numbers."""
    linear = sum(n * m for _, n, m in shape.linear)
    return (shape.parameters - linear) * itemsize + linear * 0.52 if dtype == "nf4" else shape.parameters * itemsize


def _training(shape: Shape, planned: Planned, settings: Training, stack: Sequence[Lora], itemsize: int) -> float:
    """What is trained, and the activations of a row."""
    trained = shape.adapter(settings.lora) if settings.lora else shape.parameters
    return trained * TRAINED + _row(shape, settings, _tokens_of_a_step(planned, settings), stack, itemsize)


def _tokens_of_a_step(planned: Planned, settings: Training) -> float:
    """Tokens of an optimizer step, two standard deviations above the mean: one in forty holds more."""
    sizes = [min(length / CHARACTERS, settings.max_length) for length in planned.lengths] or [settings.max_length]
    return settings.batch_size * mean(sizes) + 2 * math.sqrt(settings.batch_size) * pstdev(sizes)


def _prompts(planned: Planned, limit: float) -> list[float]:
    """Tokens of the first prompts; those beyond the limit are left out."""
    return [size for length in planned.lengths if (size := length / CHARACTERS) <= limit]


def _ppo(shape: Shape, planned: Planned, settings: PPOSettings, stack: Sequence[Lora], itemsize: int) -> float:
    """The policy's adapter and the value's, the copy that samples, and what takes more: a row's activations, or what is being decoded."""
    trained = shape.adapter(stack[-1]) * (2 if settings.has_value else 1)
    sequences = settings.prompts_per_iteration * settings.completions_per_prompt
    prompts = _prompts(planned, settings.max_prompt_tokens) or [0]
    each = settings.max_new_tokens + mean(prompts) / settings.completions_per_prompt
    row = _row(shape, settings, sequences * each / settings.minibatches, stack, itemsize)
    copy = _copy(shape, itemsize) if settings.merged_sampler and settings.sampler == "local" else 0
    return trained * TRAINED + copy + max(row, _decoding(shape, sequences, max(prompts) + settings.max_new_tokens, itemsize))


def _row(shape: Shape, settings: Optimiser, most: float, stack: Sequence[Lora], itemsize: int) -> float:
    """Bytes of a row's activations; `most` are the tokens of a whole step, where that is less than a row.

    Resident memory grows by more, for glibc's allocator leaves a hole behind nearly every temporary. The holes grow for some thirty
    steps, as no two steps are of one size, to what they are for small steps and large ones alike (SmolLM2 in bfloat16: 0.9 GB).
    """
    ranks = sum(lora.rank for lora in stack) * len(shape.linear) // shape.layers
    held = shape.activations(ranks, itemsize)
    if settings.gradient_checkpointing:  # one layer's at a time, and what goes into each
        held = held / shape.layers + shape.layers * shape.hidden * itemsize
    return (GROWN * min(settings.row_tokens, most) + HOLES[itemsize]) * held


def _copy(shape: Shape, itemsize: int) -> float:
    """Bytes of the weights that a merged copy has of its own."""
    return sum(n * m for _, n, m in shape.linear) * itemsize


def _decoding(shape: Shape, sequences: float, longest: float, itemsize: int) -> float:
    """Keys and values, and the logits of a step with what a draw makes of them. Every sequence has room for the longest."""
    going = min(sequences, SIDE_BY_SIDE)
    cache = going * longest * shape.layers * 2 * shape.keys * itemsize
    room = max(ROOM, shape.parameters * itemsize)
    return REGROWN * min(cache, room) + going * shape.vocabulary * 16


def _computes_in_bfloat16(dtype: str | None) -> bool:
    """Whether activations are bfloat16: where the recipe says so, and else where the processor does."""
    if dtype in ("bfloat16", "float32"):
        return dtype == "bfloat16"
    with suppress(OSError):
        return bool(re.search(r"\b(avx512_bf16|amx_bf16|amx_tile)\b", Path("/proc/cpuinfo").read_text()))
    return False


def _has_gpu() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def available_memory() -> float | None:
    """Bytes that a process may take before the system must kill one: free memory and swap, within a container's limit (Linux)."""
    with suppress(OSError, KeyError):
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = sum(float(rows[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
        return min(free, _left_of_limit(Path("/sys/fs/cgroup")))
    return None


def _left_of_limit(group: Path) -> float:
    """What is left of the container's allowance; files that are merely cached can go."""
    with suppress(OSError, ValueError, KeyError):
        kept = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()) + float(kept["inactive_file"])
    return float("inf")


def give_back_memory() -> None:
    """Give freed memory back to the system (glibc). Training does so now and then: holes grow for some thirty steps."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def fit_memory(plans: Sequence[Planned], dtype: str | None) -> list[Planned]:
    """Before anything is loaded: have stages that would not fit compute activations again, where nobody decided about that.

    Warns of a stage that may need more memory than there is even so.

    Returns:
        The plans, with `gradient_checkpointing` where it is needed. It changes no bit of an outcome, so identities stay.

    Raises:
        AlignError: for a stage that needs by far too much: what it needs, what there is, and the settings that need less.
    """
    todo = [planned.stage.name for planned in plans if planned.state in ("run", "resume")]
    there = available_memory() if todo else None
    if there is None:
        return list(plans)
    plain = estimates(plans, dtype)
    short = [name for name in todo if plain.get(name, 0) > there]
    if not short:
        return list(plans)
    fitted = [_checkpointed(planned) if planned.stage.name in short else planned for planned in plans]
    needed = estimates(fitted, dtype)
    for planned in fitted:
        name = planned.stage.name
        if name in short and needed[name] <= there:
            say(
                f"[yellow]{name}: would need about {plain[name] / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are free. "
                f"With gradient_checkpointing it needs {needed[name] / 1e9:.1f} GB, and up to 1.5 times the time.[/]"
            )
        elif name in short:
            problem = _too_much(planned, needed[name], there, dtype)
            if needed[name] > MARGIN * there:
                raise AlignError(problem)
            say(f"[yellow]{escape(problem)}[/]")
    return fitted


def _checkpointed(planned: Planned) -> Planned:
    """A plan whose activations are computed again, unless its stage keeps none or somebody decided otherwise."""
    settings = planned.stage.settings
    if getattr(settings, "gradient_checkpointing", False) is not None:
        return planned
    return replace(planned, stage=replace(planned.stage, settings=settings.model_copy(update={"gradient_checkpointing": True})))


def _too_much(planned: Planned, needed: float, there: float, dtype: str | None) -> str:
    name, settings = planned.stage.name, planned.stage.settings
    rows = getattr(settings, "row_tokens", 0)
    cures = [f"--set {name}.row_tokens={rows // 2}"] if rows > 256 else []
    cures += [f"--set {name}.gradient_checkpointing=true"] if getattr(settings, "gradient_checkpointing", None) is False else []
    cures += ["--set recipe.quantize=nf4"] if dtype != "nf4" and getattr(settings, "lora", True) else []
    return (
        f"{name}: needs about {needed / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are free. "
        f"Close other programs, or have it need less: {', '.join(cures) or 'take a smaller base'}."
    )
