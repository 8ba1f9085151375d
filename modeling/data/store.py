"""Decoded images on disk. A split is decoded once, into a file that all processes map into memory."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from PIL import Image

from modeling.data.decoding import to_tensor

VERSION = 2
CHUNK_BYTES = 16 * 2**20  # each chunk of the pixels has a checksum
CHECKED_CHUNKS = 64  # at most this many are read when a store is opened
Pixels = torch.Tensor | list[torch.Tensor]


def collect(images: Iterable[Image.Image]) -> Pixels:
    """Turn RGB images into uint8 (N, 3, H, W), or into a list of (3, H_i, W_i) if sizes differ."""
    pixels = [to_tensor(image) for image in images]
    return torch.stack(pixels) if len({image.shape for image in pixels}) == 1 else pixels


def store_path(fingerprint: str | None, *content: object) -> Path | None:
    """Give the path of a split's store in the cache of `datasets`, or None if the split has no fingerprint.

    The name is a hash of the fingerprint and of `content`, all else that decides the pixels.
    """
    if fingerprint is None:
        return None
    key = hashlib.sha256(json.dumps([VERSION, fingerprint, *content]).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "decoded_images" / key


def build(path: Path, images: Iterable[Image.Image | None]) -> None:
    """Write a store, image by image, unless it exists and is whole. None is a bad image: it has no pixels.

    One process builds and the others wait. A killed process leaves only a folder that the next one deletes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if is_whole(path):
            return
        half = path.with_suffix(".half")
        for leftover in (half, path):
            shutil.rmtree(leftover, ignore_errors=True)
        half.mkdir()
        sizes = []
        try:
            with (half / "pixels").open("wb") as file:
                for image in images:
                    if image is not None:
                        file.write(np.array(image).transpose(2, 0, 1).tobytes())
                    sizes.append((image.height, image.width) if image is not None else (0, 0))
                file.flush()
                os.fsync(file.fileno())
            checksums = [_checksum(half / "pixels", chunk) for chunk in range(_num_chunks(half / "pixels"))]
            tensors = {
                "sizes": torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
                "checksums": torch.tensor(checksums, dtype=torch.int64),
            }
            safetensors.torch.save_file(tensors, half / "sizes.safetensors")
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, where decoded images are kept", str(half)
            ) from error
        half.rename(path)


def _num_chunks(pixels: Path) -> int:
    return -(-pixels.stat().st_size // CHUNK_BYTES)


def _checksum(pixels: Path, chunk: int) -> int:
    with pixels.open("rb") as file:
        file.seek(chunk * CHUNK_BYTES)
        return zlib.crc32(file.read(CHUNK_BYTES))


def is_whole(path: Path) -> bool:
    """Tell whether a store exists, has its full length, and has the checksums of the chunks that are read."""
    try:
        tensors = safetensors.torch.load_file(path / "sizes.safetensors")
        sizes, checksums = tensors["sizes"], tensors["checksums"]
        pixels = path / "pixels"
        if pixels.stat().st_size != 3 * int(sizes.prod(dim=1).sum()):
            return False
        every = max(1, len(checksums) // CHECKED_CHUNKS)
        return all(
            _checksum(pixels, chunk) == int(checksums[chunk]) for chunk in range(0, len(checksums), every)
        )
    except (OSError, KeyError, safetensors.SafetensorError):
        return False


def read(path: Path) -> Pixels:
    """Map a store into memory, in the form that collect() gives. The bytes are read when used."""
    sizes = safetensors.torch.load_file(path / "sizes.safetensors")["sizes"]
    lengths = 3 * sizes.prod(dim=1)
    flat = torch.from_file(str(path / "pixels"), shared=False, size=int(lengths.sum()), dtype=torch.uint8)
    if bool((sizes == sizes[0]).all()):
        return flat.view(len(sizes), 3, *sizes[0].tolist())
    return [
        part.view(3, *size) for part, size in zip(flat.split(lengths.tolist()), sizes.tolist(), strict=True)
    ]
