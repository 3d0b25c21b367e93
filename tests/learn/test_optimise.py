"""The training loop: the numbers it computes do not depend on packing, and a run that was killed ends with the same bytes."""

import json
import math

import pytest
import torch
from conftest import make_trainee, randomise
from safetensors.torch import load_file

from align import Lora
from align.errors import AlignError
from align.learn.checkpoint import load_checkpoint
from align.learn.optimise import Means, count_steps, epoch_batches, evaluate, learning_rate, make_optimizer, train, update
from align.model.packing import Example
from align.progress import Meter
from align.settings import DPOSettings, RewardSettings, SFTSettings
from align.stages.dpo import DirectPreference
from align.stages.reward import BradleyTerry
from align.stages.sft import Likelihood


def conversations(count, seed=0):
    """Ragged conversations whose middle third is not trained."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return tuple(torch.randint(261, (int(torch.randint(low, high, (), generator=generator)),), generator=generator).tolist())

    found = []
    for index in range(count):
        completion = ids(3, 20)
        trained = tuple(not len(completion) // 3 <= i < 2 * len(completion) // 3 for i in range(len(completion)))
        found.append(Example(index, ids(1, 12), (completion,), (trained,)))
    return found


def pairs(count, seed=0):
    one, other = conversations(count, seed), conversations(count, seed + 1)
    return [Example(a.index, a.prompt, (a.completions[0], b.completions[0])) for a, b in zip(one, other, strict=True)]


def objective_of(kind, trainee, settings):
    if kind == "sft":
        return Likelihood(trainee)
    if kind == "reward":
        return BradleyTerry(trainee, PROBABILITIES, torch.zeros(24), settings)
    return DirectPreference(trainee, PROBABILITIES, torch.linspace(-60, -20, 48).view(24, 2), settings)


PROBABILITIES = torch.tensor([1.0, 0.7, 0.2] * 8)
KINDS = {"sft": SFTSettings, "reward": RewardSettings, "dpo": DPOSettings}


def run(kind, chat, folder, meter=None, lora=None, heldout=(), count=24, spread=0.0, **changes):
    """Train on 24 examples, from B with the given spread; the trained weights and the held-out metrics."""
    folder.mkdir(exist_ok=True)
    settings = KINDS[kind](**{"epochs": 1.0, "batch_size": 8, "learning_rate": 1e-2, **changes})
    trainee = make_trainee(chat, lora, head=kind == "reward")
    randomise(trainee.trunk, "stage", spread=spread)
    trainee.trunk.dropout = True
    examples = conversations(count) if kind == "sft" else pairs(count)
    where = [f"rows.jsonl:{i + 1}" for i in range(count)]
    meter = meter or Meter("test", folder, ())
    objective = objective_of(kind, trainee, settings)
    metrics = train(objective, trainee.parameters, examples, list(heldout), settings, folder, meter, where)
    return {name: p.detach().clone() for name, p in trainee.parameters.items()}, metrics


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Killed(Meter):
    """A meter that stops the process after a step, as a kill would: after the step's update, before its checkpoint."""

    def __init__(self, folder, step):
        super().__init__("test", folder, ())
        self.last = step

    def step(self, step, metrics, counted):
        super().step(step, metrics, counted)
        if step == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", list(KINDS))
def test_eight_rows_of_one_example_are_one_row_of_eight(kind, chat, tmp_path):
    """Gradient accumulation: three optimizer steps move the adapter the same way however the examples are packed."""
    apart, _ = run(kind, chat, tmp_path / "apart", row_tokens=16, learning_rate=1e-5, spread=0.1)
    together, _ = run(kind, chat, tmp_path / "together", row_tokens=100_000, learning_rate=1e-5, spread=0.1)
    start, _ = run(kind, chat, tmp_path / "start", learning_rate=1e-30, spread=0.1)
    for name, weights in together.items():
        torch.testing.assert_close(apart[name], weights, atol=3e-6, rtol=0)  # Adam enlarges rounding where a gradient is near 0
        assert (apart[name] - weights).norm() < 1e-2 * (weights - start[name]).norm()
    for one, other in zip(logged(tmp_path / "apart"), logged(tmp_path / "together"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("killed_after", "save_every"), [(1, 1), (4, 2), (6, 4)])
def test_a_killed_and_resumed_training_ends_with_the_same_bytes(kind, killed_after, save_every, chat, tmp_path):
    """LoRA dropout 0.1, so that the random state matters; nine steps in three epochs, killed before a checkpoint."""
    changes = {
        "epochs": 3.0,
        "save_every": save_every,
        "eval_every": 2,
        "lora": Lora(rank=4, dropout=0.1),
        "heldout": conversations(2, seed=9) if kind == "sft" else pairs(2, seed=9),
    }
    unbroken, metrics = run(kind, chat, tmp_path / "unbroken", **changes)
    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(kind, chat, tmp_path / "killed", meter=Killed(tmp_path / "killed", killed_after), **changes)
    torch.rand(5)
    resumed, resumed_metrics = run(kind, chat, tmp_path / "killed", **changes)
    assert resumed_metrics == metrics
    for name, weights in unbroken.items():
        assert torch.equal(resumed[name], weights), name
    saved, saved_again = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("unbroken", "killed"))
    assert saved.keys() == saved_again.keys()
    assert all(torch.equal(saved_again[name], tensor) for name, tensor in saved.items())
    steps = [[{k: v for k, v in row.items() if k != "seconds"} for row in logged(tmp_path / run)] for run in ("unbroken", "killed")]
    assert steps[0] == steps[1]


def test_a_finished_training_is_not_trained_again(chat, tmp_path):
    first, metrics = run("sft", chat, tmp_path, heldout=conversations(2, seed=9))
    again, same = run("sft", chat, tmp_path, heldout=conversations(2, seed=9))
    assert same == metrics
    assert all(torch.equal(again[name], weights) for name, weights in first.items())


def test_learning_rates_by_hand():
    """Ten steps, warm-up 0.3: 1/4, 2/4, 3/4 of the peak, then from the peak to 1/7 of it; the step after would be 0."""
    linear = [learning_rate(step, 10, 1.0, 0.3, "linear") for step in range(11)]
    assert linear == pytest.approx([1 / 4, 2 / 4, 3 / 4, 7 / 7, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0])
    cosine = [learning_rate(step, 10, 2.0, 0.0, "cosine") for step in range(11)]
    assert cosine == pytest.approx([1 + math.cos(math.pi * step / 10) for step in range(11)])
    assert [learning_rate(step, 4, 0.5, 0.5, "constant") for step in range(4)] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])
    assert learning_rate(0, 1, 1.0, 0.1, "linear") == 1.0


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "steps"),
    [(24, 8, 1.0, 3), (25, 8, 1.0, 4), (24, 8, 2.5, 8), (24, 8, 0.1, 1), (3, 8, 2.0, 2), (10, 4, 0.5, 2)],
)
def test_optimizer_steps_by_hand(examples, batch_size, epochs, steps, chat, tmp_path):
    """ceil(epochs * ceil(examples / batch size)), and as many are taken."""
    assert count_steps(examples, SFTSettings(batch_size=batch_size, epochs=epochs)) == steps
    run("sft", chat, tmp_path, count=examples, batch_size=batch_size, epochs=epochs)
    assert [row["step"] for row in logged(tmp_path)] == list(range(1, steps + 1))
    trainee = make_trainee(chat)
    optimizer = make_optimizer([list(trainee.parameters.values())], 0.0)
    assert load_checkpoint(tmp_path, trainee.parameters, optimizer)[0] == steps
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_the_logged_learning_rates_are_the_schedule_s(chat, tmp_path):
    run("sft", chat, tmp_path, epochs=2.0, learning_rate=1e-3, warmup=0.34)
    rates = [row["learning_rate"] for row in logged(tmp_path)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_every_epoch_goes_through_every_example_once_in_an_order_of_its_own():
    examples, settings = conversations(25), SFTSettings(batch_size=8, row_tokens=40)

    def order(epoch, **changes):
        batches = epoch_batches(examples, settings.model_copy(update=changes), epoch)
        return [sorted(index for row in rows for index in row.indices) for rows in batches]

    assert sorted(sum(order(0), [])) == list(range(25))
    assert [len(batch) for batch in order(0)] == [8, 8, 8, 1]
    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)


def test_the_first_step_is_adamw_s_by_hand(chat, tmp_path):
    """AdamW's first step moves a weight by rate * sign(gradient): both moments are the gradient's."""
    before = make_trainee(chat).parameters
    after, _ = run("sft", chat, tmp_path, count=8, decay="constant", warmup=0.0)
    for name, weights in after.items():
        if "lora_B" in name:  # A's gradients are 0 while B is
            moved = (weights - before[name].detach()).abs()
            assert float(moved.max()) == pytest.approx(1e-2, rel=1e-3)
            assert float(moved.median()) == pytest.approx(1e-2, rel=1e-2)
        else:
            assert torch.equal(weights, before[name])


def test_clipping_is_group_by_group_by_hand():
    """gradients (3, 4) and (0.3, 0.4) with norms 5 and 0.5, at most 1: the first is scaled by 1/5, the second is left."""
    groups = [[torch.nn.Parameter(torch.zeros(2))], [torch.nn.Parameter(torch.zeros(2))]]
    groups[0][0].grad, groups[1][0].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.0)
    assert update(optimizer, [1.0, 10.0], max_grad_norm=1.0) == pytest.approx([5.0, 0.5])
    torch.testing.assert_close(groups[0][0].data, torch.tensor([-0.6, -0.8]))
    torch.testing.assert_close(groups[1][0].data, torch.tensor([-3.0, -4.0]))
    assert groups[0][0].grad is None


def test_means_are_over_things_and_not_over_rows():
    """(6 + 1) / (3 + 1) = 1.75, though the rows' means are 2 and 1; what was never counted stays unknown."""
    means = Means()
    means.add({"loss": (6.0, 3), "accuracy": (0.0, 0)})
    means.add({"loss": (1.0, 1)})
    assert means.means("heldout_") == {"heldout_loss": 1.75}


@pytest.mark.parametrize("kind", list(KINDS))
def test_evaluation_does_not_depend_on_packing(kind, chat):
    trainee = make_trainee(chat, head=kind == "reward")
    objective = objective_of(kind, trainee, KINDS[kind]())
    examples = conversations(10) if kind == "sft" else pairs(10)
    assert evaluate(objective, examples, 16) == pytest.approx(evaluate(objective, examples, 10_000), rel=1e-5)
    assert evaluate(objective, [], 64) == {}


def test_evaluation_while_training_is_without_dropout(chat, tmp_path):
    """With a rate too small to move a weight, held-out metrics with LoRA dropout 0.5 are those without."""
    heldout, metrics = conversations(6, seed=9), []
    for dropout in (0.0, 0.5):
        trainee = make_trainee(chat, Lora(rank=4, dropout=dropout))
        randomise(trainee.trunk, "stage", seed=4)
        trainee.trunk.dropout = True
        settings = SFTSettings(learning_rate=1e-30, epochs=1.0, batch_size=8)
        meter = Meter("test", tmp_path, ())
        folder = tmp_path / str(dropout)
        folder.mkdir()
        metrics.append(train(Likelihood(trainee), trainee.parameters, conversations(8), heldout, settings, folder, meter, ["x"] * 8))
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-6)


@pytest.mark.parametrize(("row_tokens", "named"), [(16, ["chat.jsonl:6"]), (100_000, [f"chat.jsonl:{i}" for i in range(1, 9)])])
def test_a_loss_that_is_not_finite_stops_training_and_names_the_rows(row_tokens, named, chat, tmp_path):
    """Example 6 overflows: alone in its row it is named alone, in one row with the others it cannot be told apart."""

    class Overflowing(Likelihood):
        def __call__(self, row, totals):
            loss, sums = super().__call__(row, totals)
            return (loss * float("inf") if 5 in row.indices else loss), sums

    trainee = make_trainee(chat)
    examples = [Example(i, (5, 6), (tuple(range(10, 20)),)) for i in range(8)]
    where = [f"chat.jsonl:{i}" for i in range(1, 9)]
    settings = SFTSettings(batch_size=8, row_tokens=row_tokens)
    with pytest.raises(AlignError, match="training stopped: the loss is not a finite number") as error:
        train(Overflowing(trainee), trainee.parameters, examples, [], settings, tmp_path, Meter("t", tmp_path, ()), where)
    text = str(error.value)
    assert [name for name in where if f"{name}," in text or f"{name}." in text] == named
    assert "learning_rate" in text
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_gradient_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(chat, tmp_path):
    class Broken(Likelihood):
        """A finite loss whose gradient is not, in the third step: the slope of the square root at 0."""

        steps = 0

        def __call__(self, row, totals):
            loss, sums = super().__call__(row, totals)
            self.steps += 1
            return (loss + torch.sqrt((loss - loss.detach()) ** 2 * 0) if self.steps == 3 else loss), sums

    trainee = make_trainee(chat)
    settings = SFTSettings(batch_size=8, row_tokens=100_000, save_every=1)
    where = [f"chat.jsonl:{i}" for i in range(1, 25)]
    with pytest.raises(AlignError, match="training stopped: the gradient norm is not a finite number"):
        train(Broken(trainee), trainee.parameters, conversations(24), [], settings, tmp_path, Meter("t", tmp_path, ()), where)
    fresh = make_trainee(chat)
    step, _ = load_checkpoint(tmp_path, fresh.parameters, make_optimizer([list(fresh.parameters.values())], 0.0))
    assert step == 2
    assert all(torch.isfinite(parameter).all() for parameter in fresh.parameters.values())
