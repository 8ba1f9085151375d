"""Several runs (seeds) of one recipe: intervals that cover both other seeds and other images.

right[r, i] is 1 if run r has image i right. Runs and images are both random. So the variance of a mean has a
term for runs and a term for images. Both terms contain the interaction of runs and images, so it is
subtracted once. This is the two-way form of multi-reader multi-case studies. A single run says nothing about
the spread of runs. Its interval therefore covers other images only.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from modeling.stats.proportions import LEVEL, Interval, mcnemar_midp, tango_interval, wilson_interval


@dataclass(frozen=True)
class Difference:
    """How much more accurate recipe a is than recipe b, and the p value of no difference."""

    interval: Interval
    p: float
    only_a: float  # number of images that a has right and b wrong; several runs: the mean over pairs of runs
    only_b: float


def interaction_variance(right: np.ndarray) -> float:
    """The variance that neither run nor image explains. right: (R, n), with R and n at least 2."""
    rest = right - right.mean(axis=1, keepdims=True) - right.mean(axis=0) + right.mean()
    return float((rest**2).sum() / ((right.shape[0] - 1) * (right.shape[1] - 1)))


def run_variance(right: np.ndarray) -> float:
    """The runs' part of the variance of the mean accuracy. right: (R, n)."""
    num_runs = len(right)
    return 0.0 if num_runs == 1 else float(right.mean(axis=1).var(ddof=1)) / num_runs


def t_interval(value: float, terms: list[tuple[float, int]], variance: float) -> tuple[Interval, float]:
    """Return the 95 % interval of `value`, and the p value of the hypothesis that it is zero.

    Both use Student's t with Satterthwaite's degrees of freedom. terms: the estimated variances that add up
    to `variance`, each with its degrees of freedom.
    """
    degrees = variance**2 / sum(term**2 / df for term, df in terms if term > 0)
    error = np.sqrt(variance)
    half = float(stats.t.ppf(1 - LEVEL / 2, degrees) * error)
    p = float(2 * stats.t.sf(abs(value) / error, degrees))
    return Interval(value, value - half, value + half), p


def mean_of_runs(right: np.ndarray) -> Interval:
    """The accuracy of a recipe with its 95 % interval. right: (R, n) of 0 and 1.

    With one run it is Wilson's interval.
    """
    num_runs, num_images = right.shape
    right = right.astype(float)
    value = float(right.mean())
    by_wilson = wilson_interval(float(right.sum()) / num_runs, num_images)
    if num_runs == 1 or num_images == 1:
        return by_wilson
    images_term = float(right.mean(axis=0).var(ddof=1)) / num_images
    if images_term == 0:  # every image is right in the same number of runs, for example in all
        return by_wilson
    runs_term = run_variance(right)
    shared = interaction_variance(right) / (num_images * num_runs)
    variance = max(runs_term + images_term - shared, images_term)
    interval, _ = t_interval(value, [(runs_term, num_runs - 1), (images_term, num_images - 1)], variance)
    return Interval(value, max(interval.low, 0.0), min(interval.high, 1.0))


def mean_of_separate_runs(accuracies: np.ndarray) -> Interval:
    """The mean accuracy of R >= 2 runs that saw different images, with Student's 95 % interval."""
    value, num_runs = float(accuracies.mean()), len(accuracies)
    half = float(stats.t.ppf(1 - LEVEL / 2, num_runs - 1) * accuracies.std(ddof=1) / np.sqrt(num_runs))
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0))


def paired_difference(right_a: np.ndarray, right_b: np.ndarray) -> Difference:
    """Compare two recipes on the same n images. right_a: (R_a, n), right_b: (R_b, n), of 0 and 1.

    With one run each: McNemar's mid-p and Tango's interval. Otherwise: the two-way interval and its t test.
    """
    num_images = right_a.shape[1]
    share_a, share_b = right_a.mean(axis=0), right_b.mean(axis=0)
    only_a = float((share_a * (1 - share_b)).sum())
    only_b = float((share_b * (1 - share_a)).sum())
    if len(right_a) == len(right_b) == 1:
        return _difference_of_counts(round(only_a), round(only_b), num_images)

    right_a, right_b = right_a.astype(float), right_b.astype(float)
    per_image = share_a - share_b
    value = float(per_image.mean())
    images_term = float(per_image.var(ddof=1)) / num_images if num_images > 1 else 0.0
    if images_term == 0:  # the difference is the same on every image, or there is one image
        certain = _difference_of_counts(
            round(max(value, 0.0) * num_images), round(max(-value, 0.0) * num_images), num_images
        )
        return Difference(certain.interval._replace(value=value), certain.p, only_a, only_b)
    terms = [(images_term, num_images - 1)]
    variance = images_term
    for right in (right_a, right_b):
        num_runs = len(right)
        if num_runs > 1:
            runs_term = run_variance(right)
            terms.append((runs_term, num_runs - 1))
            variance += runs_term - interaction_variance(right) / (num_images * num_runs)
    interval, p = t_interval(value, terms, max(variance, images_term))
    clipped = Interval(value, max(interval.low, -1.0), min(interval.high, 1.0))
    return Difference(clipped, p, only_a, only_b)


def _difference_of_counts(only_a: int, only_b: int, num_images: int) -> Difference:
    p = float(mcnemar_midp(only_a, only_b))
    return Difference(tango_interval(only_a, only_b, num_images), p, only_a, only_b)
