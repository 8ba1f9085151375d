"""Time, split and trace the training step of one model, at one batch size and precision."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import record_function

from modeling import cost
from modeling.data.batches import Batch, training_steps
from modeling.data.images import Images
from modeling.engine import StepSettings, train_step
from modeling.errors import UserError
from modeling.models import count_parameters, file_name
from modeling.optim import build_optimizer
from modeling.run.process import process_as_it_was
from modeling.trace import trace_steps

WARMUP_STEPS = 3
# The parts of these steps are timed. On a GPU each part is waited for, so these steps are not timed whole.
SPLIT_STEPS = 10
TRACED_STEPS = 5  # the trace of a step takes megabytes, and all steps run the same operators
PHASES = ("data", "forward", "backward", "optimizer")

COLUMNS = (
    "model",
    "image_size",
    "batch_size",
    "precision",
    "parameters",
    "trainable_parameters",
    "forward_gflops",
    "step_ms_median",
    "step_ms_p95",
    "images_per_second",
    "peak_memory_mb",
    *(f"{phase}_share" for phase in PHASES),
    "step_gflops",
    "matrix_gflops_per_second",
    "matrix_share",
    "costliest_operators",
)


class Phases:
    """Times the parts of steps. `begin` is what train_step takes as begin_phase."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.current: str | None = None
        self.since = 0.0
        self.range: record_function | None = None

    def begin(self, phase: str | None) -> None:
        """End the part before, and begin this one; None: only end. A tracer sees each part as a range."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.current:
            self.seconds[self.current] += now - self.since
            self.range.__exit__(None, None, None)
        self.current, self.since = phase, now
        if phase:
            self.range = record_function(phase)
            self.range.__enter__()

    def shares(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {f"{phase}_share": seconds / total for phase, seconds in self.seconds.items()}


@process_as_it_was()
def profile_model(
    name: str,
    model: nn.Module,
    images: Images,
    step_settings: StepSettings,
    *,
    accelerator: Accelerator | None = None,
    optimizer: str = "adam",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    batch_size: int = 32,
    num_steps: int = 100,
    output_dir: Path | None = None,
    trace_name: str | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Warm up, time `num_steps` training steps without a profiler, split some into parts, then trace a few.

    Return a value for each of COLUMNS. GFLOPs are of one image: of the forward pass (forward_gflops), and of
    forward and backward (step_gflops). Step times are in ms, from the images in memory to the updated
    weights. Peak memory is in MB (10**6 bytes): weights, gradients, optimizer state and activations, but not
    the stored images. Four shares are parts of a step: data (gather the batch, move it to the device, augment
    and normalise it), forward, backward, optimizer. matrix_share is the arithmetic of a second of training,
    over that of a second of large matrix products, which is measured just before. costliest_operators is a
    list of trace.Operator, the costliest first.

    With `output_dir`, write the trace and the table of operators under trace_name, by default the model's
    name. UserError: there are fewer images than a batch holds.
    """
    if len(images) < batch_size:
        raise UserError(
            f"--batch-sizes {batch_size} is more than the {len(images)} training images: use a smaller one"
        )
    accelerator = accelerator or Accelerator()
    device = accelerator.device
    raw_model, size = model, step_settings.preprocessing.image_size
    total, trainable = count_parameters(raw_model)
    model, optim = accelerator.prepare(
        raw_model, build_optimizer(optimizer, raw_model, lr=lr, weight_decay=weight_decay)
    )
    forward_flops, step_flops = cost.forward_flops(raw_model, size), cost.step_flops(raw_model, size)
    model.train()
    steps = full_steps(images, seed=step_settings.seed, batch_size=batch_size, mix=step_settings.mixes)
    phases = Phases(device)

    def training_step(begin_phase: Callable[[str | None], None] = lambda phase: None) -> None:
        begin_phase("data")
        step, epoch, micro_batches = next(steps)
        train_step(
            accelerator,
            model,
            optim,
            micro_batches,
            epoch=epoch,
            step=step,
            lr=lr,
            num_images=batch_size,
            step_settings=step_settings,
            begin_phase=begin_phase,
        )
        begin_phase(None)
        progress(1)

    for _ in range(WARMUP_STEPS):
        training_step()
    matrix_rate = cost.matrix_rate(device, accelerator.mixed_precision)
    step_seconds = [_seconds(training_step, device) for _ in range(num_steps)]
    for _ in range(min(num_steps, SPLIT_STEPS)):
        training_step(phases.begin)
    shares = phases.shares()
    trace = trace_steps(
        lambda: training_step(phases.begin),
        TRACED_STEPS,
        model=raw_model,
        optimizer=optim,
        device=device,
        name=trace_name or file_name(name),
        folder=output_dir,
    )
    median = statistics.median(step_seconds)
    rate = batch_size / median
    return {
        "model": name,
        "image_size": size,
        "batch_size": batch_size,
        "precision": accelerator.mixed_precision,
        "parameters": total,
        "trainable_parameters": trainable,
        "forward_gflops": forward_flops / 1e9,
        "step_ms_median": median * 1e3,
        "step_ms_p95": sorted(step_seconds)[max(0, -(-95 * num_steps // 100) - 1)] * 1e3,  # the nearest rank
        "images_per_second": rate,
        "peak_memory_mb": trace.peak_bytes / 1e6,
        **shares,
        "step_gflops": step_flops / 1e9,
        "matrix_gflops_per_second": matrix_rate / 1e9,
        "matrix_share": step_flops * rate / matrix_rate,
        "costliest_operators": trace.costliest,
    }


def full_steps(
    images: Images, *, seed: int, batch_size: int, mix: bool
) -> Iterator[tuple[int, int, list[Batch]]]:
    """(step, epoch, micro-batches) without end, only batches of `batch_size`."""
    step = epoch = 0
    while True:
        for micro_batches in training_steps(images, seed=seed, epoch=epoch, batch_size=batch_size, mix=mix):
            if len(micro_batches[0].weights) == batch_size:
                yield step, epoch, micro_batches
                step += 1
        epoch += 1


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
