"""Signs that a run goes wrong, each told once with the setting that is likely to mend it."""

from __future__ import annotations

from dataclasses import dataclass, field

from align.settings import PPOSettings

KL_RUNS_AWAY = 25.0  # nats per completion; a reward model is worth following for ten or so
KL_PER_TOKEN = 0.2  # nats, of long completions
ENTROPY_LEFT = 0.2  # of the first round's
ALL_CUT = 0.95
SAME_SCORES = 0.01  # spread of the scores, of the widest round's
REPEATS = 0.25  # of the trigrams of words in an answer; plain prose stays under 0.05
AT_CLIP = 0.95  # mean score, of clip_scores
ROUNDS_TO_LEARN = 8  # before a value is expected to explain anything
RECENT = 5


@dataclass
class Watch:
    """What was seen of a run so far, in numbers that fit a checkpoint."""

    first_entropy: float | None = None
    widest: float = 0.0  # largest spread of a round's scores
    explained: list[float] = field(default_factory=list)  # explained variance of the last rounds
    told: dict[str, str] = field(default_factory=dict)  # sign -> the round in which it was told, and what

    def look(self, round_number: int, metrics: dict[str, float], settings: PPOSettings) -> list[str]:
        """What to tell the user after a round, numbered from 1."""
        self.first_entropy = metrics["entropy"] if self.first_entropy is None else self.first_entropy
        self.widest = max(self.widest, metrics["raw_score_spread"])
        if "explained_variance" in metrics:
            self.explained = [*self.explained, metrics["explained_variance"]][-RECENT:]
        signs = self._signs(round_number, metrics, settings)
        new = {sign: text for sign, text in signs.items() if text and sign not in self.told}
        self.told |= {sign: f"round {round_number}: {text}" for sign, text in new.items()}
        return list(new.values())

    def _signs(self, round_number: int, metrics: dict[str, float], settings: PPOSettings) -> dict[str, str]:
        """Sign -> its warning; empty where all is well."""
        kl, entropy, spread = metrics["kl"], metrics["entropy"], metrics["raw_score_spread"]
        bound = max(KL_RUNS_AWAY, KL_PER_TOKEN * metrics["length"], 3 * (settings.kl_target or 0))
        first_entropy = self.first_entropy or 0.0
        explained = sum(self.explained) / len(self.explained) if len(self.explained) == RECENT else 1.0
        return {
            "kl": f"KL to the reference is {kl:.0f} nats per completion: the policy runs away from what the reward was made for. "
            f"Raise kl_coef ({metrics['kl_coef']:.3g}), set kl_target, or lower learning_rate ({settings.learning_rate:g})."
            if kl > bound
            else "",
            "entropy": f"entropy fell from {first_entropy:.2f} to {entropy:.2f} nats per token: the policy says one thing only. "
            f"Set entropy_coef (such as 0.01), raise kl_coef ({metrics['kl_coef']:.3g}) or temperature ({settings.temperature:g})."
            if entropy < ENTROPY_LEFT * first_entropy
            else "",
            "repetition": f"{metrics['repetition']:.0%} of an answer's trigrams were there before: the reward pays for saying it again. "
            f"Stop at an earlier round (holdout, patience), raise kl_coef ({metrics['kl_coef']:.3g}), or use a reward that sees it."
            if metrics["repetition"] > REPEATS
            else "",
            "cut": f"{metrics['cut']:.0%} of the completions hit the limit of {settings.max_new_tokens} tokens and never end. "
            "Raise max_new_tokens, or set missing_eos_score below every other score so that ending pays."
            if metrics["cut"] >= ALL_CUT
            else "",
            "flat": f"every completion has the same score ({metrics['raw_score']:.3g}): there is nothing to learn from. Use a reward that "
            "tells good from better, or raise temperature or completions_per_prompt so that some completion is better."
            if self.widest == 0
            else "",
            "scores": f"the scores hardly differ any more (spread {spread:.2g}, mean {metrics['raw_score']:.3g}): nothing is "
            "left to gain. Stop here (iterations), or use a reward that tells good from better."
            if spread <= SAME_SCORES * self.widest and self.widest > 0
            else "",
            "clipped": f"the scores are at clip_scores ({settings.clip_scores}): better completions look no better. Raise it."
            if settings.clip_scores is not None and abs(metrics["score"]) > AT_CLIP * settings.clip_scores
            else "",
            "value": f"the value explains nothing of the returns (explained variance {explained:.2f} over {RECENT} rounds). Raise "
            f"value_learning_rate ({settings.value_learning_rate:g}), set value_warmup, or do without it: estimator=rloo."
            if round_number >= ROUNDS_TO_LEARN and explained <= 0
            else "",
        }
