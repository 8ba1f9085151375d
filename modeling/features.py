"""The features that a frozen backbone computes, once for each view of an image, kept on disk."""

import dataclasses
import errno
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
import torchvision
from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from modeling.data.images import Images
from modeling.data.resize import Preprocessing
from modeling.errors import UserError
from modeling.models.backbones import ViTLinearProbe

_EMPTY = 0x5BD1E995  # what a row's checksum is off by: a row of zeros was never written
_CODE = (
    "data/augment.py",
    "data/resize.py",
    "randomness.py",
    "models/backbones.py",
)  # what makes a view and its features


class FeatureCache:
    """Features of one split's images in a folder of the cache of `datasets`, in a file for each view, which processes share.

    A file is (N, D + 1) int32, mapped into memory: the bits of D float32 and a checksum, by which a row that was never written, or
    only half when a process was killed, is told from a whole one. The folder's name is a hash of all that the bits depend on: the
    backbone's weights, the images and their preprocessing, `content` (augmentation, seed, the batches that features are computed in),
    hardware, precision, threads, versions, code. num_views 0: each epoch sees a view of its own.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        probe: ViTLinearProbe,
        images: Images,
        *content: Any,
        num_views: int = 0,
    ):
        self.accelerator, self.probe, self.rows, self.num_views = accelerator, probe, images.rows, num_views
        self.shape = (len(images), probe.head.in_features + 1)
        self.opened: tuple[str, torch.Tensor] | None = None
        digest = hashlib.sha256()
        for name, value in probe.backbone.state_dict().items():
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        for name in _CODE:
            digest.update((Path(__file__).parent / name).read_bytes())
        on_gpu = accelerator.device.type == "cuda"
        hardware = (
            torch.cuda.get_device_name(accelerator.device)
            if on_gpu
            else torch.backends.cpu.get_cpu_capability()
        )
        settings = [
            accelerator.mixed_precision,
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        ]
        versions = [torch.__version__, torchvision.__version__, timm.__version__]
        key = [
            digest.hexdigest(),
            images.fingerprint(),
            images.origin,
            images.rows.tolist(),
            hardware,
            *settings,
            *versions,
            *content,
        ]
        folder = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "features" / folder

    def view(self, epoch: int) -> int:
        """The augmented view of every image that an epoch sees."""
        return epoch % self.num_views if self.num_views else epoch

    def is_complete(self, name: str) -> bool:
        """Whether the file `name` has the features of every image."""
        return bool(_is_whole(self._open(name)).all())

    def get(
        self, name: str, rows: torch.Tensor, weights: torch.Tensor, make_input: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Features (B, D) float32 on the accelerator's device, of the images `rows` (B,) of the split, as the file `name` has them.

        Where one is missing all are computed from make_input(), as a batch; those of weight (B,) 0 are not kept.
        """
        file, device, positions = (
            self._open(name),
            self.accelerator.device,
            torch.searchsorted(self.rows, rows),
        )
        stored = file[positions]
        if _is_whole(stored).all():
            features = stored[:, :-1].contiguous().view(torch.float32)
            return (features.pin_memory() if device.type == "cuda" else features).to(
                device, non_blocking=True
            )
        x = make_input()  # outside of autocast: its sums are exact in float32
        with self.accelerator.autocast():
            computed = self.probe.features(x)
        bits = computed.cpu()[weights > 0].contiguous().view(torch.int32)
        file[positions[weights > 0]] = torch.cat([bits, _checksum(bits)[:, None]], dim=1)
        return computed

    def _open(self, name: str) -> torch.Tensor:
        if self.opened is None or self.opened[0] != name:
            path, size = self.folder / name, 4 * math.prod(self.shape)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{self.folder}.lock"), path.open("ab") as file:
                    for start in range(
                        file.tell(), size, 2**20
                    ):  # zeros, and no hole: a disk that is full is an error now
                        file.write(bytes(min(2**20, size - start)))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(
                        error.errno, f"{error.strerror}, where features are kept", str(path)
                    ) from error
                text = f"cannot keep features in {self.folder}: {error.strerror or error}"
                raise UserError(f"{text}; set HF_DATASETS_CACHE to a folder that can be written") from error
            self.opened = (
                name,
                torch.from_file(str(path), shared=True, size=size // 4, dtype=torch.int32).view(self.shape),
            )
        return self.opened[1]


def _checksum(bits: torch.Tensor) -> torch.Tensor:
    return bits.sum(dim=1, dtype=torch.int32) ^ _EMPTY


def _is_whole(rows: torch.Tensor) -> torch.Tensor:
    return _checksum(rows[:, :-1]) == rows[:, -1]


def choose_views(args, model: nn.Module, *, asked: bool) -> None:
    """Set args.feature_views to 0 where a recipe's number makes no sense, and to 1 where views are alike.

    UserError: it makes no sense, and the user `asked` for it.
    """
    is_probe, mixes = isinstance(model, ViTLinearProbe), bool(args.mixup or args.cutmix)
    if asked and args.feature_views and (mixes or not is_probe):
        why = "mixup and cutmix blend images" if is_probe else f"the backbone of {args.model} is not frozen"
        raise UserError(
            f"--feature-views keeps a frozen backbone's features of single images, but {why}: use --feature-views 0"
        )
    if mixes or not is_probe:
        args.feature_views = 0
    elif args.augment == "none" and not asked:
        args.feature_views = 1


def open_caches(
    args, accelerator: Accelerator, model: nn.Module, images: dict[str, Images], prep: Preprocessing
) -> dict[str, FeatureCache]:
    """A cache for each split of a linear probe; of no other model, and where a batch mixes images, not for train."""
    if not isinstance(model, ViTLinearProbe):
        return {}
    batches = (
        args.augment,
        args.seed,
        args.batch_size,
        args.gradient_accumulation_steps,
        accelerator.num_processes,
    )
    caches = {}
    for split in images.keys() - ({"train"} if args.mixup or args.cutmix else set()):
        content = (dataclasses.asdict(prep), *(batches if split == "train" else ()))
        caches[split] = FeatureCache(
            accelerator, model, images[split], *content, num_views=args.feature_views
        )
    return caches
