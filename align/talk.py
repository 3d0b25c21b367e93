"""`align chat`: talk to a policy in the terminal, one or two side by side, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from rich.columns import Columns
from rich.markup import escape
from rich.panel import Panel

from align.artifact import FACTS, Artifact
from align.chat import Chat, UnfitMessages
from align.errors import AlignError
from align.model.generate import decode
from align.model.load import Sampler, load_role, open_trunk
from align.progress import console, printable
from align.records import Message
from align.show import open_run

MARK = "\ufffd"  # what a token that holds part of a character decodes to


class Speaker:
    """A policy with its own side of the conversation."""

    def __init__(self, folder: Path, system: str | None, temperature: float, max_new_tokens: int, seed: int):
        """Load the policy at `folder`, a stage's or a run's."""
        artifact = find_policy(folder)
        self.name = artifact.name
        trunk, self.chat = open_trunk(artifact.base, artifact, artifact.facts["dtype"])
        role = load_role(trunk, artifact)
        sampler = Sampler(trunk)
        if sampler.copy is not None:
            trunk.merge_into(sampler.copy, role)
        self.switched = trunk.switched_to(role) if sampler.copy is None else None
        if self.switched:
            self.switched.__enter__()
        self.model = sampler.copy if sampler.copy is not None else trunk.model
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.seed = seed * 1_000_003  # of the next answer
        self.messages = [Message(role="system", content=system)] if system else []

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a turn of the user, piece by piece. The turn and the answer join the conversation."""
        messages = [*self.messages, Message(role="user", content=text)]
        ids: list[int] = []
        said = ""
        prompt = self.chat.prompt_ids(messages)
        for step in decode(self.model, [prompt], 1, self.max_new_tokens, self.temperature, self.chat.stop_ids, self.seed):
            ids += step.tokens
            so_far = self.chat.tokenizer.decode([i for i in ids if i not in self.chat.stop_ids], skip_special_tokens=True)
            if not so_far.endswith(MARK) and len(so_far) > len(said):
                yield so_far[len(said) :]
                said = so_far
        self.seed += 1
        self.messages = [*messages, Message(role="assistant", content=said.strip() or "...")]


def find_policy(folder: Path) -> Artifact:
    """The policy of a stage's folder, or the last one of a run's.

    Raises:
        AlignError: where there is none.
    """
    if (folder / FACTS).is_file():
        artifact = Artifact.open(folder, verify=True)
        if artifact.kind != "policy":
            raise AlignError(
                f"{folder}: is the {artifact.kind.replace('_', ' ')} of a run; expected a policy, such as {folder.parent / 'sft'}."
            )
        return artifact
    policies = [artifact for artifact in open_run(folder) if artifact.kind == "policy"]
    if not policies:
        raise AlignError(f"{folder}: no finished policy in this run yet. See: align show {folder}")
    return policies[-1]


def talk(policy: Path, against: Path | None, system: str | None, temperature: float, max_new_tokens: int, seed: int) -> None:
    """Read turns from the terminal or a pipe until they end, and answer each."""
    if not 0 <= temperature < float("inf") or max_new_tokens < 1:
        raise AlignError("align chat: --temperature must be a number of at least 0 and --max-new-tokens at least 1.")
    folders = [policy] + ([against] if against else [])
    for folder in folders:
        find_policy(folder)  # both are there, before any weights are loaded
    speakers = [Speaker(folder, system, temperature, max_new_tokens, seed) for folder in folders]
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(f"[dim]{' and '.join(s.name for s in speakers)}. An empty line or Ctrl-D ends.[/]")
    for text in _turns(interactive):
        try:
            _one_turn(speakers, text)
        except UnfitMessages as error:
            console.print(f"[red]that cannot be sent: {escape(str(error))}[/]")


def _turns(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if not text:
            return
        yield text


def _one_turn(speakers: list[Speaker], text: str) -> None:
    if len(speakers) == 1:
        for piece in speakers[0].answer(text):
            print(printable(piece), end="", flush=True)
        print()
        return
    answers = [printable("".join(speaker.answer(text)).strip()) for speaker in speakers]
    if console.is_terminal:
        width = console.width // 2 - 1
        console.print(Columns([Panel(escape(a), title=s.name, width=width) for a, s in zip(answers, speakers, strict=True)]))
    else:
        for speaker, answer in zip(speakers, answers, strict=True):
            print(f"{speaker.name}: {answer}")


__all__ = ["Chat", "talk"]
