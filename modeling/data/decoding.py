"""From an encoded image to pixels: any mode, upright, in RGB, not larger than needed; by threads, and ahead of their use."""

import collections
import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from modeling.errors import UserError


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode, upright as its EXIF says, in 8-bit RGB; 16 bits are scaled to 8, transparency is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        image = Image.fromarray((pixels.clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise UserError("floating-point pixels have no known range: convert the image to 8 or 16 bits")
    return image.convert("RGB")


@contextlib.contextmanager
def _open(cell: dict, described_as: str) -> Iterator[Image.Image]:
    """One cell of an undecoded image column. UserError: what is done with it fails, naming the file, or `where` it stands."""
    try:
        if cell["bytes"] is None and cell["path"] is None:
            raise UserError("the image is missing")
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        path = cell["path"] or ""
        name = path if Path(path).is_file() else f"{path} in {described_as}" if path else described_as
        raise UserError(f"cannot decode image {name}: {error or type(error).__name__}") from error


def read_image(cell: dict, described_as: str) -> Image.Image:
    """Decode one cell of an undecoded image column. UserError: undecodable, naming the file, or `where` it stands."""
    with _open(cell, described_as) as image:
        return to_rgb(image)


def reduced_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """The size, or where its short side is longer than that, or its long one than three times that, a smaller one of the same shape."""
    scale = min(1.0, short_side / min(size), 3 * short_side / max(size))
    return (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def reduced(image: Image.Image, short_side: int) -> Image.Image:
    """The image at its reduced_size."""
    size = reduced_size(image.size, short_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)


def read_size(cell: dict, described_as: str) -> tuple[int, int]:
    """Width and height of one cell of an undecoded image column, upright, from the file's header. UserError: unreadable."""
    with _open(cell, described_as) as image:
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) in (
            5,
            6,
            7,
            8,
        )  # Pillow turns a TIFF
        return image.size[::-1] if turned else image.size


class Encoded:
    """The images of one split, as the dataset has them."""

    def __init__(self, dataset: datasets.Dataset, column: str, place: str):
        raw = dataset.cast_column(column, datasets.Image(decode=False))
        self.cells, self.column, self.place = raw.select_columns([column]), column, place

    def map(self, read: Callable[[dict, str], Any], rows: Iterable[int], num_workers: int) -> Iterator[Any]:
        """read(cell, where it stands) of the rows, in order, by so many threads; 0: by none."""
        rows = list(rows)
        with ThreadPoolExecutor(num_workers or 1) as pool:
            for start in range(0, len(rows), 64):
                chunk = rows[start : start + 64]
                cells = self.cells[chunk][self.column]
                yield from (pool.map if num_workers else map)(
                    read, cells, [f"row {row} of {self.place}" for row in chunk]
                )


@dataclass
class Decoder:
    """Images that are decoded by threads whenever they are wanted, for there are too many to keep."""

    images: Encoded
    num_workers: int
    short_side: int

    def take(self, rows: Iterable[int]) -> list[torch.Tensor]:
        """uint8 (3, H, W) of each row."""
        read = functools.partial(read_reduced, short_side=self.short_side)
        return [to_tensor(image) for image in self.images.map(read, rows, self.num_workers)]


def read_reduced(cell: dict, described_as: str, *, short_side: int) -> Image.Image:
    """read_image, reduced."""
    return reduced(read_image(cell, described_as), short_side)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def prefetch(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a thread up to `depth` before they are wanted."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = collections.deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
