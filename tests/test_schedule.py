"""The learning rate at its ends and in between."""

import itertools
import math

import pytest
import torch

from modeling.optim import learning_rate


def rates(total=100, **options):
    return [learning_rate(step, base=0.1, total_steps=total, **options) for step in range(total)]


def test_cosine_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for rate in rates():
        assert math.isclose(rate, scheduler.get_last_lr()[0], rel_tol=1e-9, abs_tol=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_ends():
    assert rates()[0] == 0.1
    assert learning_rate(100, base=0.1, total_steps=100) == pytest.approx(0)
    assert 0 < rates()[-1] < 1e-4
    assert rates()[50] == pytest.approx(0.05)


def test_warmup_rises_linearly_to_the_base():
    warm = rates(warmup_steps=10)
    assert warm[:10] == pytest.approx([0.01 * k for k in range(1, 11)])
    assert warm[10] == 0.1
    assert warm[55] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(warm[10:]))


def test_constant():
    assert set(rates(schedule="constant")) == {0.1}
    assert rates(schedule="constant", warmup_steps=4)[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


def test_a_run_shorter_than_its_warmup():
    assert rates(total=3, warmup_steps=6) == pytest.approx([0.1 / 6, 0.2 / 6, 0.3 / 6])
