"""Draw the README's picture: validation accuracy by epoch of the runs in a folder.

python train.py --model cnn_small --dataset digits --epochs 20 --output-dir curves
python train.py --model vit_scratch --dataset digits --epochs 20 --output-dir curves
python benchmarks/curves.py curves/runs docs/images/digits.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure


def read_accuracies(log: Path) -> list[float]:
    """The validation accuracy of each epoch in a metrics.jsonl."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record["validation_accuracy"] for record in records if record["kind"] == "epoch"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder runs/ of an output folder")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    figure = Figure(figsize=(7.5, 3.2), dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    markers = iter("os^Dv")
    for log in sorted(args.runs.glob("*/metrics.jsonl")):
        accuracies = [100 * value for value in read_accuracies(log)]
        epochs = range(1, len(accuracies) + 1)
        label = f"{log.parent.name}: {accuracies[-1]:.1f} %"
        axes.plot(epochs, accuracies, marker=next(markers), markersize=4, label=label)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", title="scikit-learn's digits, from scratch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture)


if __name__ == "__main__":
    main()
