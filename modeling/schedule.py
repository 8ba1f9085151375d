"""The learning rate as a pure function of the step."""

import math


def learning_rate(step: int, *, base: float, total_steps: int, warmup_steps: int = 0, schedule: str = "cosine") -> float:
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
