import random
from os.path import commonprefix

import pytest
import torch

from align.model.packing import Example, fill, make_row, pack, shuffled_batches

TWO_COMPLETIONS = Example(7, (10, 11), ((20, 21, 22), (30,)), ((False, True, True), (True,)))
ONE_COMPLETION = Example(3, (12,), ((40, 41),))


def random_examples(count, seed=0, shared=0):
    """Prompts of 1 to 20 tokens after `shared` that all begin with, 1 to 4 completions of 1 to 20."""
    rng = random.Random(seed)

    def ids():
        return tuple(rng.randrange(261) for _ in range(rng.randint(1, 20)))

    return [Example(i, (7,) * shared + ids(), tuple(ids() for _ in range(rng.randint(1, 4)))) for i in range(count)]


@pytest.mark.parametrize("row_tokens", [16, 40, 100, 333, 10_000])
def test_packing_holds_every_example_exactly_once(row_tokens):
    examples = random_examples(50)
    packed = [example for row in pack(examples, row_tokens) for example in row.examples]
    assert sorted(packed, key=lambda example: example.index) == examples


@pytest.mark.parametrize("shared", [0, 3, 30])
@pytest.mark.parametrize("row_tokens", [16, 40, 100, 333, 10_000])
def test_no_row_is_over_budget_but_for_a_single_example_that_is(row_tokens, shared):
    for row in pack(random_examples(50, shared=shared), row_tokens):
        begin = commonprefix([example.prompt for example in row.examples])
        assert len(begin) >= shared
        assert len(row.ids) == sum(example.tokens for example in row.examples) - len(begin) * (len(row.examples) - 1)
        assert len(row.ids) <= row_tokens or len(row.examples) == 1


def test_what_all_prompts_begin_with_is_laid_out_once_and_makes_room_for_more():
    """30 tokens of a system prompt and 9 to 12 of an example's own: three examples fit where one would."""
    examples = [Example(i, (*range(100, 130), 5 + i), ((40,) * (8 + i),)) for i in range(4)]
    rows = pack(examples, 64)
    assert [row.indices for row in rows] == [[1, 2, 3], [0]]
    assert [len(row.ids) for row in rows] == [30 + 10 + 11 + 12, 30 + 9]


def test_first_fit_with_the_largest_first_by_hand():
    """budget 6: 5 opens bin 0, 4 opens bin 1, 3 opens bin 2, 2 fits beside 4, 1 fits beside 5; 9 stands alone."""
    assert fill([5, 4, 3, 2, 1], 6) == [[0, 4], [1, 3], [2]]
    assert fill([1, 9, 2], 6) == [[1], [0, 2]]
    assert fill([], 6) == []


def test_a_row_by_hand():
    row = make_row([TWO_COMPLETIONS, ONE_COMPLETION])
    assert row.ids.tolist() == [10, 11, 20, 21, 22, 30, 12, 40, 41]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2]
    assert row.predicted_at.tolist() == [2, 3, 1, 6, 7]  # token 20 does not count
    assert row.targets.tolist() == [21, 22, 30, 40, 41]
    assert row.owner.tolist() == [0, 0, 1, 2, 2]
    assert row.last.tolist() == [4, 5, 8]
    assert row.indices == [7, 3]
    assert [(s.prompt, s.completions) for s in row.segments] == [
        ((0, 1), (slice(2, 5), slice(5, 6))),
        ((6,), (slice(7, 9),)),
    ]


def test_a_row_with_a_shared_prompt_by_hand():
    """10 and 11 begin every prompt; the second example's is nothing else, so 11 predicts its first token."""
    row = make_row([Example(0, (10, 11, 12), ((20, 21), (30,))), Example(1, (10, 11), ((40, 41),)), Example(2, (10, 11, 13), ((50,),))])
    assert row.ids.tolist() == [10, 11, 12, 20, 21, 30, 40, 41, 13, 50]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 3, 2, 3, 2, 3]
    assert row.predicted_at.tolist() == [2, 3, 2, 1, 6, 8]
    assert row.targets.tolist() == [20, 21, 30, 40, 41, 50]
    assert row.owner.tolist() == [0, 0, 1, 2, 2, 3]
    assert row.last.tolist() == [4, 5, 7, 9]
    assert [(s.prompt, s.completions) for s in row.segments] == [
        ((0, 1, 2), (slice(3, 5), slice(5, 6))),
        ((0, 1), (slice(6, 8),)),
        ((0, 1, 8), (slice(9, 10),)),
    ]


def test_a_moved_row_is_the_same_row():
    row = make_row([TWO_COMPLETIONS, ONE_COMPLETION])
    moved = row.to("cpu")
    assert moved.examples == row.examples
    assert moved.segments == row.segments
    for name in ("ids", "positions", "predicted_at", "targets", "owner", "last"):
        assert torch.equal(getattr(moved, name), getattr(row, name))


def test_sums_per_completion_are_of_what_counts():
    """of the first completion two tokens count: 2 + 4, then 8, then 16 + 32."""
    row = make_row([TWO_COMPLETIONS, ONE_COMPLETION])
    assert row.sum_per_completion(torch.tensor([2.0, 4, 8, 16, 32])).tolist() == [6, 8, 48]
    assert row.tokens_per_completion().tolist() == [2, 1, 2]


def test_counts_of_an_example_by_hand():
    """2 prompt tokens, 3 + 1 completion tokens, of which the first does not count."""
    assert (TWO_COMPLETIONS.tokens, TWO_COMPLETIONS.longest, TWO_COMPLETIONS.trained_tokens) == (6, 5, 3)
    assert (ONE_COMPLETION.tokens, ONE_COMPLETION.longest, ONE_COMPLETION.trained_tokens) == (3, 3, 2)


@pytest.mark.parametrize("example", [Example(0, (), ((1,),)), Example(0, (1,), ((),)), Example(0, (1,), ((2,), ()))])
def test_an_empty_prompt_or_completion_is_refused(example):
    with pytest.raises(ValueError, match="example 0 has an empty prompt or completion"):
        make_row([example])


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (1, 4), (4, 4), (10, 4), (12, 4), (7, 1)])
def test_shuffled_batches_are_a_partition(count, batch_size):
    batches = shuffled_batches(count, batch_size, torch.Generator().manual_seed(0))
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(0 < len(batch) <= batch_size for batch in batches)


def test_the_order_of_batches_is_the_seed_s():
    def order(seed):
        return shuffled_batches(40, 8, torch.Generator().manual_seed(seed))

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != [list(range(i, i + 8)) for i in range(0, 40, 8)]
