"""PPO on real people's preferences: against a reward model of one half of the HH data here, watched by one of the other half.

    python benchmarks/hh_ppo.py                     20 minutes on two cores with bfloat16; prints what the evaluations along the way saw
    python benchmarks/hh_ppo.py --plan              takes every option of a recipe

The policy starts as the embedded model after SFT on the first half's chosen answers, which end where the model's own run on. The
watching reward model has the other half of the data, another seed, and the weight 0. Along the way a tenth of the prompts is held
out, and a completion that was cut scores `missing_eos_score`, -1. In the end both policies answer prompts of the other half, and only
answers that ended are scored.
"""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from align import Recipe
from align.artifact import Artifact

SOURCE = Path(__file__).resolve().parents[2] / "shared/data/preference/hh_harmless_test_a.jsonl.gz"
HALVES = [Path(f"runs/hh_ppo-data/{name}.jsonl") for name in ("one", "other")]
CHOSEN = HALVES[0].with_name("chosen.jsonl")


def halve() -> None:
    """Two files of the transcripts, by a hash of the first thing that a person says; and the chosen transcripts of the first."""
    HALVES[0].parent.mkdir(parents=True, exist_ok=True)
    lines: tuple[list[str], list[str]] = ([], [])
    for line in gzip.decompress(SOURCE.read_bytes()).decode().splitlines(keepends=True):
        first = json.loads(line)["chosen"].split("\n\nAssistant:")[0]
        lines[hashlib.sha256(first.encode()).digest()[0] % 2].append(line)
    for path, half in zip(HALVES, lines, strict=True):
        path.write_text("".join(half))
    CHOSEN.write_text("".join(json.dumps({"text": json.loads(line)["chosen"]}) + "\n" for line in lines[0]))


def recipe() -> Recipe:
    """Two reward models, and a policy that is rewarded by the first."""
    chain = Recipe("hh_ppo", base="embedded")
    short: dict[str, Any] = {"max_length": 256, "on_overlong": "drop", "batch_size": 8, "learning_rate": 3e-4}
    shared: dict[str, Any] = {"holdout": 0.2, "eval_every": 100, **short}
    sft = chain.sft(data=CHOSEN, train_on="last", epochs=1.0, **short)
    reward = chain.reward(policy=sft, preferences=HALVES[0], **shared)
    watching = chain.reward(name="watching", preferences=HALVES[1], seed=1, **shared)
    ppo = chain.ppo(
        policy=sft,
        reward={"reward": (reward, 1.0), "watching": (watching, 0.0)},
        prompts=HALVES[0],
        max_prompt_tokens=128,
        iterations=8,
        learning_rate=7e-4,
        holdout=0.1,
        max_heldout=32,
        eval_every=2,
        max_kl=15.0,
    )
    chain.evaluate(policies=[sft, ppo], prompts=HALVES[1], reward_model=reward, held_out=[watching], max_prompts=100)
    return chain


def report(run: Path) -> None:
    """What each evaluation along the way saw, and the rise in the end in standard deviations of the first policy's scores."""
    if not (run / "evaluate").is_dir():
        return
    points = Artifact.open(run / "ppo").facts["metrics"]["evaluations"]
    print("| round | reward | watching | KL, nats | tokens | ended |\n|--:|--:|--:|--:|--:|--:|")
    for point in points:
        scores = f"{point['score/reward']:+.2f} | {point['score/watching']:+.2f}"
        print(f"| {point['round']} | {scores} | {point['kl']:.1f} | {point['length']:.0f} | {point['ended']:.0%} |")
    before, after = Artifact.open(run / "evaluate").facts["metrics"]["policies"]
    for name, first, compared in (
        ("reward", before, after),
        ("watching", before["held_out"]["watching"], after["held_out"]["watching"]),
    ):
        low, high = (end / first["score_spread"] for end in compared["difference_interval"])
        print(
            f"{name}: {compared['difference'] / first['score_spread']:+.2f} standard deviations ({low:+.2f} to {high:+.2f}) on "
            f"{compared['compared']} prompts that both answered to the end, at {after['kl']:.1f} nats"
        )


if __name__ == "__main__":
    from align.cli import recipe_main

    if not SOURCE.is_file():
        raise SystemExit(f"the HH data is not here: {SOURCE}")
    halve()
    code = recipe_main(recipe(), None)
    report(Path("runs/hh_ppo"))
    raise SystemExit(code)
