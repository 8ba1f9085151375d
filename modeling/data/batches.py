"""The steps of an epoch, and the batches of a step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modeling import randomness
from modeling.data import decoding
from modeling.data.images import Images


@dataclass
class Batch:
    """One micro-batch: images (U, 3, H, W) uint8; sizes (U, 2); labels and indices (U,); weights (B,)
    float32.

    With mixing, own and partner (B,) point into the U images; without it they are None and B is U. Where the
    features of a frozen backbone are kept, features (U, D) float32 take the place of images, which are None.
    A weight is 1, but 0 for the image that a process runs if the global batch has none left for it.
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
    """Give the positions in the global batch of each micro-batch of a rank.

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
    The mixing partners are drawn over the global batch and depend on (seed, epoch, step). With features (N,
    D) of the images, batches carry these instead of pixels. Images that are decoded at each use are decoded
    two steps ahead.
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
