"""Position embeddings of another image size."""

import math

import timm
import torch
from torch import nn
from torch.nn import functional as F


def fit_positions(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return `state` with its position embeddings resampled to the model's size, where that is another.

    They are (1, N, D), one row a patch after rows of class tokens, or (1, D, H, W). timm's models have
    functions of their own, which come before this; this is for SimpleViT and for models without one.
    """
    fitted = dict(state)
    for key, new in model.state_dict().items():
        old = state.get(key)
        is_position = key.rpartition(".")[2] in ("positions", "pos_embed")
        if is_position and old is not None and old.dim() == new.dim() and old.shape != new.shape:
            fitted[key] = _fit(old, new)
    return fitted


def _fit(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return `old` in the shape of `new`, or as it is where more than the number of patches differs."""
    if old.dim() == 4 and old.shape[:2] == new.shape[:2]:
        return F.interpolate(old.float(), size=new.shape[2:], mode="bicubic", antialias=True).to(old.dtype)
    if old.dim() != 3 or (old.shape[0], old.shape[2]) != (new.shape[0], new.shape[2]):
        return old
    for num_tokens in range(3):  # of the class and of distillation
        sides = [math.isqrt(max(0, value.shape[1] - num_tokens)) for value in (old, new)]
        counts = [side * side + num_tokens for side in sides]
        if all(sides) and counts == [old.shape[1], new.shape[1]]:
            return timm.layers.resample_abs_pos_embed(
                old,
                new_size=[sides[1], sides[1]],
                old_size=[sides[0], sides[0]],
                num_prefix_tokens=num_tokens,
            )
    return old
