"""SFT's time per token and peak memory as the data and the row budget grow, for each base. Writes runs/growth.png.

    python benchmarks/growth.py                                      some 10 minutes on two cores with bfloat16, 40 without
    python benchmarks/growth.py --base embedded --base gemma.gguf    several bases; some 15 minutes
    python benchmarks/growth.py --only data --repeat 3 --json

Every measurement is a process of its own on made-up conversations of one length, a row to an optimizer step. Time per token is the
median step's, the first left out; memory is the process's peak, reading and tokenising included. Repeated, they take turns, and the
median of each counts.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from process import measured, medians

EXAMPLES, BUDGETS = (100, 1_000, 10_000, 100_000), (256, 512, 1024, 2048, 4096, 8192)
ROW, TOKENS, WORDS = 1024, 4096, 40  # the row budget while the data grow; tokens that a measurement trains on at least; words of an answer
STEPS = 4  # at least, of which the first is left out


def write_rows(path: Path, count: int) -> None:
    """Conversations of the same number of common words, no two alike."""
    words = sorted(set(Path("datasets/chat.jsonl").read_text().lower().split()) & set(Path("datasets/prompts.jsonl").read_text().split()))
    words, draw = [word for word in words if word.isalpha()], random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            row = {"prompt": f"Number {number:06d}: say some words.", "completion": " ".join(draw.choices(words, k=WORDS))}
            file.write(json.dumps(row) + "\n")


def measure(base: str, examples: int, row_tokens: int, folder: Path) -> dict:
    """One short SFT run."""
    from align import Recipe
    from align.artifact import Artifact
    from align.base import find_base, local_model
    from align.chat import Chat

    chat = Chat.load(local_model(find_base(base)))
    write_rows(folder / "rows.jsonl", examples)
    row = json.loads((folder / "rows.jsonl").open().readline())
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    each = len(chat.prompt_ids(turns))
    batch = max(1, min(row_tokens // (each + 8), examples // STEPS))  # 8 tokens to spare, for words differ
    steps = max(STEPS, TOKENS // row_tokens)
    recipe = Recipe("growth", base=base)
    recipe.sft(
        data=folder / "rows.jsonl",
        batch_size=batch,
        epochs=(steps + 0.5) * batch / examples,
        row_tokens=row_tokens,
        max_length=max(row_tokens, 256),
        holdout=0.0,
        save_every=10_000,
    )
    run = recipe.run(folder / "run")
    seconds = [json.loads(line)["seconds"] for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    taken = [after - before for before, after in itertools.pairwise(seconds)]
    return {
        "milliseconds_a_token": 1000 * statistics.median(taken) / (batch * each),
        "gb": Artifact.open(run / "sft").facts["peak_memory_gb"],
    }


def draw(found: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharey="row", squeeze=False)
    names = {"milliseconds_a_token": "milliseconds a token", "gb": "peak memory, GB"}
    for column, (kind, label) in enumerate((("examples", "examples in the data"), ("row_tokens", "tokens in a row"))):
        for place, (measure_of, name) in enumerate(names.items()):
            axis = axes[place][column]
            for base in dict.fromkeys(each["base"] for each in found):
                points = [each for each in found if each["base"] == base and each["grows"] == kind]
                axis.plot([p[kind] for p in points], [p[measure_of] for p in points], marker="o", label=Path(base).stem[:24])
            axis.set_xscale("log", base=10 if kind == "examples" else 2)
            axis.set(xlabel=label, ylabel=name)
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylim(bottom=0)  # of both columns, once all is drawn
    axes[0][0].legend(loc="lower left")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", help="a base; repeatable (default: embedded)")
    parser.add_argument("--only", choices=("data", "rows"), help="grow only the data, or only the rows")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print what is drawn as JSON")
    parser.add_argument("--measure", nargs=3, metavar=("BASE", "EXAMPLES", "ROW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        base, examples, row_tokens = options.measure
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(base, int(examples), int(row_tokens), Path(folder))))
        return
    wanted = [("examples", count, ROW) for count in EXAMPLES] if options.only != "rows" else []
    wanted += [("row_tokens", 1_000, budget) for budget in BUDGETS] if options.only != "data" else []
    points = [(base, *point) for base in options.base or ["embedded"] for point in wanted]
    turns: dict[tuple, list[dict]] = {point: [] for point in points}
    for point in points * options.repeat:
        base, _, examples, row_tokens = point
        cost = measured(__file__, "growth", "--measure", base, str(examples), str(row_tokens))
        turns[point].append(cost)
        told = f"{cost['milliseconds_a_token']:.2f} ms a token, {cost['gb']:.2f} GB"
        print(f"{base}, {examples:,} examples, rows of {row_tokens}: {told}", file=sys.stderr, flush=True)
    found = [
        {**dict(zip(("base", "grows", "examples", "row_tokens"), point, strict=True)), **medians(costs)} for point, costs in turns.items()
    ]
    Path("runs").mkdir(exist_ok=True)
    draw(found, Path("runs/growth.png"))
    print(json.dumps(found, indent=1) if options.json else "written to runs/growth.png")


if __name__ == "__main__":
    main()
