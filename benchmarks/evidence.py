"""RLHF, RLAIF, DPO and the best of eight from one SFT policy, and a PPO run that is over-optimised on purpose: one report.

    python benchmarks/evidence.py            three hours on two cores without bfloat16 (two of them measured); runs/evidence/report.html
    python benchmarks/evidence.py --plan     takes every option of a recipe

`people` is the reward model that the policies learn from and are compared by; `unseen`, of another seed, is one that none of them
was trained against. `overoptimised` learns without a KL penalty from `biased`, a reward model of only those pairs in which the
better answer is also the longer one, while `people`, of all pairs, tells what it is worth and which round is best.
Writes runs/evidence/overoptimised.png.

Run so far of `overoptimised`: seven rounds. From round 0 to 6 held-out prompts went from -0.16 to 0.69 by `biased` and from -0.12 to 0.45
by `people`, answers from 28 to 46 tokens, and the share that ends its turn from 94 to 77 percent, at a KL of 15 nats. Against a reward
model of all pairs 18 rounds went to 42 nats and turned nothing down; against one of 60 pairs 12 rounds went to 28 nats and neither.
"""

import json
from pathlib import Path

from align import Recipe
from align.artifact import Artifact

PPO = {"prompts": "datasets/prompts.jsonl", "iterations": 9, "learning_rate": 1e-3, "kl_coef": 0.03}
OVER = {
    "prompts": "datasets/prompts.jsonl",
    "iterations": 32,
    "learning_rate": 2e-3,
    "kl_coef": 0.0,
    "holdout": 0.2,
    "eval_every": 4,
    "choose_by": "people",
}


def where_the_longer_is_better(preferences: str) -> Path:
    """The pairs whose chosen answer has more words, as a file."""
    lines = Path(preferences).read_text().splitlines()
    rows = [(line, *(len(json.loads(line)[side][0]["content"].split()) for side in ("chosen", "rejected"))) for line in lines]
    file = Path("runs/longer.jsonl")
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{line}\n" for line, chosen, rejected in rows if chosen > rejected))
    return file


def recipe() -> Recipe:
    """Everything stands on the same SFT policy."""
    chain = Recipe("evidence", base="embedded")
    preferences = "datasets/preferences.jsonl"
    sft = chain.sft(data="datasets/chat.jsonl")
    people = chain.reward(policy=sft, preferences=preferences, name="people")
    unseen = chain.reward(policy=sft, preferences=preferences, name="unseen", seed=1)
    rlhf = chain.ppo(policy=sft, reward_model=people, name="rlhf", **PPO)
    biased = chain.reward(policy=sft, preferences=where_the_longer_is_better(preferences), name="biased")
    chain.ppo(policy=sft, reward={"biased": (biased, 1.0), "people": (people, 0.0)}, name="overoptimised", **OVER)
    dpo = chain.dpo(policy=sft, preferences=preferences, learning_rate=2e-4)
    completions = chain.sample(policy=sft, prompts="datasets/prompts.jsonl", max_new_tokens=64)
    labels = chain.label(completions=completions, judge=people, gold=preferences)
    of_labels = chain.reward(policy=sft, preferences=labels, name="of_labels")
    rlaif = chain.ppo(policy=sft, reward_model=of_labels, name="rlaif", **PPO)
    chain.evaluate(
        policies=[sft, dpo, rlhf, rlaif],
        prompts="datasets/heldout_prompts.jsonl",
        reward_model=people,
        held_out=[unseen],
        best_of=8,
        samples_per_prompt=1,
    )
    return chain


def draw(artifact: Artifact, path: Path) -> None:
    """What the over-optimised run saw on held-out prompts: both reward models' scores against the square root of KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = artifact.facts["metrics"]
    points, best = metrics["evaluations"], metrics["best_round"]
    figure, (scores, ends) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    places = [max(point["kl"], 0.0) ** 0.5 for point in points]
    for name, label in (("biased", "trained against"), ("people", "not trained against")):
        scores.plot(places, [point[f"score/{name}"] for point in points], marker="o", label=f"reward model that it was {label}")
    ends.plot(places, [point["ended"] for point in points], marker="o", color="tab:red", label="answers that end")
    chosen = next(i for i, point in enumerate(points) if point["round"] == best)
    for axis, what in ((scores, "mean score on held-out prompts"), (ends, "share of answers that end their turn")):
        axis.axvline(places[chosen], color="grey", linestyle=":", label=f"round {best}, kept")
        axis.set(xlabel="square root of the KL to the SFT policy, nats a completion", ylabel=what)
        axis.legend()
        axis.grid(alpha=0.3)
    ends.set_ylim(0, 1.02)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from align.cli import recipe_main

    run = Path("runs/evidence")
    code = recipe_main(recipe(), None)
    if (run / "overoptimised").is_dir():
        draw(Artifact.open(run / "overoptimised"), run / "overoptimised.png")
    raise SystemExit(code)
