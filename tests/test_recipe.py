import shutil
from pathlib import Path

import pytest
from conftest import small_recipe, write_rows

from align import AlignError, Evaluation, Lora, Policy, Recipe, RewardModel
from align.plan import make_plan

ALL = ("sft", "reward", "dpo", "ppo", "evaluate")


def declare(recipe):
    """Every stage, on files that need not exist before a plan is made."""
    sft = recipe.sft(data="chat.jsonl")
    reward = recipe.reward(policy=sft, preferences="preferences.jsonl")
    dpo = recipe.dpo(policy=sft, preferences="preferences.jsonl")
    ppo = recipe.ppo(policy=sft, reward_model=reward, prompts="prompts.jsonl")
    evaluation = recipe.evaluate(policies=[recipe.base, sft, dpo, ppo], reward_model=reward, prompts="prompts.jsonl")
    return dict(zip(ALL, (sft, reward, dpo, ppo, evaluation), strict=True))


@pytest.fixture
def recipe():
    return Recipe("test", base="embedded")


@pytest.fixture
def handles(recipe):
    return declare(recipe)


def message_of(call, *arguments, **keywords):
    with pytest.raises(AlignError) as error:
        call(*arguments, **keywords)
    return str(error.value)


def test_every_stage_gives_a_handle_of_its_kind(handles):
    assert [type(handle) for handle in handles.values()] == [Policy, RewardModel, Policy, Policy, Evaluation]
    assert tuple(handles) == tuple(handle.name for handle in handles.values())


@pytest.mark.parametrize("wrong", ["reward", "evaluate"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_what_is_no_policy_is_refused_as_one_when_it_is_declared(recipe, handles, stage, wrong):
    files = {"sft": {"data": "a"}, "reward": {"preferences": "a"}, "dpo": {"preferences": "a"}, "ppo": {"prompts": "a"}}[stage]
    rest = {"reward_model": handles["reward"]} if stage == "ppo" else {}
    message = message_of(getattr(recipe, stage), policy=handles[wrong], name="next", **files, **rest)
    assert message.startswith(f"next: policy is a {type(handles[wrong]).__name__} (stage {wrong!r}); expected a Policy, from recipe.sft,")
    assert "next" not in recipe.stages


@pytest.mark.parametrize("wrong", ["sft", "evaluate"])
def test_what_is_no_reward_model_is_refused_as_one(recipe, handles, wrong):
    for stage, rest in (("ppo", {"policy": handles["sft"]}), ("evaluate", {"policies": [handles["sft"]]})):
        message = message_of(getattr(recipe, stage), reward_model=handles[wrong], prompts="a", name="next", **rest)
        assert (
            f"next: reward_model is a {type(handles[wrong]).__name__} (stage {wrong!r}); expected a RewardModel, from recipe.reward"
            in message
        )


@pytest.mark.parametrize("wrong", ["runs/a/sft", None, 3, Policy])
def test_what_is_no_handle_is_shown(recipe, wrong):
    assert message_of(recipe.dpo, policy=wrong, preferences="a").startswith(f"dpo: policy is {wrong!r}; expected a Policy")


def test_a_policy_among_several_is_named_by_its_place(recipe, handles):
    message = message_of(
        recipe.evaluate, policies=[handles["sft"], handles["reward"]], reward_model=handles["reward"], prompts="a", name="e"
    )
    assert message.startswith("e: policies.1 is a RewardModel (stage 'reward')")


def test_an_evaluation_wants_a_policy(recipe, handles):
    message = message_of(recipe.evaluate, policies=[], reward_model=handles["reward"], prompts="a", name="e")
    assert message == "e: 'policies' is empty; give a list of at least one policy, such as policies=[sft, ppo]."


def test_one_policy_in_place_of_a_list_is_refused(recipe, handles):
    message = message_of(recipe.evaluate, policies=handles["sft"], reward_model=handles["reward"], prompts="a", name="e")
    assert message == "e: 'policies' is a single Policy; give a list of at least one policy, such as policies=[sft, ppo]."


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", ".hidden", "a.b", "a=b", "-", "base", "sft"])
def test_a_stage_name_that_is_taken_or_no_name_is_refused(recipe, handles, name):
    message = message_of(recipe.sft, data="a", name=name)
    assert message.startswith(f"sft: the stage name {name!r} ")
    assert "name='sft2'" in message
    assert tuple(recipe.stages) == ALL


@pytest.mark.parametrize("name", ["archive", "tracker", "recipe"])
def test_a_stage_may_not_take_a_name_that_a_run_or_the_command_line_uses(recipe, name):
    message_of(recipe.sft, data="a", name=name)


def test_the_second_stage_of_a_kind_needs_a_name_of_its_own(recipe, handles):
    assert "'sft' is taken" in message_of(recipe.sft, data="a")
    assert recipe.sft(data="a", name="sft-2_b").name == "sft-2_b"


def test_a_handle_of_another_recipe_is_refused(recipe):
    other = Recipe("other", base="embedded").sft(data="a", name="elsewhere")
    message = message_of(recipe.dpo, policy=other, preferences="a")
    assert message == "dpo: policy is stage 'elsewhere' of another recipe; declare it here, or use recipe.load(folder)."


def test_a_handle_of_another_recipe_is_refused_even_where_a_stage_here_has_its_name(recipe, handles):
    other = declare(Recipe("other", base="embedded"))
    assert "of another recipe" in message_of(recipe.dpo, policy=other["sft"], preferences="a", name="next")


def test_settings_are_checked_when_a_stage_is_declared(recipe):
    message = message_of(recipe.sft, data="a", lerning_rate=1, epochs=0)
    assert "sft.lerning_rate: there is no such setting. Did you mean 'learning_rate'?" in message
    assert "sft.epochs: 0 does not fit" in message
    assert not recipe.stages


def test_the_seed_is_the_recipes_unless_given():
    recipe = Recipe("test", base="embedded", seed=5)
    recipe.sft(data="a")
    recipe.dpo(preferences="a", seed=7)
    assert [stage.settings.seed for stage in recipe.stages.values()] == [5, 7]


def test_overriding_the_recipes_seed_changes_the_stages_that_were_given_none(recipe):
    recipe.sft(data="a")
    recipe.dpo(preferences="a", seed=7)
    recipe.override("recipe.seed=3")
    assert (recipe.seed, [stage.settings.seed for stage in recipe.stages.values()]) == (3, [3, 7])


def test_overriding_the_recipes_seed_leaves_a_stages_own_though_it_is_the_same_number(recipe):
    recipe.sft(data="a", seed=0)
    recipe.override("recipe.seed=3")
    assert recipe.stages["sft"].settings.seed == 0


@pytest.mark.parametrize("name", ["wandbb", "", "all"])
def test_an_unknown_tracker_is_refused_with_those_there_are(recipe, name):
    for message in (message_of(Recipe, "test", base="embedded", tracker=name), message_of(recipe.override, f'recipe.tracker="{name}"')):
        assert "tensorboard, wandb, trackio, mlflow" in message
    assert recipe.tracker is None


def test_an_unknown_dtype_is_refused_with_those_there_are(recipe):
    for message in (message_of(Recipe, "test", base="embedded", dtype="float16"), message_of(recipe.override, "recipe.dtype=float16")):
        assert "bfloat16, float32" in message


def test_what_belongs_to_the_recipe_can_be_overridden(recipe):
    for text in ("recipe.base=org/model", "recipe.revision=v1", "recipe.tracker=wandb", "recipe.dtype=float32"):
        recipe.override(text)
    assert (recipe.base_model, recipe.revision, recipe.tracker, recipe.dtype) == ("org/model", "v1", "wandb", "float32")
    for text in ("recipe.tracker=none", "recipe.dtype=none"):
        recipe.override(text)
    assert (recipe.tracker, recipe.dtype) == (None, None)


def test_a_revision_of_none_is_no_revision(recipe):
    recipe.override("recipe.revision=none")
    assert recipe.revision is None


@pytest.mark.parametrize("text", ["recipe.seed=-1", "recipe.seed=x", "recipe.seed=1.5", "recipe.nmae=x", "recipe.seed.x=1"])
def test_what_the_recipe_does_not_have_is_refused_with_what_it_has(recipe, handles, text):
    message = message_of(recipe.override, text)
    assert message.startswith("--set recipe.")
    assert all(name in message for name in ("recipe.base", "recipe.revision", "recipe.seed", "recipe.tracker"))


def test_an_unknown_stage_is_refused_with_those_there_are(recipe, handles):
    message = message_of(recipe.override, "pppo.kl_coef=1")
    assert message == "--set pppo.kl_coef=1: this recipe has no stage 'pppo'. It has: sft, reward, dpo, ppo, evaluate, and recipe."


def test_settings_are_overridden_one_by_one(recipe, handles):
    for text in ("ppo.kl_coef=0.5", "sft.lora.rank=4", "dpo.lora=none", "sft.decay=cosine"):
        recipe.override(text)
    settings = {name: stage.settings for name, stage in recipe.stages.items()}
    assert (settings["ppo"].kl_coef, settings["sft"].lora, settings["dpo"].lora) == (0.5, Lora(rank=4), None)
    assert settings["sft"].decay == "cosine"


def test_a_data_file_can_be_overridden(recipe, handles):
    recipe.override("sft.data=other.jsonl")
    recipe.override("ppo.prompts=a=b.jsonl")
    assert [source.path for source in recipe.stages["sft"].data["data"][0]] == ["other.jsonl"]
    assert [source.path for source in recipe.stages["ppo"].data["prompts"][0]] == ["a=b.jsonl"]


@pytest.mark.parametrize("name", ["2024", "1.50", "none", "1e3"])
def test_a_data_files_name_is_taken_as_it_is_written(recipe, handles, name):
    recipe.override(f"sft.data={name}")
    assert [source.path for source in recipe.stages["sft"].data["data"][0]] == [name]


def demonstrations(recipe, run):
    """The file that a plan centres the reward model on, or None."""
    reward = next(planned for planned in make_plan(recipe, run) if planned.stage.name == "reward")
    return reward.data["demonstrations"].facts["path"] if "demonstrations" in reward.data else None


def test_a_reward_model_is_centred_on_the_data_of_its_policy(tiny_base, data, tmp_path):
    recipe = small_recipe(tiny_base, data)
    assert demonstrations(recipe, tmp_path) == str(data / "chat.jsonl")
    for override in ("sft.data", "reward.demonstrations"):
        other = write_rows(tmp_path / f"{override}.jsonl", [{"prompt": "a", "completion": override}])
        recipe.override(f"{override}={other}")
        assert demonstrations(recipe, tmp_path) == str(other)


def test_a_reward_model_without_demonstrations_has_none(tiny_base, data, tmp_path):
    recipe = Recipe("test", base=str(tiny_base))
    recipe.reward(preferences=data / "preferences.jsonl")
    assert demonstrations(recipe, tmp_path) is None


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_an_artifact_of_another_run_is_a_handle_of_its_kind(recipe, finished, stage):
    loaded = recipe.load(finished / stage)
    assert type(loaded) is {"reward": RewardModel}.get(stage, Policy)
    assert loaded.artifact.folder == finished / stage


def test_only_what_a_stage_can_be_given_can_be_loaded(recipe, finished, tmp_path):
    shutil.copytree(finished / "evaluate", tmp_path / "compare")
    facts = tmp_path / "compare" / "artifact.json"
    facts.write_text(facts.read_text().replace('"kind": "evaluation"', '"kind": "comparison"'))
    assert "is a comparison; expected one of policy, reward_model" in message_of(recipe.load, tmp_path / "compare")
    assert "not an artifact" in message_of(recipe.load, finished)
    assert "not an artifact" in message_of(recipe.load, tmp_path / "nothing")


def test_a_loaded_artifact_is_a_parent_by_its_identity(finished, tiny_base, data, tmp_path):
    recipe = Recipe("next", base=str(tiny_base), dtype="float32")
    sft = recipe.load(finished / "sft")
    recipe.dpo(policy=sft, preferences=data / "preferences.jsonl")
    (planned,) = make_plan(recipe, tmp_path)
    assert planned.parents["policy"]["identity"] == sft.artifact.identity
    assert Path(planned.parents["policy"]["path"]) == finished / "sft"


def test_a_loaded_policy_is_not_taken_for_the_stage_of_its_name(finished, tiny_base, data, tmp_path):
    recipe = Recipe("next", base=str(tiny_base))
    loaded = recipe.load(finished / "sft")
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    recipe.sft(data=other)
    recipe.reward(policy=loaded, preferences=data / "preferences.jsonl")
    assert demonstrations(recipe, tmp_path / "run") is None
    make_plan(recipe, tmp_path / "run", only=["reward"])
