"""SFT, the reward model and DPO here and in TRL: examples a second and peak memory, on SmolLM2 with the same pairs of people.

    python benchmarks/trl_training.py                    about 50 minutes on two cores
    python benchmarks/trl_training.py --only dpo --repeat 1 --json

Every measurement is a process of its own, and the ways take turns: one epoch over the same pairs of the HH data (of at most 512
tokens), optimizer steps of 8, rank-16 adapters on every linear layer, one learning rate. TRL runs with its defaults (float32
weights, autocast where the processor has bfloat16, checkpointing), and with the flags that should suit it best here: the base in the
processor's own type, no checkpointing, the reference computed once, packing where it has it. Times leave out loading and tokenising,
and count the reference's pass. That losses and gradients are equal is tested in tests/parity.

Of the machine: how much of its measured rate of matrix products the arithmetic amounts to that no way of training these adapters can
leave out: for each token once (of what all prompts begin with, once a step), forward and backward through the frozen weights (4
operations a weight, 6 with DPO's reference), and the same through the output layer for each token that is predicted. Writes
runs/trl_training.png.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from process import measured

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/preference/hh_harmless_test_a.jsonl.gz"
STEP, LONGEST, RATE, KINDS = 8, 512, 1e-4, ("sft", "reward", "dpo")


def rows(kind: str, count: int) -> list[dict]:
    """The first pairs that are short enough, as both sides read them."""
    from align.base import find_base, local_model
    from align.chat import Chat
    from align.data.mix import load_data
    from align.data.sources import Source

    chat, found = Chat.load(local_model(find_base("embedded"))), []
    for record in load_data((Source(str(SOURCE)),), "preference", "benchmark").records():
        pair = {name: record[name] for name in ("prompt", "chosen", "rejected")}
        sizes = [len(chat.prompt_ids([*pair["prompt"], *pair[side]])) for side in ("chosen", "rejected")]
        if max(sizes) <= LONGEST:
            found.append({"prompt": pair["prompt"], "completion": pair["chosen"]} if kind == "sft" else pair)
        if len(found) == count:
            break
    return found


def useful_operations(kind: str, data: list[dict]) -> float:
    """What training on these rows takes at least, in floating point operations."""
    from align.base import find_base, local_model
    from align.chat import Chat
    from align.memory import shape_of
    from align.model.packing import shared_start

    base = find_base("embedded")
    chat, shape = Chat.load(local_model(base)), shape_of(base)
    assert shape is not None
    prompts = [tuple(chat.prompt_ids(row["prompt"])) for row in data]
    tokens = -len(shared_start(prompts)) * (len(data) - math.ceil(len(data) / STEP))  # once a step
    predicted = 0
    for row, ids in zip(data, prompts, strict=True):
        prompt = len(ids)
        sides = [
            len(chat.prompt_ids([*row["prompt"], *row[side]])) - prompt for side in ("completion", "chosen", "rejected") if side in row
        ]
        tokens += prompt + sum(sides)
        predicted += 0 if kind == "reward" else sum(sides)
    each = 6 if kind == "dpo" else 4
    return each * (tokens * sum(n * m for _, n, m in shape.linear) + predicted * shape.hidden * shape.vocabulary)


def products_rate() -> float:
    """Floating point operations a second of a matrix product of the model's size, in the processor's own type."""
    import torch

    from align.model.trunk import native_dtype

    dtype = native_dtype(torch.device("cpu"))
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    best = float("inf")
    for _ in range(30):
        begun = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        best = min(best, (time.perf_counter() - begun) / 10)
    return 2 * 1024 * 576 * 1536 / best


def ours(kind: str, count: int, folder: Path, quantize: str | None = None) -> dict:
    """The stage, with what it takes before and during training timed."""
    import importlib

    from align import Recipe
    from align.artifact import Artifact

    stage, spent = importlib.import_module(f"align.stages.{kind}"), []

    def timed(function):
        def call(*arguments):
            begun = time.perf_counter()
            found = function(*arguments)
            spent.append(time.perf_counter() - begun)
            return found

        return call

    for name in ("reference_logps", "train"):
        if hasattr(stage, name):
            setattr(stage, name, timed(getattr(stage, name)))
    data, taken = folder / "rows.jsonl", rows(kind, count)
    data.write_text("".join(json.dumps(row) + "\n" for row in taken))
    before, recipe = products_rate(), Recipe("benchmark", base="embedded", quantize=quantize)
    settings: dict[str, Any] = {"batch_size": STEP, "holdout": 0.0, "learning_rate": RATE, "epochs": 1.0, "save_every": 10_000}
    if kind == "sft":
        recipe.sft(data=data, train_on="last", **settings)  # as TRL learns of a prompt and its completion
    else:
        getattr(recipe, kind)(preferences=data, **settings)
    run = recipe.run(folder / "run")
    share = useful_operations(kind, taken) / sum(spent) / max(before, products_rate())
    return {"seconds": sum(spent), "gb": Artifact.open(run / kind).facts["peak_memory_gb"], "of_the_machine": share}


def theirs(kind: str, count: int, folder: Path, best: bool) -> dict:
    """TRL's trainer for the same."""
    import torch
    import trl
    from peft import LoraConfig
    from transformers import AutoTokenizer

    import datasets
    from align.base import find_base, local_model
    from align.model.trunk import native_dtype
    from align.run import peak_memory_gb

    location, native = local_model(find_base("embedded")), native_dtype(torch.device("cpu"))
    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO"}[kind]
    tuned: dict = {"gradient_checkpointing": False, "bf16": False, "model_init_kwargs": {"dtype": str(native).removeprefix("torch.")}}
    of_kind: dict[str, dict] = {"sft": {"packing": True, "max_length": 1024}, "dpo": {"precompute_ref_log_probs": True}}
    tuned |= of_kind.get(kind, {})
    plain = {} if native == torch.bfloat16 else {"bf16": False}  # autocast to a type it lacks takes a hundred times as long
    batch = 1 if best and kind == "sft" else 4  # a packed row is many examples
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        num_train_epochs=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **(tuned if best else plain),
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=location,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows(kind, count)),
        processing_class=AutoTokenizer.from_pretrained(location),
        peft_config=LoraConfig(
            task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
        ),
    )
    begun = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - begun, "gb": peak_memory_gb()}


WAYS: dict[str, Callable[..., dict]] = {
    "align": ours,
    "align, base in four bits": partial(ours, quantize="nf4"),
    "TRL, defaults": partial(theirs, best=False),
    "TRL, tuned": partial(theirs, best=True),
}


def main() -> None:
    """Measure, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=KINDS, help="one kind of training; repeatable")
    parser.add_argument("--examples", type=int, default=32, help="pairs in the epoch")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, way = options.measure
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(WAYS[way](kind, options.examples, Path(folder))))
        return
    found: dict[str, dict[str, list[dict]]] = {kind: {way: [] for way in WAYS} for kind in options.only or KINDS}
    for _ in range(options.repeat):
        for kind, ways in found.items():
            for way, lines in ways.items():
                lines.append(measured(__file__, f"{kind}, {way}", f"--examples={options.examples}", "--measure", kind, way))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    Path("runs").mkdir(exist_ok=True)
    draw(found, options.examples, Path("runs/trl_training.png"))
    print("| | examples a second | align is | peak memory | align's is | of the machine |\n|---|--:|--:|--:|--:|--:|")
    for kind, ways in found.items():
        seconds, memory = middle(ways, "seconds"), middle(ways, "gb")
        for way, lines in ways.items():
            faster, less = seconds[way] / seconds["align"], memory["align"] / memory[way]
            rate = f"{options.examples / seconds[way]:.2f} | {faster:.1f} times | {memory[way]:.1f} GB | {less:.2f} of it"
            shares = [line["of_the_machine"] for line in lines if "of_the_machine" in line]
            print(f"| {kind}: {way} | {rate} | {f'{statistics.median(shares):.0%}' if shares else ''} |")


def middle(ways: dict[str, list[dict]], what: str) -> dict[str, float]:
    """The median of each way's measurements."""
    return {way: statistics.median(line[what] for line in lines) for way, lines in ways.items()}


def draw(found: dict[str, dict[str, list[dict]]], examples: int, path: Path) -> None:
    """Examples a second and peak memory, a bar for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    wide = 0.8 / len(WAYS)
    for number, way in enumerate(WAYS):
        places = [place + wide * number for place in range(len(found))]
        axes[0].bar(places, [examples / middle(ways, "seconds")[way] for ways in found.values()], wide, label=way)
        axes[1].bar(places, [middle(ways, "gb")[way] for ways in found.values()], wide)
    for axis, title in zip(axes, ("examples a second", "peak memory, GB"), strict=True):
        axis.set_xticks([place + wide * (len(WAYS) - 1) / 2 for place in range(len(found))], [kind.upper() for kind in found])
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if not SOURCE.is_file():
        raise SystemExit(f"the HH data is not here: {SOURCE}")
    main()
