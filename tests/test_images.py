"""Images keep their pixels, whatever their shapes and the number of threads."""

import numpy as np
import pytest
import torch
from conftest import make_image_folder
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from modeling.data.images import decode, native_size
from modeling.data.sources import load_source


def test_a_broken_file_of_a_folder_is_named_by_its_path(tmp_path):
    folder = make_image_folder(tmp_path / "images", {"train": {"a": 4, "b": 4}})
    broken = folder / "train" / "b" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source = load_source(str(folder))
    with pytest.raises(ValueError, match=str(broken)):
        decode(source, "train", torch.arange(8), image_size=None, num_workers=2)


def test_images_of_many_shapes_keep_their_pixels_and_large_ones_are_reduced(tmp_path):
    folder = tmp_path / "images"
    shapes = {"a": (40, 30), "b": (20, 90), "c": (600, 400)}
    for name, (h, w) in shapes.items():
        make_image_folder(folder, {"train": {name: 1}}, size=(h, w))
    source = load_source(str(folder))
    images = decode(source, "train", torch.arange(3), image_size=32, num_workers=2)
    assert images.sizes.tolist() == [[40, 30], [20, 90], [384, 256]]
    original = torch.from_numpy(np.array(Image.open(folder / "train" / "a" / "0.png"))).permute(2, 0, 1)
    batch, sizes = images.gather(torch.tensor([1, 0]))
    assert batch.shape == (2, 3, 40, 90)
    assert torch.equal(batch[1, :, :40, :30], original)
    assert not batch[1, :, :, 30:].any()
    assert sizes.tolist() == [[20, 90], [40, 30]]
    reduced = Image.open(folder / "train" / "c" / "0.png").resize((256, 384), Image.Resampling.BICUBIC)
    difference = TF.pil_to_tensor(reduced).int() - images.pixels[2].int()
    assert difference.abs().float().mean() < 2
    large = decode(source, "train", torch.arange(3), image_size=350, num_workers=2)
    assert large.sizes.tolist()[2] == [600, 400]


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([[40, 40]] * 3, 40),
        ([[300, 300]] * 3, 224),
        ([[128, 170], [200, 140], [130, 130]], 128),
        ([[500, 400], [600, 300]], 224),
        ([[28, 28], [28, 29], [29, 28]], 28),
        ([[63, 80]] * 3, 60),
        ([[3, 5]], 4),
    ],
)
def test_the_native_size_of_equal_squares_and_of_photographs(sizes, side):
    assert native_size(torch.tensor(sizes)) == side


def test_threads_change_nothing_not_even_a_bit(clothing):
    source = load_source(str(clothing))
    rows = torch.arange(0, 3000, 20)
    none, two = (decode(source, "train", rows, image_size=64, num_workers=n) for n in (0, 2))
    assert isinstance(none.pixels, list)
    assert all(torch.equal(a, b) for a, b in zip(none.pixels, two.pixels, strict=True))
    assert torch.equal(none.sizes, two.sizes)


def test_equal_images_have_equal_fingerprints():
    source = load_source("digits")
    one, same, other = (
        decode(source, "train", rows, image_size=None, num_workers=2)
        for rows in map(torch.arange, (20, 20, 21))
    )
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
