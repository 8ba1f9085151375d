"""How long until train.py is as accurate as the notebook's recipe is at its end? Both run, in turn.

    python benchmarks/time_to_accuracy.py cnn_small --data FOLDER                # three pairs of runs
    python benchmarks/time_to_accuracy.py vit_scratch --data FOLDER --epochs 8   # about two hours on 2 cores

FOLDER has parquet files, with columns img and label, as CIFAR-10's.

- The notebook's pipeline trains its model by its recipe for its 10 epochs (see contenders.py): PIL and
  torchvision at every access, two workers, fp32. Its accuracy after the last epoch is the target.
- train.py trains the same model by the tuned recipe, for --epochs epochs, with --mixed-precision bf16.

Both train on the same 90 % of the training images and are judged on the same 10 % after each epoch. The
time is wall clock from the start of the process to the end of the first epoch that reaches the target. It
includes imports, decoding and judging. Each process starts with an empty cache.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK_EPOCHS = {"cnn_small": 10, "vit_scratch": 10}
VAL_FRACTION = 0.1


def notebook(work: str, args: argparse.Namespace) -> None:
    """Train as the notebook does and print a line an epoch. Runs in a process of its own."""
    import datasets
    import torch
    from contenders import plain_loader, plain_model

    torch.manual_seed(args.seed)
    rows = datasets.load_dataset(str(args.data))["train"]
    split = np.load(args.split)
    train = plain_loader(work, rows.select(split["train"]), num_workers=2, shuffle=True)
    validation = plain_loader(work, rows.select(split["validation"]), num_workers=2, shuffle=False)
    model, criterion = plain_model(work), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(NOTEBOOK_EPOCHS[work]):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()
        model.eval()
        num_right = 0
        with torch.no_grad():
            for images, labels in validation:
                num_right += (model(images).argmax(dim=1) == labels).sum().item()
        print(f"epoch {epoch + 1} validation acc {num_right / len(split['validation']):.4f}", flush=True)


def write_split(data: Path, seed: int, path: Path) -> None:
    """Write the numbers of the images that train.py trains and validates on with this seed."""
    sys.path.insert(0, str(ROOT))
    from modeling.data.division import select_rows  # not in the process of the notebook
    from modeling.data.sources import load_source

    source = load_source(str(data))
    rows = {}
    for split in ("train", "validation"):
        _, rows[split] = select_rows(source, split, val_fraction=VAL_FRACTION, seed=seed)
    np.savez(path, **rows)


def run(command: list[object], target: float = math.inf) -> list[tuple[float, float]]:
    """Run a process. Return (seconds since its start, accuracy) of its epochs, up to the target."""
    points: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"HF_DATASETS_CACHE": cache},
        )
        for line in process.stdout:
            found = re.match(r"epoch \d+.* validation .*acc ([\d.]+)", line)
            if found:
                points.append((time.monotonic() - started, float(found[1])))
            if points and points[-1][1] >= target:
                process.kill()
        if process.wait() > 0 or not points:
            errors.seek(0)
            sys.exit(f"{' '.join(map(str, command))} failed:\n{errors.read()[-2000:]}")
    return points


def ours(args: argparse.Namespace, seed: int, folder: str) -> list[object]:
    """The command of train.py."""
    command = [ROOT / "train.py", "--model", args.work, "--dataset", args.data, "--epochs", args.epochs]
    command += ["--mixed-precision", "bf16", "--seed", seed, "--val-fraction", VAL_FRACTION]
    return [*command, "--output-dir", folder]


def seconds_to(target: float, points: list[tuple[float, float]]) -> float | None:
    """When the target was first reached; None: it was not."""
    return next((seconds for seconds, accuracy in points if accuracy >= target), None)


def run_pair(args: argparse.Namespace, seed: int) -> tuple[float, float, float | None]:
    """Run both once. Return the target, and the seconds of the notebook and of train.py."""
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder, "split.npz")
        write_split(args.data, seed, split)
        pipeline = [__file__, args.work, "--data", args.data, "--split", split, "--seed", seed]
        theirs = run(pipeline)
        target = theirs[-1][1]
        our_seconds = seconds_to(target, run(ours(args, seed, folder), target))
    return target, seconds_to(target, theirs), our_seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", choices=NOTEBOOK_EPOCHS)
    add("--data", type=Path, required=True)
    add("--epochs", type=int, default=5, help="of train.py (default: 5)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the pairs of runs (default: 1 2 3)")
    add("--split", type=Path, help=argparse.SUPPRESS)  # it and --seed are for the process of the notebook
    add("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.split:
        notebook(args.work, args)
        return
    print("| seed | target accuracy | notebook, s | train.py, s | ratio |\n|---|---|---|---|---|")
    pairs = []
    for seed in args.seeds:
        target, theirs, our = run_pair(args, seed)
        shown = "not reached |" if our is None else f"{our:.0f} | {theirs / our:.1f}"
        print(f"| {seed} | {target:.4f} | {theirs:.0f} | {shown} |", flush=True)
        pairs.append((theirs, math.inf if our is None else our))
    theirs, our = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"| median | | {theirs:.0f} | {our:.0f} | {theirs / our:.1f} |")


if __name__ == "__main__":
    main()
