"""The order of the images, and the batches of each process."""

import pytest
import torch

from modeling.data.batches import training_steps
from modeling.data.images import Images


def steps(n=23, **options):
    labels = torch.arange(n) % 4
    pixels, sizes, where = (
        torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2),
        torch.full((n, 2), 2),
        torch.arange(n),
    )
    images = Images(pixels, where, sizes, labels, where + 100, [])
    return list(training_steps(images, **({"seed": 1, "epoch": 0, "batch_size": 8} | options)))


def test_an_epoch_has_every_image_once_in_an_order_of_seed_and_epoch():
    order = torch.cat([batch.indices for step in steps() for batch in step])
    assert torch.equal(order.sort().values, torch.arange(100, 123))
    assert [len(step[0].labels) for step in steps()] == [8, 8, 7]
    for batch in (b for step in steps() for b in step):
        assert torch.equal(batch.images[:, 0, 0, 0].long() + 100, batch.indices)
        assert torch.equal(batch.labels, (batch.indices - 100) % 4)
    assert torch.equal(order, torch.cat([b.indices for step in steps() for b in step]))
    assert not torch.equal(order, torch.cat([b.indices for step in steps(epoch=1) for b in step]))
    assert not torch.equal(order, torch.cat([b.indices for step in steps(seed=2) for b in step]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_global_batches_do_not_depend_on_processes_or_accumulation(world_size, accumulation):
    n = 21  # the last batch of 5 leaves some of 8 processes nothing
    reference = [step[0].indices for step in steps(n)]
    ranks = [
        steps(n, accumulation=accumulation, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for number, expected in enumerate(reference):
        micro_batches = [rank[number] for rank in ranks]
        assert len({len(m) for m in micro_batches}) == 1, "every rank runs as many micro-batches"
        counted = torch.cat([b.indices[b.weights > 0] for m in micro_batches for b in m])
        assert torch.equal(counted, expected)
        assert all(len(b.indices) for m in micro_batches for b in m), "no rank runs an empty batch"


def test_mixing_partners_are_a_permutation_of_the_global_batch_whoever_loads_it():
    def pairs(ranks):
        found = [[], [], []]
        for rank in ranks:
            for number, step in enumerate(rank):
                for b in step:
                    found[number] += list(
                        zip(b.indices[b.own].tolist(), b.indices[b.partner].tolist(), strict=True)
                    )
        return [sorted(f) for f in found]

    whole = pairs([steps(mix=True)])
    for step, expected in zip(whole, steps(), strict=True):
        assert (
            sorted(own for own, _ in step)
            == sorted(partner for _, partner in step)
            == expected[0].indices.sort().values.tolist()
        )
    assert sum(own != partner for own, partner in whole[0]) >= 4
    assert pairs([steps(mix=True, rank=r, world_size=3, accumulation=2) for r in range(3)]) == whole
