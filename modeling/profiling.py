"""The body of profile.py: profile models at batch sizes and precisions, and compare them."""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # keep the profiler from logging each start and stop

import torch
from accelerate import Accelerator

from modeling import cli, models, profile_page, recipes, report
from modeling.data.choices import Choices
from modeling.data.division import select_rows
from modeling.data.images import Images, decode, native_size
from modeling.data.sources import load_source
from modeling.engine import StepSettings
from modeling.files import write_text
from modeling.models import file_name
from modeling.progress import Progress
from modeling.run.launch import make_accelerator, precision_text, refuse_processes
from modeling.step_profile import COLUMNS, SPLIT_STEPS, TRACED_STEPS, WARMUP_STEPS, profile_model

PRECISIONS = ("no", "bf16", "fp16")
# Columns of the CSV that the table leaves out.
NOT_IN_TABLE = ("trainable_parameters", "step_gflops", "matrix_gflops_per_second", "costliest_operators")


def build_parser(description: str = "") -> cli.Parser:
    """The flags of profile.py."""
    parser = cli.Parser(description)
    workload = parser.add_argument_group("workload and output")
    names = f"{', '.join(models.MODELS)}, timm/NAME"
    workload.add_argument(
        "--models",
        nargs="+",
        action=cli.ListOnce,
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
        "--batch-sizes",
        "--batch-size",
        nargs="+",
        action=cli.ListOnce,
        type=cli.POSITIVE_INT,
        default=[32],
        metavar="N",
        help="images in a step, one or more sizes (default: 32)",
    )
    workload.add_argument(
        "--precisions",
        nargs="+",
        action=cli.ListOnce,
        choices=PRECISIONS,
        help="precisions to compare: no, bf16, fp16 (default: that of --mixed-precision)",
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
    cli.add_data_choices(parser)
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
    trace_name: str,
) -> dict[str, Any]:
    """Profile the training step of the model's recipe on these images. Return a row of COLUMNS."""
    size = image_size or models.default_image_size(name) or native_size(images.sizes)
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
    total_steps = WARMUP_STEPS + num_steps + min(num_steps, SPLIT_STEPS) + TRACED_STEPS
    with Progress(total_steps, f"profiling {trace_name}", " steps") as progress:
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
            trace_name=trace_name,
            progress=progress.update,
        )


def trace_name(model: str, batch_size: int, precision: str, *, is_single: bool) -> str:
    """How the files of a trace are named: after the model, and where it has several also their settings."""
    return file_name(model) if is_single else f"{file_name(model)}_b{batch_size}_{precision}"


def load_images(args: argparse.Namespace) -> Images:
    """Decode as many training images as the largest batch needs, and at least 1,024 where there are."""
    source = load_source(args.dataset, Choices.of(vars(args)))
    print(source.describe(), flush=True)
    source_split, rows = select_rows(
        source, "train", val_fraction=0.1, seed=42, limit_train=max(1024, *args.batch_sizes)
    )
    return decode(
        source,
        source_split,
        rows,
        image_size=max(args.image_size or models.default_image_size(name) or 0 for name in args.models),
        num_workers=args.num_workers,
        store_limit=1e9 * args.store_limit,
        skip_bad_images=args.skip_bad_images,
    )


def main(argv: list[str] | None = None, description: str = __doc__) -> int:
    """Profile the models of the command line and write the comparison. Return the exit status."""
    args = build_parser(description).parse_args(argv)
    args.models = list(dict.fromkeys(map(models.check_model_name, args.models)))
    args.batch_sizes = sorted(set(args.batch_sizes))
    refuse_processes()
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
    precisions = list(dict.fromkeys(args.precisions or [accelerator.mixed_precision]))
    cli.check_output_dir(args.output_dir, "traces")
    images = load_images(args)
    traces = args.output_dir / "traces"
    is_single = len(args.batch_sizes) * len(precisions) == 1
    conditions = f"{accelerator.device}, {torch.get_num_threads()} threads"
    print(f"{conditions}, {precision_text(accelerator)}", flush=True)

    results = []
    for precision in precisions:
        accelerator = make_accelerator(mixed_precision=precision, num_threads=args.num_threads)
        for name in args.models:
            for batch_size in args.batch_sizes:
                row = profile_one(
                    name,
                    images,
                    accelerator=accelerator,
                    image_size=args.image_size,
                    recipe_name=args.recipe,
                    batch_size=batch_size,
                    num_steps=args.num_steps,
                    output_dir=traces,
                    trace_name=trace_name(name, batch_size, precision, is_single=is_single),
                )
                results.append(row)
    results.sort(key=lambda row: args.models.index(row["model"]))  # the precisions of a model stand together

    write_text(traces / "profile_comparison.csv", report.csv_text([csv_row(row) for row in results], COLUMNS))
    write_text(
        traces / "profile_comparison.html",
        profile_page.render(results, f"{conditions}; dataset {args.dataset}, recipe {args.recipe}"),
    )
    comparison = f"{comparison_table(results)}\n\n{operator_lines(results)}"
    write_text(traces / "profile_comparison.txt", comparison + "\n")
    print(f"{comparison}\nTraces, operator tables and the comparison are in {traces}")
    print(f"Open {traces / 'profile_comparison.html'} (needs no network); traces open in ui.perfetto.dev")
    return 0


def csv_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "costliest_operators": "; ".join(map(str, row["costliest_operators"]))}


def comparison_table(results: list[dict[str, Any]]) -> str:
    """The columns that fit a terminal, the fastest row first."""
    columns = [column for column in COLUMNS if column not in NOT_IN_TABLE]
    return report.compare_models([{column: row[column] for column in columns} for row in results])


def operator_lines(results: list[dict[str, Any]]) -> str:
    """A line for each row: its costliest operators."""
    lines = ["costliest operators, share of the time of all:"]
    for row in results:
        operators = ", ".join(map(str, row["costliest_operators"]))
        lines.append(f"{row['model']}, batch {row['batch_size']}, {row['precision']}: {operators}")
    return "\n".join(lines)
