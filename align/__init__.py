"""From a pretrained language model to an aligned one, in one recipe."""

import os

# Before torch is imported: its threads then wait for one another briefly rather than for milliseconds. As fast on a quiet
# machine (550 tokens/s of SFT either way on two cores), and 5 times faster beside another busy process.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

from align.data.sources import Source
from align.errors import AlignError
from align.handles import Comparison, Completions, Conversations, Evaluation, Policy, Preferences, RewardModel
from align.recipe import Recipe
from align.rewards import judged
from align.settings import Lora

__all__ = [
    "AlignError",
    "Comparison",
    "Completions",
    "Conversations",
    "Evaluation",
    "Lora",
    "Policy",
    "Preferences",
    "Recipe",
    "RewardModel",
    "Source",
    "__version__",
    "judged",
]

__version__ = "0.1.0"
