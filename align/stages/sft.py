"""Supervised fine-tuning: raise the likelihood of the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from align.data.tokenise import prepare
from align.learn.optimise import Sums, Totals, evaluate, train
from align.model.forward import forward
from align.model.load import Trainee, largest_change_at_start, open_trainee, own_model, save_model
from align.model.packing import Example, Row
from align.run import Job, Result


class Likelihood:
    """Mean negative log-likelihood of the trained tokens, over the whole optimizer step."""

    def __init__(self, trainee: Trainee):
        """Learn the trainee's role."""
        self.trainee = trainee

    def totals(self, examples: Sequence[Example]) -> Totals:
        """Trained tokens."""
        return {"tokens": sum(example.trained_tokens for example in examples)}

    def __call__(self, row: Row, totals: Totals) -> tuple[Tensor, Sums]:
        """The row's share of the loss."""
        logprobs = forward(self.trainee.trunk, self.trainee.role, row).logprobs
        nll = -row.sum_per_completion(logprobs).sum()
        return nll / totals["tokens"], {"loss": (float(nll.detach()), len(row.targets))}


def run(job: Job) -> Result:
    """Train an adapter (or all weights) on conversations."""
    settings = job.settings
    trainee = open_trainee(job)
    data = prepare(job.name, "data", job.data["data"], trainee.chat, settings, job.work)  # every trained turn ends with its end token
    checks = {"change_at_start": largest_change_at_start(trainee, list(data.training[:2]))}
    objective = Likelihood(trainee)
    before = evaluate(objective, data.heldout, settings.row_tokens)
    trainee.trunk.dropout = True
    meter = job.meter("loss", "heldout_loss")
    metrics = train(objective, trainee.parameters, data.training, data.heldout, settings, job.work, meter, data.where)
    trainee.trunk.dropout = False
    save_model(trainee.trunk, trainee.chat, trainee.adapter, job.work)
    model = own_model(trainee.trunk, trainee.chat, "adapter" if trainee.adapter else "full")
    before = {f"{name}_before": number for name, number in before.items()}
    return Result("policy", model, {**before, **metrics}, checks, {"data": data.facts})
