"""The logs of a run: metrics.jsonl, and one of accelerate's trackers (TensorBoard, wandb, trackio)."""

import contextlib
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from torch import nn
from torch.utils.tensorboard.summary import hparams

from modeling.errors import UserError
from modeling.files import named_errors, write_text
from modeling.run.events import hidden_writer_thread

REPORT_TO = ("tensorboard", "wandb", "trackio", "none")
PROJECT = "image-classification"  # of wandb and trackio
# A histogram of a larger tensor uses every n-th value. All 51 million values of a layer would take seconds,
# and the histogram would look the same.
HISTOGRAM_SAMPLE = 100_000


def check_installed(report_to: str) -> None:
    """UserError: the package of --report-to is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report-to {report_to} needs a package that is missing: pip install {report_to}")


class Tracker:
    """Writes a run's logs, on the main process only (`enabled`).

    metrics.jsonl has one JSON object per line, flushed at once. It holds no times, so equal runs write equal
    files: times go to the tracker `report_to` only. A resumed run keeps the first `log_bytes` bytes of the
    file and appends to them. TensorBoard drops the records from `first_step` on. config holds the settings
    that wandb and trackio show beside a run.
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
        self.remote: RemoteRun | None = None
        self.folder, self.report_to = folder, report_to
        self.at_close = contextlib.ExitStack()
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self.at_close.enter_context(hidden_writer_thread())
            with self._or_give_up():
                if report_to == "tensorboard":
                    tracker = TensorBoardTracker(folder.name, folder.parent, purge_step=first_step)
                    self.tracker = _started(tracker)
                elif report_to != "none":
                    self.remote = RemoteRun(folder, report_to)
                    self.tracker = _started(self.remote.tracker(config or {}))
            self.lines = (folder / "metrics.jsonl").open("ab")
            self.lines.truncate(min(log_bytes, self.lines.tell()))

    @contextlib.contextmanager
    def _or_give_up(self) -> Iterator[None]:
        """End the reports at the first OSError, with a warning: they are not worth a run."""
        try:
            yield
        except OSError as error:
            print(
                f"The reports to {self.report_to} of {self.folder} end here: {error.strerror or error}; "
                "metrics.jsonl goes on",
                file=sys.stderr,
                flush=True,
            )
            tracker, self.tracker = self.tracker, None
            with contextlib.suppress(OSError):
                if tracker is not None:
                    tracker.finish()

    @property
    def is_reporting(self) -> bool:
        return self.tracker is not None

    def record(self, kind: str, *, step: int, **values: float) -> None:
        """Write a line of metrics.jsonl, and report the values as scalars (train_loss as loss/train)."""
        if not self.enabled:
            return
        with named_errors(Path(self.lines.name)):
            self.lines.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
            self.lines.flush()
        self.scalars({tag_of(name): value for name, value in values.items()}, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Report numbers that metrics.jsonl does not get, for instance those that depend on the clock."""
        if self.tracker and values and not self._is_known(step):
            with self._or_give_up():
                self.tracker.log(dict(values), step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Report a picture (H, W, 3) uint8."""
        if self._is_known(step):
            return
        with self._or_give_up():
            if isinstance(self.tracker, TensorBoardTracker):
                self.tracker.log_images({tag: pixels[None]}, step=step, dataformats="NHWC")
            elif isinstance(self.tracker, WandBTracker):
                self.tracker.log_images({tag: [pixels]}, step=step)
            elif isinstance(self.tracker, TrackioTracker):
                import trackio

                self.tracker.log({tag: trackio.Image(pixels)}, step=step)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Write histograms of the trainable weights, and of the last step's gradients, to TensorBoard."""
        if not isinstance(self.tracker, TensorBoardTracker):
            return
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
                if values is not None:
                    values = values.flatten()[:: max(1, values.numel() // HISTOGRAM_SAMPLE)].float().cpu()
                    # In fp16 a step that overflows is skipped. Its gradients are not finite.
                    values = values[values.isfinite()]
                    if len(values):
                        self._histogram(f"{kind}/{name}", values, step)

    def _histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        if self.tracker:  # the first histograms may have ended the reports
            with self._or_give_up():
                self.tracker.tracker.add_histogram(tag, values, step)

    def final(self, settings: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Report a finished run: its settings, and its metrics as final/NAME. Runs line up in a table.

        step is one more than the last one: a run that is resumed after its end forgets these and reports
        them again.
        """
        metrics = {f"final/{name}": value for name, value in metrics.items()}
        self.scalars(metrics, step)
        if isinstance(self.tracker, TensorBoardTracker):
            # SummaryWriter.add_hparams would make a run of its own for them, named after the clock.
            with self._or_give_up():
                for summary in hparams(plain_values(settings), metrics):
                    self.tracker.tracker.file_writer.add_summary(summary, step)

    def _is_known(self, step: int) -> bool:
        return self.remote is not None and self.remote.is_known(step)

    def flush(self) -> int:
        """Flush the logs to disk. Return the length of metrics.jsonl in bytes."""
        if not self.enabled:
            return 0
        with self._or_give_up():
            if isinstance(self.tracker, TensorBoardTracker):
                self.tracker.tracker.flush()
        with named_errors(Path(self.lines.name)):
            self.lines.flush()
            os.fsync(self.lines.fileno())
        return self.lines.tell()

    def close(self) -> None:
        with self.at_close, self._or_give_up():
            if self.tracker:
                self.tracker.finish()
        if self.enabled:
            with named_errors(Path(self.lines.name)):  # it may hold what a full disk did not take
                self.lines.close()


def tag_of(name: str) -> str:
    """train_loss is loss/train, so that the curves of one metric stand together."""
    split, _, metric = name.partition("_")
    return f"{metric}/{split}" if split in ("train", "validation", "test") else name


def plain_values(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The values as trackers take them: what is neither a number nor a text becomes a text."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in values.items()
    }


def _started(tracker: GeneralTracker) -> GeneralTracker:
    """Start a tracker. UserError: wandb cannot, for instance because nobody has logged in."""
    if not isinstance(tracker, WandBTracker):
        tracker.start()
        return tracker
    import wandb

    try:
        tracker.start()
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb does not start: {error} Log in, set WANDB_MODE=offline or use --report-to none"
        ) from error
    return tracker


class RemoteRun:
    """A run of wandb or trackio, which cannot forget a step as TensorBoard does.

    Its id and the last step that it was told stand in a file in the run's folder. A resumed run goes on
    under the same id and tells no step again. A new run has a new folder and so a new id.
    """

    def __init__(self, folder: Path, package: str):
        self.folder, self.package = folder, package
        self.path = folder / f"{package}.json"
        if self.path.exists():
            stored = json.loads(self.path.read_text())
        else:
            stored = {"id": f"{folder.name}-{uuid.uuid4().hex[:8]}", "last_step": -1}
        self.id, self.last_step = stored["id"], stored["last_step"]
        self.known_step = self.last_step

    def tracker(self, config: Mapping[str, Any]) -> GeneralTracker:
        """Accelerate's tracker of the run. It is not started yet."""
        plain = plain_values(config)
        if self.package == "trackio":
            return TrackioTracker(PROJECT, name=self.id, resume="allow", config=plain)
        return WandBTracker(
            PROJECT, name=self.folder.name, id=self.id, resume="allow", dir=str(self.folder), config=plain
        )

    def is_known(self, step: int) -> bool:
        """Whether the run was told this step before it was resumed. Notes the step, if not."""
        if step <= self.known_step:
            return True
        if step > self.last_step:
            self.last_step = step
            write_text(self.path, json.dumps({"id": self.id, "last_step": step}) + "\n")
        return False
