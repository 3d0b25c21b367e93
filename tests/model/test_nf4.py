"""A base in four bits under exact adapters."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import SMALL, randomise
from torch import nn

from align import Lora, Recipe
from align.artifact import Artifact
from align.errors import AlignError
from align.model.forward import forward
from align.model.load import Sampler
from align.model.packing import Example, make_row
from align.model.trunk import Role, Trunk
from align.plan import make_plan

ROW = make_row([Example(0, (5, 6, 7), ((8, 9, 1), (10, 1))), Example(1, (11, 12), ((13, 14, 15, 1),))])


def opened(base):
    trunk = Trunk.load(base, "nf4")
    for name, seed in (("below", 1), ("new", 2)):
        trunk.add_adapter(name, Lora(rank=4), seed)
        randomise(trunk, name, seed)
    return trunk, Role(("below", "new"))


def gradients(trunk, role):
    """Of the log-probabilities' sum with respect to the adapter "new", as one vector."""
    parameters = trunk.parameters_of("new").values()
    for parameter in parameters:
        parameter.requires_grad_(True)
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(forward(trunk, role, ROW).logprobs.sum(), parameters)])


def test_adapters_are_exact_on_what_the_four_bits_stand_for(tiny_base, tmp_path):
    """The same adapters on a plain base whose weights are those that the four bits stand for."""
    trunk, role = opened(tiny_base)
    layers = {name.replace(".base_layer", ""): m for name, m in trunk.model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 14  # seven of each of two layers
    plain = Trunk.load(tiny_base, torch.float32)
    for name, module in plain.model.named_modules():
        if name in layers:
            module.weight = nn.Parameter(dequantize_4bit(layers[name].weight.data, layers[name].weight.quant_state).float())
    for name in role.adapters:
        trunk.save_adapter(name, tmp_path / name)
        plain.load_adapter(name, tmp_path / name)
    with torch.no_grad():
        quantised, expected = forward(trunk, role, ROW).logprobs, forward(plain, role, ROW).logprobs
        untouched = forward(Trunk.load(tiny_base, torch.float32), Role(), ROW).logprobs
    tolerance = 1e-4 if trunk.model.dtype == torch.float32 else 0.15  # computed in bfloat16 where that is native
    assert float((quantised - expected).abs().max()) < tolerance
    assert float((quantised - untouched).abs().max()) > 3 * tolerance
    found, wanted = (gradients(one, role) for one in (trunk, plain))
    assert float((found - wanted).norm() / wanted.norm()) < (1e-4 if trunk.model.dtype == torch.float32 else 0.1)


def test_every_adapter_still_gets_its_gradient_after_sampling_and_evaluating(tiny_base):
    trunk, role = opened(tiny_base)
    Sampler(trunk).sample(role, [(5, 6, 7)], 2, 4, 0.7, frozenset({1}), seed=0)
    with torch.no_grad():
        forward(trunk, role, ROW)
    parameters = trunk.parameters_of("new")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    forward(trunk, role, ROW).logprobs.sum().backward()
    assert len(parameters) == 28
    without = [name for name, parameter in parameters.items() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert without == []


def test_every_stage_runs_on_a_base_in_four_bits(tiny_base, data, tmp_path):
    recipe = Recipe("nf4", base=str(tiny_base), quantize="nf4")
    lora = Lora(rank=4)
    sft = recipe.sft(data=data / "chat.jsonl", lora=lora, **SMALL)
    reward = recipe.reward(policy=sft, preferences=data / "preferences.jsonl", lora=lora, **SMALL)
    dpo = recipe.dpo(policy=sft, preferences=data / "preferences.jsonl", lora=lora, **SMALL)
    rounds = {
        "iterations": 2,
        "prompts_per_iteration": 3,
        "completions_per_prompt": 4,
        "epochs": 2,
        "minibatches": 3,
        "max_new_tokens": 6,
        "row_tokens": 64,
    }
    ppo = recipe.ppo(policy=sft, reward_model=reward, prompts=data / "prompts.jsonl", lora=lora, **rounds)
    recipe.evaluate(policies=[sft, dpo, ppo], reward_model=reward, prompts=data / "heldout.jsonl", max_new_tokens=6)
    run = recipe.run(tmp_path / "run")
    facts = Artifact.open(run / "ppo").facts
    assert facts["dtype"] == "nf4"
    assert facts["checks"]["kl_at_start"] == 0
    assert all(planned.state == "done" for planned in make_plan(recipe, run))
    table = json.loads((run / "evaluate" / "results.json").read_text())["policies"]
    assert all(row["kl"] is not None for row in table)
    recipe.override("recipe.quantize=none")
    assert all(planned.state == "run" for planned in make_plan(recipe, run))


def test_what_four_bits_cannot_do_is_refused(tiny_base, data, tmp_path):
    with pytest.raises(AlignError, match=r"recipe: quantize 'int3' is not known; expected 'nf4', or none"):
        Recipe("bad", base=str(tiny_base), quantize="int3")
    with pytest.raises(AlignError, match=r"quantize='nf4' and dtype='float32' cannot both be"):
        Recipe("bad", base=str(tiny_base), quantize="nf4", dtype="float32")
    recipe = Recipe("bad", base=str(tiny_base), quantize="nf4")
    recipe.sft(data=data / "chat.jsonl", lora=None)
    with pytest.raises(AlignError, match=r"sft\.lora: none trains all weights, which a base in four bits has not"):
        make_plan(recipe, tmp_path / "run")


@pytest.mark.slow
def test_the_real_model_in_four_bits(smollm2, tmp_path):
    """Its linear layers take about a quarter of the memory, and it learns about as well."""
    sizes = {}
    for dtype in ("nf4", torch.bfloat16):
        layers = [m for m in Trunk.load(smollm2, dtype).decoder.modules() if isinstance(m, nn.Linear)]
        sizes[dtype] = sum(m.weight.numel() * m.weight.element_size() for m in layers)
    assert sizes["nf4"] / sizes[torch.bfloat16] == pytest.approx(0.25, abs=0.02)
    losses = {}
    for quantize in (None, "nf4"):
        recipe = Recipe("real", base="embedded", quantize=quantize)
        recipe.sft(data=Path("datasets/chat.jsonl"), epochs=0.25)
        losses[quantize] = Artifact.open(recipe.run(tmp_path / str(quantize)) / "sft").facts["metrics"]
    assert losses["nf4"]["heldout_loss"] < losses["nf4"]["heldout_loss_before"]
    assert losses["nf4"]["heldout_loss"] == pytest.approx(losses[None]["heldout_loss"], abs=0.25)
