"""Confusion matrices and frequent confusions, as the template reads them."""

from dataclasses import dataclass

import numpy as np

from modeling.analysis import Analysis
from modeling.pages.figures import confusion_picture
from modeling.pages.tables import MANY_CLASSES

MOST_MATRICES_OF_MANY = 100  # with more classes, only the two best models have a confusion matrix
STRONGEST_HEAT = 0.5  # largest opacity of a cell; its number stays readable


@dataclass(frozen=True, eq=False)
class ConfusionRow:
    """A frequent confusion. cells: (count, opacity) per shared model."""

    true: int
    predicted: int
    true_name: str
    predicted_name: str
    cells: list[tuple[int, str]]


def confusion_rows(analysis: Analysis) -> list[ConfusionRow]:
    num_images = np.bincount(analysis.shared.labels, minlength=len(analysis.shared.classes))
    shares = [
        [count / num_images[confusion.true] for count in confusion.counts]
        for confusion in analysis.confusions
    ]
    largest = max((share for row in shares for share in row), default=1.0)
    return [
        ConfusionRow(
            confusion.true,
            confusion.predicted,
            analysis.shared.classes[confusion.true],
            analysis.shared.classes[confusion.predicted],
            [(count, heat(share / largest)) for count, share in zip(confusion.counts, row, strict=True)],
        )
        for confusion, row in zip(analysis.confusions, shares, strict=True)
    ]


def heat(strength: float) -> str:
    """The opacity of a cell. strength is its value divided by the largest value."""
    return f"{STRONGEST_HEAT * strength:.2f}"


@dataclass(frozen=True, eq=False)
class Matrix:
    """A confusion matrix: rows of cells (count, opacity), or a picture if there are many classes.

    order lists the class numbers of its rows and columns.
    """

    k: int
    number: int
    name: str
    order: list[int]
    cells: list[list[tuple[int, str]]]
    picture: str | None


def matrices(analysis: Analysis) -> list[Matrix]:
    num_classes = len(analysis.shared.classes)
    shown = analysis.matrices[:2] if num_classes > MOST_MATRICES_OF_MANY else analysis.matrices
    result = []
    for k, matrix in enumerate(shown):
        cells, picture = [], None
        if num_classes > MANY_CLASSES:
            picture = confusion_picture(matrix, analysis.class_order)
        else:
            for true in analysis.class_order:
                total = max(1, int(matrix[true].sum()))
                counts = [int(matrix[true, predicted]) for predicted in analysis.class_order]
                cells.append([(count, heat(min(1.0, 0.1 + 8 * count / total))) for count in counts])
        number = analysis.shared.entries[k]
        name = analysis.shared_entry(k).name
        result.append(Matrix(k, number, name, analysis.class_order.tolist(), cells, picture))
    return result
