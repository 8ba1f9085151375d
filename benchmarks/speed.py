"""Compare the training speed of train.py with its peers. Prints medians and ratios.

    python benchmarks/speed.py peers --data FOLDER --timm-train PATH/train.py  # about 25 minutes on 2 cores
    python benchmarks/speed.py scale --data FOLDER       # an epoch of 1x to 8x as many images
    python benchmarks/speed.py processes --data FOLDER   # 1 process of 2 threads, or 2 of 1
    python benchmarks/speed.py start --data FOLDER       # seconds to the first step, store warm

FOLDER has parquet files, with columns img and label, as CIFAR-10's. The contenders run in turn,
each in a process of its own. Each run of `peers` starts with an empty cache. The runs of the other three
commands share one cache.
train.py, cv_example and timm train in bf16. The notebooks' pipelines stay in fp32.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling import cost, models, recipes  # noqa: E402

CONTENDERS = ROOT / "benchmarks" / "contenders.py"
# work: images, first steps that the rate leaves out, peers
PEERS = {
    "cnn_small": (45000, 50, ("notebook", "cv_example")),
    "vit_scratch": (3200, 5, ("notebook", "cv_example", "timm")),
    "cnn": (320, 2, ("notebook", "cv_example")),
    "resnet18": (480, 2, ("notebook", "cv_example", "timm")),
    "deit": (480, 2, ("notebook", "cv_example", "timm")),
    "vit": (640, 4, ("notebook",)),
}


def contender(
    name: str,
    work: str,
    args: argparse.Namespace,
    *flags: object,
    cache: str | None = None,
    env: dict | None = None,
) -> dict:
    """Run contenders.py once. Return the record that it printed, and the seconds of the whole process."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {
            **os.environ,
            "HF_DATASETS_CACHE": cache or empty,
            "BENCHMARK_STARTED": str(time.time()),
            **(env or {}),
        }
        command = [sys.executable, CONTENDERS, name, work, "--data", args.data, *flags]
        started = time.time()
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=environment
        )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "whole": time.time() - started}


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def matrix_rate() -> float:
    """The machine's bf16 matrix product, in FLOP/s."""
    import torch

    a = torch.randn(2048, 2048).bfloat16()
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds)


def training_flops(work: str) -> float:
    """Of an image: the forward pass, and twice that backward."""
    from contenders import WORKS

    size = WORKS[work]["size"]
    recipe = recipes.get_recipe(work, size, "reference")
    model_args = models.model_arguments(work, recipe, image_size=size, patch_size=None, head_dropout=None)
    return 3 * cost.forward_flops(
        models.build_model(work, num_classes=10, image_size=size, **model_args), size
    )


def peers(args: argparse.Namespace) -> None:
    print(
        "| work | contender | images/s (runs) | ours / it | epoch from a cold start "
        "| share of the matrix rate |"
    )
    print("|---|---|---|---|---|---|")
    for work in args.works or PEERS:
        num_images, skip, names = PEERS[work]
        names = [name for name in ("ours", *names) if name != "timm" or args.timm_train]
        runs: dict[str, list[dict]] = {name: [] for name in names}
        rates = []
        for _ in range(args.repeats):
            rates.append(matrix_rate())
            for name in names:
                flags = ["--num-images", num_images, "--skip", skip, "--bf16"]
                if name == "ours" and work == "vit":  # 20 epochs of 2,000 images, start-up and all
                    flags = ["--num-images", 2000, "--bf16", "--epochs", 20]
                flags += ["--timm-train", args.timm_train] if name == "timm" else []
                run = contender(name, work, args, *flags)
                if name == "ours" and work == "vit":
                    run["images_per_second"] = 20 * 2000 / run["whole"]
                runs[name].append(run)
        for name in names:
            rate = median(runs[name], "images_per_second")
            each = ", ".join(f"{run['images_per_second']:.4g}" for run in runs[name])
            ratio = "" if name == "ours" else f"{median(runs['ours'], 'images_per_second') / rate:.2f}"
            share = (
                f"{rate * training_flops(work) / statistics.median(rates):.0%}"
                if name == "ours" and work != "vit"
                else ""
            )
            epoch = f"{median(runs[name], 'epoch_after'):.1f} s for {num_images:,} images"
            epoch = (
                f"20 epochs of 2,000: {median(runs[name], 'whole'):.0f} s"
                if name == "ours" and work == "vit"
                else epoch
            )
            print(f"| {work} | {name} | {rate:.4g} ({each}) | {ratio} | {epoch} | {share} |", flush=True)


def scale(args: argparse.Namespace) -> None:
    print("| cnn_small, images | seconds of the epoch's steps | of 1x |\n|---|---|---|")
    counts, seconds = [5000, 10000, 20000, 40000], {}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(args.repeats):
            for count in counts:
                run = contender(
                    "ours", "cnn_small", args, "--num-images", count, "--skip", 0, "--bf16", cache=cache
                )
                seconds.setdefault(count, []).append(run["epoch_after"] - run["first_step_after"])
        first = statistics.median(seconds[counts[0]])
        for count in counts:
            median_seconds = statistics.median(seconds[count])
            print(f"| {count:,} | {median_seconds:.2f} | {median_seconds / first:.2f} |", flush=True)


def processes(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:
        print("| work | 1 process of 2 threads, images/s | 2 processes of 1 | ratio |\n|---|---|---|---|")
        for work, count in (("cnn_small", 20000), ("vit_scratch", 3200), ("resnet18", 480)):
            rates: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(args.repeats):
                for number in rates:
                    flags = ["--num-images", count, "--skip", 5, "--bf16", "--processes", number]
                    rates[number].append(
                        contender("ours", work, args, *flags, cache=cache)["images_per_second"]
                    )
            one, two = (statistics.median(rates[n]) for n in (1, 2))
            print(f"| {work} | {one:.4g} | {two:.4g} | {two / one:.2f} |", flush=True)


def start(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:
        seconds = [
            contender("ours", "cnn_small", args, "--num-images", 45000, "--bf16", cache=cache)[
                "first_step_after"
            ]
            for _ in range(args.repeats + 1)
        ]
    warm = statistics.median(seconds[1:])
    print(
        f"first step of cnn_small on 45,000 images: {seconds[0]:.1f} s with an empty cache, "
        f"{warm:.1f} s after that"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("peers", "scale", "processes", "start"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--timm-train",
        type=Path,
        help="train.py of a checkout of pytorch-image-models; without it timm is left out",
    )
    parser.add_argument("--works", nargs="+", choices=PEERS, help="of peers (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    teraflops = matrix_rate() / 1e12
    machine = f"{platform.machine()}, {os.cpu_count()} cores, bf16 matrix product {teraflops:.2f} TFLOP/s"
    print(f"{time.strftime('%Y-%m-%d')}, commit {commit}, {machine}")
    {"peers": peers, "scale": scale, "processes": processes, "start": start}[args.what](args)


if __name__ == "__main__":
    main()
