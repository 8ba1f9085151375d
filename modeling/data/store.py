"""Decoded images on disk. A split is decoded once, into a file that all processes map into memory."""

import hashlib
import json
import shutil
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

VERSION = 1
Pixels = torch.Tensor | list[torch.Tensor]


def collect(images: Iterable[Image.Image]) -> Pixels:
    """Turn RGB images into uint8 (N, 3, H, W), or into a list of (3, H_i, W_i) if sizes differ."""
    pixels = [to_tensor(image) for image in images]
    return torch.stack(pixels) if len({image.shape for image in pixels}) == 1 else pixels


def store_path(dataset: datasets.Dataset, *content: object) -> Path | None:
    """Give the path of a split's store in the cache of `datasets`, or None.

    The name is a hash of the split's fingerprint and of `content`, all else that decides the pixels. A
    split that is in memory only has no lasting fingerprint.
    """
    if not dataset.cache_files:
        return None
    key = hashlib.sha256(json.dumps([VERSION, dataset._fingerprint, *content]).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "decoded_images" / key


def build(path: Path, images: Iterable[Image.Image]) -> None:
    """Write a store, image by image, unless it exists.

    One process builds and the others wait. A killed process leaves only a folder that the next one deletes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if _is_whole(path):
            return
        half = path.with_suffix(".half")
        for leftover in (half, path):
            shutil.rmtree(leftover, ignore_errors=True)
        half.mkdir()
        sizes = []
        try:
            with (half / "pixels").open("wb") as file:
                for image in images:
                    file.write(np.array(image).transpose(2, 0, 1).tobytes())
                    sizes.append((image.height, image.width))
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, where decoded images are kept", str(half)
            ) from error
        safetensors.torch.save_file({"sizes": torch.tensor(sizes)}, half / "sizes.safetensors")
        half.rename(path)


def _is_whole(path: Path) -> bool:
    try:
        sizes = safetensors.torch.load_file(path / "sizes.safetensors")["sizes"]
        return (path / "pixels").stat().st_size == 3 * int(sizes.prod(dim=1).sum())
    except (OSError, safetensors.SafetensorError):
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
