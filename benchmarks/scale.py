"""Time what grows with images and classes: scan, labels, division, fingerprint, metrics and reports.

    python benchmarks/scale.py [--images 1280000] [--classes 21000] [--evaluated 50000]

The folder is made of empty files, so nothing is decoded. It stands in a temporary folder, and takes some
minutes to make. metrics and reports are of --evaluated random predictions.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modeling import metrics, randomness, report
from modeling.data import folders
from modeling.data.division import division_digest, select_rows
from modeling.data.images import Images, count_duplicates
from modeling.data.sources import load_source
from modeling.data.stratified import stratified
from modeling.engine import Predictions


def timed(what: str, call: Callable[[], Any]) -> Any:
    started = time.monotonic()
    result = call()
    print(f"{what:<60} {time.monotonic() - started:8.1f} s", flush=True)
    return result


def make_folder(root: Path, num_images: int, num_classes: int) -> None:
    for number in range(num_classes):
        folder = root / "train" / f"n{number:08d}"
        folder.mkdir(parents=True)
        for image in range(number, num_images, num_classes):
            (folder / f"{image}.jpg").touch()


def random_predictions(num_images: int, num_classes: int) -> Predictions:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (num_images,), generator=g)
    logits = torch.randn(num_images, num_classes, generator=g)
    return Predictions(torch.arange(num_images), labels, logits.argmax(1), logits, torch.ones(num_images))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=21_000)
    parser.add_argument("--evaluated", type=int, default=50_000)
    args = parser.parse_args()
    print(f"{args.images:,} images, {args.classes:,} classes")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        timed("(make the files)", lambda: make_folder(root, args.images, args.classes))
        timed("scan the folder", lambda: folders.scan(root))
        source = timed("scan, splits, labels and fingerprint", lambda: load_source(str(root)))
    timed("digest of the undivided split", lambda: division_digest(source))
    for split in ("train", "validation"):
        timed(f"divide: {split}", lambda split=split: select_rows(source, split, val_fraction=0.1, seed=42))
    labels = source.labels("train")
    timed("stratified subset of 50,000", lambda: stratified(labels, 50_000, 42, randomness.SUBSET))
    predictions = timed(
        f"(make {args.evaluated:,} predictions of 1,000 classes)",
        lambda: random_predictions(args.evaluated, 1000),
    )
    row = timed("metrics of them", lambda: metrics.compute(predictions))
    row |= {"checkpoint": "c", "model": "m", "dataset": "d", "split": "test", "num_samples": args.evaluated}
    names = [f"class {number}" for number in range(1000)]
    one = report.Evaluated("run", row, predictions, names, lambda row: f"test/{row}.jpg", "")
    with tempfile.TemporaryDirectory() as folder:
        timed("report, predictions and confusion matrix", lambda: report.write_evaluation(Path(folder), one))
    pixels = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    every = torch.arange(50_000)
    images = Images(pixels, every, torch.full((50_000, 2), 32), every, every, [])
    timed(
        "duplicates between 45,000 and 5,000 images of 32 px",
        lambda: count_duplicates(
            {"train": images.subset(every[:45_000]), "test": images.subset(every[45_000:])}
        ),
    )


if __name__ == "__main__":
    main()
