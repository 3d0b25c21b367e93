"""Critique and revision: a policy criticises completions by a principle and rewrites them (Bai et al. 2022, 2212.08073, sec. 3.1)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.chat import Chat
from align.errors import AlignError
from align.model.load import Sampler, load_role, open_trunk
from align.model.trunk import Role
from align.plan import COMPLETIONS, SAMPLED
from align.progress import Meter
from align.prompts import PromptTemplate, as_text, read_principles
from align.records import Message, write_jsonl
from align.run import Job, Result
from align.settings import ReviseSettings

AT_ONCE = 32  # completions between two writes: what a killed run must revise again


def run(job: Job) -> Result:
    """Revise every completion, going on from what a stopped run has written."""
    settings: ReviseSettings = job.settings
    source = job.parents["completions"]
    assert source is not None
    rows = [json.loads(line) for line in (source.folder / COMPLETIONS).read_text(encoding="utf-8").splitlines()]
    drafts = [(row["prompt"], c["text"]) for row in rows for c in row["completions"][: settings.completions_per_prompt]]
    principles = read_principles(settings.constitution)
    templates = [PromptTemplate.load(settings.critique_template), PromptTemplate.load(settings.revision_template)]
    trunk, chat = open_trunk(job.base, job.parents["policy"], job.dtype)
    writer = Writer(Sampler(trunk), load_role(trunk, job.parents["policy"]), chat, settings)
    revised = _read(job.work / SAMPLED)
    meter = job.meter(unit="completions")
    meter.begin(len(drafts), len(revised))
    for start in range(len(revised), len(drafts), AT_ONCE):
        some = drafts[start : start + AT_ONCE]
        new = revise(writer, some, principles, templates, settings, start, meter)
        with (job.work / SAMPLED).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
        revised += new
        meter.step(start + len(some), {}, len(some))
    meter.close()
    kept = [row for row in revised if row["messages"]]
    if not kept:
        raise AlignError(
            f"{job.name}: none of {len(revised)} revisions ended within {settings.max_new_tokens} tokens. "
            f"Allow more: --set {job.name}.max_new_tokens=..."
        )
    write_jsonl(job.work / "conversations.jsonl", kept)
    (job.work / SAMPLED).unlink()
    changed = sum(row["messages"][-1]["content"] != row["draft"] for row in kept)
    metrics = {"completions": len(revised), "kept": len(kept), "changed": changed / len(kept)}
    return Result("conversations", {"form": "none"}, metrics)


class Writer:
    """A policy that answers lists of messages."""

    def __init__(self, sampler: Sampler, role: Role, chat: Chat, settings: ReviseSettings):
        """Answer with the role's adapters, at the settings' temperature."""
        self.sampler, self.role, self.chat, self.settings = sampler, role, chat, settings

    def __call__(self, questions: Sequence[list[Message]], seed: int) -> list[tuple[str, bool]]:
        """One answer to each, and whether it ended its turn."""
        settings = self.settings
        ids = [self.chat.prompt_ids(messages) for messages in questions]
        answers = self.sampler.sample(self.role, ids, 1, settings.max_new_tokens, settings.temperature, self.chat.stop_ids, seed=seed)
        return [(self.chat.text(answer.ids), answer.ended) for (answer,) in answers]


def revise(
    writer: Any,
    drafts: Sequence[tuple[list[Message], str]],
    principles: Sequence[str],
    templates: Sequence[PromptTemplate],
    settings: ReviseSettings,
    first: int,
    meter: Meter | None = None,
) -> list[dict[str, Any]]:
    """Some drafts, each criticised and rewritten `rounds` times.

    Args:
        writer: answers messages; see Writer.
        drafts: prompts with a completion's text.
        principles: one is drawn for each draft and round.
        templates: of the critique and of the revision.
        settings: rounds and seed.
        first: the place of the first draft among all, so that what is drawn does not depend on where a run was stopped.
        meter: is told what is going on.

    Returns:
        For each draft a row: messages that end with its last finished revision (none where it has none), the draft, every critique.
    """
    critique_template, revision_template = templates
    texts = [text for _, text in drafts]
    rows: list[dict[str, Any]] = [{"messages": [], "draft": text, "revisions": []} for text in texts]
    for number in range(settings.rounds):
        seed = settings.seed * 1_000_003 + first * settings.rounds * 2 + number * 2
        drawn = [random.Random(f"{settings.seed} {first + at} {number}").choice(principles) for at in range(len(drafts))]
        fields = [
            {"prompt": as_text(prompt), "completion": text, "principle": principle}
            for (prompt, _), text, principle in zip(drafts, texts, drawn, strict=True)
        ]
        if meter:
            meter.phase(f"critique {number + 1} of {settings.rounds}")
        critiques = [critique for critique, _ in writer([critique_template.fill(**each) for each in fields], seed)]
        if meter:
            meter.phase(f"revision {number + 1} of {settings.rounds}")
        questions = [revision_template.fill(**each, critique=critique) for each, critique in zip(fields, critiques, strict=True)]
        for at, (revision, ended) in enumerate(writer(questions, seed + 1)):
            rows[at]["revisions"].append({"principle": drawn[at], "critique": critiques[at], "revision": revision, "ended": ended})
            if ended and revision:
                texts[at] = revision
                rows[at]["messages"] = [*drafts[at][0], {"role": "assistant", "content": revision}]
    return rows


def _read(path: Path) -> list[dict[str, Any]]:
    """What a stopped run has revised, up to the last whole batch."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")] if path.is_file() else []
    rows = [json.loads(line) for line in lines[: len(lines) // AT_ONCE * AT_ONCE]]
    if path.is_file():
        write_jsonl(path, rows)
    return rows
