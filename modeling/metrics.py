"""Metrics as local `evaluate` modules over scikit-learn: no metric is fetched from the hub."""

import tempfile

import datasets
import numpy as np
from sklearn.metrics import accuracy_score, f1_score, recall_score, top_k_accuracy_score

import evaluate
from modeling.stats.proportions import mcnemar_midp

NAMES = ("loss", "accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "weighted_f1")
# `evaluate` makes a cache folder even for metrics that it keeps in memory.
_CACHE = tempfile.TemporaryDirectory()
_PREDICTIONS = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
_PROBABILITIES = {
    "probabilities": datasets.Sequence(datasets.Value("float32")),
    "references": datasets.Value("int64"),
}


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
    """The share of images whose true class is among the five most probable. With up to five classes: 1."""

    inputs = _PROBABILITIES

    def _compute(self, probabilities, references):
        probabilities = np.asarray(probabilities)
        num_classes = probabilities.shape[1]
        if num_classes <= 5:
            return {"top5_accuracy": 1.0}
        top5 = top_k_accuracy_score(references, probabilities, k=5, labels=np.arange(num_classes))
        return {"top5_accuracy": float(top5)}


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


def compute(predictions) -> dict[str, float]:
    """Compute the metrics of NAMES for an `engine.Predictions`.

    The loss is the mean cross-entropy over the images, in nats.
    """
    combined = evaluate.combine([Accuracy(), BalancedAccuracy(), Top5Accuracy(), F1()])
    combined.add_batch(
        predictions=predictions.predicted.numpy(),
        references=predictions.labels.numpy(),
        probabilities=predictions.logits.numpy(),  # same order; rounded probabilities can be equal
    )
    scores = combined.compute()
    scores["loss"] = float(predictions.losses.double().mean())
    return {name: scores[name] for name in NAMES}
