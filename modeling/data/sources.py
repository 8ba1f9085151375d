"""From a name, a hub id, a folder or a table to a dataset: its splits, classes and what was left out."""

import functools
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modeling import randomness
from modeling.data import decoding, folders, parquet, tables
from modeling.data.choices import NO_CHOICES, Choices
from modeling.data.folders import SPLITS
from modeling.data.known import Known, find_known
from modeling.data.stratified import stratified
from modeling.errors import UserError
from modeling.hub import download


@dataclass
class Split:
    """The images of one split, before decoding.

    labels (N,) int64 are class numbers. files name the images: paths relative to the dataset's folder, or
    None for an image without a file. cells(rows) gives {"bytes", "path"} of each row. fingerprint changes
    when a file of this machine changes; it is None where the images exist in memory only. identity is equal
    for copies: it is a digest of the files' paths and sizes.
    """

    labels: torch.Tensor
    files: Sequence[str | None]
    cells: Callable[[Sequence[int]], list[dict[str, Any]]]
    fingerprint: str | None
    identity: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Source:
    """A dataset before decoding. revision is its hub commit, or None.

    classes_from says where the classes come from, for example "folders" or "column label". columns are the
    image and the label column, where there are any. left_out counts by kind what was not used.
    """

    name: str
    revision: str | None
    classes: list[str]
    splits: dict[str, Split]
    classes_from: str
    choices: Choices = NO_CHOICES
    columns: tuple[str, str] | None = None
    left_out: Counter = field(default_factory=Counter)

    def labels(self, split: str) -> torch.Tensor:
        """Give the class number of every row, (N,) int64."""
        return self.splits[split].labels

    def encoded(self, split: str) -> decoding.Encoded:
        """Give the encoded images of a split."""
        return decoding.Encoded(self.splits[split].cells, f"split {split} of {self.name}")

    def describe(self) -> str:
        """Say in one line what was read: classes, where they come from, splits, and what was left out."""
        names = ", ".join(self.classes[:5])
        if len(self.classes) > 5:
            names += f", ... {len(self.classes) - 5} more"
        columns = f", images from column {self.columns[0]}" if self.columns else ""
        splits = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        left_out = folders.describe_counts(self.left_out)
        return f"classes {len(self.classes)}: {names} ({self.classes_from}{columns}); splits: {splits}" + (
            f"; left out: {left_out}" if left_out else ""
        )

    def to_json(self) -> dict[str, Any]:
        """What was read, for a checkpoint's header or a manifest: equal inputs give equal values."""
        return {
            "classes_from": self.classes_from,
            "columns": list(self.columns) if self.columns else None,
            "splits": {name: len(split) for name, split in self.splits.items()},
            "left_out": dict(sorted(self.left_out.items())),
            "choices": vars(self.choices),
        }


def full_name(dataset: str) -> str:
    """Give the name that `load_source` gives the source of a --dataset value: its path or hub id."""
    known, path = find_known(dataset), Path(dataset).expanduser()
    if path.exists() and not (known and dataset == known.name):
        return str(path.resolve())
    return (known and known.hub_id) or dataset.partition("@")[0]


def load_source(name: str, choices: Choices = NO_CHOICES) -> Source:
    """Load `digits`, `stl10`, `cifar10`, a local folder, a table of labels, or a hub id.

    A folder holds class folders, parquet files, or a table of labels (.csv, .tsv, .jsonl).

    UserError: the dataset does not exist, there is no network, it can be read in several ways, it has no
    images or no classes, or a choice does not apply to it.
    """
    source_name, known = full_name(name), find_known(name)
    path = Path(source_name)
    if known and name == known.name and Path(name).is_dir():
        print(
            f"The folder {name} is not read: {name} is the name of a dataset. For the folder, give ./{name}"
        )
    if name == "digits":
        choices.refuse_all_but(kind="digits")
        return _digits()
    if path.is_absolute() and path.is_dir():
        return _read_folder(path, source_name, None, choices)
    if path.is_absolute() and path.is_file() and path.suffix.lower() in tables.EXTENSIONS:
        return _read_tables(path.parent, [path.name], source_name, None, choices, Counter())
    _, at, revision = name.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source_name) or bool(at) != bool(revision):
        raise UserError(
            f"no dataset {name!r}: give stl10, cifar10, digits, a hub id such as owner/name or "
            "owner/name@revision, a folder that exists, or a .csv, .tsv or .jsonl file with labels"
        )
    folder = download(source_name, repo_type="dataset", revision=revision or None)
    source = _read_folder(folder, source_name, folder.name, choices)
    if known and known.hub_id:
        _check_promise(source, known)
    return source


def _read_folder(root: Path, name: str, revision: str | None, choices: Choices) -> Source:
    """Read a folder: parquet files if they hold images, else class folders, else a table of labels."""
    tree = folders.scan(root)
    parquet_files = [path for node in tree.walk() for path in node.lists if path.lower().endswith(".parquet")]
    # Beside class folders a parquet file may be another program's.
    if tree.num_images and not choices.image_column:
        parquet_files = [path for path in parquet_files if parquet.holds_images(root / path)]
    if parquet_files:
        return _read_parquet(root, sorted(parquet_files), name, revision, choices, tree)
    found = folders.find_splits(tree, name, choices)
    num_classes = len({node.name for split in found.splits.values() for node in split.children})
    table_paths = tables.find_tables(root, tree)
    if table_paths and num_classes < 2:
        left_out = tree.count_left_out()
        return _read_tables(root, table_paths, name, revision, choices, left_out)
    if not num_classes:
        raise UserError(_why_no_classes(tree, name))
    choices.refuse_all_but("train_split", "test_split", kind="class folders")
    if table_paths:
        print(
            f"The class folders of {name} are used. For the labels of {table_paths[0]}, give that file as "
            "--dataset."
        )
    return _read_class_folders(root, found, name, revision, choices, tree)


def _why_no_classes(tree: folders.Node, name: str) -> str:
    if tree.num_images:
        return (
            f"{name} holds {tree.num_images:,} images but no class folders: put the images of each class "
            "into a folder of its own, or add a table with the columns file_name and label"
        )
    left_out = folders.describe_counts(tree.count_left_out())
    holds = f"only {left_out}" if left_out else "it is empty"
    return (
        f"{name} holds no images: {holds}; give a folder with one folder per class, parquet files, or a "
        "table of labels (unpack archives first)"
    )


def _read_class_folders(
    root: Path,
    found: folders.FolderSplits,
    name: str,
    revision: str | None,
    choices: Choices,
    tree: folders.Node,
) -> Source:
    """Read splits of class folders. A split that shares no class with train has no labels and is left out."""
    left_out: Counter = Counter()
    left_out += folders.left_out_above(tree, list(found.splits.values()))
    for folder in found.ignored:
        left_out[f"{folder} (folder)"] += 1
    files = {}
    for split in SPLITS:
        if split in found.splits:
            files[split] = folders.read_split(found.splits[split], name, left_out)
    if "train" in files:
        for split in [split for split in files if split != "train"]:
            if not set(files[split].classes) & set(files["train"].classes):
                unknown = folders.describe_counts(Counter(files[split].classes))
                left_out[f"images of {split} (without a class of train: {unknown})"] += len(
                    files[split].paths
                )
                del files[split]
    classes = sorted({class_name for one in files.values() for class_name in one.classes})
    splits = {split: _file_split(root, one, classes) for split, one in files.items()}
    return Source(name, revision, classes, splits, "folders", choices, None, left_out)


def _file_split(root: Path, files: folders.ImageFiles, classes: list[str]) -> Split:
    def cells(rows: Sequence[int]) -> list[dict[str, Any]]:
        return [{"bytes": None, "path": os.path.join(root, files.paths[row])} for row in rows]

    return Split(
        labels=torch.from_numpy(tables.as_numbers(files.classes, classes)),
        files=files.paths,
        cells=cells,
        fingerprint=folders.digest_files(files.paths, files.stats),
        identity=folders.digest_files(files.paths, [size for size, *_ in files.stats]),
    )


def _read_tables(
    root: Path, paths: list[str], name: str, revision: str | None, choices: Choices, left_out: Counter
) -> Source:
    kind = f"a table of labels, whose column {tables.SPLIT_COLUMN!r} says which rows are train and test"
    choices.refuse_all_but("image_column", "label_column", kind=kind)
    table = tables.read_tables(root, paths, name, choices)
    splits = {
        split: _file_split(root, table.splits[split], table.classes)
        for split in SPLITS
        if split in table.splits
    }
    return Source(
        name=name,
        revision=revision,
        classes=table.classes,
        splits=splits,
        classes_from=f"column {table.label_column} of {', '.join(table.tables)}",
        choices=choices,
        columns=(table.file_column, table.label_column),
        left_out=left_out,
    )


def _read_parquet(
    root: Path, files: list[str], name: str, revision: str | None, choices: Choices, tree: folders.Node
) -> Source:
    data = parquet.read_parquet(root, files, name, choices)
    left_out: Counter = Counter()
    for split in data.left_out:
        left_out[f"{split} (split)"] += 1
    if tree.num_images:
        left_out["image files beside the parquet files"] += tree.num_images
    splits = {}
    for split, one in data.splits.items():
        labels = torch.from_numpy(one.labels)
        if not len(labels):
            continue
        if bool((labels == parquet.NO_LABEL).all()):
            left_out[f"images of {split} (without labels)"] += len(labels)
            continue
        if bool((labels < 0).any()):
            row = int((labels < 0).nonzero()[0])
            raise UserError(f"row {row} of split {split} of {name} has no label in {data.label_column!r}")
        splits[split] = Split(labels, one.files, one.cells, one.fingerprint, one.identity)
    if not splits:
        raise UserError(f"{name} has no images with labels in the column {data.label_column!r}")
    config = f", configuration {data.config}" if data.config else ""
    return Source(
        name=name,
        revision=revision,
        classes=data.classes,
        splits=splits,
        classes_from=f"column {data.label_column}{config}",
        choices=choices,
        columns=(data.image_column, data.label_column),
        left_out=left_out,
    )


@functools.cache
def _digits() -> Source:
    """Give scikit-learn's 1,797 digits as 32x32 RGB, with a fixed 80/20 division into train and test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = torch.from_numpy(raw.target)
    cells = []
    for pixels in raw.images:
        grey = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
        buffer = io.BytesIO()
        grey.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB").save(buffer, "BMP")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    test = stratified(labels, round(0.2 * len(labels)), 0, randomness.SPLIT)
    is_test = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, test, True)
    splits = {}
    for split, rows in (("train", (~is_test).nonzero()[:, 0]), ("test", test)):
        chosen = [cells[row] for row in rows.tolist()]
        splits[split] = Split(
            labels=labels[rows],
            files=[None] * len(rows),
            cells=lambda wanted, chosen=chosen: [dict(chosen[row]) for row in wanted],
            fingerprint=None,
            identity="digits",
        )
    return Source("digits", None, list("0123456789"), splits, "scikit-learn")


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
