"""Labels in a table: a .csv, .tsv or .jsonl file with a row for each image."""

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling.data.choices import Choices
from modeling.data.folders import SPLIT_COLUMN, SPLITS, ImageFiles, Node, image_extensions, split_keyword
from modeling.errors import UserError

FILE_COLUMNS = ("file_name", "path", "image", "filename")
LABEL_COLUMNS = ("label", "class", "target")
EXTENSIONS = (".csv", ".tsv", ".jsonl")


@dataclass
class TableSplits:
    """The splits of a table, the columns that were taken, and the classes in order."""

    splits: dict[str, ImageFiles]
    file_column: str
    label_column: str
    classes: list[str]
    tables: list[str]


def read_tables(root: Path, paths: list[str], name: str, choices: Choices) -> TableSplits:
    """Read tables below the folder `root`. The file names in a table are relative to the table's folder.

    A column `split`, or else the name of the table or of its folder, says which split a row belongs to;
    without either it is "train".

    UserError: a column is missing or ambiguous; a file is missing, listed twice or outside root; a label is
    missing.
    """
    rows: dict[str, list[tuple[str, str, tuple]]] = {}
    seen: dict[str, str] = {}
    for path in paths:
        records = _read(root / path)
        if not records:
            raise UserError(f"the table {path} of {name} has no rows")
        columns = list(records[0])
        file_column = _choose(path, columns, FILE_COLUMNS, choices.image_column, "--image-column")
        label_column = _choose(path, columns, LABEL_COLUMNS, choices.label_column, "--label-column")
        # A row of .jsonl may have columns that the first row lacks.
        others = {column for record in records for column in record} - {label_column}
        split_column = next((column for column in others if str(column).lower() == SPLIT_COLUMN), None)
        for number, record in enumerate(records, 1):
            place = f"row {number} of {path}"
            if None in record:
                raise UserError(f"{place} has more cells than the table has columns: quote its cells")
            split = _split_of(record.get(split_column), path, place)
            file = _resolve(root, path, record.get(file_column), place)
            label = record.get(label_column)
            if label is None or label == "":
                raise UserError(f"{place} has no label in the column {label_column!r}")
            if file in seen:
                raise UserError(f"{place} names {file}, which {seen[file]} names already: remove one of them")
            seen[file] = place
            status = os.stat(root / file)
            stat = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            rows.setdefault(split, []).append((file, str(label), stat))
    splits = {}
    for split, found in rows.items():
        found.sort()
        splits[split] = ImageFiles(
            paths=[file for file, _, _ in found],
            classes=[label for _, label, _ in found],
            stats=[stat for _, _, stat in found],
        )
    classes = sort_labels({label for found in rows.values() for _, label, _ in found})
    return TableSplits(splits, file_column, label_column, classes, paths)


def sort_labels(labels: set[str]) -> list[str]:
    """Sort class names: in numerical order if all are whole numbers, else by their text."""
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def find_tables(root: Path, tree: Node) -> list[str]:
    """Find the tables that label the images of a folder: at its top, or metadata files further down.

    A file without the columns of a table of labels is no such table.
    """
    found = []
    for node in tree.walk():
        for path in node.lists:
            stem, extension = os.path.splitext(os.path.basename(path))
            is_candidate = extension.lower() in EXTENSIONS and (node is tree or stem == "metadata")
            if is_candidate and has_columns(root / path):
                found.append(path)
    return found


def has_columns(path: Path) -> bool:
    """Tell whether a file is a table with a column of files and one of labels, by the usual names."""
    try:
        columns = {column for row in _read(path, first_row_only=True) for column in row}
    except UserError:  # a file of another program
        return False
    return bool(columns.intersection(FILE_COLUMNS)) and bool(columns.intersection(LABEL_COLUMNS))


def _read(path: Path, first_row_only: bool = False) -> list[dict]:
    """Read the rows of a table. UserError: it is not UTF-8, or a line is no row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                lines = [line for line in ([next(file, "")] if first_row_only else file) if line.strip()]
                rows = [json.loads(line) for line in lines]
                if not all(isinstance(row, dict) for row in rows):
                    raise UserError(
                        f"{path}: each line must be a JSON object such as "
                        '{"file_name": "1.jpg", "label": "cat"}'
                    )
                return rows
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            if first_row_only:
                return [dict.fromkeys(reader.fieldnames or [])]
            return list(reader)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"the table {path} cannot be read: {error}") from error


def _choose(path: str, columns: list[str], usual: tuple[str, ...], chosen: str | None, flag: str) -> str:
    if chosen is not None:
        if chosen not in columns:
            raise UserError(f"{path} has no column {chosen!r} ({flag}), only {', '.join(map(str, columns))}")
        return chosen
    found = [column for column in columns if column in usual]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} has the columns {' and '.join(found)}: choose one with {flag}")
    raise UserError(
        f"{path} has none of the columns {', '.join(usual)}, only {', '.join(map(str, columns))}: "
        f"choose one with {flag}"
    )


def _split_of(value: str | None, path: str, place: str) -> str:
    if value:
        split = split_keyword(value)
        if split is None:
            raise UserError(f"{place} has the split {value!r}: use {', '.join(SPLITS)}")
        return split
    folder, _, file = path.rpartition("/")
    return split_keyword(os.path.splitext(file)[0]) or split_keyword(folder.rpartition("/")[2]) or "train"


def _resolve(root: Path, table: str, value: str | None, place: str) -> str:
    """Give the path of an image relative to root. UserError: it is missing, outside, or no image file."""
    if not value:
        raise UserError(f"{place} names no file")
    relative = os.path.normpath(os.path.join(os.path.dirname(table), value))
    if os.path.isabs(relative) or relative.startswith(".."):
        raise UserError(f"{place} names {value}, which is outside the folder {root}")
    if not (root / relative).is_file():
        raise UserError(f"{place} names {value}, but there is no file {root / relative}")
    if os.path.splitext(relative)[1].lower() not in image_extensions():
        raise UserError(f"{place} names {value}, which is no image that can be read")
    return relative


def as_numbers(names: list[str], classes: list[str]) -> np.ndarray:
    """Give the class number of each name, (N,) int64."""
    number = {name: i for i, name in enumerate(classes)}
    return np.fromiter((number[name] for name in names), dtype=np.int64, count=len(names))
