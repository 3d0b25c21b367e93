"""What the front door costs: rows read, recognised, converted, checked and cached, against `datasets.load_dataset` on the same file.

    python benchmarks/data.py                  a million rows of three formats, three times each, interleaved
    python benchmarks/data.py --rows 100000 --repeats 1 --json

Each measurement is a process of its own with an empty cache. Peak memory is the largest sum of anonymous memory over its
processes, sampled every 20 ms: mapped files are left out, for the system takes them back when it needs the room.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from process import medians

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on", "green", "hills", "people"]
FORMATS = ("alpaca", "messages", "preferences")
KINDS: dict[str, Any] = {"alpaca": "conversation", "messages": "conversation", "preferences": "preference"}


def sentence(count: int, pick: random.Random) -> str:
    return " ".join(pick.choices(WORDS, k=count))


def row(kind: str, number: int, pick: random.Random) -> dict:
    question, answer = f"{sentence(8, pick)} {number}?", sentence(20, pick)
    if kind == "alpaca":
        return {"instruction": question, "input": "" if number % 3 else sentence(5, pick), "output": answer}
    if kind == "messages":
        turns = [question, answer, sentence(6, pick), sentence(12, pick)][: 2 if number % 3 else 4]
        return {"id": number, "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}
    return {"prompt": question, "chosen": answer, "rejected": sentence(18, pick)}


def write(path: Path, kind: str, rows: int) -> None:
    pick = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            file.write(json.dumps(row(kind, number, pick)) + "\n")


class Peak(threading.Thread):
    """Samples the anonymous memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        """Look every 20 ms."""
        while True:
            total = 0
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for process in [str(os.getpid()), *children]:
                try:
                    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                    total += int(next(line for line in lines if line.startswith("Pss_Anon")).split()[1]) * 1024
                except (OSError, StopIteration):
                    continue
            self.bytes = max(self.bytes, total)
            time.sleep(0.02)


def measure(what: str, path: str, kind: str) -> None:
    """In a process of its own: prints seconds of the first and the second pass, and peak memory."""
    peak = Peak()
    cache = tempfile.mkdtemp()
    os.environ["ALIGN_CACHE"] = cache
    if what == "load_dataset":
        import datasets

        datasets.disable_progress_bars()

        def once() -> None:
            datasets.load_dataset("json", data_files=path, cache_dir=cache, split="train")

    else:
        from align.data.mix import load_data
        from align.data.sources import Source

        def once() -> None:
            assert len(load_data((Source(path),), KINDS[kind], "benchmark"))

    peak.start()
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"first": seconds[0], "second": seconds[1], "peak_mb": peak.bytes / 1e6}))


def run(what: str, path: Path, kind: str) -> dict:
    command = [sys.executable, __file__, "--measure", what, str(path), kind]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            large, small = Path(folder) / f"{kind}.jsonl", Path(folder) / f"{kind}-small.jsonl"
            write(large, kind, options.rows)
            write(small, kind, min(10_000, options.rows))
            found: dict[str, list[dict]] = {"load_dataset": [], "align": []}
            for _ in range(options.repeats):
                for what, runs in found.items():
                    runs.append(run(what, large, kind))
            usual = {what: medians(runs) for what, runs in found.items()}
            small_peak = run("align", small, kind)["peak_mb"]
            table.append({"format": kind, "rows": options.rows, **usual, "peak_mb_10k_rows": small_peak})
            large.unlink()
    if options.json:
        print(json.dumps(table, indent=1))
        return None
    print(
        "| format | load_dataset | align, first pass | ratio | second pass | peak memory | of 10,000 rows |\n|---|---|---|---|---|---|---|"
    )
    for line in table:
        theirs, ours = line["load_dataset"]["first"], line["align"]
        peaks = f"{ours['peak_mb']:.0f} MB | {line['peak_mb_10k_rows']:.0f} MB"
        first = f"{ours['first']:.2f} s, {line['rows'] / ours['first']:,.0f} rows/s | {ours['first'] / theirs:.2f}"
        print(f"| {line['format']} | {theirs:.2f} s | {first} | {ours['second']:.2f} s | {peaks} |")
    return None


if __name__ == "__main__":
    main()
