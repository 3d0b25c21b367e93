"""Supervised fine-tuning: raise the likelihood of the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from align.errors import AlignError
from align.examples import Examples, prepare
from align.learn.optimise import Sums, Totals, evaluate, train
from align.model.forward import forward
from align.model.load import Trainee, largest_change_at_start, open_trainee, own_model, save_model
from align.model.packing import Example, Row
from align.records import Conversation, first_user_turn, read_rows
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
        return nll / totals["tokens"], {"loss": (float(nll.detach()), int(row.trained_mask.sum()))}


def run(job: Job) -> Result:
    """Train an adapter (or all weights) on conversations."""
    settings = job.settings
    trainee = open_trainee(job)
    path = job.files["data"]
    rows = read_rows(path, Conversation)
    data: Examples[Conversation] = prepare(
        job.name,
        path,
        rows,
        lambda index, row: trainee.chat.conversation(index, row.messages, last_turn_only=settings.train_on == "last"),
        lambda row: first_user_turn(row.messages),
        settings,
    )
    checks = {
        "unsupervised_ends": _check_ends(data, trainee),
        "change_at_start": largest_change_at_start(trainee, data.training[:2]),
    }
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


def _check_ends(data: Examples[Conversation], trainee: Trainee) -> int:
    """Every run of trained tokens must end with the token that ends a turn; returns how many do not, which is 0.

    Raises:
        AlignError: naming the first row where one does not.
    """
    end = trainee.chat.end_of_turn
    for example in [*data.training, *data.heldout]:
        ids, trained = example.completions[0], example.trained[0]
        for at, counts in enumerate(trained):
            last = counts and (at + 1 == len(trained) or not trained[at + 1])
            if last and ids[at] != end:
                raise AlignError(f"{data.where[example.index]}: a trained turn does not end with the end-of-turn token (id {end}).")
    return 0
