"""A folder of parquet files: its configurations, splits, columns and classes."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modeling.data.card import Card, matches, read_card
from modeling.data.choices import Choices
from modeling.data.columns import (
    choose_image_column,
    choose_label_column,
    class_names,
    image_columns,
    is_plain_label,
)
from modeling.data.folders import SPLIT_COLUMN, SPLITS, digest_files, split_keyword
from modeling.data.tables import sort_labels
from modeling.errors import UserError

NO_LABEL = -1


@dataclass
class ParquetSplit:
    """cells(rows) gives the undecoded images; labels (N,) int64 are class numbers, NO_LABEL for none."""

    cells: Callable[[Sequence[int]], list[dict[str, Any]]]
    labels: np.ndarray
    files: list[str | None]
    fingerprint: str
    identity: str


@dataclass
class ParquetData:
    """All that was read. left_out says which splits are not used. config is None if there is only one."""

    splits: dict[str, ParquetSplit]
    classes: list[str]
    image_column: str
    label_column: str
    config: str | None
    left_out: list[str]


def read_parquet(root: Path, files: list[str], name: str, choices: Choices) -> ParquetData:
    """Read the parquet `files`, whose paths are relative to root. Only the labels are read at once.

    Class names are compared file by file, and matched by name.

    UserError: a choice is needed or cannot be met, class lists differ, or a label has no name.
    """
    card = read_card(root)
    config, by_name = _group_by_split(files, card, choices.dataset_config, name)
    by_split, left_out = _name_splits(by_name, name, choices)
    schemas = {file: _read_schema(root / file) for files in by_split.values() for file in files}
    first = next(iter(schemas))
    image_column = choose_image_column(schemas[first], choices.image_column, name)
    label_column = choose_label_column(schemas[first], choices.label_column, name, card, config)
    for split, split_files in by_split.items():
        read = {file: schemas[file] for file in split_files}
        _refuse_split_column(root, split, read, label_column, name)
    labels = {}
    for split, split_files in by_split.items():
        labels[split] = []
        for file in split_files:
            for column in (image_column, label_column):
                if column not in schemas[file].names:
                    raise UserError(
                        f"{file} of {name} has no column {column!r}, only {', '.join(schemas[file].names)}"
                    )
            known = class_names(schemas[file], label_column) or card.names_of(config, label_column)
            labels[split].append(_read_labels(root / file, file, label_column, known, split))
    classes = _merge_classes([one for several in labels.values() for one in several], name)
    number = {class_name: i for i, class_name in enumerate(classes)}
    splits = {}
    for split, split_files in by_split.items():
        numbers = []
        for one in labels[split]:
            lookup = np.array([number[class_name] for class_name in one.names] + [NO_LABEL])
            numbers.append(lookup[one.codes])
        stats = [_stat(root / file) for file in split_files]
        fingerprint = f"{digest_files(split_files, stats)} {image_column}"
        rows = _load_images(root, split_files, image_column, fingerprint, f"split {split} of {name}")
        splits[split] = ParquetSplit(
            cells=rows.cells,
            labels=np.concatenate(numbers),
            files=rows.files(),
            fingerprint=fingerprint,
            identity=digest_files(split_files, [size for size, *_ in stats]),
        )
    return ParquetData(splits, classes, image_column, label_column, config, left_out)


def holds_images(path: Path) -> bool:
    """Tell whether a parquet file has a column that may hold images."""
    return bool(image_columns(_read_schema(path)))


def _stat(path: Path) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _group_by_split(
    files: list[str], card: Card, config: str | None, name: str
) -> tuple[str | None, dict[str, list[str]]]:
    """Give the configuration and the files of each split, by the names that the dataset gives its splits."""
    if card.configs:
        config = _choose_config(config, list(card.configs), card.default, name)
        groups = {}
        for split, patterns in card.configs[config].items():
            groups[split] = [file for file in files if any(matches(file, pattern) for pattern in patterns)]
            if not groups[split]:
                raise UserError(
                    f"README.md of {name} names {', '.join(patterns)} for the split {split}, "
                    "but no parquet file fits"
                )
        return config if len(card.configs) > 1 else None, groups
    by_config: dict[str, dict[str, list[str]]] = {}
    for file in files:
        *folders, base = file.split("/")
        named = [folder for folder in folders if not split_keyword(folder)]
        splits = by_config.setdefault(named[0] if named else "", {})
        splits.setdefault(_split_name(base, folders), []).append(file)
    if config and list(by_config) == [""]:
        raise UserError(f"{name} has no configurations: leave out --dataset-config {config}")
    config = _choose_config(config, list(by_config), None, name)
    return config if len(by_config) > 1 else None, by_config[config]


def _refuse_split_column(
    root: Path, split: str, schemas: dict[str, pa.Schema], label_column: str, name: str
) -> None:
    """UserError: a column says that the rows of one split belong to several. It would go unread."""
    found = set()
    for file, schema in schemas.items():
        for field in schema:
            is_split = field.name.lower() == SPLIT_COLUMN and field.name != label_column
            if is_split and is_plain_label(field.type):
                values = pq.read_table(root / file, columns=[field.name])[field.name].unique()
                found |= {split_keyword(str(value)) for value in values.to_pylist()} - {None}
    if len(found) > 1:
        raise UserError(
            f"split {split} of {name} has a column {SPLIT_COLUMN!r} with {' and '.join(sorted(found))}: "
            "write the rows of each split to a parquet file of its own, such as train.parquet"
        )


def _split_name(base: str, folders: list[str]) -> str:
    """Name the split of a file after the file, else after the nearest folder that names one."""
    shard = re.match(r"(.+?)-\d+-of-\d+", base)
    if shard:
        return shard.group(1)
    for part in (base.removesuffix(".parquet"), *reversed(folders)):
        if split_keyword(part):
            return split_keyword(part)
    return "train"


def _choose_config(chosen: str | None, names: list[str], default: str | None, name: str) -> str:
    if chosen is None and (default or len(names) == 1):
        return default or names[0]
    if chosen in names:
        return chosen
    said = f"has no configuration {chosen!r}" if chosen else "has several configurations"
    raise UserError(f"{name} {said}: choose one of {', '.join(names)} with --dataset-config")


def _name_splits(
    groups: dict[str, list[str]], name: str, choices: Choices
) -> tuple[dict[str, list[str]], list[str]]:
    """Give the files of train, validation and test, and the names of the splits that are left out."""
    chosen = choices.splits
    for given in chosen.keys() - groups.keys():
        raise UserError(f"{name} has no split {given!r}, only {', '.join(groups)}")
    taken: dict[str, str] = {}
    left_out = []
    for given in groups:
        split = chosen.get(given) or split_keyword(given)
        if split is None or (given not in chosen and split in chosen.values()):
            left_out.append(given)
        elif split in taken:
            raise UserError(
                f"{name}: {taken[split]} and {given} are both the {split} split: choose with --train-split "
                "or --test-split, or rename one"
            )
        else:
            taken[split] = given
    if not taken:
        raise UserError(
            f"{name} has no split that is named train or test, only {', '.join(groups)}: choose with "
            "--train-split and --test-split"
        )
    return {split: groups[taken[split]] for split in SPLITS if split in taken}, left_out


def _read_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        detail = str(error).split("\n")[0]
        raise UserError(f"{path} is no parquet file that can be read: {detail}") from error


@dataclass
class _Labels:
    """The labels of one file: codes (N,) are positions in names, or NO_LABEL. is_named: names are fixed."""

    file: str
    codes: np.ndarray
    names: list[str]
    is_named: bool


def _read_labels(path: Path, file: str, column: str, names: list[str] | None, split: str) -> _Labels:
    values = pq.read_table(path, columns=[column]).column(column).combine_chunks()
    if names is not None and pa.types.is_integer(values.type):
        codes = values.cast(pa.int64()).fill_null(NO_LABEL).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((codes < NO_LABEL) | (codes >= len(names)))
        if len(wrong):
            raise UserError(
                f"row {wrong[0]} of {file} (split {split}) has the label {codes[wrong[0]]}, but there are "
                f"{len(names)} class names, 0 to {len(names) - 1}: mend the labels or the names"
            )
        if len(set(names)) < len(names):
            raise UserError(f"{file} has a class name twice: {', '.join(names[:10])}")
        return _Labels(file, codes, names, is_named=True)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not is_plain_label(values.type):
        raise UserError(
            f"the label column {column!r} of {file} holds {values.type}: use whole numbers or text"
        )
    encoded = pc.dictionary_encode(values)
    codes = encoded.indices.fill_null(NO_LABEL).to_numpy(zero_copy_only=False).astype(np.int64)
    return _Labels(file, codes, [str(value) for value in encoded.dictionary.to_pylist()], is_named=False)


def _merge_classes(labels: list[_Labels], name: str) -> list[str]:
    """Give the classes of all files. UserError: some have fixed lists of classes that do not agree."""
    if not any(one.is_named for one in labels):
        return sort_labels({class_name for one in labels for class_name in one.names})
    longest = max(labels, key=lambda one: len(one.names) if one.is_named else 0)
    for one in labels:
        if not set(one.names) <= set(longest.names):
            raise UserError(
                f"{name}: the classes of {longest.file} are {_shorten(longest.names)}, those of {one.file} "
                f"are {_shorten(one.names)}: give both files the same names"
            )
    first = next(one for one in labels if one.is_named)
    return first.names if len(first.names) == len(longest.names) else longest.names


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... {len(names) - 10} more" if len(names) > 10 else "")


class _Rows:
    """The undecoded images of a split."""

    def __init__(self, root: Path, data: datasets.Dataset, column: str, described_as: str):
        self.root, self.data, self.column, self.described_as = root, data, column, described_as

    def cells(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Give {"bytes", "path"} of each row. A path without bytes is opened only inside the folder."""
        cells = self.data[list(rows)][self.column]
        for row, cell in zip(rows, cells, strict=True):
            if cell and cell["bytes"] is None and cell["path"] is not None:
                cell["path"] = self._inside(cell["path"], row)
        return [cell or {"bytes": None, "path": None} for cell in cells]

    def _inside(self, path: str, row: int) -> str:
        place = f"row {row} of {self.described_as}"
        relative = os.path.normpath(path)
        if os.path.isabs(relative) or relative.startswith(".."):
            raise UserError(f"{place} names {path}, which is outside the dataset's folder")
        if not (self.root / relative).is_file():
            raise UserError(f"{place} names {path}, but there is no such file in the dataset's folder")
        return str(self.root / relative)

    def files(self) -> list[str | None]:
        """Give the file name of each image, None where the table has none."""
        column = self.data.data.column(self.column)
        return [name for chunk in column.chunks for name in pc.struct_field(chunk, "path").to_pylist()]


def _load_images(root: Path, files: list[str], column: str, fingerprint: str, described_as: str) -> _Rows:
    """Let `datasets` map the image column into memory. A broken cache of `datasets` is built again."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()

    def load(mode: datasets.DownloadMode) -> datasets.Dataset:
        return datasets.load_dataset(
            "parquet",
            # The name is part of the cache's key, so other files never meet an old cache.
            name=hashlib.sha256(fingerprint.encode()).hexdigest()[:16],
            data_files={"rows": [_escape(str(root / file)) for file in files]},
            split="rows",
            columns=[column],
            features=datasets.Features({column: datasets.Image(decode=False)}),
            download_mode=mode,
        )

    try:
        try:
            data = load(datasets.DownloadMode.REUSE_DATASET_IF_EXISTS)
        except (pa.ArrowException, OSError, ValueError, datasets.exceptions.DatasetsError):
            data = load(datasets.DownloadMode.FORCE_REDOWNLOAD)
    except (pa.ArrowException, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:
            # The disk failed, not the dataset.
            raise UserError(
                f"the cache of datasets in {datasets.config.HF_DATASETS_CACHE} cannot be used: "
                f"{cause.strerror}; make room there, or set HF_DATASETS_CACHE to another folder"
            ) from error
        detail = str(cause).strip().split("\n")[0] or type(cause).__name__
        raise UserError(f"the images of {described_as} cannot be read from parquet: {detail}") from error
    return _Rows(root, data, column, described_as)


def _escape(path: str) -> str:
    """Let the library take a path for a name, not for a pattern."""
    return re.sub(r"([*?\[])", r"[\1]", path)
