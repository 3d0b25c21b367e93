"""Peak memory of each stage of the quickstart recipe, every stage in a process of its own, at one row budget that all fill.

python benchmarks/memory.py        about 3 minutes on two cores
"""

import subprocess
import sys
from pathlib import Path

from align.artifact import Artifact

RUN = Path("runs/memory")
SHORT = [
    "--set=sft.epochs=1",
    "--set=sft.batch_size=48",
    "--set=reward.epochs=0.3",
    "--set=ppo.iterations=2",
    "--set=sft.row_tokens=1024",
    "--set=reward.row_tokens=1024",
    "--set=ppo.row_tokens=1024",
]

if __name__ == "__main__":
    for stage in ("sft", "reward", "ppo"):
        subprocess.run([sys.executable, "recipes/quickstart.py", f"--out={RUN}", f"--only={stage}", f"--from={stage}", *SHORT], check=True)
    peaks = {stage: Artifact.open(RUN / stage).facts["peak_memory_gb"] for stage in ("sft", "reward", "ppo")}
    for stage, peak in peaks.items():
        print(f"{stage}: peak resident memory {peak:.2f} GB, {peak / peaks['sft']:.2f} times SFT's")
