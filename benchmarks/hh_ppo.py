"""PPO on real people's preferences: against a reward model of one half of the HH data here, watched by one of the other half.

    python benchmarks/hh_ppo.py                     about half an hour on two cores; prints what the evaluations along the way saw
    python benchmarks/hh_ppo.py --plan              takes every option of a recipe

The policy starts as the embedded model itself. The watching reward model has the other half of the data, another seed, and the
weight 0. A tenth of the prompts is held out; `reward` is the first reward model's mean score on them.
"""

import gzip
import hashlib
import json
from pathlib import Path

from align import Recipe
from align.artifact import Artifact

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/preference/hh_harmless_test_a.jsonl.gz"
HALVES = [Path(f"runs/hh_ppo-data/{name}.jsonl") for name in ("one", "other")]


def halve() -> None:
    """Two files of the transcripts, by a hash of the first thing that a person says."""
    HALVES[0].parent.mkdir(parents=True, exist_ok=True)
    lines: tuple[list[str], list[str]] = ([], [])
    for line in gzip.decompress(SOURCE.read_bytes()).decode().splitlines(keepends=True):
        first = json.loads(line)["chosen"].split("\n\nAssistant:")[0]
        lines[hashlib.sha256(first.encode()).digest()[0] % 2].append(line)
    for path, half in zip(HALVES, lines, strict=True):
        path.write_text("".join(half))


def recipe() -> Recipe:
    """Two reward models, and a policy that is rewarded by the first."""
    chain = Recipe("hh_ppo", base="embedded")
    shared = {"holdout": 0.2, "batch_size": 8, "learning_rate": 3e-4}
    reward = chain.reward(preferences=HALVES[0], **shared)
    watching = chain.reward(name="watching", preferences=HALVES[1], seed=1, **shared)
    chain.ppo(
        reward={"reward": (reward, 1.0), "watching": (watching, 0.0)},
        prompts=HALVES[0],
        iterations=20,
        learning_rate=1e-3,
        kl_coef=0.02,
        holdout=0.1,
        eval_every=4,
        max_kl=15.0,
    )
    return chain


def report(run: Path) -> None:
    """What each evaluation saw, and how far the reward rose in standard deviations of the policy's scores as it began."""
    if not (run / "ppo").is_dir():
        return
    facts = Artifact.open(run / "ppo").facts
    first = json.loads((run / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    points = facts["metrics"]["evaluations"]
    print("| round | reward | watching | KL, nats | tokens | ended |\n|--:|--:|--:|--:|--:|--:|")
    for point in points:
        scores = f"{point['score/reward']:+.2f} | {point['score/watching']:+.2f}"
        print(f"| {point['round']} | {scores} | {point['kl']:.1f} | {point['length']:.0f} | {point['ended']:.0%} |")
    best = next(point for point in points if point["round"] == facts["metrics"]["best_round"])
    rise = (best["score/reward"] - points[0]["score/reward"]) / first["raw_score_spread"]
    print(f"round {best['round']} was kept: {rise:+.2f} standard deviations ({first['raw_score_spread']:.2f}) at {best['kl']:.1f} nats")


if __name__ == "__main__":
    from align.cli import recipe_main

    if not SOURCE.is_file():
        raise SystemExit(f"the HH data is not here: {SOURCE}")
    halve()
    code = recipe_main(recipe(), None)
    report(Path("runs/hh_ppo"))
    raise SystemExit(code)
