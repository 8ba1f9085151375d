"""The cost of a model: time and GFLOPs of the forward pass, parameters, file size, training time."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCH_SIZES = (64, 1)
NUM_ROUNDS = 5
WARMUP_BATCHES = 3
ROUND_SECONDS = 0.04
MATRIX_SIDE = (1536, 8192)  # on a CPU, on a GPU
MATRIX_SECONDS = 0.5


@dataclass(frozen=True)
class Speed:
    """Milliseconds of the forward pass, each the median of the rounds.

    batch_ms: time per image in a batch of 64. single_ms: time of a batch of one image. spread: time of the
    slowest round at batch 64 divided by the fastest. Far above 1, the machine was busy with something else.
    """

    batch_ms: float
    single_ms: float
    spread: float


@dataclass(frozen=True)
class Cost:
    """The cost of one model. gflops counts the forward pass of one image, with two per multiply-add.

    None: the value is not known or was not measured.
    """

    parameters: int
    gflops: float | None = None
    file_bytes: int | None = None
    train_seconds: float | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class Costs:
    """The cost of each model by its name. conditions: how speed was measured, "cpu, 2 threads, precision no".

    why_no_speed says why speed was not measured. It is empty if speed was measured.
    """

    by_name: dict[str, Cost]
    conditions: str = ""
    why_no_speed: str = ""

    def get(self, name: str) -> Cost | None:
        return self.by_name.get(name)


def forward_flops(model: nn.Module, image_size: int) -> int:
    """Floating-point operations of the forward pass of one image, two for each multiply-add."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    # The counter does not see the fused attention kernel on a CPU. The plain one does the same arithmetic.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(was_training)
    return counter.get_total_flops()


def step_flops(model: nn.Module, image_size: int) -> int:
    """Floating-point operations of an image in training: forward and backward, two for each multiply-add."""
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]  # batch normalisation counts this batch too
    was_training = model.training
    model.train()
    x = torch.zeros(2, 3, image_size, image_size, device=device)  # batch normalisation needs two images
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x).float().sum().backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return counter.get_total_flops() // 2


@torch.no_grad()
def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of large square matrix products: the best of a few rounds.

    precision is accelerate's: "no", "bf16" or "fp16".
    """
    side = MATRIX_SIDE[device.type == "cuda"]
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    fastest = math.inf
    began = time.perf_counter()
    while fastest == math.inf or time.perf_counter() - began < MATRIX_SECONDS:
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * side**3 / fastest


@torch.no_grad()
def measure_speed(
    models: Sequence[nn.Module],
    image_sizes: Sequence[int],
    *,
    device: torch.device,
    round_seconds: float,
    num_rounds: int = NUM_ROUNDS,
) -> list[Speed]:
    """Time the forward pass of each model in eval mode, on images of its size in pixels.

    The models take turns: each round times every model once. So a change of the machine's speed affects all
    models equally. Afterwards the models are in their former modes.
    """
    were_training = [model.training for model in models]
    inputs = [
        {batch: torch.zeros(batch, 3, size, size, device=device) for batch in BATCH_SIZES}
        for size in image_sizes
    ]
    seconds: list[dict[int, list[float]]] = [{batch: [] for batch in BATCH_SIZES} for _ in models]
    for model in models:
        model.eval()
    for _ in range(num_rounds):
        for model, batches, times in zip(models, inputs, seconds, strict=True):
            for batch, x in batches.items():
                times[batch].append(_seconds_of_image(model, x, device, round_seconds))
    for model, was_training in zip(models, were_training, strict=True):
        model.train(was_training)
    large, single = BATCH_SIZES
    return [
        Speed(
            batch_ms=1e3 * statistics.median(times[large]),
            single_ms=1e3 * statistics.median(times[single]),
            spread=max(times[large]) / min(times[large]),
        )
        for times in seconds
    ]


def _seconds_of_image(model: nn.Module, x: torch.Tensor, device: torch.device, least_seconds: float) -> float:
    """Return the time per image. Warm up, then repeat the batch for at least `least_seconds`."""
    started = time.perf_counter()
    for _ in range(WARMUP_BATCHES):
        model(x)
        _wait(device)
        if time.perf_counter() - started > least_seconds:
            break  # a slow model is warm after one batch
    num_batches = 0
    started = elapsed = time.perf_counter()
    while elapsed - started < least_seconds:
        model(x)
        _wait(device)
        num_batches += 1
        elapsed = time.perf_counter()
    return (elapsed - started) / (num_batches * len(x))


def _wait(device: torch.device) -> None:
    """Wait until the GPU has finished. It works while Python continues."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
