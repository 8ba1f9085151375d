"""Tables, reports and plots: what evaluate.py and profile.py write for people."""

import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import classification_report, confusion_matrix, precision_recall_fscore_support

from modeling.engine import Predictions
from modeling.errors import UserError
from modeling.files import atomic_write, write_text
from modeling.metrics import NAMES
from modeling.run.files import EvaluationFiles

CSV_COLUMNS = (
    "checkpoint",
    "model",
    "dataset",
    "split",
    "num_samples",
    *NAMES,
    "parameters",
    "trainable_parameters",
)
_NUMBERED_CELLS = 30  # with more classes the cells show only colours


@dataclass
class Evaluated:
    """One evaluated checkpoint. `name` is part of its file names, `row` is its row of metrics.csv."""

    name: str
    row: dict[str, Any]
    predictions: Predictions
    classes: list[str]


# How columns look in a table: heading and decimals. Others keep their name, and floats have four.
_STYLE = {
    "num_samples": ("images", 0),
    "balanced_accuracy": ("balanced", 4),
    "top5_accuracy": ("top5", 4),
    "parameters": ("parameters", 0),
    "trainable_parameters": ("trainable", 0),
    "image_size": ("px", 0),
    "batch_size": ("batch", 0),
    "forward_gflops": ("GFLOPs", 3),
    "step_ms_median": ("median ms", 1),
    "step_ms_p95": ("p95 ms", 1),
    "images_per_second": ("images/s", 1),
    "peak_memory_mb": ("peak MB", 1),
    "data_share": ("data share", 3),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of values as aligned text, numbers to the right."""
    columns = list(rows[0])
    cells = [[_cell(column, row[column]) for column in columns] for row in rows]
    headings = [_STYLE.get(column, (column, 4))[0] for column in columns]
    widths = [max(len(line[i]) for line in [headings, *cells]) for i in range(len(columns))]
    justify = [
        str.rjust if any(isinstance(row[column], int | float) for row in rows) else str.ljust
        for column in columns
    ]
    lines = [headings, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(j(text, w) for j, text, w in zip(justify, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.{_STYLE.get(column, (column, 4))[1]}f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def csv_text(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """CSV with a header line."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_metrics_csv(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.csv. A missing file has no rows.

    UserError: the file is not a metrics.csv of this program.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != CSV_COLUMNS:
        raise UserError(f"{path} is not a metrics.csv of this program: move it away")
    return rows


def update_metrics_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write one row per (checkpoint, dataset, split). Rows of other evaluations stay.

    UserError: the file is not a metrics.csv of this program.
    """

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row[column] for column in ("checkpoint", "dataset", "split"))

    merged = {key(row): row for row in [*read_metrics_csv(path), *rows]}
    write_text(path, csv_text(list(merged.values()), CSV_COLUMNS))


def present_classes(one: Evaluated) -> list[int]:
    """The classes that are true or predicted, as the F1 scores of metrics.csv count them."""
    return np.union1d(one.predictions.labels, one.predictions.predicted).tolist()


def report_text(one: Evaluated) -> str:
    """scikit-learn's classification report: precision, recall, F1 and support of each class, and averages."""
    numbers = present_classes(one)
    labels = [one.classes[n] for n in numbers]
    return classification_report(
        one.predictions.labels,
        one.predictions.predicted,
        labels=numbers,
        target_names=labels,
        digits=4,
        zero_division=0,
    )


def write_evaluation(folder: Path, one: Evaluated) -> None:
    """Write the three files of EvaluationFiles: confusion matrix, classification report and predictions."""
    files = EvaluationFiles(folder, one.name)
    heading = (
        f"{one.row['checkpoint']} on {one.row['split']} of {one.row['dataset']}, "
        f"{one.row['num_samples']:,} images"
    )
    write_text(files.report, f"{heading}\n\n{report_text(one)}")
    p = one.predictions
    columns = ["index", "true", "predicted", *one.classes]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row, true, predicted, probabilities in zip(
        p.rows.tolist(), p.labels.tolist(), p.predicted.tolist(), p.probabilities.tolist(), strict=True
    ):
        writer.writerow(
            [row, one.classes[true], one.classes[predicted], *(f"{value:.6g}" for value in probabilities)]
        )
    write_text(files.predictions, out.getvalue())
    plot_confusion_matrix(files.confusion_matrix, one)


def plot_confusion_matrix(path: Path, one: Evaluated) -> None:
    """Draw the confusion matrix as a PNG. A row is a true class, a column a predicted class.

    The colour is the share of the row; the number in a cell is a count of images.
    """
    count = len(one.classes)
    matrix = confusion_matrix(one.predictions.labels, one.predictions.predicted, labels=range(count))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    longest = max(map(len, one.classes))
    side = min(40.0, 3.0 + 0.5 * count + 0.06 * min(longest, 30))
    figure = Figure(figsize=(side + 1.0, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    names = [name if len(name) <= 30 else name[:29] + "…" for name in one.classes]
    size = 10 if count <= _NUMBERED_CELLS else max(3, 10 * _NUMBERED_CELLS / count)
    axes.set_xticks(
        range(count), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size, parse_math=False
    )
    axes.set_yticks(range(count), names, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(
        f"{one.name}: accuracy {one.row['accuracy']:.4f} on {one.row['num_samples']:,} images",
        parse_math=False,
    )
    if count <= _NUMBERED_CELLS:
        for (i, j), value in np.ndenumerate(matrix):
            if value:
                axes.text(
                    j,
                    i,
                    f"{value}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[i, j] > 0.5 else "black",
                )
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # letters that no installed font has appear as boxes
        figure.savefig(file, format="png")


def compare_models(rows: Sequence[dict[str, Any]]) -> str:
    """A table of models, the best first. Metrics are sorted by accuracy, profiles by images per second."""
    key = "accuracy" if "accuracy" in rows[0] else "images_per_second"
    return table(sorted(rows, key=lambda row: -row[key]))


def compare_evaluations(evaluated: Sequence[Evaluated]) -> str:
    """The text of model_comparison.txt.

    It has the metrics side by side, the differences to the best model, F1 of every class, and each report.
    """
    columns = ("model", "num_samples", *NAMES, "parameters", "trainable_parameters")
    ranked = sorted(evaluated, key=lambda one: -one.row["accuracy"])
    rows = [{"name": one.name, **{column: one.row[column] for column in columns}} for one in ranked]
    parts = ["Models, the most accurate first", compare_models(rows)]
    if len(ranked) > 1:
        best = rows[0]
        parts += [f"Differences from {best['name']}", table([_difference(row, best) for row in rows[1:]])]
        parts += ["F1 of each class", table(_f1_rows(ranked))]
    where = {(one.row["dataset"], one.row["split"], one.row["num_samples"]) for one in ranked}
    if len(where) > 1:
        parts.insert(0, "These models were evaluated on different images: their differences mean little.")
    for one in ranked:
        parts += [
            f"{one.name}: {one.row['checkpoint']} on {one.row['split']} of {one.row['dataset']}",
            report_text(one).rstrip(),
        ]
    return "\n\n".join(parts) + "\n"


def _difference(row: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": row["name"],
        **{name: row[name] - best[name] for name in NAMES},
        "parameters": row["parameters"] - best["parameters"],
    }


def _f1_rows(ranked: Sequence[Evaluated]) -> list[dict[str, Any]]:
    scores: dict[str, dict[str, float]] = {}
    for one in ranked:
        numbers = present_classes(one)
        f1 = precision_recall_fscore_support(
            one.predictions.labels, one.predictions.predicted, labels=numbers, zero_division=0
        )[2]
        for number, value in zip(numbers, f1, strict=True):
            scores.setdefault(one.classes[number], {})[one.name] = float(value)
    return [
        {"class": name, **{one.name: values.get(one.name) for one in ranked}}
        for name, values in scores.items()
    ]
