"""Which images of a dataset a run uses: train and validation, and subsets. All draws are stratified."""

import hashlib

import torch

from modeling import randomness
from modeling.data.known import DEFAULT_VAL_FRACTION, find_known
from modeling.data.sources import Source
from modeling.data.stratified import stratified
from modeling.errors import UserError


def division_digest(source: Source) -> str | None:
    """Give the digest of the train split before it is divided; None without one.

    Two datasets with the same digest divide into the same train and validation images.
    """
    return split_digest(source, "train") if "train" in source.splits else None


def split_digest(source: Source, split_name: str) -> str:
    """Give the SHA-256 of the labels and files of a split. Of a file, its path in the dataset's folder and
    its size count.
    """
    split = source.splits[split_name]
    names = [source.classes[number] for number in split.labels.tolist()]
    return hashlib.sha256("\0".join([split.identity, *names]).encode()).hexdigest()


def describe_change(source: Source, trained_on: dict) -> str | None:
    """Say how the train split of `source` differs from that of the training; None: they are equal.

    trained_on is the `dataset` entry of a checkpoint's header.
    """
    if division_digest(source) == trained_on["division_sha256"]:
        return None
    now = len(source.splits["train"]) if "train" in source.splits else 0
    then = trained_on["read"]["splits"].get("train", 0)
    if now != then:
        return f"its train split has {now:,} images and had {then:,}"
    return f"the labels or files of its {now:,} training images changed"


def choose_val_fraction(source: Source, given: float | None) -> float:
    """Give the share of train that becomes validation if the dataset has no validation split.

    given is what the user chose, or None. UserError: the user chose a share, but the dataset has the split.
    """
    if given and "validation" in source.splits:
        raise UserError(f"{source.name} has a validation split: leave out --val-fraction {given}")
    known = find_known(source.name)
    return given or (known.val_fraction if known else DEFAULT_VAL_FRACTION)


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
