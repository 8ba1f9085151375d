"""Decode images of any mode into upright RGB pixels, in threads and ahead of their use."""

import collections
import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from modeling.data.folders import raster_formats
from modeling.errors import UserError


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to upright 8-bit RGB. Scale 16 bits to 8; drop transparency.

    UserError: the pixels are floating-point numbers.
    """
    image = _upright(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        image = Image.fromarray((pixels.clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise UserError("floating-point pixels have no known range: convert the image to 8 or 16 bits")
    return image.convert("RGB")


_warned_of_12_bits: list[str] = []  # the image that was warned about

# What an EXIF orientation asks for, to turn the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8. EXIF that cannot be read is 1: the pixels are used as stored."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's parser raises nearly anything on broken EXIF
        return 1
    return orientation if orientation in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says. Pillow has already turned a TIFF when it loads it."""
    image.load()
    orientation = _orientation(image)
    return image.transpose(_TURNS[orientation]) if orientation != 1 else image


@contextlib.contextmanager
def _open(cell: dict, described_as: str) -> Iterator[Image.Image]:
    """Open one cell of an undecoded image column.

    UserError: the cell cannot be opened, or the block that uses it fails. The message names the file if
    there is one, else the cell as it is `described_as`, for example "row 7 of split train of NAME".
    """
    try:
        if cell["bytes"] is None and cell["path"] is None:
            raise UserError("the image is missing")
        file = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        # Only raster formats: Pillow would run Ghostscript on an EPS file, whatever its name.
        with Image.open(file, formats=raster_formats()) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        path = cell["path"] or ""
        name = path if Path(path).is_file() else f"{path} in {described_as}" if path else described_as
        raise UserError(f"cannot decode image {name}: {error or type(error).__name__}") from error


def read_image(cell: dict, described_as: str) -> Image.Image:
    """Decode one cell of an undecoded image column. UserError: it cannot be decoded (see _open)."""
    with _open(cell, described_as) as image:
        if image.mode.startswith("I"):
            _warn_of_12_bits(image, cell["path"] or described_as)
        return to_rgb(image)


def _warn_of_12_bits(image: Image.Image, name: str) -> None:
    """Say once that 16-bit pixels which fill at most 12 bits will look nearly black."""
    brightest = int(np.asarray(image).max())
    if 0 < brightest < 4096 and not _warned_of_12_bits:
        _warned_of_12_bits.append(name)
        print(
            f"The 16-bit image {name} has no value above {brightest}, as data of fewer bits: it will look "
            "nearly black. Scale such images to 16 bits first.",
            flush=True,
        )


def reduced_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Shrink (width, height): short side at most `short_side`, long side at most three times that.

    Keep the shape. Never enlarge.
    """
    scale = min(1.0, short_side / min(size), 3 * short_side / max(size))
    return (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def reduced(image: Image.Image, short_side: int) -> Image.Image:
    """Shrink an image to its reduced_size."""
    size = reduced_size(image.size, short_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3)


def read_size(cell: dict, described_as: str) -> tuple[int, int]:
    """Read width and height of an upright image from its file's header. UserError: unreadable."""
    with _open(cell, described_as) as image:
        # Orientations 5 to 8 swap width and height. Pillow has already turned a TIFF when it opens it.
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


@dataclass
class Encoded:
    """The encoded images of one split. cells(rows) gives {"bytes", "path"} of each row, one of them None.

    `place` names the split in error messages.
    """

    cells: Callable[[Sequence[int]], list[dict[str, Any]]]
    place: str

    def map(self, read: Callable[[dict, str], Any], rows: Iterable[int], num_workers: int) -> Iterator[Any]:
        """Yield read(cell, described_as) of each row, in order, with num_workers threads (0: none)."""
        rows = list(rows)
        with ThreadPoolExecutor(num_workers or 1) as pool:
            for start in range(0, len(rows), 64):
                chunk = rows[start : start + 64]
                described = [f"row {row} of {self.place}" for row in chunk]
                yield from (pool.map if num_workers else map)(read, self.cells(chunk), described)


@dataclass
class Decoder:
    """Images that are decoded each time they are used, because there are too many to keep."""

    images: Encoded
    num_workers: int
    short_side: int

    def take(self, rows: Iterable[int]) -> list[torch.Tensor]:
        """Decode rows to uint8 tensors (3, H_i, W_i)."""
        read = functools.partial(read_reduced, short_side=self.short_side)
        return [to_tensor(image) for image in self.images.map(read, rows, self.num_workers)]


def read_reduced(cell: dict, described_as: str, *, short_side: int) -> Image.Image:
    """Decode an image and shrink it to `short_side`."""
    return reduced(read_image(cell, described_as), short_side)


def kept_size(cell: dict, described_as: str, *, short_side: int) -> tuple[int, int]:
    """Read height and width that an image will have when it is shrunk to `short_side`."""
    width, height = reduced_size(read_size(cell, described_as), short_side)
    return height, width


def none_if_bad(read: Callable, cell: dict, described_as: str) -> Image.Image | None:
    """Decode an image by `read`, or give None if it cannot be decoded."""
    try:
        return read(cell, described_as)
    except UserError:
        return None


def size_if_good(read_or_none: Callable, cell: dict, described_as: str) -> tuple[int, int]:
    """Give height and width of an image that can be decoded, else (0, 0)."""
    image = read_or_none(cell, described_as)
    return (image.height, image.width) if image is not None else (0, 0)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turn an RGB image into a uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def prefetch(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """Yield the same items. A thread makes up to `depth` of them before they are asked for."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = collections.deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
