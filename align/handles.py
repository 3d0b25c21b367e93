"""What calling a stage returns: a typed name of what it will make, which other stages take. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.artifact import Artifact

if TYPE_CHECKING:
    from align.recipe import Recipe


@dataclass(frozen=True)
class Handle:
    """What a stage will make: its name, or the folder of an artifact from elsewhere."""

    name: str
    artifact: Artifact | None = None
    recipe: Recipe | None = None  # that declared it; none for the base and for an artifact from elsewhere


class Judge(Handle):
    """What can compare two completions."""


class Policy(Judge):
    """A model that answers: the base, or what sft, dpo and ppo make."""


class RewardModel(Judge):
    """A model that scores a completion."""


class Evaluation(Handle):
    """A comparison of policies."""


class Comparison(Handle):
    """Win rates of policies."""


class Completions(Handle):
    """Completions of prompts, several of each, not labelled."""


class Preferences(Handle):
    """Pairs of completions that a judge has labelled."""


class Conversations(Handle):
    """Prompts with answers to learn from."""


BASE = Policy("base")

KINDS: dict[str, type[Handle]] = {  # of artifacts that a stage may be given
    "policy": Policy,
    "reward_model": RewardModel,
    "completions": Completions,
    "preferences": Preferences,
    "conversations": Conversations,
    "evaluation": Evaluation,
}
MAKERS: dict[type[Handle], str] = {  # where each comes from, for the messages
    Judge: "a policy or a reward model",
    Policy: "from recipe.sft, recipe.dpo, recipe.ppo, recipe.trl or recipe.base",
    RewardModel: "from recipe.reward",
    Completions: "from recipe.sample",
    Preferences: "from recipe.label, or a file",
    Conversations: "from recipe.revise, or a file",
    Evaluation: "from recipe.evaluate",
    Comparison: "from recipe.compare",
}
