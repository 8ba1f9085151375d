"""Which images a run uses, and where their pixels are."""

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from modeling.data import decoding, store
from modeling.data.sources import Source
from modeling.errors import UserError

KEEP_SHORT_SIDE = 256  # pixels; larger images are shrunk to this, unless the model needs more
IN_MEMORY = 10**9  # bytes; a larger part of a split goes to the store
COMPARED_BYTES = 4 * 10**9  # duplicates are looked for among fewer bytes of pixels than this
FINGERPRINT_BYTES = 10**9  # a fingerprint reads about this many bytes of pixels


@dataclass
class Images:
    """Images of one split. Image i is pixels[pixel_index[i]].

    pixels: uint8 (M, 3, H, W), a list of uint8 (3, H_i, W_i), or a Decoder that decodes an image at each use.
    pixel_index, labels and rows (N,) int64; sizes (N, 2) int64, height and width. rows, sorted, are the
    rows in the dataset's split; the augmentation of an image depends on its row. origin changes when a file
    of the split changes. skipped names the images that could not be decoded. files[row] is the file of a row,
    None where it has none. digest is the result of fingerprint(), or None before its first call.
    """

    pixels: store.Pixels | decoding.Decoder
    pixel_index: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    classes: list[str]
    origin: str = ""
    skipped: list[str] = field(default_factory=list)
    files: Sequence[str | None] = ()
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

    def file_of(self, row: int) -> str:
        """Give the file of a row of the dataset's split, "" where it has none."""
        return (self.files[row] or "") if self.files else ""

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

    def pixel_digests(self) -> Iterator[bytes]:
        """Yield a digest of each image's size and pixels."""
        for part in self.pixel_index.split(1024):
            for image in self._pixels_of(part):
                height, width = image.shape[1:]
                shape = height.to_bytes(4, "little") + width.to_bytes(4, "little")
                yield hashlib.blake2b(image.contiguous().numpy(), key=shape, digest_size=16).digest()

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
    skip_bad_images: bool = False,
    progress=None,
) -> Images:
    """Give the images in `rows` of a split of the dataset, ready to be used.

    The split's store serves more than half of a split, or more than IN_MEMORY bytes. It is built if it does
    not exist. Fewer images, and images of a dataset that is in memory, are decoded into memory. A store of
    more than store_limit bytes is not built: its images are decoded each time they are used. Large images
    are shrunk to a short side of KEEP_SHORT_SIDE, or 8/7 of image_size if that is more, and a long side of
    three times that. progress(total, description, everywhere=...) gives a context with update(n).

    UserError: an image cannot be decoded. With skip_bad_images such images are left out instead; they are
    listed in Images.skipped.
    """
    keep = max(KEEP_SHORT_SIDE, (image_size or 0) * 8 // 7)
    encoded, num_images = source.encoded(split), len(source.splits[split])

    def read(
        how: Callable, wanted: Sequence[int], description: str = "decoding", everywhere: bool = False
    ) -> Iterator[Any]:
        shown = progress(len(wanted), description, everywhere=everywhere) if progress else None
        with shown or contextlib.nullcontext() as bar:
            for result in encoded.map(how, wanted, num_workers):
                yield result
                if bar:
                    bar.update(1)

    read_image: Callable = functools.partial(decoding.read_reduced, short_side=keep)
    read_size: Callable = functools.partial(decoding.kept_size, short_side=keep)
    if skip_bad_images:
        read_image = functools.partial(decoding.none_if_bad, read_image)
        # Only decoding shows whether an image is whole.
        read_size = functools.partial(decoding.size_if_good, read_image)
    path = store.store_path(source.splits[split].fingerprint, keep)
    is_stored, image_bytes = path is not None and path.exists(), 0.0
    if path and not is_stored:
        sample = rows[:: -(-len(rows) // 256)].tolist()
        num_pixels = [math.prod(size) for size in encoded.map(read_size, sample, num_workers)]
        image_bytes = 3 * sum(num_pixels) / len(sample)
    if path is None or not (is_stored or 2 * len(rows) > num_images or image_bytes * len(rows) > IN_MEMORY):
        found = list(read(read_image, rows.tolist()))
        is_good = torch.tensor([image is not None for image in found])
        pixels = store.collect(image for image in found if image is not None)
        pixel_index = is_good.cumsum(0) - 1
        sizes = torch.zeros(len(rows), 2, dtype=torch.int64)
        sizes[is_good] = _sizes_of(pixels)
    elif is_stored or image_bytes * num_images <= store_limit:
        store.build(path, read(read_image, range(num_images), everywhere=True))
        pixels, pixel_index = store.read(path), rows
        sizes = _sizes_of(pixels)[rows]
        is_good = sizes[:, 0] > 0
    else:
        print(
            f"Split {split}, {image_bytes * num_images / 1e9:.3g} GB decoded, is above --store-limit: "
            "decoded as it is used",
            flush=True,
        )
        pixels, pixel_index = decoding.Decoder(encoded, num_workers, keep), rows
        sizes = torch.tensor(list(read(read_size, rows.tolist(), "reading sizes")))
        is_good = sizes[:, 0] > 0
    bad = rows[~is_good].tolist()
    if bad and not skip_bad_images:  # a store that was built with --skip-bad-images
        list(encoded.map(read_image, bad[:1], 0))
    if len(bad) == len(rows):
        raise UserError(f"no image of split {split} of {source.name} can be decoded")
    names = source.splits[split].files
    return Images(
        pixels=pixels,
        pixel_index=pixel_index[is_good],
        sizes=sizes[is_good],
        labels=source.labels(split)[rows[is_good]],
        rows=rows[is_good],
        classes=source.classes,
        origin=source.splits[split].fingerprint or "",
        files=names,
        skipped=[names[row] or f"row {row} of split {split}" for row in bad],
    )


def _sizes_of(pixels: store.Pixels) -> torch.Tensor:
    """Give height and width of each image, (N, 2) int64."""
    if isinstance(pixels, torch.Tensor):
        return torch.tensor(pixels.shape[2:]).expand(len(pixels), 2)
    return torch.tensor([image.shape[1:] for image in pixels], dtype=torch.int64).view(-1, 2)


def count_duplicates(images: dict[str, Images]) -> dict[str, int]:
    """Count for each other split the images whose pixels are also in "train".

    Nothing is counted if there are too many pixels to compare, or if they are decoded at each use.
    """
    num_bytes = 3 * sum(int(each.sizes.prod(dim=1).sum()) for each in images.values())
    is_decoded = any(isinstance(each.pixels, decoding.Decoder) for each in images.values())
    if is_decoded or num_bytes > COMPARED_BYTES or len(images) == 1:
        return {}
    in_train = set(images["train"].pixel_digests())
    return {
        split: sum(digest in in_train for digest in each.pixel_digests())
        for split, each in images.items()
        if split != "train"
    }


def native_size(sizes: torch.Tensor) -> int:
    """Give the input side in pixels, 4 to 224, for images of these sizes (N, 2).

    It is the side of equal squares. Otherwise it is the median of the shorter sides, rounded down to a
    multiple of 16, below 64 pixels of 4.
    """
    shorter = sizes.amin(dim=1)
    side = int(shorter.median())
    if not bool((sizes == side).all()):
        side = max(side // 16 * 16 if side >= 64 else side // 4 * 4, 4)
    return min(side, 224)
