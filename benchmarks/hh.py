"""Real people's preferences: a reward model and DPO on the harmless half of Anthropic's HH data, against 'the longer one'.

    python benchmarks/hh.py                     prints the figures of the README
    python benchmarks/hh.py --only reward       takes every option of a recipe

The transcripts are ../shared/data/preference/hh_harmless_test_a.jsonl.gz, as they are. A fifth of the prompts, by first turn
of the user, is held out.
"""

from pathlib import Path
from typing import Any

from align import Recipe
from align.artifact import Artifact

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/preference/hh_harmless_test_a.jsonl.gz"


def recipe() -> Recipe:
    """LoRA of rank 16 on all linear layers."""
    chain = Recipe("hh", base="embedded")
    shared: dict[str, Any] = {"holdout": 0.2, "batch_size": 8, "eval_every": 60}
    chain.reward(preferences=SOURCE, learning_rate=3e-4, epochs=2.0, **shared)
    chain.dpo(preferences=SOURCE, learning_rate=5e-5, **shared)
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
    code = recipe_main(recipe(), None)
    report(Path("runs/hh"))
    raise SystemExit(code)
