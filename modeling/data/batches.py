"""The steps of an epoch, the batches of a step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modeling import randomness
from modeling.data import decoding
from modeling.data.images import Images


@dataclass
class Batch:
    """One micro-batch. images (U, 3, H, W) uint8, sizes, labels, indices (U,); where mixing, own and partner (B,) point into them.

    Where the features of a frozen backbone are kept, features (U, D) float32 take the place of images, which are None.
    weights (B,) float32 is 1, or 0 for the image that a process runs when the global batch left it none.
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
        """The batch on a device, but sizes and indices, by which the CPU decides what the device has to do."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        stay = {"sizes", "indices"}
        return Batch(
            **{
                name: value if value is None or name in stay else move(value)
                for name, value in vars(self).items()
            }
        )


def split_batch(num_images: int, *, accumulation: int, rank: int, world_size: int) -> list[torch.Tensor]:
    """The positions in a global batch that each of a rank's micro-batches takes; as many on every rank, some perhaps empty."""
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
    """The steps of an epoch from `start` on, each the micro-batches of this rank's share of a global batch of `batch_size` images.

    The order is a function of (seed, epoch), mixing partners of (seed, epoch, step) over the global batch. The last batch is as
    short as it falls. Images that are decoded as they are used are decoded two steps ahead. With features (N, D) of the
    images, a batch carries these instead of pixels.
    """

    def micro_batch(global_batch: torch.Tensor, partners: torch.Tensor | None, share: torch.Tensor) -> Batch:
        weights = torch.ones(len(share)) if len(share) else torch.zeros(1)
        share = share if len(share) else torch.zeros(1, dtype=torch.int64)
        positions, own, partner = global_batch[share], None, None
        if partners is not None:
            both = torch.cat([positions, global_batch[partners[share]]])
            positions, where = torch.unique(both, return_inverse=True)
            own, partner = where.chunk(2)
        pixels, sizes = (None, images.sizes[positions]) if features is not None else images.gather(positions)
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

    return (
        decoding.prefetch(steps())
        if features is None and isinstance(images.pixels, decoding.Decoder)
        else steps()
    )
