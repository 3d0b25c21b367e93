"""Reward model: an adapter and a head that score a whole completion, learned from preferences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from align.confidence import wilson_interval
from align.data.tokenise import DEMONSTRATIONS, Examples, demonstrations, prepare
from align.learn.graded import Graded, breakdown
from align.learn.losses import bradley_terry_loss
from align.learn.optimise import Sums, Totals, evaluate, train
from align.model.forward import forward_scores
from align.model.load import HEAD, Trainee, largest_change_at_start, open_trainee, own_model, save_model, save_probes
from align.model.packing import Example, Row, pack
from align.run import Job, Result
from align.settings import RewardSettings

PROBE_PAIRS = 8


class BradleyTerry:
    """Cross-entropy of each pair's probability, averaged over the pairs of the optimizer step."""

    def __init__(self, trainee: Trainee, probability: Tensor, margin: Tensor, settings: RewardSettings):
        """Learn the trainee's role; `probability` and `margin` hold the pairs' labels by the example's index."""
        self.trainee, self.probability, self.margin, self.settings = trainee, probability, margin, settings
        self.differences: dict[int, float] = {}  # score of chosen minus rejected, of every pair that was last seen without gradients

    def totals(self, examples: Sequence[Example]) -> Totals:
        """Pairs."""
        return {"pairs": len(examples)}

    def __call__(self, row: Row, totals: Totals) -> tuple[Tensor, Sums]:
        """The row's share of the loss, and how often the score agrees with the label (where the label says anything)."""
        scores = forward_scores(self.trainee.trunk, self.trainee.role, row)
        chosen, rejected = scores.view(-1, 2).unbind(1)
        probability = self.probability[row.indices].to(scores.device)
        margin = self.margin[row.indices].to(scores.device) * self.settings.margins
        if not torch.is_grad_enabled():
            self.differences |= zip(row.indices, (chosen - rejected).tolist(), strict=True)
        losses = bradley_terry_loss(chosen, rejected, probability, margin, self.settings.centering)
        return losses.sum() / totals["pairs"], {
            "loss": (float(losses.detach().sum()), len(losses)),
            **agreement(chosen - rejected, probability),
        }


def agreement(difference: Tensor, probability: Tensor) -> Sums:
    """How often a positive difference meets a label in favour of chosen, and the mean difference; undecided labels are left out."""
    decided = probability != 0.5
    agree = ((difference > 0) == (probability > 0.5))[decided]
    return {
        "accuracy": (float(agree.sum()), int(decided.sum())),
        "margin": (float(difference.detach().sum()), len(difference)),
    }


def run(job: Job) -> Result:
    """Train a reward model, centre its scores, and record probe scores."""
    settings: RewardSettings = job.settings
    trainee = open_trainee(job, wants_head=True)
    data = prepare(job.name, "preferences", job.data["preferences"], trainee.chat, settings, job.work)
    checks = {"change_at_start": largest_change_at_start(trainee, list(data.training[:2])) if trainee.adapter else 0.0}
    objective = BradleyTerry(trainee, data.probability, data.margin, settings)
    trainee.trunk.dropout = True
    meter = job.meter("loss", "accuracy", "heldout_accuracy")
    metrics = train(objective, trainee.parameters, data.training, data.heldout, settings, job.work, meter, data.where)
    trainee.trunk.dropout = False
    graded = grade(objective, data, settings.row_tokens)
    offset, centred_on = _centre(job, trainee, data)
    save_model(trainee.trunk, trainee.chat, trainee.adapter, job.work)
    trainee.trunk.heads[job.name].save(job.work / HEAD)
    trainee.trunk.autocast = False  # as it will be when it is loaded
    probes = save_probes(trainee.trunk, trainee.role, [*data.heldout[:PROBE_PAIRS], *data.training[:PROBE_PAIRS]][:PROBE_PAIRS], job.work)
    facts = {**metrics, **baselines(data, metrics), **({"heldout_by": breakdown(graded)} if graded else {}), "score_offset": offset}
    model = own_model(trainee.trunk, trainee.chat, "adapter" if trainee.adapter else "full")
    return Result(
        "reward_model",
        model,
        facts,
        {**checks, "probe_scores": probes, "centred_on": centred_on},
        {"preferences": data.facts},
    )


def _centre(job: Job, trainee: Trainee, data: Examples) -> tuple[float, str]:
    """Subtract the mean score of the demonstrations (Huang et al. 2024, arXiv 2403.17031), or of the chosen completions."""
    if "demonstrations" in job.data:
        examples = demonstrations(job.name, job.data["demonstrations"], trainee.chat, job.settings)
        what = "demonstrations"
    else:
        examples = [Example(e.index, e.prompt, e.completions[:1]) for e in data.training[:DEMONSTRATIONS]]
        what = "chosen completions"
    scores = score(trainee, examples, job.settings.row_tokens)
    head = trainee.trunk.heads[job.name]
    with torch.no_grad():
        head.offset += scores.mean()
    return float(head.offset), what


def score(trainee: Trainee, examples: list[Example], row_tokens: int) -> Tensor:
    """Scores of every completion. Shape (completions,), in the order of the rows."""
    with torch.no_grad():
        return torch.cat([forward_scores(trainee.trunk, trainee.role, row) for row in pack(examples, row_tokens)]).float()


def grade(objective: BradleyTerry, data: Examples, row_tokens: int) -> list[Graded]:
    """Each held-out pair of which people prefer one side, beside what its scores said when it was evaluated last."""
    not_seen = [example for example in data.heldout if example.index not in objective.differences]
    evaluate(objective, not_seen, row_tokens)  # some where a stopped run had made its last step
    found = []
    for example in data.heldout:
        probability, difference = float(data.probability[example.index]), objective.differences[example.index]
        if probability != 0.5:
            chosen, rejected = map(len, example.completions)
            better, worse = (chosen, rejected) if probability > 0.5 else (rejected, chosen)
            right, sure = (difference > 0) == (probability > 0.5), 1 / (1 + math.exp(-abs(difference)))
            found.append(Graded(right, sure, better, worse, data.where[example.index].rpartition(":")[0]))
    return found


def baselines(data: Examples, heldout: dict[str, float]) -> dict[str, float | list[float]]:
    """The interval of the held-out accuracy, and what 'the longer one' would reach on the same pairs."""
    pairs = [(e, float(data.probability[e.index])) for e in data.heldout]
    decided = [(e, p) for e, p in pairs if p != 0.5]
    if not decided:
        return {}
    right = 0.0
    for example, probability in decided:
        longer = len(example.completions[0]) - len(example.completions[1])
        right += 0.5 if longer == 0 else float((longer > 0) == (probability > 0.5))
    accuracy = heldout["heldout_accuracy"]
    return {
        "heldout_pairs": len(decided),
        "heldout_accuracy_interval": wilson_interval(accuracy * len(decided), len(decided)),
        "longer_is_better_accuracy": right / len(decided),
    }
