"""The scores of single models with their intervals: calibration, log loss, Brier, macro F1."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modeling.answers import Model
from modeling.stats import bootstrap, calibration, classes
from modeling.stats.proportions import Interval, wilson_interval


@dataclass(frozen=True, eq=False)
class Scores:
    """One model's scores. Log loss is in nats. The Brier score is the sum over the classes, from 0 to 2.

    gap: mean confidence minus accuracy. honest_error and honest_limit: an honest model, whose confidence is
    its true accuracy, has by chance a calibration error too. They are the mean and the 95 % quantile of that
    error on as many images. fitted_loss: the log loss with a temperature that was fitted on other images.
    errors[k - 1]: the number of errors among the k images with the highest confidence.
    """

    accuracy: Interval
    macro_f1: Interval
    balanced_accuracy: Interval
    log_loss: Interval
    brier: Interval
    gap: Interval
    confidence: float
    calibration_error: float
    honest_error: float
    honest_limit: float
    temperature: float
    fitted_loss: float
    bins: list[calibration.Bin]
    errors: np.ndarray

    @property
    def verdict(self) -> str:
        """honest, too sure, too unsure or uneven.

        honest: the calibration error may be chance. uneven: it is not chance, but the mean confidence is
        right.
        """
        if self.calibration_error <= self.honest_limit:
            return "honest"
        if self.gap.low > 0:
            return "too sure"
        return "too unsure" if self.gap.high < 0 else "uneven"


def macro_f1(model: Model) -> float:
    """The mean F1 over the classes that occur as a label or a prediction, as in metrics.csv."""
    matrix = classes.confusion_matrix(model.labels, model.predicted, len(model.classes))
    return float(np.nanmean(classes.f1_scores(matrix)))


def balanced_accuracy(model: Model) -> float:
    """The mean recall of the classes that have images, as in metrics.csv."""
    counts = np.bincount(model.labels)
    num_right = np.bincount(model.labels[model.right], minlength=len(counts))
    return float((num_right[counts > 0] / counts[counts > 0]).mean())


def score_models(models: Sequence[Model]) -> list[Scores]:
    """Compute the scores of each model. Models with the same images share the bootstrap's draws."""
    columns = [
        np.stack([model.loss, model.brier, model.confidence - model.right], axis=1) for model in models
    ]
    mean_ends = _ends_for_groups([len(model) for model in models], columns, _means_of_group)
    keys = [(len(model.classes), model.labels.tobytes()) for model in models]
    class_ends = _ends_for_groups(keys, models, _class_scores_of_group)
    return [
        _score(model, means.mean(axis=0), mean_end, class_end)
        for model, means, mean_end, class_end in zip(models, columns, mean_ends, class_ends, strict=True)
    ]


def _ends_for_groups(keys: Sequence, items: Sequence, ends_of_group) -> list[np.ndarray]:
    """Call ends_of_group for each group of items with equal keys. Return the results in the items' order."""
    result: list[np.ndarray] = [np.empty(0)] * len(items)
    for key in dict.fromkeys(keys):
        members = [number for number, other in enumerate(keys) if other == key]
        for number, ends in zip(members, ends_of_group([items[m] for m in members]), strict=True):
            result[number] = ends
    return result


def _means_of_group(columns: list[np.ndarray]) -> np.ndarray:
    """Interval ends (models, 3, 2) of the column means."""
    ends = np.stack(
        bootstrap.interval_ends(bootstrap.resampled_means(np.concatenate(columns, axis=1))), axis=-1
    )
    return ends.reshape(len(columns), -1, 2)


def _class_scores_of_group(models: list[Model]) -> np.ndarray:
    """Interval ends (models, 2, 2) of macro F1 and balanced accuracy."""
    predicted = np.stack([model.predicted for model in models])
    scores = bootstrap.resampled_class_scores(models[0].labels, predicted, len(models[0].classes))
    ends = [np.stack(bootstrap.interval_ends(score), axis=-1) for score in scores]
    return np.stack(ends, axis=1)


def _score(model: Model, means: np.ndarray, mean_ends: np.ndarray, class_ends: np.ndarray) -> Scores:
    honest_error, honest_limit = calibration.honest_calibration_error(model.confidence)
    return Scores(
        accuracy=wilson_interval(int(model.right.sum()), len(model)),
        macro_f1=_interval(macro_f1(model), class_ends[0]),
        balanced_accuracy=_interval(balanced_accuracy(model), class_ends[1]),
        log_loss=_interval(means[0], mean_ends[0]),
        brier=_interval(means[1], mean_ends[1]),
        gap=_interval(means[2], mean_ends[2]),
        confidence=float(model.confidence.mean()),
        calibration_error=calibration.calibration_error(model.confidence, model.right),
        honest_error=honest_error,
        honest_limit=honest_limit,
        temperature=model.temperature,
        fitted_loss=float(model.fitted_loss.mean()),
        bins=calibration.reliability_bins(model.confidence, model.right),
        errors=calibration.errors_of_surest(model.confidence, model.right),
    )


def _interval(value: float, ends: np.ndarray) -> Interval:
    return Interval(float(value), float(ends[0]), float(ends[1]))
