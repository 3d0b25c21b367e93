"""The command line in processes of its own. A server imports torch once and forks, so that each of them starts at once."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import progress

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.tokenization_auto",
        "peft",
        "accelerate",
        "matplotlib.pyplot",
        "pytest",
        "datasets",  # with pandas, a second of every process
        "pyarrow.compute",
        "align.plan",
        "align.show",
        "align.run",
        "align.inspect",
        "align.data.fast",
        "align.export",
        "align.report.page",
        *(f"align.stages.{stage}" for stage in ("sft", "reward", "dpo", "ppo", "evaluate")),
    ]
)


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (minus the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Running:
    """A process, and the files it writes to."""

    process: multiprocessing.Process
    out: Path
    err: Path

    def end(self, seconds: float = 120) -> Ended:
        """Wait for it."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s; it wrote:\n{self.out.read_text()}\n{self.err.read_text()}")
        return Ended(self.process.exitcode, self.out.read_text(), self.err.read_text())


def start(*arguments: object, folder: Path, stdin: str = "", before: Callable[[], None] | None = None, curves: bool = False) -> Running:
    """Start `align ARGUMENTS` in a folder; `before` runs first, in the new process, and must be importable there.

    Drawing curves is half the seconds of a tiny run: only where they are asked for.
    """
    number = len(list(folder.glob(".stdout*")))
    stdin_file, out, err = (folder / f".{name}{number}" for name in ("stdin", "stdout", "stderr"))
    stdin_file.write_text(stdin)
    out.touch()
    err.touch()
    process = _context.Process(target=_command, args=([str(a) for a in arguments], folder, stdin_file, out, err, before, curves))
    process.start()
    return Running(process, out, err)


def align(*arguments: object, folder: Path, **options: Any) -> Ended:
    """Run `align ARGUMENTS` in a folder to its end."""
    return start(*arguments, folder=folder, **options).end()


def _command(
    arguments: list[str], folder: Path, stdin: Path, out: Path, err: Path, before: Callable[[], None] | None, curves: bool
) -> None:
    for number, path, mode in ((0, stdin, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(path, mode), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing had closed it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    os.chdir(folder)
    os.environ["COLUMNS"] = "200"
    progress.console.width = 200  # it was made in the server, before this
    import gc

    import torch

    gc.freeze()  # what the server has imported is garbage in no process: half a second of every collection
    torch.set_num_threads(1)  # as two processes share two cores, more threads cost a tiny model thirty times what they give
    if not curves:
        from align import run

        run.draw = lambda *_: None
    if before:
        before()
    from align.cli import main

    main(arguments)
