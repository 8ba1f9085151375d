"""Optimizer, moving average of the weights, and the learning rate as a pure function of the step."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn


def build_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build adam, adamw or sgd (momentum 0.9) for the trainable parameters. All use torch's fused kernels."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)
        # In fp16 the first steps can overflow and are skipped. torch 2.14's fused SGD then leaves its
        # momentum uninitialised and later adds garbage to the weights. So set the momentum to zeros here.
        # The first step is the same as without momentum.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    assert name == "adamw", name
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)


def learning_rate(
    step: int, *, base: float, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine"
) -> float:
    """The learning rate of update number `step` (from 0): linear warm-up to `base`, then constant or cosine.

    The cosine (Loshchilov & Hutter, SGDR, https://arxiv.org/abs/1608.03983) starts at `base` and is 0 at step
    `total_steps`. The last update is step total_steps - 1, so its learning rate is a little above 0.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    assert schedule == "cosine", schedule
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Ema:
    """An exponential moving average of weights and buffers (Polyak & Juditsky, 1992).

    Update t: average = share * average + (1 - share) * weights, with share = min(decay, (1 + t) / (10 + t)).
    The share starts small, so the average soon forgets the random weights of the start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        kept_share = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - kept_share)
            else:  # an integer buffer, such as batch normalisation's num_batches_tracked
                self.average[name].copy_(value)

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights inside this block. Restore its own weights afterwards."""
        own_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.average)
        try:
            yield
        finally:
            model.load_state_dict(own_weights)
