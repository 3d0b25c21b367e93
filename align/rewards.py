"""What a policy is rewarded for, as a recipe declares it: reward models, Python functions, judges, weighted sums of them. Imports no torch.

recipe.ppo(reward_model=reward_model, ...)                 one reward model of this recipe or of another run
recipe.ppo(reward=one_sentence, ...)                       a function (prompt, completion, row) -> number
recipe.ppo(reward=[(reward_model, 0.5), one_sentence])     a weighted sum; each part is named after what it is
recipe.ppo(reward={"kind": "org/any-reward-model"})        a sequence classifier of any tokenizer, under a name of its own
recipe.ppo(reward=judged("http://localhost:8000/v1#name")) a judge that scores each completion by a rubric (d-RLAIF)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.base import find_base
from align.errors import AlignError
from align.judge.open import fitting_template, judge_identity
from align.overrides import build
from align.settings import JudgeSettings

EXPECTED = "a reward model, a function (prompt, completion, row) -> number, judged(...), or the folder or hub id of a sequence classifier"


@dataclass(frozen=True)
class JudgeReward:
    """A judge that scores completions one by one, as `judged` makes it."""

    spec: Any  # a policy's handle, or what a user writes
    settings: JudgeSettings

    @property
    def name(self) -> str:
        """What the reward is called unless given a name."""
        return "judge"

    def facts(self) -> dict[str, Any]:
        """What decides its scores, but for a policy of the recipe, which is a parent of the stage."""
        facts = {"settings": self.settings.deciding(), "template": fitting_template(self.settings).fingerprint}
        return {**facts, "identity": judge_identity(self.spec)} if isinstance(self.spec, str) else facts


def judged(spec: Any, **settings: Any) -> JudgeReward:
    """A judge as PPO's reward: each completion's score by a rubric, from -1 for the lowest to 1 for the highest.

    Where the judge gives log-probabilities it is the mean of the scores it might give (d-RLAIF, arXiv 2309.00267, sec. 3.2).

    Args:
        spec: a policy of the recipe, 'embedded' or another base, the folder of a policy, or an endpoint 'http://host:port/v1#model'.
        **settings: of the judge (template, max_unparsed, concurrency, ...); the template is prompts/judge_score.txt unless given.

    Raises:
        AlignError: where a setting does not fit, or the template is not one that scores.
    """
    spec = os.fspath(spec) if isinstance(spec, os.PathLike) else spec
    if not (isinstance(spec, str) or hasattr(spec, "artifact")):
        raise AlignError(
            f"judged: {spec!r} names no judge; expected a policy, a base, a folder or an endpoint 'http://host:port/v1#model'."
        )
    made = JudgeReward(spec, build(JudgeSettings, {"template": "prompts/judge_score.txt", **settings}, "judged"))
    if made.settings.constitution is not None:
        raise AlignError("judged: a completion is scored by the template's own rubric; leave constitution= out.")
    if (template := fitting_template(made.settings)).kind != "score":
        raise AlignError(f"judged: {template.path} is for pairs; expected a template that scores one completion (kind: score).")
    return made


@dataclass(frozen=True)
class Reward:
    """One part of the score. `source` is a reward model's handle, a function, or a folder or hub id."""

    name: str
    weight: float
    source: Any
    role: str = ""  # of a reward model among the stage's inputs

    @property
    def kind(self) -> Literal["function", "classifier", "judge", "reward_model"]:
        """What it is."""
        if isinstance(self.source, str):
            return "classifier"
        if isinstance(self.source, JudgeReward):
            return "judge"
        return "function" if inspect.isfunction(self.source) else "reward_model"

    def facts(self, stage: str) -> dict[str, Any]:
        """What decides its scores, and for a function the source, for the identity of the stage and its artifact.

        Raises:
            AlignError: where a classifier is not there.
        """
        facts: dict[str, Any] = {"name": self.name, "weight": self.weight, "kind": self.kind}
        if self.kind == "function":
            return {**facts, "identity": function_identity(self.source, self.name), "source": inspect.getsource(self.source)}
        if self.kind == "classifier":
            try:
                return {**facts, "identity": find_base(self.source).identity, "source": self.source}
            except AlignError as error:
                raise AlignError(f"{stage}: reward {self.name!r}: {error}") from None
        if self.kind == "judge":
            return {**facts, "role": self.role, **self.source.facts()}
        return {**facts, "role": self.role}  # a parent of the stage, which has its identity


def as_rewards(reward_model: Any, reward: Any, stage: str) -> tuple[Reward, ...]:
    """The parts of the score that `reward_model=` and `reward=` stand for.

    Args:
        reward_model: a reward model's handle with the weight 1, or None.
        reward: one of EXPECTED, or a list of them, or a dict that names them; each may be a pair with its weight. Or None.
        stage: starts every error.

    Raises:
        AlignError: where there is none, one is nothing that scores, or two have one name.
    """
    named = list(reward.items()) if isinstance(reward, Mapping) else [(None, each) for each in _listed(reward)]
    parts = [] if reward_model is None else [Reward(_name(reward_model), 1.0, reward_model, "reward_model")]
    for given, each in named:
        source, weight = each if isinstance(each, tuple) and len(each) == 2 else (each, 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise AlignError(f"{stage}: the weight of reward {given or source!r} is {weight!r}; expected a number.")
        source = os.fspath(source) if isinstance(source, os.PathLike) else source
        if not (isinstance(source, str | JudgeReward) or inspect.isfunction(source) or hasattr(source, "artifact")):
            raise AlignError(f"{stage}: reward is {source!r}; expected {EXPECTED}, or a list or a dict of these.")
        name = given or _name(source)
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise AlignError(f"{stage}: the reward name {name!r} may hold letters, digits, '-', '_' and '.' only.")
        if inspect.isfunction(source):
            function_identity(source, f"{stage}: reward {name!r}")
        parts.append(Reward(name, float(weight), source, f"rewards.{name}"))
    names = [part.name for part in parts]
    if not parts:
        raise AlignError(f"{stage}: nothing scores its completions. Give reward_model= or reward=: {EXPECTED}.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise AlignError(f'{stage}: two rewards are named {twice[0]!r}. Name them yourself: reward={{"one": ..., "other": ...}}.')
    return tuple(parts)


def _listed(reward: Any) -> list[Any]:
    if reward is None:
        return []
    return reward if isinstance(reward, list) else [reward]


def _name(source: Any) -> str:
    if isinstance(source, str):
        return Path(source).name
    return source.__name__.strip("<>") if inspect.isfunction(source) else getattr(source, "name", "reward")


def function_identity(function: Callable, where: str) -> str:
    """A hash of a function's name and source, its defaults, and what it has captured from the function that made it.

    Other functions and globals that it uses are not in it: after changing those, run the stage again with --from.

    Raises:
        AlignError: where the source is not in a file, or something captured has no content that could be compared.
    """
    try:
        source = inspect.getsource(function)
    except OSError:
        raise AlignError(
            f"{where}: the source of {function.__name__} is in no file, so its results could not be told apart later. "
            "Define it in the recipe's file or in a module."
        ) from None
    captured = inspect.getclosurevars(function).nonlocals
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not inspect.Parameter.empty}
    values = {name: _content(value, f"{where}: {function.__name__} uses {name}") for name, value in {**defaults, **captured}.items()}
    return hashlib.sha256(json.dumps([function.__qualname__, source, values], sort_keys=True).encode()).hexdigest()


def _content(value: Any, where: str) -> Any:
    """A captured value as JSON."""
    if inspect.isfunction(value):
        return function_identity(value, where)
    if isinstance(value, Path):
        return str(value)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise AlignError(
            f"{where}, a {type(value).__name__}, whose content cannot be compared between runs. "
            "Make it inside the function, or at the top of the file."
        ) from None
