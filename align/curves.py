"""A picture of a stage's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

SHOWN = {  # stage kind -> one panel each: (title, metrics)
    "sft": (("loss", ("loss", "heldout_loss")), ("gradient norm", ("grad_norm",))),
    "reward": (("loss", ("loss", "heldout_loss")), ("accuracy", ("accuracy", "heldout_accuracy"))),
    "dpo": (
        ("loss", ("loss", "heldout_loss")),
        ("accuracy", ("accuracy", "heldout_accuracy")),
        ("log-ratio to the reference, times beta", ("chosen_reward", "rejected_reward")),
    ),
    "trl": (("loss", ("loss",)), ("reward", ("reward", "rewards/margins")), ("gradient norm", ("grad_norm",))),
    "ppo": (
        ("score", ("score",)),
        ("KL to the reference, nats per completion", ("kl",)),
        ("length, tokens", ("length",)),
        ("share", ("ended", "repetition", "clip_share")),
    ),
}


def draw(kind: str, metrics: Path, target: Path) -> None:
    """Draw a stage's curves as a PNG; nothing for a stage without any."""
    if kind not in SHOWN or not metrics.is_file():
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = SHOWN[kind]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("round" if kind == "ppo" else "step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
