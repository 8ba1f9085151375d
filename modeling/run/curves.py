"""curves.png: loss and accuracy of a run by epoch, drawn from its metrics.jsonl."""

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modeling.files import atomic_write

COLOURS = {"train": "#8a8f98", "validation": "#2a78d6", "test": "#d9591f"}


def read_records(log: Path, kind: str) -> list[dict[str, float]]:
    """The lines of this kind ("epoch", "test") of a metrics.jsonl."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def draw_curves(path: Path, log: Path, *, title: str, best_epoch: int) -> None:
    """Draw loss and accuracy by epoch, of training and validation. Mark the best epoch and its test."""
    epochs, tests = read_records(log, "epoch"), read_records(log, "test")
    numbers = [record["epoch"] for record in epochs]
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"))
    for place, metric in enumerate(("loss", "accuracy"), start=1):
        axes = figure.add_subplot(1, 2, place)
        for split in ("train", "validation"):
            values = [record[f"{split}_{metric}"] for record in epochs]
            axes.plot(numbers, values, color=COLOURS[split], marker="o", markersize=3, label=split)
        axes.axvline(best_epoch, color=COLOURS["validation"], linestyle=":", linewidth=1)
        stars = [record[f"validation_{metric}"] for record in epochs if record["epoch"] == best_epoch]
        for value in stars:  # one, or none where somebody removed a part of the log
            label = f"best epoch {best_epoch}: {value:.4f}"
            axes.plot(best_epoch, value, "*", color=COLOURS["validation"], markersize=14, label=label)
        for record in tests[-1:]:
            value = record[f"test_{metric}"]
            label = f"its test {metric}: {value:.4f}"
            axes.plot(best_epoch, value, "D", color=COLOURS["test"], label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
