"""The rows of the page's tables, as the template reads them."""

from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from modeling.analysis import Analysis
from modeling.answers import top_k_accuracy
from modeling.compare import Pair
from modeling.pages.figures import Axis
from modeling.pages.names import average_name
from modeling.pages.words import percent, shorten
from modeling.stats.calibration import error_at_coverage
from modeling.stats.proportions import Interval, wilson_interval

COVERAGES = (1.0, 0.9, 0.8, 0.5)
MANY_CLASSES = 30  # with more, the table has 30 classes (see class_rows), and a confusion matrix is a picture
TOP5_CLASSES = 20  # with fewer classes, top-5 accuracy is always near 1 and is not shown


@dataclass(frozen=True, eq=False)
class ModelRow:
    """An entry in the tables of sections 1, 3 and 6. number chooses its mark. None: a value is not known."""

    number: int
    name: str
    rank: str
    num_runs: int
    accuracy: Interval
    run_accuracies: list[float]
    macro_f1: float
    log_loss: float
    num_images: int
    parameters: int | None
    gflops: float | None
    megabytes: float | None
    minutes: float | None
    batch_ms: float | None
    single_ms: float | None


def model_rows(analysis: Analysis) -> list[ModelRow]:
    rows = []
    for number, entry in enumerate(analysis.entries):
        cost = analysis.costs.get(entry.shown.name)
        speed = cost.speed if cost else None
        rows.append(
            ModelRow(
                number=number,
                name=entry.name,
                rank=entry.rank_text,
                num_runs=len(entry.runs),
                accuracy=entry.accuracy,
                run_accuracies=[float(run.right.mean()) for run in entry.runs] if len(entry.runs) > 1 else [],
                macro_f1=analysis.macro_f1[number],
                log_loss=entry.log_loss,
                num_images=len(entry.shown),
                parameters=cost.parameters if cost else None,
                gflops=cost.gflops if cost else None,
                megabytes=cost.file_bytes / 1e6 if cost and cost.file_bytes else None,
                minutes=cost.train_seconds / 60 if cost and cost.train_seconds is not None else None,
                batch_ms=speed.batch_ms if speed else None,
                single_ms=speed.single_ms if speed else None,
            )
        )
    return rows


@dataclass(frozen=True, eq=False)
class MeasuresRow:
    """An entry's shown run in "More measures" of section 1.

    tied_top5: top-5 accuracy with ties counted against the model.
    """

    number: int
    name: str
    macro_f1: Interval
    balanced_accuracy: Interval
    top5: Interval | None
    tied_top5: float | None


def measures_rows(analysis: Analysis) -> list[MeasuresRow]:
    rows = []
    for number, (entry, scores) in enumerate(zip(analysis.entries, analysis.scores, strict=True)):
        top5 = tied_top5 = None
        if len(entry.shown.classes) > TOP5_CLASSES:
            top5, worst = top_k_accuracy(entry.shown, 5)
            if top5.value - worst >= 0.001:
                tied_top5 = worst
        rows.append(
            MeasuresRow(number, entry.name, scores.macro_f1, scores.balanced_accuracy, top5, tied_top5)
        )
    return rows


@dataclass(frozen=True)
class PairRow:
    """A pair in section 2. beyond: -1 left of the scale, 1 right of it, 0 inside.

    width_a and width_b are the lengths of the bars in pixels.
    """

    pair: Pair
    name_a: str
    name_b: str
    beyond: int
    width_a: int
    width_b: int


def pair_axis(pairs: list[Pair]) -> Axis:
    """The scale of the differences. It fits the smaller half; larger differences are drawn at its end."""
    closest = sorted(pairs, key=lambda pair: pair.difference.high)[: (len(pairs) + 1) // 2]
    low = min(0.0, min(pair.difference.low for pair in pairs)) - 0.003
    high = max(0.01, max(pair.difference.high for pair in closest) * 1.12)
    return Axis(low, high)


def pair_rows(analysis: Analysis, pairs: list[Pair], axis: Axis) -> list[PairRow]:
    longest = max(max(pair.only_a, pair.only_b) for pair in pairs) or 1
    rows = []
    for pair in pairs:
        value = pair.difference.value
        rows.append(
            PairRow(
                pair=pair,
                name_a=analysis.entries[pair.a].name,
                name_b=analysis.entries[pair.b].name,
                beyond=1 if value > axis.high else -1 if value < axis.low else 0,
                width_a=max(1, round(90 * pair.only_a / longest)),
                width_b=max(1, round(90 * pair.only_b / longest)),
            )
        )
    return rows


@dataclass(frozen=True, eq=False)
class ClassRow:
    """A class in section 4. recall: per shared model. winners: (number of the mark, name)."""

    name: str
    num_images: int
    recall: list[float]
    interval: Interval | None
    winners: list[tuple[int, str]]


def class_rows(analysis: Analysis) -> list[ClassRow]:
    """Return a row for each class, the hardest first.

    With more than 30 classes: only the 15 hardest, and the 15 on which the models differ most.
    """
    scores = analysis.classes
    mean = scores.recall.mean(axis=0)
    spread = scores.recall.max(axis=0) - scores.recall.min(axis=0)
    order = np.argsort(mean, kind="stable")
    if len(order) > MANY_CLASSES:
        half = MANY_CLASSES // 2
        kept = set(order[:half].tolist()) | set(np.argsort(-spread, kind="stable")[:half].tolist())
        order = np.array([j for j in order if j in kept])
    rows = []
    for j in order:
        recall = scores.recall[:, j].tolist()
        count = int(scores.num_images[j])
        winners = [
            (analysis.shared.entries[k], analysis.shared_entry(k).name)
            for k in np.flatnonzero(scores.is_better[:, j])
        ]
        is_single = len(recall) == 1 and len(analysis.shared.runs[0]) == 1
        rows.append(
            ClassRow(
                name=analysis.shared.classes[scores.classes[j]],
                num_images=count,
                recall=recall,
                interval=wilson_interval(round(recall[0] * count), count) if is_single else None,
                winners=winners,
            )
        )
    return rows


def class_axis(rows: list[ClassRow]) -> Axis:
    lowest = min(min(row.recall) if row.interval is None else row.interval.low for row in rows)
    return Axis(max(0.0, min(lowest - 0.03, 0.95)), 1.0)


@dataclass(frozen=True, eq=False)
class TrustRow:
    """The shown run of an entry in section 6."""

    number: int
    name: str
    accuracy: float
    scores: object
    panel: Markup
    errors: list[float]


def trust_rows(analysis: Analysis, panels: list[Markup]) -> list[TrustRow]:
    return [
        TrustRow(
            number=number,
            name=entry.name,
            accuracy=scores.accuracy.value,
            scores=scores,
            panel=panel,
            errors=[error_at_coverage(scores.errors, coverage) for coverage in COVERAGES],
        )
        for number, (entry, scores, panel) in enumerate(
            zip(analysis.entries, analysis.scores, panels, strict=True)
        )
    ]


@dataclass(frozen=True)
class Part:
    """A part of the bar of section 7: its text, its number of images, its colour's CSS class."""

    text: str
    count: int
    css_class: str
    opacity: float


def parts(analysis: Analysis) -> list[Part]:
    """Count the images by the number of models that are right. With two models, name the right one."""
    num_models = len(analysis.shared.models)
    num_right = analysis.num_right
    if num_models == 2:
        a, b = (model.right for model in analysis.shared.models)
        name_a, name_b = (shorten(analysis.shared_entry(k).name) for k in (0, 1))
        number_a, number_b = analysis.shared.entries
        return [
            Part("both right", int((a & b).sum()), "good", 0.55),
            Part(f"only {name_a} right", int((a & ~b).sum()), f"b{number_a}", 1),
            Part(f"only {name_b} right", int((b & ~a).sum()), f"b{number_b}", 1),
            Part("both wrong", int((~a & ~b).sum()), "bad", 0.7),
        ]
    result = [Part("all right", int((num_right == num_models).sum()), "good", 0.55)]
    for count in range(num_models - 1, 0, -1):
        opacity = round(0.75 - 0.55 * (count - 1) / max(1, num_models - 2), 2)
        result.append(
            Part(f"{count} of {num_models} right", int((num_right == count).sum()), "some", opacity)
        )
    return [*result, Part("all wrong", int((num_right == 0).sum()), "bad", 0.7)]


@dataclass(frozen=True)
class AverageRow:
    name: str
    accuracy: float
    over_best: Interval
    milliseconds: float | None
    note: str


def average_rows(analysis: Analysis) -> list[AverageRow]:
    return [
        AverageRow(
            name=average_name(analysis, average),
            accuracy=average.accuracy.value,
            over_best=average.over_best.interval,
            milliseconds=average.milliseconds,
            note="" if average.kind == "all" else "chosen on these images: optimistic",
        )
        for average in analysis.averages
    ]


def agreement_rows(analysis: Analysis) -> list[tuple[str, str, Interval]]:
    """Return (model, model, Cohen's kappa), sorted by kappa. Pairs without a defined kappa come last."""
    names = [analysis.shared_entry(k).name for k in range(len(analysis.shared.models))]
    rows = [(names[a], names[b], kappa) for (a, b), kappa in analysis.agreement.items()]
    return sorted(rows, key=lambda row: (bool(np.isnan(row[2].value)), row[2].value))


def largest_class(analysis: Analysis) -> tuple[str, str]:
    """Return the name of the largest class, and its share of the images in percent.

    The share is the accuracy of a model that always predicts this class.
    """
    counts = np.bincount(analysis.shared.labels, minlength=len(analysis.shared.classes))
    return analysis.shared.classes[int(counts.argmax())], percent(counts.max() / counts.sum())
