"""A measurement in a process of its own: its peak memory is its own, and nothing of the one before is warm."""

import json
import statistics
import subprocess
import sys


def measured(file: str, what: str, *arguments: str) -> dict:
    """What a benchmark prints as JSON in its last line when it is run with these arguments; ends this one where that fails."""
    ended = subprocess.run([sys.executable, file, *arguments], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{what}: {ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def medians(lines: list[dict]) -> dict:
    """The median of each measure over measurements of the same."""
    return {name: statistics.median(line[name] for line in lines) for name in lines[0]}
