"""Optimizer, moving average of the weights, and the learning rate as a pure function of the step."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from modeling.data.resize import all_bits_of_float32
from modeling.models.tensors import head_keys


def build_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """Build adam, adamw, sgd or muon for the trainable parameters. momentum is of sgd and muon.

    All but muon use torch's fused kernels.
    """
    if name == "muon":
        return Muon(model, lr=lr, weight_decay=weight_decay, momentum=momentum)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "sgd":
        optimizer = torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True
        )
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


class Muon(torch.optim.Optimizer):
    """Muon for the hidden weight matrices, AdamW for all other parameters, both with one learning rate.

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) keeps the directions of a momentum matrix
    and makes its singular values about equal. So a step moves every direction equally far. A filter
    (out, in, H, W) counts as a matrix (out, in * H * W). Each update has about the size of an AdamW update
    (Liu et al., https://arxiv.org/abs/2502.16982). Weight decay is AdamW's.

    Hidden are the weights of nn.Linear and nn.Conv2d, but those of the first layer (3 input channels), of the
    classifier, and of more than LARGEST numbers, where Muon's products would take longer than the rest of a
    step. AdamW updates these and all other parameters.
    """

    LARGEST = 2**22
    BETAS, EPS = (0.9, 0.95), 1e-8

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float, momentum: float):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum
        heads = head_keys(model)
        self.hidden = {
            module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and f"{name}.weight" not in heads
            and module.weight.shape[1] != 3
            and module.weight.numel() <= self.LARGEST
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._muon if parameter in self.hidden else self._adam
                parameter.add_(update(parameter.grad, state), alpha=-group["lr"])

    def _muon(self, gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].mul_(self.momentum).add_(gradient)
        ahead = gradient.add(average, alpha=self.momentum).flatten(1)  # Nesterov's
        return orthogonalize(ahead).mul_(0.2 * max(ahead.shape) ** 0.5).reshape(gradient.shape)

    def _adam(self, gradient: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        step = state["step"].add_(1).item()
        mean = state["exp_avg"].lerp_(gradient, 1 - self.BETAS[0])
        square = state["exp_avg_sq"].mul_(self.BETAS[1]).addcmul_(gradient, gradient, value=1 - self.BETAS[1])
        deviation = (square / (1 - self.BETAS[1] ** step)).sqrt_().add_(self.EPS)
        return (mean / (1 - self.BETAS[0] ** step)).div_(deviation)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of a matrix (M, N) near 1 by Newton-Schulz iterations.

    The coefficients are those of Jordan et al. They make small singular values grow fast: after 5 steps those
    above 0.002 of the norm are 0.68 to 1.21. In float32, because in bfloat16 runs on different numbers of
    processes would differ.
    """
    X = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    X = X / (X.norm() + 1e-7)
    with all_bits_of_float32():
        for _ in range(steps):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X if matrix.shape[0] <= matrix.shape[1] else X.T


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
