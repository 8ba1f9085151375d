"""A dataset's name or folder -> splits -> images in memory -> batches.

Images are decoded once, before training, into uint8 tensors; what is random about a batch is a pure function of seed, epoch and
step (modeling/randomness.py).
"""

import contextlib
import errno
import functools
import glob
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from modeling import decoding, randomness, store
from modeling.hub import download

HUB_NAMES = {"stl10": "tanganke/stl10", "cifar10": "uoft-cs/cifar10"}
PROMISES = {  # classes and side of what these repositories hold, in splits train and test
    HUB_NAMES["stl10"]: ("airplane bird car cat deer dog horse monkey ship truck".split(), 96),
    HUB_NAMES["cifar10"]: ("airplane automobile bird cat deer dog frog horse ship truck".split(), 32),
}
SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train", "testing": "test"}
KEEP_SHORT_SIDE = 256  # images larger than this, and than the model needs, are kept smaller
IN_MEMORY = 10**9  # bytes of a part of a split that are decoded into memory
FINGERPRINT_BYTES = 10**9  # of pixels that a fingerprint reads


def is_stl10(dataset: str) -> bool:
    return dataset.partition("@")[0] in ("stl10", HUB_NAMES["stl10"])


def default_val_fraction(dataset: str) -> float:
    """The share of train that becomes validation where a dataset has none: 0.2 on STL-10, else 0.1."""
    return 0.2 if is_stl10(dataset) else 0.1


@dataclass
class Source:
    """A dataset before decoding: its splits as `datasets` has them, its classes and columns, and the hub commit it came from."""

    name: str
    revision: str | None
    classes: list[str]
    splits: dict[str, datasets.Dataset]
    image_column: str
    label_column: str

    def labels(self, split: str) -> torch.Tensor:
        """The class number of every row, (N,) int64. ValueError: a row without a label."""
        column = self.splits[split].data.column(self.label_column)  # whole splits as loaded: no row has been moved
        labels = torch.tensor(column.fill_null(-1).to_pylist(), dtype=torch.int64)
        if (labels < 0).any():
            raise ValueError(f"{self.name}: row {int((labels < 0).nonzero()[0])} of split {split} has no label")
        return labels

    def encoded(self, split: str) -> decoding.Encoded:
        """The images of a split as they are stored."""
        return decoding.Encoded(self.splits[split], self.image_column, f"split {split} of {self.name}")


def digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 digits as 32x32 RGB, divided 80/20 into train and test by a fixed stratified seed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = torch.from_numpy(raw.target)
    grey = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in raw.images]
    images = [image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in grey]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(d) for d in range(10)])})
    test = stratified(labels, round(0.2 * len(labels)), 0, randomness.SPLIT)
    is_test = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, test, True)
    rows = {"train": (~is_test).nonzero()[:, 0].tolist(), "test": test.tolist()}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"image": [images[i] for i in r], "label": raw.target[r]}, features=features)
            for split, r in rows.items()
        }
    )


def load_source(name: str) -> Source:
    """Load `digits`, `stl10`, `cifar10`, a local folder (parquet or ImageFolder), or a hub id.

    Columns and classes are taken from the dataset's features. ValueError: nothing there, no network, no images, no classes.
    """
    if name == "digits":
        return _describe(name, digits(), revision=None)
    path = Path(name).expanduser()
    if path.is_dir() and name not in HUB_NAMES:
        return _describe(str(path.resolve()), _load(name, _load_folder, path.resolve()), revision=None)
    hub_id, at, revision = name.partition("@")
    hub_id = HUB_NAMES.get(hub_id, hub_id)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", hub_id) or bool(at) != bool(revision):
        raise ValueError(
            f"no dataset {name!r}: give stl10, cifar10, digits, a hub id such as owner/name or owner/name@revision, or a folder that exists"
        )
    folder = download(hub_id, repo_type="dataset", revision=revision or None)
    source = _describe(hub_id, _load(hub_id, datasets.load_dataset, folder), revision=folder.name)
    if hub_id in PROMISES:
        _check_promise(source, *PROMISES[hub_id])
    return source


def _load(name: str, loader, folder: Path) -> datasets.DatasetDict:
    """What `loader` makes of a folder, as a DatasetDict. ValueError: nothing that `datasets` can read."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return loader(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        detail = f"{error.__cause__ or error or type(error).__name__}".strip().split("\n")[0]
        raise ValueError(f"no dataset could be read from {name}: {detail}; it needs one folder per class, or parquet files") from error


def _check_promise(source: Source, classes: list[str], side: int) -> None:
    """ValueError: the repository that an alias names holds something else than the dataset of that name."""
    (size,) = source.encoded(next(iter(source.splits))).map(decoding.read_size, [0], 0)
    for what, found, promised in (
        ("classes", sorted(source.classes), sorted(classes)),
        ("splits", sorted(source.splits.keys() & {"train", "test"}), ["test", "train"]),
        ("image size", size, (side, side)),
    ):
        if found != promised:
            text = f"{source.name} at {source.revision} has the {what} {found}, where {promised} was promised"
            raise ValueError(f"{text}: name an older revision with --dataset {source.name}@REVISION, or a local folder")


def _load_folder(path: str) -> datasets.DatasetDict:
    """Parquet files as `datasets` finds them; else an ImageFolder, whose splits are its folders of those names, or all is train."""
    folder = Path(path)
    if any(folder.rglob("*.parquet")):
        return datasets.load_dataset(str(folder))
    splits: dict[str, Path] = {}
    for sub in sorted(folder.iterdir()):
        name = _SPLIT_NAMES.get(sub.name.lower(), sub.name.lower())
        if name in SPLITS and sub.is_dir() and any(child.is_dir() for child in sub.iterdir()):  # else it is a class of that name
            if name in splits:
                raise ValueError(f"{splits[name].name} and {sub.name} are both the {name} split: rename one of them")
            splits[name] = sub
    ignored = [sub.name for sub in folder.iterdir() if sub.is_dir() and sub not in splits.values()]
    if splits and ignored:
        print(f"{folder}: {', '.join(sub.name for sub in splits.values())} are splits; left out: {', '.join(sorted(ignored))}")
    splits = splits or {"train": folder}
    # Named one by one, for the library's own guess takes a class called "test" for a split, and [ in a path for a pattern.
    return datasets.load_dataset("imagefolder", data_files={name: f"{glob.escape(str(sub))}/**" for name, sub in splits.items()})


def _describe(name: str, loaded: datasets.DatasetDict, revision: str | None) -> Source:
    splits = {_SPLIT_NAMES.get(split, split): data for split, data in loaded.items() if len(data)}
    if not splits:
        raise ValueError(f"{name} has no images")
    features = next(iter(splits.values())).features
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images:
        raise ValueError(f"{name} has no column of images, only {', '.join(features)}")
    if not labels:
        raise ValueError(f"{name} has no class labels: an image folder needs one folder for each of two or more classes")
    classes = features[labels[0]].names
    if len(classes) < 2:
        raise ValueError(f"{name} has only the class {classes[0]!r}: a classifier needs at least two")
    source = Source(name, revision, classes, splits, images[0], labels[0])
    for split, rows in list(splits.items()):
        if set(rows.data.column(labels[0]).unique().to_pylist()) <= {None, -1}:
            print(f"Split {split} of {name} has no labels and is left out.")
            del splits[split]
    return source


def stratified(labels: torch.Tensor, n: int, *keys: int) -> torch.Tensor:
    """n positions of `labels` (N,), sorted, drawn by the keys, each class by its share (largest remainders first)."""
    counts = torch.bincount(labels)
    quota = counts.double() * n / len(labels)
    take = quota.floor().long()
    by_remainder = torch.argsort(take - quota, stable=True)
    take[by_remainder[: n - int(take.sum())]] += 1
    shuffled = randomness.permutation(len(labels), *keys)
    chosen = [shuffled[labels[shuffled] == c][: int(take[c])] for c in range(len(counts))]
    return torch.cat(chosen).sort().values


def divide(
    source: Source, split: str, *, val_fraction: float, seed: int, limit_train: int | None = None, limit_eval: int | None = None
) -> tuple[str, torch.Tensor]:
    """Where a split's images are: the name of the dataset's own split and the rows in it, sorted.

    Without a validation split of its own the dataset's train split is divided, stratified and seeded; the limits then take a
    seeded, stratified subset. ValueError: the dataset has no such split, or a part is empty.
    """
    own = split
    if split in source.splits:
        rows = torch.arange(len(source.splits[split]))
    elif split == "validation" and "train" in source.splits:
        own, rows = "train", None
    else:
        raise ValueError(f"{source.name} has no split {split!r}, only {', '.join(source.splits)}")
    labels = source.labels(own)
    if own == "train" and "validation" not in source.splits:
        chosen = stratified(labels, round(val_fraction * len(labels)), seed, randomness.SPLIT)
        kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, chosen, False).nonzero()[:, 0]
        rows = chosen if split == "validation" else kept
    limit = limit_train if split == "train" else limit_eval
    if limit is not None and limit < len(rows):
        rows = rows[stratified(labels[rows], limit, seed, randomness.SUBSET)]
    if not len(rows):
        raise ValueError(f"split {split!r} of {source.name} is empty with --val-fraction {val_fraction}: it has {len(labels)} images")
    return own, rows


@dataclass
class Images:
    """Images of one split: image i is pixels[where[i]]. pixels: uint8 (M, 3, H, W), a list of (3, H_i, W_i), or what decodes them anew.

    where (N,) int64; sizes (N, 2) int64 height and width; labels (N,) int64; rows (N,) int64, sorted, the row of each in the dataset's
    split, by which its augmentation is drawn; origin is the split's fingerprint by `datasets`, digest what fingerprint() gave.
    """

    pixels: store.Pixels | decoding.Decoder
    where: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    classes: list[str]
    origin: str = ""
    digest: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, 3, H, W), smaller images filled up with zeros on the right and below, and sizes (B, 2)."""
        sizes, where = self.sizes[positions], self.where[positions]
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[where], sizes
        height, width = sizes.amax(dim=0).tolist()
        out = torch.zeros(len(positions), 3, height, width, dtype=torch.uint8)
        for canvas, image in zip(out, self._pixels_of(where), strict=True):
            canvas[:, : image.shape[1], : image.shape[2]] = image
        return out, sizes

    def _pixels_of(self, where: torch.Tensor) -> Iterable[torch.Tensor]:
        indices = where.tolist()
        return self.pixels.take(indices) if isinstance(self.pixels, decoding.Decoder) else (self.pixels[index] for index in indices)

    def fingerprint(self) -> str:
        """SHA-256 of sizes, labels and pixels; of more than FINGERPRINT_BYTES of pixels, every so many images."""
        if self.digest is None:
            every = -(-3 * int(self.sizes.prod(dim=1).sum()) // FINGERPRINT_BYTES)
            digest = hashlib.sha256(self.sizes.numpy().tobytes() + self.labels.numpy().tobytes())
            for part in self.where[::every].split(1024):
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
    num_threads: int,
    store_limit: float = math.inf,
    progress=None,
) -> Images:
    """The images of `rows` of the dataset's own `split`, ready to be used.

    More than half of a split, or more than IN_MEMORY bytes, come from the split's store, which is built where it is not there; fewer,
    or those of a dataset that is in memory, are decoded into memory. A store that would take more than store_limit bytes is not
    built: its images are decoded each time they are used. Images whose short side is above KEEP_SHORT_SIDE, and above 8/7 of
    image_size, are kept at that (and long sides at three times that). progress(total, description) gives a context with update(n).
    ValueError: an image that cannot be decoded, by name.
    """
    keep = max(KEEP_SHORT_SIDE, (image_size or 0) * 8 // 7)
    encoded, num_images = source.encoded(split), len(source.splits[split])

    def read(how: Callable, wanted: Sequence[int], description: str = "decoding", **options: bool) -> Iterator[Any]:
        with progress(len(wanted), description, **options) if progress else contextlib.nullcontext() as bar:
            for result in encoded.map(how, wanted, num_threads):
                yield result
                if bar:
                    bar.update(1)

    def kept_size(cell: dict, where: str) -> tuple[int, int]:
        return decoding.reduced_size(decoding.read_size(cell, where), keep)[::-1]

    read_image = functools.partial(decoding.read_reduced, short_side=keep)
    path = store.store_path(source.splits[split], source.image_column, keep)
    is_stored, image_bytes = path is not None and path.exists(), 0.0
    if path and not is_stored:
        sample = rows[:: -(-len(rows) // 256)].tolist()
        image_bytes = 3 * sum(math.prod(size) for size in encoded.map(kept_size, sample, num_threads)) / len(sample)
    if path is None or not (is_stored or 2 * len(rows) > num_images or image_bytes * len(rows) > IN_MEMORY):
        pixels, where = store.collect(read(read_image, rows.tolist())), torch.arange(len(rows))
    elif is_stored or image_bytes * num_images <= store_limit:
        store.build(path, read(read_image, range(num_images), everywhere=True))
        pixels, where = store.read(path), rows
    else:
        pixels, where = decoding.Decoder(encoded, num_threads, keep), rows
        print(f"Split {split}, {image_bytes * num_images / 1e9:.3g} GB decoded, is above --store-limit: decoded as it is used", flush=True)
    if isinstance(pixels, torch.Tensor):
        sizes = torch.tensor(pixels.shape[2:]).expand(len(rows), 2)
    elif isinstance(pixels, list):
        sizes = torch.tensor([pixels[index].shape[1:] for index in where.tolist()])
    else:
        sizes = torch.tensor(list(read(kept_size, rows.tolist(), "reading sizes")))
    return Images(pixels, where, sizes, source.labels(split)[rows], rows, source.classes, source.splits[split]._fingerprint)


def own_size(images: Images) -> int:
    """The side that images have by themselves, in pixels: 224 at most, and 224 where they are not all squares of one size."""
    side = int(images.sizes[0, 0])
    return min(side, 224) if bool((images.sizes == side).all()) else 224


@dataclass
class Batch:
    """One micro-batch. images (U, 3, H, W) uint8, sizes, labels, indices (U,); where mixing, own and partner (B,) point into them.

    images are None where nobody looks at them: their features are known.
    weights (B,) float32 is 1, or 0 for the image that a process runs when the global batch left it none.
    """

    images: torch.Tensor | None
    sizes: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    own: torch.Tensor | None = None
    partner: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, but sizes and indices, by which the CPU decides what the device has to do."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        stay = {"sizes", "indices"}
        return Batch(**{name: value if value is None or name in stay else move(value) for name, value in vars(self).items()})


def shares(num_images: int, *, accumulation: int, rank: int, world_size: int) -> list[torch.Tensor]:
    """The positions in a global batch that each of a rank's micro-batches takes; as many on every rank, some perhaps empty."""
    largest = -(-num_images // world_size)
    mine = torch.arange(num_images).tensor_split(world_size)[rank]
    return list(mine.tensor_split(min(accumulation, largest)))


def training_steps(
    images: Images,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    mix: bool = False,
    start: int = 0,
    with_pixels: bool = True,
) -> Iterator[list[Batch]]:
    """The steps of an epoch from `start` on, each the micro-batches of this rank's share of a global batch of `batch_size` images.

    The order is a function of (seed, epoch), mixing partners of (seed, epoch, step) over the global batch. The last batch is as
    short as it falls. Images that are decoded as they are used are decoded two steps ahead.
    """

    def micro_batch(global_batch: torch.Tensor, partners: torch.Tensor | None, share: torch.Tensor) -> Batch:
        weights = torch.ones(len(share)) if len(share) else torch.zeros(1)
        share = share if len(share) else torch.zeros(1, dtype=torch.int64)
        positions, own, partner = global_batch[share], None, None
        if partners is not None:
            both = torch.cat([positions, global_batch[partners[share]]])
            positions, where = torch.unique(both, return_inverse=True)
            own, partner = where.chunk(2)
        pixels, sizes = images.gather(positions) if with_pixels else (None, images.sizes[positions])
        return Batch(pixels, sizes, images.labels[positions], images.rows[positions], weights, own, partner)

    def steps() -> Iterator[list[Batch]]:
        order = randomness.permutation(len(images), seed, randomness.ORDER, epoch)
        for step, global_batch in list(enumerate(order.split(batch_size)))[start:]:
            partners = randomness.permutation(len(global_batch), seed, randomness.MIX, epoch, step) if mix else None
            mine = shares(len(global_batch), accumulation=accumulation, rank=rank, world_size=world_size)
            yield [micro_batch(global_batch, partners, share) for share in mine]

    return decoding.ahead(steps()) if with_pixels and isinstance(images.pixels, decoding.Decoder) else steps()
