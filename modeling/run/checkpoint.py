"""Checkpoints: one safetensors file that describes itself."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from modeling.data.resize import Preprocessing
from modeling.errors import UserError
from modeling.files import HEADER_KEY, atomic_write, open_safetensors, read_tensors
from modeling.models import build_model
from modeling.models.weights import Weights

FORMAT_VERSION = 1
ROOT = Path(__file__).resolve().parent.parent.parent


def git_commit() -> str | None:
    """The commit of this checkout, with "-dirty" if tracked files have changed. None: there is no git."""
    try:
        run = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    names = (
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "datasets",
        "safetensors",
        "scikit-learn",
        "numpy",
        "pillow",
    )
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def make_header(
    *,
    model: dict[str, Any],
    classes: list[str],
    preprocessing: Preprocessing,
    arguments: dict[str, Any],
    dataset: dict[str, Any],
    weights: Weights,
) -> dict[str, Any]:
    """Return what a checkpoint records about its run.

    model: the arguments of build_model. arguments: the resolved settings. dataset: its name, its revision and
    the SHA-256 of its training images.
    """
    return {
        "model": model,
        "classes": classes,
        "preprocessing": dataclasses.asdict(preprocessing),
        "arguments": arguments,
        "dataset": dataset,
        "weights": {"source": weights.source, "revision": weights.revision},
        "versions": versions(),
        "git_commit": git_commit(),
    }


def save_checkpoint(
    path: Path, state: dict[str, torch.Tensor], header: dict[str, Any], clock: dict[str, float]
) -> None:
    """Write weights and a header of JSON values. `clock` holds the times; the rest is reproducible."""
    clock = {"saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **clock}
    header = {"format_version": FORMAT_VERSION, **header, "clock": clock}
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_write(path) as file:
        file.write(
            safetensors.torch.save(
                state, metadata={HEADER_KEY: json.dumps(header, allow_nan=False, sort_keys=True)}
            )
        )


def read_header(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's header. UserError: the file is broken, or train.py did not write it."""
    with open_safetensors(Path(path)) as file:
        return _parse(Path(path), file.metadata() or {})


def _parse(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if HEADER_KEY not in metadata:
        raise UserError(
            f"{path} holds weights but no description of a model: give a checkpoint that train.py wrote"
        )
    header = json.loads(metadata[HEADER_KEY])
    if header["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {header['format_version']}, but this program reads only up to "
            f"{FORMAT_VERSION}: update the program"
        )
    return header


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model from the file alone. Return it in eval mode, with the header.

    UserError: the file is broken, train.py did not write it, or its tensors do not fit the model.
    """
    state, metadata = read_tensors(Path(path))
    header = _parse(Path(path), metadata)
    model = build_model(**header["model"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(
            f"{path} does not fit its own model: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval(), header
