"""The tensors of a weights file: read, checked, and loaded into a model."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling.errors import UserError
from modeling.files import HEADER_KEY, read_tensors, tensors_digest
from modeling.models.backbones import ViTLinearProbe
from modeling.models.positions import fit_positions
from modeling.run.header import parse_header

# What wrappers of a model put before its keys: torch.compile, DistributedDataParallel, and our linear probe.
PREFIXES = ("_orig_mod.", "module.", "backbone.")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file. UserError: it is broken, was altered, or holds NaN or infinite numbers."""
    state, metadata = read_tensors(path)
    if HEADER_KEY in metadata:
        check_digest(state, parse_header(metadata[HEADER_KEY], path), path)
    for name, value in state.items():
        # A scalar may be infinite: timm's gemma4_vit has bounds that are.
        is_bound = value.dim() == 0 and not value.isnan()
        if value.is_floating_point() and not is_bound and not value.float().isfinite().all():
            raise UserError(f"{path} holds NaN or infinite numbers in {name}: choose other weights")
    return state


def check_digest(state: dict[str, torch.Tensor], header: dict[str, Any], path: Path) -> None:
    """UserError: the tensors are not those that the header was written with."""
    if tensors_digest(state) != header["tensors_sha256"]:
        raise UserError(f"the tensors of {path} were altered: their SHA-256 is not the header's")


def head_keys(model: nn.Module) -> list[str]:
    """Return the keys of the layers whose shape depends on the number of classes.

    They belong to the last layer, or to the two heads of a distilled model.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    heads = (
        config.get("classifier")
        or [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    )
    heads = (heads,) if isinstance(heads, str) else heads
    # timm's record of levit_384_s8 names only one of its two heads.
    heads = (*heads, "head_dist.linear") if hasattr(model, "head_dist") else heads
    return [key for key in model.state_dict() if key.startswith(tuple(f"{head}." for head in heads))]


def load_state(
    model: nn.Module, state: dict[str, torch.Tensor], path: Path, *, new_head: bool = False
) -> None:
    """Load the tensors of a file, of timm or of this project, into `model`, and say what stays new.

    The prefixes of wrappers are removed. Position embeddings are fitted to the model's image size. A head for
    another number of classes is not loaded, and with `new_head` no head is. UserError: other keys, shapes or
    kinds of numbers differ.
    """
    probe = isinstance(model, ViTLinearProbe)
    backbone = model.backbone if probe else model
    state = strip_prefixes(state, backbone)
    head = {key: state.pop(key) for key in list(state) if probe and key.startswith("head.")}
    shapes = {key: value.shape for key, value in state.items()}
    state = fit_positions(adapt(state, backbone, path), backbone)
    fitted = [key for key, shape in shapes.items() if key in state and state[key].shape != shape]
    if probe:
        state = {f"backbone.{key}": value for key, value in state.items()} | head
    add_shared(state, model)
    target = model.state_dict()
    new = [
        key
        for key in head_keys(model)
        if new_head or key not in state or state[key].shape != target[key].shape
    ]
    state |= {key: target[key] for key in new}
    check_fit(state, target, path)
    model.load_state_dict(state)
    if new or fitted:
        notes = [f"new: {', '.join(new)}"] if new else []
        notes += [f"fitted to the image size: {', '.join(fitted)}"] if fitted else []
        print(f"weights    are loaded; {'; '.join(notes)}", flush=True)


def strip_prefixes(state: dict[str, torch.Tensor], backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Remove the prefixes of wrappers that all keys have. A probe's head has none: its backbone has."""
    own = tuple(backbone.state_dict())
    while state:
        for prefix in PREFIXES:
            outside = [key for key in state if not key.startswith(prefix)]
            is_wrapped = not outside or (prefix == "backbone." and len(outside) < len(state))
            is_wrapped = is_wrapped and all(key.startswith("head.") for key in outside)
            if is_wrapped and not any(key.startswith(prefix) for key in own):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                break
        else:
            break
    return state


def adapt(state: dict[str, torch.Tensor], backbone: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """Apply timm's own function, which renames keys and fits position embeddings, where the model has one."""
    function = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if function is None:
        return state
    try:
        return dict(function(state, backbone))
    except Exception as error:  # these functions raise whatever their code comes across
        raise UserError(f"{path} does not fit the model: {type(error).__name__} {error}") from error


def add_shared(state: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Give a tensor that has several names in the model all of them, where `state` has one."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    for shared in names.values():
        there = [name for name in shared if name in state]
        for name in shared if there else ():
            state.setdefault(name, state[there[0]])


def check_fit(
    state: dict[str, torch.Tensor], target: dict[str, torch.Tensor], path: Path, *, exact: bool = False
) -> None:
    """UserError: keys or shapes differ, or whole numbers stand for real ones. `exact`: or dtypes differ."""
    both = sorted(target.keys() & state.keys())
    for what, keys in (
        ("lacks", sorted(target.keys() - state.keys())),
        ("has unexpected", sorted(state.keys() - target.keys())),
        ("has other shapes of", [key for key in both if target[key].shape != state[key].shape]),
        (
            "has another kind of numbers in",
            [key for key in both if not _same_kind(state[key], target[key], exact)],
        ),
    ):
        if keys:
            names = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
            raise UserError(f"{path} does not fit the model: it {what} {names}")


def _same_kind(one: torch.Tensor, other: torch.Tensor, exact: bool) -> bool:
    return one.dtype == other.dtype or (not exact and one.is_floating_point() == other.is_floating_point())
