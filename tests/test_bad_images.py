"""Images that cannot be decoded, odd ones, duplicates, and caches that were damaged."""

import io

import numpy as np
import pytest
import torch
from conftest import assert_refused, call, make_image_folder
from PIL import Image

from modeling.data import decoding, store
from modeling.data.images import count_duplicates, decode
from modeling.data.sources import load_source
from modeling.data.stratified import stratified
from modeling.errors import UserError

FLAGS = ("--model", "cnn_small", "--image-size", 16, "--batch-size", 8, "--max-steps", 2, "--num-workers", 1)


def decode_good(source, split, rows, store_limit=1e9):
    return decode(
        source,
        split,
        rows,
        image_size=16,
        num_workers=1,
        store_limit=store_limit,
        skip_bad_images=True,
    )


@pytest.fixture
def folder(tmp_path):
    """24 training images, of which two are broken, and a test split that holds two of them again."""
    root = make_image_folder(tmp_path / "d", {"train": {"a": 12, "b": 12}, "test": {"a": 3, "b": 3}})
    (root / "test" / "a" / "0.png").write_bytes((root / "train" / "b" / "4.png").read_bytes())
    (root / "test" / "b" / "9.png").write_bytes((root / "train" / "b" / "5.png").read_bytes())
    for name in ("train/a/3.png", "train/b/7.png"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 2])
    return root


def test_bad_images_are_refused_by_name_or_skipped_and_listed(folder, tmp_path):
    result = call("train", *FLAGS, "--dataset", folder, "--output-dir", tmp_path / "out")
    assert_refused(result, "cannot decode image", "train/a/3.png")
    flags = ("--dataset", folder, "--output-dir", tmp_path / "out", "--skip-bad-images")
    result = call("train", *FLAGS, *flags)
    assert result.status == 0, result.err
    assert "images cannot be decoded and are skipped" in result.out
    listed = (tmp_path / "out" / "runs" / "cnn_small" / "bad_images.txt").read_text().split()
    assert {"train/a/3.png", "train/b/7.png"} == set(listed[1::2])
    # The store now has holes. A run without the flag must not take them for images.
    result = call("train", *FLAGS, "--dataset", folder, "--output-dir", tmp_path / "again")
    assert_refused(result, "cannot decode image", "train/a/3.png")


@pytest.mark.parametrize("store_limit", [0, 1e9], ids=["decoded as used", "stored"])
def test_the_images_that_are_left_are_the_same_however_they_are_kept(folder, store_limit):
    source = load_source(str(folder))
    images = decode_good(source, "train", torch.arange(24), store_limit)
    few = decode_good(source, "train", torch.arange(2, 9))  # in memory
    assert (len(images), len(few)) == (22, 6)
    assert images.skipped == ["train/a/3.png", "train/b/7.png"]
    assert few.rows.tolist() == [2, 3, 4, 6, 7, 8]  # row 5 is a/3.png: the files are sorted by name
    positions = [images.rows.tolist().index(row) for row in few.rows.tolist()]
    assert torch.equal(images.gather(torch.tensor(positions))[0], few.gather(torch.arange(6))[0])


def test_pixels_that_are_in_two_splits_are_counted(folder, tmp_path):
    flags = ("--dataset", folder, "--output-dir", tmp_path / "out", "--skip-bad-images")
    result = call("train", *FLAGS, *flags, "--val-fraction", 0.1)
    assert "of 7 test images have the same pixels as a training image" in result.out
    source = load_source(str(folder))
    train, test = (
        decode_good(source, "train", torch.arange(24)),
        decode_good(source, "test", torch.arange(7)),
    )
    assert count_duplicates({"train": train, "validation": train, "test": test}) == {
        "validation": 22,
        "test": 2,
    }
    assert count_duplicates({"train": test, "test": train.subset(torch.arange(3))}) == {"test": 0}


def test_a_split_of_bad_images_alone_is_refused(tmp_path):
    root = make_image_folder(tmp_path / "d", {"train": {"a": 2, "b": 2}})
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="no image of split train of .* can be decoded"):
        decode_good(load_source(str(root)), "train", torch.tensor([1]))


@pytest.mark.parametrize("damage", ["zeros", "cut", "sizes"])
def test_a_damaged_store_is_built_again(folder, tmp_path, damage):
    pixels = [Image.fromarray(np.full((4, 5, 3), 10 * i, np.uint8)) for i in range(6)]
    path = tmp_path / "store"
    store.build(path, pixels)
    whole = (path / "pixels").read_bytes()
    if damage == "sizes":
        (path / "sizes.safetensors").write_bytes(b"x")
    else:
        (path / "pixels").write_bytes(bytes(len(whole)) if damage == "zeros" else whole[:-1])
    assert not store.is_whole(path)
    store.build(path, pixels)
    assert (path / "pixels").read_bytes() == whole


@pytest.mark.parametrize("dark", [255, 4095])
def test_a_16_bit_image_of_fewer_bits_is_warned_about_once(capsys, monkeypatch, dark):
    monkeypatch.setattr(decoding, "_warned_of_12_bits", [])
    for brightest, says in ((65535, ""), (dark, f"no value above {dark}"), (dark, "")):
        buffer = io.BytesIO()
        Image.fromarray(np.array([[0, brightest]], dtype=np.uint16)).save(buffer, "TIFF")
        decoding.read_image({"bytes": buffer.getvalue(), "path": None}, "row 3")
        out = capsys.readouterr().out
        assert says in out and bool(out) == bool(says)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0not a TIFF"])
def test_exif_that_cannot_be_read_is_no_reason_to_refuse_pixels(exif):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 8, 7)).save(buffer, "JPEG", exif=exif)
    cell = {"bytes": buffer.getvalue(), "path": None}
    assert decoding.read_size(cell, "here") == (6, 4)
    assert decoding.read_image(cell, "here").size == (6, 4)


def test_only_raster_images_are_opened_whatever_their_names(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="cannot decode"):
        decoding.read_image({"bytes": eps, "path": None}, "x.png")


def test_equal_shares_are_decided_by_the_keys_not_by_the_alphabet():
    labels = torch.arange(40).repeat_interleave(5)
    chosen = [set(labels[stratified(labels, 20, seed, 1)].tolist()) for seed in range(3)]
    assert all(len(classes) == 20 for classes in chosen)
    assert chosen[0] != chosen[1] != chosen[2]
    assert all(classes != set(range(20)) for classes in chosen)
