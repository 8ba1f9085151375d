"""Time the loader alone, from stored images to normalised batches, and torchvision's per-item pipeline.

    python benchmarks/loader.py --data FOLDER [--repeats 5]

FOLDER is what train.py takes as --dataset. Both use the same number of cores.
torchvision gets decoded images and one worker process per core.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modeling.data.augment import Draws, augment, padded_crop
from modeling.data.batches import Batch, training_steps
from modeling.data.images import Images, decode
from modeling.data.resize import Preprocessing, normalize, resize
from modeling.data.sources import load_source
from modeling.run.launch import keep_freed_memory, num_cores

HALF = (0.5, 0.5, 0.5)


class Items(torch.utils.data.Dataset):
    def __init__(self, images: list, transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.images[i])


def flip_and_padded_crop(batch: Batch, prep: Preprocessing) -> torch.Tensor:
    draws = Draws(42, 0, batch.indices)
    flipped = resize(batch.images, batch.sizes, prep, flip=draws(0) < 0.5)
    return normalize(padded_crop(flipped, draws), prep)


def light(batch: Batch, prep: Preprocessing) -> torch.Tensor:
    return augment(batch.images, batch.sizes, prep, name="light", seed=42, epoch=0, indices=batch.indices)


def ours(images: Images, change, size: int, batch_size: int) -> float:
    prep, count, started = Preprocessing(size, HALF, HALF), 0, time.perf_counter()
    for (batch,) in training_steps(images, seed=42, epoch=0, batch_size=batch_size):
        count += len(change(batch, prep))
    return count / (time.perf_counter() - started)


def torchvisions(images: list, changes: list, batch_size: int) -> float:
    transform = T.Compose([*changes, T.ToTensor(), T.Normalize(HALF, HALF)])
    loader = iter(
        torch.utils.data.DataLoader(Items(images, transform), batch_size=batch_size, num_workers=num_cores())
    )
    for _ in range(2 * num_cores()):
        next(loader)
    started = time.perf_counter()
    count = sum(len(batch) for batch in loader)
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(num_cores())
    source = load_source(args.data)
    rows = torch.arange(len(source.splits["train"]))[:2048]
    images = decode(source, "train", rows, image_size=224, num_workers=num_cores())
    images.pixel_index, images.sizes, images.labels, images.rows = (
        part.repeat(-(-2048 // len(rows)), *[1] * (part.dim() - 1))[:2048]
        for part in (images.pixel_index, images.sizes, images.labels, images.rows)
    )
    pictures = [T.functional.to_pil_image(images.gather(torch.tensor([i]))[0][0]) for i in range(2048)]
    side, padding = int(images.sizes[0, 0]), int(images.sizes[0, 0]) // 8
    works = {
        f"flip, padded crop, {side} px, batch 64": (
            lambda: ours(images, flip_and_padded_crop, side, 64),
            lambda: torchvisions(
                pictures, [T.RandomHorizontalFlip(), T.RandomCrop(side, padding=padding)], 64
            ),
        ),
        "RandomResizedCrop to 224 px, flip, jitter, batch 32": (
            lambda: ours(images, light, 224, 32),
            lambda: torchvisions(
                pictures,
                [
                    T.RandomResizedCrop(224, scale=(0.8, 1.0)),
                    T.RandomHorizontalFlip(),
                    T.ColorJitter(0.2, 0.2, 0.2),
                ],
                32,
            ),
        ),
    }
    print("| work | ours, images/s | torchvision's | ratio |\n|---|---|---|---|")
    for name, both in works.items():
        rates = [[run() for run in both] for _ in range(args.repeats)]
        mine, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
        print(f"| {name} | {mine:,.0f} | {theirs:,.0f} | {mine / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
