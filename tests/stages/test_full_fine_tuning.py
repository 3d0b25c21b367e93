"""Training all weights (lora=None): SFT, reward model and DPO through a recipe, and what stands on such weights."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file

from align import Lora, Recipe
from align.artifact import Artifact
from align.errors import AlignError
from align.model.forward import forward
from align.model.load import HEAD, MODEL, load_role, open_trunk, root_identity
from align.model.packing import Example, make_row
from align.model.trunk import Role, Trunk

FULL = {"lora": None, "batch_size": 4, "row_tokens": 64, "learning_rate": 1e-3, "holdout": 0.2}
LORA = {"lora": Lora(rank=4), "batch_size": 4, "row_tokens": 64, "holdout": 0.2}
PPO = {
    "lora": Lora(rank=4),
    "iterations": 1,
    "prompts_per_iteration": 2,
    "completions_per_prompt": 4,
    "epochs": 2,
    "minibatches": 3,
    "max_new_tokens": 4,
    "row_tokens": 64,
}
ROW = make_row([Example(0, (3, 50, 51, 4), ((60, 61, 1), (62,)))])


@pytest.fixture(scope="module")
def full_run(tiny_base, data, tmp_path_factory):
    """sft (all weights) -> reward and dpo (all weights), and a reward model with an adapter -> ppo; all of them compared."""
    recipe = Recipe("full", base=str(tiny_base), dtype="float32")
    sft = recipe.sft(data=data / "chat.jsonl", **FULL)
    reward = recipe.reward(policy=sft, preferences=data / "preferences.jsonl", **FULL)
    dpo = recipe.dpo(policy=sft, preferences=data / "preferences.jsonl", **FULL)
    light = recipe.reward(policy=sft, preferences=data / "preferences.jsonl", name="light", **LORA)
    ppo = recipe.ppo(policy=sft, reward_model=light, prompts=data / "prompts.jsonl", **PPO)
    policies = [recipe.base, sft, dpo, ppo]
    for name, model in (("by_full", reward), ("by_light", light)):
        recipe.evaluate(policies=policies, reward_model=model, prompts=data / "heldout.jsonl", max_new_tokens=4, name=name)
    return recipe.run(tmp_path_factory.mktemp("full") / "run")


def opened(folder):
    artifact = Artifact.open(folder)
    trunk, _ = open_trunk(artifact.base, artifact, "float32")
    return artifact, trunk, load_role(trunk, artifact)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_fully_trained_stage_holds_a_whole_model(name, full_run, tiny_base):
    artifact, trunk, role = opened(full_run / name)
    assert artifact.facts["model"]["form"] == "full"
    assert role.adapters == ()
    saved = load_file(full_run / name / MODEL / "model.safetensors")
    base = load_file(tiny_base / "model.safetensors")
    assert saved.keys() == base.keys()
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    moved = [key for key in base if not torch.equal(saved[key], base[key])]
    assert len(moved) == len(base)
    assert trunk.peft is None
    assert (full_run / name / HEAD).is_file() is (name == "reward")


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_fully_trained_policy_is_a_model_for_transformers(name, full_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, trunk, role = opened(full_run / name)
    plain = AutoModelForCausalLM.from_pretrained(full_run / name / MODEL, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(torch.tensor([[3, 50, 51, 4, 60, 61, 1]])).logits[0]
        expected = torch.log_softmax(logits, -1)[3:6].gather(1, torch.tensor([[60], [61], [1]]))[:, 0]
        torch.testing.assert_close(forward(trunk, role, ROW).logprobs[:3], expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(full_run / name / MODEL).chat_template


def test_the_first_dpo_loss_is_ln_2_with_all_weights_trained(full_run):
    first = json.loads((full_run / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert abs(first["margin"]) < 1e-4


def test_all_policies_are_compared_by_either_reward_model(full_run):
    for name in ("by_full", "by_light"):
        table = json.loads((full_run / name / "results.json").read_text())["policies"]
        assert [line["name"] for line in table] == ["base", "sft", "dpo", "ppo"]
        for line in table:  # a completion that was cut is not scored
            assert (line["score"] is None) is (line["scored"] == 0)
        assert sum(line["scored"] for line in table) > 0
    # the first policy is the base; the others stand on weights of their own, so KL to it is unknown
    assert table[0]["kl"] == 0
    assert [line["kl"] for line in table[1:]] == [None, None, None]


def test_an_adapter_on_fully_trained_weights_stands_on_them(full_run):
    sft, light, reward = (Artifact.open(full_run / name) for name in ("sft", "light", "reward"))
    assert root_identity(light.base, light) == sft.identity
    assert root_identity(reward.base, reward) == reward.identity
    _, trunk, role = opened(full_run / "ppo")
    assert len(role.adapters) == 1
    with torch.no_grad():
        plain = forward(Trunk.load(full_run / "sft" / MODEL, torch.float32), Role(), ROW).logprobs
        torch.testing.assert_close(forward(trunk, Role(), ROW).logprobs, plain, atol=1e-6, rtol=1e-6)


def test_ppo_against_a_fully_trained_reward_model_is_refused(full_run, tiny_base, data, tmp_path):
    recipe = Recipe("refused", base=str(tiny_base), dtype="float32")
    sft, reward = recipe.load(full_run / "sft"), recipe.load(full_run / "reward")
    recipe.ppo(policy=sft, reward_model=reward, prompts=data / "prompts.jsonl", **PPO)
    with pytest.raises(AlignError, match="the reward model 'reward' stands on other weights"):
        recipe.run(tmp_path / "run")


def test_all_weights_are_trained_on_top_of_an_adapter_merged_first(small_run, tiny_base, data, tmp_path):
    """From the adapter of `sft`: the loss before the first step is that of the stack."""
    recipe = Recipe("merged", base=str(tiny_base), dtype="float32")
    sft = recipe.load(small_run / "sft")
    recipe.sft(policy=sft, data=data / "chat.jsonl", name="more", **{**FULL, "learning_rate": 1e-30})
    recipe.sft(policy=sft, data=data / "chat.jsonl", name="stacked", **{**LORA, "learning_rate": 1e-30})
    run = recipe.run(tmp_path / "run")
    more, stacked = (Artifact.open(run / name).facts["metrics"] for name in ("more", "stacked"))
    assert more["heldout_loss_before"] == pytest.approx(stacked["heldout_loss_before"], rel=1e-5)
    assert more["heldout_loss"] == pytest.approx(stacked["heldout_loss"], rel=1e-5)
    _, trunk, role = opened(run / "more")
    _, stack, stack_role = opened(small_run / "sft")
    with torch.no_grad():
        torch.testing.assert_close(forward(trunk, role, ROW).logprobs, forward(stack, stack_role, ROW).logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_all_weights_are_trained_in_the_processor_s_own_precision(checkpointed, tiny_base, data, tmp_path):
    """Without dtype="float32": matrix products in bfloat16 where that is native, weights in float32."""
    recipe = Recipe("native", base=str(tiny_base))
    settings = {**FULL, "gradient_checkpointing": checkpointed}
    sft = recipe.sft(data=data / "chat.jsonl", **settings)
    recipe.reward(policy=sft, preferences=data / "preferences.jsonl", **settings)
    recipe.dpo(policy=sft, preferences=data / "preferences.jsonl", **settings)
    run = recipe.run(tmp_path / "run")
    for name in ("sft", "reward", "dpo"):
        saved = load_file(run / name / MODEL / "model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())
        opened(run / name)  # a reward model's probes are checked here


def test_a_reward_model_leaves_an_output_layer_of_its_own_alone(data, tmp_path):
    """Where it isn't tied to the embedding, nothing reads it; it is saved as it was."""
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    recipe = Recipe("untied", base=str(tmp_path / "base"), dtype="float32")
    recipe.reward(preferences=data / "preferences.jsonl", **FULL)
    artifact, trunk, role = opened(recipe.run(tmp_path / "run") / "reward")
    assert role.head in trunk.heads
    assert torch.equal(trunk.output_layer.weight, load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"])
    assert artifact.facts["checks"]["probe_scores"]
