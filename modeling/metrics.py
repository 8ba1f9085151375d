"""Metrics as local `evaluate` modules over scikit-learn: no metric is fetched from the hub."""

import tempfile

import datasets
import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score

import evaluate
from modeling.stats.proportions import mcnemar_midp

NAMES = ("loss", "accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "weighted_f1")
# `evaluate` makes a cache folder even for metrics that it keeps in memory.
_CACHE = tempfile.TemporaryDirectory()
_PREDICTIONS = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
_RANKS = {"ranks": datasets.Value("int64"), "references": datasets.Value("int64")}
_ROWS_AT_ONCE = 4096


class _Metric(evaluate.Metric):
    """The base class of our metrics. A subclass's docstring becomes the metric's description."""

    inputs = _PREDICTIONS

    def __init__(self):
        super().__init__(keep_in_memory=True, cache_dir=_CACHE.name)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", features=datasets.Features(self.inputs)
        )


class Accuracy(_Metric):
    """The share of images whose predicted class is the true one."""

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}


class BalancedAccuracy(_Metric):
    """The mean recall of the classes that occur: scikit-learn's balanced_accuracy_score."""

    def _compute(self, predictions, references):
        classes = np.unique(references)
        recall = recall_score(references, predictions, labels=classes, average="macro", zero_division=0)
        return {"balanced_accuracy": float(recall)}


class Top5Accuracy(_Metric):
    """The share of images whose true class is among the five most probable. With up to five classes: 1.

    ranks are the true_ranks of the images.
    """

    inputs = _RANKS

    def _compute(self, ranks, references):
        return {"top5_accuracy": float((np.asarray(ranks) < 5).mean())}


class F1(_Metric):
    """The mean F1 score over the classes that are true or predicted.

    The macro mean gives all classes the same weight. The weighted mean weights a class by its images.
    """

    def _compute(self, predictions, references):
        macro = f1_score(references, predictions, average="macro", zero_division=0)
        weighted = f1_score(references, predictions, average="weighted", zero_division=0)
        return {"macro_f1": float(macro), "weighted_f1": float(weighted)}


class McNemar(evaluate.Comparison):
    """McNemar's test of two models on the same images, with the two-sided mid-p value.

    difference is the accuracy of predictions1 minus the accuracy of predictions2. only1 counts the images
    that only predictions1 has right, only2 those that only predictions2 has right.
    """

    def __init__(self):
        super().__init__(keep_in_memory=True, cache_dir=_CACHE.name)

    def _info(self) -> evaluate.ComparisonInfo:
        features = {name: datasets.Value("int64") for name in ("predictions1", "predictions2", "references")}
        return evaluate.ComparisonInfo(
            description=self.__doc__, citation="", features=datasets.Features(features)
        )

    def _compute(self, predictions1, predictions2, references):
        right1 = np.asarray(predictions1) == np.asarray(references)
        right2 = np.asarray(predictions2) == np.asarray(references)
        only1, only2 = int((right1 & ~right2).sum()), int((right2 & ~right1).sum())
        return {
            "p": float(mcnemar_midp(only1, only2)),
            "difference": (only1 - only2) / len(right1),
            "only1": only1,
            "only2": only2,
        }


def true_ranks(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the classes that rank before the true one, (N,) int64: 0 if it is the most probable.

    logits (N, C), labels (N,). Of classes with equal logits the last ranks first, as in scikit-learn's
    top_k_accuracy_score. Logits are ranked, because rounded probabilities can be equal.
    """
    ranks = []
    classes = torch.arange(logits.shape[1])
    for some_logits, some_labels in zip(
        logits.split(_ROWS_AT_ONCE), labels.split(_ROWS_AT_ONCE), strict=True
    ):
        of_label = some_logits.gather(1, some_labels[:, None])
        is_later_tie = (some_logits == of_label) & (classes > some_labels[:, None])
        ranks.append(((some_logits > of_label) | is_later_tie).sum(dim=1))
    return torch.cat(ranks)


def compute(predictions) -> dict[str, float]:
    """Compute the metrics of NAMES for an `engine.Predictions`.

    The loss is the mean cross-entropy over the images, in nats.
    """
    combined = evaluate.combine([Accuracy(), BalancedAccuracy(), Top5Accuracy(), F1()])
    combined.add_batch(
        predictions=predictions.predicted.numpy(),
        references=predictions.labels.numpy(),
        ranks=true_ranks(predictions.logits, predictions.labels).numpy(),
    )
    scores = combined.compute()
    scores["loss"] = float(predictions.losses.double().mean())
    return {name: scores[name] for name in NAMES}
