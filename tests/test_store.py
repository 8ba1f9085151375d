"""The store of decoded images: built once, equal to decoding anew, safe against kills and damage."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, call, make_image_folder
from PIL import Image

from modeling.data import decoding, store
from modeling.data.batches import training_steps
from modeling.data.images import Images
from modeling.data.images import decode as decode_images
from modeling.data.sources import load_source


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "decoded_images"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of two sizes in train, of one in test."""
    root = make_image_folder(tmp_path / "images", {"train": {"a": 9, "b": 9}, "test": {"a": 3, "b": 3}})
    return make_image_folder(root, {"train": {"c": 4}}, size=(30, 50))


def decode(folder: Path, split: str, rows=None, **options) -> Images:
    source = load_source(str(folder))
    rows = torch.arange(len(source.splits[split])) if rows is None else rows
    return decode_images(source, split, rows, **{"image_size": 32, "num_workers": 1} | options)


def images_of(images: Images) -> list[torch.Tensor]:
    return [images.pixels[index] for index in images.pixel_index.tolist()]


def no_decoding(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "read_image", lambda *_: pytest.fail("an image was decoded again"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_store_holds_what_decoding_gives_and_is_built_once(cache, folder, split, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store, "store_path", lambda *_: None)
        expected = decode(folder, split)
    assert not cache.exists()
    first = decode(folder, split)
    (path,) = (p for p in cache.iterdir() if p.is_dir())
    assert sorted(p.name for p in path.iterdir()) == ["pixels", "sizes.safetensors"]
    no_decoding(monkeypatch)
    for images in (first, decode(folder, split)):
        assert all(torch.equal(a, b) for a, b in zip(images_of(images), images_of(expected), strict=True))
        assert images.fingerprint() == expected.fingerprint()
        both = images.gather(torch.tensor([5, 0])), expected.gather(torch.tensor([5, 0]))
        assert torch.equal(both[0][0], both[1][0])
        assert torch.equal(both[0][1], both[1][1])
    few = decode(folder, split, torch.tensor([1, 4]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(images_of(few), [images_of(expected)[i] for i in (1, 4)], strict=True)
    )


def test_a_part_of_a_split_is_decoded_alone_and_what_is_in_memory_has_no_store(cache, folder):
    decode(folder, "train", torch.arange(5))
    source = load_source("digits")
    decode_images(source, "test", torch.arange(359), image_size=32, num_workers=1)
    assert not cache.exists()


def test_other_images_or_another_size_have_a_store_of_their_own(cache, folder):
    before = decode(folder, "test")
    path = folder / "test" / "a" / "0.png"
    os.utime(Image.new("RGB", (16, 20), "red").save(path) or path, (time.time() + 10,) * 2)
    after = decode(folder, "test")
    assert not torch.equal(before.gather(torch.tensor([0]))[0], after.gather(torch.tensor([0]))[0])
    decode(folder, "test", image_size=400)
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 3


def test_one_that_is_killed_leaves_nothing_that_counts_and_two_at_once_build_one(cache, folder, tmp_path):
    """Two processes build at once; the first to hold the lock is killed halfway, the other takes over."""
    code = (
        "import sys, time; sys.path.insert(0, '.'); import torch\n"
        "from modeling.data import decoding, images, sources\n"
        "read = decoding.read_image\n"
        "def slow(*args): time.sleep(0.1); print('image', flush=True); return read(*args)\n"
        "decoding.read_image = slow; source = sources.load_source(sys.argv[1])\n"
        "images.decode(source, 'train', torch.arange(22), image_size=32, num_workers=0); print('done')"
    )
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", code, str(folder)]
    first = subprocess.Popen(start, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "image\n"
    second = subprocess.Popen(start, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = subprocess.Popen(start, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    outputs = [process.communicate(timeout=100)[0].split() for process in (second, third)]
    assert all(output[-1] == "done" for output in outputs)
    assert sorted(output.count("image") for output in outputs) == [0, 22], "one built, the other waited"
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [""]


@pytest.mark.parametrize("name", ["pixels", "sizes.safetensors"])
def test_a_damaged_store_is_built_again(cache, folder, name):
    expected = decode(folder, "train").fingerprint()
    (path,) = (p for p in cache.iterdir() if p.is_dir())
    (path / name).write_bytes((path / name).read_bytes()[:-10])
    assert decode(folder, "train").fingerprint() == expected


def test_a_full_disk_is_one_line_and_the_next_run_builds(cache, folder, tmp_path, monkeypatch):
    flags = (
        "--model",
        "cnn_small",
        "--dataset",
        folder,
        "--image-size",
        16,
        "--max-steps",
        1,
        "--output-dir",
        tmp_path / "out",
    )

    class Full:
        def transpose(self, *_):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.np, "array", lambda _: Full())
        result = call("train", *flags)
    assert result.status == 1
    assert "No space left on device, where decoded images are kept" in result.err
    assert "Traceback" not in result.err
    assert call("train", *flags).status == 0
    assert not list(cache.glob("*.half"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_exceeds_the_limit_is_decoded_as_it_is_used_and_gives_the_same(
    cache, folder, num_workers, capsys
):
    turned = Image.new("RGB", (60, 20), "green")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "train" / "a" / "turned.jpg", exif=exif)
    turned.save(folder / "train" / "a" / "turned.tiff", exif=exif)
    Image.new("RGB", (900, 600), "blue").save(folder / "train" / "a" / "large.png")
    limited = decode(folder, "train", store_limit=1000, num_workers=num_workers)
    assert "above --store-limit" in capsys.readouterr().out
    assert isinstance(limited.pixels, decoding.Decoder) and not cache.exists()
    assert limited.fingerprint() == decode(folder, "train", store_limit=1000).fingerprint()
    assert limited.fingerprint() != decode(folder, "train", torch.arange(20), store_limit=1000).fingerprint()
    stored = decode(folder, "train", num_workers=num_workers)
    assert (
        torch.equal(limited.sizes, stored.sizes)
        and [60, 20] in limited.sizes.tolist()
        and [256, 384] in limited.sizes.tolist()
    )
    for one, other in zip(
        *(training_steps(i, seed=1, epoch=2, batch_size=5, mix=True) for i in (limited, stored)), strict=True
    ):
        for name, value in vars(one[0]).items():
            assert torch.equal(value, getattr(other[0], name)) if name != "features" else value is None


def test_a_run_without_a_store_ends_as_with_one(cache, folder, tmp_path):
    flags = (
        "--model",
        "cnn_small",
        "--dataset",
        folder,
        "--image-size",
        16,
        "--epochs",
        2,
        "--batch-size",
        4,
        "--augment",
        "light",
    )
    rows = []
    for limit in (0, 1):
        result = call("train", *flags, "--store-limit", limit, "--output-dir", tmp_path / f"{limit}")
        assert result.status == 0, result.err
        assert ("decoded as it is used" in result.out) == (limit == 0) and cache.exists() == (limit == 1)
        rows.append((tmp_path / f"{limit}" / "runs" / "cnn_small" / "metrics.jsonl").read_text())
    assert rows[0] == rows[1]


def test_an_image_that_is_not_used_may_be_broken(cache, folder):
    (folder / "train" / "a" / "0.png").write_bytes(b"junk")
    assert len(decode(folder, "train", torch.arange(5, 10))) == 5


def test_an_error_while_decoding_ahead_is_one_line(cache, folder, tmp_path, monkeypatch):
    flags = (
        "--model",
        "cnn_small",
        "--dataset",
        folder,
        "--image-size",
        16,
        "--epochs",
        1,
        "--output-dir",
        tmp_path,
        "--store-limit",
        0,
    )
    path = folder / "train" / "a" / "0.png"
    path.write_bytes(path.read_bytes()[:-300])  # its header is whole
    result = call("train", *flags)
    assert result.status == 2 and "cannot decode image" in result.err and "Traceback" not in result.err


def test_a_store_is_read_through_the_page_cache_not_into_memory(cache, tmp_path):
    """Training on a store of 60 MB takes little memory: its pages stay in the system's cache."""
    path = tmp_path / "store"
    path.mkdir()
    (path / "pixels").write_bytes(os.urandom(3 * 1000) * 20000)
    store.safetensors.torch.save_file(
        {"sizes": torch.tensor([[25, 40]]).repeat(20000, 1)}, path / "sizes.safetensors"
    )
    indices = torch.arange(20000)
    images = Images(
        store.read(path), indices, torch.tensor([[25, 40]] * 20000), indices % 10, indices, list("abcdefghij")
    )

    def own_kilobytes() -> int:
        return int(
            next(
                line
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("RssAnon")
            ).split()[1]
        )

    before = own_kilobytes()
    for micro_batches in training_steps(images, seed=0, epoch=0, batch_size=64):
        assert micro_batches[0].images.shape[1:] == (3, 25, 40)
    assert own_kilobytes() - before < 20_000
