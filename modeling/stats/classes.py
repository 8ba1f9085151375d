"""Scores of single classes: recall, comparisons with the best model, confusion."""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from modeling.stats.proportions import LEVEL, mcnemar_midp
from modeling.stats.runs import paired_difference


@dataclass(frozen=True)
class ClassScores:
    """The recall of each class that has images, and a comparison of each recipe with recipe `best`.

    classes (P,): class numbers. num_images (P,). recall (K, P): with several runs, the mean. p and
    corrected_p (K, P): the test that recipe k and `best` are equal on that class; NaN for `best` itself.
    is_better (K, P): recipe k really beats `best` on that class. The correction keeps the false discovery
    rate over all classes and recipes at 5 % (Benjamini and Hochberg, "Controlling the false discovery rate",
    JRSS B 57, 1995).
    """

    classes: np.ndarray
    num_images: np.ndarray
    recall: np.ndarray
    p: np.ndarray
    corrected_p: np.ndarray
    is_better: np.ndarray


def class_scores(right: list[np.ndarray], labels: np.ndarray, best: int) -> ClassScores:
    """Compute the ClassScores. right[k] (R_k, n) is True where a run of recipe k is right. labels: (n,).

    Each recipe is compared with recipe number `best`.
    """
    classes, num_images = np.unique(labels, return_counts=True)
    recall = np.stack([_class_means(one.mean(axis=0), labels, classes) for one in right])
    p = np.full(recall.shape, np.nan)
    for k, one in enumerate(right):
        if k == best:
            continue
        if len(one) == len(right[best]) == 1:
            only_k = _class_counts(one[0] & ~right[best][0], labels, classes)
            only_best = _class_counts(right[best][0] & ~one[0], labels, classes)
            p[k] = mcnemar_midp(only_k, only_best)
        else:
            for j, number in enumerate(classes):
                inside = labels == number
                p[k, j] = paired_difference(one[:, inside], right[best][:, inside]).p
    is_tested = ~np.isnan(p)
    corrected_p = np.full(recall.shape, np.nan)
    if is_tested.any():
        corrected_p[is_tested] = stats.false_discovery_control(p[is_tested], method="bh")
    is_better = (np.nan_to_num(corrected_p, nan=1.0) < LEVEL) & (recall > recall[best])
    return ClassScores(classes, num_images, recall, p, corrected_p, is_better)


def _class_counts(flags: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    return np.bincount(labels[flags], minlength=int(classes.max()) + 1)[classes]


def _class_means(values: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    sums = np.bincount(labels, weights=values)[classes]
    return sums / np.bincount(labels)[classes]


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts of images (C, C): a row is a true class, a column a predicted class."""
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def f1_scores(matrix: np.ndarray) -> np.ndarray:
    """F1 of each class (C,) of a confusion matrix; NaN where a class is neither true nor predicted."""
    either = matrix.sum(axis=0) + matrix.sum(axis=1)
    return np.where(either > 0, 2 * np.diag(matrix) / np.maximum(either, 1), np.nan)


def precisions(matrix: np.ndarray) -> np.ndarray:
    """Precision of each class (C,) of a confusion matrix; NaN where a class is never predicted."""
    num_predicted = matrix.sum(axis=0)
    return np.where(num_predicted > 0, np.diag(matrix) / np.maximum(num_predicted, 1), np.nan)


def similar_side_by_side(matrix: np.ndarray) -> np.ndarray:
    """Order the classes (C,) so that classes that are often confused are neighbours.

    The method is average linkage on symmetric shares of confusion, with optimal order of the leaves (Z.
    Bar-Joseph et al., "Fast optimal leaf ordering for hierarchical clustering", Bioinformatics 17, 2001).
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    similarity = (shares + shares.T) / 2
    np.fill_diagonal(similarity, 0)
    if len(matrix) < 3 or similarity.max() == 0:
        return np.arange(len(matrix))
    distance = 1 - similarity / similarity.max()
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    return leaves_list(optimal_leaf_ordering(linkage(condensed, "average"), condensed))
