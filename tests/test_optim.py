"""Muon against torch's own Muon and AdamW, parameter by parameter."""

import copy

import pytest
import torch
from torch import nn

from modeling.optim import build_optimizer, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (16, 96), (96, 16)])
def test_orthogonalize_keeps_the_directions_and_evens_out_the_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ orthogonalize(matrix) @ right.T
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 3),
        nn.Flatten(),
        nn.Linear(96, 16),
        nn.Linear(16, 4),
    )


def test_each_parameter_moves_as_torchs_own_optimizers_move_it():
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer("muon", ours, lr=0.01, weight_decay=0.1)
    # torch's Muon takes matrices only, so it sees the filter as one.
    filters = nn.Parameter(theirs[2].weight.detach().flatten(1).clone())
    hidden = [filters, theirs[4].weight]
    others = [p for p in theirs.parameters() if p is not theirs[2].weight and p is not theirs[4].weight]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(4):
        torch.manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        filters.grad = theirs[2].weight.grad.flatten(1)
        optimizer.step()
        muon.step()
        adamw.step()
        theirs[2].weight.data.copy_(filters.data.view_as(theirs[2].weight))
    start = small_model().state_dict()
    for name, value in ours.named_parameters():
        moved, expected = value - start[name], theirs.state_dict()[name] - start[name]
        # torch's Muon orthogonalises in bfloat16
        tolerance = 0.03 if name in ("2.weight", "4.weight") else 1e-4
        assert (moved - expected).norm() <= tolerance * expected.norm(), name


def test_memory_layout_changes_nothing_and_the_state_continues():
    one, other = small_model(), small_model().to(memory_format=torch.channels_last)
    pair = [build_optimizer("muon", model, lr=0.01, weight_decay=0.1) for model in (one, other)]
    for step in range(4):
        torch.manual_seed(step)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            a.grad = torch.randn_like(a, memory_format=torch.contiguous_format)
            b.grad = torch.empty_like(b).copy_(a.grad)
        if step == 2:  # as after a resume
            state = copy.deepcopy(pair[1].state_dict())
            pair[1] = build_optimizer("muon", other, lr=0.01, weight_decay=0.1)
            pair[1].load_state_dict(state)
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
