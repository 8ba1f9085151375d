"""Scan a folder of images: find its splits and classes, and count what is left out.

A split is a folder named as in SPLIT_KEYWORDS, at the top or below a single wrapping folder. A class is the
first folder below the split; its images may lie deeper. Without split folders, all images are "train".
"""

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from modeling.data.choices import Choices
from modeling.data.class_names import decode_class
from modeling.errors import UserError

SPLITS = ("train", "validation", "test")
SPLIT_COLUMN = "split"  # of a table, in lower or upper case

# The words that name a split, as in the library `datasets`.
SPLIT_KEYWORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# A folder of these names inside a class means that the tree is not what it seems.
_NEVER_INSIDE_A_CLASS = {"train", "training", "test", "testing", "validation", "valid", "val"}

# Pillow opens these too, but they are programs (EPS runs Ghostscript), stubs or video, not raster images.
_NOT_RASTER = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC"}
_LITTER = {
    "thumbs.db",
    "desktop.ini",
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "icon\r",
}
# Folders that train.py and evaluate.py write, and a file that shows that they did.
_OUTPUTS = {"checkpoints": "*.safetensors", "runs": "*/metrics.jsonl", "traces": "metrics.csv"}
LISTS = (".parquet", ".csv", ".tsv", ".jsonl")
NAMED = ("(folder)", "(split)")  # how a kind ends that is left out by name, without a count


@functools.cache
def raster_formats() -> list[str]:
    """Give the formats of raster images that the installed Pillow reads."""
    Image.init()
    return sorted(Image.OPEN.keys() - _NOT_RASTER)


@functools.cache
def image_extensions() -> frozenset[str]:
    """Give the file name extensions of raster_formats(), in lower case, with the dot."""
    formats = set(raster_formats())
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats)


def split_keyword(name: str) -> str | None:
    """Give the split that a folder or file name speaks of, or None. Example: "test_images" gives "test"."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    found = {SPLIT_KEYWORDS[word] for word in words if word in SPLIT_KEYWORDS}
    return found.pop() if len(found) == 1 else None


@dataclass(eq=False)
class Node:
    """A folder of the tree. files are the image files; stats are size, mtime, ctime and inode of each."""

    path: str  # relative to the dataset's folder; "" is that folder
    files: list[str] = field(default_factory=list)
    stats: list[tuple[int, int, int, int]] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    folders: list["Node"] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @functools.cached_property
    def num_images(self) -> int:
        """The number of images in this folder and below."""
        return len(self.files) + sum(node.num_images for node in self.folders)

    @property
    def children(self) -> list["Node"]:
        """The folders in this one that hold images, at any depth."""
        return [node for node in self.folders if node.num_images]

    def walk(self) -> Iterator["Node"]:
        """Yield this folder and all below."""
        yield self
        for node in self.folders:
            yield from node.walk()

    def count_left_out(self) -> Counter:
        """Count what is left out in this folder and below, by kind."""
        return sum((node.left_out for node in self.walk()), Counter())


def is_litter(name: str) -> bool:
    """Tell whether a name is hidden, or one that a system leaves in folders."""
    return name.startswith(".") or name.lower() in _LITTER


def scan(root: Path) -> Node:
    """Read a folder and all below. Links are followed; a link to a folder above itself is left out.

    UserError: a folder cannot be read.
    """
    return _scan(os.fspath(root), "", ())


def _scan(full: str, relative: str, above: tuple[tuple[int, int], ...]) -> Node:
    node = Node(relative)
    try:
        status = os.stat(full)
        with os.scandir(full) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {full} cannot be read: {error.strerror}") from error
    above = (*above, (status.st_dev, status.st_ino))
    extensions = image_extensions()
    for entry in entries:
        path = f"{relative}/{entry.name}" if relative else entry.name
        if is_litter(entry.name):
            node.left_out["hidden or of the system"] += 1
        elif entry.is_dir():
            if entry.is_symlink() and _identity(entry) in above:
                node.left_out["links to a folder above"] += 1
            elif not relative and _is_output(Path(entry.path)):
                node.left_out[f"{entry.name} (folder)"] += 1
            else:
                node.folders.append(_scan(entry.path, path, above))
        elif not entry.is_file():
            node.left_out["broken links" if entry.is_symlink() else "special files"] += 1
        else:
            extension = os.path.splitext(entry.name)[1].lower()
            if extension in extensions:
                status = entry.stat()
                node.files.append(entry.name)
                node.stats.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
                continue
            if extension in LISTS:
                node.lists.append(path)
            node.left_out[extension or "without extension"] += 1
    return node


def _identity(entry: os.DirEntry) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def _is_output(folder: Path) -> bool:
    return folder.name in _OUTPUTS and any(folder.glob(_OUTPUTS[folder.name]))


@dataclass
class FolderSplits:
    """The splits of a folder, and the names of the folders beside them that are left out."""

    splits: dict[str, Node]
    ignored: list[str]


def find_splits(root: Node, name: str, choices: Choices) -> FolderSplits:
    """Find the folders of the splits. Without any, the whole tree is "train".

    The user may choose folders by --train-split and --test-split. UserError: two folders are one split, or
    the tree can be read in two ways.
    """
    while not root.files and len(root.children) == 1 and _is_wrapper(root.children[0]):
        root = root.children[0]
    children = root.children
    chosen = choices.splits
    for folder in chosen.keys() - {node.name for node in children}:
        raise UserError(
            f"{name} has no folder {folder!r} with images, only {', '.join(node.name for node in children)}"
        )
    named = {}
    for node in children:
        split = chosen.get(node.name) or split_keyword(node.name)
        is_taken = split in chosen.values() and node.name not in chosen
        if split and not is_taken and _unwrap(node).children:
            named[node.name] = (split, _unwrap(node))
    is_certain = any(folder.lower() in SPLIT_KEYWORDS or folder in chosen for folder in named)
    others = [node.name for node in children if node.name not in named]
    strangers = [folder for folder in others if not split_keyword(folder)]
    if named and strangers and not is_certain:
        raise UserError(
            f"{name} holds {next(iter(named))}/, which may be a split, and {strangers[0]}/, which is none: "
            "choose the split's folder with --train-split, or give a folder that holds only classes"
        )
    if children and not named and all(node.name.lower() in SPLIT_KEYWORDS for node in children):
        return FolderSplits({}, [])  # splits without class folders
    if not named:
        _refuse_splits_inside_classes(root, name)
        return FolderSplits({"train": root}, [])
    splits: dict[str, Node] = {}
    for folder, (split, node) in named.items():
        if split in splits:
            raise UserError(
                f"{name}: {splits[split].name} and {folder} are both the {split} split: rename one, "
                "or choose with --train-split or --test-split"
            )
        _refuse_splits_inside_classes(node, name)
        splits[split] = node
    return FolderSplits(splits, others)


def _is_wrapper(node: Node) -> bool:
    """Tell whether a lone folder only wraps the splits: it holds split folders, which hold class folders."""
    if node.name.lower() in SPLIT_KEYWORDS:
        return False
    return any(split_keyword(child.name) and child.children for child in node.children) or (
        len(node.children) == 1 and not node.files and _is_wrapper(node.children[0])
    )


def _unwrap(split: Node) -> Node:
    """Give the folder that holds the classes: seg_train/seg_train is the split, not a class."""
    if not split.files and [node.name.lower() for node in split.children] == [split.name.lower()]:
        return split.children[0] if split.children[0].children else split
    return split


def _refuse_splits_inside_classes(split: Node, name: str) -> None:
    for class_node in split.children:
        for node in class_node.walk():
            if node is not class_node and node.num_images and node.name.lower() in _NEVER_INSIDE_A_CLASS:
                raise UserError(
                    f"{name}: {node.path}/ stands inside {class_node.path}/, so a split would be taken for "
                    f"images of the class {class_node.name!r}: give a folder that holds the splits"
                )


def left_out_above(node: Node, splits: Sequence[Node]) -> Counter:
    """Count what is left out in the folders that hold splits, by kind. The splits count for themselves."""
    if node in splits or not any(split in splits for split in node.walk()):
        return Counter()
    left_out = node.left_out + Counter({"images outside class folders": len(node.files)})
    for folder in node.folders:
        left_out += left_out_above(folder, splits)
    return left_out


@dataclass
class ImageFiles:
    """The image files of a split, sorted by path. classes names the class of each."""

    paths: list[str]  # relative to the dataset's folder
    classes: list[str]
    stats: list[tuple[int, int, int, int]]


def read_split(split: Node, name: str, left_out: Counter) -> ImageFiles:
    """List the images of the class folders of a split, and count in left_out what is not used.

    UserError: a class folder holds files, but no image; or its name is not UTF-8.
    """
    found = []
    left_out += split.left_out
    if split.files:
        left_out["images outside class folders"] += len(split.files)
    for class_node in split.folders:
        not_used = class_node.count_left_out()
        visible = Counter({kind: n for kind, n in not_used.items() if kind != "hidden or of the system"})
        if not class_node.num_images and visible:
            raise UserError(
                f"{name}: the class folder {class_node.path}/ holds no image that can be read, only "
                f"{describe_counts(visible)}: convert or remove them"
            )
        left_out += not_used
        if not class_node.num_images:
            left_out["empty folders"] += 1
            continue
        class_name = _class_name(class_node, name)
        for node in class_node.walk():
            for file, stat in zip(node.files, node.stats, strict=True):
                found.append((f"{node.path}/{file}", class_name, stat))
    found.sort()
    return ImageFiles(
        paths=[path for path, _, _ in found],
        classes=[class_name for _, class_name, _ in found],
        stats=[stat for _, _, stat in found],
    )


def _class_name(node: Node, name: str) -> str:
    try:
        node.name.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{name}: the name of the class folder {os.fsencode(node.path)!r} is not UTF-8: rename it"
        ) from None
    return decode_class(node.name)


def describe_counts(counts: Counter) -> str:
    """Example: "spare (folder), 40 .heic, 3 broken links". What has a name of its own comes first."""
    names = [kind for kind in sorted(counts) if kind.endswith(NAMED)]
    counted = [f"{n:,} {kind}" for kind, n in sorted(counts.items()) if n and not kind.endswith(NAMED)]
    return ", ".join(names + counted)


def digest_files(paths: Sequence[str], stats: Sequence[object]) -> str:
    """Give the SHA-256 of files' names and of what `stats` holds of each, such as sizes, times and inodes."""
    digest = hashlib.sha256()
    for path, stat in zip(paths, stats, strict=True):
        digest.update(os.fsencode(path) + b"\0" + repr(stat).encode() + b"\n")
    return digest.hexdigest()
