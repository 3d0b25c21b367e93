"""Real people's preferences: a reward model and DPO on the harmless half of Anthropic's HH data, against 'the longer one'.

    python benchmarks/hh.py                     about 20 minutes on two cores; prints the figures of the README
    python benchmarks/hh.py --only reward       takes every option of a recipe

The transcripts come from ../shared/data/preference/hh_harmless_test_a.jsonl.gz. A fifth of the prompts, by first turn of the
user, is held out.
"""

import gzip
import json
import re
from pathlib import Path

from align import Recipe
from align.artifact import Artifact
from align.records import write_jsonl

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/preference/hh_harmless_test_a.jsonl.gz"
DATA = Path("runs/hh/preferences.jsonl")


def turns(transcript: str) -> list[dict]:
    """A transcript as messages."""
    parts = re.split(r"\n\n(Human|Assistant): ?", transcript)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]


def convert() -> dict[str, int]:
    """Write the pairs as align's own rows and count those that cannot be one."""
    rows, counts = [], {"pairs": 0, "part before the last turn": 0, "empty or same reply": 0, "turns out of order": 0}
    for line in gzip.decompress(SOURCE.read_bytes()).decode().splitlines():
        pair = {side: turns(text) for side, text in json.loads(line).items()}
        (*prompt, chosen), (*other, rejected) = pair["chosen"], pair["rejected"]
        if prompt != other or chosen["role"] != "assistant" or rejected["role"] != "assistant":
            counts["part before the last turn"] += 1
        elif not chosen["content"] or not rejected["content"] or chosen == rejected or not all(m["content"] for m in prompt):
            counts["empty or same reply"] += 1
        elif [m["role"] for m in prompt] != [("user", "assistant")[i % 2] for i in range(len(prompt))]:
            counts["turns out of order"] += 1
        else:
            rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    counts["pairs"] = len(rows)
    DATA.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(DATA, rows)
    return counts


def recipe() -> Recipe:
    """One epoch each, LoRA of rank 16 on all linear layers."""
    chain = Recipe("hh", base="embedded")
    shared = {"holdout": 0.2, "epochs": 1.0, "batch_size": 8, "eval_every": 1000}
    chain.reward(preferences=DATA, learning_rate=3e-4, **shared)
    chain.dpo(preferences=DATA, learning_rate=5e-5, **shared)
    return chain


def report(run: Path) -> None:
    """The held-out figures with their baselines."""
    for name in ("reward", "dpo"):
        if not (run / name).is_dir():
            continue
        facts = Artifact.open(run / name).facts
        metrics = facts["metrics"]
        low, high = metrics["heldout_accuracy_interval"]
        print(
            f"{name}: right on {metrics['heldout_accuracy']:.1%} of {metrics['heldout_pairs']} held-out pairs "
            f"(95% interval {low:.1%} to {high:.1%}); 'the longer one' {metrics['longer_is_better_accuracy']:.1%}, "
            f"the shorter one {1 - metrics['longer_is_better_accuracy']:.1%}; mean margin {metrics['heldout_margin']:.3f}; "
            f"{facts['seconds']:.0f} s, peak {facts['peak_memory_gb']:.2f} GB"
        )


if __name__ == "__main__":
    from align.cli import recipe_main

    if not SOURCE.is_file():
        raise SystemExit(f"the HH data is not here: {SOURCE}")
    print(convert())
    code = recipe_main(recipe(), None)
    report(Path("runs/hh"))
    raise SystemExit(code)
