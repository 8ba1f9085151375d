"""Exact resampling of a batch, and normalising.

A resize is two matrix products of pixels (8 bits) and weights (14 bits). float32 holds all their sums
exactly, so the result is the same in any order of addition and on any device.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch

_WEIGHT_BITS = 14


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input.

    With crop_fraction None, resize to (image_size, image_size) without a crop. Otherwise resize the short
    side to image_size / crop_fraction and crop the centre. mean and std are per channel, for pixels in 0..1.
    interpolation is "bilinear" or "bicubic", antialiased.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_fraction: float | None = None
    interpolation: str = "bilinear"

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Rebuild from the JSON of dataclasses.asdict, in which tuples became lists."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    def __str__(self) -> str:
        crop = f"crop {self.crop_fraction:g}" if self.crop_fraction else "no crop"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{self.image_size} px, {crop}, {self.interpolation}, mean {mean}, std {std}"


def _kernel(x: torch.Tensor, interpolation: str) -> torch.Tensor:
    x = x.abs_()
    if interpolation == "bilinear":
        return x.neg_().add_(1).clamp_(min=0)
    assert interpolation == "bicubic", interpolation
    a = -0.5  # Keys' cubic, as in Pillow and in torch's antialiased resize
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


def _weights(
    start: torch.Tensor,
    length: torch.Tensor,
    side_in: int,
    side_out: torch.Tensor,
    out_offset: torch.Tensor,
    num_out: int,
    interpolation: str,
) -> torch.Tensor:
    """Return the resampling weights (B, num_out, side_in), multiples of 2**-14, along one side.

    The box (start and length, in input pixels) is scaled to `side_out` (B,) pixels. Row o of the weights
    computes pixel out_offset + o of the scaled box.
    """
    start, length = start.double()[:, None, None], length.double()[:, None, None]
    ratio = length / side_out.double()[:, None, None]
    stretch = ratio.clamp(min=1)  # antialias: a wider kernel where the image shrinks
    out = (
        torch.arange(num_out, device=start.device).double()[None, :, None]
        + out_offset.double()[:, None, None]
    )
    pixel = torch.arange(side_in, device=start.device).double()[None, None, :] - start
    weights = _kernel((pixel + 0.5) / stretch - (out + 0.5) * (ratio / stretch), interpolation)
    weights = weights.mul_((pixel >= 0) & (pixel < length))
    weights = weights.mul_(2**_WEIGHT_BITS / weights.sum(dim=2, keepdim=True)).round_()
    return weights.float().mul_(2**-_WEIGHT_BITS)


@contextlib.contextmanager
def all_bits_of_float32():
    """Turn TF32 off inside the block. TF32 has 11 bits of precision, and the sums here need 24."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def resample(
    images: torch.Tensor,
    boxes: torch.Tensor,
    scaled: torch.Tensor,
    offsets: torch.Tensor,
    size: int,
    flip: torch.Tensor,
    interpolation: str,
) -> torch.Tensor:
    """Scale a box of each image, cut a square window from the result, and mirror it where `flip` is True.

    images (B, C, H, W) and the other tensors may be on any device. boxes (B, 4) int64: top, left, height,
    width. scaled (B, 2): height and width of the scaled box. offsets (B, 2): top left corner of the (size,
    size) window in the scaled box. flip (B,) bool. Returns (B, C, size, size) float32.
    """
    B, C, H, W = images.shape
    boxes, scaled, offsets, flip = (
        t.to(images.device, non_blocking=True) for t in (boxes, scaled, offsets, flip)
    )
    # rows (B, S, H) and cols (B, S, W)
    rows = _weights(boxes[:, 0], boxes[:, 2], H, scaled[:, 0], offsets[:, 0], size, interpolation)
    cols = _weights(boxes[:, 1], boxes[:, 3], W, scaled[:, 1], offsets[:, 1], size, interpolation)
    cols = torch.where(flip[:, None, None], cols.flip(1), cols)

    def whole(x: torch.Tensor) -> torch.Tensor:
        x = x.add_(0.5).floor_()
        return x.clamp_(0, 255) if interpolation == "bicubic" else x  # bicubic can overshoot

    lines = images.permute(0, 2, 1, 3).float().contiguous()
    with all_bits_of_float32():
        out = whole(lines.view(B, H * C, W) @ cols.transpose(1, 2))  # (B, H * C, S)
        out = whole(rows @ out.view(B, H, C * size))  # (B, S, C * S)
    return out.view(B, size, C, size).permute(0, 2, 1, 3)


def resize(
    images: torch.Tensor, sizes: torch.Tensor, prep: Preprocessing, flip: torch.Tensor | None = None
) -> torch.Tensor:
    """Resize (and crop) as at evaluation: (B, C, H, W) uint8 -> (B, C, S, S).

    Image i fills the top left sizes[i] (height, width) pixels of images[i]. sizes (B, 2) is on the CPU. If
    all images have the right size, their pixels stay unchanged.
    """
    size = prep.image_size
    flip = torch.zeros(len(images), dtype=torch.bool) if flip is None else flip
    if prep.crop_fraction is None:
        scaled = torch.full_like(sizes, size)
    else:
        short = math.floor(size / prep.crop_fraction)
        scaled = sizes * short // sizes.amin(dim=1, keepdim=True)  # torchvision's rounding of the long side
    if images.shape[2:] == (size, size) and bool((sizes == size).all() and (scaled == size).all()):
        flip = flip.to(images.device, non_blocking=True)
        return torch.where(flip[:, None, None, None], images.flip(3), images)
    # A margin of half a pixel is rounded to the even number, as in torchvision's centre crop.
    offsets = torch.round((scaled - size) / 2).long()
    boxes = torch.cat([torch.zeros_like(sizes), sizes], dim=1)
    return resample(images, boxes, scaled, offsets, size, flip, prep.interpolation)


def normalize(images: torch.Tensor, prep: Preprocessing) -> torch.Tensor:
    """Normalise pixels 0..255 (B, C, H, W) to float32: (pixel / 255 - mean) / std."""
    mean, std = torch.tensor(prep.mean)[:, None, None], torch.tensor(prep.std)[:, None, None]
    shift, scale = (t.to(images.device, non_blocking=True) for t in (-mean / std, 1 / (255 * std)))
    return torch.addcmul(shift, images.float(), scale)


def preprocess(images: torch.Tensor, sizes: torch.Tensor, prep: Preprocessing) -> torch.Tensor:
    """Make the input as at evaluation: (B, C, H, W) uint8, sizes (B, 2) on the CPU -> (B, C, S, S)."""
    return normalize(resize(images, sizes, prep), prep)
