"""Names, folders and hub ids become splits and classes."""

import dataclasses
import errno
import os

import datasets
import numpy as np
import pytest
import torch
from conftest import make_image_folder
from PIL import Image

from modeling.data.division import choose_val_fraction, select_rows
from modeling.data.images import decode
from modeling.data.sources import load_source
from modeling.data.stratified import stratified
from modeling.errors import UserError


def ramp(height=24, width=16):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 10, x * 15, (x + y) * 6], axis=2).astype(np.uint8)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = load_source("digits")
    sizes = {split: len(rows) for split, rows in source.splits.items()}
    assert sizes == {"train": 1438, "test": 359}
    assert source.classes == [str(d) for d in range(10)]
    images = decode(source, "test", torch.arange(359), image_size=None, num_workers=2)
    assert images.pixels.shape == (359, 3, 32, 32)
    # every digit stands in exactly one split, and the class shares are those of the whole
    both = torch.cat(
        [images.pixels, decode(source, "train", torch.arange(1438), image_size=None, num_workers=2).pixels]
    )
    small = torch.nn.functional.avg_pool2d(both[:, :1].float(), 4)[:, 0]
    reference = torch.from_numpy(load_digits().images).float() * (255 / 16)
    assert torch.cdist(small.flatten(1), reference.flatten(1)).argmin(dim=1).unique().numel() > 1780
    expected = np.bincount(load_digits().target) / 1797
    assert np.abs(source.labels("test").bincount().numpy() / 359 - expected).max() < 0.003


def test_parquet_and_image_folder_are_read_by_features_not_by_names(tmp_path):
    features = datasets.Features(
        {
            "tag": datasets.ClassLabel(names=["x", "y"]),
            "photo": datasets.Image(),
            "id": datasets.Value("int64"),
        }
    )
    rows = {"tag": [1, 0, 1], "photo": [Image.fromarray(ramp() + i) for i in range(3)], "id": [7, 8, 9]}
    (tmp_path / "p").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "p" / "train.parquet")
    source = load_source(str(tmp_path / "p"))
    assert (source.columns, source.classes) == (("photo", "tag"), ["x", "y"])
    images = decode(source, "train", torch.tensor([0, 2]), image_size=None, num_workers=1)
    assert torch.equal(images.gather(torch.tensor([1]))[0][0], torch.from_numpy(ramp() + 2).permute(2, 0, 1))
    assert images.labels.tolist() == [1, 1]
    assert images.rows.tolist() == [0, 2]

    folder = make_image_folder(
        tmp_path / "f", {"train": {"cat's": 3, "Ünïcode dog": 2, "a,b $x$ [1]": 2}, "val": {"cat's": 1}}
    )
    source = load_source(str(folder))
    assert source.classes == sorted(["cat's", "Ünïcode dog", "a,b $x$ [1]"])
    assert {split: len(rows) for split, rows in source.splits.items()} == {"train": 7, "validation": 1}


@pytest.mark.parametrize(
    "counts, message",
    [
        ({}, "holds no images: it is empty"),
        ({"train": {}}, "holds no images"),
        ({"train": {".": 3}}, "holds 3 images but no class folders"),
    ],
    ids=["empty", "no classes", "flat"],
)
def test_a_useless_folder_is_refused(tmp_path, counts, message):
    folder = tmp_path / "images"
    folder.mkdir()
    make_image_folder(folder, counts)
    with pytest.raises(ValueError, match=message):
        load_source(str(folder))


def test_stratified_takes_each_class_by_its_share():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[
        torch.randperm(100, generator=torch.Generator().manual_seed(0))
    ]
    for n in (0, 1, 10, 37, 99, 100):
        chosen = stratified(labels, n, 42, 1)
        assert len(chosen) == n == len(chosen.unique())
        counts = labels[chosen].bincount(minlength=3)
        assert (counts - torch.tensor([0.5, 0.3, 0.2]) * n).abs().max() < 1
    assert torch.equal(stratified(labels, 20, 42, 1), stratified(labels, 20, 42, 1))
    assert not torch.equal(stratified(labels, 20, 42, 1), stratified(labels, 20, 43, 1))
    sorted_labels = labels.sort().values  # never the first n
    assert stratified(sorted_labels, 10, 42, 1)[0] != 0 or stratified(sorted_labels, 10, 42, 1)[1] != 1


def test_the_share_for_validation_depends_on_the_dataset_and_is_refused_where_it_means_nothing(tmp_path):
    source = load_source("digits")
    assert choose_val_fraction(source, None) == 0.1 and choose_val_fraction(source, 0.3) == 0.3
    assert choose_val_fraction(dataclasses.replace(source, name="tanganke/stl10"), None) == 0.2
    source = load_source(
        str(make_image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "validation": {"a": 1, "b": 1}}))
    )
    assert choose_val_fraction(source, None) == 0.1
    with pytest.raises(UserError, match="has a validation split: leave out --val-fraction 0.3"):
        choose_val_fraction(source, 0.3)


def test_train_and_validation_divide_the_train_split():
    source = load_source("digits")
    options = dict(val_fraction=0.1, seed=42)
    own, train = select_rows(source, "train", **options)
    _, validation = select_rows(source, "validation", **options)
    assert own == "train"
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(1438))
    assert len(validation) == 144
    _, limited = select_rows(source, "train", limit_train=100, **options)
    assert len(limited) == 100
    assert set(limited.tolist()) < set(train.tolist())
    _, limited = select_rows(source, "test", limit_eval=50, **options)
    assert source.labels("test")[limited].bincount().tolist() == [5] * 10
    _, other = select_rows(source, "validation", val_fraction=0.1, seed=43)
    assert not torch.equal(validation, other)


def test_a_validation_split_of_its_own_is_used_as_it_is(tmp_path):
    source = load_source(
        str(make_image_folder(tmp_path, {"train": {"a": 5, "b": 5}, "validation": {"a": 2, "b": 2}}))
    )
    assert select_rows(source, "train", val_fraction=0.5, seed=1)[1].tolist() == list(range(10))
    assert select_rows(source, "validation", val_fraction=0.5, seed=1)[0] == "validation"
    with pytest.raises(ValueError, match="no split 'test', only train, validation"):
        select_rows(source, "test", val_fraction=0.5, seed=1)


def test_split_folders_in_any_case_and_never_two_for_one_split(tmp_path):
    folder = make_image_folder(tmp_path / "a", {"Train": {"x": 3, "y": 3}, "Test": {"x": 2, "y": 1}})
    assert {split: len(rows) for split, rows in load_source(str(folder)).splits.items()} == {
        "train": 6,
        "test": 3,
    }
    make_image_folder(folder, {"testing": {"x": 2, "y": 1}})
    with pytest.raises(ValueError, match="Test and testing are both the test split"):
        load_source(str(folder))


def test_classes_called_as_splits_are_classes(tmp_path):
    make_image_folder(tmp_path / "flat", {".": {"test": 3, "zz": 4}})
    source = load_source(str(tmp_path / "flat"))
    assert (source.classes, {split: len(rows) for split, rows in source.splits.items()}) == (
        ["test", "zz"],
        {"train": 7},
    )
    make_image_folder(tmp_path / "deep", {"train": {"a": 3, "test": 4}, "spare": {"a": 1}})
    source = load_source(str(tmp_path / "deep"))
    assert (source.classes, {split: len(rows) for split, rows in source.splits.items()}) == (
        ["a", "test"],
        {"train": 7},
    )
    assert "left out: spare (folder)" in source.describe()


def test_a_split_without_labels_is_left_out_and_said_so(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    for split, labels in (("train", [0, 1, 1]), ("test", [-1, -1, -1])):
        rows = {"image": [Image.fromarray(ramp())] * 3, "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    source = load_source(str(tmp_path))
    assert set(source.splits) == {"train"}
    assert "left out: 3 images of test (without labels)" in source.describe()
    rows["label"] = [0, 1, -1]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="row 2 of split test of .* has no label"):
        load_source(str(tmp_path)).labels("test")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOLCK, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_named_as_what_it_is(number, tmp_path, monkeypatch):
    rows = {"image": [{"bytes": b"x", "path": None}], "label": ["a"]}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d" / "train.parquet")

    def fail(*_, **__):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=f"cache of datasets in .*{os.strerror(number)}.*HF_DATASETS_CACHE"):
        load_source(str(tmp_path / "d"))
