"""RandAugment (Cubuk et al., https://arxiv.org/abs/1909.13719) on batches of uint8 images."""

import math

import torch
from torchvision.transforms.v2 import functional as TF

from modeling.randomness import Draws

_RANDAUGMENT = 80  # the first draw number of this file; augment.py has the numbers below


def _shift(images: torch.Tensor, x: int = 0, y: int = 0) -> torch.Tensor:
    """Move the images right by x and down by y pixels. The gap is black."""
    H, W = images.shape[2:]
    out = torch.zeros_like(images)
    out[:, :, max(y, 0) : H + min(y, 0), max(x, 0) : W + min(x, 0)] = images[
        :, :, max(-y, 0) : H - max(y, 0), max(-x, 0) : W - max(x, 0)
    ]
    return out


def _sharpen(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Blend with a 3x3 mean in which the centre counts five times. The border, one pixel, stays."""
    H, W = images.shape[2:]
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    inner = wide[:, :, 1:-1, 1:-1]
    blurred = ((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) / 13).round_()
    out = images.clone()
    out[:, :, 1 : H - 1, 1 : W - 1] = (
        blurred.mul_(1 - factor).add_(inner, alpha=factor).clamp_(0, 255).to(torch.uint8)
    )
    return out


def _randaugment_ops(size: int) -> list:
    """List RandAugment's 14 operations at magnitude 9 of 30: functions of (images, sign)."""
    m = 9 / 30

    def shear(images: torch.Tensor, x: float = 0.0, y: float = 0.0):
        degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
        return TF.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0.0, 0.0])

    shift = int(150.0 / 331.0 * size * m)
    return [
        lambda images, sign: images,
        lambda images, sign: shear(images, x=sign * 0.3 * m),
        lambda images, sign: shear(images, y=sign * 0.3 * m),
        lambda images, sign: _shift(images, x=sign * shift),
        lambda images, sign: _shift(images, y=sign * shift),
        lambda images, sign: TF.rotate(images, sign * 30.0 * m),
        lambda images, sign: TF.adjust_brightness(images, 1 + sign * 0.9 * m),
        lambda images, sign: TF.adjust_saturation(images, 1 + sign * 0.9 * m),
        lambda images, sign: TF.adjust_contrast(images, 1 + sign * 0.9 * m),
        lambda images, sign: _sharpen(images, 1 + sign * 0.9 * m),
        lambda images, sign: TF.posterize(images, 8 - round(9 / (30 / 4))),
        lambda images, sign: images ^ (images >= 255 * (1 - m)).to(torch.uint8).mul_(255),
        lambda images, sign: TF.autocontrast(images),
        lambda images, sign: TF.equalize(images),
    ]


def randaugment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Apply two random operations of RandAugment to each image of a batch: (B, C, S, S) uint8."""
    ops = _randaugment_ops(images.shape[-1])
    for slot in range(2):
        choice = torch.floor(draws(_RANDAUGMENT + 2 * slot) * len(ops)).long()
        negative = draws(_RANDAUGMENT + 2 * slot + 1) < 0.5
        images = images.clone()
        for number, op in enumerate(ops):
            for sign in (-1, 1):
                chosen = ((choice == number) & (negative == (sign < 0))).nonzero()[:, 0]
                if len(chosen):
                    chosen = chosen.to(images.device, non_blocking=True)
                    images[chosen] = op(images[chosen], sign)
    return images
