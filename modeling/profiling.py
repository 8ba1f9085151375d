"""Time and trace the training step that train.py runs. profile.py runs `main`."""

import errno
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # keep the profiler from logging each start and stop

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile

from modeling import cli, models, recipes, report
from modeling.cost import forward_flops
from modeling.data.batches import Batch, training_steps
from modeling.data.images import Images, decode, native_size
from modeling.data.sources import load_source, select_rows
from modeling.engine import StepSettings, make_inputs, train_step
from modeling.errors import UserError
from modeling.files import atomic_write, write_text
from modeling.models import count_parameters, file_name
from modeling.optim import build_optimizer
from modeling.progress import Progress
from modeling.run.launch import make_accelerator, precision_text, refuse_processes
from modeling.run.process import process_as_it_was

WARMUP_STEPS = 3
TRACED_STEPS = 5  # the trace of a step takes megabytes, and all steps run the same operators
DATA_STEPS = 10

COLUMNS = (
    "model",
    "image_size",
    "batch_size",
    "parameters",
    "trainable_parameters",
    "forward_gflops",
    "step_ms_median",
    "step_ms_p95",
    "images_per_second",
    "peak_memory_mb",
    "data_share",
)


def full_steps(
    images: Images, *, seed: int, batch_size: int, mix: bool
) -> Iterator[tuple[int, int, list[Batch]]]:
    """Yield (step, epoch, micro-batches) without end. Skip batches with fewer than `batch_size` images."""
    step = epoch = 0
    while True:
        for micro_batches in training_steps(images, seed=seed, epoch=epoch, batch_size=batch_size, mix=mix):
            if len(micro_batches[0].weights) == batch_size:
                yield step, epoch, micro_batches
                step += 1
        epoch += 1


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
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Warm up, time `num_steps` training steps without a profiler, then trace a few with one.

    Return a row of COLUMNS. GFLOPs count the forward pass of one image. A step time (ms) runs from the
    images in memory to the updated weights. Peak memory (10**6 bytes) includes weights, gradients, optimizer
    state and activations, but not the stored images. `data_share` is the share of the step time that passes
    before the model starts: gather the batch, move it to the device, augment and normalise it.

    With `output_dir`, write profiler_trace_{name}.json for Perfetto or chrome://tracing, and the table of
    operators profiler_stats_{name}.txt. UserError: there are fewer images than a batch needs.
    """
    if len(images) < batch_size:
        raise UserError(
            f"--batch-size {batch_size} is more than the {len(images)} training images: use a smaller one"
        )
    accelerator = accelerator or Accelerator()
    device = accelerator.device
    raw_model, size = model, step_settings.preprocessing.image_size
    total, trainable = count_parameters(raw_model)
    model, optim = accelerator.prepare(
        raw_model, build_optimizer(optimizer, raw_model, lr=lr, weight_decay=weight_decay)
    )
    model.train()
    steps = full_steps(images, seed=step_settings.seed, batch_size=batch_size, mix=step_settings.mixes)

    def training_step() -> None:
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
        )
        progress(1)

    def data_step() -> None:
        step, epoch, micro_batches = next(steps)
        make_inputs(micro_batches[0].to(device), epoch=epoch, step=step, step_settings=step_settings)

    for _ in range(WARMUP_STEPS):
        training_step()
    step_seconds = [_seconds(training_step, device) for _ in range(num_steps)]
    data_seconds = [_seconds(data_step, device) for _ in range(DATA_STEPS)]
    median = statistics.median(step_seconds)
    peak_bytes = _trace(file_name(name), training_step, raw_model, optim, device, output_dir)
    return {
        "model": name,
        "image_size": size,
        "batch_size": batch_size,
        "parameters": total,
        "trainable_parameters": trainable,
        "forward_gflops": forward_flops(raw_model, size) / 1e9,
        "step_ms_median": median * 1e3,
        "step_ms_p95": sorted(step_seconds)[max(0, -(-95 * num_steps // 100) - 1)]
        * 1e3,  # nearest-rank percentile
        "images_per_second": batch_size / median,
        "peak_memory_mb": peak_bytes / 1e6,
        "data_share": min(1.0, statistics.median(data_seconds) / median),
    }


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _trace(
    name: str,
    training_step: Callable[[], None],
    model: nn.Module,
    optimizer: Any,
    device: torch.device,
    folder: Path | None,
) -> int:
    """Trace TRACED_STEPS steps, write the trace and the table, and return the peak memory in bytes."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(TRACED_STEPS):
            training_step()
    peak = (
        torch.cuda.max_memory_allocated(device)
        if on_gpu
        else _resident_bytes(model, optimizer) + _peak_of_trace(profiler)
    )
    if folder:
        _write_trace(profiler, folder / f"profiler_trace_{name}.json")
        order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        operators = profiler.key_averages().table(sort_by=order, row_limit=40)
        write_text(
            folder / f"profiler_stats_{name}.txt",
            f"{name}: operators of {TRACED_STEPS} training steps\n\n{operators}\n",
        )
    return peak


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


def _resident_bytes(model: nn.Module, optimizer: Any) -> int:
    """Count the bytes of the tensors that stay after a step: weights, buffers and the optimizer's state."""
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
    """Return the largest sum of bytes allocated in the trace. Each step frees the last one's gradients."""
    live = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def build_parser(description: str = "") -> cli.Parser:
    """The flags of profile.py."""
    parser = cli.Parser(description)
    workload = parser.add_argument_group("workload and output")
    names = f"{', '.join(models.MODELS)}, timm/NAME"
    workload.add_argument(
        "--models",
        nargs="+",
        default=["cnn", "vit"],
        metavar="MODEL",
        help=f"models to compare: {names} (default: cnn vit)",
    )
    workload.add_argument(
        "--dataset",
        default="digits",
        help="stl10, cifar10, digits, a hub id (@REVISION) or a local folder (default: digits)",
    )
    workload.add_argument(
        "--num-steps", type=cli.POSITIVE_INT, default=100, help="training steps to time (default: 100)"
    )
    workload.add_argument(
        "--batch-size", type=cli.POSITIVE_INT, default=32, help="images in a step (default: 32)"
    )
    workload.add_argument(
        "--image-size",
        type=cli.POSITIVE_INT,
        help="input height and width in pixels (default: the pretrained backbone's, or the images' own)",
    )
    workload.add_argument(
        "--recipe",
        choices=("tuned", "reference"),
        default="tuned",
        help="recipe of the training step (default: tuned)",
    )
    workload.add_argument(
        "--output-dir",
        type=cli.path,
        default=Path(),
        help="folder that gets traces/ (default: the current folder)",
    )
    cli.add_hardware_group(parser)
    return parser


def profile_one(
    name: str,
    images: Images,
    *,
    accelerator: Accelerator,
    image_size: int | None,
    recipe_name: str,
    batch_size: int,
    num_steps: int,
    output_dir: Path,
) -> dict[str, Any]:
    """Profile the training step of the model's recipe on these images. Return a row of COLUMNS."""
    size = image_size or models.default_image_size(name) or native_size(images)
    recipe = recipes.get_recipe(name, size, recipe_name)
    model_args = models.model_arguments(name, recipe, image_size=size, patch_size=None, head_dropout=None)
    step_settings = StepSettings(
        preprocessing=models.preprocessing(name, recipe, size),
        augment=recipe.augment,
        label_smoothing=recipe.label_smoothing,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        clip_grad=recipe.clip_grad,
    )
    with Progress(WARMUP_STEPS + num_steps + TRACED_STEPS, f"profiling {name}", " steps") as progress:
        return profile_model(
            name,
            models.build_model(name, num_classes=len(images.classes), image_size=size, **model_args),
            images,
            step_settings,
            accelerator=accelerator,
            optimizer=recipe.optimizer,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            batch_size=batch_size,
            num_steps=num_steps,
            output_dir=output_dir,
            progress=progress.update,
        )


def main(argv: list[str] | None = None, description: str = __doc__) -> int:
    """Profile the models of the command line and write the comparison. Return the exit status."""
    args = build_parser(description).parse_args(argv)
    args.models = list(dict.fromkeys(map(models.check_model_name, args.models)))
    refuse_processes()
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
    cli.check_output_dir(args.output_dir, "traces")
    source = load_source(args.dataset)
    source_split, rows = select_rows(
        source, "train", val_fraction=0.1, seed=42, limit_train=max(1024, args.batch_size)
    )
    largest = max(args.image_size or models.default_image_size(name) or 0 for name in args.models)
    images = decode(
        source,
        source_split,
        rows,
        image_size=largest,
        num_workers=args.num_workers,
        store_limit=1e9 * args.store_limit,
    )
    print(
        f"{accelerator.device}, {torch.get_num_threads()} threads, {precision_text(accelerator)}",
        flush=True,
    )
    traces = args.output_dir / "traces"
    results = [
        profile_one(
            name,
            images,
            accelerator=accelerator,
            image_size=args.image_size,
            recipe_name=args.recipe,
            batch_size=args.batch_size,
            num_steps=args.num_steps,
            output_dir=traces,
        )
        for name in args.models
    ]
    comparison = report.compare_models(results)
    write_text(traces / "profile_comparison.txt", comparison + "\n")
    write_text(traces / "profile_comparison.csv", report.csv_text(results, COLUMNS))
    print(f"{comparison}\nTraces, operator tables and the comparison are in {traces}")
    return 0
