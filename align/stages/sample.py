"""Sampling: several completions of each prompt, by one or several policies, at one or several temperatures; kept as rows of text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.artifact import Artifact
from align.chat import Chat
from align.data.tokenise import prompt_ids
from align.errors import AlignError
from align.model.generate import Completion
from align.model.load import Sampler, each_policy, load_role
from align.model.trunk import Trunk
from align.plan import COMPLETIONS, SAMPLED
from align.progress import say
from align.records import write_jsonl
from align.run import Job, Result
from align.settings import SampleSettings

AT_ONCE = 32  # prompts between two writes: what a killed run must sample again


def run(job: Job) -> Result:
    """Sample, going on from what a stopped run has written, and group the completions by prompt."""
    settings: SampleSettings = job.settings
    policies = [job.parents[role] for role in job.parents if role.startswith("policies.")]
    names = policy_names(policies)
    meter = job.meter(unit="prompts")
    done = _sampled_before(job.work / SAMPLED)
    prompts: list[dict[str, Any]] = []

    def sample_policy(number: int, policy: Artifact | None, trunk: Trunk, chat: Chat) -> None:
        rows = prompt_ids(job.name, job.data["prompts"], chat, settings.max_bad_rows, settings.max_prompt_tokens, job.work)
        rows = rows[: settings.max_prompts]
        prompts[:] = [record for record, _ in rows]
        chunks = [range(start, min(start + AT_ONCE, len(rows))) for start in range(0, len(rows), AT_ONCE)]
        total = len(policies) * len(settings.temperatures) * len(chunks)
        if number == 0:
            meter.begin(total, done)
        role = load_role(trunk, policy)
        sampler = Sampler(trunk)
        for place, temperature in enumerate(settings.temperatures):
            for part, chunk in enumerate(chunks):
                step = (number * len(settings.temperatures) + place) * len(chunks) + part
                if step < done:
                    continue
                completions = sampler.sample(
                    role,
                    [rows[at][1] for at in chunk],
                    settings.completions_per_prompt,
                    settings.max_new_tokens,
                    temperature,
                    chat.stop_ids,
                    seed=settings.seed * 1_000_003 + step,
                )
                found = [[_as_row(c, chat, names[number], temperature) for c in of_prompt] for of_prompt in completions]
                line = {"step": step, "prompts": list(chunk), "completions": found}
                with (job.work / SAMPLED).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                meter.step(step + 1, {}, len(chunk))

    each_policy(job.base, policies, job.dtype, sample_policy)
    meter.close()
    by_prompt: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for line in _lines(job.work / SAMPLED):
        for at, completions in zip(line["prompts"], line["completions"], strict=True):
            by_prompt[at] += completions
    metrics = _write(job, prompts, by_prompt)
    (job.work / SAMPLED).unlink()
    return Result("completions", {"form": "none"}, metrics, {}, {"prompts": {"used": len(prompts)}})


def policy_names(policies: list[Artifact | None]) -> list[str]:
    """What to call each policy: its stage's name, with a number where two have the same."""
    names = [policy.name if policy else "base" for policy in policies]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, 1)]


def _as_row(completion: Completion, chat: Chat, policy: str, temperature: float) -> dict[str, Any]:
    text = chat.text(completion.ids)
    return {"text": text, "policy": policy, "temperature": temperature, "tokens": len(completion.ids), "ended": completion.ended}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the file; a killed run may have left half a one at its end."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                yield json.loads(line)


def _sampled_before(path: Path) -> int:
    """Steps that a stopped run has written; anything after the last whole line is dropped."""
    lines = list(_lines(path))
    if path.is_file():
        write_jsonl(path, lines)
    return len(lines)


def _write(job: Job, prompts: list[dict[str, Any]], by_prompt: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """completions.jsonl and its numbers. Completions without text, and cut ones unless they are wanted, are left out and counted."""
    every = [completion for of_prompt in by_prompt for completion in of_prompt]
    kept = [[c for c in of_prompt if c["text"] and (c["ended"] or job.settings.keep_cut)] for of_prompt in by_prompt]
    rows = [{"prompt": prompt["prompt"], "completions": of_prompt} for prompt, of_prompt in zip(prompts, kept, strict=True) if of_prompt]
    count = sum(len(row["completions"]) for row in rows)
    if not rows:
        raise AlignError(
            f"{job.name}: none of {len(every)} completions ended its turn within {job.settings.max_new_tokens} tokens. "
            f"Allow more (--set {job.name}.max_new_tokens=...), or keep cut ones: --set {job.name}.keep_cut=true"
        )
    if count < len(every):
        say(f"  {job.name}: {len(every) - count} of {len(every)} completions were cut or empty and are left out")
    write_jsonl(job.work / COMPLETIONS, rows)
    return {
        "prompts": len(rows),
        "completions": count,
        "length": sum(c["tokens"] for c in every) / len(every),
        "ended": sum(c["ended"] for c in every) / len(every),
    }
