"""Resizing against torchvision on single images."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from modeling.data.augment import (
    augment,
)
from modeling.data.resize import Preprocessing, preprocess, resize

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


HALF = (0.5, 0.5, 0.5)


def prep(size=32, crop=None, interpolation="bilinear"):
    return Preprocessing(
        image_size=size, mean=HALF, std=HALF, crop_fraction=crop, interpolation=interpolation
    )


def batch(n=24, height=32, width=32, seed=0):
    """Images with structure: smooth blobs plus noise, so that errors of geometry show."""
    g = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, 3, 5, 5, generator=g)
    smooth = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bicubic").clamp(0, 1)
    images = (255 * (0.8 * smooth + 0.2 * torch.rand(n, 3, height, width, generator=g))).to(torch.uint8)
    return images, torch.tensor([[height, width]] * n), torch.arange(100, 100 + n)


def ragged(shapes, seed=0):
    images = [batch(1, h, w, seed=seed + i)[0][0] for i, (h, w) in enumerate(shapes)]
    H, W = max(h for h, _ in shapes), max(w for _, w in shapes)
    padded = torch.zeros(len(shapes), 3, H, W, dtype=torch.uint8)
    for out, image in zip(padded, images, strict=True):
        out[:, : image.shape[1], : image.shape[2]] = image
    return images, padded, torch.tensor(shapes)


def assert_close_uint8(ours, theirs, most=2):
    """Equal but for rounding, once in each of the two directions."""
    assert torch.equal(ours, ours.to(torch.uint8)) and ours.shape == theirs.shape  # whole numbers
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= most, f"off by {difference.max()}"
    assert difference.float().mean() < 0.1


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("size", [16, 32, 48, 224])
def test_resize_without_crop_is_torchvisions(size, interpolation):
    shapes = [(32, 32), (40, 33), (17, 90), (300, 250)]
    images, padded, sizes = ragged(shapes)
    ours = resize(padded, sizes, prep(size, None, interpolation))
    for mine, image in zip(ours, images, strict=True):
        assert_close_uint8(
            mine, TF.resize(image, [size, size], interpolation=MODES[interpolation], antialias=True)
        )


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("crop", [0.875, 0.9, 1.0])
def test_resize_and_centre_crop_is_torchvisions(crop, interpolation):
    shapes = [(96, 96), (128, 170), (201, 128), (60, 61), (256, 256)]
    images, padded, sizes = ragged(shapes)
    ours = resize(padded, sizes, prep(224, crop, interpolation))
    for mine, image in zip(ours, images, strict=True):
        theirs = TF.resize(
            image, [math.floor(224 / crop)], interpolation=MODES[interpolation], antialias=True
        )
        assert_close_uint8(mine, TF.center_crop(theirs, [224, 224]))


def test_equal_size_is_untouched():
    images, sizes, indices = batch()
    assert torch.equal(resize(images, sizes, prep(32)), images)
    out = augment(images, sizes, prep(32), name="none", seed=1, epoch=0, indices=indices)
    assert torch.equal(out, preprocess(images, sizes, prep(32)))
    torch.testing.assert_close(out[0], TF.normalize(images[0] / 255, HALF, HALF))


def test_the_products_keep_all_bits_where_tf32_is_on():
    allowed, seen = torch.backends.cuda.matmul.allow_tf32, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "bmm" in func._schema.name:
                seen.append(torch.backends.cuda.matmul.allow_tf32)
            return func(*args, **(kwargs or {}))

    images, sizes, _ = batch(2)
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        with Watch():
            resize(images, sizes, prep(48))
        assert seen == [False, False] and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
