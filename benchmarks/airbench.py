"""cnn_fast beside airbench94_muon, the speed record on CIFAR-10, on this CPU, in turn.

    git clone https://github.com/KellerJordan/cifar10-airbench
    python benchmarks/airbench.py --airbench cifar10-airbench/airbench94_muon.py --data FOLDER --runs 2

    python benchmarks/airbench.py --airbench cifar10-airbench/airbench94_muon.py --data FOLDER --rounds 12

FOLDER is a copy of CIFAR-10, as train.py takes it as --dataset. airbench is changed in a few places only: CPU
for GPU, bfloat16 for half, no compilation, and the images of FOLDER. It keeps freed memory as train.py does,
which makes it faster.

--runs trains both on the training images (cnn_fast on all but 100, which it validates on) and judges them on
the test images, without test-time augmentation. Decoding and the final test do not count as time. airbench's
time is its own timer's: steps and whitening. The time of cnn_fast is train.py's clock, which also counts
checkpoints, logs and validation. --rounds times only training steps, of both in turn, each of 2,000 images.
On a busy machine its ratio is the more reliable one.
"""

import argparse
import contextlib
import csv
import importlib
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling.data.choices import Choices  # noqa: E402
from modeling.data.images import decode  # noqa: E402
from modeling.data.sources import load_source  # noqa: E402
from modeling.engine import Batch, StepSettings, train_step  # noqa: E402
from modeling.models import build_model, preprocessing  # noqa: E402
from modeling.optim import build_optimizer  # noqa: E402
from modeling.recipes import get_recipe  # noqa: E402
from modeling.run.checkpoint import read_header  # noqa: E402

VAL_FRACTION = 0.002  # 100 images
# Put before airbench: it keeps freed memory as train.py does.
START = f"""import sys
sys.path.append({str(ROOT)!r})
from modeling.run.launch import keep_freed_memory
keep_freed_memory()
"""
CHANGES = (
    ("@torch.compile\n", ""),
    ('map_location=torch.device("cuda")', 'map_location="cpu"'),
    (".half()", ".bfloat16()"),
    ("CifarNet().cuda()", "CifarNet()"),
    ('    model.compile(mode="max-autotune")\n', ""),
    ('    main("warmup", model)\n', ""),
    ("torch.cuda.Event(enable_timing=True)", "None"),
    ("        starter.record()", "        nonlocal starter\n        starter = time.perf_counter()"),
    ("        ender.record()\n        torch.cuda.synchronize()\n", ""),
    ("1e-3 * starter.elapsed_time(ender)", "time.perf_counter() - starter"),
    ("import os\n", "import os, time\n"),
    ("range(200)", "range(1)"),
)


def write_images(data: Path, folder: Path) -> None:
    """Write the images as airbench reads them: uint8 (N, 32, 32, 3)."""
    source = load_source(str(data), Choices())
    for split in ("train", "test"):
        images = decode(source, split, torch.arange(len(source.splits[split])), image_size=32, num_workers=0)
        pixels, _ = images.gather(torch.arange(len(images)))
        content = {"images": pixels.permute(0, 2, 3, 1).contiguous(), "labels": images.labels}
        torch.save(content | {"classes": images.classes}, folder / f"{split}.pt")


def write_port(script: Path, folder: Path) -> None:
    """Write airbench, changed for this CPU, as ported.py."""
    code = script.read_text()
    for old, new in CHANGES:
        if old not in code:
            raise SystemExit(f"{script} is another version: it has no {old!r}")
        code = code.replace(old, new)
    (folder / "ported.py").write_text(START + code)


def run_airbench(script: Path, folder: Path) -> tuple[float, float]:
    """Return test accuracy and seconds of one run."""
    write_port(script, folder)
    command = [sys.executable, "-u", "ported.py"]
    rows = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            if re.match(r"\|[^|]*\|\s+\d+ ", line):
                rows.append(line.split("|")[1:-1])
    if process.returncode:
        raise SystemExit(f"airbench ended with status {process.returncode}")
    return float(rows[-1][3]), float(rows[-1][5])


def run_ours(data: Path, folder: Path, seed: int, flags: list[str]) -> tuple[float, float]:
    """Return the final checkpoint's test accuracy and the seconds of training."""
    command = [sys.executable, ROOT / "train.py", "--model", "cnn_fast", "--mixed-precision", "bf16"]
    command += [
        "--dataset",
        data,
        "--val-fraction",
        VAL_FRACTION,
        "--seed",
        seed,
        "--output-dir",
        folder,
        *flags,
    ]
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    final = folder / "checkpoints" / "cnn_fast_final.safetensors"
    command = [sys.executable, ROOT / "evaluate.py", "--ckpt", final, "--output-dir", folder]
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    (row,) = csv.DictReader((folder / "traces" / "metrics.csv").open())
    return float(row["accuracy"]), read_header(final)["clock"]["train_seconds"]


def airbench_steps(ported: ModuleType) -> Iterator[None]:
    """Train airbench's network, one step of 2,000 images at a time."""
    loader = ported.CifarLoader("cifar10", train=True, batch_size=2000, aug={"flip": True, "translate": 2})
    model = ported.CifarNet().to(memory_format=torch.channels_last)
    model.reset()
    model.init_whiten(loader.normalize(loader.images[:5000]))
    filters = [weight for weight in model.parameters() if weight.ndim == 4 and weight.requires_grad]
    others = [weight for weight in model.parameters() if weight.ndim != 4 and weight.requires_grad]
    optimizers = [
        torch.optim.SGD(others, lr=0.05, momentum=0.85, nesterov=True, fused=True),
        ported.Muon(filters, lr=0.24, momentum=0.6, nesterov=True),
    ]
    model.train()
    while True:
        for images, labels in loader:
            logits = model(images, whiten_bias_grad=True)
            functional.cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum").backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            yield


def our_steps(content: dict[str, Any]) -> Iterator[None]:
    """Train cnn_fast by its recipe, two steps of 1,000 images at a time."""
    recipe = get_recipe("cnn_fast", 32)
    model = build_model("cnn_fast", num_classes=10, image_size=32, **recipe.model_args).train()
    optimizer = build_optimizer(
        recipe.optimizer,
        model,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
    )
    settings = StepSettings(
        preprocessing=preprocessing("cnn_fast", recipe, 32),
        augment=recipe.augment,
        label_smoothing=recipe.label_smoothing,
    )
    pixels = content["images"].permute(0, 3, 1, 2).contiguous()
    sizes = torch.full((recipe.batch_size, 2), 32)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(model)
    for step in itertools.count():
        rows = torch.randperm(len(pixels))[: recipe.batch_size]
        batch = Batch(pixels[rows], sizes, content["labels"][rows], rows, torch.ones(len(rows)))
        train_step(
            accelerator,
            model,
            optimizer,
            [batch],
            epoch=step,
            step=step,
            lr=recipe.lr,
            num_images=recipe.batch_size,
            step_settings=settings,
        )
        if step % 2:
            yield


def time_steps(script: Path, data: Path, rounds: int) -> None:
    """Print the images per second of both, and the ratio."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        (folder / "cifar10").mkdir()
        write_images(data, folder / "cifar10")
        write_port(script, folder)
        sys.path.insert(0, name)
        sys.argv = ["ported.py"]  # airbench reads its own source
        steps = {
            "cnn_fast": our_steps(torch.load("cifar10/train.pt")),
            "airbench": airbench_steps(importlib.import_module("ported")),
        }
        seconds: dict[str, list[float]] = {contender: [] for contender in steps}
        for number in range(1 + rounds):
            for contender, each in steps.items():
                started = time.perf_counter()
                next(each)
                if number:  # the first round warms up
                    seconds[contender].append(time.perf_counter() - started)
    for contender, each in seconds.items():
        print(f"{contender:9} {2000 / statistics.median(each):.0f} images/s, at best {2000 / min(each):.0f}")
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    print(f"cnn_fast trains {statistics.median(ratios):.2f} times as many images a second, in the median")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--airbench", type=Path, help="airbench94_muon.py (default: run cnn_fast alone)")
    parser.add_argument("--data", type=Path, required=True, help="a copy of CIFAR-10")
    parser.add_argument("--runs", type=int, default=1, help="runs of each model (default: 1)")
    parser.add_argument("--rounds", type=int, help="only time so many steps of each, in turn")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: further flags of train.py")
    args = parser.parse_args(argv)
    if args.rounds:
        if not args.airbench:
            parser.error("--rounds needs --airbench")
        time_steps(args.airbench.resolve(), args.data.resolve(), args.rounds)
        return
    flags = [flag for flag in args.flags if flag != "--"]
    results: dict[str, list[tuple[float, float]]] = {"cnn_fast": []}
    for seed in range(args.runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            results["cnn_fast"].append(run_ours(args.data.resolve(), folder, seed, flags))
            if args.airbench:
                (folder / "cifar10").mkdir()
                write_images(args.data, folder / "cifar10")
                results.setdefault("airbench", []).append(run_airbench(args.airbench, folder))
        for contender, pairs in results.items():
            accuracy, seconds = pairs[-1]
            print(f"{contender:9} run {seed}: test accuracy {accuracy:.4f}, {seconds:.0f} s", flush=True)
    for contender, pairs in results.items():
        accuracies, seconds = zip(*pairs, strict=True)
        deviation = f", deviation {statistics.stdev(accuracies):.4f}" if len(pairs) > 1 else ""
        print(
            f"{contender:9} {len(pairs)} runs: mean {statistics.mean(accuracies):.4f}{deviation}, "
            f"median {statistics.median(seconds):.0f} s"
        )


if __name__ == "__main__":
    main()
