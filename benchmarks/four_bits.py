"""A base in four bits (nf4) beside one in the processor's own type: what SFT and the reward model lose, save and cost.

    python benchmarks/four_bits.py           about 15 minutes on two cores with bfloat16
    python benchmarks/four_bits.py --json

The quickstart's two stages on datasets/, each in a process of its own, the reward model on the policy of its own kind. Held-out losses
are compared conversation by conversation, the reward models' accuracy by its Wilson interval. Weights are those of the
linear layers, which are what is quantised; embeddings are not.
"""

import argparse
import json
import sys
from pathlib import Path

from process import measured

from align.confidence import mean_interval

KINDS = {"its own type": None, "four bits": "nf4"}
RUNS = Path("runs/four_bits")


def measure(kind: str, stage: str) -> dict:
    """Run a stage, and see what it weighs and, for SFT, what it says of each held-out conversation at its end."""
    import importlib

    from torch import nn

    from align import Recipe
    from align.artifact import Artifact
    from align.learn.optimise import evaluate

    recipe = Recipe("four_bits", base="embedded", quantize=KINDS[kind])
    policy = recipe.sft(data="datasets/chat.jsonl")
    if stage == "reward":
        recipe.reward(policy=policy, preferences="datasets/preferences.jsonl")
    found: dict = {}
    module = importlib.import_module(f"align.stages.{stage}")
    training = module.train

    def train(objective, parameters, rows, heldout, settings, *rest):
        layers = [m for name, m in objective.trainee.trunk.decoder.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
        found["weights_mb"] = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) / 1e6
        metrics = training(objective, parameters, rows, heldout, settings, *rest)
        if stage == "sft":
            found["losses"] = [evaluate(objective, [example], settings.row_tokens)["heldout_loss"] for example in heldout]
        return metrics

    setattr(module, "train", train)  # noqa: B010 -- a module of unknown name
    facts = Artifact.open(recipe.run(RUNS / (KINDS[kind] or "own")) / stage).facts
    return {**found, "metrics": facts["metrics"], "seconds": facts["seconds"], "gb": facts["peak_memory_gb"]}


def main() -> None:
    """Measure, a process at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    if RUNS.exists():
        sys.exit(f"{RUNS} is there already, and a stage that is done would not be measured: remove it first")
    found: dict = {kind: {} for kind in KINDS}
    for stage in ("sft", "reward"):
        for kind, stages in found.items():
            stages[stage] = measured(__file__, f"{kind}, {stage}", "--measure", kind, stage)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    columns = ["base", "weights", "SFT: held-out loss", "mean of conversations (95%)", "time", "memory"]
    columns += ["reward: right on held-out pairs (95%)", "time", "memory"]
    print(f"| {' | '.join(columns)} |")
    print(f"|---|{'--:|' * (len(columns) - 1)}")
    for kind, stages in found.items():
        sft, reward = stages["sft"], stages["reward"]
        low, high = reward["metrics"]["heldout_accuracy_interval"]
        right = f"{reward['metrics']['heldout_accuracy']:.1%} ({low:.1%} to {high:.1%})"
        least, most = mean_interval(sft["losses"]) or (float("nan"), float("nan"))
        loss = f"{sft['metrics']['heldout_loss']:.3f} | {sum(sft['losses']) / len(sft['losses']):.3f} ({least:.3f} to {most:.3f})"
        losses = f"{loss} | {sft['seconds']:.0f} s | {sft['gb']:.2f} GB"
        print(f"| {kind} | {sft['weights_mb']:.0f} MB | {losses} | {right} | {reward['seconds']:.0f} s | {reward['gb']:.2f} GB |")
    own, four = (found[kind]["sft"]["losses"] for kind in KINDS)
    more = [b - a for a, b in zip(own, four, strict=True)]
    low, high = mean_interval(more) or (float("nan"), float("nan"))
    print(
        f"four bits over its own type: {sum(more) / len(more):+.3f} nats a token of a conversation ({low:+.3f} to {high:+.3f}, {len(more)})"
    )


if __name__ == "__main__":
    main()
