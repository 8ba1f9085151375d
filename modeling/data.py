"""A dataset's name or folder -> splits -> images in memory -> batches.

Images are decoded once, before training, into uint8 tensors; what is random about a batch is a pure function of seed, epoch and
step (modeling/randomness.py).
"""

import contextlib
import errno
import glob
import hashlib
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps

from modeling import randomness, store
from modeling.hub import download

HUB_NAMES = {"stl10": "tanganke/stl10", "cifar10": "uoft-cs/cifar10"}
PROMISES = {  # classes and side of what these repositories hold, in splits train and test
    HUB_NAMES["stl10"]: ("airplane bird car cat deer dog horse monkey ship truck".split(), 96),
    HUB_NAMES["cifar10"]: ("airplane automobile bird cat deer dog frog horse ship truck".split(), 32),
}
SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train", "testing": "test"}
KEEP_SHORT_SIDE = 256  # images larger than this, and than the model needs, are kept smaller


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
    cell = source.splits[next(iter(source.splits))].cast_column(source.image_column, datasets.Image(decode=False))[0]
    size = read_image(cell[source.image_column], f"row 0 of {source.name}").size
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


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode, upright as its EXIF says, in 8-bit RGB; 16 bits are scaled to 8, transparency is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        image = Image.fromarray((pixels.clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range: convert the image to 8 or 16 bits")
    return image.convert("RGB")


def read_image(cell: dict, where: str) -> Image.Image:
    """Decode one cell of an undecoded image column. ValueError: undecodable, naming the file, or `where` it stands."""
    try:
        if cell["bytes"] is None and cell["path"] is None:
            raise ValueError("the image is missing")
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        path = cell["path"] or ""
        name = path if Path(path).is_file() else f"{path} in {where}" if path else where
        raise ValueError(f"cannot decode image {name}: {error or type(error).__name__}") from error


def reduced(image: Image.Image, short_side: int) -> Image.Image:
    """The image, or where its short side is longer than that, or its long one than three times that, a smaller copy."""
    scale = min(1.0, short_side / min(image.size), 3 * short_side / max(image.size))
    if scale == 1.0:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC, reducing_gap=3)


def iterate_images(
    source: Source, split: str, rows: torch.Tensor, num_threads: int, short_side: int | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """(row, RGB image) for each of `rows` in order, decoded, and reduced where short_side is given, by threads; 0: by none."""

    def read(cell: dict, where: str) -> Image.Image:
        image = read_image(cell, where)
        return reduced(image, short_side) if short_side else image

    raw = source.splits[split].cast_column(source.image_column, datasets.Image(decode=False))
    raw = raw.select_columns([source.image_column])
    with ThreadPoolExecutor(num_threads or 1) as pool:
        for start in range(0, len(rows), 64):
            chunk = rows[start : start + 64].tolist()
            cells = raw[chunk][source.image_column]
            places = [f"row {row} of split {split} of {source.name}" for row in chunk]
            yield from zip(chunk, (pool.map if num_threads else map)(read, cells, places), strict=True)


@dataclass
class Images:
    """Decoded images of one split: image i is pixels[where[i]]. pixels: uint8 (M, 3, H, W), or a list of (3, H_i, W_i) of varied sizes.

    where (N,) int64; sizes (N, 2) int64 height and width; labels (N,) int64; rows (N,) int64, the row of each in the dataset's split,
    by which its augmentation is drawn.
    """

    pixels: store.Pixels
    where: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (B, 3, H, W), smaller images filled up with zeros on the right and below, and sizes (B, 2)."""
        sizes, where = self.sizes[positions], self.where[positions]
        if isinstance(self.pixels, torch.Tensor):
            return self.pixels[where], sizes
        height, width = sizes.amax(dim=0).tolist()
        out = torch.zeros(len(positions), 3, height, width, dtype=torch.uint8)
        for canvas, index in zip(out, where.tolist(), strict=True):
            image = self.pixels[index]
            canvas[:, : image.shape[1], : image.shape[2]] = image
        return out, sizes

    def fingerprint(self) -> str:
        """SHA-256 of sizes, labels and pixels."""
        digest = hashlib.sha256(self.sizes.numpy().tobytes() + self.labels.numpy().tobytes())
        for index in self.where.tolist():
            digest.update(self.pixels[index].numpy())
        return digest.hexdigest()


def decode(source: Source, split: str, rows: torch.Tensor, *, image_size: int | None, num_threads: int, progress=None) -> Images:
    """The images of `rows` of the dataset's own `split`, all of them decoded before anything is computed.

    More than half of a split come from its store, which is built where it is not there; fewer, or those of a dataset that is in
    memory, are decoded into memory. Images whose short side is above KEEP_SHORT_SIDE, and above 8/7 of image_size, are kept at that
    (and long sides at three times that). progress(total, "decoding") gives a context with update(n). ValueError: an image that
    cannot be decoded, by name.
    """
    keep = max(KEEP_SHORT_SIDE, (image_size or 0) * 8 // 7)
    path = store.store_path(source.splits[split], source.image_column, keep)

    def images(wanted: torch.Tensor) -> Iterator[Image.Image]:
        with progress(len(wanted), "decoding") if progress else contextlib.nullcontext() as bar:
            for _, image in iterate_images(source, split, wanted, num_threads, keep):
                yield image
                if bar:
                    bar.update(1)

    if path and (path.exists() or 2 * len(rows) > len(source.splits[split])):
        store.build(path, images(torch.arange(len(source.splits[split]))))
        pixels, where = store.read(path), rows
    else:
        pixels, where = store.collect(images(rows)), torch.arange(len(rows))
    if isinstance(pixels, torch.Tensor):
        sizes = torch.tensor(pixels.shape[2:]).expand(len(rows), 2)
    else:
        sizes = torch.tensor([pixels[index].shape[1:] for index in where.tolist()])
    return Images(pixels, where, sizes, source.labels(split)[rows], rows, source.classes)


def own_size(images: Images) -> int:
    """The side that images have by themselves, in pixels: 224 at most, and 224 where they are not all squares of one size."""
    side = int(images.sizes[0, 0])
    return min(side, 224) if bool((images.sizes == side).all()) else 224


@dataclass
class Batch:
    """One micro-batch. images (U, 3, H, W) uint8, sizes, labels, indices (U,); where mixing, own and partner (B,) point into them.

    weights (B,) float32 is 1, or 0 for the image that a process runs when the global batch left it none.
    """

    images: torch.Tensor
    sizes: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    own: torch.Tensor | None = None
    partner: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v if v is None else v.to(device, non_blocking=True) for k, v in vars(self).items()}
        return Batch(**moved)


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
) -> Iterator[list[Batch]]:
    """The steps of an epoch from `start` on, each the micro-batches of this rank's share of a global batch of `batch_size` images.

    The order is a function of (seed, epoch), mixing partners of (seed, epoch, step) over the global batch. The last batch is as
    short as it falls.
    """
    order = randomness.permutation(len(images), seed, randomness.ORDER, epoch)
    for step, global_batch in list(enumerate(order.split(batch_size)))[start:]:
        partners = randomness.permutation(len(global_batch), seed, randomness.MIX, epoch, step) if mix else None
        micro_batches = []
        for share in shares(len(global_batch), accumulation=accumulation, rank=rank, world_size=world_size):
            weights = torch.ones(len(share)) if len(share) else torch.zeros(1)
            share = share if len(share) else torch.zeros(1, dtype=torch.int64)
            positions, own, partner = global_batch[share], None, None
            if mix:
                both = torch.cat([positions, global_batch[partners[share]]])
                positions, where = torch.unique(both, return_inverse=True)
                own, partner = where.chunk(2)
            pixels, sizes = images.gather(positions)
            micro_batches.append(Batch(pixels, sizes, images.labels[positions], images.rows[positions], weights, own, partner))
        yield micro_batches
