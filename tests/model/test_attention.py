import pytest
import torch

from align.model import attention
from align.model.attention import _alike, _RowAttention, cut
from align.model.packing import Example, make_row

ROWS = {
    "one": [(3, [4])],
    "pairs": [(5, [2, 7]), (1, [1, 1]), (9, [12, 3])],
    "group": [(6, [3, 9, 1, 4]), (2, [5])],
    "very unequal": [(2, [1]), (60, [90]), (3, [2, 80])],
}


def row_of(sizes, shared=0):
    """Examples of (prompt, completions) sizes; their prompts begin with the same `shared` tokens, as far as they go."""
    prompts = [(7,) * min(shared, prompt) + (10 + i,) * (prompt - shared) for i, (prompt, _) in enumerate(sizes)]
    return make_row([Example(i, prompts[i], tuple((8,) * c for c in completions)) for i, (_, completions) in enumerate(sizes)])


def dense(query, key, value, scaling, row, window):
    """The definition: each token of a completion sees its prompt and its own past, within the window; one softmax over all of it."""
    length, heads = len(row.ids), query.shape[1]
    sees = torch.zeros(length, length, dtype=torch.bool)
    for segment in row.segments:
        for completion in segment.completions:
            places = [*segment.prompt, *range(completion.start, completion.stop)]
            for i, at in enumerate(places):
                for j in range(i + 1):
                    sees[at, places[j]] = window is None or i - j < window
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize("kept", [0, 256])
@pytest.mark.parametrize("queries", [1, 7, 128])
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("shared", [0, 2, 1000])
@pytest.mark.parametrize("name", ROWS)
def test_blocks_give_the_attention_of_the_definition_and_its_gradients(name, shared, window, queries, kept, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", queries)
    monkeypatch.setattr(attention, "KEPT", kept)
    row = row_of(ROWS[name], shared)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(len(row.ids), heads, 8, dtype=torch.float64, generator=generator).requires_grad_() for heads in (6, 2, 2)]
    blocks = cut(row.segments, window, torch.device("cpu"))
    ours, wanted = _RowAttention.apply(*inputs, 0.3, blocks), dense(*inputs, 0.3, row, window)
    torch.testing.assert_close(ours, wanted)
    weights = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for mine, theirs in zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_values_may_be_of_another_size_than_keys():
    row = row_of(ROWS["pairs"], 1)
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 8), (2, 8), (2, 5)]
    inputs = [torch.randn(len(row.ids), *shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    ours = _RowAttention.apply(*inputs, 0.3, cut(row.segments, None, torch.device("cpu")))
    wanted = dense(*inputs, 0.3, row, None)
    torch.testing.assert_close(ours, wanted)
    for mine, theirs in zip(*(torch.autograd.grad(out.sin().sum(), inputs) for out in (ours, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
@pytest.mark.parametrize("shared", [0, 2])
def test_every_place_is_a_query_once_and_a_key_of_each_completion_that_sees_it(shared, heads):
    row = row_of(ROWS["group"], shared)
    layout = cut(row.segments, None, torch.device("cpu")).layout(*heads)
    assert layout.queries[layout.query_of].tolist() == list(range(len(row.ids) * heads[0]))
    assert not set(layout.query_of.tolist()) & set(layout.padded_queries.tolist())
    seen = {}
    for places, among in layout.keys_of:
        assert (layout.keys[among] == places[:, None]).all()
        assert among.unique().numel() == among.numel()
        assert not seen.keys() & set(places.tolist())
        seen |= dict.fromkeys(places.tolist(), among.shape[1])
    times = [6] * shared + [4] * (6 - shared) + [1] * (len(row.ids) - 6)
    assert [seen[place] for place in range(len(row.ids) * heads[1])] == [count for count in times for _ in range(heads[1])]


@pytest.mark.parametrize(("length", "pieces"), [(100, 1), (191, 1), (193, 2), (384, 3), (1024, 8)])
def test_a_long_sequence_is_cut_into_even_pieces_that_see_little_they_may_not(length, pieces):
    groups = cut(row_of([(length - 1, [1])]).segments, None, torch.device("cpu")).groups
    assert sum(len(group.queries) for group in groups) == pieces
    scores = sum(group.hiding.numel() for group in groups)
    assert scores <= 1.5 * length**2 * (1 + 1 / pieces) / 2 + 4096 * len(groups)


def test_a_piece_sees_no_keys_that_the_window_hides_from_all_of_it():
    (group,) = cut(row_of([(600, [424])]).segments, 10, torch.device("cpu")).groups
    assert group.hiding.shape == (8, 1, 1, 128, 137)


def test_blocks_of_like_size_are_one_product_and_unlike_ones_are_not_padded():
    assert len(_alike([(80, 80)] * 8)) == 1
    assert len(_alike([(80, 80), (70, 75), (60, 90), (75, 80)])) == 1
    sizes = [(1000, 1000), (30, 30), (25, 28), (900, 950)]
    groups = _alike(sizes)
    assert sorted(sorted(group) for group in groups) == [[0, 3], [1, 2]]
    for group in groups:
        padded = len(group) * max(sizes[i][0] for i in group) * max(sizes[i][1] for i in group)
        assert padded <= 1.5 * sum(sizes[i][0] * sizes[i][1] for i in group) + 4096
