"""Plans, runs and results as tables in the terminal."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from align.artifact import FACTS, Artifact
from align.errors import AlignError
from align.memory import estimates
from align.pace import expected_seconds
from align.plan import PARTIAL, Planned
from align.progress import console, printable
from align.recipe import Recipe

SAMPLES_SHOWN = 4
WIN_RATES = ("win_rate", "length_controlled")
KEY_METRICS = ("heldout_loss", "heldout_accuracy", "score", "kl", "length")


def show_plan(recipe: Recipe, plans: list[Planned], run: Path) -> None:
    """What would run, what is done, and what it costs as far as that is known."""
    table = Table(
        "stage",
        "from",
        "rows",
        "steps",
        "state",
        "why",
        "takes",
        "peak memory",
        title=escape(f"{recipe.name} on {recipe.base_model} in {run}"),
        title_justify="left",
    )
    words = {
        "done": "[green]done[/]",
        "archived": "[green]done[/]",
        "resume": "[yellow]resume[/]",
        "run": "[yellow]run[/]",
        "skip": "skip",
    }
    takes = [planned.seconds if planned.state in ("done", "archived") else expected_seconds(planned, recipe.dtype) for planned in plans]
    expected = estimates(plans, recipe.dtype)
    for planned, seconds in zip(plans, takes, strict=True):
        parents = ", ".join(parent_names(planned.parents))
        rows = ", ".join(f"{len(data):,} {role}" for role, data in planned.data.items())
        table.add_row(
            planned.stage.name,
            parents,
            rows,
            "" if planned.steps is None else f"{planned.steps:,}",
            words[planned.state],
            escape(planned.reason),
            "not known" if seconds is None else f"{seconds:.0f} s",
            _memory(planned, expected),
        )
    console.print(table)
    todo = [seconds for planned, seconds in zip(plans, takes, strict=True) if planned.state in ("run", "resume")]
    known = [seconds for seconds in todo if seconds is not None]
    if todo:
        cost = (
            f"about {sum(known) / 60:.1f} minutes at this machine's pace of the last time"
            if len(known) == len(todo)
            else "time not known before such stages have run on this machine"
        )
        console.print(f"{len(todo)} of {len(plans)} stages would run; {cost}.")
    else:
        console.print("Nothing to do: every stage is done.")


def _memory(planned: Planned, expected: Mapping[str, float]) -> str:
    """The peak that was measured, of a stage that is done; else what is estimated, or what the stage took with other settings."""
    measured = f"{planned.former.facts['peak_memory_gb']:.2f} GB" if planned.former else "not known"
    if planned.state in ("done", "archived") or planned.stage.name not in expected:
        return measured
    return f"about {expected[planned.stage.name] / 1e9:.1f} GB"


def read_listing(run: Path) -> dict[str, Any]:
    """What a run's folder says of its recipe: its name, and its stages in order.

    Raises:
        AlignError: where the folder is no run.
    """
    listing = run / "run.json"
    if not listing.is_file():
        raise AlignError(f"{run}: not a run's folder (no run.json). Runs are in runs/ unless --out said otherwise.")
    try:
        found = json.loads(listing.read_text())
        return {**found, "stages": list(found["stages"])}
    except (ValueError, KeyError, TypeError):
        raise AlignError(f"{listing}: cannot be read. Run the recipe again; it writes the file anew.") from None


def open_run(run: Path) -> list[Artifact]:
    """A run's finished stages, in the recipe's order.

    Raises:
        AlignError: where the folder is no run.
    """
    return [Artifact.open(run / name) for name in read_listing(run)["stages"] if (run / name / FACTS).is_file()]


def was_begun(run: Path, name: str) -> bool:
    """Whether a stage that is not finished was stopped in the middle."""
    return (run / PARTIAL).is_dir() and any((run / PARTIAL).glob(f"{name}-*"))


def parent_names(parents: Mapping[str, Any]) -> list[str]:
    """What a stage was made from, each once."""
    return list(dict.fromkeys(parent["name"] if parent else "base" for parent in parents.values()))


def show_run(folder: Path) -> None:
    """`align show`: a run's stages, or one stage in full."""
    if (folder / FACTS).is_file():
        facts = Artifact.open(folder).facts
        console.print_json(json.dumps({k: v for k, v in facts.items() if k != "files"}))
        return
    artifacts = open_run(folder)
    made = {artifact.name: artifact for artifact in artifacts}
    table = Table("stage", "makes", "from", "state", "seconds", "peak GB", "key metrics", title=escape(str(folder)), title_justify="left")
    for name in read_listing(folder)["stages"]:
        if name in made:
            facts = made[name].facts
            parents = ", ".join(parent_names(facts["parents"]))
            stale = [p["name"] for p in facts["parents"].values() if p and p["name"] in made and made[p["name"]].identity != p["identity"]]
            state = f"[yellow]outdated ({', '.join(stale)} changed)[/]" if stale else "[green]done[/]"
            table.add_row(
                name,
                facts["kind"],
                parents,
                state,
                f"{facts['seconds']:.0f}",
                f"{facts['peak_memory_gb']:.2f}",
                _key_metrics(facts["metrics"]),
            )
        else:
            table.add_row(name, "", "", "[yellow]stopped in the middle[/]" if was_begun(folder, name) else "not made", "", "", "")
    console.print(table)
    show_results(folder, list(made), samples=0)


def _key_metrics(metrics: dict[str, Any]) -> str:
    return "  ".join(f"{name} {metrics[name]:.3g}" for name in KEY_METRICS if isinstance(metrics.get(name), int | float))


def show_results(run: Path, stages: list[str], samples: int = SAMPLES_SHOWN) -> None:
    """Each evaluation's table, a few samples side by side, and where everything is."""
    for name in stages:
        if (run / name / FACTS).is_file():
            artifact = Artifact.open(run / name)
            if artifact.kind == "evaluation":
                console.print(results_table(artifact))
                if samples:
                    _show_samples(artifact.folder / "samples.jsonl", samples)
            if artifact.kind == "comparison":
                console.print(win_table(artifact))
    console.print(escape(f"The run is in {run}. See it: align show {run}    Talk to it: align chat {run}"))


def results_table(artifact: Artifact) -> Table:
    """Means and 95 percent intervals, a column for each policy; differences are to the first."""
    metrics = artifact.facts["metrics"]
    policies = metrics["policies"]
    first = escape(policies[0]["name"])
    unseen = list(policies[0].get("held_out", {}))  # reward models that nothing was trained against
    labelled = list(policies[0].get("declined", {}))  # harmful, harmless: where the prompts say
    title = f"{artifact.name}: {metrics['prompts']} held-out prompts, temperature {artifact.facts['settings']['temperature']:g}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for row in policies:
        table.add_column(escape(row["name"]))

    table.add_row("score", *(_with_interval(row["score"], row["score_interval"]) for row in policies))
    table.add_row(f"better than {first}", *(_with_interval(row["difference"], row["difference_interval"]) for row in policies))
    table.add_row("  share of prompts", *("" if row["better_share"] is None else f"{row['better_share']:.0%}" for row in policies))
    for name in unseen:
        compared = [row["held_out"][name] for row in policies]
        table.add_row(f"  by {escape(name)}", *(_with_interval(each["difference"], each["difference_interval"]) for each in compared))
    table.add_row("KL, nats", *("not known" if row["kl"] is None else f"{row['kl']:.1f}" for row in policies))
    table.add_row("tokens", *(f"{row['length']:.0f}" for row in policies))
    table.add_row("ends its turn", *(f"{row['ended']:.0%}" for row in policies))
    for name in labelled:
        table.add_row(f"declines {name}", *("{declined}/{answers}".format(**row["declined"][name]) for row in policies))
    if policies[0].get("instructions"):  # where the prompts carry any
        table.add_row("as instructed", *("{followed}/{answers}".format(**row["instructions"]) for row in policies))
    return table


def win_table(artifact: Artifact) -> Table:
    """How often a judge prefers each policy to the first, ties counted half, and so at equal lengths."""
    metrics = artifact.facts["metrics"]
    title = f"{artifact.name}: answers to {metrics['prompts']} prompts against {metrics['first']}'s, by {' and '.join(metrics['judges'])}"
    columns = ("policy", "wins", "ties", "losses", "not judged", "win rate (95%)", "at equal lengths (95%)")
    table = Table(*columns, title=escape(title), title_justify="left")
    for row in metrics["policies"]:
        shares = [
            f"{row[name]:.0%} ({row[f'{name}_interval'][0]:.0%} to {row[f'{name}_interval'][1]:.0%})"
            for name in WIN_RATES
            if row.get(name) is not None
        ]
        counts = [str(row.get(name, 0)) for name in ("wins", "ties", "losses", "unknown")]
        table.add_row(row["name"], *counts, *(shares or ["not known", "not known"]))
    return table


def _with_interval(mean: float | None, interval: list[float] | None) -> str:
    if mean is None:
        return ""
    return f"{mean:+.2f}" + (f" ±{(interval[1] - interval[0]) / 2:.2f}" if interval else "")


def _show_samples(path: Path, count: int) -> None:
    """Answers of the first and the last policy to a few prompts, chosen by lot and the same every time."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in random.Random(0).sample(rows, min(count, len(rows))):
        names = list(row["answers"])
        grid = Table.grid(padding=(0, 2), expand=True)
        shown = dict.fromkeys([names[0], names[-1]])
        for _ in shown:
            grid.add_column(ratio=1)
        grid.add_row(*(f"[bold]{name}[/] ({_score(row['answers'][name][0]['score'])})" for name in shown))
        grid.add_row(*(escape(printable(row["answers"][name][0]["text"])) for name in shown))
        console.print(Panel(grid, title=escape(printable(row["prompt"][-1]["content"])[:110]), title_align="left"))


def _score(score: float | None) -> str:
    return "cut off, not scored" if score is None else f"score {score:+.2f}"
