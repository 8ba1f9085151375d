"""Random numbers as a pure function of where they stand, so that no generator's state is ever saved.

`bits(*keys)` hashes integer keys, say (seed, purpose, epoch, image index, draw), with the finaliser of SplitMix64 (Steele,
Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), once per key. Keys broadcast like tensors, so one
call serves a whole batch, and CPU and GPU give the same numbers, whatever the batch, the worker or the order.
"""

import torch

# What a number is for is always the key after the seed: no two purposes ever share a stream.
ORDER, SPLIT, SUBSET, AUGMENT, MIX, DROPOUT, INIT = range(7)
BOOTSTRAP, HONEST, FOLD, PICTURE = range(7, 11)  # of a comparison: see modeling/stats and modeling/page.py


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA, _MUL1, _MUL2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # torch's shift keeps the sign; a hash needs zeros


def _mix(x: int | torch.Tensor) -> int | torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MUL1
    x = ((x if isinstance(x, torch.Tensor) else _signed(x)) ^ _shift_right(x, 27)) * _MUL2
    return (x if isinstance(x, torch.Tensor) else _signed(x)) ^ _shift_right(x, 31)


def bits(*keys: int | torch.Tensor) -> torch.Tensor:
    """64 random bits (int64) for each combination of the keys, integers or int64 tensors that broadcast together."""
    state: int | torch.Tensor = 0  # an integer, which is quicker, up to the first key that is a tensor
    for key in keys:
        state = _mix(state ^ (key if isinstance(key, torch.Tensor) else _signed(key))) + _GAMMA
        state = state if isinstance(state, torch.Tensor) else _signed(state)
    return torch.as_tensor(_mix(state))


def uniform(*keys: int | torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1), 24 bits fine, one for each combination of the keys."""
    return _shift_right(bits(*keys), 40).to(torch.float32) * 2.0**-24


def permutation(n: int, *keys: int) -> torch.Tensor:
    """A permutation of range(n), shape (n,), int64."""
    return torch.argsort(bits(*keys, torch.arange(n)), stable=True)


def seed(*keys: int) -> int:
    """A non-negative 63-bit seed for a library's own generator."""
    return int(_shift_right(bits(*keys), 1))
