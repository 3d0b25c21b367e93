import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import make_trainee, randomise

from align.learn.optimise import epoch_batches, evaluate, train
from align.learn.parallel import add_gradients, each_row, gradients_of, rows_at_once
from align.model.packing import Example, make_row, pack, spread
from align.progress import Meter
from align.settings import SFTSettings
from align.stages.sft import Likelihood


def examples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 30, (count, 2), generator=generator).tolist()
    ids = [[torch.randint(5, 260, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    return [Example(i, tuple(prompt), (tuple(completion),)) for i, (prompt, completion) in enumerate(ids)]


@pytest.fixture
def two_threads():
    """Rows are worked on two at a time, as on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_rows_whatever_finishes_first():
    rows = [make_row([example]) for example in examples(9)]
    later = threading.Event()

    def work(row):
        if row.indices[0] == 0:
            later.wait(5)  # the first row ends after the second
        else:
            later.set()
        return row.indices[0]

    assert list(each_row(work, rows, 2)) == list(range(9))


def test_only_a_few_rows_are_made_ahead():
    made = []

    def rows() -> Iterator:
        for example in examples(50):
            made.append(example.index)
            yield make_row([example])

    results = each_row(lambda row: row.indices[0], rows(), 2)
    next(results)
    assert len(made) <= 4
    assert list(results) == list(range(1, 50))


def test_gradients_are_on_or_off_as_outside():
    rows = [make_row([example]) for example in examples(4)]
    assert list(each_row(lambda row: torch.is_grad_enabled(), rows, 2)) == [True] * 4
    with torch.no_grad():
        assert list(each_row(lambda row: torch.is_grad_enabled(), rows, 2)) == [False] * 4


def test_a_row_has_one_thread_and_the_caller_keeps_its_own(two_threads):
    rows = [make_row([example]) for example in examples(4)]
    assert list(each_row(lambda row: torch.get_num_threads(), rows, 2)) == [1] * 4
    assert torch.get_num_threads() == 2
    assert rows_at_once(torch.device("cpu")) == 2
    assert rows_at_once(torch.device("cuda")) == 1


def test_an_error_in_a_row_is_the_callers():
    def work(row):
        raise ValueError(f"row {row.indices}")

    with pytest.raises(ValueError, match=r"row \[0\]"):
        list(each_row(work, [make_row([example]) for example in examples(3)], 2))


def test_gradients_side_by_side_are_those_of_one_backward_pass_after_the_other(chat):
    trainee = make_trainee(chat)
    randomise(trainee.trunk, "stage", seed=5)
    trainee.trunk.rest_in(trainee.role)
    objective, rows = Likelihood(trainee), pack(examples(12), 64)
    totals = objective.totals([example for row in rows for example in row.examples])
    parameters = list(trainee.parameters.values())
    for row in rows:
        objective(row, totals)[0].backward()
    expected = [parameter.grad for parameter in parameters]
    found = []
    for at_once in (1, 2, 2):
        for parameter in parameters:
            parameter.grad = None
        for gradients in each_row(lambda row: gradients_of(objective(row, totals)[0], parameters), rows, at_once):
            add_gradients(parameters, gradients)
        found.append([parameter.grad for parameter in parameters])
    for one, two, again, by_backward in zip(*found, expected, strict=True):
        assert torch.equal(two, again)
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(one, by_backward, rtol=1e-5, atol=1e-6)


def test_training_side_by_side_is_repeatable_and_agrees_with_training_row_after_row(chat, tmp_path):
    weights = {}
    for name, threads in (("one", 1), ("two", 2), ("again", 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            trainee = make_trainee(chat)
            trainee.trunk.rest_in(trainee.role)
            settings = SFTSettings(batch_size=6, epochs=2.0, row_tokens=128, learning_rate=1e-3)
            folder = tmp_path / name
            folder.mkdir()
            train(
                Likelihood(trainee), trainee.parameters, examples(24), examples(6, 1), settings, folder, Meter("t", folder, ()), ["x"] * 24
            )
            weights[name] = torch.cat([parameter.detach().flatten() for parameter in trainee.parameters.values()])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(weights["two"], weights["again"])
    torch.testing.assert_close(weights["two"], weights["one"], rtol=1e-3, atol=2e-5)


def test_an_evaluation_side_by_side_has_the_same_means(chat):
    trainee = make_trainee(chat)
    trainee.trunk.rest_in(trainee.role)
    one, two = (evaluate(Likelihood(trainee), examples(11), 64, at_once)["heldout_loss"] for at_once in (1, 2))
    assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("side_by_side", [2, 3])
@pytest.mark.parametrize("budget", [40, 100, 1000])
def test_rows_side_by_side_are_of_like_sizes_and_hold_every_example_once(budget, side_by_side):
    sizes = [example.tokens for example in examples(31)]
    bins = spread(sizes, budget, side_by_side)
    assert sorted(i for members in bins for i in members) == list(range(31))
    filled = [sum(sizes[i] for i in members) for members in bins]
    assert all(total <= budget or len(members) == 1 for total, members in zip(filled, bins, strict=True))
    assert len(bins) >= side_by_side
    if budget == 1000:
        assert len(bins) % side_by_side == 0
        assert max(filled) - min(filled) <= max(sizes)


def test_fewer_examples_than_cores_are_a_row_each():
    assert spread([5], 100, 4) == [[0]]
    assert spread([5, 9], 100, 4) == [[1], [0]]
    assert pack([], 100, 2) == []


def test_an_epoch_holds_the_same_examples_however_many_rows_are_side_by_side():
    settings = SFTSettings(batch_size=5, row_tokens=64)
    steps = [
        [sorted(i for row in rows for i in row.indices) for rows in epoch_batches(examples(17), settings, 3, side_by_side)]
        for side_by_side in (1, 2, 4)
    ]
    assert steps[0] == steps[1] == steps[2]
