import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, randomise, write_rows

from align import Lora, Recipe
from align.artifact import Artifact
from align.chat import Chat
from align.errors import AlignError
from align.handles import BASE
from align.model.compose import A, compose, save_composed
from align.model.load import ADAPTER, load_role, open_trunk
from align.model.trunk import Role
from align.run import execute
from align.trl_settings import ROWS, settings_of

FEW = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def two_stages(base, data):
    """A recipe whose policy stands on two adapters."""
    recipe = Recipe("bridge", base=str(base), dtype="float32")
    first = recipe.sft(data=data / "chat.jsonl", lora=Lora(rank=4), **SMALL)
    second = recipe.sft(data=data / "chat.jsonl", policy=first, name="again", lora=Lora(rank=2, rslora=True), seed=3, **SMALL)
    return recipe, second


def says_less(prompt, completion, row):
    """The shorter the better."""
    assert prompt[-1]["role"] == "user"
    assert "prompt" in row
    return -float(len(completion))


def logits(base, artifact):
    trunk, _ = open_trunk(base, artifact, "float32")
    with torch.no_grad(), trunk.switched_to(load_role(trunk, artifact)):
        return trunk.model(torch.arange(5, 25)[None]).logits


def data_of(trainer, data):
    return {"conversation": data / "chat.jsonl", "preference": data / "preferences.jsonl", "feedback": data / "preferences.jsonl"}.get(
        ROWS[trainer], data / "prompts.jsonl"
    )


@pytest.fixture(scope="module")
def made(tiny_base, data, tmp_path_factory):
    """A run with one stage of each trainer on the same policy, and a DPO stage of ours on KTO's result."""
    recipe, policy = two_stages(tiny_base, data)
    for trainer in ("SFT", "DPO", "KTO", "ORPO"):
        last = recipe.trl(trainer=trainer, policy=policy, data=data_of(trainer, data), name=f"trl-{trainer}", **FEW)
        if trainer == "KTO":
            kto = last
    sampling = {**FEW, "num_generations": 2, "max_completion_length": 8}
    rloo = recipe.trl(trainer="RLOO", policy=policy, data=data / "prompts.jsonl", reward=says_less, name="trl-RLOO", **sampling)
    distilling = {"trainer": "Distillation", "policy": policy, "data": data / "prompts.jsonl", **FEW, "max_completion_length": 8}
    recipe.trl(teacher=kto, name="trl-Distillation", **distilling)
    recipe.trl(teacher=policy, name="of-itself", **distilling)
    dpo = recipe.dpo(policy=kto, preferences=data / "preferences.jsonl", lora=Lora(rank=4), **SMALL)
    reward = recipe.reward(policy=policy, preferences=data / "preferences.jsonl", lora=Lora(rank=4), **SMALL)
    recipe.evaluate(policies=[policy, kto, rloo, dpo], reward_model=reward, prompts=data / "heldout.jsonl", max_new_tokens=8)
    run = tmp_path_factory.mktemp("bridge") / "run"
    execute(recipe, run)
    return run


def test_a_composed_adapter_adds_what_the_stack_adds(made, tmp_path):
    policy = Artifact.open(made / "again")
    folders = [artifact.folder / ADAPTER for artifact in policy.chain()]
    save_composed(folders, tmp_path / "one")
    trunk, _ = open_trunk(policy.base, None, "float32")
    trunk.load_adapter("one", tmp_path / "one")
    with torch.no_grad(), trunk.switched_to(Role(("one",))):
        one = trunk.model(torch.arange(5, 25)[None]).logits
    stack = logits(policy.base, policy)
    assert (one - logits(policy.base, None)).abs().max() > 1e-3  # the adapters do something
    torch.testing.assert_close(one, stack, atol=2e-5, rtol=1e-5)


def test_composing_adapters_of_different_layers(trunk, tmp_path):
    for name, targets, rank in (("one", ("q_proj", "v_proj"), 3), ("two", ("v_proj", "down_proj"), 5)):
        trunk.add_adapter(name, Lora(targets=targets, rank=rank), 0)
        randomise(trunk, name, seed=rank)
        trunk.save_adapter(name, tmp_path / name)
    config, weights = compose([tmp_path / "one", tmp_path / "two"])
    assert config.r == 8
    assert {weights[name].shape[0] for name in weights if name.endswith(A)} == {8}
    save_composed([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    trunk.load_adapter("both", tmp_path / "both")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), trunk.switched_to(Role(("one", "two"))):
        stack = trunk.model(ids).logits
    with torch.no_grad(), trunk.switched_to(Role(("both",))):
        torch.testing.assert_close(trunk.model(ids).logits, stack, atol=1e-5, rtol=1e-5)


def test_dora_cannot_be_composed(trunk, tmp_path):
    trunk.add_adapter("dora", Lora(dora=True, rank=2), 0)
    trunk.save_adapter("dora", tmp_path / "dora")
    with pytest.raises(AlignError, match=r"is DoRA, which cannot be added.*lora\.dora=false"):
        compose([tmp_path / "dora"])


@pytest.mark.parametrize("trainer", ["SFT", "DPO", "KTO", "ORPO", "RLOO", "Distillation"])
def test_a_trainer_of_trl_leaves_a_policy_of_ours(made, trainer):
    artifact = Artifact.open(made / f"trl-{trainer}", verify=True)
    assert artifact.kind == "policy"
    assert artifact.facts["model"]["form"] == "composed"
    assert artifact.chain() == [artifact]  # it holds the stack below it
    assert artifact.facts["checks"]["change_at_start"] < 1e-4
    assert {file.name for file in (artifact.folder / ADAPTER).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    before, after = logits(artifact.base, Artifact.open(made / "again")), logits(artifact.base, artifact)
    assert float((before - after).abs().max()) > 1e-4  # it learned
    lines = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_the_reference_is_the_policy_that_training_starts_from(made):
    first = json.loads((made / "trl-DPO" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_a_teacher_is_the_policy_that_it_was_given_as(made):
    """A policy that learns from itself has nothing to learn; from another it has."""
    first = {
        name: json.loads((made / name / "metrics.jsonl").read_text().splitlines()[0])["loss"] for name in ("of-itself", "trl-Distillation")
    }
    assert abs(first["of-itself"]) < 1e-5
    assert first["trl-Distillation"] > 1e-3
    assert Artifact.open(made / "trl-Distillation").facts["parents"]["teacher"]["name"] == "trl-KTO"


def test_what_trl_made_goes_on_as_any_policy_does(made):
    dpo = Artifact.open(made / "dpo")
    assert [artifact.name for artifact in dpo.chain()] == ["trl-KTO", "dpo"]
    assert dpo.facts["checks"]["margin_at_start"] == 0
    table = {line["name"]: line for line in json.loads((made / "evaluate" / "results.json").read_text())["policies"]}
    assert table["trl-KTO"]["kl"] > 0
    assert table["trl-RLOO"]["kl"] > 0


def test_a_second_run_does_nothing_and_a_setting_of_trl_s_runs_the_stage_again(made, tiny_base, data):
    from align.plan import make_plan

    recipe, policy = two_stages(tiny_base, data)
    recipe.trl(trainer="KTO", policy=policy, data=data / "preferences.jsonl", name="trl-KTO", **FEW)
    assert [planned.state for planned in make_plan(recipe, made)] == ["done"] * 3
    recipe.override("trl-KTO.beta=0.3")
    assert [planned.state for planned in make_plan(recipe, made)] == ["done", "done", "run"]
    assert "beta 0.1 -> 0.3" in make_plan(recipe, made)[-1].reason


def test_unpaired_feedback_is_read_as_it_is(tmp_path, tiny_base):
    from align.data.mix import load_data
    from align.data.sources import Source

    rows = [{"prompt": "say red", "completion": "red", "label": True}, {"prompt": "say blue", "completion": "eulb", "label": False}]
    data = load_data((Source(str(write_rows(tmp_path / "kto.jsonl", rows))),), "feedback", "test")
    assert [(record["completion"][0]["content"], record["label"]) for record in data.records()] == [("red", True), ("eulb", False)]


def test_preferences_are_feedback_too_and_undecided_ones_are_not(tmp_path):
    from align.data.mix import load_data
    from align.data.sources import Source

    rows = [{"prompt": f"say {p}", "chosen": "yes", "rejected": "no", "chosen_probability": p} for p in (1.0, 0.5, 0.2)]
    data = load_data((Source(str(write_rows(tmp_path / "pairs.jsonl", rows))),), "feedback", "test")
    assert [(record["completion"][0]["content"], record["label"]) for record in data.records()] == [
        ("yes", True), ("no", False), ("yes", False), ("no", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trainer": "PPO"}, r"there is no bridge to a trainer 'PPO'; there are SFT, DPO"),
        ({"trainer": "KTO", "betta": 1}, r"kto\.betta: there is no such setting\. Did you mean 'beta'\?"),
        ({"trainer": "KTO", "beta": "much"}, r"kto\.beta: 'much' does not fit; expected a number"),
        ({"trainer": "KTO", "report_to": "wandb"}, r"kto\.report_to: there is no such setting"),
        ({"trainer": "KTO", "reward": says_less}, r"kto: TRL's KTO trainer takes no reward; RLOO and GRPO do"),
        ({"trainer": "Distillation"}, r"distillation: TRL's Distillation trainer learns from one teacher: give teacher=POLICY"),
        ({"trainer": "Distillation", "teacher": BASE, "teacher_model_name_or_path": "a"}, r"learns from one teacher"),
        ({"trainer": "KTO", "teacher": BASE}, r"kto: TRL's KTO trainer takes no teacher; Distillation does"),
        ({"trainer": "RLOO"}, r"rloo: nothing scores its completions"),
        ({"trainer": "RLOO", "reward": "some/classifier"}, r"rloo: reward 'classifier' is a classifier; TRL is given functions"),
    ],
)
def test_mistakes_are_told_where_the_recipe_is_declared(tiny_base, data, given, message):
    recipe = Recipe("bad", base=str(tiny_base))
    with pytest.raises(AlignError, match=message):
        recipe.trl(data=data / "preferences.jsonl", **given)


def test_a_second_teacher_is_refused(tiny_base, data):
    recipe = Recipe("bad", base=str(tiny_base))
    recipe.trl(trainer="Distillation", data=data / "prompts.jsonl", teacher=recipe.base)
    with pytest.raises(AlignError, match="distillation has a teacher already, base. Take it out of the recipe first"):
        recipe.override("distillation.teacher_model_name_or_path=some/model")


def test_what_trl_refuses_is_told_with_the_stage(tiny_base, data, tmp_path):
    recipe = Recipe("bad", base=str(tiny_base), dtype="float32")
    recipe.trl(trainer="RLOO", data=data / "prompts.jsonl", reward=says_less, num_generations=3, per_device_train_batch_size=4)
    with pytest.raises(AlignError, match=r"rloo: TRL's RLOO trainer refuses this: .*generation.*\n.*--set rloo\.SETTING"):
        execute(recipe, tmp_path / "run")


def test_joined_adapters_that_change_the_policy_are_refused(tiny_base, data, tmp_path, monkeypatch):
    """An eighth too much of every B, which is far more than float32's rounding."""

    def wrong(folders):
        config, weights = compose(folders)
        return config, {name: weight * 1.125 if "lora_B" in name else weight for name, weight in weights.items()}

    recipe = Recipe("bad", base=str(tiny_base), dtype="float32")
    sft = recipe.sft(data=data / "chat.jsonl", lora=Lora(rank=4), **SMALL)
    recipe.trl(trainer="DPO", policy=sft, data=data / "preferences.jsonl", **FEW)
    monkeypatch.setattr("align.stages.trl.compose", wrong)
    with pytest.raises(AlignError, match=r"dpo: the policy's 1 adapters, joined into one, change logits by .*could be rounding"):
        execute(recipe, tmp_path / "run")


def test_what_trl_raises_in_training_is_not_called_a_refusal(tiny_base, data, tmp_path, monkeypatch):
    def stops(*arguments, **more):
        raise KeyError("advantages")

    recipe = Recipe("bad", base=str(tiny_base), dtype="float32")
    recipe.trl(trainer="DPO", data=data / "preferences.jsonl", **FEW)
    monkeypatch.setattr("transformers.Trainer.training_step", stops)
    with pytest.raises(AlignError, match=r"dpo: TRL's DPO trainer stopped in training: 'advantages'\n.*--set dpo\.SETTING"):
        execute(recipe, tmp_path / "run")


def fails(prompt, completion, row):
    """A reward with a mistake in it."""
    return 1 / 0


def test_a_failing_reward_is_told_with_its_row(tiny_base, data, tmp_path):
    recipe = Recipe("bad", base=str(tiny_base), dtype="float32")
    recipe.trl(trainer="GRPO", data=data / "prompts.jsonl", reward=fails, num_generations=2, max_completion_length=4, **FEW)
    with pytest.raises(AlignError, match=r"prompts\.jsonl:\d+: reward 'fails' raised ZeroDivisionError"):
        execute(recipe, tmp_path / "run")


def test_rows_that_trl_would_cut_are_left_out(tiny_base, data, tmp_path):
    recipe = Recipe("short", base=str(tiny_base), dtype="float32")
    recipe.trl(trainer="SFT", data=data / "chat.jsonl", max_length=12, **FEW)
    with pytest.raises(AlignError, match=r"sft: no row is left to train on: \d+ are over sft\.max_length \(12\)"):
        execute(recipe, tmp_path / "run")


def test_padding_is_not_the_end_of_a_turn(tiny_base):
    from align.stages.trl import _tokenizer

    chat = Chat.load(tiny_base)
    chat.tokenizer.pad_token = chat.tokenizer.eos_token
    made = _tokenizer(chat)
    assert made.eos_token_id == chat.end_of_turn != made.pad_token_id


@pytest.mark.parametrize("trainer", sorted(ROWS))
def test_every_setting_that_is_read_from_the_source_is_the_config_s(trainer):
    import importlib

    from align.trl_settings import OTHER_DEFAULTS, UNREAD, TRLSettings, module_of

    config = getattr(importlib.import_module(module_of(trainer)), f"{trainer}Config")
    fields = config.__dataclass_fields__
    own = {name: field for name, field in settings_of(trainer).model_fields.items() if name not in TRLSettings.model_fields}
    assert set(own) <= set(fields)
    assert {"learning_rate", "num_train_epochs", "max_grad_norm"} <= set(own)
    for name, field in own.items():
        if field.default != UNREAD and name not in OTHER_DEFAULTS and name != "learning_rate":
            assert field.default == fields[name].default, name


@pytest.mark.slow
def test_kto_and_rloo_on_the_real_model(smollm2, shared_data, tmp_path):
    recipe = Recipe("real", base="embedded")
    sft = recipe.sft(data=Path("datasets/chat.jsonl"), epochs=0.2, max_heldout=4)
    kto = recipe.trl(
        trainer="KTO",
        policy=sft,
        data=shared_data / "preference" / "kto_en_demo.json",
        max_steps=2,
        max_length=256,
        per_device_train_batch_size=4,
    )
    rloo = recipe.trl(
        trainer="RLOO",
        policy=kto,
        data=Path("datasets/prompts.jsonl"),
        reward=says_less,
        max_steps=2,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=16,
    )
    dpo = recipe.dpo(policy=rloo, preferences=Path("datasets/preferences.jsonl"), epochs=0.1, max_heldout=4)
    execute(recipe, tmp_path / "run")
    assert [a.name for a in Artifact.open(tmp_path / "run" / dpo.name).chain()] == ["rloo", "dpo"]
    for name in ("kto", "rloo"):
        artifact = Artifact.open(tmp_path / "run" / name)
        assert artifact.facts["checks"]["change_at_start"] < 0.25  # of logits of 16, in bfloat16; without its adapter 0.28
