"""The logs of a run: TensorBoard events and metrics.jsonl."""

import json
import os
from pathlib import Path

from torch import nn

from modeling.files import named_errors
from modeling.run.events import Events

# A histogram of a larger tensor uses every n-th value. All 51 million values of a layer would take seconds,
# and the histogram would look the same.
HISTOGRAM_SAMPLE = 100_000


class Tracker:
    """Writes a run's logs, on the main process only (`enabled`).

    metrics.jsonl has one JSON object per line, flushed at once. It holds no times, so equal runs write equal
    files. A resumed run keeps the first `log_bytes` bytes of the file and appends to them. TensorBoard drops
    the records from `first_step` on.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, first_step: int = 0, log_bytes: int = 0):
        self.enabled = enabled
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = Events(folder, first_step=first_step)
            self.lines = (folder / "metrics.jsonl").open("ab")
            self.lines.truncate(min(log_bytes, self.lines.tell()))

    def record(self, kind: str, *, step: int, **values: float) -> None:
        """Write a line of metrics.jsonl, and TensorBoard scalars (train_loss as loss/train)."""
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
        """Write histograms of the trainable weights, and of the last step's gradients, to TensorBoard."""
        if not self.enabled:
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
                        self.writer.add_histogram(f"{kind}/{name}", values, step)

    def flush(self) -> int:
        """Flush the logs to disk. Return the length of metrics.jsonl in bytes."""
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
