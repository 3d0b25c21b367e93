import pytest
import torch
from torch.nn import Parameter

from align.learn.checkpoint import load_checkpoint, save_checkpoint
from align.learn.optimise import make_optimizer, update


def two_groups(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in {"a.weight": (3, 2), "head.b": (4,)}.items()}
    return parameters, make_optimizer([[parameters["a.weight"]], [parameters["head.b"]]], weight_decay=0.1)


def take_steps(parameters, optimizer, count):
    for _ in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape)
        update(optimizer, [1e-2, 1e-3], max_grad_norm=1.0)


def test_where_there_is_no_checkpoint_nothing_is_loaded(tmp_path):
    parameters, optimizer = two_groups()
    before = parameters["head.b"].clone()
    assert load_checkpoint(tmp_path, parameters, optimizer) == (0, {})
    assert torch.equal(parameters["head.b"], before)
    assert not optimizer.state


def test_everything_comes_back_to_the_bit(tmp_path):
    parameters, optimizer = two_groups()
    torch.manual_seed(5)
    take_steps(parameters, optimizer, 3)
    save_checkpoint(tmp_path, 3, parameters, optimizer, {"heldout": {"loss": 0.1}, "note": "é"})
    expected = torch.rand(4)
    restored, its_optimizer = two_groups(seed=1)
    assert load_checkpoint(tmp_path, restored, its_optimizer) == (3, {"heldout": {"loss": 0.1}, "note": "é"})
    assert torch.equal(torch.rand(4), expected)
    for name, parameter in parameters.items():
        assert torch.equal(restored[name], parameter)
        wanted, found = optimizer.state[parameter], its_optimizer.state[restored[name]]
        assert wanted.keys() == found.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert restored[name].requires_grad


def test_the_next_steps_are_those_of_the_run_that_was_not_stopped(tmp_path):
    parameters, optimizer = two_groups()
    torch.manual_seed(5)
    take_steps(parameters, optimizer, 2)
    save_checkpoint(tmp_path, 2, parameters, optimizer, {})
    take_steps(parameters, optimizer, 3)
    restored, its_optimizer = two_groups(seed=1)
    torch.manual_seed(99)
    load_checkpoint(tmp_path, restored, its_optimizer)
    take_steps(restored, its_optimizer, 3)
    assert all(torch.equal(restored[name], parameter) for name, parameter in parameters.items())


def test_tensors_to_keep_come_back_beside_what_is_trained(tmp_path):
    parameters, optimizer = two_groups()
    kept = {"a.weight": torch.rand(3, 2), "other/name": torch.rand(2)}
    save_checkpoint(tmp_path, 1, parameters, optimizer, {}, kept)
    found: dict = {}
    restored, its_optimizer = two_groups(seed=1)
    load_checkpoint(tmp_path, restored, its_optimizer, found)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert torch.equal(restored["a.weight"], parameters["a.weight"])


def test_a_checkpoint_before_the_first_step_has_no_optimizer_state(tmp_path):
    parameters, optimizer = two_groups()
    save_checkpoint(tmp_path, 0, parameters, optimizer, {})
    restored, its_optimizer = two_groups(seed=1)
    assert load_checkpoint(tmp_path, restored, its_optimizer) == (0, {})
    assert not its_optimizer.state


def test_saving_does_not_change_what_is_saved_nor_the_random_state(tmp_path):
    parameters, optimizer = two_groups()
    take_steps(parameters, optimizer, 1)
    before, state = {name: p.clone() for name, p in parameters.items()}, torch.get_rng_state()
    save_checkpoint(tmp_path, 1, parameters, optimizer, {})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameters[name], before[name]) for name in before)


def test_a_later_checkpoint_takes_the_place_of_the_former_and_leaves_one_file(tmp_path):
    parameters, optimizer = two_groups()
    for step in (1, 2):
        take_steps(parameters, optimizer, 1)
        save_checkpoint(tmp_path, step, parameters, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert load_checkpoint(tmp_path, *two_groups(seed=1))[0] == 2


def test_a_write_that_is_cut_off_leaves_the_former_checkpoint_whole(tmp_path, monkeypatch):
    """The disk fills up half way through the second write."""
    from align.learn import checkpoint

    parameters, optimizer = two_groups()
    save_checkpoint(tmp_path, 1, parameters, optimizer, {})

    def fill_up(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fill_up)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, parameters, optimizer, {})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, *two_groups(seed=1))[0] == 1
    save_checkpoint(tmp_path, 2, parameters, optimizer, {})
    assert load_checkpoint(tmp_path, *two_groups(seed=1))[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
