"""Draw a subset in which each class keeps its share."""

import torch

from modeling import randomness


def stratified(labels: torch.Tensor, n: int, *keys: int) -> torch.Tensor:
    """Draw n positions of `labels` (N,), sorted. Each class gets its share of n; the keys decide the draw.

    Rounding: the classes with the largest remainders get one more each. The keys decide between equal
    remainders. Time and memory grow with N + classes.
    """
    counts = torch.bincount(labels)
    quota = counts.double() * n / max(1, len(labels))
    take = quota.floor().long()
    ties = randomness.permutation(len(counts), *keys)
    by_remainder = ties[torch.argsort((take - quota)[ties], stable=True)]
    take[by_remainder[: n - int(take.sum())]] += 1
    # Sort the shuffled images by class, then keep the first `take` of each class.
    shuffled = randomness.permutation(len(labels), *keys)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    starts = torch.cumsum(counts, 0) - counts
    of_class = labels[by_class]
    position = torch.arange(len(labels)) - starts[of_class]
    return by_class[position < take[of_class]].sort().values
