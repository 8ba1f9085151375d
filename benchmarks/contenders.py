"""One contender of benchmarks/speed.py: train one epoch, time every step, print one JSON line.

    python benchmarks/contenders.py ours cnn_small --data FOLDER --num-images 45000
    python benchmarks/contenders.py notebook cnn_small --data FOLDER --num-images 45000
    python benchmarks/contenders.py cv_example resnet18 --data FOLDER --num-images 320 --bf16
    python benchmarks/contenders.py timm resnet18 --data FOLDER --num-images 320 --bf16 --timm-train TRAIN.PY

FOLDER has parquet files, with columns img and label, as CIFAR-10's.
TRAIN.PY is that of a checkout of pytorch-image-models.

- `ours` is train.py's own loop.
- `notebook` trains as the two notebooks do: PIL and torchvision at every access, two workers, no accelerate.
- `cv_example` follows accelerate's example of that name.
- `timm` runs TRAIN.PY.

--bf16 makes every contender but `notebook` train in bf16.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STARTED = float(os.environ.get("BENCHMARK_STARTED", time.time()))  # of this process, imports included

# work: the notebooks' image size, batch and augmentation, and what timm calls the model
WORKS = {
    "cnn_small": dict(size=32, batch=64, augment="none"),
    "vit_scratch": dict(
        size=32,
        batch=64,
        augment="none",
        timm=[
            "vit_tiny_patch16_224",
            "--model-kwargs",
            "embed_dim=128",
            "depth=6",
            "num_heads=4",
            "patch_size=4",
            "attn_drop_rate=0.1",
            "img_size=32",
        ],
    ),
    "cnn": dict(size=224, batch=32, augment="light"),
    "resnet18": dict(size=224, batch=32, augment="none", timm=["resnet18"]),
    "deit": dict(size=224, batch=32, augment="none", timm=["deit_tiny_patch16_224"]),
    "vit": dict(size=224, batch=32, augment="light"),
}


def report(stamps: list[float], batch: int, skip: int) -> None:
    """Print one line of JSON: the rate and two times, in seconds since the start of the process.

    `stamps` holds the time at which each step began, then the time at which the last one ended.
    images_per_second leaves out the first `skip` steps. first_step_after is the beginning of the first step,
    epoch_after the end of the last step.
    """
    seconds = stamps[-1] - stamps[skip]
    rate = batch * (len(stamps) - 1 - skip) / seconds
    print(
        json.dumps(
            {
                "images_per_second": rate,
                "first_step_after": stamps[0] - STARTED,
                "epoch_after": stamps[-1] - STARTED,
            }
        )
    )


def ours(work: str, args: argparse.Namespace) -> list[float]:
    """Run train.py's main() with the other contenders' settings. Only a clock is added to train_step."""
    sys.path[0] = str(ROOT)
    import train

    stamps = []
    step = train.train_step

    def timed_step(*positional, **named):
        stamps.append(time.time())
        try:
            return step(*positional, **named)
        finally:
            timed_step.ended = time.time()

    train.train_step = timed_step
    setting = WORKS[work]
    flags = (
        f"--model {work} --weights none --epochs {args.epochs} --limit-eval 100 --val-fraction 0.01".split()
    )
    # The vit keeps its default recipe, because that has the number of feature views to be measured.
    if work != "vit":
        flags += ["--recipe", "reference"]
    flags += [
        "--dataset",
        str(args.data),
        "--limit-train",
        str(args.num_images),
        "--batch-size",
        str(setting["batch"]),
    ]
    flags += [
        "--image-size",
        str(setting["size"]),
        "--augment",
        setting["augment"],
        *(["--mixed-precision", "bf16"] if args.bf16 else []),
    ]
    with tempfile.TemporaryDirectory() as own:
        sys.stdout, stdout = sys.stderr, sys.stdout
        train.main([*flags, "--output-dir", os.environ.get("BENCHMARK_OUTPUT", own)])
        sys.stdout = stdout
    return [*stamps, timed_step.ended]


def plain_model(work: str):
    """The model, as one would write it with torch, torchvision and timm."""
    import timm
    import torch
    import torchvision
    from torch import nn

    def block(inputs: int, outputs: int, norm: bool) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            *([nn.BatchNorm2d(outputs)] if norm else []),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 128, 4, stride=4)
            self.token, self.positions = (
                nn.Parameter(torch.randn(1, 1, 128)),
                nn.Parameter(torch.randn(1, 65, 128)),
            )
            self.attention = nn.ModuleList(
                nn.MultiheadAttention(128, 4, dropout=0.1, batch_first=True) for _ in range(6)
            )
            self.mlps = nn.ModuleList(
                nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)) for _ in range(6)
            )
            self.norms = nn.ModuleList(nn.LayerNorm(128) for _ in range(13))
            self.head = nn.Linear(128, 10)

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
            for number, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
                x = self.norms[2 * number](x + attention(x, x, x)[0])
                x = self.norms[2 * number + 1](x + mlp(x))
            return self.head(self.norms[12](x)[:, 0])

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0).requires_grad_(False)
            self.head = nn.Linear(192, 10)

        def forward(self, x):
            return self.head(self.backbone(x))

    if work == "cnn_small":
        head = [nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(*block(3, 32, False), *block(32, 64, False), *head)
    if work == "cnn":
        head = [
            nn.AdaptiveAvgPool2d(7),
            nn.Flatten(),
            nn.Linear(12544, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 10),
        ]
        return nn.Sequential(*block(3, 64, True), *block(64, 128, True), *block(128, 256, True), *head)
    if work == "vit_scratch":
        return ViT()
    if work == "vit":
        return Probe()
    if work == "deit":
        return timm.create_model("deit_tiny_patch16_224", num_classes=10)
    return torchvision.models.resnet18(num_classes=10)


def first_rows(args: argparse.Namespace):
    import datasets

    return datasets.load_dataset(str(args.data))["train"].select(range(args.num_images))


def plain_loader(work: str, rows, num_workers: int, shuffle: bool = True):
    """A DataLoader over rows of the dataset, as one would write it with torchvision."""
    import torch
    from torchvision import transforms as T

    size, augment = WORKS[work]["size"], WORKS[work]["augment"]
    if augment == "light":
        changes = [
            T.RandomResizedCrop(size, scale=(0.8, 1.0)),
            T.RandomHorizontalFlip(),
            T.ColorJitter(0.2, 0.2, 0.2),
        ]
    else:
        changes = [T.Resize((size, size))] if size != 32 else []
    transform = T.Compose([*changes, T.ToTensor(), T.Normalize([0.5] * 3, [0.5] * 3)])

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            row = rows[i]
            return transform(row["img"].convert("RGB")), row["label"]

    return torch.utils.data.DataLoader(
        Rows(), batch_size=WORKS[work]["batch"], shuffle=shuffle, num_workers=num_workers
    )


def notebook(work: str, args: argparse.Namespace) -> list[float]:
    import torch

    torch.manual_seed(42)
    loader, model, stamps = plain_loader(work, first_rows(args), 2), plain_model(work), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        if work == "vit"
        else torch.optim.Adam(parameters, lr=1e-3)
    )
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    running = 0.0
    for images, labels in loader:
        stamps.append(time.time())
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        running += loss.item()
    return [*stamps, time.time()]


def cv_example(work: str, args: argparse.Namespace) -> list[float]:
    import accelerate
    import torch

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16" if args.bf16 else "no")
    accelerate.utils.set_seed(42)
    loader, model, stamps = plain_loader(work, first_rows(args), 4), plain_model(work), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, epochs=1, steps_per_epoch=len(loader)
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    for images, labels in loader:
        stamps.append(time.time())
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return [*stamps, time.time()]


def timm(work: str, args: argparse.Namespace) -> list[float]:
    """Run timm's train.py. It logs the seconds of each step; the stamps are counted back from its end."""
    import datasets

    setting = WORKS[work]
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.load_dataset(str(args.data))["train"].cast_column("img", datasets.Image(decode=False))
        for split, chosen in (("train", range(args.num_images)), ("validation", range(100))):
            for i in chosen:
                path = Path(folder, split, f"{rows[i]['label']}", f"{i}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(rows[i]["img"]["bytes"])
        command = [
            sys.executable,
            str(args.timm_train),
            "--data-dir",
            folder,
            "--model",
            *setting["timm"],
            "--num-classes",
            "10",
        ]
        command += [
            "--img-size",
            str(setting["size"]),
            "-b",
            str(setting["batch"]),
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
        ]
        command += "--sched step --decay-epochs 9 --opt adamw --lr 1e-3 --no-aug -j 2 --device cpu".split()
        command += f"--log-interval 1 --output {folder}/out".split()
        command += ["--amp", "--amp-dtype", "bfloat16", "--channels-last"] if args.bf16 else []
        began = time.time()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(args.timm_train.parent)},
        )
    steps = [float(text) for text in re.findall(r"Time: ([\d.]+)s,", done.stdout + done.stderr)]
    if done.returncode or not steps:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    stamps = [time.time()]
    for seconds in reversed(steps):
        stamps.insert(0, stamps[0] - seconds)
    return [stamp - began + STARTED for stamp in stamps]  # the folder was not there by itself for the others


CONTENDERS = {"ours": ours, "notebook": notebook, "cv_example": cv_example, "timm": timm}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-images", type=int, required=True)
    parser.add_argument(
        "--skip", type=int, default=2, help="first steps that the rate leaves out (default: 2)"
    )
    parser.add_argument("--epochs", type=int, default=1, help="ours only (default: 1)")
    parser.add_argument("--bf16", action="store_true", help="ours, cv_example and timm")
    parser.add_argument("--timm-train", type=Path, help="train.py of a checkout of pytorch-image-models")
    parser.add_argument(
        "--processes", type=int, default=1, help="ours only: so many, of one thread each if more than one"
    )
    args = parser.parse_args()
    if args.processes > 1:
        again = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given(args)]
        launch = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(args.processes),
            __file__,
            args.contender,
            args.work,
        ]
        with tempfile.TemporaryDirectory() as shared:
            env = {**os.environ, "OMP_NUM_THREADS": "1", "BENCHMARK_OUTPUT": shared}
            sys.exit(subprocess.run([sys.executable, *launch, *again], env=env).returncode)
    stamps = CONTENDERS[args.contender](args.work, args)
    if os.environ.get("RANK", "0") == "0":
        report(stamps, WORKS[args.work]["batch"], args.skip)


def given(args: argparse.Namespace) -> list[tuple[str, object]]:
    """The flags to repeat for each process."""
    left_out = ("contender", "work", "processes")
    return [
        (name.replace("_", "-"), value)
        for name, value in vars(args).items()
        if name not in left_out and value
    ]


if __name__ == "__main__":
    main()
