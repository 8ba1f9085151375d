"""The predictions of one checkpoint, reduced to a few numbers per image for a comparison.

`summarize` turns a checkpoint's Answers into a Model. modeling/compare.py compares models.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from modeling.errors import UserError
from modeling.stats import calibration
from modeling.stats.proportions import Interval, wilson_interval


@dataclass(frozen=True, eq=False)
class Answers:
    """One checkpoint's answers for N images of one split.

    rows (N,) int64: the images' rows in the split, each once. labels (N,) int64: class numbers.
    log_probabilities (N, C) float32. dataset: its name, followed by @ and the revision if it has one.
    images_sha256: equal for the same files and labels.
    """

    name: str
    path: Path
    header: dict[str, Any]
    dataset: str
    split: str
    images_sha256: str
    classes: list[str]
    rows: np.ndarray
    labels: np.ndarray
    log_probabilities: np.ndarray


@dataclass(frozen=True, eq=False)
class Model:
    """One checkpoint in a comparison. Arrays are (N,) and sorted by row; probabilities is (N, C).

    confidence: the probability of the predicted class. label_probability: the probability of the label.
    label_rank: 0 if the label is the most probable class, with ties counted as in scikit-learn's top-k
    accuracy. worst_rank: the same, with every tie counted against the model. temperature minimises the log
    loss on these images. tempered_confidence and tempered_label: the two probabilities after temperature
    scaling. fitted_loss: the log loss with a temperature that was fitted on other images.
    """

    name: str
    path: Path
    header: dict[str, Any]
    dataset: str
    split: str
    images_sha256: str
    classes: list[str]
    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    label_probability: np.ndarray
    loss: np.ndarray
    brier: np.ndarray
    label_rank: np.ndarray
    worst_rank: np.ndarray
    temperature: float
    tempered_confidence: np.ndarray
    tempered_label: np.ndarray
    fitted_loss: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def right(self) -> np.ndarray:
        return self.predicted == self.labels

    def select(self, rows: np.ndarray) -> "Model":
        """The answers for these rows only. The rows must be sorted, and the model must have them all."""
        if len(rows) == len(self.rows):
            return self
        at = np.searchsorted(self.rows, rows)
        return replace(
            self,
            rows=self.rows[at],
            labels=self.labels[at],
            predicted=self.predicted[at],
            confidence=self.confidence[at],
            label_probability=self.label_probability[at],
            loss=self.loss[at],
            brier=self.brier[at],
            label_rank=self.label_rank[at],
            worst_rank=self.worst_rank[at],
            tempered_confidence=self.tempered_confidence[at],
            tempered_label=self.tempered_label[at],
            fitted_loss=self.fitted_loss[at],
            probabilities=self.probabilities[at],
        )

    def renumber(self, classes: list[str]) -> "Model":
        """The same answers, with the classes numbered in this order."""
        if classes == self.classes:
            return self
        new_number = np.array([classes.index(name) for name in self.classes])
        old_number = np.argsort(new_number)
        return replace(
            self,
            classes=classes,
            labels=new_number[self.labels],
            predicted=new_number[self.predicted],
            probabilities=self.probabilities[:, old_number],
        )


def check_finite(name: str, values: np.ndarray) -> None:
    """UserError: a log-probability is NaN or infinite."""
    if not np.isfinite(values).all():
        num_bad = int((~np.isfinite(values).all(axis=1)).sum())
        raise UserError(
            f"{name} gives NaN or infinite logits for {num_bad:,} of {len(values):,} images: "
            "leave this checkpoint out, or train it again with a lower --lr"
        )


def summarize(answers: Answers, keep: type = np.float32) -> Model:
    """Reduce a checkpoint's answers. UserError: a log-probability is NaN or infinite.

    `keep` is the type of the stored probabilities. float16 takes half the memory.
    """
    check_finite(str(answers.path), answers.log_probabilities)
    by_row = np.argsort(answers.rows, kind="stable")
    rows, labels, logs = answers.rows[by_row], answers.labels[by_row], answers.log_probabilities[by_row]
    num_images, num_classes = logs.shape
    predicted = logs.argmax(axis=1)
    temperature = calibration.fit_temperature(logs, labels)
    tempered_label = np.exp(-calibration.tempered_losses(logs, labels, temperature))
    tempered_confidence = np.exp(-calibration.tempered_losses(logs, predicted, temperature))
    label_log = logs[np.arange(num_images), labels]
    brier, label_rank, worst_rank = np.empty(num_images), np.empty(num_images, int), np.empty(num_images, int)
    class_numbers = np.arange(num_classes)
    for part in calibration.chunks(num_images, num_classes):
        p = np.exp(logs[part].astype(float))
        brier[part] = (p**2).sum(axis=1) - 2 * np.exp(label_log[part].astype(float)) + 1
        above = logs[part] > label_log[part, None]
        level = logs[part] == label_log[part, None]
        label_rank[part] = (above | (level & (class_numbers > labels[part, None]))).sum(axis=1)
        worst_rank[part] = (above | level).sum(axis=1) - 1
    return Model(
        name=answers.name,
        path=answers.path,
        header=answers.header,
        dataset=answers.dataset,
        split=answers.split,
        images_sha256=answers.images_sha256,
        classes=answers.classes,
        rows=rows,
        labels=labels,
        predicted=predicted,
        confidence=np.exp(logs.max(axis=1).astype(float)),
        label_probability=np.exp(label_log.astype(float)),
        loss=-label_log.astype(float),
        brier=brier,
        label_rank=label_rank,
        worst_rank=worst_rank,
        temperature=temperature,
        tempered_confidence=tempered_confidence,
        tempered_label=tempered_label,
        fitted_loss=calibration.cross_fitted_losses(logs, labels, rows, temperature),
        probabilities=np.exp(logs).astype(keep),
    )


def top_k_accuracy(model: Model, k: int) -> tuple[Interval, float]:
    """Return the share of images whose label is among the k most probable classes.

    The second value counts ties against the model.
    """
    return wilson_interval(int((model.label_rank < k).sum()), len(model)), float(
        (model.worst_rank < k).mean()
    )
