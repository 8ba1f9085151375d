"""How fast a run goes, and its gradient norm, over some steps: read where the loss is looked at."""

import time
from collections.abc import Iterable, Iterator

import torch

from modeling.data.batches import Batch


class Pace:
    """Sums up the steps since the last `read`: images, seconds, seconds spent waiting for data, gradients.

    The norms of the gradients stay on the device until `read`, so that no step waits for it.
    """

    def __init__(self):
        self.norms: list[torch.Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Forget what was summed up: training begins, or goes on after a validation."""
        self.norms.clear()
        self.num_images = 0
        self.wait_seconds = 0.0
        self.started = time.perf_counter()

    def watch(self, steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """Yield the steps, and measure how long each of them is waited for."""
        iterator = iter(steps)
        while True:
            asked = time.perf_counter()
            micro_batches = next(iterator, None)
            self.wait_seconds += time.perf_counter() - asked
            if micro_batches is None:
                return
            yield micro_batches

    def add(self, num_images: int, gradient_norm: torch.Tensor) -> None:
        """Add a step: images of its global batch, and the norm of its gradient."""
        self.num_images += num_images
        self.norms.append(gradient_norm)

    def read(self) -> dict[str, float]:
        """Return the numbers of the steps since the last call; none if there were none. Waits for the device.

        gradient_norm/largest shows a spike that the mean hides. In fp16 an overflowed step is not counted.
        """
        if not self.norms:
            return {}
        norms = torch.stack(self.norms)
        norms = norms[norms.isfinite()].cpu()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        values = {
            "speed/images_per_second": self.num_images / seconds,
            "speed/data_wait_share": min(1.0, self.wait_seconds / seconds),
        }
        if len(norms):
            values |= {
                "gradient_norm/mean": norms.mean().item(),
                "gradient_norm/largest": norms.max().item(),
            }
        self.begin()
        return values
