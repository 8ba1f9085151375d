"""Percentile bootstrap over images. All models use the same draws, so their differences are paired."""

from collections.abc import Iterator

import numpy as np

from modeling import randomness
from modeling.stats.proportions import LEVEL

NUM_RESAMPLES = 2000
_CHUNK = 50  # resamples in one matrix product
_SEED = 0


def interval_ends(resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95 % percentile interval. resampled: (B, ...), one value per resample."""
    low, high = np.quantile(resampled, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return low, high


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Return the means (B, m) of the columns of values (n, m), over images drawn with replacement."""
    values = values.astype(float)
    num_images = len(values)
    parts = []
    for start in range(0, NUM_RESAMPLES, _CHUNK):
        weights = np.empty((min(_CHUNK, NUM_RESAMPLES - start), num_images))
        for i in range(len(weights)):
            draws = _generator(start + i).integers(0, num_images, num_images)
            weights[i] = np.bincount(draws, minlength=num_images)
        parts.append(weights @ values / num_images)
    return np.concatenate(parts)


def resampled_class_scores(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return macro F1 and balanced accuracy, (B, K) each, of resamples that are drawn within each class.

    labels (n,) and predicted (K, n) are class numbers. As in metrics.csv, macro F1 is the mean over the
    classes that occur as a label or a prediction. Balanced accuracy is the mean recall of the classes with
    images.
    """
    num_models = len(predicted)
    counts = np.bincount(labels, minlength=num_classes)
    has_images = counts > 0
    right = predicted == labels
    # Class c of model k is counted in cell k * num_classes + c. So one bincount counts for all models.
    cells = predicted + num_classes * np.arange(num_models)[:, None]
    macro_f1 = np.empty((NUM_RESAMPLES, num_models))
    balanced_accuracy = np.empty((NUM_RESAMPLES, num_models))
    for number, weights in enumerate(_weights_within_classes(labels, counts)):
        tiled = np.broadcast_to(weights, predicted.shape)
        num_predicted = _count(cells, tiled, num_models, num_classes)
        num_right = _count(cells, tiled * right, num_models, num_classes)
        either = num_predicted + counts
        f1 = 2 * num_right / np.maximum(either, 1)
        macro_f1[number] = f1.sum(axis=1) / (either > 0).sum(axis=1)
        balanced_accuracy[number] = (num_right[:, has_images] / counts[has_images]).mean(axis=1)
    return macro_f1, balanced_accuracy


def _count(cells: np.ndarray, weights: np.ndarray, num_models: int, num_classes: int) -> np.ndarray:
    totals = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=num_models * num_classes)
    return totals.reshape(num_models, num_classes)


def _weights_within_classes(labels: np.ndarray, counts: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each resample how often each image is drawn, (n,). A class keeps its number of images."""
    by_class = np.argsort(labels, kind="stable")
    first = (np.cumsum(counts) - counts)[labels[by_class]]
    size = counts[labels[by_class]]
    for number in range(NUM_RESAMPLES):
        uniform = _generator(number).random(len(labels))
        draws = by_class[first + np.floor(uniform * size).astype(int)]
        yield np.bincount(draws, minlength=len(labels)).astype(float)


def _generator(number: int) -> np.random.Generator:
    return np.random.default_rng(randomness.seed(_SEED, randomness.BOOTSTRAP, number))
