"""AI feedback: a judge is measured, then compares completions of the same prompt in both orders; what it is sure of becomes preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.judge.ask import with_principles
from align.judge.judgement import Judge, Judgement, Pair
from align.judge.labelling import judge_all, measure, summary, tell_result, unseen_by
from align.judge.ledger import Ledger
from align.judge.open import open_judge
from align.judge.pairs import draw_pairs, left_out, preferences
from align.plan import COMPLETIONS
from align.records import write_jsonl
from align.run import Job, Result
from align.settings import LabelSettings, MeasuredJudge

LEDGER = "judgements.sqlite"  # in the run's folder, for all its stages


def run(job: Job) -> Result:
    """Measure the judge, label, and write what was decided and what was not."""
    settings: LabelSettings = job.settings
    source = job.parents["completions"]
    assert source is not None
    rows = [json.loads(line) for line in (source.folder / COMPLETIONS).read_text(encoding="utf-8").splitlines()]
    pairs = draw_pairs(rows, settings.pairs_per_prompt, settings.seed)[: settings.max_pairs]
    if not pairs:
        raise AlignError(
            f"{job.name}: {source.folder} has no prompt with two different completions to compare. "
            f"Sample more of each: --set {source.name}.completions_per_prompt=4"
        )
    pairs = with_principles(pairs, settings)
    judgements, checks = ask_judges(job, open_judges(job), pairs)
    labelled = list(preferences(pairs, judgements, settings.hard_labels, settings.undecided == "keep"))
    write_jsonl(job.work / "preferences.jsonl", labelled)
    write_jsonl(job.work / "undecided.jsonl", left_out(pairs, judgements))
    metrics = summary(judgements, labelled)
    tell_result(job.name, metrics)
    return Result("preferences", {"form": "none"}, metrics, checks)


def ask_judges(job: Job, judges: list[Judge], pairs: list[Pair]) -> tuple[list[Judgement | None], dict[str, Any]]:
    """Measure a stage's judges, unless it wants no audit, and have them judge. Also what came of the audit, for the artifact."""
    settings: MeasuredJudge = job.settings
    run_folder = job.work.parent.parent
    ledger = Ledger(Path(settings.ledger) if settings.ledger else run_folder / LEDGER)
    checks: dict[str, Any] = {}
    try:
        if settings.audit_pairs and pairs:
            gold = job.data.get("gold")
            unseen = None if gold is None else unseen_by([each for each in job.parents.values() if each], gold)
            report = run_folder / f"{job.name}-audit"  # not in the artifact: it is there for a judge that is refused, too
            checks["audit"] = measure(job.name, judges, pairs, gold, unseen, ledger, settings, report)
        return judge_all(job.name, judges, pairs, ledger, settings, job.meter(unit="pairs")), checks
    finally:
        ledger.close()


def open_judges(job: Job) -> list[Judge]:
    """The judges that are stages, then those named by a setting."""
    stages = [job.parents[role] or job.base for role in job.parents if role.startswith("judges.")]
    return [open_judge(spec, job.settings, dtype=job.dtype) for spec in [*stages, *job.settings.judges]]
