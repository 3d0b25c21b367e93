"""The command line. `--help` imports no torch."""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError

if TYPE_CHECKING:
    from align.recipe import Recipe

FAILED = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """The `align` command."""
    sys.exit(guarded(_dispatch, sys.argv[1:] if arguments is None else list(arguments)))


def guarded(command, *arguments) -> int:
    """Run a command; a user's mistake is a message and exit code 2, an interruption 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(name, "1")
    try:
        command(*arguments)
    except AlignError as error:
        from align.progress import printable

        print(f"error: {printable(str(error))}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nstopped. Run the same command again to go on from the last checkpoint.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["run"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        return _run_script(Path(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(prog="align", description="From a pretrained language model to an aligned one, in one recipe.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a recipe script: align run recipes/quickstart.py [--plan] [--set stage.setting=value] ...")
    run.add_argument("script", type=Path, help="the recipe; `align run SCRIPT --help` lists its stages' settings")
    show = commands.add_parser("show", help="what a run has made: stages, state, key metrics, parents")
    show.add_argument("run", type=Path, help="a run's folder, such as runs/quickstart, or one stage in it")
    chat = commands.add_parser("chat", help="talk to a policy in the terminal")
    chat.add_argument("policy", type=Path, help="a stage's folder, or a run's (its last policy)")
    chat.add_argument("--against", type=Path, metavar="RUN/STAGE", help="a second policy, answering beside the first")
    chat.add_argument("--system", help="a system message")
    chat.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    chat.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    tell = commands.add_parser("report", help="a run as one HTML page: what was run, what it cost, whether it is better")
    tell.add_argument("run", type=Path, help="a run's folder")
    tell.add_argument("other", type=Path, nargs="?", help="a second run, to be put beside it")
    tell.add_argument("--out", type=Path, metavar="FILE", help="where to (default: RUN/report.html)")
    tell.add_argument("--json", action="store_true", help="print the facts as JSON instead")
    give = commands.add_parser("export", help="a policy for transformers and peft, or llama.cpp: one adapter, merged weights, GGUF")
    give.add_argument("policy", type=Path, help="a stage's folder, or a run's (its last policy)")
    give.add_argument("--to", choices=("adapter", "merged", "gguf"), default="merged", help="the form (default: merged)")
    give.add_argument("--out", type=Path, metavar="FOLDER", help="where to (default: RUN/exports/STAGE-FORM)")
    give.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of merged weights (default: bfloat16)")
    _inspect_options(commands)
    _judge_options(commands, arguments)
    options = parser.parse_args(arguments)
    if options.command == "inspect":
        _inspect(options)
    elif options.command == "judge":
        from align.judge.cli import run_judge

        run_judge(options)
    elif options.command == "label":
        from align.judge.label_cli import run_label

        run_label(options)
    elif options.command == "export":
        from align.export import export
        from align.progress import say

        say(f"exported to {export(options.policy, options.to, options.out, options.dtype)}")
    elif options.command == "evaluate":
        from align.evaluate_cli import run_evaluate

        run_evaluate(options)
    elif options.command == "report":
        _report(options)
    elif options.command == "show":
        from align.show import show_run

        show_run(options.run)
    else:
        from align.talk import talk

        talk(options.policy, options.against, options.system, options.temperature, options.max_new_tokens, options.seed)
    return None


def _inspect_options(commands: Any) -> None:
    look = commands.add_parser(
        "inspect",
        help="what a data file holds: its format, what would be trained on, what would not and why",
        description="Show how a source of rows is understood: format and mapping, counts, problems with their places, tokens, examples "
        "with every trained token marked. Files: .json .jsonl .csv .tsv .parquet .txt, each also .gz or .zst.",
    )
    look.add_argument("source", help="a file, a folder, a glob or a hub id")
    look.add_argument("--kind", choices=("conversation", "preference", "prompt"), help="what the rows must be (default: what they are)")
    look.add_argument("--columns", metavar="OURS=THEIRS,...", help="name the columns yourself: prompt=question,completion=reply")
    look.add_argument("--stage", choices=("sft", "reward", "dpo", "ppo", "evaluate"), help="show exactly what this stage would see")
    look.add_argument("--base", default="embedded", help="whose tokenizer and chat template to use (default: embedded)")
    look.add_argument("--max-length", type=int, default=1024, help="longest example in tokens (default: 1024)")
    policies = ("error", "drop", "shorten_prompt", "cut_completion")
    look.add_argument("--on-overlong", choices=policies, default="drop", help="what becomes of longer ones (default: drop)")
    look.add_argument("--train-on", choices=("all", "last"), default="all", help="sft: every turn of the assistant, or the last")
    look.add_argument("--examples", type=int, default=2, help="rendered examples to show (default: 2)")
    look.add_argument(
        "--near-duplicates", type=float, nargs="?", const=0.8, metavar="SHARE", help="count texts this alike (0.8 if not said)"
    )
    look.add_argument("--against", action="append", default=[], metavar="FILE", help="count prompts that this file has too; repeatable")
    look.add_argument("--split", help="of a hub data set (default: train)")
    look.add_argument("--revision", help="of a hub data set: branch, tag or commit")
    look.add_argument("--config", help="of a hub data set that has several")
    look.add_argument("--out", type=Path, metavar="FILE", help="write the converted records as JSONL")
    look.add_argument("--json", action="store_true", help="print everything as JSON")


def _judge_options(commands: Any, arguments: list[str]) -> None:
    """`judge` and `label`, whose help lists settings: in full only where it is wanted, for that takes a moment."""
    if arguments[:1] in (["judge"], ["label"]):
        from align.judge.cli import add_judge_commands
        from align.judge.label_cli import add_label_command

        add_judge_commands(commands)
        add_label_command(commands)
    else:
        commands.add_parser("judge", help="measure a judge before it labels: align judge audit --judge SPEC --gold FILE")
        commands.add_parser("label", help="have a judge label pairs of completions: align label PAIRS --judge SPEC --out FILE")
    if arguments[:1] == ["evaluate"]:
        from align.evaluate_cli import add_evaluate_command

        add_evaluate_command(commands)
    else:
        commands.add_parser("evaluate", help="compare a run's policies on prompts of your own: align evaluate RUN --prompts FILE")


def _inspect(options: argparse.Namespace) -> None:
    from align.data.sources import as_sources
    from align.inspect import Wanted, columns_of, inspect

    given = {"split": options.split, "revision": options.revision, "config": options.config, "columns": columns_of(options.columns)}
    (source,) = as_sources(options.source, "align inspect")
    source = replace(source, **{name: value for name, value in given.items() if value is not None})
    names = ("kind", "stage", "base", "max_length", "on_overlong", "train_on", "examples", "against", "out")
    chosen = {name: getattr(options, name) for name in names}
    inspect(Wanted(source, near=options.near_duplicates, as_json=options.json, **chosen))


def _report(options: argparse.Namespace) -> None:
    from align.report.facts import run_facts
    from align.report.page import write_report

    if options.json:
        import json

        print(json.dumps([run_facts(run) for run in (options.run, options.other) if run], indent=1, ensure_ascii=False))
    else:
        print(write_report(options.run, options.other, options.out))


def _run_script(script: Path, arguments: list[str]) -> None:
    """Run a recipe script as `python SCRIPT ...` would."""
    if not script.is_file():
        from align.files import shipped_file

        shipped = shipped_file(str(script))
        if script.is_absolute() or not shipped.is_file():
            raise AlignError(f"align run: there is no script {str(script)!r}.")
        script = shipped
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            sys.exit(stop.code)


def recipe_main(recipe: Recipe, arguments: Sequence[str] | None) -> int:
    """The command line that every recipe script has."""
    return guarded(_recipe, recipe, sys.argv[1:] if arguments is None else list(arguments))


def _recipe(recipe: Recipe, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python {Path(sys.argv[0]).name}" if sys.argv[0] else "recipe",
        description=f"Run the recipe {recipe.name!r}: {' -> '.join(recipe.stages)}. "
        "Run it again and only what changed, or was not finished, runs.",
        epilog="STAGES and their settings, for --set:\n" + _settings_help(recipe) if {"-h", "--help"} & set(arguments) else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", action="store_true", help="show what would run and what is done; loads no weights")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.SETTING=VALUE", help="change a setting or a data file; repeatable"
    )
    parser.add_argument("--out", type=Path, default=recipe.default_folder, help="the run's folder (default: %(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="run only this stage; repeatable")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="run this stage and all after it again, even where they are done")
    options = parser.parse_args(arguments)
    for text in options.set:
        recipe.override(text)
    from align.show import show_plan, show_results

    if options.plan:
        from align.plan import make_plan

        show_plan(recipe, make_plan(recipe, options.out, options.only, options.start), options.out)
        return
    from align.run import execute

    execute(recipe, options.out, options.only, options.start, shlex.join(["python", sys.argv[0] or "RECIPE", *arguments]))
    show_results(options.out, list(recipe.stages))
    _report_at_the_end(options.out)


def _report_at_the_end(run: Path) -> None:
    """The page of a run that has just ended. Whatever is wrong with it, the run itself went well."""
    from align.progress import say
    from align.report.page import write_report

    try:
        say(f"Its report: {write_report(run)}")
    except Exception as error:
        say(f"[yellow]its report could not be written: {error}. Try again: align report {run}[/]")


def _settings_help(recipe: Recipe) -> str:
    from align.overrides import help_lines

    lines = []
    for stage in recipe.stages.values():
        lines += ["", f"{stage.name}: {(type(stage.settings).__doc__ or '').strip()}"]
        for role, (sources, _) in stage.data.items():
            lines.append(f"  {stage.name}.{role}=FILE  (now {', '.join(source.path for source in sources)})")
        for name, default, kind, meaning in help_lines(type(stage.settings), stage.name, stage.settings):
            lines.append(f"  {name}={default}  ({kind})\n      {meaning}")
    return "\n".join(
        [*lines, "", "recipe.base, recipe.revision, recipe.seed, recipe.dtype, recipe.quantize, recipe.tracker: of the whole recipe"]
    )
