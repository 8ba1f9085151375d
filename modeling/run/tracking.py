"""What a run tells: TensorBoard events and metrics.jsonl."""

import json
import os
from pathlib import Path

from torch import nn

from modeling.files import named_errors
from modeling.run.events import Events

# A histogram of a larger tensor takes every n-th value: 51 million values take seconds and look the same.
HISTOGRAM_SAMPLE = 100_000


class Tracker:
    """Writes to a run's folder; on all but the main process it writes nothing.

    metrics.jsonl has a JSON object a line, flushed as it is written, and holds no clock values: equal runs
    write equal files. A resumed run goes on after the first `log_bytes` of it, and TensorBoard forgets what
    it has from `first_step` on.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, first_step: int = 0, log_bytes: int = 0):
        self.enabled = enabled
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = Events(folder, first_step=first_step)
            self.lines = (folder / "metrics.jsonl").open("ab")
            self.lines.truncate(min(log_bytes, self.lines.tell()))

    def record(self, kind: str, *, step: int, **values: float) -> None:
        """Write a line of metrics.jsonl, and a TensorBoard scalar a value: train_loss is loss/train."""
        if not self.enabled:
            return
        with named_errors(Path(self.lines.name)):
            self.lines.write(json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n")
            self.lines.flush()
        for name, value in values.items():
            split, _, metric = name.partition("_")
            tag = f"{metric}/{split}" if split in ("train", "validation", "test") else name
            self.writer.add_scalar(tag, value, step)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Weights of the parameters that train, and the gradients that the last step left."""
        if not self.enabled:
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
                        self.writer.add_histogram(f"{kind}/{name}", values, step)

    def flush(self) -> int:
        """Have all that was recorded on disk; the bytes of metrics.jsonl."""
        if not self.enabled:
            return 0
        self.writer.flush()
        with named_errors(Path(self.lines.name)):
            self.lines.flush()
            os.fsync(self.lines.fileno())
        return self.lines.tell()

    def close(self) -> None:
        if self.enabled:
            self.writer.close()
            with named_errors(Path(self.lines.name)):  # it may hold what a full disk did not take
                self.lines.close()
