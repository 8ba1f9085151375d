"""The hash: known values, uniformity, independence between keys."""

import torch
from scipy import stats

from modeling import randomness


def splitmix64_finalizer(x: int) -> int:
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_bits_equal_the_same_hash_in_python_integers():
    mask = (1 << 64) - 1
    keys = (42, 3, 2**62 + 12345, 7)
    state = 0
    for key in keys:
        state = (splitmix64_finalizer(state ^ key) + 0x9E3779B97F4A7C15) & mask
    assert int(randomness.bits(*keys)) & mask == splitmix64_finalizer(state)


def test_a_batch_of_keys_gives_what_each_key_gives_alone():
    indices = torch.tensor([5, 0, 9_999_999, 17])
    together = randomness.uniform(1, 2, indices, 3)
    alone = torch.stack([randomness.uniform(1, 2, int(i), 3) for i in indices])
    assert torch.equal(together, alone)


def test_uniform_is_uniform_over_indices_epochs_and_draws():
    n = 200_000
    for u in (
        randomness.uniform(42, randomness.AUGMENT, 0, torch.arange(n), 0),
        randomness.uniform(42, randomness.AUGMENT, torch.arange(n), 0, 0),
        randomness.uniform(42, randomness.AUGMENT, 0, 0, torch.arange(n)),
        randomness.uniform(torch.arange(n), randomness.AUGMENT, 0, 0, 0),
    ):
        assert u.min() >= 0 and u.max() < 1
        assert stats.kstest(u.double().numpy(), "uniform").pvalue > 1e-3
        counts = torch.bincount((u * 64).long(), minlength=64)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_neighbouring_keys_are_independent():
    u = randomness.uniform(42, torch.arange(300)[:, None], torch.arange(300)[None, :])
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u, u.T)):
        off = ~torch.eye(*a.shape, dtype=torch.bool)  # a matrix and its transpose share the diagonal
        r = torch.corrcoef(torch.stack([a[off].flatten(), b[off].flatten()]).double())[0, 1]
        assert abs(r) < 5 / off.sum().sqrt()
    cells = torch.bincount(((u[1:] * 16).long() * 16 + (u[:-1] * 16).long()).flatten(), minlength=256)
    assert stats.chisquare(cells.numpy()).pvalue > 1e-3


def test_permutation_is_one_and_mixes():
    p = randomness.permutation(10_000, 42, randomness.ORDER, 0)
    assert torch.equal(p.sort().values, torch.arange(10_000))
    assert not torch.equal(p, randomness.permutation(10_000, 42, randomness.ORDER, 1))
    assert abs(torch.corrcoef(torch.stack([p.double(), torch.arange(10_000).double()]))[0, 1]) < 0.05
    assert randomness.permutation(1, 0).tolist() == [0]


def test_seed_is_a_seed():
    seeds = {randomness.seed(42, randomness.DROPOUT, step) for step in range(1000)}
    assert len(seeds) == 1000 and min(seeds) >= 0
    torch.Generator().manual_seed(max(seeds))
