"""What a run tells: metrics.jsonl, and one of accelerate's trackers (TensorBoard, wandb, trackio)."""

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from torch import nn
from torch.utils.tensorboard.summary import hparams

from modeling.errors import UserError

REPORT_TO = ("tensorboard", "wandb", "trackio", "none")
PROJECT = "image-classification"  # of wandb and trackio
# A histogram of a larger tensor takes every n-th value: 51 million values take seconds and look the same.
HISTOGRAM_SAMPLE = 100_000


def check_installed(report_to: str) -> None:
    """UserError: the package of --report-to is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report-to {report_to} needs a package that is missing: pip install {report_to}")


class Tracker:
    """Writes to a run's folder; on all but the main process it writes nothing.

    metrics.jsonl has a JSON object a line, flushed as it is written, and holds no clock values: equal runs
    write equal files. A resumed run goes on after the first `log_bytes` of it, and TensorBoard forgets what
    it has from `first_step` on. What depends on the clock goes to the tracker `report_to` only. config are
    the settings that wandb and trackio show beside a run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool = True,
        first_step: int = 0,
        log_bytes: int = 0,
        report_to: str = "tensorboard",
        config: Mapping[str, Any] | None = None,
    ):
        self.enabled = enabled
        self.tracker: GeneralTracker | None = None
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self.tracker = _start(report_to, folder, first_step, dict(config or {}))
            self.lines = (folder / "metrics.jsonl").open("ab")
            self.lines.truncate(min(log_bytes, self.lines.tell()))

    @property
    def is_reporting(self) -> bool:
        return self.tracker is not None

    def record(self, kind: str, *, step: int, **values: float) -> None:
        """Write a line of metrics.jsonl, and report a scalar a value: train_loss is loss/train."""
        if not self.enabled:
            return
        self.lines.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
        self.lines.flush()
        self.scalars({tag_of(name): value for name, value in values.items()}, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers that metrics.jsonl does not get, for instance those that depend on the clock."""
        if self.tracker and values:
            self.tracker.log(dict(values), step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Report a picture (H, W, 3) uint8."""
        if isinstance(self.tracker, TensorBoardTracker):
            self.tracker.log_images({tag: pixels[None]}, step=step, dataformats="NHWC")
        elif isinstance(self.tracker, WandBTracker):
            self.tracker.log_images({tag: [pixels]}, step=step)
        elif isinstance(self.tracker, TrackioTracker):
            import trackio

            self.tracker.log({tag: trackio.Image(pixels)}, step=step)

    def histograms(self, model: nn.Module, step: int) -> None:
        """TensorBoard: weights of the parameters that train, and the gradients that the last step left."""
        if not isinstance(self.tracker, TensorBoardTracker):
            return
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
                if values is not None:
                    values = values.flatten()[:: max(1, values.numel() // HISTOGRAM_SAMPLE)].float().cpu()
                    values = values[
                        values.isfinite()
                    ]  # in fp16 a step that overflowed is skipped, and leaves such gradients
                    if len(values):
                        self.tracker.tracker.add_histogram(f"{kind}/{name}", values, step)

    def final(self, settings: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Report a finished run: its settings, and its metrics as final/NAME. Runs line up in a table.

        step is one more than the last one: a run that is resumed after its end forgets these and reports
        them again.
        """
        metrics = {f"final/{name}": value for name, value in metrics.items()}
        self.scalars(metrics, step)
        if isinstance(self.tracker, TensorBoardTracker):
            # SummaryWriter.add_hparams would make a run of its own for them, named after the clock.
            texts = {name: value if _is_plain(value) else str(value) for name, value in settings.items()}
            for summary in hparams(texts, metrics):
                self.tracker.tracker.file_writer.add_summary(summary, step)

    def flush(self) -> int:
        """Have all that was recorded on disk; the bytes of metrics.jsonl."""
        if not self.enabled:
            return 0
        if isinstance(self.tracker, TensorBoardTracker):
            self.tracker.tracker.flush()
        self.lines.flush()
        os.fsync(self.lines.fileno())
        return self.lines.tell()

    def close(self) -> None:
        if self.enabled:
            self.lines.close()
        if self.tracker:
            self.tracker.finish()


def tag_of(name: str) -> str:
    """train_loss is loss/train, so that the curves of one metric stand together."""
    split, _, metric = name.partition("_")
    return f"{metric}/{split}" if split in ("train", "validation", "test") else name


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _start(report_to: str, folder: Path, first_step: int, config: dict[str, Any]) -> GeneralTracker | None:
    """Start accelerate's tracker of this name. A resumed run goes on in the run that it had begun there."""
    if report_to == "none":
        return None
    if report_to == "tensorboard":
        tracker = TensorBoardTracker(folder.name, logging_dir=folder.parent, purge_step=first_step)
    else:
        # The id stands in the run's folder. A new run has a new folder and so a new id.
        id_file = folder / f"{report_to}_id.txt"
        if not id_file.exists():
            id_file.write_text(f"{folder.name}-{uuid.uuid4().hex[:8]}\n")
        run_id = id_file.read_text().strip()
        config = {name: value if _is_plain(value) else str(value) for name, value in config.items()}
        if report_to == "wandb":
            tracker = WandBTracker(
                PROJECT, name=folder.name, id=run_id, resume="allow", dir=str(folder), config=config
            )
        else:
            tracker = TrackioTracker(PROJECT, name=run_id, resume="allow", config=config)
    tracker.start()
    return tracker
