"""From a pretrained language model to an aligned one, in one recipe."""

from align.errors import AlignError
from align.recipe import Evaluation, Policy, Recipe, RewardModel
from align.settings import Lora

__all__ = ["AlignError", "Evaluation", "Lora", "Policy", "Recipe", "RewardModel", "__version__"]

__version__ = "0.1.0"
