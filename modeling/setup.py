"""From flags to everything that the training loop needs: settings, images, a prepared model."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from modeling import models, randomness, recipes
from modeling.data.choices import Choices
from modeling.data.division import choose_val_fraction, division_digest, select_rows
from modeling.data.images import Images, count_duplicates, decode, native_size
from modeling.data.known import is_stl10
from modeling.data.resize import Preprocessing, preprocess
from modeling.data.sources import Source, load_source
from modeling.engine import NonFiniteGuard, StepSettings, fix_ddp_bucket_order
from modeling.errors import UserError
from modeling.files import write_text
from modeling.models.weights import Weights
from modeling.optim import Ema, build_optimizer, learning_rate
from modeling.progress import Progress
from modeling.run import checkpoint
from modeling.run.files import RunFiles
from modeling.run.launch import check_agreement, check_shared_folder, precision_text
from modeling.settings import MAY_DIFFER, Settings, resolve

WHITENING_PIXELS = 5000 * 32**2  # the first layer of cnn_fast is computed from images of so many pixels


def load_images(
    source: Source, flags: Mapping[str, Any], *, image_size: int | None, val_fraction: float
) -> dict[str, Images]:
    """Decode every image that the run will use. image_size: the model's input side in pixels, or None."""
    splits = ["train"]
    if not flags["sanity_check"]:
        splits += ["validation", *(["test"] if "test" in source.splits else [])]
    images = {}
    for split in splits:
        source_split, rows = select_rows(
            source,
            split,
            val_fraction=val_fraction,
            seed=flags["seed"],
            limit_train=flags["limit_train"],
            limit_eval=flags["limit_eval"],
        )
        images[split] = decode(
            source,
            source_split,
            rows,
            image_size=image_size,
            num_workers=flags["num_workers"],
            store_limit=1e9 * flags["store_limit"],
            skip_bad_images=flags["skip_bad_images"],
            progress=Progress,
        )
    return images


def say_what_is_odd(source: Source, images: dict[str, Images]) -> None:
    """Say which classes have no image in a split, which images are skipped, and which are in two splits."""
    for split, of_split in images.items():
        present = set(of_split.labels.tolist())
        absent = [repr(name) for number, name in enumerate(source.classes) if number not in present]
        if absent:
            more = f", ... {len(absent) - 5} more" if len(absent) > 5 else ""
            adjective = "training" if split == "train" else split
            print(f"No {adjective} image has the class {', '.join(absent[:5])}{more}.")
        if of_split.skipped:
            print(f"{len(of_split.skipped)} {split} images cannot be decoded and are skipped.")
    for split, count in count_duplicates(images).items():
        if count:
            print(f"{count} of {len(images[split])} {split} images have the same pixels as a training image.")


def choose_image_size(*, recipe: str, dataset: str, images: dict[str, Images]) -> int:
    """The input side of a model from scratch: that of the images. Reference recipes on STL-10 have 224 px.

    The side depends on all images, so that it is the same for each seed.
    """
    if recipe == "reference" and is_stl10(dataset):
        return 224
    return native_size(torch.cat([part.sizes for part in images.values()]))


def whitening_images(images: Images, preprocessing: Preprocessing) -> torch.Tensor:
    """Training images at equal distances, preprocessed as in evaluation: (N, 3, S, S) float."""
    count = min(len(images), max(1, WHITENING_PIXELS // preprocessing.image_size**2))
    chosen = torch.arange(count) * len(images) // count
    parts = (images.gather(part) for part in chosen.split(256))
    return torch.cat([preprocess(pixels, sizes, preprocessing) for pixels, sizes in parts])


def list_skipped(run: "Run") -> None:
    """Write the images that --skip-bad-images left out to a file of the run. The main process writes."""
    skipped = [f"{split}\t{name}" for split, images in run.images.items() for name in images.skipped]
    if skipped and run.accelerator.is_main_process:
        write_text(run.files.bad_images, "\n".join(skipped) + "\n")


@dataclass
class Run:
    """One training run. model may be wrapped by DDP and compiled. raw_model is not; both share weights."""

    settings: Settings
    step_settings: StepSettings
    accelerator: Accelerator
    images: dict[str, Images]
    weights: Weights
    model: torch.nn.Module
    raw_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    guard: NonFiniteGuard
    header: dict[str, Any]
    files: RunFiles

    @property
    def num_train_images(self) -> int:
        return len(self.images["train"])

    @property
    def warmup_steps(self) -> int:
        """The updates in which the learning rate rises."""
        return round(self.settings.warmup_epochs * self.settings.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step` (from 0)."""
        return learning_rate(
            step,
            base=self.settings.lr,
            total_steps=self.settings.total_steps,
            warmup_steps=self.warmup_steps,
            schedule=self.settings.schedule,
        )


def set_up(flags: Mapping[str, Any], accelerator: Accelerator, files: RunFiles) -> Run:
    """Turn parsed flags into settings, images, a model and an optimizer, and prepare these for the hardware.

    `flags` maps each flag of train.py to its value, or to None if it was not given.
    """
    # Data: the weights determine the image size. Images are stored no larger than this size needs.
    weights = models.find_weights(flags["model"], flags["weights"])
    image_size = flags["image_size"] or models.default_image_size(flags["model"], weights)
    source = load_source(flags["dataset"], Choices.of(flags))
    print(source.describe(), flush=True)
    if len(source.classes) < 2:
        raise UserError(
            f"{source.name} has only the class {source.classes[0]!r}: a classifier needs at least two"
        )
    val_fraction = choose_val_fraction(source, flags["val_fraction"])
    images = load_images(source, flags, image_size=image_size, val_fraction=val_fraction)
    say_what_is_odd(source, images)
    image_size = image_size or choose_image_size(
        recipe=flags["recipe"], dataset=flags["dataset"], images=images
    )

    # Model: its initial random weights depend on the seed alone.
    recipe = recipes.get_recipe(flags["model"], image_size, flags["recipe"], random_weights=not weights.path)
    model_args = models.model_arguments(
        flags["model"],
        recipe,
        image_size=image_size,
        patch_size=flags["patch_size"],
        head_dropout=flags["head_dropout"],
    )
    model_args = weights.combine_arguments(model_args)
    model_args |= {"name": flags["model"], "num_classes": len(source.classes), "image_size": image_size}
    use_deterministic_algorithms(flags["deterministic"])
    torch.manual_seed(randomness.seed(flags["seed"], randomness.INIT))
    new_head = weights.classes not in (None, source.classes)
    raw_model = models.build_model(**model_args, weights=weights, new_head=new_head)
    preprocessing = models.preprocessing(flags["model"], recipe, image_size, weights)
    if isinstance(raw_model, models.CNNFast) and not weights.path:
        raw_model.whiten(whitening_images(images["train"], preprocessing))

    # Settings: the flags become one frozen object. The training loop reads only this.
    settings = resolve(
        flags,
        recipe,
        run_name=files.run,
        image_size=image_size,
        model_args=model_args,
        val_fraction=val_fraction,
        num_train_images=len(images["train"]),
        is_linear_probe=isinstance(raw_model, models.ViTLinearProbe),
        mixed_precision=accelerator.mixed_precision,
        num_threads=torch.get_num_threads(),
    )
    if settings.batch_size < accelerator.num_processes:
        raise UserError(
            f"--batch-size {settings.batch_size} is shared by {accelerator.num_processes} processes: "
            "give at least one image for each"
        )
    step_settings = StepSettings(
        preprocessing=preprocessing,
        augment=settings.augment,
        label_smoothing=settings.label_smoothing,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        clip_grad=settings.clip_grad,
        seed=settings.seed,
    )
    fingerprint = images["train"].fingerprint()
    same_everywhere = {name: value for name, value in flags.items() if not may_differ_between_processes(name)}
    check_agreement(accelerator, [same_everywhere, fingerprint, model_args])
    if not flags["sanity_check"]:
        check_shared_folder(accelerator, flags["output_dir"])

    return prepare_run(
        settings,
        step_settings,
        accelerator,
        source=source,
        images=images,
        fingerprint=fingerprint,
        weights=weights,
        raw_model=raw_model,
        files=files,
    )


def prepare_run(
    settings: Settings,
    step_settings: StepSettings,
    accelerator: Accelerator,
    *,
    source: Source,
    images: dict[str, Images],
    fingerprint: str,
    weights: Weights,
    raw_model: torch.nn.Module,
    files: RunFiles,
) -> Run:
    """Build the optimizer. Then accelerate moves model and optimizer to the device and wraps them, once."""
    optimizer = build_optimizer(
        settings.optimizer,
        raw_model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    )
    model, optimizer = accelerator.prepare(raw_model, optimizer)
    fix_ddp_bucket_order(accelerator, model, settings.image_size)
    header = checkpoint.make_header(
        model=settings.model_args,
        classes=source.classes,
        preprocessing=step_settings.preprocessing,
        arguments=settings.recorded(),
        dataset={
            "name": source.name,
            "revision": source.revision,
            "train_sha256": fingerprint,
            "division_sha256": division_digest(source),
            "read": source.to_json(),
        },
        weights=weights,
    )
    return Run(
        settings=settings,
        step_settings=step_settings,
        accelerator=accelerator,
        images=images,
        weights=weights,
        model=torch.compile(model) if settings.compile else model,
        raw_model=raw_model,
        optimizer=optimizer,
        ema=Ema(raw_model, settings.ema) if settings.ema else None,
        guard=NonFiniteGuard(accelerator),
        header=header,
        files=files,
    )


def may_differ_between_processes(flag: str) -> bool:
    return flag in MAY_DIFFER and MAY_DIFFER[flag].between_processes


def use_deterministic_algorithms(deterministic: bool) -> None:
    """Allow torch only deterministic algorithms. An operator without one then raises an error."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it at its first use
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def describe(run: Run) -> str:
    """Describe the run before it starts: model, data, batch, optimizer, length, hardware. A line for each."""
    settings, processes = run.settings, run.accelerator.num_processes
    num_parameters, num_trainable = models.count_parameters(run.raw_model)
    counts = ", ".join(f"{len(images):,} {split}" for split, images in run.images.items())
    accumulation = settings.gradient_accumulation_steps
    micro_batch = math.ceil(settings.batch_size / accumulation / processes)
    plural = "es" if processes > 1 else ""
    last_lr = run.learning_rate(settings.total_steps - 1)
    # A run shorter than its warm-up never reaches --lr.
    schedule = settings.schedule if run.warmup_steps <= settings.total_steps else "only warm-up,"
    return "\n".join(
        [
            f"model      {settings.model}, weights {run.weights}: {num_parameters:,} parameters, "
            f"{num_trainable:,} trainable",
            f"input      {run.step_settings.preprocessing}",
            f"data       {settings.dataset}: {counts}; augment {settings.augment}",
            f"batch      {settings.batch_size} = processes {processes} x accumulation {accumulation} "
            f"x micro-batch {micro_batch}",
            f"optimizer  {settings.optimizer}, lr {settings.lr:g}, weight decay {settings.weight_decay:g}, "
            f"{schedule} to {last_lr:.3g}, recipe {settings.recipe}",
            f"length     {settings.epochs} epochs, {settings.total_steps:,} steps",
            f"hardware   {run.accelerator.device.type}, {processes} process{plural} of "
            f"{settings.num_threads} threads, "
            f"{precision_text(run.accelerator)}",
        ]
    )
