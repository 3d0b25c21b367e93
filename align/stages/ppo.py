"""PPO with a KL penalty to the policy it starts from; policy, reference, reward models and value on one trunk.

A round: sample completions, score them, turn scores and KL into per-token advantages, then a few passes of clipped updates.
Log-probabilities of the round are recomputed on the very rows that the first pass updates, so its ratios are 1 to the bit.

This file is the order of things. Each thing is a file of align/learn, best read in this order: prompts, rollouts, scores, shaping,
advantages, losses, updates, controller, watch; session.py is what they all work with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from align.learn.checkpoint import load_checkpoint, save_checkpoint
from align.learn.controller import Evaluations, next_kl_coef
from align.learn.optimise import Means
from align.learn.prompts import PromptRow, prompts_of_round
from align.learn.rollouts import Rollout, Sampled, ended, estimate_advantages, lengths, score_rollouts
from align.learn.round_metrics import Clock, check_sampler, rollout_metrics, sample_rows, value_metrics
from align.learn.scores import RewardFailure, Scores, score_parts
from align.learn.session import Session, open_session
from align.learn.shaping import RunningScores, scores_that_count, shape_scores
from align.learn.updates import minibatches, update_step
from align.learn.watch import Watch
from align.model.load import largest_change_at_start, own_model, save_model
from align.model.packing import Example, Row, pack
from align.ngrams import repetition
from align.progress import Meter, say
from align.records import write_jsonl
from align.run import Job, Result

SAMPLES_KEPT = 8  # completions of a round written to samples/


@dataclass
class State:
    """What a run carries from round to round beside weights and optimizer. A checkpoint holds it as JSON."""

    kl_coef: float
    running: RunningScores = field(default_factory=RunningScores)
    evaluations: Evaluations = field(default_factory=Evaluations)
    watch: Watch = field(default_factory=Watch)
    checks: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last round

    @classmethod
    def of(cls, stored: dict[str, Any]) -> State:
        """From a checkpoint."""
        parts = {"running": RunningScores, "evaluations": Evaluations, "watch": Watch}
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in stored.items()})


# The run --------------------------------------------------------------------------------------------------------------------


def run(job: Job) -> Result:
    """Train a policy adapter and, for the estimator that has one, a value adapter with head."""
    session = open_session(job)
    trainee, ids = session.learner.trainee, session.prompts[0].ids
    change = largest_change_at_start(trainee, [Example(0, ids, (ids[-4:],))])
    state = train(session, change)
    save_model(trainee.trunk, trainee.chat, trainee.adapter, job.work)
    metrics: dict[str, Any] = dict(state.metrics)
    if state.evaluations.points:
        metrics |= {"best_round": state.evaluations.best_round, "evaluations": state.evaluations.points}
    checks = {**state.checks, **({"warnings": state.watch.told} if state.watch.told else {})}
    used = {"prompts": {"used": len(session.prompts), "heldout": len(session.heldout)}}
    return Result("policy", own_model(trainee.trunk, trainee.chat, "adapter"), metrics, checks, used)


def train(session: Session, change_at_start: float = 0.0) -> State:
    """The rounds, going on from the last checkpoint. It leaves the policy of the best evaluated round, or of the last."""
    settings, job = session.settings, session.job
    best: dict[str, Tensor] = {}  # the policy's adapter at the best evaluation
    optimizer = session.learner.optimizer
    start, stored = load_checkpoint(job.work, session.parameters, optimizer, best)
    state = State.of(stored) if stored else State(settings.kl_coef, checks={"change_at_start": change_at_start})
    meter = job.meter("score", "kl", "length")
    meter.begin(settings.iterations, start)
    done = start
    try:
        while not evaluate_if_due(session, state, best, done, meter) and done < settings.iterations:
            tokens = play_round(session, state, done, meter)
            done += 1
            meter.step(done, state.metrics, tokens)
            for warning in state.watch.look(done, state.metrics, settings):
                say(f"  [yellow]{job.name}, round {done}: {warning}[/]")
            if done % settings.save_every == 0 or done == settings.iterations:
                save_checkpoint(job.work, done, session.parameters, optimizer, asdict(state), best)
    except RewardFailure:
        save_checkpoint(job.work, done, session.parameters, optimizer, asdict(state), best)
        raise
    finally:
        meter.close()
    take_best(session, state, best, done)
    return state


# A round --------------------------------------------------------------------------------------------------------------------


def play_round(session: Session, state: State, iteration: int, meter: Meter) -> int:
    """Sample, score, estimate advantages, update. Returns the tokens of the round's rows; its metrics are left in the state."""
    settings, learner, clock = session.settings, session.learner, Clock()
    meter.phase("sampling")
    prompts = prompts_of_round(session.prompts, iteration, settings)
    sampled = sample(session, prompts, settings.completions_per_prompt, settings.seed * 1_000_003 + iteration, meter)
    clock.lap("sampling", sum(len(c.ids) for one in sampled for c in one.completions))
    first = [pack([sampled[i].example for i in batch], settings.row_tokens) for batch in minibatches(len(sampled), settings, iteration, 0)]
    rows = [row for batch in first for row in batch]
    tokens = sum(row.ids.numel() for row in rows)
    meter.phase("scoring")
    rollouts = score_rollouts(learner.trainee, learner.value, sampled, rows, settings.temperature)
    scores = score(session, state, rollouts, rows)
    metrics = rollout_metrics(rollouts, scores, state.kl_coef)
    if iteration == 0:
        check_sampler(metrics["sampler_mismatch"])
        state.checks["kl_at_start"] = float(max((r.old_logprobs - r.ref_logprobs).abs().max() for r in rollouts))
    estimate_advantages(rollouts, scores.final, state.kl_coef, settings)
    if settings.has_value:
        metrics |= value_metrics(rollouts)
    clock.lap("scoring", tokens)
    updated, passes = update(session, state, rollouts, first, iteration, meter)
    clock.lap("updating", tokens * passes)
    state.metrics = {**metrics, **updated, **clock.rates}
    if settings.kl_target is not None:
        state.kl_coef = next_kl_coef(state.kl_coef, metrics["kl"], len(scores.raw), settings.kl_target, settings.kl_horizon)
    if iteration % settings.samples_every == 0 or iteration + 1 == settings.iterations:
        folder = session.job.work / "samples"
        folder.mkdir(exist_ok=True)
        table = sample_rows(rollouts, scores, learner.trainee.chat, SAMPLES_KEPT)
        write_jsonl(folder / f"round-{iteration + 1:04d}.jsonl", table)
    return tokens


def sample(session: Session, prompts: Sequence[PromptRow], completions_per_prompt: int, seed: int, meter: Meter) -> list[Sampled]:
    """Completions of the prompts, from the policy's own law: no top-p, no top-k, no penalty."""
    trainee, settings = session.learner.trainee, session.settings
    sampled = session.sampler.sample(
        trainee.role,
        [prompt.ids for prompt in prompts],
        completions_per_prompt,
        settings.max_new_tokens,
        settings.temperature,
        trainee.chat.stop_ids,
        seed=seed,
        on_progress=lambda done: meter.phase(f"sampling, {done} of {len(prompts)} prompts"),
    )
    return [
        Sampled(
            prompt, Example(i, prompt.ids, tuple(c.ids for c in completions)), completions, [trainee.chat.text(c.ids) for c in completions]
        )
        for i, (prompt, completions) in enumerate(zip(prompts, sampled, strict=True))
    ]


def score(session: Session, state: State, rollouts: Sequence[Rollout], rows: Sequence[Row]) -> Scores:
    """Every reward's scores, their weighted sum, and what the round makes of it."""
    parts = score_parts(session.scorers, [rollout.sampled for rollout in rollouts], rows, session.place)
    raw = torch.stack([session.weights[name] * part for name, part in parts.items()]).sum(0)
    finished = ended(rollouts)
    state.running.add(scores_that_count(raw, finished, session.settings))
    return Scores(parts, raw, shape_scores(raw, finished, lengths(rollouts), state.running, session.settings))


def update(
    session: Session, state: State, rollouts: Sequence[Rollout], first: Sequence[Sequence[Row]], iteration: int, meter: Meter
) -> tuple[dict[str, float], int]:
    """A few passes over the rollouts, each in an order of its own; `first` are the rows of the first one's minibatches.

    Returns:
        The updates' metrics, and the passes that were begun.
    """
    settings, means, steps = session.settings, Means(), 0
    peaks: dict[str, float] = {}
    for epoch in range(settings.epochs):
        meter.phase(f"updating, pass {epoch + 1} of {settings.epochs}")
        for number, batch in enumerate(minibatches(len(rollouts), settings, iteration, epoch)):
            rows = first[number] if epoch == 0 else pack([rollouts[i].sampled.example for i in batch], settings.row_tokens)
            found = update_step(session.learner, rollouts, rows, iteration, state.kl_coef)
            means.add(found.sums)
            peaks = {name: max(peaks.get(name, 0.0), peak) for name, peak in found.peaks.items()}
            if "largest_log_ratio" in peaks:
                state.checks.setdefault("ratio_off_1_at_start", peaks["largest_log_ratio"])
            if found.called_off:
                return {**means.means(), **peaks, "updates": float(steps)}, epoch + 1
            steps += 1
    return {**means.means(), **peaks, "updates": float(steps)}, settings.epochs


# The best round -------------------------------------------------------------------------------------------------------------


def evaluate_if_due(session: Session, state: State, best: dict[str, Tensor], done: int, meter: Meter) -> bool:
    """Evaluate the policy on the held-out prompts where it is time, keeping its adapter if it is the best.

    Returns:
        Whether the run should end here.
    """
    settings, evaluations = session.settings, state.evaluations
    if not session.heldout or (done % settings.eval_every and done != settings.iterations):
        return False
    if done not in [point["round"] for point in evaluations.points]:
        meter.phase("evaluating on held-out prompts")
        price = settings.kl_coef * (state.running.deviation if settings.scale_scores else 1.0)
        if evaluations.add({"round": done, **evaluate(session, meter)}, price, settings.max_kl):
            best |= {name: parameter.detach().cpu().clone() for name, parameter in session.learner.trainee.parameters.items()}
    reason = evaluations.reason_to_end(settings)
    if reason and done < settings.iterations:
        say(f"  [yellow]{session.job.name}: ended after round {done} of {settings.iterations}: {reason}[/]")
    return bool(reason)


def evaluate(session: Session, meter: Meter) -> dict[str, float]:
    """One completion of each held-out prompt, from the same random numbers every time: score, KL, length, what ends, what repeats."""
    settings, trainee = session.settings, session.learner.trainee
    sampled = sample(session, session.heldout, 1, (settings.seed + 1) * 1_000_003 - 1, meter)
    rows = pack([one.example for one in sampled], settings.row_tokens)
    rollouts = score_rollouts(trainee, None, sampled, rows, settings.temperature)
    parts = score_parts(session.scorers, sampled, rows, session.place)
    finished = ended(rollouts)
    plain = settings.model_copy(update={"centre_scores": False, "scale_scores": False, "clip_scores": None})

    def mean(scores: Tensor) -> float:  # a reward model judges whole completions: one that was cut has its own score
        return float(shape_scores(scores, finished, lengths(rollouts), RunningScores(), plain).mean())

    chosen = {settings.choose_by: 1.0} if settings.choose_by is not None else session.weights
    return {
        "score": mean(torch.stack([weight * parts[name] for name, weight in chosen.items()]).sum(0)),
        "kl": float(torch.cat([r.old_logprobs - r.ref_logprobs for r in rollouts]).sum()) / len(rollouts),
        "length": float(lengths(rollouts).float().mean()),
        "ended": float(finished.float().mean()),
        "repetition": fmean(repetition(text) for one in sampled for text in one.texts),
        **{f"score/{name}": mean(part) for name, part in parts.items()},
    }


def take_best(session: Session, state: State, best: dict[str, Tensor], done: int) -> None:
    """Put the best evaluated round's adapter back, where there is one and it is not the last."""
    chosen = state.evaluations.best_round
    if chosen is None or chosen == done:
        return
    what = f"the policy after round {chosen}" if chosen else "the policy it began with: no round was better"
    say(f"  {session.job.name}: of {len(state.evaluations.points)} evaluations the best is kept, {what}")
    with torch.no_grad():
        for name, parameter in session.learner.trainee.parameters.items():
            parameter.copy_(best[name])
