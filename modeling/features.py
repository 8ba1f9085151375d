"""The features of a frozen backbone: each augmented view of the images is computed once and kept on disk."""

import dataclasses
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
import torchvision
from accelerate import Accelerator

from modeling.data.augment import augment
from modeling.data.batches import training_steps
from modeling.data.images import Images
from modeling.data.resize import Preprocessing, preprocess
from modeling.errors import UserError
from modeling.files import write_text
from modeling.models.backbones import ViTLinearProbe

# The source files that compute views and features. If one changes, kept features are computed anew.
_CODE = ("data/augment.py", "data/randaugment.py", "data/resize.py", "randomness.py", "models/backbones.py")


class FeatureViews:
    """The features of one split: a file for each view, (N, D) float32, mapped into memory.

    A view is computed as a whole, in the same batches as in a run without kept features, so its bits are the
    same. It is written to a temporary file, which is renamed when it is complete. A file with its SHA-256
    stands beside it. The folder's name is a hash of everything that the bits depend on: the backbone's
    weights, the images, `content` (preprocessing, augmentation, seed, batches), the hardware, precision,
    threads, versions and source code.
    """

    def __init__(self, accelerator: Accelerator, probe: ViTLinearProbe, images: Images, content: list[Any]):
        self.accelerator = accelerator
        self.probe = probe
        self.images = images
        self.shape = (len(images), probe.head.in_features)
        self.checked: set[str] = set()  # the views whose digest this process has checked
        self.opened_name = ""
        self.opened = torch.empty(0)
        key = [_backbone_digest(probe), images.fingerprint(), images.origin, images.rows.tolist()]
        key += [*_environment(accelerator), *content]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "features" / name

    def open(self, name: str, batches: Callable[[], Iterator["FeatureBatch"]]) -> torch.Tensor:
        """Return the view `name`, (N, D) float32 on the CPU. If its file is missing, compute it.

        All processes call this together. UserError: the folder cannot be written. OSError: the disk is full.
        """
        if self.opened_name == name:
            return self.opened
        path = self.folder / name
        is_missing = not path.is_file() or path.stat().st_size != 4 * self.shape[0] * self.shape[1]
        is_missing = is_missing or (name not in self.checked and not _is_whole(path))
        missing = torch.tensor([is_missing], device=self.accelerator.device)
        # If the file is missing or damaged on any machine, all processes compute it together.
        if bool(self.accelerator.gather(missing).any()):
            self._compute(path, batches())
            self.accelerator.wait_for_everyone()
        self.checked.add(name)
        self.opened_name, self.opened = name, self._map(path)
        return self.opened

    def _map(self, path: Path, shared: bool = False) -> torch.Tensor:
        num_rows, dim = self.shape
        return torch.from_file(str(path), shared=shared, size=num_rows * dim, dtype=torch.float32).view(
            num_rows, dim
        )

    def _compute(self, path: Path, batches: Iterator["FeatureBatch"]) -> None:
        """Compute the features of this process's batches, gather those of all processes, and write a file.

        Each process writes a file, because the processes may have different cache folders.
        """
        temporary = _create_file(path, num_bytes=4 * self.shape[0] * self.shape[1])
        try:
            view = self._map(temporary, shared=True)
            for batch in batches:
                with self.accelerator.autocast():
                    features = self.probe.features(batch.x)
                positions, features = self._gather(batch.positions, features)
                view[positions] = features
            with temporary.open("r+b") as file:
                os.fsync(file)
            write_text(_digest_file(path), _digest(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _gather(self, positions: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the positions (B,) and features (B, D) of all processes. Drop the rows with position -1."""
        positions = positions.to(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            positions = self.accelerator.pad_across_processes(positions, pad_index=-1)
            features = self.accelerator.pad_across_processes(features)
            positions, features = self.accelerator.gather((positions, features))
        positions, features = positions.cpu(), features.cpu()
        return positions[positions >= 0], features[positions >= 0]


@dataclasses.dataclass
class FeatureBatch:
    """Model input x (B, 3, S, S) float32, and the position of each image in its split (B,), or -1."""

    x: torch.Tensor
    positions: torch.Tensor


class ProbeFeatures:
    """The kept features of a linear probe's run. num_views counts the views of train; 0: one per epoch."""

    def __init__(
        self,
        accelerator: Accelerator,
        probe: ViTLinearProbe,
        images: dict[str, Images],
        preprocessing: Preprocessing,
        *,
        augment_name: str,
        seed: int,
        batch_size: int,
        accumulation: int,
        num_views: int,
        mixes: bool,
    ):
        self.accelerator = accelerator
        self.preprocessing = preprocessing
        self.augment_name = augment_name
        self.seed = seed
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.num_views = num_views
        processes = accelerator.num_processes
        self.views: dict[str, FeatureViews] = {}
        for split, part in images.items():
            content: list[Any] = [dataclasses.asdict(preprocessing)]
            if split == "train":
                content += [augment_name, seed, batch_size, accumulation, processes]
            if split != "train" or not mixes:  # a mixed image has no features of its own
                self.views[split] = FeatureViews(accelerator, probe, part, content)

    @property
    def folder(self) -> Path:
        """The folder that holds the views of all splits, each in a folder of its own."""
        return self.views["validation"].folder.parent

    def of_epoch(self, epoch: int, on_batch: Callable[[], None]) -> torch.Tensor | None:
        """Return the training images' features (N, D) in the view of `epoch`. None: mixup or CutMix is on.

        While a view is computed, on_batch is called after each step, equally often on every process.
        """
        if "train" not in self.views:
            return None
        view = epoch % self.num_views if self.num_views else epoch
        return self.views["train"].open(f"view_{view}", lambda: self._training_batches(view, on_batch))

    def of_split(self, split: str, batch_size: int) -> torch.Tensor:
        """Return the features (N, D) of a split without augmentation, in batches of `batch_size`."""
        name = f"evaluation_{batch_size}"
        return self.views[split].open(name, lambda: self._evaluation_batches(split, batch_size))

    def _training_batches(self, view: int, on_batch: Callable[[], None]) -> Iterator[FeatureBatch]:
        """Yield this process's micro-batches of epoch number `view`."""
        images = self.views["train"].images
        steps = training_steps(
            images,
            seed=self.seed,
            epoch=view,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        for micro_batches in steps:
            for batch in micro_batches:
                x = augment(
                    batch.images.to(self.accelerator.device),
                    batch.sizes,
                    self.preprocessing,
                    name=self.augment_name,
                    seed=self.seed,
                    epoch=view,
                    indices=batch.indices,
                )
                positions = torch.searchsorted(images.rows, batch.indices)
                yield FeatureBatch(x, positions.where(batch.weights > 0, -1))
            on_batch()

    def _evaluation_batches(self, split: str, batch_size: int) -> Iterator[FeatureBatch]:
        """Yield this process's share of engine.predict's batches. A turn without a batch has position -1."""
        images, processes = self.views[split].images, self.accelerator.num_processes
        batches = torch.arange(len(images)).split(batch_size)
        for start in range(0, len(batches), processes):
            index = start + self.accelerator.process_index
            has_turn = index < len(batches)
            positions = batches[index] if has_turn else torch.zeros(1, dtype=torch.int64)
            pixels, sizes = images.gather(positions)
            x = preprocess(pixels.to(self.accelerator.device), sizes, self.preprocessing)
            yield FeatureBatch(x, positions if has_turn else torch.tensor([-1]))


def _digest_file(path: Path) -> Path:
    return path.with_name(f"sha256_{path.name}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether the file of a view exists and has the digest that was written beside it."""
    try:
        return _digest_file(path).read_bytes() == _digest(path).encode()
    except OSError:
        return False


def _create_file(path: Path, num_bytes: int) -> Path:
    """Write a temporary file of zeros beside `path`. So a full disk raises an error before any work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            for start in range(0, num_bytes, 2**20):
                file.write(bytes(min(2**20, num_bytes - start)))
        return Path(file.name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"{error.strerror} in the folder of kept features", str(path)
            ) from error
        raise UserError(
            f"cannot keep features in {path.parent}: {error.strerror or error}; "
            "set HF_DATASETS_CACHE to a folder that can be written"
        ) from error


def _backbone_digest(probe: ViTLinearProbe) -> str:
    digest = hashlib.sha256()
    for name, value in probe.backbone.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    for name in _CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def _environment(accelerator: Accelerator) -> list[Any]:
    """List the hardware, settings and versions that can change the last bit of a feature."""
    on_gpu = accelerator.device.type == "cuda"
    return [
        torch.cuda.get_device_name(accelerator.device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        accelerator.mixed_precision,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.__version__,
        torchvision.__version__,
        timm.__version__,
    ]
