"""Direct preference optimisation: raise the policy's log-ratio of chosen over rejected, against the policy it starts from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.data.tokenise import prepare
from align.errors import AlignError
from align.learn.losses import PairLogps, dpo_loss, implicit_rewards
from align.learn.optimise import Sums, Totals, count_steps, epoch_batches, train
from align.model.forward import forward
from align.model.load import Trainee, open_trainee, own_model, save_model
from align.model.packing import Example, Row, pack
from align.model.trunk import Role
from align.progress import say, tracked
from align.run import Job, Result
from align.settings import DPOSettings
from align.stages.reward import agreement, baselines

REFERENCE = "reference_logps.safetensors"
LOSS_AT_START = {  # of a policy that equals its reference; simpo has no reference
    "sigmoid": lambda beta: math.log(2),
    "ipo": lambda beta: (1 / (2 * beta)) ** 2,
    "hinge": lambda beta: 1.0,
    "apo_zero": lambda beta: 1.0,
    "sigmoid_norm": lambda beta: math.log(2),
}


class DirectPreference:
    """A loss of the DPO family averaged over the pairs of the optimizer step, and optionally SFT on the chosen completions."""

    def __init__(self, trainee: Trainee, probability: Tensor, reference: Tensor, settings: DPOSettings):
        """Learn the trainee's role; labels and the reference's (chosen, rejected) log-probabilities are by the example's index."""
        self.trainee, self.probability, self.reference, self.settings = trainee, probability, reference, settings

    def totals(self, examples: Sequence[Example]) -> Totals:
        """Pairs, and tokens of chosen completions for the SFT term."""
        return {"pairs": len(examples), "chosen_tokens": sum(len(example.completions[0]) for example in examples)}

    def __call__(self, row: Row, totals: Totals) -> tuple[Tensor, Sums]:
        """The row's share of the loss, and the implicit rewards."""
        settings = self.settings
        logps = pair_logps(self.trainee, self.trainee.role, row, self.reference)
        probability = self.probability[row.indices].to(logps.chosen.device)
        losses = dpo_loss(settings.loss, logps, probability, settings.beta, settings.simpo_gamma)
        loss = losses.sum() / totals["pairs"] - settings.sft_weight * logps.chosen.sum() / totals["chosen_tokens"]
        chosen, rejected = (settings.beta * reward.detach() for reward in implicit_rewards(logps))
        return loss, {
            "loss": (float(losses.detach().sum()), len(losses)),
            "chosen_reward": (float(chosen.sum()), len(chosen)),
            "rejected_reward": (float(rejected.sum()), len(rejected)),
            **agreement(chosen - rejected, probability),
        }


def pair_logps(trainee: Trainee, role: Role, row: Row, reference: Tensor) -> PairLogps:
    """Summed log-probabilities of both completions of each example in the row, beside the reference's."""
    row = row.to(trainee.trunk.device)
    logprobs = forward(trainee.trunk, role, row).logprobs
    chosen, rejected = row.sum_per_completion(logprobs).view(-1, 2).unbind(1)
    chosen_tokens, rejected_tokens = row.tokens_per_completion().view(-1, 2).unbind(1)
    ref_chosen, ref_rejected = reference[row.indices].to(chosen.device).unbind(1)
    return PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)


def reference_logps(trainee: Trainee, rows: Iterable[Row], count: int, path: Path) -> Tensor:
    """The reference's (chosen, rejected) log-probabilities by index, made once and kept in the artifact. Shape (count, 2).

    They are computed on the very rows that training begins with, so that the first step's log-ratios are 0 to the bit.
    """
    if path.is_file():
        return load_file(path)["logps"]
    logps = torch.full((count, 2), float("nan"))
    with torch.no_grad():
        for row in rows:
            pair = pair_logps(trainee, trainee.before, row, torch.zeros(count, 2))
            logps[row.indices] = torch.stack([pair.chosen, pair.rejected], 1).cpu()
    temporary = path.with_suffix(".new")
    save_file({"logps": logps}, temporary)
    temporary.replace(path)
    return logps


def run(job: Job) -> Result:
    """Train an adapter (or all weights) on preferences."""
    settings: DPOSettings = job.settings
    trainee = open_trainee(job)
    data = prepare(job.name, "preferences", job.data["preferences"], trainee.chat, settings, job.work)
    first_epoch = epoch_batches(data.training, settings, 0)
    say(f"  {job.name}: log-probabilities of the reference")
    steps = min(len(first_epoch), count_steps(len(data.training), settings))  # pairs that training won't come to need none
    batches = chain(islice(first_epoch, steps), [pack(data.heldout, settings.row_tokens)])
    rows = chain.from_iterable(tracked(batches, steps + 1, "  log-probabilities of the reference"))
    reference = reference_logps(trainee, rows, len(data.where), job.work / REFERENCE)
    objective = DirectPreference(trainee, data.probability, reference, settings)
    checks = _check_start(objective, first_epoch[0], settings)
    trainee.trunk.dropout = True
    meter = job.meter("loss", "accuracy", "heldout_accuracy")
    metrics = train(objective, trainee.parameters, data.training, data.heldout, settings, job.work, meter, data.where)
    trainee.trunk.dropout = False
    save_model(trainee.trunk, trainee.chat, trainee.adapter, job.work)
    model = own_model(trainee.trunk, trainee.chat, "adapter" if trainee.adapter else "full")
    return Result("policy", model, {**metrics, **baselines(data, metrics)}, checks, {"preferences": data.facts})


def _check_start(objective: DirectPreference, rows: list[Row], settings: DPOSettings) -> dict[str, float]:
    """Before the first step the policy is its reference: the margin is 0 and the loss is what that gives (ln 2 for DPO).

    Raises:
        AlignError: where it is not, which means the wrong reference.
    """
    totals = objective.totals([example for row in rows for example in row.examples])
    with torch.no_grad():
        parts = [objective(row, totals)[1] for row in rows]
    loss = sum(part["loss"][0] for part in parts) / totals["pairs"]
    margin = sum(part["margin"][0] for part in parts) / totals["pairs"]
    if settings.loss in LOSS_AT_START:
        expected = LOSS_AT_START[settings.loss](settings.beta)
        if not abs(loss - expected) <= 1e-4 * max(1.0, expected):
            raise AlignError(
                f"dpo: the loss before the first step is {loss:.6f}; expected {expected:.6f}. "
                "The reference is not what training starts from."
            )
    return {"loss_at_start": loss, "margin_at_start": margin}
