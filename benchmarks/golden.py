"""Prove that a refactoring changes no result: short runs give the same hashes before and after it.

    python benchmarks/golden.py --checkout ../old --write hashes.json    # before the change
    python benchmarks/golden.py --check hashes.json                      # after it, on the same machine

Each configuration is a command of the checkout. It runs in a folder and a cache of its own.
The hashes cover all tensors of the checkpoints, metrics.jsonl and the figures of evaluate.py.
They do not cover the checkpoints' headers, because these may gain fields.
Takes about three minutes on one core.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DIGITS = "--dataset digits --seed 7 --recipe reference".split()  # tuned recipes may change
SMALL = [*DIGITS, "--limit-train", "96", "--limit-eval", "64", "--batch-size", "24"]
BACKBONE = [*SMALL, "--weights", "none", "--image-size", "64", "--max-steps", "5"]
TWO_PROCESSES = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/multi_cpu.yaml"]

# name: the commands that are run one after the other in the same folder
CONFIGURATIONS: dict[str, list[list[str]]] = {
    "cnn, light": [["train.py", "--model", "cnn", *SMALL, "--augment", "light", "--epochs", "2"]],
    "cnn_small, whole digits": [["train.py", "--model", "cnn_small", *DIGITS, "--epochs", "2"]],
    "cnn_small, EMA, clipping, smoothing, standard": [
        [
            "train.py",
            "--model",
            "cnn_small",
            *SMALL,
            "--augment",
            "standard",
            "--ema",
            "0.9",
            "--clip-grad",
            "1",
        ]
        + ["--label-smoothing", "0.1", "--warmup-epochs", "1", "--epochs", "3", "--optimizer", "adamw"]
    ],
    "cnn_small, mixup and cutmix, accumulation": [
        ["train.py", "--model", "cnn_small", *SMALL, "--mixup", "0.2", "--cutmix", "1", "--epochs", "2"]
        + [
            "--gradient-accumulation-steps",
            "3",
            "--optimizer",
            "sgd",
            "--lr",
            "0.01",
            "--augment",
            "randaugment",
        ]
    ],
    "vit_scratch, bf16": [
        ["train.py", "--model", "vit_scratch", *SMALL, "--mixed-precision", "bf16", "--epochs", "2"]
    ],
    "vit_scratch, 128 px, reference": [
        [
            "train.py",
            "--model",
            "vit_scratch",
            *SMALL,
            "--image-size",
            "128",
            "--max-steps",
            "4",
        ]
    ],
    "resnet18": [["train.py", "--model", "resnet18", *BACKBONE]],
    "deit": [["train.py", "--model", "deit", *BACKBONE]],
    "timm/resnet10t": [["train.py", "--model", "timm/resnet10t", *BACKBONE]],
    "vit, cached features": [
        [
            "train.py",
            "--model",
            "vit",
            *BACKBONE,
            "--epochs",
            "3",
            "--max-steps",
            "12",
            "--feature-views",
            "2",
        ],
        [
            "train.py",
            "--model",
            "vit",
            *BACKBONE,
            "--epochs",
            "3",
            "--max-steps",
            "12",
            "--feature-views",
            "2",
        ]
        + ["--run-name", "again", "--lr", "0.02"],
    ],
    "vit, a view an epoch": [
        ["train.py", "--model", "vit", *BACKBONE, "--max-steps", "10", "--feature-views", "0"]
    ],
    "vit_scratch, resumed": [
        [
            "train.py",
            "--model",
            "vit_scratch",
            *SMALL,
            "--epochs",
            "2",
            "--max-steps",
            "6",
            "--checkpoint-every",
            "3",
        ],
        [
            "train.py",
            "--model",
            "vit_scratch",
            *SMALL,
            "--epochs",
            "3",
            "--resume",
            "--force",
            "--max-steps",
            "11",
        ],
    ],
    "cnn_small, two processes": [
        [*TWO_PROCESSES, "train.py", "--model", "cnn_small", *SMALL, "--epochs", "2", "--batch-size", "25"]
    ],
    "a folder of several sizes, evaluated": [
        ["train.py", "--model", "cnn_small", "--recipe", "reference", "--dataset", "FOLDER"]
        + ["--epochs", "2", "--batch-size", "8"],
        ["evaluate.py", "--ckpt", "checkpoints/cnn_small_best.safetensors", "--split", "test"],
    ],
}


def make_image_folder(folder: Path) -> None:
    """Write train/ and test/ with two classes of images of several sizes, from a fixed seed."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 8)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = generator.integers(20, 60, size=2)
                pixels = generator.integers(0, 128, size=(height, width, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")


def hash_tensors(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(safetensors.torch.load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_csv(path: Path) -> str:
    """The numbers of a CSV, whatever its columns are called; paths are left out."""
    digest = hashlib.sha256()
    with path.open(newline="") as file:
        for row in list(csv.reader(file))[1:]:
            for cell in row:
                try:
                    digest.update(f"{float(cell):.5g} ".encode())
                except ValueError:
                    continue
    return digest.hexdigest()


def run_configuration(commands: list[list[str]], checkout: Path) -> dict[str, str]:
    """Run the commands in the checkout, and return the hash of each file that they wrote."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_image_folder(folder / "images")
        environment = os.environ | {
            "HF_HOME": str(folder / "hub"),
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        output_dir = folder / "out"
        for command in commands:
            command = [word.replace("FOLDER", str(folder / "images")) for word in command]
            command = [
                str(output_dir / word) if word.startswith("checkpoints/") else word for word in command
            ]
            command = [sys.executable, *command, "--num-threads", "1", "--output-dir", str(output_dir)]
            result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{' '.join(command)}\nended with {result.returncode}:\n{result.stderr[-2000:]}")
        hashes = {
            path.name: hash_tensors(path) for path in (output_dir / "checkpoints").glob("*.safetensors")
        }
        for path in (output_dir / "runs").glob("*/metrics.jsonl"):
            hashes[f"{path.parent.name} metrics.jsonl"] = hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (output_dir / "traces").glob("*.csv"):
            if path.name == "metrics.csv" or path.name.startswith("predictions_"):
                hashes["metrics.csv" if path.name == "metrics.csv" else "predictions"] = hash_csv(path)
        return dict(sorted(hashes.items()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkout", type=Path, default=ROOT, help="the checkout whose scripts are run (default: this one)"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the hashes to this file")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare the hashes with those of this file"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these configurations")
    args = parser.parse_args()
    expected = json.loads(args.check.read_text()) if args.check else {}
    found: dict[str, dict[str, str]] = {}
    num_different = 0
    names = args.only or list(CONFIGURATIONS)
    for number, name in enumerate(names, start=1):
        start = time.monotonic()
        found[name] = run_configuration(CONFIGURATIONS[name], args.checkout.resolve())
        verdict = ""
        if args.check:
            same = found[name] == expected.get(name)
            num_different += not same
            verdict = "equal" if same else f"DIFFERENT: {found[name]} where {expected.get(name)} was expected"
        print(f"{number}/{len(names)} {name}: {time.monotonic() - start:.0f} s {verdict}", flush=True)
    if args.write:
        args.write.write_text(json.dumps(found, indent=1) + "\n")
    if args.check:
        print(f"{len(names) - num_different} of {len(names)} configurations have the same hashes")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
