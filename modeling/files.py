"""Read safetensors files, and write files atomically."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
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
# What file systems answer that cannot do what is asked of a folder.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EACCES)
TEMPORARY_BYTES = len(".") + len(".01234567.tmp")  # what atomic_write adds to a name
PROBE_BYTES = 4096  # a full disk takes an empty file


# A longer header is refused unread: JSON of 100 MB takes more than a gigabyte of memory. The header of a file
# of 10,000 tensors and 20,000 classes has about 2 MB.
MAX_HEADER_BYTES = 16 * 2**20


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return all tensors of a safetensors file, and its metadata.

    UserError: the file is missing, truncated, or of another format, such as a pickle.
    """
    with open_safetensors(path) as file:
        try:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except Exception as error:  # what safetensors and torch raise is not documented
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def open_safetensors(path: Path):
    """Open a safetensors file. Opening it checks that its length fits its header.

    UserError: the file is missing, truncated, or of another format, such as a pickle.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        reason = f"its header would have {header_bytes:,} bytes"
    else:
        try:
            return safetensors.safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            reason = str(error)
    if path.suffix in (".pth", ".pt", ".bin"):
        reason = "pickled checkpoints can run code and are not read"
    raise UserError(f"{path} is not a whole safetensors file: {reason}")


def unique_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors on the CPU, as safetensors takes them, each under its first name only.

    A module that stands in two places of a model gives its tensors two names.
    """
    unique, seen = {}, set()
    for name, value in tensors.items():
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.data_ptr() and memory in seen:  # 0: an empty tensor, or one without memory of its own
            continue
        seen.add(memory)
        value = value.detach().cpu().contiguous()
        # safetensors refuses a tensor that is a part of another one's memory.
        is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
        unique[name] = value.clone() if is_part else value
    return unique


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of names, dtypes, shapes and values. The order does not matter."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary binary file to write. Rename it to `path` when the block ends.

    The file is flushed to disk before it is renamed, so a reader never sees half a file. After an error
    `path` is unchanged. An OSError names a file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # a file that could not be made, or a disk that is gone
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have a rename in the folder on disk. Some file systems, and Windows, cannot do that for a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Give an OSError of this block the name of the file, if it names none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(folder: Path, longest_name: int = 0) -> None:
    """Write a file as atomic_write does, with a name of `longest_name` bytes, and remove it.

    A folder that is missing is not made: its nearest parent is tried. UserError: that fails.
    """
    place = next(place for place in (folder, *folder.parents) if place.exists())
    probe = place / f".writable-{secrets.token_hex(8)}".ljust(longest_name, "-")
    try:
        with atomic_write(probe) as file:
            file.write(bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(
                f"the names of files in {folder} would be too long for its file system, "
                f"with {longest_name + TEMPORARY_BYTES} bytes: give a shorter --run-name"
            ) from error
        raise UserError(
            f"cannot write to the output folder {folder}: {error.strerror}; "
            "make room or correct the permissions there, or give another --output-dir"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. A name that is not UTF-8 is written with backslashes."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))
