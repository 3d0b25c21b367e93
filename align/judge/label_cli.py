"""`align label`: a judge's preferences for pairs of completions, outside a recipe. `--help` imports no torch."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError
from align.judge.cli import INDENT, add_judge_options

if TYPE_CHECKING:
    from align.judge.judgement import Pair, Verdict
    from align.settings import LabelSettings

LABEL = """Have a judge compare pairs of completions in both orders, and write what it is
sure of as preferences (prompt, chosen, rejected, chosen_probability) that any
trainer reads. What it is not sure of goes to a second file with the reasons.

PAIRS is the completions.jsonl of a sample stage (or its folder), or preferences
in any form `align inspect` knows; labels that these have are not shown to the
judge, and how often it agrees with them is told. The judge is measured first,
on people's preferences (--gold) and on pairs planted in PAIRS, and refused if
it is no better than chance or than 'the longer one'."""


def add_label_command(commands: Any) -> None:
    """Add `label` to the subparsers of `align`."""
    label = commands.add_parser(
        "label",
        help="have a judge label pairs of completions: align label PAIRS --judge SPEC --out FILE",
        description=LABEL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_settings_help(),
    )
    label.add_argument("pairs", metavar="PAIRS", help="sampled completions, or preferences in any known form")
    add_judge_options(label, required=True)
    label.add_argument("--gold", action="append", default=[], metavar="FILE", help="people's preferences, to measure the judge; repeatable")
    label.add_argument("--columns", metavar="OURS=THEIRS,...", help="name PAIRS' columns yourself: prompt=question,chosen=a,rejected=b")
    label.add_argument("--out", type=Path, required=True, metavar="FILE", help="the preferences; undecided pairs go beside it")


def _settings_help() -> str:
    from align.overrides import help_lines
    from align.settings import LabelSettings

    lines = ["settings, for --set:"]
    for name, default, kind, meaning in help_lines(LabelSettings, ""):
        if name not in (".judges", ".ledger"):  # --judge and --ledger
            lines.append(f"  {name.removeprefix('.')}={default}  ({kind})")
            lines.append(textwrap.fill(meaning, 79, initial_indent=INDENT, subsequent_indent=INDENT))
    return "\n".join(lines)


def run_label(options: argparse.Namespace) -> None:
    """Do what `align label ...` was asked for.

    Raises:
        AlignError: for a mistake in the options or the files, or where the judge is refused. What it said stays in the ledger.
    """
    from align.artifact import Artifact
    from align.data.mix import load_data
    from align.data.sources import as_sources
    from align.judge.ask import with_principles
    from align.judge.labelling import judge_all, measure, summary, tell_result, unseen_by
    from align.judge.ledger import Ledger
    from align.judge.open import open_judge
    from align.judge.pairs import left_out, preferences
    from align.progress import Meter
    from align.records import write_jsonl

    settings = _settings(options)
    pairs, labels = _pairs(options, settings)
    pairs = with_principles(pairs[: settings.max_pairs], settings)
    gold = load_data(as_sources(options.gold, "--gold"), "preference", "--gold") if options.gold else None
    judges = [open_judge(spec, settings) for spec in options.judge]
    path = options.ledger or options.out.with_suffix(".judgements.sqlite")
    if options.replay and not path.is_file():
        raise AlignError(f"--replay: there is no ledger {path}. Give it with --ledger FILE, or leave --replay out to ask the judge.")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(path)
    try:
        if settings.audit_pairs and not options.replay:
            artifacts = [found for judge in judges if isinstance(found := getattr(judge, "artifact", None), Artifact)]
            unseen = None if gold is None else unseen_by(artifacts, gold)
            measure("label", judges, pairs, gold, unseen, ledger, settings, options.out.with_suffix(".audit"))
        meter = Meter("label", None, (), "pairs")
        judgements = judge_all("label", judges, pairs, ledger, settings, meter, options.replay)
    finally:
        ledger.close()
    labelled = list(preferences(pairs, judgements, settings.hard_labels, settings.undecided == "keep"))
    tell_result("label", summary(judgements, labelled))
    write_jsonl(options.out, labelled)
    undecided = options.out.with_suffix(".undecided.jsonl")
    write_jsonl(undecided, left_out(pairs, judgements))
    _tell(options.out, undecided, path, [j.verdict for j in judgements if j], [r for j, r in zip(judgements, labels, strict=False) if j])


def _settings(options: argparse.Namespace) -> LabelSettings:
    from align.overrides import build, parse_value
    from align.settings import LabelSettings

    values: dict[str, Any] = {} if options.template is None else {"template": options.template}
    for text in options.set:
        name, equals, value = text.removeprefix("label.").partition("=")
        if not equals or not name.strip():
            raise AlignError(f"--set {text!r}: expected setting=value, for example --set abstain=0.1")
        values[name.strip()] = parse_value(value.strip())
    return build(LabelSettings, values, "align label")


def _pairs(options: argparse.Namespace, settings: LabelSettings) -> tuple[list[Pair], list[Verdict | None]]:
    """The pairs, and what people said of each, where they did."""
    import json

    from align.data.mix import load_data
    from align.data.sources import as_sources
    from align.inspect import columns_of
    from align.judge.known import known
    from align.judge.pairs import draw_pairs
    from align.judge.planted import sampled_rows
    from align.plan import COMPLETIONS

    path = Path(options.pairs)
    path = path / COMPLETIONS if (path / COMPLETIONS).is_file() else path
    if path.is_file() and (rows := sampled_rows(path)) is not None:
        pairs = draw_pairs(rows, settings.pairs_per_prompt, settings.seed)
        return pairs, [None] * len(pairs)
    (source,) = as_sources(options.pairs, "align label")
    data = load_data((replace(source, columns=columns_of(options.columns)),), "preference", "align label")
    found: list[Pair] = []
    labels: list[Verdict | None] = []
    for record in data.records():
        pair = known(record["prompt"], record["chosen"], record["rejected"], json.dumps(record["prompt"]), settings.seed)
        found.append(pair.pair)
        probability = record.get("chosen_probability", 1.0)
        labels.append(None if probability == 0.5 else pair.right if probability > 0.5 else "b" if pair.right == "a" else "a")
    return found, labels


def _tell(out: Path, undecided: Path, ledger: Path, verdicts: list[Verdict], labels: list[Verdict | None]) -> None:
    """Where everything is, and how often the judge agrees with labels that the pairs came with."""
    from align.confidence import wilson_interval
    from align.progress import say

    both = [(said, label) for said, label in zip(verdicts, labels, strict=True) if label is not None and said in ("a", "b")]
    if both:
        agree = sum(said == label for said, label in both)
        low, high = wilson_interval(agree, len(both))
        say(f"  agrees with the labels of the file on {agree / len(both):.1%} of {len(both)} (95% interval {low:.1%} to {high:.1%})")
    say(f"{out}\n  undecided: {undecided}\n  everything the judge said: {ledger}")
