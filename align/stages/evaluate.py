"""Evaluation: every policy answers the same prompts; score, length, KL and end-of-turn rate beside the first policy's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from rich.markup import escape

from align.artifact import Artifact
from align.chat import Chat
from align.confidence import mean_interval, wilson_interval
from align.data.mix import Data
from align.data.originals import original_rows, places_of
from align.data.tokenise import prompt_ids
from align.errors import AlignError
from align.ifeval import Instructions, followed, instructions_of
from align.model.forward import forward, forward_scores
from align.model.generate import Completion
from align.model.load import Sampler, each_policy, load_role, open_trunk, root_identity
from align.model.packing import Example, Row, pack
from align.model.trunk import Role, Trunk
from align.ngrams import distinct, repetition
from align.progress import say
from align.records import Message, write_jsonl
from align.refusals import asks_for_harm, declines
from align.run import Job, Result
from align.settings import EvaluateSettings

SAME_TIMES, SAME_SHARE = 5, 0.25  # answers alike, and the share of the prompts over which they are, that are worth a warning


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
    held_out: dict[str, list[list[float | None]]] = field(default_factory=dict)  # by reward models that nothing was trained against


def run(job: Job) -> Result:
    """Sample, score and compare."""
    settings: EvaluateSettings = job.settings
    policies = [job.parents[role] for role in job.parents if role.startswith("policies.")]
    rewards = [
        artifact
        for role, artifact in job.parents.items()
        if artifact is not None and (role == "reward_model" or role.startswith("held_out."))
    ]
    names = [policy.name if policy else "base" for policy in policies]
    names = [name if names.count(name) == 1 else f"{name} {number + 1}" for number, name in enumerate(names)]
    meter = job.meter("score", unit="prompts")
    meter.begin(len(policies))
    rows: list[tuple[dict[str, Any], tuple[int, ...]]] = []
    said: list[Said] = []

    def of_policy(number: int, policy: Artifact | None, trunk: Trunk, chat: Chat) -> list[Answers]:
        meter.phase(f"sampling {names[number]}")
        if not rows:
            rows.extend(prompt_ids(job.name, job.data["prompts"], chat, settings.max_bad_rows, folder=job.work)[: settings.max_prompts])
            said.extend(_said(job.data["prompts"], [record for record, _ in rows], settings.check_instructions))
        prompts = [ids for _, ids in rows]
        answer = _answer(names[number], policy, trunk, chat, prompts, settings, job.base.identity)
        found = [answer]
        if number == 0:
            answer.kl = [[0.0] * len(of_prompt) for of_prompt in answer.completions]
            if settings.best_of is not None:
                found.append(_best_of(settings.best_of, answer, policy, rewards[0], trunk, chat, prompts, job))
        elif root_identity(job.base, policy) == root_identity(job.base, policies[0]):
            answer.kl = _kl(trunk, load_role(trunk, policy), load_role(trunk, policies[0]), answer.examples, settings)
        for reward in rewards:
            if root_identity(job.base, policy) == root_identity(job.base, reward):
                role = load_role(trunk, reward)
                for each in found:
                    _keep(each, reward, rewards, _scores(trunk, role, each, settings))
        meter.step(number + 1, {}, len(rows))
        return found

    answers = [answer for found in each_policy(job.base, policies, job.dtype, of_policy) for answer in found]
    meter.close()
    for reward in rewards:
        unscored = [answer for answer in answers if not (answer.scores if reward is rewards[0] else reward.name in answer.held_out)]
        if unscored:
            _score_apart(job, reward, rewards, unscored, settings)
    table = [
        {
            **compare(answer, answers[0]),
            "declined": declined(answer.texts, [of.harmful for of in said]),
            "instructions": followed(answer.texts, [of.instructions for of in said]),
        }
        for answer in answers
    ]
    (job.work / "results.json").write_text(json.dumps({"prompts": len(rows), "policies": table}, indent=1) + "\n")
    write_jsonl(job.work / "samples.jsonl", sample_rows([record["prompt"] for record, _ in rows], answers))
    warnings = says_the_same({answer.name: answer.texts for answer in answers})
    for warning in warnings.values():
        say(f"  [yellow]{job.name}: {escape(warning)}[/]")
    checks = {"warnings": warnings} if warnings else {}
    return Result("evaluation", {"form": "none"}, {"policies": table, "prompts": len(rows)}, checks, {"prompts": {"used": len(rows)}})


class Said(NamedTuple):
    """What a prompt's row says of it."""

    harmful: bool | None
    instructions: Instructions | None


def _said(data: Data, records: list[dict[str, Any]], check_instructions: bool) -> list[Said]:
    """Read before anything is sampled: what cannot be checked is refused."""
    places = places_of(data, records)
    found = []
    for row, record, place in zip(original_rows(data, places), records, places, strict=True):
        words, where = record["prompt"][-1]["content"], data.place(place)
        found.append(Said(asks_for_harm(row), instructions_of(row, words, where) if check_instructions else None))
    return found


def _answer(
    name: str,
    policy: Artifact | None,
    trunk: Trunk,
    chat: Chat,
    prompts: list[tuple[int, ...]],
    settings: EvaluateSettings,
    base: str,
    count: int | None = None,
) -> Answers:
    """`count` completions of each prompt, as many as the settings say unless given."""
    role = load_role(trunk, policy)  # before the sampler, which merges only where there are adapters
    completions = Sampler(trunk).sample(
        role,
        prompts,
        count or settings.samples_per_prompt,
        settings.max_new_tokens,
        settings.temperature,
        chat.stop_ids,
        seed=settings.seed + (1 if count else 0),
    )
    return _answers(name, policy.identity if policy else base, chat, prompts, completions)


def _answers(name: str, identity: str, chat: Chat, prompts: list[tuple[int, ...]], completions: list[list[Completion]]) -> Answers:
    examples = [Example(i, p, tuple(c.ids for c in cs)) for i, (p, cs) in enumerate(zip(prompts, completions, strict=True))]
    return Answers(name, identity, examples, completions, [[chat.text(c.ids) for c in cs] for cs in completions], [], None)


def _best_of(
    count: int,
    first: Answers,
    policy: Artifact | None,
    reward: Artifact,
    trunk: Trunk,
    chat: Chat,
    prompts: list[tuple[int, ...]],
    job: Job,
) -> Answers:
    """The best of some completions by the reward model: what any optimisation against it should be held against.

    Its KL to the policy is log n - (n - 1) / n at most (Stiennon et al. 2020, arXiv 2009.01325, app. G.3), and nearly that.

    Raises:
        AlignError: where the reward model stands on other weights.
    """
    if root_identity(job.base, policy) != root_identity(job.base, reward):
        raise AlignError(
            f"{job.name}.best_of: the reward model {reward.name!r} stands on other weights than {first.name}; leave best_of out."
        )
    drawn = _answer(first.name, policy, trunk, chat, prompts, job.settings, first.identity, count)
    scores = _scores(trunk, load_role(trunk, reward), drawn, job.settings)
    best = [
        [max(zip(completions, of_prompt, strict=True), key=lambda each: -math.inf if each[1] is None else each[1])[0]]
        for completions, of_prompt in zip(drawn.completions, scores, strict=True)
    ]
    answer = _answers(f"best of {count} of {first.name}", first.identity, chat, prompts, best)
    answer.kl = [[math.log(count) - (count - 1) / count] for _ in prompts]
    return answer


def _keep(answer: Answers, reward: Artifact, rewards: list[Artifact], scores: list[list[float | None]]) -> None:
    if reward is rewards[0]:
        answer.scores = scores
    else:
        answer.held_out[reward.name] = scores


@torch.no_grad()
def _scores(trunk: Trunk, reward: Role, answer: Answers, settings: EvaluateSettings) -> list[list[float | None]]:
    """The reward model's score of each completion that ended its turn."""
    found: dict[int, list[float]] = {}
    for row in pack(answer.examples, settings.row_tokens):
        found |= _by_example(row, forward_scores(trunk, reward, row))
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


def _score_apart(job: Job, reward: Artifact, rewards: list[Artifact], answers: list[Answers], settings: EvaluateSettings) -> None:
    """Score with a reward model that stands on weights of its own; it must share the policies' tokenizer."""
    trunk, chat = open_trunk(job.base, reward, job.dtype)
    role = load_role(trunk, reward)
    for answer in answers:
        policy = next((p for p in job.parents.values() if p and p.identity == answer.identity), None)
        if policy and policy.facts["model"]["tokenizer"] != chat.tokenizer_fingerprint:
            raise AlignError(
                f"{job.name}: policy {answer.name!r} and reward model {reward.name!r} have different tokenizers; expected the same."
            )
        _keep(answer, reward, rewards, _scores(trunk, role, answer, settings))


def compare(answer: Answers, first: Answers) -> dict[str, Any]:
    """A policy's line of the table: means with 95 percent intervals, and the difference to the first policy, paired by prompt.

    Scores are of completions that ended their turn; the share that did stands beside them.
    """
    completions = [completion for of_prompt in answer.completions for completion in of_prompt]
    texts = [text for of_prompt in answer.texts for text in of_prompt]
    kl = None if answer.kl is None else fmean(fmean(of_prompt) for of_prompt in answer.kl)
    length = fmean(len(c.ids) for c in completions)
    return {
        "name": answer.name,
        "identity": answer.identity,
        **_compared(answer.scores, None if answer is first else first.scores),
        "held_out": {
            name: _compared(scores, None if answer is first else first.held_out.get(name)) for name, scores in answer.held_out.items()
        },
        "kl": kl,
        "kl_per_token": None if kl is None else kl / length,
        "length": length,
        "ended": sum(c.ended for c in completions) / len(completions),
        "distinct_2": distinct(texts, 2),
        "repetition": fmean(repetition(text) for text in texts),
    }


def says_the_same(texts: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, str]:
    """Policies that answer many prompts alike, which a reward model may well like: a warning each, by name.

    Args:
        texts: by a policy's name, for each prompt its answers, of which the first counts.
    """
    found = {}
    for name, of_prompts in texts.items():
        text, times = Counter(of_prompt[0].strip() for of_prompt in of_prompts).most_common(1)[0]
        if times >= SAME_TIMES and times > SAME_SHARE * len(of_prompts):
            what, which = ("the same", f": {text[:80]!r}") if text else ("nothing", "")
            found[name] = f"{name} says {what} to {times} of {len(of_prompts)} prompts{which}. Read its answers before its score."
    return found


def _compared(scores: list[list[float | None]], first: list[list[float | None]] | None) -> dict[str, Any]:
    """Mean score with its interval, and the difference to the first policy's scores, paired by prompt."""
    means, first_means = _prompt_means(scores), _prompt_means(first) if first is not None else []
    known = [mean for mean in means if mean is not None]
    pairs = zip(means, first_means, strict=False) if first is not None else ()
    differences = [mean - other for mean, other in pairs if mean is not None and other is not None]
    return {
        "scored": len(known),
        "score": fmean(known) if known else None,
        "score_interval": mean_interval(known),
        "score_spread": pstdev(known) if known else None,
        "compared": len(differences),  # prompts with a score of both
        "difference": fmean(differences) if differences else None,
        "difference_interval": mean_interval(differences),
        "better_share": sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences) if differences else None,
    }


def declined(texts: Sequence[Sequence[str]], harmful: Sequence[bool | None]) -> dict[str, dict[str, Any]]:
    """How many answers decline, of those to prompts that their rows call harmful and of those to the others called harmless.

    Args:
        texts: the answers to each prompt.
        harmful: of each prompt; None where its row does not say.

    Returns:
        For "harmful" and "harmless", where there are any: answers that decline, answers, and the share's 95 percent interval.
    """
    found = {}
    for name, wanted in (("harmful", True), ("harmless", False)):
        answers = [text for of_prompt, asks in zip(texts, harmful, strict=True) if asks is wanted for text in of_prompt]
        if answers:
            count = sum(map(declines, answers))
            found[name] = {"declined": count, "answers": len(answers), "interval": wilson_interval(count, len(answers))}
    return found


def _prompt_means(scores: list[list[float | None]]) -> list[float | None]:
    """The mean score of each prompt's completions; unknown where none of them ended."""
    known = [[score for score in of_prompt if score is not None] for of_prompt in scores]
    return [fmean(scores) if scores else None for scores in known]


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
