"""`align judge audit`: measure a judge before spending on it, or replies that were recorded elsewhere. `--help` imports no torch."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError

if TYPE_CHECKING:
    from align.judge.judgement import Judge
    from align.judge.known import Known
    from align.settings import JudgeSettings

AUDIT = """Put pairs with a known better side to a judge, in both orders, and say
whether it may label.

The pairs are people's preferences (--gold), and pairs planted in your own
completions (--prompts): the same text twice, a reply cut in half, another
prompt's reply, a padded copy. A judge is accepted if on people's pairs it is
right more often than chance, and more often than 'the longer one', each at 95
percent confidence. Writes audit.html and audit.json. Whatever the verdict, the
exit code is 0."""
REPLIES = """replies recorded elsewhere (--replies FILE; no judge is asked):
  Columns raw_ab, raw_ba, label (1 or 2), and subset, judge, strategy where
  there are several: the replies with output 1 shown first, and with output 2
  shown first. One order alone will do.
  Columns idx and one that ends with _result: verdicts in one order, held
  against the votes of --gold FILE, joined by idx. What more than half of a
  pair's votes say is right, else a tie.

  --json prints {"groups": [...]}, one for each subset, judge and strategy:
    n                      pairs; the next four are numbers of pairs too
    correct_ab, correct_ba right with output 1 shown first, and second
    correct_both, agree    right in both orders, the same in both orders
    kappa                  between the orders, of whether output 1 won (what
                           cannot be read is a no), as LLMBar has it
    kappa_read             between the orders, over pairs read in both
    kappa_gold_ab, _ba     with what is right, over replies that were read
    tie_*, unparsed_*      replies; one that cannot be read is not right
    shares                 the numbers of pairs as shares, with intervals
  null is what an order would tell that was not asked.

"""
EXAMPLES = """
examples:
  align judge audit --judge embedded --gold people.jsonl --prompts chat.jsonl
  align judge audit --judge http://localhost:8000/v1#model --gold llmbar.json
  align judge audit --replies llmbar_verdicts.jsonl.gz --json"""

INDENT = 6 * " "


def add_judge_commands(commands: Any) -> None:
    """Add `judge` to the subparsers of `align`."""
    judge = commands.add_parser("judge", help="measure a judge: align judge audit --judge SPEC --gold FILE")
    kinds = judge.add_subparsers(dest="judge_command", required=True, metavar="COMMAND")
    audit = kinds.add_parser(
        "audit",
        help="put pairs with a known better side to a judge, and say whether it may label",
        description=AUDIT,
        epilog=REPLIES + settings_help() + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_judge_options(audit, required=False)
    audit.add_argument("--gold", action="append", default=[], metavar="FILE", help="people's preferences, in any known form; repeatable")
    audit.add_argument("--prompts", metavar="FILE", help="conversations, preferences or sampled completions, to plant pairs in")
    pairs = "pairs of each gold file, at most (default: 200); a quarter as many of each planted kind"
    audit.add_argument("--pairs", type=int, default=200, metavar="N", help=pairs)
    audit.add_argument("--out", type=Path, default=Path("runs/audit"), metavar="FOLDER", help="for the page (default: %(default)s)")
    audit.add_argument("--replies", type=Path, metavar="FILE", help="replies recorded elsewhere, instead of a judge; see below")
    audit.add_argument("--json", action="store_true", help="print everything as JSON")


def settings_help() -> str:
    """Every setting of a judge with its default and meaning."""
    from align.overrides import help_lines
    from align.settings import JudgeSettings

    lines = ["settings of the judge, for --set:"]
    for name, default, kind, meaning in help_lines(JudgeSettings, ""):
        lines += [
            f"  {name.removeprefix('.')}={default}  ({kind})",
            textwrap.fill(meaning, 79, initial_indent=INDENT, subsequent_indent=INDENT),
        ]
    return "\n".join([*lines, ""])


def add_judge_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options of every command that asks a judge."""
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="SPEC",
        required=required,
        help="'embedded' or another base, a stage's folder, or an endpoint http://host:port/v1#model; several make a panel",
    )
    parser.add_argument("--template", metavar="FILE", help="what the judge is asked (default: prompts/judge_pair.txt)")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="where replies are kept and looked up (default: in --out)")
    parser.add_argument("--replay", action="store_true", help="answer from the ledger alone; no judge is asked")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="a setting of the judge, such as abstain=0.1")


def run_judge(options: argparse.Namespace) -> None:
    """Do what `align judge ...` was asked for.

    Raises:
        AlignError: for a mistake in the options or the files.
    """
    if options.replies is not None:
        _replies(options)
    else:
        _audit(options)


def judge_settings(options: argparse.Namespace, where: str) -> JudgeSettings:
    """The settings of the judge from --template and --set."""
    from align.overrides import build, parse_value
    from align.settings import JudgeSettings

    values: dict[str, Any] = {} if options.template is None else {"template": options.template}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise AlignError(f"--set {text!r}: expected setting=value, for example --set abstain=0.1")
        values[name.strip()] = parse_value(value.strip())
    return build(JudgeSettings, values, where)


# A judge --------------------------------------------------------------------------------------------------------------


def _audit(options: argparse.Namespace) -> None:
    from align.inspect import escape
    from align.judge.audit import audit, facts
    from align.judge.ledger import Ledger
    from align.judge.open import open_judge
    from align.judge.page import write
    from align.judge.tables import show_audit
    from align.progress import say

    _check(options)
    settings = judge_settings(options, "align judge audit")
    judges = [open_judge(spec, settings) for spec in options.judge]
    gold, planted = _pairs(options, settings, judges)
    path = options.ledger or options.out / "judgements.sqlite"
    if options.replay and not path.is_file():
        raise AlignError(f"--replay: there is no ledger {path}. Give it with --ledger FILE, or leave --replay out to ask the judge.")
    with closing(Ledger(path)) as ledger, progress(options.json, len(gold) + len(planted)) as on_progress:
        found = audit(judges, gold, planted, ledger, settings, options.replay, on_progress)
    if options.replay and not found.asked:
        raise AlignError(
            f"--replay: {path} has no reply of {_named(judges)} to any of the {found.wanted:,} pairs. It keeps replies by judge, model, "
            "template and text: give the same ones, or leave --replay out to ask the judge."
        )
    told = facts(found)
    page = write(told, options.out)
    if options.json:
        print(json.dumps(told, ensure_ascii=False, indent=1))
        return
    show_audit(told)
    say(escape(str(page)))


def _check(options: argparse.Namespace) -> None:
    if not options.judge:
        raise AlignError(
            "align judge audit: no judge is given. Name one with --judge: embedded, a folder, or http://host:port/v1#model; or give "
            "replies recorded elsewhere with --replies FILE."
        )
    if not options.gold and not options.prompts:
        raise AlignError(
            "align judge audit: nothing to measure the judge on. Give people's preferences with --gold FILE, completions of your own "
            "with --prompts FILE, or both."
        )
    if options.pairs < 1:
        raise AlignError(f"--pairs {options.pairs}: expected 1 or more.")


def _pairs(options: argparse.Namespace, settings: JudgeSettings, judges: list[Judge]) -> tuple[list[Known], list[Known]]:
    """Pairs to measure on, from the files; none of people's that a judge was trained on."""
    from align.data.mix import load_data
    from align.data.sources import as_sources
    from align.judge.audit import measured_pairs
    from align.judge.planted import read_completions
    from align.stages.label import unseen_by

    gold = load_data(as_sources(options.gold, "--gold"), "preference", "--gold") if options.gold else None
    completions = read_completions(as_sources(options.prompts, "--prompts")[0], "--prompts") if options.prompts else []
    trained = [artifact for judge in judges if (artifact := getattr(judge, "artifact", None)) is not None]
    unseen = None if gold is None else unseen_by(trained, gold)
    people, planted = measured_pairs(gold, completions, options.pairs, settings.seed, unseen)
    if gold is not None and unseen is not None:
        learned = int((~unseen).sum())
        if not people:
            raise AlignError(
                f"--gold {', '.join(options.gold)}: none of {len(gold):,} pairs has a better side and was not learned by the judge "
                f"({learned:,} were). Give other preferences."
            )
        if not options.json:
            _tell_left_out(gold.facts["rejected"], learned)
    return people, planted


def _tell_left_out(rejected: dict[str, int], learned: int) -> None:
    from align.inspect import escape
    from align.progress import say

    if lost := sum(rejected.values()):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        say(f"--gold: {lost:,} {'row is' if lost == 1 else 'rows are'} left out ({escape(reasons)})")
    if learned:
        say(f"--gold: {learned:,} {'pair is' if learned == 1 else 'pairs are'} left out, because the judge was trained on them")


@contextmanager
def progress(quiet: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, and what tells it how many pairs are judged."""
    from rich.progress import Progress

    from align.progress import console

    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("judging", total=total)
        yield lambda done: bar.update(task, completed=done)


def _named(judges: list[Judge]) -> str:
    return " or ".join(judge.name for judge in judges)


# Replies --------------------------------------------------------------------------------------------------------------


def _replies(options: argparse.Namespace) -> None:
    from align.judge.replies import replay
    from align.judge.tables import show_replies

    needless = {
        "--judge": options.judge,
        "--prompts": options.prompts,
        "--template": options.template,
        "--ledger": options.ledger,
        "--replay": options.replay,
        "--set": options.set,
    }
    for name, given in needless.items():
        if given:
            raise AlignError(f"--replies asks no judge, so {name} has no meaning beside it. Leave one of the two out.")
    if len(options.gold) > 1:
        raise AlignError(f"--gold: {len(options.gold)} files are given; --replies takes one.")
    found = replay(options.replies, Path(options.gold[0]) if options.gold else None)
    if options.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return
    show_replies(found["groups"])
