"""95 % intervals: of a success rate, of a mean, and of a mean over windows that share episodes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean, stdev

Z95 = NormalDist().inv_cdf(0.975)  # the normal distribution's 97.5 % quantile


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927), which holds for few episodes and at 0 and 1, too.

    Args:
        successes: k, from 0 to n.
        episodes: n, at least 1, independent of each other.

    Returns:
        (low, high) in [0, 1].

    Raises:
        ValueError: k or n out of range.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= episodes or episodes < 1:
        raise ValueError(f"{successes} successes of {episodes} episodes")
    low, high = binomtest(successes, episodes).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of independent values.

    Args:
        values: at least two, finite.

    Returns:
        (low, high) in the values' unit.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.special import stdtrit  # of Student's distribution, the inverse

    if len(values) < 2:
        raise ValueError(f"{len(values)} values: the interval of a mean needs two")
    quantile = float(stdtrit(len(values) - 1, 0.975))
    mean, half = fmean(values), quantile * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def ratio_half_width(totals: Sequence[float], counts: Sequence[float], episodes: Sequence[Hashable]) -> float | None:
    """Z95 standard errors of Σ totals / Σ counts over windows, episodes being the independent units.

    Windows of one episode resemble each other. Ratio estimator: with residuals r_g = Σ_{i in g} (total_i −
    mean·count_i) of G episodes, se = sqrt(G/(G−1) · Σ_g r_g²) / Σ counts.

    Args:
        totals, counts, episodes: of each window, equally many.

    Returns:
        None for a single episode, or when nothing is counted.
    """
    number = float(sum(counts))
    if len(set(episodes)) < 2 or not number:
        return None
    mean = float(sum(totals)) / number
    residuals: dict[Hashable, float] = dict.fromkeys(episodes, 0.0)
    for total, count, episode in zip(totals, counts, episodes, strict=True):
        residuals[episode] += float(total) - mean * float(count)
    groups = len(residuals)
    return Z95 * math.sqrt(groups / (groups - 1) * sum(r * r for r in residuals.values())) / number
