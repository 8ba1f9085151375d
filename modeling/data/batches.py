"""The steps of an epoch, and the batches of a step.

How a batch becomes a tensor: training_steps gathers its uint8 pixels (Images.gather), and engine.make_inputs
augments and normalises them (augment.augment).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modeling import randomness
from modeling.data import decoding
from modeling.data.images import Images


@dataclass
class Batch:
    """One micro-batch of B training images.

    images (U, 3, H, W) uint8, sizes (U, 2), labels (U,) and indices (U,) describe the U different images.
    With mixup or CutMix, own and partner (B,) are positions among these U images. Otherwise they are None,
    and U is B. With kept features of a frozen backbone, images is None, and features (U, D) float32 replace
    it. weights (B,) float32 are 1. A process without an image runs one image with weight 0 instead.
    """

    images: torch.Tensor | None
    sizes: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    own: torch.Tensor | None = None
    partner: torch.Tensor | None = None
    features: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to a device. sizes and indices stay on the CPU, which plans the augmentation."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return Batch(
            images=None if self.images is None else move(self.images),
            sizes=self.sizes,
            labels=move(self.labels),
            indices=self.indices,
            weights=move(self.weights),
            own=None if self.own is None else move(self.own),
            partner=None if self.partner is None else move(self.partner),
            features=None if self.features is None else move(self.features),
        )


def split_batch(num_images: int, *, accumulation: int, rank: int, world_size: int) -> list[torch.Tensor]:
    """Split a global batch: return this rank's micro-batches, each as positions in the global batch.

    Every rank has the same number of micro-batches. Some may be empty.
    """
    largest = -(-num_images // world_size)
    mine = torch.arange(num_images).tensor_split(world_size)[rank]
    return list(mine.tensor_split(min(accumulation, largest)))


def training_steps(
    images: Images,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    accumulation: int = 1,
    rank: int = 0,
    world_size: int = 1,
    mix: bool = False,
    start: int = 0,
    features: torch.Tensor | None = None,
) -> Iterator[list[Batch]]:
    """Yield the steps of an epoch from `start` on: this rank's micro-batches of each global batch.

    A global batch has `batch_size` images; the last one may be shorter. The order depends on (seed, epoch).
    With `mix`, each image gets a partner from the global batch, which depends on (seed, epoch, step). With
    features (N, D) of the images, batches hold these instead of pixels. Images that are not stored decoded
    are decoded two steps ahead.
    """

    def micro_batch(global_batch: torch.Tensor, partners: torch.Tensor | None, share: torch.Tensor) -> Batch:
        weights = torch.ones(len(share)) if len(share) else torch.zeros(1)
        share = share if len(share) else torch.zeros(1, dtype=torch.int64)
        positions, own, partner = global_batch[share], None, None
        if partners is not None:
            both = torch.cat([positions, global_batch[partners[share]]])
            positions, inverse = torch.unique(both, return_inverse=True)
            own, partner = inverse.chunk(2)
        if features is None:
            pixels, sizes = images.gather(positions)
        else:
            pixels, sizes = None, images.sizes[positions]
        return Batch(
            images=pixels,
            sizes=sizes,
            labels=images.labels[positions],
            indices=images.rows[positions],
            weights=weights,
            own=own,
            partner=partner,
            features=None if features is None else features[positions],
        )

    def steps() -> Iterator[list[Batch]]:
        order = randomness.permutation(len(images), seed, randomness.ORDER, epoch)
        for step, global_batch in list(enumerate(order.split(batch_size)))[start:]:
            partners = (
                randomness.permutation(len(global_batch), seed, randomness.MIX, epoch, step) if mix else None
            )
            mine = split_batch(len(global_batch), accumulation=accumulation, rank=rank, world_size=world_size)
            yield [micro_batch(global_batch, partners, share) for share in mine]

    if features is None and isinstance(images.pixels, decoding.Decoder):
        return decoding.prefetch(steps())
    return steps()
