"""Learning that needs no judge: answers of one sentence that ends in a full stop and has fewer than 20 words, on SmolLM2.

    python benchmarks/verifiable.py            PPO and RLOO, three seeds each, on two cores: 23 minutes with bfloat16, 50 without
    python benchmarks/verifiable.py --estimators gae --seeds 0 --out runs/verifiable

The reward is 1 for such an answer and 0 for any other. Success is its share on the held-out prompts, one sampled answer each,
measured before the first round and after the last; between them the rounds' own answers show it. Writes curves.png and results.json.

The settings are those of somebody in a hurry: short answers, little KL penalty, a high learning rate.
"""

import argparse
import json
from pathlib import Path

import torch

from align import Recipe
from align.artifact import Artifact
from align.model.trunk import native_dtype

FULL_STOPS = (".", "!", "?")


def one_short_sentence(prompt, completion, row):
    """1 for a single sentence of fewer than 20 words that ends in a full stop, else 0."""
    text = completion.strip()
    inner = sum(text[:-1].count(mark + " ") for mark in FULL_STOPS) + text.count("\n")
    return float(text.endswith(".") and inner == 0 and 0 < len(text.split()) < 20)


def run(estimator: str, seed: int, out: Path, settings: dict) -> dict:
    """Train from the embedded model itself and return what its evaluations saw."""
    # A round of PPO takes about 17 s on two cores with bfloat16 and 50 without; one that trains no value, two thirds of that.
    rounds = 14 if native_dtype(torch.device("cpu")) is torch.bfloat16 else 10 if estimator == "gae" else 11
    settings = {"iterations": rounds, "eval_every": rounds, **settings}
    recipe = Recipe(f"verifiable-{estimator}-{seed}", base="embedded", seed=seed)
    recipe.ppo(prompts="datasets/prompts.jsonl", reward=one_short_sentence, estimator=estimator, **settings)
    folder = recipe.run(out / f"{estimator}-{seed}")
    facts = Artifact.open(folder / "ppo").facts
    points = facts["metrics"]["evaluations"]
    lines = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    seconds = {0: 0.0, **{line["step"]: line["seconds"] for line in lines}}
    seconds[lines[-1]["step"]] = facts["seconds"]
    return {
        "estimator": estimator,
        "seed": seed,
        "seconds": facts["seconds"],
        "rounds": [{name: line[name] for name in ("step", "seconds", "score", "kl", "length")} for line in lines],
        "points": [{**point, "seconds": seconds[point["round"]]} for point in points],
    }


def draw(results: list[dict], path: Path) -> None:
    """Success against minutes, a line a seed: of each round's answers, and large, of the held-out prompts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = {"gae": "tab:blue", "rloo": "tab:orange", "grpo": "tab:green", "reinforce++": "tab:red", "dr_grpo": "tab:purple"}
    named: set[str] = set()
    for result in results:
        colour, name = colours[result["estimator"]], {"gae": "PPO"}.get(result["estimator"], result["estimator"].upper())
        label = name if name not in named else None  # a line a seed, a name an estimator
        named.add(name)
        rounds, points = result["rounds"], result["points"]
        axes.plot([r["seconds"] / 60 for r in rounds], [100 * r["score"] for r in rounds], color=colour, linewidth=1, alpha=0.6)
        held_out = [100 * point["score/one_short_sentence"] for point in points]
        axes.plot([p["seconds"] / 60 for p in points], held_out, color=colour, marker="o", linestyle="", label=label)
    axes.axhline(90, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="minutes", ylabel="answers of one short sentence (%)", ylim=(0, 102))
    axes.set_title("a round's own answers (lines), held-out prompts (dots)", fontsize="medium")
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimators", nargs="+", default=["gae", "rloo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/verifiable"))
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="another setting of PPO; repeatable")
    options = parser.parse_args()
    settings = {
        "max_new_tokens": 32,
        "temperature": 1.0,
        "learning_rate": 2e-3,
        "value_learning_rate": 3e-4,
        "kl_coef": 0.01,
        "missing_eos_score": 0.0,
        "holdout": 0.2,
        "max_heldout": 48,
    }
    from align.overrides import parse_value

    settings |= {name: parse_value(value) for name, value in (text.split("=", 1) for text in options.set)}
    results = [run(estimator, seed, options.out, settings) for seed in options.seeds for estimator in options.estimators]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "curves.png")
    for result in results:
        shares = ", ".join(f"{100 * point['score/one_short_sentence']:.0f}%" for point in result["points"])
        kl = result["points"][-1]["kl"]
        print(f"{result['estimator']} seed {result['seed']}: {shares} in {result['seconds'] / 60:.1f} min, KL {kl:.1f} nats at the end")


if __name__ == "__main__":
    main()
