"""Which images a run uses, and where their pixels are."""

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeling.data import decoding, store
from modeling.data.sources import Source

KEEP_SHORT_SIDE = 256  # pixels; larger images are shrunk to this, unless the model needs more
IN_MEMORY = 10**9  # bytes; a larger part of a split goes to the store
FINGERPRINT_BYTES = 10**9  # a fingerprint reads about this many bytes of pixels


@dataclass
class Images:
    """Images of one split. Image i is pixels[pixel_index[i]].

    pixels: uint8 (M, 3, H, W), a list of uint8 (3, H_i, W_i), or a Decoder that decodes an image at each use.
    pixel_index, labels and rows (N,) int64; sizes (N, 2) int64, height and width. rows, sorted, are the
    rows in the dataset's split; the augmentation of an image depends on its row. origin is the fingerprint
    that `datasets` gives the split. digest is the result of fingerprint(), or None before its first call.
    """

    pixels: store.Pixels | decoding.Decoder
    pixel_index: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    classes: list[str]
    origin: str = ""
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, positions: torch.Tensor) -> "Images":
        """The images at `positions` (M,), in that order. They share the pixels."""
        return dataclasses.replace(
            self,
            pixel_index=self.pixel_index[positions],
            sizes=self.sizes[positions],
            labels=self.labels[positions],
            rows=self.rows[positions],
            digest=None,
        )

    def gather(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give images uint8 (B, 3, H, W), padded with zeros right and below, and sizes (B, 2)."""
        sizes, pixel_index = self.sizes[positions], self.pixel_index[positions]
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[pixel_index], sizes
        height, width = sizes.amax(dim=0).tolist()
        out = torch.zeros(len(positions), 3, height, width, dtype=torch.uint8)
        for canvas, image in zip(out, self._pixels_of(pixel_index), strict=True):
            canvas[:, : image.shape[1], : image.shape[2]] = image
        return out, sizes

    def _pixels_of(self, pixel_index: torch.Tensor) -> Iterable[torch.Tensor]:
        indices = pixel_index.tolist()
        return (
            self.pixels.take(indices)
            if isinstance(self.pixels, decoding.Decoder)
            else (self.pixels[index] for index in indices)
        )

    def fingerprint(self) -> str:
        """Give the SHA-256 of sizes, labels and about FINGERPRINT_BYTES of pixels at most."""
        if self.digest is None:
            every = -(-3 * int(self.sizes.prod(dim=1).sum()) // FINGERPRINT_BYTES)
            digest = hashlib.sha256(self.sizes.numpy().tobytes() + self.labels.numpy().tobytes())
            for part in self.pixel_index[::every].split(1024):
                for image in self._pixels_of(part):
                    digest.update(image.numpy())
            self.digest = digest.hexdigest()
        return self.digest


def decode(
    source: Source,
    split: str,
    rows: torch.Tensor,
    *,
    image_size: int | None,
    num_workers: int,
    store_limit: float = math.inf,
    progress=None,
) -> Images:
    """Give the images in `rows` of a split of the dataset, ready to be used.

    The split's store serves more than half of a split, or more than IN_MEMORY bytes. It is built if it does
    not exist. Fewer images, and images of a dataset that is in memory, are decoded into memory. A store of
    more than store_limit bytes is not built: its images are decoded each time they are used. Large images
    are shrunk to a short side of KEEP_SHORT_SIDE, or 8/7 of image_size if that is more, and a long side of
    three times that. progress(total, description) gives a context with update(n). UserError: an image
    cannot be decoded.
    """
    keep = max(KEEP_SHORT_SIDE, (image_size or 0) * 8 // 7)
    encoded, num_images = source.encoded(split), len(source.splits[split])

    def read(
        how: Callable, wanted: Sequence[int], description: str = "decoding", **options: bool
    ) -> Iterator[Any]:
        with progress(len(wanted), description, **options) if progress else contextlib.nullcontext() as bar:
            for result in encoded.map(how, wanted, num_workers):
                yield result
                if bar:
                    bar.update(1)

    def kept_size(cell: dict, described_as: str) -> tuple[int, int]:
        return decoding.reduced_size(decoding.read_size(cell, described_as), keep)[::-1]

    read_image = functools.partial(decoding.read_reduced, short_side=keep)
    path = store.store_path(source.splits[split], source.image_column, keep)
    is_stored, image_bytes = path is not None and path.exists(), 0.0
    if path and not is_stored:
        sample = rows[:: -(-len(rows) // 256)].tolist()
        image_bytes = (
            3 * sum(math.prod(size) for size in encoded.map(kept_size, sample, num_workers)) / len(sample)
        )
    if path is None or not (is_stored or 2 * len(rows) > num_images or image_bytes * len(rows) > IN_MEMORY):
        pixels, pixel_index = store.collect(read(read_image, rows.tolist())), torch.arange(len(rows))
    elif is_stored or image_bytes * num_images <= store_limit:
        store.build(path, read(read_image, range(num_images), everywhere=True))
        pixels, pixel_index = store.read(path), rows
    else:
        pixels, pixel_index = decoding.Decoder(encoded, num_workers, keep), rows
        print(
            f"Split {split}, {image_bytes * num_images / 1e9:.3g} GB decoded, is above --store-limit: "
            "decoded as it is used",
            flush=True,
        )
    if isinstance(pixels, torch.Tensor):
        sizes = torch.tensor(pixels.shape[2:]).expand(len(rows), 2)
    elif isinstance(pixels, list):
        sizes = torch.tensor([pixels[index].shape[1:] for index in pixel_index.tolist()])
    else:
        sizes = torch.tensor(list(read(kept_size, rows.tolist(), "reading sizes")))
    return Images(
        pixels,
        pixel_index,
        sizes,
        source.labels(split)[rows],
        rows,
        source.classes,
        source.splits[split]._fingerprint,
    )


def native_size(images: Images) -> int:
    """Give the side of the images in pixels, at most 224; 224 if they are not equal squares."""
    side = int(images.sizes[0, 0])
    return min(side, 224) if bool((images.sizes == side).all()) else 224
