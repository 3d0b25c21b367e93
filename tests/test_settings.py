import pytest

from align.errors import AlignError
from align.overrides import build, describe_type, help_lines, nested_settings
from align.settings import DPOSettings, EvaluateSettings, Lora, PPOSettings, RewardSettings, Settings, SFTSettings, Training

KINDS = [SFTSettings, RewardSettings, DPOSettings, PPOSettings, EvaluateSettings]


def refused(kind, **values):
    with pytest.raises(AlignError) as error:
        build(kind, values, "stage")
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_setting_names_the_nearest_one_and_all_there_are(kind):
    name = next(iter(kind.model_fields))
    message = refused(kind, **{name + "s": 1})
    assert message.startswith(f"stage.{name}s: there is no such setting. Did you mean {name!r}?")
    assert all(field in message for field in kind.model_fields)


def test_an_unknown_setting_that_is_near_none_guesses_nothing():
    assert "Did you mean" not in refused(SFTSettings, qqq=1)


def test_an_unknown_setting_of_the_adapter_is_looked_up_among_the_adapters():
    message = refused(SFTSettings, lora={"rnak": 4})
    assert message.startswith("stage.lora.rnak: there is no such setting. Did you mean 'rank'?")
    assert "learning_rate" not in message


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("learning_rate", 0, "a number, over 0 and at most 1"),
        ("learning_rate", 1.5, "a number, over 0 and at most 1"),
        ("learning_rate", float("nan"), "a number, over 0 and at most 1"),
        ("learning_rate", float("inf"), "a number, over 0 and at most 1"),
        ("learning_rate", "fast", "a number, over 0 and at most 1"),
        ("learning_rate", True, "a number, over 0 and at most 1"),
        ("batch_size", 0, "a whole number, at least 1"),
        ("batch_size", 2.5, "a whole number, at least 1"),
        ("batch_size", "4", "a whole number, at least 1"),
        ("batch_size", None, "a whole number, at least 1"),
        ("holdout", 1, "a number, at least 0 and under 1"),
        ("decay", "fast", "one of linear, cosine, constant"),
        ("on_overlong", None, "one of error, drop, shorten_prompt, cut_completion"),
        ("gradient_checkpointing", "yes", "true or false or none"),
        ("lora", 8, "settings (rank, alpha, targets, dropout, dora, rslora) or none"),
        ("seed", -1, "a whole number, at least 0"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_was_expected(setting, value, expected):
    assert refused(SFTSettings, **{setting: value}) == f"stage.{setting}: {value!r} does not fit; expected {expected}."


@pytest.mark.parametrize("value", [{"rank": 0}, {"rank": "big"}, {"dropout": 1.0}, {"targets": 3}, {"dora": 1}])
def test_a_value_of_the_adapter_is_named_with_its_whole_path(value):
    (name, found), *_ = value.items()
    message = refused(DPOSettings, lora=value)
    assert message == f"stage.lora.{name}: {found!r} does not fit; expected {describe_type(Lora.model_fields[name])}."


def test_all_mistakes_are_told_at_once():
    message = refused(PPOSettings, iteratons=3, kl_coef=-1, lora={"rank": 0})
    lines = message.splitlines()
    assert [line.partition(":")[0] for line in sorted(lines)] == ["stage.iteratons", "stage.kl_coef", "stage.lora.rank"]


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_lie_within_their_own_bounds(kind):
    defaults = build(kind, {}, "stage")
    assert build(kind, defaults.model_dump(), "stage") == defaults


def test_whole_numbers_are_taken_where_numbers_are_expected():
    assert build(SFTSettings, {"epochs": 1, "lora": {"alpha": 8}}, "stage").lora.alpha == 8.0


def test_lora_may_be_settings_a_dict_or_none():
    assert build(SFTSettings, {"lora": Lora(rank=4)}, "s") == build(SFTSettings, {"lora": {"rank": 4}}, "s")
    assert build(SFTSettings, {"lora": None}, "s").lora is None


def test_settings_do_not_change_once_made():
    with pytest.raises(ValueError, match="frozen"):
        SFTSettings().epochs = 3.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "save_every" in kind.model_fields])
def test_how_often_a_checkpoint_is_written_decides_nothing(kind):
    assert build(kind, {"save_every": 7}, "s").deciding() == kind().deciding()


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_setting_decides(kind):
    left_out = set(kind.model_fields) - set(kind().deciding())
    assert left_out <= {"save_every", "samples_every", "max_bad_rows", "sampler", "gradient_checkpointing"}


@pytest.mark.parametrize("values", [{"seed": 1}, {"epochs": 3.0}, {"lora": None}, {"lora": {"rank": 4}}, {"lora": {"dropout": 0.5}}])
def test_a_setting_that_decides_changes_what_decides(values):
    assert build(SFTSettings, values, "s").deciding() != SFTSettings().deciding()


@pytest.mark.parametrize("kind", [*KINDS, Lora])
def test_help_says_type_bounds_default_and_meaning_of_every_setting(kind):
    lines = {name: (default, expected, meaning) for name, default, expected, meaning in help_lines(kind, "stage")}
    for name, field in kind.model_fields.items():
        default, expected, meaning = lines[f"stage.{name}"]
        assert expected == describe_type(field)
        assert "class" not in expected
        assert "typing" not in expected
        assert len(meaning) > 10
        assert meaning.endswith((".", ")"))
        assert default == ("on" if nested_settings(field) else str(field.default).lower())
        for rule in field.metadata:
            bound = next(getattr(rule, sign) for sign in ("ge", "gt", "le", "lt") if hasattr(rule, sign))
            assert str(bound) in expected
        if nested := nested_settings(field):
            assert {f"stage.{name}.{inner}" for inner in nested.model_fields} <= set(lines)


def test_types_are_described_in_words():
    fields = {**Training.model_fields, **PPOSettings.model_fields}
    assert describe_type(fields["batch_size"]) == "a whole number, at least 1"
    assert describe_type(fields["decay"]) == "one of linear, cosine, constant"
    assert describe_type(fields["missing_eos_score"]) == "a number or none"
    assert describe_type(Lora.model_fields["targets"]) == "a text or a list of texts"
    assert describe_type(fields["whiten_rewards"]) == "true or false"
    assert describe_type(fields["gradient_checkpointing"]) == "true or false or none"


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_says_what_it_is(kind):
    assert issubclass(kind, Settings)
    assert (kind.__doc__ or "").endswith((".", ").", "compare."))
