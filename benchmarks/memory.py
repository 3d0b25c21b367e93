"""Peak memory of each stage of the quickstart recipe beside its estimate.

    python benchmarks/memory.py        about 3 minutes on two cores with bfloat16, 15 without

Every stage runs in a process of its own, at one row budget that all of them fill.
"""

import runpy
import subprocess
import sys
from pathlib import Path

from align.artifact import Artifact
from align.memory import estimates
from align.plan import make_plan

RUN = Path("runs/memory")
STAGES = ("sft", "reward", "ppo")
SHORT = [
    "sft.epochs=1",
    "sft.batch_size=48",
    "reward.epochs=0.3",
    "ppo.iterations=2",
    "ppo.minibatches=1",
    "sft.row_tokens=1024",
    "reward.row_tokens=1024",
    "ppo.row_tokens=1024",
]

if __name__ == "__main__":
    recipe = runpy.run_path("recipes/quickstart.py")["recipe"]
    for override in SHORT:
        recipe.override(override)
    options = [f"--set={override}" for override in SHORT]
    for stage in STAGES:
        subprocess.run(
            [sys.executable, "recipes/quickstart.py", f"--out={RUN}", f"--only={stage}", f"--from={stage}", *options], check=True
        )
    expected = estimates(make_plan(recipe, RUN), None)  # now that the base is on this machine, whose shape it takes
    peaks = {stage: Artifact.open(RUN / stage).facts["peak_memory_gb"] for stage in STAGES}
    for stage, peak in peaks.items():
        about = expected[stage] / 1e9
        print(
            f"{stage}: peak resident memory {peak:.2f} GB, {peak / peaks['sft']:.2f} times SFT's; "
            f"estimated {about:.2f} GB, {about / peak - 1:+.0%}"
        )
