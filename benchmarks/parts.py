"""Where training's time goes: each operator's own time in SFT, the reward model and DPO here, by the part of the model it belongs to.

    python benchmarks/parts.py                   about 5 minutes on two cores with bfloat16; writes runs/parts.png
    python benchmarks/parts.py --only dpo

The stages are those of trl_training.py: HH pairs, SmolLM2, adapters of rank 16. An operator belongs to the part that called it; the
adapters' products are told from the base's by one side as narrow as their rank. `useful` is the share of that time
which the arithmetic of trl_training.py would take at the machine's measured rate of products.
"""

import argparse
import importlib
import json
import tempfile
from collections import Counter
from pathlib import Path

from process import measured
from trl_training import KINDS, SOURCE, ours, products_rate, rows, useful_operations

RANKS = (16, 32)  # of one adapter, and of two side by side
PARTS = ("the base's products", "the adapters", "the output layer", "attention", "everything else")
WHOLE = {"_FrozenHead": PARTS[2], "_RowAttention": PARTS[3], "_Adapted": PARTS[1]}


def part(event) -> str:
    """Which part of the model an operator belongs to: that of the function it was called by."""
    caller = event
    while caller is not None and caller.name.removesuffix("Backward") not in WHOLE:
        caller = caller.cpu_parent
    found = WHOLE[caller.name.removesuffix("Backward")] if caller is not None else PARTS[4]
    sizes = [size for shape in event.input_shapes or () if isinstance(shape, list) for size in shape]
    of_the_base = found == PARTS[1] and event.name == "aten::mm" and not any(size in RANKS for size in sizes)
    return PARTS[0] if of_the_base else found


def profiled(kind: str, count: int) -> dict:
    """Seconds of each part, and of the useful arithmetic at the rate of products."""
    from torch.profiler import ProfilerActivity, profile

    stage, spent = importlib.import_module(f"align.stages.{kind}"), Counter[str]()

    def watched(function):
        def call(*arguments):
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
                result = function(*arguments)
            for event in found.events():
                spent[part(event)] += event.self_cpu_time_total / 1e6
            return result

        return call

    for name in ("reference_logps", "train"):
        if hasattr(stage, name):
            setattr(stage, name, watched(getattr(stage, name)))
    with tempfile.TemporaryDirectory() as folder:
        ours(kind, count, Path(folder))
    return {"parts": {name: spent[name] for name in PARTS}, "useful": useful_operations(kind, rows(kind, count)) / products_rate()}


def main() -> None:
    """Profile each kind in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=KINDS, help="one kind of training; repeatable")
    parser.add_argument("--examples", type=int, default=32, help="pairs in the epoch")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(profiled(options.measure, options.examples)))
        return
    print(f"| | {' | '.join(PARTS)} | useful |\n|---|{'--:|' * (len(PARTS) + 1)}")
    found = {}
    for kind in options.only or KINDS:
        found[kind] = measured(__file__, kind, f"--examples={options.examples}", "--measure", kind)
        total = sum(found[kind]["parts"].values())
        shares = [*found[kind]["parts"].values(), found[kind]["useful"]]
        print(f"| {kind} | {' | '.join(f'{seconds / total:.0%}' for seconds in shares)} |", flush=True)
    Path("runs").mkdir(exist_ok=True)
    draw(found, Path("runs/parts.png"))


def draw(found: dict[str, dict], path: Path) -> None:
    """A bar for each kind, made of its parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 1 + 0.8 * len(found)), layout="constrained")
    before = [0.0] * len(found)
    for name in PARTS:
        shares = [100 * one["parts"][name] / sum(one["parts"].values()) for one in found.values()]
        axis.barh([kind.upper() for kind in found], shares, left=before, label=name)
        before = [a + b for a, b in zip(before, shares, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("percent of the time of training")
    axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if not SOURCE.is_file():
        raise SystemExit(f"the HH data is not here: {SOURCE}")
    main()
