"""Intervals and tests for accuracies: of one model, and of two models on the same images."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

LEVEL = 0.05  # the level of every test; intervals have 1 - LEVEL
POWER = 0.8  # for smallest_visible_difference
Z = float(stats.norm.ppf(1 - LEVEL / 2))


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(num_right: ArrayLike, num_images: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of Wilson's 95 % score interval of num_right / num_images, elementwise. num_images > 0.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    n = np.asarray(num_images, dtype=float)
    share = np.asarray(num_right, dtype=float) / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # For a share of 0 or 1 one end is exactly 0 or 1. The sum above can miss it by a rounding error.
    low = np.where(share == 0, 0.0, np.maximum(centre - half, 0.0))
    high = np.where(share == 1, 1.0, np.minimum(centre + half, 1.0))
    return low, high


def wilson_interval(num_right: float, num_images: int) -> Interval:
    """The share num_right / num_images with Wilson's 95 % interval."""
    low, high = wilson(num_right, num_images)
    return Interval(num_right / num_images, float(low), float(high))


def mcnemar_midp(only_a: ArrayLike, only_b: ArrayLike) -> np.ndarray:
    """Return the two-sided mid-p value of McNemar's test, elementwise.

    only_a: images that model a has right and b wrong; only_b: the reverse. Under the hypothesis that both
    models are equally accurate, only_a is binomial with n = only_a + only_b and probability 1/2. M. W.
    Fagerland, S. Lydersen, P. Laake, "The McNemar test for binary matched-pairs data: mid-p and asymptotic
    are better than exact conditional", BMC Medical Research Methodology 13:91 (2013).
    """
    only_a, only_b = np.asarray(only_a), np.asarray(only_b)
    fewer, total = np.minimum(only_a, only_b), only_a + only_b
    p = 2 * stats.binom.cdf(fewer, total, 0.5) - stats.binom.pmf(fewer, total, 0.5)
    return np.minimum(p, 1.0)


def tango_interval(only_a: int, only_b: int, num_images: int) -> Interval:
    """The difference (only_a - only_b) / num_images of two models with Tango's 95 % score interval.

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17 (1998).
    """
    n = num_images
    difference = (only_a - only_b) / n

    def score(delta: float) -> float:
        """The score statistic of the hypothesis that the true difference is delta."""
        # q is the most likely value of P(b right, a wrong) under the hypothesis: the root of a quadratic.
        b = -only_a - only_b + (2 * n - only_a + only_b) * delta
        c = -only_b * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        return (only_a - only_b - n * delta) / math.sqrt(max(variance, 1e-300))

    # The score falls as delta grows: it is Z at the lower end and -Z at the upper end.
    margin = 1e-12
    low, high = -1.0, 1.0
    if difference > -1:
        low = optimize.brentq(lambda delta: score(delta) - Z, -1 + margin, difference, xtol=1e-13)
    if difference < 1:
        high = optimize.brentq(lambda delta: score(delta) + Z, difference, 1 - margin, xtol=1e-13)
    return Interval(difference, low, high)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Correct p values for their number. Then the chance of any false alarm is at most the level.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return corrected


def smallest_visible_difference(disagreement: float, num_images: int) -> float:
    """The true difference in accuracy that McNemar's test would find in 80 % of test sets of this size.

    disagreement: the share of images that exactly one of the two models has right.
    """
    z_power = float(stats.norm.ppf(POWER))
    return (Z + z_power) * math.sqrt(disagreement / num_images)
