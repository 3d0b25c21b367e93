"""How sure a count lets one be: an interval for a share, and an exact paired test. Pure; imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> list[float]:
    """95 percent interval of a proportion (Wilson 1927, eq. 4)."""
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return [(centre - spread) / (1 + z**2 / trials), (centre + spread) / (1 + z**2 / trials)]


def sign_flip_test(differences: Sequence[float]) -> float:
    """The probability of a sum this large or larger if each difference were as likely to have the other sign.

    One-sided and exact (Fisher's randomisation test of paired differences). For differences of -1, 0 and 1 it is McNemar's exact
    test; for those of one size it is the sign test.

    Args:
        differences: each -1, -0.5, 0, 0.5 or 1.

    Returns:
        The p-value; 1 where nothing differs.
    """
    halves = sum(abs(d) == 0.5 for d in differences)
    wholes = sum(abs(d) == 1 for d in differences)
    assert halves + wholes == sum(d != 0 for d in differences), "differences are counted in halves"
    observed = round(2 * sum(differences))  # counted in halves, as all below
    at_least = [*itertools.accumulate(_binomials(wholes), initial=0)][::-1]  # ways to have at least j positive among the wholes
    ways = 0
    for i, count in enumerate(_binomials(halves)):
        rest = observed - (2 * i - halves)  # the wholes must give this: 2 (2 j - wholes) >= rest
        j = -(-(rest + 2 * wholes) // 4)
        ways += count * at_least[min(max(j, 0), wholes + 1)]
    return ways / 2 ** (halves + wholes)


def _binomials(n: int) -> list[int]:
    """The binomial coefficients of n."""
    found = [1]
    for k in range(n):
        found.append(found[-1] * (n - k) // (k + 1))
    return found


def prompts_needed(difference: float, interval: Sequence[float], prompts: int) -> int | None:
    """How many prompts would show a difference of this size: at 95 percent, four times in five.

    n = ((1.96 + 0.84) s / d)^2 (Chow et al., Sample Size Calculations in Clinical Research, sec. 3.1.1), with the spread s of the paired
    differences read back from the interval's width.

    Args:
        difference: a mean of paired differences.
        interval: its 95 percent interval by the normal approximation.
        prompts: how many there were.

    Returns:
        None where the difference is 0: no number would show it.
    """
    if difference == 0:
        return None
    spread = (interval[1] - interval[0]) / 2 / 1.96 * math.sqrt(prompts)
    return max(2, math.ceil(((1.96 + 0.8416) * spread / difference) ** 2))


def direction(interval: Sequence[float] | None) -> str | None:
    """Which way a difference goes, where its interval leaves no doubt of it."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return None
    return "better" if interval[0] > 0 else "worse"


def in_words(difference: float | None, interval: Sequence[float] | None, prompts: int, first: str) -> str:
    """What a difference to the first policy lets one say: no more than its interval does."""
    if difference is None or interval is None:
        return f"nothing can be said against {first}: fewer than two prompts have scores of both"
    if word := direction(interval):
        return f"{word} than {first} by {abs(difference):.2f} (95% {interval[0]:+.2f} to {interval[1]:+.2f})"
    needed = prompts_needed(difference, interval, prompts)
    more = f"; about {needed:,} would be needed for one of {abs(difference):.2f}" if needed is not None else ""
    return f"no difference to {first} shown with {prompts} prompts{more}"
