"""Several models on the same images: averages, common errors, labels that all models contradict."""

from itertools import combinations

import numpy as np

from modeling.stats.bootstrap import interval_ends, resampled_means
from modeling.stats.calibration import chunks
from modeling.stats.proportions import Interval

SUSPECT_PROBABILITY = 0.01  # a label is suspect if the models give it a lower probability


def right_of_averages(
    probabilities: list[np.ndarray], labels: np.ndarray, subsets: list[tuple[int, ...]]
) -> np.ndarray:
    """Return (S, n): whether the average of each subset of models is right. probabilities[k]: (n, C)."""
    right = np.empty((len(subsets), len(labels)), dtype=bool)
    for part in chunks(*probabilities[0].shape):
        each = [one[part].astype(float) for one in probabilities]
        for number, subset in enumerate(subsets):
            total = sum(each[k] for k in subset)
            right[number, part] = total.argmax(axis=1) == labels[part]
    return right


def candidate_subsets(num_models: int) -> list[tuple[int, ...]]:
    """List the subsets for the search for the best average: all pairs, and all models except one."""
    everyone = tuple(range(num_models))
    pairs = list(combinations(everyone, 2))
    all_but_one = [tuple(k for k in everyone if k != left_out) for left_out in everyone]
    return list(dict.fromkeys(pairs + all_but_one)) if num_models > 2 else pairs


def kappa(share_a: np.ndarray, share_b: np.ndarray, share_both: np.ndarray) -> np.ndarray:
    """Cohen's kappa: how much more often two models agree (both right or both wrong) than by chance.

    The arguments are the shares of images that a, b, and both have right; elementwise. NaN: both models are
    always right, or always wrong. R. Geirhos, K. Meding, F. A. Wichmann, "Beyond accuracy: quantifying
    trial-by-trial behaviour of CNNs and humans by measuring error consistency", NeurIPS 2020.
    """
    agreement = 1 - share_a - share_b + 2 * share_both
    by_chance = share_a * share_b + (1 - share_a) * (1 - share_b)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(by_chance < 1, (agreement - by_chance) / (1 - by_chance), np.nan)


def error_consistency(right: np.ndarray) -> dict[tuple[int, int], Interval]:
    """Cohen's kappa of each pair of models (a < b) with its 95 % bootstrap interval. right: (K, n).

    Resamples without a defined kappa are left out. If none is left, the ends of the interval are NaN.
    """
    pairs = list(combinations(range(len(right)), 2))
    both = np.stack([right[a] & right[b] for a, b in pairs], axis=1)
    columns = np.concatenate([right.T, both], axis=1)
    observed, resampled = columns.mean(axis=0), resampled_means(columns)
    num_models = len(right)
    result = {}
    for number, (a, b) in enumerate(pairs):
        value = float(kappa(observed[a], observed[b], observed[num_models + number]))
        draws = kappa(resampled[:, a], resampled[:, b], resampled[:, num_models + number])
        draws = draws[~np.isnan(draws)]
        low, high = interval_ends(draws) if len(draws) else (np.nan, np.nan)
        result[a, b] = Interval(value, float(low), float(high))
    return result


def suspect_labels(
    labels: np.ndarray, predicted: np.ndarray, tempered_label_probability: np.ndarray
) -> np.ndarray:
    """Return the positions of the images whose label is suspect, the most suspect first.

    labels (n,), predicted (K, n), tempered_label_probability (K, n): the label's probability after
    temperature scaling. A label is suspect if all models predict the same other class, and the mean
    probability of the label is below 1 %. The order is by that mean, as for "self-confidence" in C. G.
    Northcutt, L. Jiang, I. L. Chuang, "Confident learning", JAIR 70 (2021).
    """
    agree = (predicted == predicted[0]).all(axis=0)
    label_probability = tempered_label_probability.mean(axis=0)
    is_suspect = agree & (predicted[0] != labels) & (label_probability < SUSPECT_PROBABILITY)
    positions = np.flatnonzero(is_suspect)
    return positions[np.argsort(label_probability[positions], kind="stable")]
