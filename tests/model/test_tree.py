import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from align.model.tree import last_hidden_states, trees
from align.model.trunk import Role, Trunk

sequences = st.sets(st.lists(st.integers(0, 2), min_size=2, max_size=9).map(tuple), max_size=12)


@given(sequences, st.integers(1, 40))
def test_every_sequence_is_in_one_row_with_its_positions_and_what_it_sees(some, row_tokens):
    found = []
    for tree in trees(some, row_tokens):
        assert len(tree.ids) <= row_tokens or len(tree.sequences) == 1
        assert sorted(place for queries, _ in tree.blocks for place in queries) == list(range(len(tree.ids)))
        for sequence, (queries, keys), last in zip(tree.sequences, tree.blocks, tree.last.tolist(), strict=True):
            assert tuple(tree.ids[keys].tolist()) == sequence
            assert tree.positions[keys].tolist() == list(range(len(sequence)))
            assert keys[len(keys) - len(queries) :] == queries
            assert last == keys[-1]
            found.append(sequence)
    assert sorted(found) == sorted(some)


@given(sequences)
def test_a_row_holds_each_beginning_once(some):
    beginnings = {sequence[:n] for sequence in some for n in range(1, len(sequence) + 1)}
    assert sum(len(tree.ids) for tree in trees(some, 1000)) == len(beginnings)


def test_equal_sequences_are_one_and_none_are_no_row():
    (tree,) = trees([(1, 2), (1, 2)], 10)
    assert tree.sequences == ((1, 2),)
    assert list(trees([], 10)) == []


SOME = [(5, *range(20)), (5, *range(12), 7, 7), (5, *range(12), 7, 8, 9), (5, 3), (9, *range(30)), (5, *range(20), 1)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("row_tokens", [1, 30, 1000])
def test_hidden_states_are_those_of_each_sequence_by_itself(kind, row_tokens):
    changes = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3_text" else {}
    model = make_model(kind, **changes)
    with torch.no_grad():
        plain = {ids: model.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in SOME}
    trunk = Trunk(model)
    assert trunk.packs
    _compare(trunk, plain, row_tokens)


def test_a_model_that_cannot_run_packed_rows_computes_each_by_itself():
    model = make_model("gemma2")  # its scores are softcapped
    with torch.no_grad():
        plain = {ids: model.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in SOME}
    trunk = Trunk(model)
    assert not trunk.packs
    _compare(trunk, plain, 30)


@torch.no_grad()
def _compare(trunk, plain, row_tokens):
    found = {}
    for tree in trees(SOME, row_tokens):
        with trunk.computing(Role()):
            found |= zip(tree.sequences, last_hidden_states(trunk, tree), strict=True)
    assert set(found) == set(plain)
    for ids, hidden in found.items():
        torch.testing.assert_close(hidden, plain[ids], rtol=1e-4, atol=1e-4)


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=6).map(tuple), min_size=1, max_size=6), st.integers(1, 30))
@settings(max_examples=15, deadline=None)
def test_neither_company_nor_row_size_moves_a_hidden_state(trunk_of_the_module, some, row_tokens):
    def states(row_tokens):
        return {
            ids: hidden
            for tree in trees(some, row_tokens)
            for ids, hidden in zip(tree.sequences, last_hidden_states(trunk_of_the_module, tree), strict=True)
        }

    with torch.no_grad(), trunk_of_the_module.computing(Role()):
        one, other = states(1), states(row_tokens)
    for ids in one:
        torch.testing.assert_close(one[ids], other[ids], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def trunk_of_the_module():
    return Trunk(make_model())
