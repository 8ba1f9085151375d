"""Files that appear whole, and safetensors files."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import safetensors
import safetensors.torch
import torch

from modeling.errors import UserError

HEADER_KEY = "checkpoint"  # of a checkpoint's metadata; one key: safetensors writes several in random order


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. UserError: missing, truncated, or something else, such as a pickle."""
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def open_safetensors(path: Path):
    """The open file, whose lengths are checked by then. UserError: missing, truncated, or something else, such as a pickle."""
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        reason = (
            "pickled checkpoints can run code and are not read"
            if path.suffix in (".pth", ".pt", ".bin")
            else str(error)
        )
        raise UserError(f"{path} is not a whole safetensors file: {reason}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write; at the end it is flushed to disk and takes the name `path` at once. On an error `path` stays as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())  # as open() would have made it
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())
