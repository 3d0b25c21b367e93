"""Running a recipe: one run per folder at a time, each stage in a folder of its own that appears when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.artifact import FORMAT, Artifact, archive, full_disk_explained, publish
from align.base import Base, loading_explained, local_model
from align.curves import draw
from align.data.mix import Data, load_data
from align.data.sources import Source
from align.errors import AlignError
from align.memory import fit_memory, give_back_memory
from align.pace import remember
from align.plan import CHECKPOINT, MADE_FILES, Planned, make_plan, shared_prompts
from align.progress import Meter, console, last_metrics, say
from align.recipe import Recipe
from align.rewards import Reward
from align.settings import EvaluateSettings, PPOSettings, SampleSettings, Settings, Training
from align.show import read_listing

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


@dataclass
class Job:
    """What a stage is given: its settings, the artifacts and records it reads, and the folder it works in."""

    name: str
    settings: Any
    base: Base
    parents: dict[str, Artifact | None]
    data: dict[str, Data]
    work: Path
    dtype: str | None = None
    tracker: Any = None
    rewards: tuple[Reward, ...] = ()  # the parts of PPO's score

    def meter(self, *shown: str, unit: str = "tokens") -> Meter:
        """A progress report that shows these metrics."""
        return Meter(self.name, self.work, shown, unit, self.tracker)


@dataclass
class Result:
    """What a stage says of what it made; the rest of artifact.json is the engine's."""

    kind: str
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def execute(recipe: Recipe, run: Path, only: Sequence[str] = (), start: str | None = None, command: str | None = None) -> None:
    """Run what is not done yet. `command` is what a user typed for it, to be kept with the run.

    Raises:
        AlignError: for anything a user can mend. Finished stages and checkpoints stay.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AlignError("a recipe runs in one process for now; start it with python rather than `accelerate launch` or torchrun.")
    make_plan(recipe, run, only, start)  # every mistake that can be seen beforehand is told before the folder is made
    with full_disk_explained(run), locked(run):
        plans = make_plan(recipe, run, only, start)
        check_data(plans)
        plans = fit_memory(plans, recipe.dtype)
        _write_listing(recipe, run, command if any(planned.state not in ("done", "skip") for planned in plans) else None)
        for number, planned in enumerate(plans, 1):
            label = f"[bold]{planned.stage.name}[/] ({number}/{len(plans)})"
            if planned.state == "done":
                say(f"{label} done before, {_ago(planned)}")
            elif planned.state == "archived":
                archive(planned.final)
                os.rename(run / "archive" / f"{planned.stage.name}-{planned.identity[:12]}", planned.final)
                say(f"{label} taken from the archive")
            elif planned.state != "skip":
                say(f"{label} {planned.reason}")
                _run_stage(recipe, planned)


def _write_listing(recipe: Recipe, run: Path, command: str | None) -> None:
    """run.json: the recipe's name, its stages, and the commands that made something here."""
    try:
        commands = list(read_listing(run).get("commands") or [])
    except AlignError:
        commands = []  # the first run here, or a damaged file, which is written anew
    if command is not None:
        command = re.sub(r"(//)[^/@\s]+@", r"\1...@", command)  # a user and password in an address stay out
        commands = [*(each for each in commands if each != command), command]
    listing = {"format": FORMAT, "recipe": recipe.name, "stages": list(recipe.stages), "commands": commands}
    (run / "run.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


def check_data(plans: Sequence[Planned]) -> None:
    """Turn every stage's rows into tokens, so that trouble with any of them stops the run before weights are loaded.

    Raises:
        AlignError: see `align.data.tokenise.prepare`.
    """
    todo = [planned for planned in plans if planned.state in ("run", "resume")]
    if not todo:
        return
    for evaluation, stages in shared_prompts(plans).items():
        for stage, count in stages.items():
            say(f"[yellow]{evaluation}: {count} of its prompts are also trained on by {stage}; its figures will flatter[/]")
    from align.chat import Chat
    from align.data.tokenise import demonstrations, prepare, prompt_ids

    base = todo[0].base
    location = local_model(base)
    with loading_explained(base.source):
        chat = Chat.load(location, base.revision if location == base.location else None)
    for planned in todo:
        if not planned.data:
            continue  # its rows are made by another stage
        name, settings, (role, data) = planned.stage.name, planned.stage.settings, next(iter(planned.data.items()))
        if isinstance(settings, Training):
            prepare(name, role, data, chat, settings)
            if "demonstrations" in planned.data:
                demonstrations(name, planned.data["demonstrations"], chat, settings)
        elif isinstance(settings, PPOSettings | EvaluateSettings | SampleSettings):
            prompt_ids(name, data, chat, settings.max_bad_rows, getattr(settings, "max_prompt_tokens", None))


def _ago(planned: Planned) -> str:
    return f"in {planned.seconds:.0f} s" if planned.seconds is not None else ""


def _run_stage(recipe: Recipe, planned: Planned) -> None:
    stage = planned.stage
    if planned.again:
        shutil.rmtree(planned.work, ignore_errors=True)
    planned.work.mkdir(parents=True, exist_ok=True)
    before = last_metrics(planned.work / "metrics.jsonl")["seconds"]
    parents = {role: _open_parent(planned, parent) if parent else None for role, parent in planned.parents.items()}
    data = planned.data | made_data(stage.name, parents)
    begun = time.monotonic()
    _begin_anew()
    with _tracker(recipe, planned) as tracker:
        job = Job(stage.name, stage.settings, planned.base, parents, data, planned.work, recipe.dtype, tracker, stage.rewards)
        with full_disk_explained(planned.final):
            result: Result = importlib.import_module(f"align.stages.{stage.kind}").run(job)
    (planned.work / CHECKPOINT).unlink(missing_ok=True)
    facts = describe(planned, recipe.dtype, data, result, before + time.monotonic() - begun)
    draw(stage.kind, planned.work / "metrics.jsonl", planned.work / "curves.png")
    publish(planned.work, planned.final, facts)
    remember(planned, recipe.dtype, facts["seconds"])
    with contextlib.suppress(OSError):
        planned.work.parent.rmdir()


def _open_parent(planned: Planned, parent: dict[str, Any]) -> Artifact:
    folder = planned.final / parent["path"] if parent["path"].startswith("..") else Path(parent["path"])
    artifact = Artifact.open(Path(os.path.normpath(folder)), verify=True)
    if artifact.identity != parent["identity"]:
        raise AlignError(
            f"{planned.stage.name}: {folder} now has identity {artifact.identity[:12]}, but {parent['identity'][:12]} is expected. "
            "Run the whole recipe again."
        )
    return artifact


def made_data(name: str, parents: dict[str, Artifact | None]) -> dict[str, Data]:
    """The rows that other stages made for this one, through the same door as files."""
    found = {}
    for role, parent in parents.items():
        if parent is not None and parent.kind in MADE_FILES:
            file, kind = MADE_FILES[parent.kind]
            found[role] = load_data((Source(str(parent.folder / file)),), kind, f"{name}.{role}")
    return found


def describe(planned: Planned, dtype: str | None, data: dict[str, Data], result: Result, seconds: float) -> dict[str, Any]:
    """artifact.json without its list of files."""
    stage = planned.stage
    return {
        "format": FORMAT,
        "kind": result.kind,
        "stage": stage.kind,
        "name": stage.name,
        "identity": planned.identity,
        "settings": stage.settings.model_dump(mode="json"),
        "parents": planned.parents,
        "base": vars(planned.base),
        "dtype": dtype,
        "data": {role: {**rows.facts, **result.data.get(role, {})} for role, rows in data.items()},
        "model": result.model,
        **({"rewards": planned.rewards} if planned.rewards else {}),
        "metrics": result.metrics,
        "checks": result.checks,
        "seconds": round(seconds, 2),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: importlib.metadata.version(name) for name in ("align", *LIBRARIES)} | {"python": sys.version.split()[0]},
    }


@contextlib.contextmanager
def _tracker(recipe: Recipe, planned: Planned) -> Iterator[Any]:
    """Accelerate's tracker for the stage, if the recipe names one."""
    if recipe.tracker is None:
        yield None
        return
    if importlib.util.find_spec(recipe.tracker) is None:
        raise AlignError(f"recipe.tracker: the package {recipe.tracker!r} is not installed. Install it: pip install {recipe.tracker}")
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=recipe.tracker, project_dir=planned.final.parent / "tracker")
    accelerator.init_trackers(f"{recipe.name}-{planned.stage.name}", config=_flat(planned.stage.settings))
    try:
        yield accelerator
    finally:
        accelerator.end_training()


def _flat(settings: Settings) -> dict[str, Any]:
    """Settings as the plain values trackers take."""
    return {name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in settings}


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep a run's folder to one process. The system releases the lock however the process ends.

    Raises:
        AlignError: where another process is running in the folder.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a+")
    except OSError as error:
        raise AlignError(f"{run}: cannot be a run's folder ({error.strerror}). Give another one: --out runs/other") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise AlignError(f"{run}: {who} is running here. Wait for it, or give this run a folder of its own: --out runs/other") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')},")
        file.flush()
        yield
        file.truncate(0)


def _begin_anew() -> None:
    """Let the weights of the stage before go, back to the system too, and begin a new count of the peak (Linux)."""
    gc.collect()
    give_back_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gb() -> float:
    """Most memory the process has held since the stage began (Linux), or since the process began."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e6
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


__all__ = ["Job", "Result", "console", "execute"]
