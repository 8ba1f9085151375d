"""Augment batches of uint8 images on the device that holds them.

Each image draws its parameters from (seed, epoch, its index). Its pixels therefore do not depend on the
batch. Pixels stay whole numbers from 0 to 255 between the operations. The operations are torchvision's
functional API; tests/test_augment.py compares them image by image.
"""

import math

import torch
from scipy import special
from torch.nn import functional as F

from modeling import randomness
from modeling.data.randaugment import randaugment
from modeling.data.resize import Preprocessing, normalize, resample, resize
from modeling.randomness import Draws

AUGMENT_SETS = ("none", "crop", "shift", "light", "standard", "randaugment")


# Draw numbers: the last key of the hash. Each use has a range of its own. randaugment.py has 80 and above.
_FLIP, _ANGLE, _PAD_X, _PAD_Y, _CROP, _JITTER = 0, 1, 2, 3, 10, 60


def random_crop_boxes(sizes: torch.Tensor, draws: Draws, scale: tuple[float, float]) -> torch.Tensor:
    """Draw the boxes (B, 4) of RandomResizedCrop (Szegedy et al., https://arxiv.org/abs/1409.4842).

    The box's share of the image's area is drawn from the interval `scale`, its aspect from 3/4 to 4/3. The
    first of ten draws that fits into the image is used. If none fits, the box is the largest centred one with
    an allowed aspect, as in torchvision.
    """
    height, width = sizes[:, 0].float(), sizes[:, 1].float()
    u = draws(_CROP, 22)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * u[:, 0:20:2])  # (B, 10)
    aspect = torch.exp(math.log(4 / 3) * (2 * u[:, 1:20:2] - 1))
    w, h = torch.round(torch.sqrt(area * aspect)), torch.round(torch.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first, found = fits.byte().argmax(dim=1, keepdim=True), fits.any(dim=1)
    box_h, box_w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    fallback_w = torch.minimum(width, torch.round(height * 4 / 3))
    fallback_h = torch.minimum(height, torch.round(width / (3 / 4)))
    box_h, box_w = torch.where(found, box_h, fallback_h), torch.where(found, box_w, fallback_w)
    top = torch.where(found, torch.floor((height - box_h + 1) * u[:, 20]), torch.floor((height - box_h) / 2))
    left = torch.where(found, torch.floor((width - box_w + 1) * u[:, 21]), torch.floor((width - box_w) / 2))
    return torch.stack([top, left, box_h, box_w], dim=1).long()


def padded_crop(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Pad with black by an eighth of the side, then crop back to the size at random.

    At 32 pixels the padding is 4, as in He et al., https://arxiv.org/abs/1512.03385.
    """
    pad = images.shape[-1] // 8
    return _gather(F.pad(images, (pad, pad, pad, pad)), *_positions(images, draws, reach=pad, start=pad))


def reflected_shift(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Shift by up to a sixteenth of the side in each direction. What comes in is the image's reflection.

    At 32 pixels these are 2 pixels, as in Jordan, https://arxiv.org/abs/2404.00498.
    """
    last = images.shape[-1] - 1
    rows, cols = _positions(images, draws, reach=images.shape[-1] // 16)
    return _gather(images, *(last - (last - position.abs()).abs() for position in (rows, cols)))


def _positions(images: torch.Tensor, draws: Draws, *, reach: int, start: int = 0) -> list[torch.Tensor]:
    """The rows and columns (B, S) to take, shifted by whole pixels from -reach to reach."""
    side = torch.arange(start, start + images.shape[-1], device=images.device)
    shifts = (torch.floor(draws(draw) * (2 * reach + 1)).long() - reach for draw in (_PAD_Y, _PAD_X))
    return [shift.to(images.device, non_blocking=True)[:, None] + side for shift in shifts]


def _gather(images: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Take these rows and columns (B, S) of each image."""
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return (
        images.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()
    )


def _gray(images: torch.Tensor) -> torch.Tensor:
    r, g, b = images.unbind(dim=1)
    gray = ((r * 2989 + g * 5870 + b * 1140) / 10000).floor_()  # a sum of integers is exact
    return gray[:, None]


def color_jitter(
    images: torch.Tensor, boxes: torch.Tensor, draws: Draws, strength: float = 0.2
) -> torch.Tensor:
    """Change brightness, contrast and saturation by factors in 1 +- strength, in random order.

    Contrast is relative to the mean grey inside the image's box. boxes (B, 4): top, left, height, width.
    """
    u = draws(_JITTER, 6)
    order = u[:, 3:].argsort(dim=1, stable=True)  # (B, 3)
    factors = (1 - strength + 2 * strength * u[:, :3]).gather(1, order)[:, :, None, None, None]
    factors, order, boxes = (t.to(images.device, non_blocking=True) for t in (factors, order, boxes))
    top, left, height, width = boxes[:, :, None].unbind(dim=1)  # (B, 1)
    y, x = (torch.arange(side, device=images.device) for side in images.shape[2:])
    inside = ((y >= top) & (y < top + height))[:, None, :, None] * ((x >= left) & (x < left + width))[
        :, None, None, :
    ]
    images = images.float()
    # Each operation is image * factor + other * (1 - factor). other is 0 for brightness, the mean grey for
    # contrast, and the pixel's grey for saturation.
    for slot in range(3):
        is_contrast, is_saturation = ((order[:, slot] == op)[:, None, None, None] for op in (1, 2))
        factor = factors[:, slot]
        gray = _gray(images)
        mean = (gray * inside).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64) / inside.sum(
            dim=(1, 2, 3), keepdim=True
        )
        other = gray.mul_((1 - factor) * is_saturation).add_((1 - factor) * is_contrast * mean.float())
        images = (images * factor).add_(other).clamp_(0, 255).floor_()
    return images


def rotate(images: torch.Tensor, draws: Draws, degrees: float = 15.0) -> torch.Tensor:
    """Rotate about the centre by up to `degrees` either way, bilinear, black outside."""
    angle = torch.deg2rad(degrees * (2 * draws(_ANGLE) - 1)).to(images.device, non_blocking=True)
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    S = images.shape[-1]
    x = (2 * torch.arange(S, device=images.device) + 1) / S - 1  # pixel centres in -1..1
    x, y = x[None, None, :], x[None, :, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)  # (B, S, S, 2)
    out = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return out.round_().clamp_(0, 255)


def augment(
    images: torch.Tensor,
    sizes: torch.Tensor,
    prep: Preprocessing,
    *,
    name: str,
    seed: int,
    epoch: int,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Make the model's training input for `epoch`: (B, C, H, W) uint8 -> (B, C, S, S) float32.

    sizes (B, 2) and indices (B,) are on the CPU. The augmentation sets are:
    none         as at evaluation
    crop         flip, padded crop
    shift        flip in every second epoch, reflected shift
    light        RandomResizedCrop (0.8 to 1), flip, colour jitter 0.2
    standard     flip, padded crop, colour jitter 0.2, rotation by up to 15 degrees
    randaugment  RandAugment
    """
    draws = Draws(seed, epoch, indices)
    if name == "none":
        out = resize(images, sizes, prep)
    elif name == "randaugment":
        out = randaugment(resize(images, sizes, prep).to(torch.uint8), draws)
    elif name == "shift":
        # One half of the images, drawn once, is flipped in odd epochs, the other half in even epochs.
        flip = (Draws(seed, 0, indices)(_FLIP) < 0.5) ^ (epoch % 2 == 1)
        out = reflected_shift(resize(images, sizes, prep, flip), draws)
    else:
        flip = draws(_FLIP) < 0.5
        if name == "light":
            # Change the colours before the resize enlarges the image. That is much cheaper, and the result
            # is the same up to rounding.
            boxes = random_crop_boxes(sizes, draws, scale=(0.8, 1.0))
            images, scaled = color_jitter(images, boxes, draws), torch.full_like(sizes, prep.image_size)
            out = resample(
                images, boxes, scaled, torch.zeros_like(sizes), prep.image_size, flip, prep.interpolation
            )
        else:
            assert name in ("crop", "standard"), name
            out = padded_crop(resize(images, sizes, prep, flip), draws)
            if name == "standard":
                whole = torch.tensor([0, 0, *out.shape[2:]]).expand(len(out), 4)
                out = rotate(color_jitter(out, whole, draws), draws)
    return normalize(out, prep)


def mix(
    x: torch.Tensor,
    own: torch.Tensor,
    partner: torch.Tensor,
    *,
    mixup: float,
    cutmix: float,
    keys: tuple[int, ...],
) -> tuple[torch.Tensor, float]:
    """Mix each image with its partner. Return (B, C, S, S) and the weight of the image's own label.

    x is (U, C, S, S); own and partner (B,) are positions in it. mixup (Zhang et al.,
    https://arxiv.org/abs/1710.09412) and cutmix (Yun et al., https://arxiv.org/abs/1905.04899) are the
    alphas of Beta distributions; 0 is off. If both are on, the hash of `keys` chooses one for each batch. The
    weight and the box are the same for the whole global batch.
    """
    u = randomness.uniform(*keys, torch.arange(4)).tolist()
    use_cutmix = cutmix > 0 and (mixup == 0 or u[0] < 0.5)
    alpha = cutmix if use_cutmix else mixup
    weight = float(special.betaincinv(alpha, alpha, u[1]))
    if not use_cutmix:
        return torch.lerp(x[partner], x[own], weight), weight
    S = x.shape[-1]
    side = S * math.sqrt(1 - weight)
    top, left = (max(0, round(S * c - side / 2)) for c in u[2:])
    bottom, right = (min(S, round(S * c + side / 2)) for c in u[2:])
    out = x[own]  # a copy: own is a tensor of indices
    out[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
    return out, 1 - (bottom - top) * (right - left) / S**2
