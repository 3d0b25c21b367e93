"""The one training loop of SFT, the reward model and DPO, and the update step that PPO shares with it."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import Parameter

from align.errors import AlignError
from align.learn.checkpoint import load_checkpoint, save_checkpoint
from align.memory import give_back_memory
from align.model.packing import Example, Row, pack, shuffled_batches
from align.progress import Meter
from align.settings import Training

TIDY_EVERY = 4  # updates: to fault freed memory in again after each costs a tenth of a step
_updates = itertools.count(1)

Totals = dict[str, float]
Sums = dict[str, tuple[float, float]]  # metric -> (sum, number of things summed)


class Objective(Protocol):
    """What a stage learns. Its loss is a sum over the row, divided by totals of the whole optimizer step."""

    def totals(self, examples: Sequence[Example]) -> Totals:
        """What the examples of a step count: tokens, pairs."""
        ...

    def __call__(self, row: Row, totals: Totals) -> tuple[Tensor, Sums]:
        """The row's share of the step's loss, and sums for its metrics."""
        ...


class Means:
    """Metrics as sums and counts over rows, so that a mean does not depend on how rows were packed."""

    def __init__(self) -> None:
        """Start with nothing; a metric nobody added stays unknown."""
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, sums: Sums) -> None:
        """Add a row's sums."""
        for name, (value, count) in sums.items():
            self.sums[name][0] += value
            self.sums[name][1] += count

    def means(self, prefix: str = "") -> dict[str, float]:
        """Each metric's mean."""
        return {prefix + name: value / count for name, (value, count) in self.sums.items() if count}


def learning_rate(step: int, steps: int, peak: float, warmup: float, decay: str) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`: a linear rise, then a fall to 0."""
    rising = round(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    if decay == "constant":
        return peak
    return peak * (1 - done) if decay == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(groups: Sequence[Sequence[Parameter]], weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW with one group per list of parameters; their learning rates are set at every step."""
    return torch.optim.AdamW([{"params": list(group)} for group in groups], lr=0.0, weight_decay=weight_decay, eps=eps, fused=True)


def update(optimizer: torch.optim.Optimizer, rates: Sequence[float], max_grad_norm: float) -> list[float]:
    """One optimizer step from gradients already summed over the step's rows.

    Args:
        optimizer: its groups are clipped one by one.
        rates: learning rate of each group.
        max_grad_norm: gradients of a group with a larger norm are scaled down to it.

    Returns:
        Each group's gradient norm before clipping.
    """
    norms = []
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        norms.append(float(torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm)))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if next(_updates) % TIDY_EVERY == 0:
        give_back_memory()
    return norms


class Batches(Sequence[list[Row]]):
    """An epoch's optimizer steps, each as rows that are made when they are asked for."""

    def __init__(self, examples: Sequence[Example], members: list[list[int]], row_tokens: int):
        """`members` are the examples of each step."""
        self.examples, self.members, self.row_tokens = examples, members, row_tokens

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, step: Any) -> Any:
        return pack([self.examples[i] for i in self.members[step]], self.row_tokens)


def epoch_batches(examples: Sequence[Example], settings: Training, epoch: int) -> Batches:
    """An epoch's optimizer steps. The same for the same seed, whatever came before."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    return Batches(examples, shuffled_batches(len(examples), settings.batch_size, generator), settings.row_tokens)


def count_steps(examples: int, settings: Training) -> int:
    """Optimizer steps of the whole training."""
    return max(1, math.ceil(settings.epochs * math.ceil(examples / settings.batch_size)))


def evaluate(objective: Objective, examples: Sequence[Example], row_tokens: int) -> dict[str, float]:
    """Metrics on examples, without learning; nothing where there are no examples."""
    means = Means()
    totals = objective.totals(examples)
    with torch.no_grad():
        for row in pack(examples, row_tokens):
            means.add(objective(row, totals)[1])
    return means.means("heldout_")


def train(
    objective: Objective,
    parameters: dict[str, Parameter],
    examples: Sequence[Example],
    heldout: Sequence[Example],
    settings: Training,
    folder: Path,
    meter: Meter,
    where: Sequence[str],
) -> dict[str, float]:
    """Train `parameters` on the examples, going on from the folder's checkpoint if there is one.

    Args:
        objective: gives each row's share of the loss.
        parameters: what is trained, by name. They must require gradients; nothing else may.
        examples: to learn.
        heldout: to evaluate every `eval_every` steps and at the end.
        settings: batch, rate, schedule, clipping, seed.
        folder: where the checkpoint is.
        meter: gets the metrics of every step.
        where: file and line of each example, by its index, for the error below.

    Returns:
        The last held-out metrics, or nothing where nothing was held out.

    Raises:
        AlignError: where the loss or gradient is not finite, naming the rows that caused it. The checkpoint stays.
    """
    accelerator = Accelerator()
    optimizer = make_optimizer([list(parameters.values())], settings.weight_decay)
    steps = count_steps(len(examples), settings)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    torch.manual_seed(settings.seed)  # dropout's randomness, unless a checkpoint brings its own
    start, extra = load_checkpoint(folder, parameters, optimizer)
    last: dict[str, float] = extra.get("heldout", {})
    meter.begin(steps, start)
    epoch = -1
    batches: Sequence[list[Row]] = []
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = epoch_batches(examples, settings, epoch)
        rows = batches[step % per_epoch]
        rate = learning_rate(step, steps, settings.learning_rate, settings.warmup, settings.decay)
        metrics = _step(accelerator, objective, rows, optimizer, rate, settings.max_grad_norm, where)
        done = step + 1
        if heldout and (done % settings.eval_every == 0 or done == steps):
            last = evaluate(objective, heldout, settings.row_tokens)
            metrics |= last
        if accelerator.is_main_process:
            meter.step(done, metrics, sum(len(row.ids) for row in rows))
            if done % settings.save_every == 0 or done == steps:
                save_checkpoint(folder, done, parameters, optimizer, {"heldout": last})
    meter.close()
    return last


def _step(
    accelerator: Accelerator,
    objective: Objective,
    rows: list[Row],
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float,
    where: Sequence[str],
) -> dict[str, float]:
    """Forward, backward and update of one optimizer step. Every process takes its share of the rows; gradients are summed."""
    totals = objective.totals([example for row in rows for example in row.examples])
    means, bad = Means(), list[Row]()
    for row in rows[accelerator.process_index :: accelerator.num_processes]:
        loss, sums = objective(row, totals)
        if not torch.isfinite(loss):
            bad.append(row)
        accelerator.backward(loss)
        means.add({**sums, "step_loss": (float(loss.detach()), 1 / len(rows))})  # counts add up to 1: the mean is the sum
    if accelerator.num_processes > 1:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = accelerator.reduce(grad, "sum")
        everyone, means = gather_object([dict(means.sums)]), Means()
        for sums in everyone:
            means.add({name: (value, count) for name, (value, count) in sums.items()})
    (norm,) = update(optimizer, [rate], max_grad_norm)
    if bad or not math.isfinite(norm):
        raise _not_finite("loss" if bad else "gradient norm", bad or rows, where)
    found = means.means()
    return {"loss": found.pop("step_loss"), **found, "grad_norm": norm, "learning_rate": rate}


def _not_finite(what: str, rows: list[Row], where: Sequence[str]) -> AlignError:
    lines = ", ".join(where[index] for row in rows for index in row.indices)
    return AlignError(
        f"training stopped: the {what} is not a finite number. It came from {lines}.\n"
        "  Checkpoints of earlier steps are kept. Look at those rows, or lower the stage's learning_rate (--set), and run again."
    )
