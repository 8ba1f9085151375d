"""Trace training steps: a Chrome trace, a table of operators, the costliest of them, the peak of memory."""

import errno
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from modeling.files import atomic_write, write_text

NUM_COSTLIEST = 5
TABLE_ROWS = 40


@dataclass(frozen=True)
class Operator:
    """An operator, its share of the time that all operators spent in themselves, and its calls a step."""

    name: str
    share: float
    calls: float

    def __str__(self) -> str:
        return f"{self.name.removeprefix('aten::')} {100 * self.share:.0f} %"


@dataclass(frozen=True)
class Trace:
    """What a trace of some steps showed. Memory is in bytes."""

    peak_bytes: int
    costliest: list[Operator]


def trace_steps(
    training_step: Callable[[], None],
    num_steps: int,
    *,
    model: nn.Module,
    optimizer: Any,
    device: torch.device,
    name: str,
    folder: Path | None,
) -> Trace:
    """Trace `num_steps` steps.

    With a folder, write profiler_trace_{name}.json for Perfetto or chrome://tracing, and the table of
    operators profiler_stats_{name}.txt.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(num_steps):
            training_step()
    peak = (
        torch.cuda.max_memory_allocated(device)
        if on_gpu
        else _resident_bytes(model, optimizer) + _peak_of_trace(profiler)
    )
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    if folder:
        _write_trace(profiler, folder / f"profiler_trace_{name}.json")
        table = averages.table(sort_by=order, row_limit=TABLE_ROWS)
        write_text(
            folder / f"profiler_stats_{name}.txt",
            f"{name}: operators of {num_steps} training steps\n\n{table}\n",
        )
    return Trace(peak_bytes=peak, costliest=_costliest(averages, order, num_steps))


def _write_trace(profiler: profile, path: Path) -> None:
    """Write the Chrome trace. OSError: the profiler, which does not say so, could not write all of it."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(whole))
        content = whole.read_bytes() if whole.exists() else b""
    try:
        json.loads(content)
    except ValueError as error:
        raise OSError(errno.ENOSPC, "the profiler's trace is not whole: is the disk full?", folder) from error
    with atomic_write(path) as file:
        file.write(content)


def _costliest(averages: Any, order: str, num_steps: int) -> list[Operator]:
    """The operators that spent most time in themselves. Ranges that only group others are no operators."""
    events = [event for event in averages if not event.is_user_annotation]
    total = sum(getattr(event, order) for event in events) or 1.0
    events.sort(key=lambda event: -getattr(event, order))
    return [
        Operator(event.key, getattr(event, order) / total, event.count / num_steps)
        for event in events[:NUM_COSTLIEST]
    ]


def _resident_bytes(model: nn.Module, optimizer: Any) -> int:
    """Bytes of the tensors that live through a step: weights, buffers and the optimizer's state."""
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(
        tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers(), *states]
    )


def _peak_of_trace(profiler: profile) -> int:
    """The most bytes allocated at once in the trace. A step first frees the previous step's gradients."""
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
