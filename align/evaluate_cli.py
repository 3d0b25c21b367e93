"""`align evaluate`: compare a run's policies on other prompts, without a recipe, by an evaluate stage like any other. Or benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.artifact import Artifact
from align.errors import AlignError
from align.progress import console
from align.recipe import Recipe
from align.show import open_run, show_results

NAME = "evaluate"


def add_evaluate_command(commands: Any) -> None:
    """Its options."""
    command = commands.add_parser("evaluate", help="compare a run's policies on prompts of your own, or measure one by standard benchmarks")
    command.add_argument("run", type=Path, help="a run's folder; with --tasks RUN/STAGE, or a run's last policy")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", metavar="FILE", help="prompts that nothing was trained on, in any known form")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness, such as ifeval or arc_easy")
    command.add_argument("--include", type=Path, metavar="FOLDER", help="with --tasks: task files (YAML) of your own")
    command.add_argument("--limit", type=int, metavar="N", help="with --tasks: the first N examples of each")
    command.add_argument("--policies", nargs="+", metavar="STAGE", help="stages, the first is compared with (default: all policies)")
    command.add_argument("--reward", metavar="STAGE", help="the reward model that scores (default: the run's last)")
    command.add_argument("--held-out", nargs="+", default=[], type=Path, metavar="FOLDER", help="reward models of other runs, beside it")
    command.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE", help="samples_per_prompt=4, best_of=8, ...")
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to (default: RUN/evaluations/NAME-OF-FILE; with --tasks a file, tasks-STAGE.json there)",
    )


def run_evaluate(options: argparse.Namespace) -> None:
    """Declare the stage on the run's artifacts, run it and show its table; or have the harness measure a policy.

    Raises:
        AlignError: where the run has no such policy or no reward model, or an option belongs to the other kind of measuring.
    """
    _refuse_what_would_be_ignored(options)
    if options.tasks:
        from align.harness import run_tasks, tasks_table

        path = run_tasks(options.run, options.tasks, options.include, options.limit, options.out)
        console.print(tasks_table(path), f"written to {path}")
        return
    made = open_run(options.run)
    policies = _named(made, "policy", options.policies, options.run)
    reward = _named(made, "reward_model", [options.reward] if options.reward else None, options.run)[-1]
    base = policies[0].facts["base"]
    recipe = Recipe(NAME, base=base["source"], revision=base["revision"], dtype=policies[0].facts["dtype"])
    recipe.evaluate(
        policies=[recipe.load(artifact.folder) for artifact in policies],
        prompts=options.prompts,
        reward_model=recipe.load(reward.folder),
        held_out=[recipe.load(folder) for folder in options.held_out],
    )
    for text in options.set:
        recipe.override(f"{NAME}.{text}")
    out = recipe.run(options.out or options.run / "evaluations" / Path(options.prompts).name.split(".")[0])
    show_results(out, [NAME])


def _refuse_what_would_be_ignored(options: argparse.Namespace) -> None:
    of_tasks, of_prompts = ("include", "limit"), ("policies", "reward", "held_out", "set")
    given = [name for name in (of_prompts if options.tasks else of_tasks) if getattr(options, name)]
    if given:
        other, mine = ("--prompts", "--tasks") if options.tasks else ("--tasks", "--prompts")
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise AlignError(f"{names}: goes with {other}, and is nothing to {mine}. Leave it out, or measure one after the other.")


def _named(made: Sequence[Artifact], kind: str, names: Sequence[str] | None, run: Path) -> list[Artifact]:
    found = {artifact.name: artifact for artifact in made if artifact.kind == kind}
    what = kind.replace("_", " ")
    if not found:
        raise AlignError(f"{run}: has no finished {what}; see align show {run}.")
    for name in names or ():
        if name not in found:
            raise AlignError(f"{run}: has no {what} {name!r}. It has: {', '.join(found)}.")
    return [found[name] for name in names or found]
