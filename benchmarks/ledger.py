"""A ledger of 100,000 judgments: appends and look-ups per second, and the seconds until a labelling that is done knows it.

python benchmarks/ledger.py                 about half a minute
python benchmarks/ledger.py --judgments 10000 --folder /somewhere/else
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from align.judge.ask import judge_pairs
from align.judge.judgement import Pair, Reply
from align.judge.ledger import Ledger, key_of
from align.settings import JudgeSettings

BATCH = 1000
TEXT = "A reply of the usual length, so that hashing it costs what it costs. " * 8  # 550 characters


class Judge(SimpleNamespace):
    """Never asked: everything is in the ledger."""

    def ask(self, questions, on_reply):
        """End the measurement."""
        raise SystemExit(f"{len(questions)} questions were asked again")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--judgments", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ledger-", dir=options.folder))
    judge = Judge(name="local embedded", model="gguf:0123", template="0123456789abcdef")
    turn: list[Any] = [{"role": "assistant", "content": f"{side} {TEXT}"} for side in "ab"]
    pairs = [Pair([{"role": "user", "content": f"{n} {TEXT}"}], [turn[0]], [turn[1]]) for n in range(options.judgments // 2)]
    rest: list[Any] = [{"A": -0.5, "B": -1.0}, None, 300, 1, 0.05, 0.0001]
    replies = [Reply("first", "A", 0.5, *rest), Reply("second", "B", -0.5, *rest)]
    keys = [(key_of(question), reply) for pair in pairs for question, reply in zip(pair.questions(), replies, strict=True)]
    half = len(keys) // 2
    seconds: dict[str, float] = {}

    ledger = Ledger(folder / "judgements.sqlite")
    begun = time.perf_counter()
    for answered in keys[:half]:
        ledger.add(judge, [answered])
    seconds["append, one commit each"] = (time.perf_counter() - begun) / half
    begun = time.perf_counter()
    for start in range(half, len(keys), BATCH):
        ledger.add(judge, keys[start : start + BATCH])
    seconds[f"append, {BATCH} a commit"] = (time.perf_counter() - begun) / (len(keys) - half)
    ledger.close()

    ledger = Ledger(folder / "judgements.sqlite")
    begun = time.perf_counter()
    found = ledger.find(judge, [key for key, _ in keys])
    seconds["look-up"] = (time.perf_counter() - begun) / len(keys)
    assert found == [reply for _, reply in keys]
    ledger.close()

    begun = time.perf_counter()
    judged = judge_pairs(judge, pairs, Ledger(folder / "judgements.sqlite"), JudgeSettings())
    resume = time.perf_counter() - begun
    assert len(judged) == len(pairs)
    assert all(said is not None and said.verdict == "a" for said in judged)

    size = (folder / "judgements.sqlite").stat().st_size
    for what, each in seconds.items():
        print(f"{what}: {1 / each:,.0f} a second")
    print(f"labelling again, all {len(keys):,} found: {resume:.2f} s; {size / 1e6:.0f} MB, {size / len(keys):.0f} bytes a judgment")
    print(
        json.dumps({"judgments": len(keys), "per_second": {k: 1 / v for k, v in seconds.items()}, "resume_seconds": resume, "bytes": size})
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
