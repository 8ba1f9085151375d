"""Random numbers as a pure function of integer keys, so that no generator's state has to be saved.

`bits(*keys)` hashes its keys, for example (seed, purpose, epoch, image index, draw). It applies the finaliser
of SplitMix64 once per key (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014). Keys broadcast like tensors, so one call serves a whole batch. The numbers depend on the keys alone:
they are the same on CPU and GPU, in every batch, worker and order.
"""

import torch

# The purpose of a number. It is always the key after the seed, so that no two purposes share a stream.
ORDER, SPLIT, SUBSET, AUGMENT, MIX, DROPOUT, INIT = range(7)
BOOTSTRAP, HONEST, FOLD, PICTURE = range(7, 11)  # for comparisons: modeling/stats and modeling/pages


def _signed(value: int) -> int:
    """Return the signed 64-bit integer with the same lowest 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA, _MUL1, _MUL2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """Shift right by n bits and fill with zeros. torch's own shift fills with the sign bit."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: int | torch.Tensor) -> int | torch.Tensor:
    """Apply the finaliser of SplitMix64."""
    x = (x ^ _shift_right(x, 30)) * _MUL1
    x = ((x if isinstance(x, torch.Tensor) else _signed(x)) ^ _shift_right(x, 27)) * _MUL2
    return (x if isinstance(x, torch.Tensor) else _signed(x)) ^ _shift_right(x, 31)


def bits(*keys: int | torch.Tensor) -> torch.Tensor:
    """Return 64 random bits (int64) for each element of the broadcast keys.

    A key is an integer or an int64 tensor.
    """
    # The state is a Python integer until the first key that is a tensor, because integers are faster.
    state: int | torch.Tensor = 0
    for key in keys:
        state = _mix(state ^ (key if isinstance(key, torch.Tensor) else _signed(key))) + _GAMMA
        state = state if isinstance(state, torch.Tensor) else _signed(state)
    return torch.as_tensor(_mix(state))


def uniform(*keys: int | torch.Tensor) -> torch.Tensor:
    """Return a float32 in [0, 1), a multiple of 2**-24, for each element of the broadcast keys."""
    return _shift_right(bits(*keys), 40).to(torch.float32) * 2.0**-24


def permutation(n: int, *keys: int) -> torch.Tensor:
    """Return a permutation of range(n), shape (n,), int64."""
    return torch.argsort(bits(*keys, torch.arange(n)), stable=True)


def seed(*keys: int) -> int:
    """Return a non-negative 63-bit seed for another library's generator."""
    return int(_shift_right(bits(*keys), 1))


class Draws:
    """Uniform float32 numbers in [0, 1) for the images of one batch.

    draws(n) gives number n of each image, (B,). draws(n, count) gives numbers n to n + count - 1, (B, count).
    They are drawn on the CPU, so that a choice that depends on them never waits for the device.
    """

    def __init__(self, seed: int, epoch: int, indices: torch.Tensor):
        self.keys, self.indices = (seed, AUGMENT, epoch), indices

    def __call__(self, draw: int, count: int | None = None) -> torch.Tensor:
        if count is None:
            return uniform(*self.keys, self.indices, draw)
        return uniform(*self.keys, self.indices[:, None], torch.arange(draw, draw + count))
