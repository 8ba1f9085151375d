"""The features that a frozen backbone computes, once for each view of an image, kept on disk."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from accelerate import Accelerator
from torch import nn

from modeling.data import Images
from modeling.pretrained import ViTLinearProbe
from modeling.transforms import Preprocessing

_EMPTY = 0x5BD1E995  # what a row's checksum is off by: a row of zeros was never written


class FeatureCache:
    """Features of one split's images in a folder of the cache of `datasets`, in a file for each view, which processes share.

    A file is (rows of the split, D + 1) int32, mapped into memory: the bits of D float32 and a checksum, by which a row that was never
    written, or only half when a process was killed, is told from a whole one. The folder's name is a hash of all that the bits
    depend on: the backbone's weights, the pixels and their preprocessing, `content` (augmentation, seed, the batches that features
    are computed in), precision, threads, versions. num_views 0: each epoch sees a view of its own.
    """

    def __init__(self, accelerator: Accelerator, probe: ViTLinearProbe, images: Images, *content: Any, num_views: int = 0):
        self.accelerator, self.probe, self.num_views = accelerator, probe, num_views
        self.num_rows = int(images.rows.max()) + 1
        self.files: dict[str, torch.Tensor] = {}
        weights = hashlib.sha256()
        for name, value in probe.backbone.state_dict().items():
            weights.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        machine = [accelerator.mixed_precision, accelerator.device.type, torch.get_num_threads(), torch.__version__, timm.__version__]
        key = json.dumps([weights.hexdigest(), images.fingerprint(), images.rows.tolist(), machine, *map(str, content)])
        folder = hashlib.sha256(key.encode()).hexdigest()[:32]
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "features" / folder

    def view(self, epoch: int) -> int:
        """The augmented view of every image that an epoch sees."""
        return epoch % self.num_views if self.num_views else epoch

    def get(self, name: str, rows: torch.Tensor, weights: torch.Tensor, make_input: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Features (B, D) float32 on the accelerator's device, of the images `rows` (B,) of the split, as the file `name` has them.

        Where one is missing, all are computed from make_input(), so that the batch they are computed in is always the same; those of
        weight (B,) 0 are not kept.
        """
        file = self._open(name)
        stored = file[rows]
        features, sums = stored[:, :-1].contiguous(), stored[:, -1]
        if torch.equal(_checksum(features), sums):
            return features.view(torch.float32).to(self.accelerator.device, non_blocking=True)
        x = make_input()  # outside of autocast: its sums are exact in float32
        with self.accelerator.autocast():
            computed = self.probe.features(x)
        bits = computed.cpu()[weights > 0].contiguous().view(torch.int32)
        file[rows[weights > 0]] = torch.cat([bits, _checksum(bits)[:, None]], dim=1)
        return computed

    def _open(self, name: str) -> torch.Tensor:
        if name not in self.files:
            path, shape = self.folder / name, (self.num_rows, self.probe.head.in_features + 1)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    if hasattr(os, "posix_fallocate"):  # a disk that is full is an error now, and not a signal later
                        os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}, where features are kept", str(path)) from error
            self.files[name] = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=torch.int32).view(shape)
        return self.files[name]


def _checksum(bits: torch.Tensor) -> torch.Tensor:
    return bits.sum(dim=1, dtype=torch.int32) ^ _EMPTY


def open_caches(
    args, accelerator: Accelerator, model: nn.Module, images: dict[str, Images], prep: Preprocessing
) -> dict[str, FeatureCache]:
    """A cache for each split of a linear probe; of no other model, and where a batch mixes images, not for train.

    ValueError: args.feature_views asks for one that cannot be.
    """
    is_probe, mixes = isinstance(model, ViTLinearProbe), bool(args.mixup or args.cutmix)
    if args.feature_views and (mixes or not is_probe):
        why = "mixup and cutmix blend images" if is_probe else f"the backbone of {args.model} is not frozen"
        raise ValueError(f"--feature-views keeps a frozen backbone's features of single images, but {why}: use --feature-views 0")
    splits = [split for split in images if is_probe and not (split == "train" and mixes)]
    batches = (args.augment, args.seed, args.batch_size, args.gradient_accumulation_steps, accelerator.num_processes)
    return {
        split: FeatureCache(accelerator, model, images[split], prep, *(batches if split == "train" else ()), num_views=args.feature_views)
        for split in splits
    }
