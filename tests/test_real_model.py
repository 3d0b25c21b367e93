"""The whole chain on SmolLM2 in the processor's own precision, cut short: what must be true at step 0 is."""

import math

import pytest

from align import Recipe
from align.artifact import Artifact
from align.files import shipped_file


def first_rows(name, count, folder):
    path = folder / name
    path.write_text("".join(shipped_file(f"datasets/{name}").read_text().splitlines(keepends=True)[:count]))
    return path


@pytest.fixture(scope="module")
def run(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    recipe = Recipe("real", base="embedded")
    preferences = first_rows("preferences.jsonl", 24, folder)
    sft = recipe.sft(data=first_rows("chat.jsonl", 24, folder), epochs=1.0)
    reward = recipe.reward(policy=sft, preferences=preferences)
    dpo = recipe.dpo(policy=sft, preferences=preferences)
    ppo = recipe.ppo(
        policy=sft,
        reward_model=reward,
        prompts=first_rows("prompts.jsonl", 8, folder),
        iterations=1,
        prompts_per_iteration=4,
        completions_per_prompt=2,
        epochs=2,
        minibatches=3,
        max_new_tokens=24,
    )
    heldout = first_rows("heldout_prompts.jsonl", 4, folder)
    recipe.evaluate(policies=[sft, dpo, ppo], reward_model=reward, prompts=heldout, max_new_tokens=24)
    return recipe.run(folder / "run")


@pytest.mark.slow
def test_what_must_be_true_at_step_0_is(run):
    checks = {name: Artifact.open(run / name, verify=True).facts["checks"] for name in ("sft", "reward", "dpo", "ppo")}
    assert checks["sft"]["change_at_start"] == checks["reward"]["change_at_start"] == checks["ppo"]["change_at_start"] == 0
    assert abs(checks["dpo"]["loss_at_start"] - math.log(2)) < 1e-4
    assert abs(checks["dpo"]["margin_at_start"]) < 1e-4
    assert checks["ppo"]["kl_at_start"] == 0
    assert checks["ppo"]["ratio_off_1_at_start"] == 0
    assert len(checks["reward"]["probe_scores"]) == 16


@pytest.mark.slow
def test_the_sampler_is_the_policy_up_to_rounding(run):
    assert Artifact.open(run / "ppo").facts["metrics"]["sampler_mismatch"] < 0.15


@pytest.mark.slow
def test_every_policy_answers(run):
    facts = Artifact.open(run / "evaluate").facts["metrics"]
    assert [row["name"] for row in facts["policies"]] == ["sft", "dpo", "ppo"]
    assert facts["policies"][0]["kl"] == 0
    assert all(row["length"] > 1 for row in facts["policies"])


@pytest.mark.slow
def test_the_control_token_is_pad_and_end_and_still_trained(smollm2):
    """SmolLM2's pad token equals its end token: the end of a turn must count all the same."""
    from align.chat import Chat
    from align.records import Message

    chat = Chat.load(smollm2)
    assert chat.tokenizer.pad_token_id == chat.end_of_turn
    example = chat.conversation(0, [Message(role="user", content="Hi"), Message(role="assistant", content="Hello.")])
    assert example.completions[0][-1] == chat.end_of_turn
    assert example.trained[0][-1]
