"""Evaluation: every policy answers the same prompts; score, length, KL and end-of-turn rate beside the first policy's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import fmean, pstdev, stdev
from typing import Any

import torch

from align.artifact import Artifact
from align.data.tokenise import prompt_ids
from align.errors import AlignError
from align.model.forward import forward, forward_head
from align.model.generate import Completion
from align.model.load import Sampler, load_role, open_trunk, root_identity
from align.model.packing import Example, Row, pack
from align.model.trunk import Role, Trunk
from align.records import Message, write_jsonl
from align.run import Job, Result
from align.settings import EvaluateSettings


@dataclass
class Answers:
    """A policy's completions with what was measured of each, prompt by prompt."""

    name: str
    identity: str
    examples: list[Example]
    completions: list[list[Completion]]
    texts: list[list[str]]
    scores: list[list[float | None]]  # unknown for a completion that was cut: the reward model judges whole ones
    kl: list[list[float]] | None  # to the first policy; unknown where that stands on other weights


def run(job: Job) -> Result:
    """Sample, score and compare."""
    settings: EvaluateSettings = job.settings
    policies = [job.parents[role] for role in job.parents if role.startswith("policies.")]
    reward = job.parents["reward_model"]
    assert reward is not None
    meter = job.meter("score", unit="prompts")
    meter.begin(len(policies))
    names = [policy.name if policy else "base" for policy in policies]
    answers: list[Answers] = []
    rows: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    open_now: tuple[str, Trunk, Any] | None = None
    for number, policy in enumerate(policies):
        root = root_identity(job.base, policy)
        if open_now is None or open_now[0] != root:
            open_now = None  # let the former weights go before the next are loaded
            open_now = (root, *open_trunk(job.base, policy, job.dtype))
        _, trunk, chat = open_now
        name = names[number] if names.count(names[number]) == 1 else f"{names[number]} {number + 1}"
        meter.phase(f"sampling {name}")
        if not rows:
            rows = prompt_ids(job.name, job.data["prompts"], chat, settings.max_bad_rows, folder=job.work)[: settings.max_prompts]
        answer = _answer(name, policy, trunk, chat, [ids for _, ids in rows], settings, job.base.identity)
        if number == 0:
            answer.kl = [[0.0] * len(of_prompt) for of_prompt in answer.completions]
        elif root == root_identity(job.base, policies[0]):
            answer.kl = _kl(trunk, load_role(trunk, policy), load_role(trunk, policies[0]), answer.examples, settings)
        if root == root_identity(job.base, reward):
            answer.scores = _scores(trunk, load_role(trunk, reward), answer, settings)
        answers.append(answer)
        meter.step(number + 1, {}, len(rows))
    meter.close()
    unscored = [answer for answer in answers if not answer.scores]
    if unscored:
        open_now = None
        _score_apart(job, reward, unscored, settings)
    table = [compare(answer, answers[0]) for answer in answers]
    (job.work / "results.json").write_text(json.dumps({"prompts": len(rows), "policies": table}, indent=1) + "\n")
    write_jsonl(job.work / "samples.jsonl", sample_rows([row["prompt"] for row, _ in rows], answers))
    return Result("evaluation", {"form": "none"}, {"policies": table, "prompts": len(rows)}, {}, {"prompts": {"used": len(rows)}})


def _answer(
    name: str, policy: Artifact | None, trunk: Trunk, chat: Any, prompts: list[tuple[int, ...]], settings: EvaluateSettings, base: str
) -> Answers:
    role = load_role(trunk, policy)
    completions = Sampler(trunk).sample(
        role,
        prompts,
        settings.samples_per_prompt,
        settings.max_new_tokens,
        settings.temperature,
        chat.stop_ids,
        seed=settings.seed,
    )
    examples = [Example(i, p, tuple(c.ids for c in cs)) for i, (p, cs) in enumerate(zip(prompts, completions, strict=True))]
    texts = [[chat.text(c.ids) for c in cs] for cs in completions]
    return Answers(name, policy.identity if policy else base, examples, completions, texts, [], None)


@torch.no_grad()
def _scores(trunk: Trunk, reward: Role, answer: Answers, settings: EvaluateSettings) -> list[list[float | None]]:
    """The reward model's score of each completion that ended its turn."""
    found: dict[int, list[float]] = {}
    for row in pack(answer.examples, settings.row_tokens):
        found |= _by_example(row, forward_head(trunk, reward, row).scores)
    return [
        [score if completion.ended else None for score, completion in zip(found[example.index], completions, strict=True)]
        for example, completions in zip(answer.examples, answer.completions, strict=True)
    ]


@torch.no_grad()
def _kl(trunk: Trunk, policy: Role, first: Role, examples: list[Example], settings: EvaluateSettings) -> list[list[float]]:
    """Log pi - log pi_first of each sampled completion at the sampling temperature: its mean estimates KL(pi, pi_first) in nats."""
    found: dict[int, list[float]] = {}
    for row in pack(examples, settings.row_tokens):
        difference = forward(trunk, policy, row, settings.temperature).logprobs - forward(trunk, first, row, settings.temperature).logprobs
        found |= _by_example(row, row.sum_per_completion(difference.cpu()))
    return [found[example.index] for example in examples]


def _by_example(row: Row, per_completion: torch.Tensor) -> dict[int, list[float]]:
    """Per-completion numbers of a row, keyed by the example's index."""
    sizes = [len(example.completions) for example in row.examples]
    return {e.index: part.tolist() for e, part in zip(row.examples, per_completion.cpu().split(sizes), strict=True)}


def _score_apart(job: Job, reward: Artifact, answers: list[Answers], settings: EvaluateSettings) -> None:
    """Score with a reward model that stands on weights of its own; it must share the policies' tokenizer."""
    trunk, chat = open_trunk(job.base, reward, job.dtype)
    role = load_role(trunk, reward)
    for answer in answers:
        policy = next((p for p in job.parents.values() if p and p.identity == answer.identity), None)
        if policy and policy.facts["model"]["tokenizer"] != chat.tokenizer_fingerprint:
            raise AlignError(
                f"{job.name}: policy {answer.name!r} and reward model {reward.name!r} have different tokenizers; expected the same."
            )
        answer.scores = _scores(trunk, role, answer, settings)


def compare(answer: Answers, first: Answers) -> dict[str, Any]:
    """A policy's line of the table: means with 95 percent intervals, and the difference to the first policy, paired by prompt.

    Scores are of completions that ended their turn; the share that did stands beside them.
    """
    means, first_means = _prompt_means(answer), _prompt_means(first)
    scores = [mean for mean in means if mean is not None]
    pairs = zip(means, first_means, strict=True)
    differences = [] if answer is first else [mean - other for mean, other in pairs if mean is not None and other is not None]
    completions = [completion for of_prompt in answer.completions for completion in of_prompt]
    return {
        "name": answer.name,
        "identity": answer.identity,
        "scored": len(scores),
        "score": fmean(scores) if scores else None,
        "score_interval": interval(scores),
        "score_spread": pstdev(scores) if scores else None,
        "compared": len(differences),  # prompts with a score of both
        "difference": fmean(differences) if differences else None,
        "difference_interval": interval(differences),
        "better_share": sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences) if differences else None,
        "kl": None if answer.kl is None else fmean(fmean(of_prompt) for of_prompt in answer.kl),
        "length": fmean(len(c.ids) for c in completions),
        "ended": sum(c.ended for c in completions) / len(completions),
    }


def _prompt_means(answer: Answers) -> list[float | None]:
    """The mean score of each prompt's completions; unknown where none of them ended."""
    known = [[score for score in of_prompt if score is not None] for of_prompt in answer.scores]
    return [fmean(scores) if scores else None for scores in known]


def interval(numbers: list[float]) -> list[float] | None:
    """95 percent interval of a mean by the normal approximation; unknown for fewer than two numbers."""
    if len(numbers) < 2:
        return None
    half = 1.96 * stdev(numbers) / math.sqrt(len(numbers))
    return [fmean(numbers) - half, fmean(numbers) + half]


def sample_rows(prompts: list[list[Message]], answers: list[Answers]) -> list[dict[str, Any]]:
    """For each prompt what every policy answered, with its score."""
    return [
        {
            "prompt": prompt,
            "answers": {
                answer.name: [
                    {"text": t, "score": s, "ended": c.ended}
                    for t, s, c in zip(answer.texts[i], answer.scores[i], answer.completions[i], strict=True)
                ]
                for answer in answers
            },
        }
        for i, prompt in enumerate(prompts)
    ]
