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
