"""How sure a count or a mean lets one be: intervals, an exact paired test, and how often one is right by how sure one was.

Pure; imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

Z95, Z80 = 1.959964, 0.841621  # quantiles of the normal distribution: 97.5 and 80 percent


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> list[float]:
    """95 percent interval of a proportion (Wilson 1927, eq. 4)."""
    share = successes / trials
    centre = share + z**2 / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return [(centre - spread) / (1 + z**2 / trials), (centre + spread) / (1 + z**2 / trials)]


def mean_interval(numbers: Sequence[float]) -> list[float] | None:
    """95 percent interval of a mean by Student's t; unknown for fewer than two numbers."""
    if len(numbers) < 2:
        return None
    half = t_quantile(len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers))
    return [fmean(numbers) - half, fmean(numbers) + half]


def t_quantile(freedom: int) -> float:
    """The 97.5 percent quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 0.15 percent.

    Abramowitz and Stegun 1964, eq. 26.7.5.
    """
    if freedom <= 2:
        return math.tan(0.475 * math.pi) if freedom == 1 else 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, n = Z95, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


@dataclass(frozen=True)
class Bin:
    """Verdicts of which one was about equally sure: how sure on average, and how often right."""

    low: float
    high: float
    n: int
    confidence: float
    right: float


def reliability(verdicts: Iterable[tuple[float, float]], bins: int) -> list[Bin]:
    """How often right by how sure, in bins of equal width from one half to one; empty bins are left out.

    Args:
        verdicts: confidence, from one half to one, and whether it was right, 1 or 0; half right counts half.
        bins: how many.
    """
    groups: dict[int, list[tuple[float, float]]] = {}
    for confidence, right in verdicts:
        groups.setdefault(min(int((confidence - 0.5) * 2 * bins), bins - 1), []).append((confidence, right))
    width = 0.5 / bins
    return [
        Bin(0.5 + at * width, 0.5 + (at + 1) * width, len(group), fmean(c for c, _ in group), fmean(right for _, right in group))
        for at, group in sorted(groups.items())
    ]


def calibration_error(bins: Sequence[Bin]) -> float | None:
    """Expected calibration error: how far right and sure are apart, averaged over verdicts (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    return sum(b.n * abs(b.right - b.confidence) for b in bins) / sum(b.n for b in bins) if bins else None


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
        interval: its 95 percent interval, of `mean_interval`.
        prompts: how many there were.

    Returns:
        None where the difference is 0: no number would show it.
    """
    if difference == 0:
        return None
    spread = (interval[1] - interval[0]) / 2 / t_quantile(prompts - 1) * math.sqrt(prompts)
    return max(2, math.ceil(((Z95 + Z80) * spread / difference) ** 2))


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
