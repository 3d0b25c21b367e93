import functools
import re

import pytest

from align import Recipe
from align.errors import AlignError
from align.handles import RewardModel
from align.plan import make_plan
from align.rewards import as_rewards, function_identity, judged

MODEL = RewardModel("helpful")


def short(prompt, completion, row):
    """Fewer than 20 words."""
    return len(completion.split()) < 20


def ends(prompt, completion, row):
    return completion.endswith(".")


def refused(call, *arguments, **keywords):
    with pytest.raises(AlignError) as error:
        call(*arguments, **keywords)
    return str(error.value)


def told(reward, model=None):
    return [(part.name, part.weight, part.kind, part.role) for part in as_rewards(model, reward, "ppo")]


def test_a_judge_is_part_of_the_identity_with_its_template_and_settings(tiny_base):
    one, same, other = judged(str(tiny_base)), judged(tiny_base), judged(str(tiny_base), max_unparsed=0.5)
    facts = [as_rewards(None, reward, "ppo")[0].facts("ppo") for reward in (one, same, other)]
    assert facts[0] == facts[1] != facts[2]
    assert (facts[0]["kind"], facts[0]["name"]) == ("judge", "judge")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"spec": 3}, r"judged: 3 names no judge; expected a policy, a base"),
        ({"spec": "embedded", "template": "prompts/judge_pair.txt"}, r"judge_pair\.txt is for pairs; expected a template that scores"),
        ({"spec": "embedded", "constitution": "prompts/constitution.txt"}, r"leave constitution= out"),
        ({"spec": "embedded", "templat": "x"}, r"judged\.templat: there is no such setting. Did you mean 'template'\?"),
    ],
)
def test_what_is_no_scoring_judge_is_refused(given, told):
    with pytest.raises(AlignError, match=told):
        judged(**given)


def test_each_way_of_naming_rewards():
    assert told(None, MODEL) == [("helpful", 1.0, "reward_model", "reward_model")]
    assert told(short) == [("short", 1.0, "function", "rewards.short")]
    assert told("org/Some-Reward-2.0") == [("Some-Reward-2.0", 1.0, "classifier", "rewards.Some-Reward-2.0")]
    assert [part[:3] for part in told([(MODEL, 0.5), short])] == [("helpful", 0.5, "reward_model"), ("short", 1.0, "function")]
    assert [part[:3] for part in told((short, 2))] == [("short", 2.0, "function")]
    assert [part[:3] for part in told({"a": short, "b": (lambda p, c, r: 0.0, -1.5)}, MODEL)] == [
        ("helpful", 1.0, "reward_model"),
        ("a", 1.0, "function"),
        ("b", -1.5, "function"),
    ]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (None, "ppo: nothing scores its completions. Give reward_model= or reward=: a reward model, a function"),
        ([], "ppo: nothing scores its completions."),
        (
            3,
            "ppo: reward is 3; expected a reward model, a function (prompt, completion, row) -> number, judged(...), or the folder or",
        ),
        (functools.partial(short, row={}), "ppo: reward is functools.partial("),
        ([short, short], "ppo: two rewards are named 'short'. Name them yourself"),
        ({"a b": short}, "ppo: the reward name 'a b' may hold letters, digits, '-', '_' and '.' only."),
        ((short, "much"), "the weight of reward"),
        ((short, float("nan")), "the weight of reward"),
        ((short, True), "the weight of reward"),
    ],
)
def test_what_is_no_reward_is_refused_where_it_is_declared(reward, message):
    assert message in refused(as_rewards, None, reward, "ppo")


# A function's identity ----------------------------------------------------------------------------------------------------


def at_most(words, by=str.split):
    def few(prompt, completion, row):
        return len(completion.split()) <= words

    return few


def with_default(limit):
    def few(prompt, completion, row, limit=limit):
        return len(completion.split()) <= limit

    return few


def test_the_same_function_is_the_same_and_another_is_not():
    assert function_identity(short, "") == function_identity(short, "")
    assert function_identity(short, "") != function_identity(ends, "")


@pytest.mark.parametrize("make", [at_most, with_default])
def test_what_a_function_has_captured_is_part_of_it(make):
    assert function_identity(make(3), "") == function_identity(make(3), "")
    assert function_identity(make(3), "") != function_identity(make(4), "")
    assert function_identity(make([1, "a"]), "") != function_identity(make([1, "b"]), "")
    assert function_identity(make(short), "") != function_identity(make(ends), "")


def test_captured_things_whose_content_cannot_be_compared_are_refused():
    message = refused(as_rewards, None, at_most(re.compile("a")), "ppo")
    assert message.startswith("ppo: reward 'few': few uses words, a Pattern, whose content cannot be compared between runs.")
    assert "Make it inside the function, or at the top of the file." in message


def test_a_function_without_a_file_is_refused():
    scope: dict = {}
    exec("def made(prompt, completion, row):\n    return 1.0", scope)
    message = refused(as_rewards, None, scope["made"], "ppo")
    assert message.startswith("ppo: reward 'made': the source of made is in no file")


# In a recipe --------------------------------------------------------------------------------------------------------------


def plan_of(tiny_base, data, folder, reward=short, overrides=(), **settings):
    recipe = Recipe("r", base=str(tiny_base))
    recipe.ppo(prompts=data / "prompts.jsonl", reward=reward, **settings)
    for override in overrides:
        recipe.override(override)
    (planned,) = make_plan(recipe, folder)
    return planned


def test_rewards_and_weights_decide_a_stage_s_identity(tiny_base, data, tmp_path):
    rewards = [short, ends, (short, 0.5), {"other": short}, [short, ends], [ends, short], at_most(3), at_most(4)]
    identities = [plan_of(tiny_base, data, tmp_path, reward).identity for reward in rewards]
    assert len(set(identities)) == len(rewards)
    assert plan_of(tiny_base, data, tmp_path).identity == identities[0]


def test_a_classifier_that_is_not_there_is_refused_in_the_plan(tiny_base, data, tmp_path):
    message = refused(plan_of, tiny_base, data, tmp_path, str(tmp_path / "none"))
    assert message.startswith("ppo: reward 'none': base ")
    assert "found no such folder or file" in message


def test_a_reward_of_the_wrong_kind_of_handle_is_refused(tiny_base, data):
    recipe = Recipe("r", base=str(tiny_base))
    sft = recipe.sft(data=data / "chat.jsonl")
    message = refused(recipe.ppo, prompts=data / "prompts.jsonl", policy=sft, reward=[short, sft])
    assert message == "ppo: rewards.sft is a Policy (stage 'sft'); expected a RewardModel, from recipe.reward."


CONTRADICTIONS = {
    "rloo of one": ({"estimator": "rloo", "completions_per_prompt": 1}, "estimator=rloo compares completions of one prompt"),
    "grpo of one": ({"estimator": "grpo", "completions_per_prompt": 1}, "set completions_per_prompt to 2 or more"),
    "a value to warm up": ({"estimator": "reinforce++", "value_warmup": 1}, "has no value to warm up; set value_warmup=0"),
    "a value to put in": ({"estimator": "rloo", "on_cut": "bootstrap"}, "has no value to take a score's place; set on_cut=score"),
    "no token rewards": ({"estimator": "dr_grpo", "whiten_rewards": True}, "has no per-token rewards; set whiten_rewards=false"),
    "all warm-up": ({"value_warmup": 12}, "value_warmup=12 leaves no round for the policy; raise iterations (12)"),
    "a target of nothing": ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target multiplies kl_coef, which is 0; set kl_coef above 0"),
    "an address that is none": (
        {"sampler": "localhost:8000"},
        "sampler='localhost:8000' is no address; expected local, or a server's, such as",
    ),
    "a short horizon": ({"kl_target": 6.0, "kl_horizon": 47}, "kl_horizon=47 is under a round's 48 completions"),
    "nothing held out": ({"patience": 1, "max_kl": 3.0}, "patience and max_kl need evaluations; set holdout, such as 0.1"),
    "no such reward": ({"choose_by": "gold", "holdout": 0.1}, "choose_by='gold' names no reward of this stage; there is short"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused_before_anything_runs(case, tiny_base, data, tmp_path):
    settings, message = CONTRADICTIONS[case]
    found = refused(plan_of, tiny_base, data, tmp_path, **settings)
    assert found.startswith("ppo: ")
    assert message in found
    assert "(--set ppo.SETTING=...)" in found


def test_settings_may_come_to_agree_one_override_after_the_other(tiny_base, data, tmp_path):
    plan_of(tiny_base, data, tmp_path, overrides=["ppo.patience=2", "ppo.holdout=0.2"])


def test_defaults_contradict_nothing_for_any_estimator(tiny_base, data, tmp_path):
    for estimator in ("gae", "rloo", "grpo", "dr_grpo", "reinforce++"):
        plan_of(tiny_base, data, tmp_path, estimator=estimator)
