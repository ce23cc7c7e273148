"""Confidence intervals for the numbers of a report, 95% by default.  Plain Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from statistics import correlation as pearson
from typing import NamedTuple


class Estimate(NamedTuple):
    """A number and the ends of its confidence interval."""

    mean: float
    lo: float
    hi: float


def wilson(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Ends of Wilson's score interval of a proportion of independent trials; also valid near 0 and 1.

    Several answers to one prompt are not independent: for those, use `mean_interval` over the prompts' means.

    Raises:  ValueError unless 0 <= successes <= n and n >= 1.
    Source:  Wilson 1927; Brown, Cai & DasGupta 2001, "Interval estimation for a binomial proportion".
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: expected 0 <= successes <= n and n >= 1, got successes={successes}, n={n}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    p = successes / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    variance = p * (1 - p) / n + z * z / (4 * n * n)
    half = z / shrink * math.sqrt(variance)

    # exact at 0 and n successes, where the subtraction would leave rounding noise
    lo = 0.0 if successes == 0 else centre - half
    hi = 1.0 if successes == n else centre + half
    return lo, hi


def mean_interval(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean of independent values (one per prompt, or one per seed) with Student's interval.

    The interval of a single value is infinite.

    Raises:  ValueError for no values.
    """
    if not values:
        raise ValueError("mean_interval: expected at least one value, got none")
    mean = fmean(values)
    n = len(values)
    if n == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = t_quantile(0.5 + level / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def share_interval(shares: Sequence[float], *, level: float = 0.95) -> Estimate:
    """`mean_interval` of shares, values from 0 to 1, with the ends clipped to [0, 1].

    Raises:  ValueError for no values.
    """
    mean, lo, hi = mean_interval(shares, level=level)
    return Estimate(mean, max(lo, 0.0), min(hi, 1.0))


def paired_interval(before: Sequence[float], after: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean of after - before with Student's interval, paired: both values of a pair share a prompt (or seed).

    Raises:  ValueError for lists of different or zero length.
    """
    if len(before) != len(after):
        raise ValueError(f"paired_interval: expected lists of one length, got {len(before)} and {len(after)}")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return mean_interval(differences, level=level)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; NaN if one of the two does not vary, or there are fewer than two values.

    Raises:  ValueError for lists of different length.
    """
    if len(x) != len(y):
        raise ValueError(f"correlation: expected lists of one length, got {len(x)} and {len(y)}")
    varied = all(len(values) > 1 and min(values) < max(values) for values in (x, y))
    return pearson(x, y) if varied else math.nan


class Bin(NamedTuple):
    """Predictions between two probabilities: how many, their mean, and the share of them that came true."""

    size: int
    predicted: float
    observed: float


def calibration(
    predicted: Sequence[float], outcome: Sequence[float], *, bins: int = 10
) -> tuple[float, list[Bin]]:
    """Expected calibration error of probabilities, and its bins of equal width without the empty ones.

    Raises:  ValueError for lists of different or zero length.
    Source:  Naeini, Cooper & Hauskrecht 2015, "Obtaining well calibrated probabilities using Bayesian
             binning".
    """
    if len(predicted) != len(outcome) or not predicted:
        raise ValueError(
            "calibration: expected two lists of one length, at least 1; "
            f"got {len(predicted)} and {len(outcome)}"
        )
    inside: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for p, y in zip(predicted, outcome, strict=True):
        index = min(int(p * bins), bins - 1)
        inside[index].append((p, y))

    filled = []
    for pairs in inside:
        if pairs:
            mean_predicted = fmean(p for p, _ in pairs)
            observed = fmean(y for _, y in pairs)
            filled.append(Bin(len(pairs), mean_predicted, observed))
    error = sum(b.size * abs(b.predicted - b.observed) for b in filled)
    return error / len(predicted), filled


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t with `df` degrees of freedom, for 0.5 <= p < 1, to 1e-9 relative.

    Source:  bisection of the distribution's finite series for integer df, Abramowitz & Stegun 26.7.3 and
             26.7.4.
    """
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"t_quantile: expected 0.5 <= p < 1 and df >= 1, got p={p}, df={df}")
    central = 2 * p - 1
    lo = 0.0
    hi = 1.0
    while _central(hi, df) < central:
        hi *= 2
    for _ in range(60):
        middle = (lo + hi) / 2
        if _central(middle, df) < central:
            lo = middle
        else:
            hi = middle
    return hi


def _central(t: float, df: int) -> float:
    """Probability that |T| < t."""
    angle = math.atan2(t, math.sqrt(df))
    odd = df % 2
    cos2 = math.cos(angle) ** 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for k in range(df // 2):
        total += term
        term *= cos2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    if odd:
        return (angle + total) * 2 / math.pi
    return total
