"""Optimizer, EMA, and the learning rate as a pure function of the step."""

import contextlib
import math

import torch
from torch import nn


def build_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """adam, adamw or sgd (momentum 0.9) over the parameters that train."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
        parameters, lr=lr, weight_decay=weight_decay, fused=True
    )


class Ema:
    """An exponential moving average of weights and buffers (Polyak & Juditsky, 1992).

    After update t it keeps min(decay, (1 + t) / (10 + t)) of itself, so that a short run does not average its start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - keep)
            else:
                self.average[name].copy_(value)

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module):
        """The model has the averaged weights inside this block, its own again after it."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average)
        try:
            yield
        finally:
            model.load_state_dict(own)


def learning_rate(
    step: int, *, base: float, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """The rate of update number `step` (from 0): linear warm-up that reaches `base`, then constant or cosine towards 0.

    The cosine (Loshchilov & Hutter, SGDR, https://arxiv.org/abs/1608.03983) starts at `base` and would be 0 at `total_steps`.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    assert schedule == "cosine", schedule
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
