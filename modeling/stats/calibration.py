"""Can a model's confidence be trusted? Calibration, temperature, and errors if unsure images are skipped.

In all functions, confidence (N,) is the probability of the predicted class, and right (N,) is True if that
class is the label.
"""

from typing import NamedTuple

import numpy as np
import torch

from modeling import randomness
from modeling.stats.proportions import LEVEL, wilson

NUM_BINS = 15  # for the calibration error
NUM_HONEST_DRAWS = 200
NUM_FOLDS = 5  # for the cross-fitted temperature
RELIABILITY_BINS = 10
LEAST_IMAGES = 30  # in each bin of the reliability figure
_SEED = 0


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error (ECE) of the predicted class, with 15 bins of equal count.

    It is the mean of |confidence - accuracy| over the bins, weighted by their images. ECE: C. Guo et al., "On
    calibration of modern neural networks", ICML 2017. Bins of equal count: J. Nixon et al., "Measuring
    calibration in deep learning", CVPR workshops 2019.
    """
    order = np.argsort(confidence, kind="stable")
    return float(_binned_error(confidence[order], right[order][None].astype(float))[0])


def honest_calibration_error(confidence: np.ndarray) -> tuple[float, float]:
    """The calibration error of an honest model, whose confidence is its true accuracy.

    By chance this error is above 0; the fewer images, the larger. Each of 200 draws makes answer i right with
    probability confidence[i]. Returns the mean and the 95 % quantile of the error over the draws.
    """
    order = np.argsort(confidence, kind="stable")
    ordered = confidence[order]
    right = np.empty((NUM_HONEST_DRAWS, len(confidence)))
    for number in range(NUM_HONEST_DRAWS):
        generator = np.random.default_rng(randomness.seed(_SEED, randomness.HONEST, number))
        right[number] = generator.random(len(confidence))[order] < ordered
    errors = _binned_error(ordered, right)
    return float(errors.mean()), float(np.quantile(errors, 1 - LEVEL))


def _binned_error(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The calibration error of each row of right (B, N). confidence (N,) is sorted."""
    num_images = len(confidence)
    starts = np.unique(np.arange(NUM_BINS) * num_images // NUM_BINS)
    gaps = np.add.reduceat(right - confidence, starts, axis=1)
    return np.abs(gaps).sum(axis=1) / num_images


class Bin(NamedTuple):
    """A bin of the reliability figure: mean confidence, and accuracy with its interval."""

    confidence: float
    accuracy: float
    low: float
    high: float
    num_images: int


def reliability_bins(confidence: np.ndarray, right: np.ndarray) -> list[Bin]:
    """Make ten bins of equal width. Merge neighbours until each bin has 30 images. Intervals are Wilson's."""
    number = np.minimum((confidence * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    groups: list[np.ndarray] = []
    waiting = np.zeros(0, dtype=int)
    for i in range(RELIABILITY_BINS):
        waiting = np.concatenate([waiting, np.flatnonzero(number == i)])
        if len(waiting) >= LEAST_IMAGES:
            groups.append(waiting)
            waiting = np.zeros(0, dtype=int)
    if len(waiting):  # the last bin has too few images: merge it with the one before
        if groups:
            waiting = np.concatenate([groups.pop(), waiting])
        groups.append(waiting)
    bins = []
    for group in groups:
        num_right = int(right[group].sum())
        low, high = wilson(num_right, len(group))
        share = num_right / len(group)
        bins.append(Bin(float(confidence[group].mean()), share, float(low), float(high), len(group)))
    return bins


def errors_of_surest(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return errors (N,): errors[k - 1] counts the errors among the k images with the highest confidence.

    Images with equal confidence have no order, so each of them counts with their mean error.
    """
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True)) + 1
    errors = np.cumsum(~right[order])[ends - 1]
    counts = np.arange(1, len(confidence) + 1)
    return np.interp(counts, np.append(0, ends), np.append(0, errors))


def error_at_coverage(errors: np.ndarray, coverage: float) -> float:
    """The error rate if the model answers only the share `coverage` of the images, the surest ones."""
    count = max(1, round(coverage * len(errors)))
    return float(errors[count - 1] / count)


def folds(rows: np.ndarray) -> np.ndarray:
    """Return the fold (0 to 4) of each image, (N,). It is a hash of the image's row."""
    hashed = randomness.bits(_SEED, randomness.FOLD, torch.from_numpy(rows.astype(np.int64)))
    return (hashed % NUM_FOLDS).numpy()


def fit_temperature(log_probabilities: np.ndarray, labels: np.ndarray, start: float = 1.0) -> float:
    """The temperature T, from e^-3 to e^3, that minimises the log loss of softmax(log_probabilities / T).

    See Guo et al. 2017. The loss is convex in 1 / T. So Newton's method finds the minimum, with bisection if
    a step leaves the bracket.
    """
    low, high = np.exp(-3.0), np.exp(3.0)
    beta = 1 / start
    for _ in range(100):
        slope, curvature = _slope_and_curvature(log_probabilities, labels, beta)
        if slope > 0:
            high = beta
        else:
            low = beta
        step = beta - slope / curvature if curvature > 0 else np.inf
        following = step if low < step < high else np.sqrt(low * high)
        is_found = abs(following - beta) <= 1e-7 * beta
        beta = following
        if is_found:
            break
    return float(1 / beta)


def tempered_losses(log_probabilities: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """The log loss (N,) of each image under softmax(log_probabilities / temperature)."""
    losses = np.empty(len(labels))
    for part in chunks(*log_probabilities.shape):
        scaled = log_probabilities[part].astype(float) / temperature
        top = scaled.max(axis=1)
        log_sum = np.log(np.exp(scaled - top[:, None]).sum(axis=1)) + top
        losses[part] = log_sum - scaled[np.arange(len(scaled)), labels[part]]
    return losses


def cross_fitted_losses(
    log_probabilities: np.ndarray, labels: np.ndarray, rows: np.ndarray, temperature: float
) -> np.ndarray:
    """The log loss (N,) of each image under a temperature that was fitted on the other four folds.

    temperature: the fit on all images. The five fits start from it.
    """
    fold = folds(rows)
    losses = np.empty(len(labels))
    for number in range(NUM_FOLDS):
        inside = fold == number
        if inside.any():
            fitted = temperature
            if not inside.all():
                fitted = fit_temperature(log_probabilities[~inside], labels[~inside], start=temperature)
            losses[inside] = tempered_losses(log_probabilities[inside], labels[inside], fitted)
    return losses


def chunks(num_images: int, num_classes: int) -> list[slice]:
    """Divide the images into slices. A float64 copy of a slice's probabilities takes at most 32 MB."""
    size = max(1, 4_000_000 // num_classes)
    return [slice(start, start + size) for start in range(0, num_images, size)]


def _slope_and_curvature(
    log_probabilities: np.ndarray, labels: np.ndarray, beta: float
) -> tuple[float, float]:
    """First and second derivative of the summed log loss with respect to beta = 1 / T."""
    slope = curvature = 0.0
    for part in chunks(*log_probabilities.shape):
        z = log_probabilities[part].astype(float)
        p = np.exp(beta * (z - z.max(axis=1, keepdims=True)))
        p /= p.sum(axis=1, keepdims=True)
        mean = (p * z).sum(axis=1)
        slope += float((mean - z[np.arange(len(z)), labels[part]]).sum())
        curvature += float((p * (z - mean[:, None]) ** 2).sum())
    return slope, curvature
