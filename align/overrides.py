"""Building settings from a recipe's keywords and the command line's `--set`, with errors that name the cure."""

from __future__ import annotations

import json
import types
import typing
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from align.errors import AlignError, did_you_mean
from align.settings import Settings

LISTED = 60  # names in a message

S = typing.TypeVar("S", bound=Settings)


def build(kind: type[S], values: dict[str, Any], where: str) -> S:
    """Settings of `kind` from keywords.

    Args:
        kind: the settings class.
        values: what was given; nested settings may be dicts or Settings.
        where: the stage's name, which starts every error.

    Raises:
        AlignError: naming every unknown or out-of-range setting at once, with the nearest name.
    """
    try:
        return kind.model_validate(_plain(values))
    except ValidationError as error:
        lines = [_explain(kind, problem, where) for problem in error.errors()]
        raise AlignError("\n".join(dict.fromkeys(lines))) from None


def _plain(value: Any) -> Any:
    """Settings to dicts and whole floats' ints to floats, so that strict validation takes `alpha=32`."""
    if isinstance(value, Settings):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _explain(kind: type[Settings], problem: Any, where: str) -> str:
    """One pydantic problem as a sentence: where, what was found, what was expected, what to do."""
    path = [str(part) for part in problem["loc"] if str(part) not in ("Lora", "str", "int", "float")]
    path = [part for part in path if not part.startswith(("tuple[", "literal["))]
    name = ".".join([where, *path])
    if problem["type"] == "extra_forbidden":
        parent = settings_at(kind, path[:-1]) or kind
        hint = did_you_mean(path[-1], parent.model_fields)
        names = list(parent.model_fields)
        there = f"There are: {', '.join(names)}." if len(names) <= LISTED else f"--help lists its {len(names)}."
        return f"{name}: there is no such setting.{hint} {there}"
    field = field_at(kind, path)
    expected = describe_type(field) if field else problem["msg"]
    return f"{name}: {problem['input']!r} does not fit; expected {expected}."


def settings_at(kind: type[Settings], path: list[str]) -> type[Settings] | None:
    """The settings class reached by following field names, or None."""
    for part in path:
        field = kind.model_fields.get(part)
        nested = field and nested_settings(field)
        if not nested:
            return None
        kind = nested
    return kind


def field_at(kind: type[Settings], path: list[str]) -> FieldInfo | None:
    """The field reached by following field names, or None."""
    parent = settings_at(kind, path[:-1])
    return parent.model_fields.get(path[-1]) if parent and path else None


def nested_settings(field: FieldInfo) -> type[Settings] | None:
    """The settings class a field holds (`Lora | None` gives Lora), or None."""
    for option in typing.get_args(field.annotation) or (field.annotation,):
        if isinstance(option, type) and issubclass(option, Settings):
            return option
    return None


def describe_type(field: FieldInfo) -> str:
    """A field's type and bounds in words: 'a whole number of at least 1', 'one of linear, cosine'."""
    names: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "none",
        Any: "anything",
    }
    options: tuple[Any, ...] = (field.annotation,)
    if typing.get_origin(field.annotation) in (types.UnionType, typing.Union):
        options = typing.get_args(field.annotation)
    words = []
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            words.append("one of " + ", ".join(typing.get_args(option)))
        elif typing.get_origin(option) is tuple:
            words.append("a list of texts")
        elif isinstance(option, type) and issubclass(option, Settings):
            words.append(f"settings ({', '.join(option.model_fields)})")
        else:
            words.append(names[option] if option in names else str(option))
    bounds = []
    for rule in field.metadata:
        for sign, text in (("ge", "at least"), ("gt", "over"), ("le", "at most"), ("lt", "under")):
            if hasattr(rule, sign):
                bounds.append(f"{text} {getattr(rule, sign)}")
    return " or ".join(words) + (f", {' and '.join(bounds)}" if bounds else "")


def parse_value(text: str) -> Any:
    """The value in `--set name=value`: JSON where it is JSON, none/true/false in any case, else the text itself."""
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        try:
            return float(text)  # .5 and 5., which are not JSON
        except ValueError:
            return text


def parse_override(text: str) -> tuple[list[str], Any]:
    """`ppo.lora.rank=8` as (['ppo', 'lora', 'rank'], 8).

    Raises:
        AlignError: where there is no name, no dot or no equals sign.
    """
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise AlignError(f"--set {text!r}: expected stage.setting=value, for example --set ppo.kl_coef=0.1")
    return path, parse_value(value.strip())


def replace_in(settings: Settings, path: list[str], value: Any, where: str) -> Settings:
    """A copy of the settings with the one that `path` names replaced, and checked anew."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    if len(path) == 1:
        return build(type(settings), {**values, path[0]: value}, where)
    nested = settings_at(type(settings), path[:1])
    if nested is None:
        return build(type(settings), {**values, ".".join(path): value}, where)
    inner = values[path[0]] or build(nested, {}, where)
    return build(type(settings), {**values, path[0]: replace_in(inner, path[1:], value, f"{where}.{path[0]}")}, where)


def help_lines(kind: type[Settings], prefix: str, now: Settings | None = None) -> list[tuple[str, str, str, str]]:
    """(name, value, type and bounds, meaning) of each setting, nested ones with their full name; the value is `now`'s or the default."""
    lines = []
    for name, field in kind.model_fields.items():
        nested = nested_settings(field)
        value = field.default if now is None else getattr(now, name)
        default = ("none" if value is None else "on") if nested else str(value).lower()
        lines.append((f"{prefix}.{name}", default, describe_type(field), field.description or ""))
        if nested:
            lines += help_lines(nested, f"{prefix}.{name}", value)
    return lines
