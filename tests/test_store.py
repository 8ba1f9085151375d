"""The store of decoded images: built once, the same as decoding anew, safe against kills, damage and each other."""

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

from modeling import data, store


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "decoded_images"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of two sizes in train, of one in test."""
    root = make_image_folder(tmp_path / "images", {"train": {"a": 9, "b": 9}, "test": {"a": 3, "b": 3}})
    return make_image_folder(root, {"train": {"c": 4}}, size=(30, 50))


def decode(folder: Path, split: str, rows=None, **options) -> data.Images:
    source = data.load_source(str(folder))
    rows = torch.arange(len(source.splits[split])) if rows is None else rows
    return data.decode(source, split, rows, **{"image_size": 32, "num_threads": 1} | options)


def images_of(images: data.Images) -> list[torch.Tensor]:
    return [images.pixels[index] for index in images.where.tolist()]


def no_decoding(monkeypatch) -> None:
    monkeypatch.setattr(data, "read_image", lambda *_: pytest.fail("an image was decoded again"))


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
    assert all(torch.equal(a, b) for a, b in zip(images_of(few), [images_of(expected)[i] for i in (1, 4)], strict=True))


def test_a_part_of_a_split_is_decoded_alone_and_what_is_in_memory_has_no_store(cache, folder):
    decode(folder, "train", torch.arange(5))
    source = data.load_source("digits")
    data.decode(source, "test", torch.arange(359), image_size=32, num_threads=1)
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
        "import sys, time; sys.path.insert(0, '.'); import torch; from modeling import data\n"
        "read = data.read_image\n"
        "def slow(*args): time.sleep(0.1); print('image', flush=True); return read(*args)\n"
        "data.read_image = slow; source = data.load_source(sys.argv[1])\n"
        "data.decode(source, 'train', torch.arange(22), image_size=32, num_threads=0); print('done')"
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
    flags = ("--model", "cnn_small", "--dataset", folder, "--image-size", 16, "--max-steps", 1, "--output-dir", tmp_path / "out")

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
