"""Read safetensors files, and write files atomically."""

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

# The one metadata key of our checkpoints. With several keys safetensors would write them in random order,
# and two equal checkpoints would differ as files.
HEADER_KEY = "checkpoint"


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, and its metadata.

    UserError: the file is missing, truncated, or of another format, such as a pickle.
    """
    with open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def open_safetensors(path: Path):
    """Open a safetensors file. Opening it checks that its length fits its header.

    UserError: the file is missing, truncated, or of another format, such as a pickle.
    """
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
    """Yield a temporary binary file to write. Rename it to `path` when the block ends.

    The file is flushed to disk before it is renamed, so a reader never sees half a file. After an error
    `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())  # the same permissions as with open()
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
    """Return the process's umask. Python can read it only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())
