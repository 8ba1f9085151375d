"""Every augmentation against torchvision on single images; no image depends on its batch."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from modeling.data.augment import (
    _ANGLE,
    _FLIP,
    _JITTER,
    _PAD_X,
    _PAD_Y,
    AUGMENT_SETS,
    augment,
    color_jitter,
    padded_crop,
    random_crop_boxes,
    reflected_shift,
    rotate,
)
from modeling.data.randaugment import _RANDAUGMENT, _randaugment_ops, randaugment
from modeling.data.resize import Preprocessing, resample
from modeling.randomness import Draws

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


def test_random_resized_crop_is_torchvisions_with_the_same_box():
    shapes = [(96, 96), (50, 120), (130, 64), (32, 32)] * 4
    images, padded, sizes = ragged(shapes)
    flip = torch.arange(len(shapes)) % 2 == 0
    boxes = random_crop_boxes(sizes, Draws(1, 2, torch.arange(len(shapes))), scale=(0.8, 1.0))
    ours = resample(padded, boxes, torch.full_like(sizes, 64), torch.zeros_like(sizes), 64, flip, "bilinear")
    for mine, image, box, mirrored in zip(ours, images, boxes.tolist(), flip, strict=True):
        theirs = TF.resized_crop(image, *box, size=[64, 64], antialias=True)
        assert_close_uint8(mine, TF.horizontal_flip(theirs) if mirrored else theirs)


def test_crop_boxes_have_torchvisions_distribution():
    n = 4000
    sizes = torch.tensor([[96, 128]] * n)
    ours = random_crop_boxes(sizes, Draws(0, 0, torch.arange(n)), scale=(0.8, 1.0)).double()
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(64, scale=(0.8, 1.0))
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    theirs = [reference.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).double()
    assert (ours[:, 0] >= 0).all() and (ours[:, 0] + ours[:, 2] <= 96).all()
    assert (ours[:, 1] >= 0).all() and (ours[:, 1] + ours[:, 3] <= 128).all()
    error = (ours.var(0) / n + theirs.var(0) / n).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=0.1)


def test_crop_box_falls_back_to_the_centre():
    boxes = random_crop_boxes(
        torch.tensor([[10, 1000], [1000, 10]]), Draws(0, 0, torch.arange(2)), scale=(0.8, 1.0)
    )
    assert boxes.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]


def test_color_jitter_is_torchvisions_in_the_same_order():
    images, sizes, indices = batch(40)
    draws = Draws(3, 1, indices)
    boxes = torch.cat([torch.full_like(sizes, 3), sizes - 5], dim=1)
    ours = color_jitter(images, boxes, draws)[:, :, 3:-2, 3:-2]
    factors = torch.stack([0.8 + 0.4 * draws(_JITTER + i) for i in range(3)], dim=1)
    order = torch.stack([draws(_JITTER + 3 + i) for i in range(3)], dim=1).argsort(dim=1)
    assert len({tuple(o) for o in order.tolist()}) == 6
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    for mine, image, factor, sequence in zip(ours, images, factors, order.tolist(), strict=True):
        image = image[:, 3:-2, 3:-2]  # the mean that contrast is about is the box's
        for op in sequence:
            image = ops[op](image, float(factor[op]))
        assert_close_uint8(mine, image)
    assert factors.min() >= 0.8 and factors.max() <= 1.2


def test_light_is_torchvisions_crop_and_then_jitter():
    """Ours changes colours before the resize: equal but for rounding, and for values cut at 0 or 255."""
    images, sizes, indices = batch(40, 96, 96)
    images = images // 2 + 40
    ours = augment(images, sizes, prep(224), name="light", seed=3, epoch=1, indices=indices) * 127.5 + 127.5
    draws = Draws(3, 1, indices)
    boxes = random_crop_boxes(sizes, draws, scale=(0.8, 1.0)).tolist()
    factors, order = 0.8 + 0.4 * draws(_JITTER, 3), draws(_JITTER + 3, 3).argsort(dim=1)
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]
    for mine, image, box, mirrored, factor, sequence in zip(
        ours, images, boxes, draws(_FLIP) < 0.5, factors, order, strict=True
    ):
        image = TF.resized_crop(image, *box, size=[224, 224], antialias=True)
        for op in sequence.tolist():
            image = ops[op](image, float(factor[op]))
        difference = (mine - (TF.horizontal_flip(image) if mirrored else image).float()).abs()
        assert difference.max() < 4 and difference.mean() < 1


def test_padded_crop_is_torchvisions():
    images, _, indices = batch(40)
    draws = Draws(3, 1, indices)
    ours = padded_crop(images, draws)
    tops, lefts = (torch.floor(draws(d) * 9).int().tolist() for d in (_PAD_Y, _PAD_X))
    assert set(tops) | set(lefts) <= set(range(9)) and len(set(tops)) > 5
    for mine, image, top, left in zip(ours, images, tops, lefts, strict=True):
        assert torch.equal(mine, TF.crop(TF.pad(image, [4]), top, left, 32, 32))


def test_crop_is_a_flip_and_a_padded_crop_pixel_by_pixel():
    images, sizes, indices = batch(40)
    x = augment(images, sizes, prep(32), name="crop", seed=3, epoch=1, indices=indices)
    ours = (x * 127.5 + 127.5).round().int()  # without the normalisation
    draws = Draws(3, 1, indices)
    flips = (draws(_FLIP) < 0.5).tolist()
    tops, lefts = (torch.floor(draws(d) * 9).int().tolist() for d in (_PAD_Y, _PAD_X))
    for mine, image, flip, top, left in zip(ours, images, flips, tops, lefts, strict=True):
        expected = torch.zeros_like(image)
        for row in range(32):
            for column in range(32):
                y, x = row + top - 4, column + left - 4
                if 0 <= y < 32 and 0 <= x < 32:
                    expected[:, row, column] = image[:, y, 31 - x if flip else x]
        assert torch.equal(mine, expected.int())


def test_shift_is_torchvisions_reflected_padding_and_crop():
    images, _, indices = batch(40)
    draws = Draws(3, 1, indices)
    ours = reflected_shift(images, draws)
    tops, lefts = (torch.floor(draws(d) * 5).int().tolist() for d in (_PAD_Y, _PAD_X))
    assert set(tops) == set(lefts) == set(range(5))
    for mine, image, top, left in zip(ours, images, tops, lefts, strict=True):
        assert torch.equal(mine, TF.crop(TF.pad(image, [2], padding_mode="reflect"), top, left, 32, 32))


def test_shift_shows_each_image_both_ways_in_two_epochs():
    images, sizes, indices = batch(40, height=15, width=15)  # too small to be shifted
    epochs = [
        augment(images, sizes, prep(15), name="shift", seed=3, epoch=epoch, indices=indices)
        for epoch in range(4)
    ]
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert torch.equal(epochs[0].flip(3), epochs[1])
    plain = augment(images, sizes, prep(15), name="none", seed=3, epoch=0, indices=indices)
    assert 10 < int((epochs[0] == plain).flatten(1).all(dim=1).sum()) < 30


def test_rotation_is_torchvisions():
    images, _, indices = batch(40)
    draws = Draws(3, 1, indices)
    ours = rotate(images, draws)
    angles = 15 * (2 * draws(_ANGLE) - 1)
    assert angles.min() < -10 and angles.max() > 10
    for mine, image, angle in zip(ours, images, angles.tolist(), strict=True):
        theirs = TF.rotate(image, angle, interpolation=InterpolationMode.BILINEAR, fill=None)
        assert_close_uint8(mine[:, 4:-4, 4:-4], theirs[:, 4:-4, 4:-4])
        assert (mine.int() - theirs.int()).abs().float().mean() < 1


NAMES = "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness".split()


NAMES += "Posterize Solarize AutoContrast Equalize".split()


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("number", range(14), ids=NAMES)
def test_each_randaugment_op_is_torchvisions(number, size):
    images, _, _ = batch(2, size, size)
    reference = v2.RandAugment()
    magnitudes, signed = reference._AUGMENTATION_SPACE[NAMES[number]]
    magnitudes = magnitudes(31, size, size)
    for sign in (-1, 1):
        magnitude = 0.0 if magnitudes is None else float(magnitudes[9]) * (sign if signed else 1)
        ours = _randaugment_ops(size)[number](images, sign)
        for mine, image in zip(ours, images, strict=True):
            theirs = reference._apply_image_or_video_transform(
                image,
                NAMES[number],
                magnitude,
                interpolation=InterpolationMode.NEAREST,
                fill={torch.Tensor: None},
            )
            assert_close_uint8(mine, theirs, most=1)  # the magnitude is a float32 there


def test_randaugment_applies_the_two_ops_that_were_drawn():
    images, _, indices = batch(64)
    draws = Draws(5, 0, indices)
    ours = randaugment(images, draws)
    ops, seen = _randaugment_ops(32), set()
    for i, image in enumerate(images):
        out = image[None]
        for slot in range(2):
            number = int(draws(_RANDAUGMENT + 2 * slot)[i] * 14)
            sign = -1 if draws(_RANDAUGMENT + 2 * slot + 1)[i] < 0.5 else 1
            seen.add((number, sign))
            out = ops[number](out, sign)
        assert torch.equal(ours[i], out[0])
    assert len(seen) > 20


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", AUGMENT_SETS)
def test_an_image_does_not_depend_on_its_batch_or_its_place_in_it(name, size):
    _, padded, sizes = ragged([(32, 32), (40, 33), (30, 90), (64, 50)] * 6)
    indices = torch.arange(24) * 7
    kwargs = dict(name=name, seed=42, epoch=3)
    whole = augment(padded, sizes, prep(size), indices=indices, **kwargs)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    other = augment(padded[shuffled], sizes[shuffled], prep(size), indices=indices[shuffled], **kwargs)
    assert torch.equal(other, whole[shuffled])
    for i in (0, 5, 10, 23):
        h, w = sizes[i]  # alone, it is not padded either
        alone = augment(
            padded[i : i + 1, :, :h, :w], sizes[i : i + 1], prep(size), indices=indices[i : i + 1], **kwargs
        )
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("name", ["crop", "shift", "light", "standard", "randaugment"])
def test_an_augmentation_changes_with_seed_epoch_and_index(name):
    images, sizes, indices = batch(32)

    def run(seed=1, epoch=0, indices=indices):
        return augment(images, sizes, prep(32), name=name, seed=seed, epoch=epoch, indices=indices)

    assert torch.equal(run(), run())
    for other in (run(seed=2), run(epoch=1), run(indices=indices + 1)):
        changed = (other != run()).flatten(1).any(dim=1)
        assert changed.float().mean() > 0.7


@pytest.mark.parametrize("name", ["crop", "shift", "light", "standard"])
def test_half_of_the_images_are_mirrored(name):
    n = 400
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(n, 3, 32, 32).contiguous()
    out = augment(
        ramp, torch.tensor([[32, 32]] * n), prep(32), name=name, seed=0, epoch=0, indices=torch.arange(n)
    )
    mirrored = out[..., 6:12].mean(dim=(1, 2, 3)) > out[..., 20:26].mean(dim=(1, 2, 3))
    assert 150 < int(mirrored.sum()) < 250
