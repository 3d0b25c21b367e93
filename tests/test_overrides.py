import pytest

from align.errors import AlignError
from align.overrides import parse_override, parse_value, replace_in
from align.settings import PPOSettings, SFTSettings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        ("0.1", 0.1),
        ("1e-4", 1e-4),
        ("none", None),
        ("None", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("cosine", "cosine"),
        ('"none"', "none"),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_value_is_read_as_what_it_looks_like(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("5.", 5.0)])
def test_a_number_may_lack_digits_before_or_after_its_point(text, value):
    assert parse_value(text) == value


def test_a_path_is_cut_at_its_dots_and_a_value_may_hold_equals_signs():
    assert parse_override("ppo.lora.rank=8") == (["ppo", "lora", "rank"], 8)
    assert parse_override("sft.data=a=b.jsonl") == (["sft", "data"], "a=b.jsonl")
    assert parse_override(" ppo.kl_coef = 0.1 ") == (["ppo", "kl_coef"], 0.1)


@pytest.mark.parametrize("text", ["", "=", "ppo", "ppo=1", "ppo.kl_coef", "ppo.=1", ".kl_coef=1", "ppo..rank=1", "kl_coef=0.1"])
def test_what_is_no_setting_is_refused_with_an_example(text):
    with pytest.raises(AlignError) as error:
        parse_override(text)
    assert str(error.value) == f"--set {text!r}: expected stage.setting=value, for example --set ppo.kl_coef=0.1"


def test_replacing_changes_one_setting_and_leaves_the_original():
    settings = SFTSettings()
    changed = replace_in(settings, ["epochs"], 3, "sft")
    assert (changed.epochs, settings.epochs) == (3.0, 2.0)
    assert changed.model_dump(exclude={"epochs"}) == settings.model_dump(exclude={"epochs"})


def test_replacing_reaches_into_the_adapter_and_keeps_its_other_settings():
    settings = replace_in(SFTSettings(), ["lora", "alpha"], 8, "sft")
    assert replace_in(settings, ["lora", "rank"], 4, "sft").lora.model_dump() == {**settings.lora.model_dump(), "rank": 4}


def test_lora_none_and_back():
    without = replace_in(SFTSettings(), ["lora"], None, "sft")
    assert without.lora is None
    assert replace_in(without, ["lora", "rank"], 4, "sft").lora.rank == 4


def test_a_list_of_layers_may_be_given():
    assert replace_in(SFTSettings(), ["lora", "targets"], ["q_proj"], "sft").lora.targets == ("q_proj",)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["kl_cof"], 1, "ppo.kl_cof: there is no such setting. Did you mean 'kl_coef'?"),
        (["lora", "rnk"], 1, "ppo.lora.rnk: there is no such setting. Did you mean 'rank'?"),
        (["lora", "rank", "size"], 1, "ppo.lora.rank.size: there is no such setting."),
        (["kl_coef", "size"], 1, "ppo.kl_coef.size: there is no such setting."),
        (["kl_coef"], -1, "ppo.kl_coef: -1 does not fit; expected a number, at least 0"),
        (["kl_coef"], "much", "ppo.kl_coef: 'much' does not fit; expected a number, at least 0"),
        (["lora", "rank"], 0, "ppo.lora.rank: 0 does not fit; expected a whole number, at least 1 and at most 1024."),
        (["lora"], "big", "ppo.lora: 'big' does not fit; expected settings (rank, alpha, targets, dropout, dora, rslora)."),
    ],
)
def test_an_override_that_does_not_fit_says_which_and_why(path, value, message):
    with pytest.raises(AlignError) as error:
        replace_in(PPOSettings(), path, value, "ppo")
    assert str(error.value).startswith(message)
