"""`align evaluate RUN/STAGE --tasks ...`: standard benchmarks, by lm-evaluation-harness on a policy that is exported for it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from align.confidence import Z95
from align.errors import AlignError

PACKAGE, INSTALL = "lm_eval", "pip install 'lm-eval>=0.4.13,<0.5'"


def run_tasks(folder: Path, tasks: Sequence[str], include: Path | None = None, limit: int | None = None, out: Path | None = None) -> Path:
    """Export a policy, have the harness measure it, and write what it found.

    Chats are rendered by the policy's own template, as everywhere here; a score without one is another number.

    Args:
        folder: a stage that made a policy, or a run (its last policy).
        tasks: the harness's names for its tasks, or of those in `include`.
        include: a folder of task files (YAML) of one's own.
        limit: examples of each task; all where none is given.
        out: the file to write; RUN/evaluations/tasks-STAGE.json unless given.

    Returns:
        The file.

    Raises:
        AlignError: where the harness is not installed, knows no such task, or cannot get a task's data.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise AlignError(f"--tasks: the package lm-eval is not installed. Install it: {INSTALL}")
    from align.talk import find_policy

    artifact = find_policy(folder)
    out = out or artifact.folder.parent / "evaluations" / f"tasks-{artifact.name}.json"
    manager = _known_tasks(tasks, include)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exported-") as place:
        results = _measure(_exported(folder, Path(place)), tasks, manager, limit)
    facts = {
        "policy": artifact.name,
        "identity": artifact.identity,
        "limit": limit,
        "harness": importlib.metadata.version("lm-eval"),
        "results": {task: _numbers(found) for task, found in results["results"].items()},
        "examples": {task: found["effective"] for task, found in results.get("n-samples", {}).items()},
    }
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return out


def tasks_table(path: Path) -> Table:
    """What `run_tasks` wrote: every metric with its 95 percent interval by the normal approximation."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    table = Table(
        "task", "metric", "value (95%)", "examples", title=f"{facts['policy']}, by lm-eval {facts['harness']}", title_justify="left"
    )
    for task, metrics in facts["results"].items():
        for name, metric in metrics.items():
            shown = f"{metric['value']:.3f}" + (" ({:.3f} to {:.3f})".format(*metric["interval"]) if metric["interval"] else "")
            table.add_row(task, name, shown, str(facts["examples"].get(task, "")))
    return table


def _known_tasks(tasks: Sequence[str], include: Path | None) -> Any:
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if all(own.match_tasks([task]) for task in tasks):
            return own  # the harness's own are thousands of files, which take seconds to read
    manager = TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise AlignError(f"--tasks: the harness knows no task {task!r}. See them all: lm-eval ls tasks. Your own: --include FOLDER")
    return manager


def _exported(folder: Path, place: Path) -> Path:
    """Merged weights, in the type that the device computes in."""
    import torch

    from align.export import export
    from align.model.load import default_device
    from align.model.trunk import native_dtype

    return export(folder, "merged", place / "model", str(native_dtype(torch.device(default_device()))).removeprefix("torch."))


def _measure(model: Path, tasks: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from align.model.load import default_device

    try:
        return simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "auto", "trust_remote_code": False},
            device=default_device(),  # else it takes a GPU that may not be there
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=True,
            log_samples=False,
        )
    except (OSError, ImportError, ValueError, LookupError) as error:  # a hub that is not reached, an extra that is not installed
        what = " ".join(str(error).split())[:300]
        raise AlignError(
            f"--tasks {','.join(tasks)}: the harness stopped ({type(error).__name__}: {what}). Most tasks fetch their data from the "
            "Hugging Face hub; some need an extra, such as lm-eval[ifeval]. The policy and the run are as they were."
        ) from None


def _numbers(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A task's metrics by name, each with its interval where the harness gives a standard error."""
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        if name.endswith("_stderr") or not isinstance(value, int | float) or not filtered:
            continue
        error = found.get(f"{name}_stderr,{filtered}")
        label = name if filtered == "none" else f"{name} ({filtered})"
        interval = [value - Z95 * error, value + Z95 * error] if isinstance(error, int | float) else None
        metrics[label] = {"value": value, "interval": interval}
    return metrics
