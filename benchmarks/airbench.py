"""cnn_fast beside airbench94_muon, the speed record on CIFAR-10, on this CPU, in turn.

    git clone https://github.com/KellerJordan/cifar10-airbench
    python benchmarks/airbench.py --airbench cifar10-airbench/airbench94_muon.py --data FOLDER --runs 2

FOLDER is a copy of CIFAR-10, as train.py takes it as --dataset. airbench is changed in a few places only: CPU
for GPU, bfloat16 for half, no compilation, and the images of FOLDER. It keeps freed memory as train.py does,
which makes it faster. Both train on the training images
(cnn_fast on all but 100, which it validates on) and are judged on the test images, without test-time
augmentation. Decoding and the final test do not count as time. airbench's time is its own timer's: steps and
whitening. The time of cnn_fast is train.py's clock, which also counts checkpoints, logs and validation.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modeling.data.images import decode  # noqa: E402
from modeling.data.sources import Choices, load_source  # noqa: E402
from modeling.run.checkpoint import read_header  # noqa: E402

VAL_FRACTION = 0.002  # 100 images
KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647"
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


def run_airbench(script: Path, folder: Path) -> tuple[float, float]:
    """Return test accuracy and seconds of one run."""
    code = script.read_text()
    for old, new in CHANGES:
        if old not in code:
            raise SystemExit(f"{script} is another version: it has no {old!r}")
        code = code.replace(old, new)
    (folder / "ported.py").write_text(code)
    environment = os.environ | {"GLIBC_TUNABLES": KEEP_MEMORY}
    command = [sys.executable, "-u", "ported.py"]
    rows = []
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--airbench", type=Path, help="airbench94_muon.py (default: run cnn_fast alone)")
    parser.add_argument("--data", type=Path, required=True, help="a copy of CIFAR-10")
    parser.add_argument("--runs", type=int, default=1, help="runs of each model (default: 1)")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: further flags of train.py")
    args = parser.parse_args(argv)
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
