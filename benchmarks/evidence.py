"""RLHF, RLAIF, DPO and the best of eight from one SFT policy, and a PPO run that is over-optimised on purpose: one report.

    python benchmarks/evidence.py            an hour and a half on two cores without bfloat16; runs/evidence/report.html
    python benchmarks/evidence.py --plan     takes every option of a recipe

`people` is the reward model that the policies learn from and are compared by; `unseen`, of another seed, is one that none of them
was trained against. `overoptimised` learns without a KL penalty from `brevity`, which takes off a point for every ten words, as
somebody might who wants brief answers; `people` tells what it is worth and which round is best. Writes runs/evidence/overoptimised.png.

Other rewards were ruined less visibly. Without a KL penalty, 18 rounds against a reward model of all pairs went to 42 nats and turned
nothing down, 12 against one of 60 pairs to 28, and 11 against one of only those pairs in which the better answer is the longer one to
50: another reward model liked what the first did. A count of words of doubt rose from 0.1 to 5.5 an answer in 14 rounds (51 nats):
"I don't know. I don't know where. I don't know the number.", and repeated trigrams from 1 to 9 percent, which the reward model of
people's preferences, for whom doubt is often right, did not mind (-0.18 and -0.08).
"""

from pathlib import Path
from typing import Any

from align import Recipe
from align.artifact import Artifact

# As in quickstart.py, for six rounds.
PPO: dict[str, Any] = {"prompts": "datasets/prompts.jsonl", "iterations": 6, "learning_rate": 1.5e-3, "kl_coef": 0.02}
OVER: dict[str, Any] = {
    "prompts": "datasets/prompts.jsonl",
    "iterations": 14,
    "learning_rate": 2e-3,
    "kl_coef": 0.0,
    "holdout": 0.2,
    "eval_every": 2,
    "choose_by": "people",
}


def brevity(prompt, completion, row):
    """Minus one for every ten words."""
    return -len(completion.split()) / 10


def recipe() -> Recipe:
    """Everything stands on the same SFT policy."""
    chain = Recipe("evidence", base="embedded")
    preferences = "datasets/preferences.jsonl"
    sft = chain.sft(data="datasets/chat.jsonl")
    people = chain.reward(policy=sft, preferences=preferences, name="people")
    unseen = chain.reward(policy=sft, preferences=preferences, name="unseen", seed=1)
    rlhf = chain.ppo(policy=sft, reward_model=people, name="rlhf", **PPO)
    chain.ppo(policy=sft, reward={"brevity": (brevity, 1.0), "people": (people, 0.0)}, name="overoptimised", **OVER)
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
    """What the over-optimised run saw on held-out prompts, against the square root of KL: its reward, people's, and length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = artifact.facts["metrics"]
    points, best = metrics["evaluations"], metrics["best_round"]
    places = [max(point["kl"], 0.0) ** 0.5 for point in points]
    kept = next(place for place, point in zip(places, points, strict=True) if point["round"] == best)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, name, title in zip(
        axes,
        ("score/brevity", "score", "length"),
        (
            "brevity, its reward",
            "score by people's reward model",
            "tokens an answer",
        ),
        strict=True,
    ):
        axis.plot(places, [point[name] for point in points], marker="o")
        axis.axvline(kept, color="grey", linestyle=":", label=f"round {best}, kept")
        axis.set(xlabel="square root of the KL to the SFT policy, nats", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from align.cli import recipe_main

    run = Path("runs/evidence")
    code = recipe_main(recipe(), None)
    if (run / "overoptimised").is_dir():
        draw(Artifact.open(run / "overoptimised"), run / "overoptimised.png")
    raise SystemExit(code)
