"""Names, hub ids and folders -> splits and classes."""

import errno
import glob
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

HUB_NAMES = {"stl10": "tanganke/stl10", "cifar10": "uoft-cs/cifar10"}


PROMISES = {  # classes and side of what these repositories hold, in splits train and test
    HUB_NAMES["stl10"]: ("airplane bird car cat deer dog horse monkey ship truck".split(), 96),
    HUB_NAMES["cifar10"]: ("airplane automobile bird cat deer dog frog horse ship truck".split(), 32),
}


SPLITS = ("train", "validation", "test")


_SPLIT_NAMES = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "training": "train",
    "testing": "test",
}


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
        """The class number of every row, (N,) int64. UserError: a row without a label."""
        column = self.splits[split].data.column(
            self.label_column
        )  # whole splits as loaded: no row has been moved
        labels = torch.tensor(column.fill_null(-1).to_pylist(), dtype=torch.int64)
        if (labels < 0).any():
            raise UserError(
                f"{self.name}: row {int((labels < 0).nonzero()[0])} of split {split} has no label"
            )
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

    Columns and classes are taken from the dataset's features. UserError: nothing there, no network, no images, no classes.
    """
    if name == "digits":
        return _describe(name, digits(), revision=None)
    path = Path(name).expanduser()
    if path.is_dir() and name not in HUB_NAMES:
        return _describe(str(path.resolve()), _load(name, _load_folder, path.resolve()), revision=None)
    hub_id, at, revision = name.partition("@")
    hub_id = HUB_NAMES.get(hub_id, hub_id)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", hub_id) or bool(at) != bool(revision):
        raise UserError(
            f"no dataset {name!r}: give stl10, cifar10, digits, a hub id such as owner/name or owner/name@revision, or a folder that exists"
        )
    folder = download(hub_id, repo_type="dataset", revision=revision or None)
    source = _describe(hub_id, _load(hub_id, datasets.load_dataset, folder), revision=folder.name)
    if hub_id in PROMISES:
        _check_promise(source, *PROMISES[hub_id])
    return source


def _load(name: str, loader, folder: Path) -> datasets.DatasetDict:
    """What `loader` makes of a folder, as a DatasetDict. UserError: nothing that `datasets` can read."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return loader(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        detail = f"{error.__cause__ or error or type(error).__name__}".strip().split("\n")[0]
        raise UserError(
            f"no dataset could be read from {name}: {detail}; it needs one folder per class, or parquet files"
        ) from error


def _check_promise(source: Source, classes: list[str], side: int) -> None:
    """UserError: the repository that an alias names holds something else than the dataset of that name."""
    (size,) = source.encoded(next(iter(source.splits))).map(decoding.read_size, [0], 0)
    for what, found, promised in (
        ("classes", sorted(source.classes), sorted(classes)),
        ("splits", sorted(source.splits.keys() & {"train", "test"}), ["test", "train"]),
        ("image size", size, (side, side)),
    ):
        if found != promised:
            text = f"{source.name} at {source.revision} has the {what} {found}, where {promised} was promised"
            raise UserError(
                f"{text}: name an older revision with --dataset {source.name}@REVISION, or a local folder"
            )


def _load_folder(path: str) -> datasets.DatasetDict:
    """Parquet files as `datasets` finds them; else an ImageFolder, whose splits are its folders of those names, or all is train."""
    folder = Path(path)
    if any(folder.rglob("*.parquet")):
        return datasets.load_dataset(str(folder))
    splits: dict[str, Path] = {}
    for sub in sorted(folder.iterdir()):
        name = _SPLIT_NAMES.get(sub.name.lower(), sub.name.lower())
        if (
            name in SPLITS and sub.is_dir() and any(child.is_dir() for child in sub.iterdir())
        ):  # else it is a class of that name
            if name in splits:
                raise UserError(
                    f"{splits[name].name} and {sub.name} are both the {name} split: rename one of them"
                )
            splits[name] = sub
    ignored = [sub.name for sub in folder.iterdir() if sub.is_dir() and sub not in splits.values()]
    if splits and ignored:
        print(
            f"{folder}: {', '.join(sub.name for sub in splits.values())} are splits; left out: {', '.join(sorted(ignored))}"
        )
    splits = splits or {"train": folder}
    # Named one by one, for the library's own guess takes a class called "test" for a split, and [ in a path for a pattern.
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
    """n positions of `labels` (N,), sorted, drawn by the keys, each class by its share (largest remainders first)."""
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
    """Where a split's images are: the name of the dataset's own split and the rows in it, sorted.

    Without a validation split of its own the dataset's train split is divided, stratified and seeded; the limits then take a
    seeded, stratified subset. UserError: the dataset has no such split, or a part is empty.
    """
    own = split
    if split in source.splits:
        rows = torch.arange(len(source.splits[split]))
    elif split == "validation" and "train" in source.splits:
        own, rows = "train", None
    else:
        raise UserError(f"{source.name} has no split {split!r}, only {', '.join(source.splits)}")
    labels = source.labels(own)
    if own == "train" and "validation" not in source.splits:
        chosen = stratified(labels, round(val_fraction * len(labels)), seed, randomness.SPLIT)
        kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, chosen, False).nonzero()[:, 0]
        rows = chosen if split == "validation" else kept
    limit = limit_train if split == "train" else limit_eval
    if limit is not None and limit < len(rows):
        rows = rows[stratified(labels[rows], limit, seed, randomness.SUBSET)]
    if not len(rows):
        raise UserError(
            f"split {split!r} of {source.name} is empty with --val-fraction {val_fraction}: it has {len(labels)} images"
        )
    return own, rows
