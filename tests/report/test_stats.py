"""Intervals against published values: t tables, Wilson's interval in Brown, Cai & DasGupta, a hand-worked
paired test.
"""

from __future__ import annotations

import math

import pytest

from fastrl.report.stats import (
    correlation,
    mean_interval,
    paired_interval,
    share_interval,
    t_quantile,
    wilson,
)


@pytest.mark.parametrize(
    "df, expected",
    [
        (1, 12.7062047),
        (2, 4.3026527),
        (3, 3.1824463),
        (4, 2.7764451),
        (10, 2.2281389),
        (29, 2.0452296),
        (499, 1.9647294),
    ],
)
def test_t_quantile_equals_the_tables(df, expected):
    """Wrong implementation: the normal's 1.96 for three seeds (df 2),
    or the odd and even series exchanged.
    """
    assert t_quantile(0.975, df) == pytest.approx(expected, rel=1e-7)


def test_t_quantile_at_other_levels():
    assert t_quantile(0.95, 5) == pytest.approx(2.0150484, rel=1e-7)
    assert t_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="df >= 1"):
        t_quantile(0.975, 0)


@pytest.mark.parametrize(
    "successes, n, lo, hi",
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
    ],
)
def test_wilson_equals_known_values(successes, n, lo, hi):
    """Wrong implementation: the Wald interval, which has no width at 0 and n successes and leaves [0, 1]."""
    assert wilson(successes, n) == pytest.approx((lo, hi), abs=1e-6)


@pytest.mark.parametrize("successes, n", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(successes, n)


def test_paired_interval_uses_the_differences():
    """Wrong implementation: an unpaired interval, which is ten times as wide here; the sign of before and
    after exchanged.
    """
    before, after = [0.10, 0.50, 0.90, 0.30], [0.12, 0.53, 0.91, 0.34]
    mean, lo, hi = paired_interval(before, after)
    # differences 2, 3, 1, 4 hundredths
    half = 3.1824463 * math.sqrt(((0.5**2 + 0.5**2 + 1.5**2 + 1.5**2) * 1e-4) / 3) / 2
    assert (mean, lo, hi) == pytest.approx((0.025, 0.025 - half, 0.025 + half), rel=1e-6)


def test_one_value_has_no_interval_and_none_is_an_error():
    assert mean_interval([0.4]) == (0.4, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="2 and 1"):
        paired_interval([1.0, 2.0], [1.0])


def test_the_interval_of_shares_ends_where_shares_do():
    """Wrong implementations: an accuracy of -17% to 42%; ends cut off that lie within; the mean cut off with
    them.
    """
    assert mean_interval([0.0, 0.0, 1.0, 0.0]).lo < 0 and share_interval([0.0, 0.0, 1.0, 0.0]).lo == 0
    assert share_interval([1.0, 1.0, 0.0, 1.0])[:1] + share_interval([1.0, 1.0, 0.0, 1.0])[2:] == (0.75, 1.0)
    assert share_interval([0.4, 0.5, 0.6]) == mean_interval([0.4, 0.5, 0.6])
    assert share_interval([0.4]) == (0.4, 0.0, 1.0), "one prompt says nothing, and no share is infinite"


def test_correlation():
    """Wrong implementations: 0, or a division by it, where there is nothing to correlate; the lists cut to
    the shorter one.
    """
    assert correlation([0.0, 1.0, 2.0, 4.0], [1.0, 0.0, 3.0, 5.0]) == pytest.approx(0.90224364)
    assert math.isnan(correlation([1.0, 1.0], [0.0, 1.0])) and math.isnan(correlation([], []))
    with pytest.raises(ValueError, match="lists of one length, got 2 and 1"):
        correlation([1.0, 2.0], [1.0])
