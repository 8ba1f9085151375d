"""From a name, a hub id or a folder to a dataset: its splits, columns and classes."""

import errno
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from modeling import randomness
from modeling.data import decoding
from modeling.errors import UserError
from modeling.hub import download


@dataclass(frozen=True)
class Known:
    """A dataset that has a short name.

    hub_id is None where the dataset does not come from the hub. classes (in any order) and side (height and
    width in pixels) are what the dataset must have. val_fraction is the default share of train for
    validation.
    """

    name: str
    hub_id: str | None
    classes: tuple[str, ...]
    side: int
    val_fraction: float


DEFAULT_VAL_FRACTION = 0.1
# What the system says of a folder that is full, read-only, or on a file system without locks.
CACHE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOLCK)

KNOWN = (
    Known(
        name="digits",
        hub_id=None,
        classes=tuple("0123456789"),
        side=32,
        val_fraction=DEFAULT_VAL_FRACTION,
    ),
    Known(
        name="stl10",
        hub_id="tanganke/stl10",
        classes=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
        side=96,
        val_fraction=0.2,
    ),
    Known(
        name="cifar10",
        hub_id="uoft-cs/cifar10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        side=32,
        val_fraction=DEFAULT_VAL_FRACTION,
    ),
)

SPLITS = ("train", "validation", "test")


_SPLIT_NAMES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "training": "train",
    "testing": "test",
}


def find_known(dataset: str) -> Known | None:
    """Find a dataset in KNOWN by its short name or its hub id, with or without "@revision"."""
    name = dataset.partition("@")[0]
    for known in KNOWN:
        if name in (known.name, known.hub_id):
            return known
    return None


def is_stl10(dataset: str) -> bool:
    """Tell whether a --dataset value names STL-10, by its short name or its hub id."""
    known = find_known(dataset)
    return known is not None and known.name == "stl10"


def default_val_fraction(dataset: str) -> float:
    """Give the share of train that becomes validation if the dataset has no validation split."""
    known = find_known(dataset)
    return known.val_fraction if known else DEFAULT_VAL_FRACTION


@dataclass
class Source:
    """A dataset before decoding: its splits, classes and columns. revision is its hub commit, or None."""

    name: str
    revision: str | None
    classes: list[str]
    splits: dict[str, datasets.Dataset]
    image_column: str
    label_column: str

    def labels(self, split: str) -> torch.Tensor:
        """Give the class number of every row, (N,) int64. UserError: a row has no label."""
        # The split is as it was loaded: no row has moved, so the raw table has its order.
        column = self.splits[split].data.column(self.label_column)
        labels = torch.tensor(column.fill_null(-1).to_pylist(), dtype=torch.int64)
        if (labels < 0).any():
            raise UserError(
                f"{self.name}: row {int((labels < 0).nonzero()[0])} of split {split} has no label"
            )
        return labels

    def encoded(self, split: str) -> decoding.Encoded:
        """Give the encoded images of a split."""
        return decoding.Encoded(self.splits[split], self.image_column, f"split {split} of {self.name}")


def digits() -> datasets.DatasetDict:
    """Give scikit-learn's 1,797 digits as 32x32 RGB, with a fixed 80/20 division into train and test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = torch.from_numpy(raw.target)
    grey = [Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in raw.images]
    images = [image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in grey]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(d) for d in range(10)])}
    )
    test = stratified(labels, round(0.2 * len(labels)), 0, randomness.SPLIT)
    is_test = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, test, True)
    rows = {"train": (~is_test).nonzero()[:, 0].tolist(), "test": test.tolist()}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [images[i] for i in r], "label": raw.target[r]}, features=features
            )
            for split, r in rows.items()
        }
    )


def load_source(name: str) -> Source:
    """Load `digits`, `stl10`, `cifar10`, a local folder (parquet or ImageFolder), or a hub id.

    The columns and classes come from the dataset's features.
    UserError: the dataset does not exist, there is no network, or it has no images or no classes.
    """
    if name == "digits":
        return _describe(name, digits(), revision=None)
    path = Path(name).expanduser()
    hub_id, at, revision = name.partition("@")
    known = find_known(hub_id)
    is_short_name = known is not None and name == known.name
    if path.is_dir() and not is_short_name:  # a folder called "stl10" does not hide the dataset
        return _describe(str(path.resolve()), _load(name, _load_folder, path.resolve()), revision=None)
    if known and known.hub_id:
        hub_id = known.hub_id
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", hub_id) or bool(at) != bool(revision):
        raise UserError(
            f"no dataset {name!r}: give stl10, cifar10, digits, a hub id such as owner/name or "
            "owner/name@revision, or a folder that exists"
        )
    folder = download(hub_id, repo_type="dataset", revision=revision or None)
    source = _describe(hub_id, _load(hub_id, datasets.load_dataset, folder), revision=folder.name)
    if known and known.hub_id:
        _check_promise(source, known)
    return source


def _load(name: str, loader, folder: Path) -> datasets.DatasetDict:
    """Load a folder with `loader`. UserError: `datasets` cannot read it."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return loader(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause: BaseException | None = error
        while cause:
            if isinstance(cause, OSError) and cause.errno in CACHE_ERRORS:
                raise UserError(
                    f"the cache of datasets in {datasets.config.HF_DATASETS_CACHE} cannot be written: "
                    f"{os.strerror(cause.errno)}; make room there, or set HF_DATASETS_CACHE to another folder"
                ) from error
            cause = cause.__cause__ or cause.__context__
        detail = f"{error.__cause__ or error or type(error).__name__}".strip().split("\n")[0]
        raise UserError(
            f"no dataset could be read from {name}: {detail}; it needs one folder per class, or parquet files"
        ) from error


def _check_promise(source: Source, known: Known) -> None:
    """Raise UserError if the hub repository of a known dataset holds another dataset."""
    (size,) = source.encoded(next(iter(source.splits))).map(decoding.read_size, [0], 0)
    for what, found, promised in (
        ("classes", sorted(source.classes), sorted(known.classes)),
        ("splits", sorted(source.splits.keys() & {"train", "test"}), ["test", "train"]),
        ("image size", size, (known.side, known.side)),
    ):
        if found != promised:
            text = f"{source.name} at {source.revision} has the {what} {found}, where {promised} was promised"
            raise UserError(
                f"{text}: name an older revision with --dataset {source.name}@REVISION, or a local folder"
            )


def _load_folder(path: str) -> datasets.DatasetDict:
    """Load a folder of parquet files, or an ImageFolder if there are none.

    Subfolders called train, val, test and so on are the splits of an ImageFolder. Without them all is train.
    """
    folder = Path(path)
    if any(folder.rglob("*.parquet")):
        return datasets.load_dataset(str(folder))
    splits: dict[str, Path] = {}
    for sub in sorted(folder.iterdir()):
        name = _SPLIT_NAMES.get(sub.name.lower(), sub.name.lower())
        # A folder called "test" without folders in it is a class, not a split.
        if name in SPLITS and sub.is_dir() and any(child.is_dir() for child in sub.iterdir()):
            if name in splits:
                raise UserError(
                    f"{splits[name].name} and {sub.name} are both the {name} split: rename one of them"
                )
            splits[name] = sub
    ignored = [sub.name for sub in folder.iterdir() if sub.is_dir() and sub not in splits.values()]
    if splits and ignored:
        print(
            f"{folder}: {', '.join(sub.name for sub in splits.values())} are splits; "
            f"left out: {', '.join(sorted(ignored))}"
        )
    splits = splits or {"train": folder}
    # Name the splits one by one: the library would take a class called "test" for a split.
    # Escape the paths: the library would take "[" for the start of a pattern.
    return datasets.load_dataset(
        "imagefolder", data_files={name: f"{glob.escape(str(sub))}/**" for name, sub in splits.items()}
    )


def _describe(name: str, loaded: datasets.DatasetDict, revision: str | None) -> Source:
    splits = {_SPLIT_NAMES.get(split, split): data for split, data in loaded.items() if len(data)}
    if not splits:
        raise UserError(f"{name} has no images")
    features = next(iter(splits.values())).features
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images:
        raise UserError(f"{name} has no column of images, only {', '.join(features)}")
    if not labels:
        raise UserError(
            f"{name} has no class labels: an image folder needs one folder for each of two or more classes"
        )
    classes = features[labels[0]].names
    if len(classes) < 2:
        raise UserError(f"{name} has only the class {classes[0]!r}: a classifier needs at least two")
    source = Source(name, revision, classes, splits, images[0], labels[0])
    for split, rows in list(splits.items()):
        if set(rows.data.column(labels[0]).unique().to_pylist()) <= {None, -1}:
            print(f"Split {split} of {name} has no labels and is left out.")
            del splits[split]
    return source


def stratified(labels: torch.Tensor, n: int, *keys: int) -> torch.Tensor:
    """Draw n positions of `labels` (N,), sorted. Each class gets its share of n; the keys decide the draw.

    Rounding: the classes with the largest remainders get one more each.
    """
    counts = torch.bincount(labels)
    quota = counts.double() * n / len(labels)
    take = quota.floor().long()
    by_remainder = torch.argsort(take - quota, stable=True)
    take[by_remainder[: n - int(take.sum())]] += 1
    shuffled = randomness.permutation(len(labels), *keys)
    chosen = [shuffled[labels[shuffled] == c][: int(take[c])] for c in range(len(counts))]
    return torch.cat(chosen).sort().values


def select_rows(
    source: Source,
    split: str,
    *,
    val_fraction: float,
    seed: int,
    limit_train: int | None = None,
    limit_eval: int | None = None,
) -> tuple[str, torch.Tensor]:
    """Choose the images of a split: give the name of the dataset's split and the sorted rows in it, (N,)
    int64.

    If the dataset has no validation split, its train split is divided: validation takes `val_fraction`, train
    keeps the rest. The limits then take a subset. Both choices are stratified by class and depend on the
    seed. UserError: the dataset has no such split, or no image is left.
    """
    source_split = split
    if split in source.splits:
        rows = torch.arange(len(source.splits[split]))
    elif split == "validation" and "train" in source.splits:
        source_split, rows = "train", None
    else:
        raise UserError(f"{source.name} has no split {split!r}, only {', '.join(source.splits)}")
    labels = source.labels(source_split)
    if source_split == "train" and "validation" not in source.splits:
        chosen = stratified(labels, round(val_fraction * len(labels)), seed, randomness.SPLIT)
        kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, chosen, False).nonzero()[:, 0]
        rows = chosen if split == "validation" else kept
    limit = limit_train if split == "train" else limit_eval
    if limit is not None and limit < len(rows):
        rows = rows[stratified(labels[rows], limit, seed, randomness.SUBSET)]
    if not len(rows):
        raise UserError(
            f"split {split!r} of {source.name} is empty with --val-fraction {val_fraction}: "
            f"it has {len(labels)} images"
        )
    return source_split, rows
