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
from modeling.files import (
    HEADER_KEY,
    atomic_write,
    open_safetensors,
    read_tensors,
    tensors_digest,
    unique_tensors,
)
from modeling.models import build_empty_model, build_model
from modeling.models.tensors import add_shared, check_digest, check_fit
from modeling.models.weights import Weights
from modeling.run.header import FORMAT_VERSION, header_digest, parse_header

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
    """Write weights and a header of JSON values. `clock` holds the times; the rest is reproducible.

    A tensor with several names is saved once. The header gets the digests of the tensors and of itself.
    """
    clock = {"saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **clock}
    state = unique_tensors(state)
    header = {"format_version": FORMAT_VERSION, **header, "tensors_sha256": tensors_digest(state)}
    # The digest is of the header as it will be read, in which tuples are lists.
    header = json.loads(json.dumps(header, allow_nan=False))
    header |= {"header_sha256": header_digest(header), "clock": clock}
    text = json.dumps(header, allow_nan=False, sort_keys=True)
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(state, metadata={HEADER_KEY: text}))


def read_header(path: str | Path) -> dict[str, Any]:
    """Read and check a checkpoint's header.

    UserError: the file is broken, train.py did not write it, or its header is damaged or not valid.
    """
    with open_safetensors(Path(path)) as file:
        return _parse(Path(path), file.metadata() or {})


def _parse(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if HEADER_KEY not in metadata:
        raise UserError(
            f"{path} holds weights but no description of a model: give a checkpoint that train.py wrote"
        )
    return parse_header(metadata[HEADER_KEY], path)


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model from the file alone. Return it in eval mode, with the header.

    The model takes memory only after its shapes were found to be those of the file. UserError: not a whole
    safetensors file, not one of ours, altered since it was written, or it does not fit its own model.
    """
    path = Path(path)
    state, metadata = read_tensors(path)
    header = _parse(path, metadata)
    check_digest(state, header, path)
    empty = build_empty_model(len(state), header["model"])
    add_shared(state, empty)
    check_fit(state, empty.state_dict(), path, exact=True)
    model = build_model(**header["model"])
    model.load_state_dict(state)
    return model.eval(), header
