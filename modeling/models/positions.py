"""Position embeddings of another image size."""

import math

import timm
import torch
from torch import nn
from torch.nn import functional as F


def fit_positions(state: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Resample the position embeddings in `state` that have another size than the model's. Return their keys.

    They are (1, N, D), one row a patch after rows of class tokens, or (1, D, H, W). timm's models have
    functions of their own, which come before this; this is for SimpleViT and for models without one.
    """
    fitted = []
    for key, new in model.state_dict().items():
        old = state.get(key)
        is_position = key.rpartition(".")[2] in ("positions", "pos_embed")
        if not is_position or old is None or old.dim() != new.dim() or old.shape == new.shape:
            continue
        value = _fit(old, new)
        if value is not None:
            state[key] = value
            fitted.append(key)
    return fitted


def _fit(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor | None:
    """Return `old` in the shape of `new`. None: they differ in more than the number of patches."""
    if old.dim() == 4 and old.shape[:2] == new.shape[:2]:
        return F.interpolate(old.float(), size=new.shape[2:], mode="bicubic", antialias=True).to(old.dtype)
    if old.dim() != 3 or (old.shape[0], old.shape[2]) != (new.shape[0], new.shape[2]):
        return None
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
    return None
