"""A comparison as text: what the terminal prints, and the CSV files beside the page."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from modeling.compare import Comparison, Entry, Pair
from modeling.cost import Costs
from modeling.stats.classes import ClassScores, confusion_matrix, f1_scores, precisions
from modeling.stats.proportions import Interval
from modeling.stats.runs import mean_of_runs
from modeling.suspects import Suspect

PAIR_COLUMNS = (
    "model_a",
    "model_b",
    "runs_a",
    "runs_b",
    "images",
    "difference",
    "low",
    "high",
    "only_a_right",
    "only_b_right",
    "p",
    "corrected_p",
    "verdict",
)
CLASS_COLUMNS = (
    "class",
    "images",
    "model",
    "runs",
    "recall",
    "recall_low",
    "recall_high",
    "precision",
    "f1",
    "p",
    "corrected_p",
    "better_than_best",
)
SUSPECT_COLUMNS = (
    "row",
    "file",
    "label",
    "suggested",
    "label_probability",
    "suggested_probability",
    "reason",
)


def points(value: float) -> str:
    """A difference of shares in percentage points with its sign: +2.2, -0.9, 0.0."""
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def points_with_interval(interval: Interval) -> str:
    return f"{points(interval.value)} points ({points(interval.low)} to {points(interval.high)})"


def p_text(p: float) -> str:
    """Return "< 0.001" or "= 0.051". With four decimals if three would be 0.050, to show the side of 0.05."""
    if p < 0.001:
        return "< 0.001"
    return f"= {p:.4f}" if f"{p:.3f}" == "0.050" else f"= {p:.3f}"


def entry_name(entry: Entry) -> str:
    return entry.name if len(entry.runs) == 1 else f"{entry.name} x{len(entry.runs)}"


def ranking_lines(comparison: Comparison, costs: Costs) -> list[str]:
    """The ranking as aligned columns. A cell is empty if its value is not known."""
    heading = (
        "rank",
        "model",
        "accuracy",
        "95 % interval",
        "log loss",
        "too sure",
        "ms/image",
        "parameters",
    )
    rows = [heading]
    for entry in comparison.entries:
        cost = costs.get(entry.shown.name)
        rows.append(
            (
                entry.rank_text,
                entry_name(entry),
                f"{entry.accuracy.value:.4f}",
                f"{entry.accuracy.low:.4f} to {entry.accuracy.high:.4f}",
                f"{entry.log_loss:.3f}",
                f"{entry.too_sure:+.3f}",
                f"{cost.speed.batch_ms:.2f}" if cost and cost.speed else "",
                f"{cost.parameters:,}" if cost else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    lines = []
    for row in rows:
        left = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    return lines


def pair_line(comparison: Comparison, pair: Pair) -> str:
    """One pair in words."""
    a, b = entry_name(comparison.entries[pair.a]), entry_name(comparison.entries[pair.b])
    if pair.is_identical:
        return f"{a} and {b} are right on exactly the same images"
    images = ""
    if pair.num_images < min(len(comparison.entries[k].shown) for k in (pair.a, pair.b)):
        images = f" on {pair.num_images:,} common images"
    correction = ""
    if len(comparison.pairs) > 1:
        correction = f" (corrected for {len(comparison.pairs)} comparisons)"
    return (
        f"{a} over {b}: {points_with_interval(pair.difference)}{images}, "
        f"p {p_text(pair.corrected_p)}{correction}: {pair.verdict}"
    )


def caution_lines(comparison: Comparison) -> list[str]:
    """Say which intervals do not cover other seeds, and which models are not compared."""
    lines = []
    compared = [entry for entry in comparison.entries if entry.rank is not None]
    single = [entry.name for entry in compared if len(entry.runs) == 1]
    if len(compared) > 1 and len(single) == len(compared):
        lines.append("one run of each: another seed changes the accuracy too")
    elif len(compared) > 1 and single:
        lines.append(f"one run of {' and '.join(single)}: another seed changes the accuracy too")
    others = [entry.name for entry in comparison.entries if entry.rank is None]
    if others:
        lines.append(f"not compared, because their images or classes differ: {', '.join(others)}")
    return lines


def terminal_lines(comparison: Comparison, costs: Costs) -> list[str]:
    """The ranking, the pairs in words, and the cautions."""
    pairs = [pair_line(comparison, pair) for pair in comparison.pairs_to_show()]
    return ranking_lines(comparison, costs) + pairs + caution_lines(comparison)


def _csv_text(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _number(value: float | None) -> str:
    """Return six significant digits. An empty text if the value is not known or not defined."""
    return "" if value is None or np.isnan(value) else f"{value:.6g}"


def pairs_csv(comparison: Comparison) -> str:
    """The text of pairs.csv: every pair, with p before and after Holm's correction. Shares, not percent."""
    rows = []
    for pair in comparison.pairs:
        a, b = comparison.entries[pair.a], comparison.entries[pair.b]
        rows.append(
            {
                "model_a": a.name,
                "model_b": b.name,
                "runs_a": len(a.runs),
                "runs_b": len(b.runs),
                "images": pair.num_images,
                "difference": _number(pair.difference.value),
                "low": _number(pair.difference.low),
                "high": _number(pair.difference.high),
                "only_a_right": _number(pair.only_a),
                "only_b_right": _number(pair.only_b),
                "p": _number(pair.p),
                "corrected_p": _number(pair.corrected_p),
                "verdict": pair.verdict,
            }
        )
    return _csv_text(PAIR_COLUMNS, rows)


def class_metrics_csv(comparison: Comparison, scores: ClassScores) -> str:
    """The text of class_metrics.csv: a row for each entry and each class that has images.

    With several runs the values are means over the runs. p and corrected_p test whether the entry and the
    best entry differ in that class.
    """
    shared = comparison.shared
    # precision and f1: a list over the entries of arrays (C,), each the mean over the entry's runs
    matrices = [
        [confusion_matrix(run.labels, run.predicted, len(shared.classes)) for run in runs]
        for runs in shared.runs
    ]
    precision = [np.mean([precisions(matrix) for matrix in each], axis=0) for each in matrices]
    f1 = [np.mean([f1_scores(matrix) for matrix in each], axis=0) for each in matrices]
    rows = []
    for j, number in enumerate(scores.classes):
        inside = shared.labels == number
        for k, position in enumerate(shared.entries):
            recall = mean_of_runs(shared.right[k][:, inside])
            rows.append(
                {
                    "class": shared.classes[number],
                    "images": int(scores.num_images[j]),
                    "model": comparison.entries[position].name,
                    "runs": len(shared.runs[k]),
                    "recall": _number(recall.value),
                    "recall_low": _number(recall.low),
                    "recall_high": _number(recall.high),
                    "precision": _number(precision[k][number]),
                    "f1": _number(f1[k][number]),
                    "p": _number(scores.p[k, j]),
                    "corrected_p": _number(scores.corrected_p[k, j]),
                    "better_than_best": int(scores.is_better[k, j]),
                }
            )
    return _csv_text(CLASS_COLUMNS, rows)


def label_suspects_csv(
    suspects: Sequence[Suspect], classes: Sequence[str], file_of_row: Callable[[int], str]
) -> str:
    """The text of label_suspects.csv, the most suspect first. file_of_row returns "" for no file."""
    rows = [
        {
            "row": suspect.row,
            "file": file_of_row(suspect.row),
            "label": classes[suspect.label],
            "suggested": classes[suspect.suggested],
            "label_probability": _number(suspect.label_probability),
            "suggested_probability": _number(suspect.suggested_probability),
            "reason": "all models contradict the label"
            if suspect.twin is None
            else f"same picture as row {suspect.twin}",
        }
        for suspect in suspects
    ]
    return _csv_text(SUSPECT_COLUMNS, rows)
