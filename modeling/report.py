"""Tables, reports and plots that evaluate.py and profile.py write."""

import csv
import io
import warnings
from collections.abc import Callable, Sequence
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
_NUMBERED_CELLS = 30  # with more classes the cells of a confusion matrix have no numbers
_NAMED_CLASSES = 120  # with more classes their names would overlap
_MOST_CELLS = 2000  # in a row of the confusion matrix
# With more probabilities than this (about 50 MB), predictions_*.csv has only the NUM_TOP largest of each
# image.
MOST_PROBABILITIES = 5_000_000
NUM_TOP = 5


@dataclass
class Evaluated:
    """One evaluated checkpoint. `name` is part of its file names, `row` is its row of metrics.csv.

    file_of gives the file of a row of the dataset's split, "" where it has none. images_sha256 is the digest
    of that split.
    """

    name: str
    row: dict[str, Any]
    predictions: Predictions
    classes: list[str]
    file_of: Callable[[int], str]
    images_sha256: str


# The heading and the number of decimals of a column. Other columns keep their name and have four decimals.
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
    "data_share": ("data", 2),
    "forward_share": ("fwd", 2),
    "backward_share": ("bwd", 2),
    "optimizer_share": ("optim", 2),
    "matrix_share": ("matrix", 2),
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as aligned text. A column with a number in it is aligned to the right."""
    aligned_columns = []
    for column in rows[0]:
        values = [row[column] for row in rows]
        heading, decimals = _STYLE.get(column, (column, 4))
        aligned_columns.append(_aligned_column(heading, decimals, values))
    lines = ["  ".join(cells).rstrip() for cells in zip(*aligned_columns, strict=True)]
    return "\n".join(lines)


def _aligned_column(heading: str, decimals: int, values: Sequence[Any]) -> list[str]:
    """Return the cells of a column from top to bottom: heading, rule, values. All have the same width."""
    texts = [_cell(value, decimals) for value in values]
    width = max(len(text) for text in [heading, *texts])
    cells = [heading, "-" * width, *texts]
    if any(isinstance(value, int | float) for value in values):
        return [cell.rjust(width) for cell in cells]
    return [cell.ljust(width) for cell in cells]


def _cell(value: Any, decimals: int) -> str:
    """Return a value as text. None gives an empty cell; only floats have decimals."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.{decimals}f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def csv_text(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Return the rows as CSV with a header line."""
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
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (UnicodeDecodeError, csv.Error):
        header, rows = [], []
    if tuple(header) != CSV_COLUMNS or any(len(row) != len(CSV_COLUMNS) for row in rows):
        raise UserError(f"{path} is not a metrics.csv of this program: move it away")
    return [dict(zip(CSV_COLUMNS, row, strict=True)) for row in rows]


def update_metrics_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add or replace one row per (checkpoint, dataset, split). Other rows stay.

    UserError: the file is not a metrics.csv of this program.
    """

    def key(row: dict[str, Any]) -> tuple:
        return tuple(row[column] for column in ("checkpoint", "dataset", "split"))

    merged = {key(row): row for row in [*read_metrics_csv(path), *rows]}
    write_text(path, csv_text(list(merged.values()), CSV_COLUMNS))


def present_classes(one: Evaluated) -> list[int]:
    """Return the numbers of the classes that occur as a label or a prediction. F1 is the mean over these."""
    return np.union1d(one.predictions.labels, one.predictions.predicted).tolist()


def report_text(one: Evaluated) -> str:
    """Return scikit-learn's report: precision, recall, F1 and support of each class, and their averages."""
    numbers = present_classes(one)
    names = [one.classes[number] for number in numbers]
    return classification_report(
        one.predictions.labels,
        one.predictions.predicted,
        labels=numbers,
        target_names=names,
        digits=4,
        zero_division=0,
    )


def write_evaluation(folder: Path, one: Evaluated) -> None:
    """Write the confusion matrix, the classification report and the predictions of a checkpoint."""
    files = EvaluationFiles(folder, one.name)
    heading = (
        f"{one.row['checkpoint']} on {one.row['split']} of {one.row['dataset']}, "
        f"{one.row['num_samples']:,} images"
    )
    write_text(files.report, f"{heading}\n\n{report_text(one)}")
    write_text(files.predictions, _predictions_csv(one))
    plot_confusion_matrix(files.confusion_matrix, one)


def _predictions_csv(one: Evaluated) -> str:
    """Return one CSV row per image: row in the split, true and predicted class, all probabilities, file.

    With more than MOST_PROBABILITIES probabilities, only the NUM_TOP largest of each image are written.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    probabilities = one.predictions.probabilities
    is_large = probabilities.numel() > MOST_PROBABILITIES
    if is_large:
        probabilities, top_classes = probabilities.topk(NUM_TOP, dim=1)
        top_columns = [f"{kind}{place}" for place in range(1, NUM_TOP + 1) for kind in ("class", "p")]
        writer.writerow(["index", "true", "predicted", *top_columns, "file"])
    else:
        # "p(...)" keeps a class that is called "file" or "true" apart from the other columns.
        writer.writerow(["index", "true", "predicted", *(f"p({name})" for name in one.classes), "file"])
    for i, row in enumerate(one.predictions.rows.tolist()):
        true, predicted = int(one.predictions.labels[i]), int(one.predictions.predicted[i])
        cells = [row, one.classes[true], one.classes[predicted]]
        texts = [f"{probability:.6g}" for probability in probabilities[i].tolist()]
        if is_large:
            for number, text in zip(top_classes[i].tolist(), texts, strict=True):
                cells += [one.classes[number], text]
        else:
            cells += texts
        writer.writerow([*cells, one.file_of(row)])
    return out.getvalue()


def plot_confusion_matrix(path: Path, one: Evaluated) -> None:
    """Draw the confusion matrix as a PNG. A row is a true class, a column a predicted class.

    The colour is the share of the row; the number in a cell is a count of images. Above _NAMED_CLASSES
    classes the axes have class numbers instead of names; above _MOST_CELLS a cell is a block of classes.
    """
    count = len(one.classes)
    side_cells = min(count, _MOST_CELLS)
    true_cells = one.predictions.labels.numpy() * side_cells // count
    predicted_cells = one.predictions.predicted.numpy() * side_cells // count
    matrix = confusion_matrix(true_cells, predicted_cells, labels=range(side_cells))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [name if len(name) <= 30 else name[:29] + "…" for name in one.classes]
    is_named = count <= _NAMED_CLASSES
    longest = max(len(name) for name in names) if is_named else 0
    side = min(40.0 if is_named else 12.0, 3.0 + 0.5 * count + 0.06 * longest)  # inches
    figure = Figure(figsize=(side + 1.0, side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    extent = None if is_named else (-0.5, count - 0.5, count - 0.5, -0.5)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, extent=extent)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    font_size = 10 if count <= _NUMBERED_CELLS else max(3, 10 * _NUMBERED_CELLS / count)
    if is_named:
        axes.set_xticks(
            range(count),
            names,
            rotation=45,
            ha="right",
            rotation_mode="anchor",
            fontsize=font_size,
            parse_math=False,
        )
        axes.set_yticks(range(count), names, fontsize=font_size, parse_math=False)
    suffix = "" if is_named else ", by number of the class"
    axes.set(xlabel=f"predicted{suffix}", ylabel=f"true{suffix}")
    axes.set_title(
        f"{one.name}: accuracy {one.row['accuracy']:.4f} on {one.row['num_samples']:,} images",
        parse_math=False,
    )
    if count <= _NUMBERED_CELLS:
        for true, predicted in np.argwhere(matrix):
            axes.text(
                predicted,
                true,
                str(matrix[true, predicted]),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shares[true, predicted] > 0.5 else "black",
            )
    with atomic_write(path) as file, warnings.catch_warnings():
        # Characters that no installed font has are drawn as boxes, and matplotlib warns of each.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="png")


def compare_models(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of models, the best first: by accuracy, or by images per second without accuracy."""
    key = "accuracy" if "accuracy" in rows[0] else "images_per_second"
    return table(sorted(rows, key=lambda row: -row[key]))


def compare_evaluations(evaluated: Sequence[Evaluated]) -> str:
    """Return the text of model_comparison.txt.

    It holds the metrics side by side, the differences from the best model, the F1 of every class, and each
    model's classification report.
    """
    ranked = sorted(evaluated, key=lambda one: -one.row["accuracy"])
    rows = [_comparison_row(one) for one in ranked]
    parts = []
    evaluated_on = {
        (one.row["split"], one.images_sha256, tuple(one.predictions.rows.tolist())) for one in ranked
    }
    if len(evaluated_on) > 1:
        parts.append("These models were evaluated on different images, so do not trust their differences.")
    parts.append("Models, the most accurate first")
    parts.append(compare_models(rows))
    if len(ranked) > 1:
        best = rows[0]
        parts.append(f"Differences from {best['name']}")
        parts.append(table([_difference(row, best) for row in rows[1:]]))
        parts.append("F1 of each class")
        parts.append(table(_f1_rows(ranked)))
    for one in ranked:
        parts.append(f"{one.name}: {one.row['checkpoint']} on {one.row['split']} of {one.row['dataset']}")
        parts.append(report_text(one).rstrip())
    return "\n\n".join(parts) + "\n"


def _comparison_row(one: Evaluated) -> dict[str, Any]:
    row = {"name": one.name}
    for column in ("model", "num_samples", *NAMES, "parameters", "trainable_parameters"):
        row[column] = one.row[column]
    return row


def _difference(row: dict[str, Any], best: dict[str, Any]) -> dict[str, Any]:
    """Return `row` minus `best`, for the metrics and the number of parameters."""
    difference = {"name": row["name"]}
    for column in (*NAMES, "parameters"):
        difference[column] = row[column] - best[column]
    return difference


def _f1_rows(ranked: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Return one row per class: its name and its F1 for each model. None: the model lacks the class."""
    scores: dict[str, dict[str, float]] = {}  # class name -> model name -> F1
    for one in ranked:
        numbers = present_classes(one)
        _, _, f1_scores, _ = precision_recall_fscore_support(
            one.predictions.labels, one.predictions.predicted, labels=numbers, zero_division=0
        )
        for number, f1 in zip(numbers, f1_scores, strict=True):
            scores.setdefault(one.classes[number], {})[one.name] = float(f1)
    rows = []
    for class_name, f1_by_model in scores.items():
        row: dict[str, Any] = {"class": class_name}
        for one in ranked:
            row[one.name] = f1_by_model.get(one.name)
        rows.append(row)
    return rows
