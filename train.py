"""Train an image classifier: flags -> settings -> data -> model -> prepare -> the loop -> final test.

    python train.py --model cnn_small --dataset digits                                            # CPU
    accelerate launch --config_file accelerate_configs/single_gpu_bf16.yaml train.py --model vit  # one GPU
    accelerate launch --config_file accelerate_configs/multi_gpu_bf16.yaml train.py --model vit   # many GPUs

Under --output-dir it writes checkpoints/{run}_best.safetensors and {run}_final.safetensors, the folder
checkpoints/{run}_state/ to --resume from, and runs/{run}/ with TensorBoard's events and metrics.jsonl.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from modeling import cli, features, models, randomness, recipes
from modeling.data.augment import AUGMENT_SETS
from modeling.data.batches import training_steps
from modeling.data.images import Images, decode, native_size
from modeling.data.sources import Source, default_val_fraction, is_stl10, load_source, select_rows, stratified
from modeling.engine import (
    NOT_FINITE_HELP,
    NonFiniteGuard,
    StepSettings,
    evaluate_model,
    fix_ddp_bucket_order,
    train_step,
)
from modeling.errors import UserError
from modeling.models.weights import Weights
from modeling.optim import Ema, build_optimizer, learning_rate
from modeling.progress import Progress
from modeling.recipes import MAY_DIFFER, Settings
from modeling.run import checkpoint, lock, preemption, state, tracking
from modeling.run.files import RunFiles
from modeling.run.launch import check_agreement, check_shared_folder, make_accelerator, precision_text
from modeling.sanity import sanity_check

CHECK_EVERY = 20  # steps between looks at the guard against non-finite losses: each look waits for the device
EVAL_BATCH_SIZE = 64
BEST_METRICS = {"accuracy": max, "balanced_accuracy": max, "macro_f1": max, "loss": min}


# ---- Flags ---------------------------------------------------------------------------------------


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    basic = parser.add_argument_group("the usual")
    basic.add_argument(
        "--model", default="cnn", help=f"{', '.join(models.MODELS)}, or timm/NAME (default: cnn)"
    )
    basic.add_argument(
        "--dataset",
        default="stl10",
        help="stl10, cifar10, digits, a hub id (@REVISION) or a local folder (default: stl10)",
    )
    basic.add_argument(
        "--epochs", type=cli.POSITIVE_INT, help="passes over the training images (default: the recipe's)"
    )
    basic.add_argument(
        "--batch-size",
        type=cli.POSITIVE_INT,
        help="images an update, over all processes (default: the recipe's)",
    )
    basic.add_argument("--lr", type=cli.POSITIVE, help="peak learning rate (default: the recipe's)")
    basic.add_argument(
        "--output-dir", type=Path, default=Path(), help="where checkpoints/ and runs/ go (default: here)"
    )
    basic.add_argument("--run-name", help="name of the run's files (default: the model's name)")
    basic.add_argument("--seed", type=cli.SEED, default=42, help="(default: 42)")

    group = parser.add_argument_group("recipe (defaults are the recipe's; 0 is off)")
    group.add_argument(
        "--recipe",
        choices=("tuned", "reference"),
        default="tuned",
        help="our best, or the published one (default: tuned)",
    )
    group.add_argument(
        "--max-steps", type=cli.POSITIVE_INT, help="train for this many updates, whatever --epochs says"
    )
    group.add_argument("--optimizer", choices=("adam", "adamw", "sgd"), help="sgd has momentum 0.9")
    group.add_argument("--weight-decay", type=cli.NON_NEGATIVE, help="as the optimizer takes it")
    group.add_argument(
        "--warmup-epochs", type=cli.NON_NEGATIVE, help="epochs of linear warm-up of the learning rate"
    )
    group.add_argument("--augment", choices=AUGMENT_SETS, help="random changes of each training image")
    group.add_argument(
        "--label-smoothing",
        type=cli.number(low=0, high=1, open_high=True),
        help="share of the target spread over classes",
    )
    group.add_argument(
        "--mixup",
        type=cli.NON_NEGATIVE,
        metavar="ALPHA",
        help="mix pairs of images, weight from Beta(ALPHA, ALPHA)",
    )
    group.add_argument(
        "--cutmix",
        type=cli.NON_NEGATIVE,
        metavar="ALPHA",
        help="paste a box of another image, area from Beta(ALPHA, ALPHA)",
    )
    group.add_argument(
        "--clip-grad", type=cli.NON_NEGATIVE, metavar="NORM", help="largest norm of the gradient"
    )
    group.add_argument(
        "--ema",
        type=cli.number(low=0, high=1, open_high=True),
        metavar="DECAY",
        help="average the weights; checkpoints hold the average",
    )
    group.add_argument(
        "--gradient-accumulation-steps",
        type=cli.POSITIVE_INT,
        default=1,
        help="micro-batches a batch is cut into (default: 1)",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--weights",
        default="default",
        help="default (the hub's, for a pretrained model), none, hf-hub:ORG/NAME or a safetensors file",
    )
    group.add_argument(
        "--image-size",
        type=cli.POSITIVE_INT,
        help="side in pixels (default: the pretrained model's, else the images', 224 at most)",
    )
    group.add_argument(
        "--patch-size",
        type=cli.POSITIVE_INT,
        help="vit_scratch's, in pixels (default: 4 up to 64 pixels, 8, 16 from 128)",
    )
    group.add_argument(
        "--head-dropout",
        type=cli.number(low=0, high=1, open_high=True),
        help="dropout before the last layer (default: the model's)",
    )

    group.add_argument(
        "--feature-views",
        type=cli.NUM_WORKERS,
        metavar="K",
        help="vit only: keep the features of K augmented views of each image; epoch e sees view e mod K "
        "(0: a view an epoch; default: the recipe's)",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--val-fraction",
        type=cli.FRACTION,
        help="share of train for validation, where the dataset has none (default: stl10 0.2, else 0.1)",
    )
    group.add_argument(
        "--limit-train", type=cli.POSITIVE_INT, metavar="N", help="train on a stratified subset of N images"
    )
    group.add_argument(
        "--limit-eval",
        type=cli.POSITIVE_INT,
        metavar="N",
        help="validate and test on stratified subsets of N images",
    )

    group = parser.add_argument_group(
        "resuming (a state is saved after each epoch, and on SIGTERM, SIGINT and SIGUSR1)"
    )
    group.add_argument(
        "--checkpoint-every",
        type=cli.POSITIVE_INT,
        metavar="STEPS",
        help="save a state every so many steps, too",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole state of the run, or start where there is none",
    )
    group.add_argument(
        "--force", action="store_true", help="resume even if arguments differ from those of the state"
    )

    group = parser.add_argument_group("selection and checks")
    group.add_argument(
        "--best-metric",
        choices=tuple(BEST_METRICS),
        default="accuracy",
        help="what chooses the best epoch (default: accuracy)",
    )
    group.add_argument(
        "--early-stop",
        type=cli.POSITIVE_INT,
        metavar="EPOCHS",
        help="stop after so many epochs without a better one",
    )
    group.add_argument(
        "--sanity-check",
        action="store_true",
        help="only see whether the model can overfit a few batches; writes nothing",
    )
    group.add_argument(
        "--num-batches",
        type=cli.POSITIVE_INT,
        default=5,
        help="batches that --sanity-check overfits (default: 5)",
    )
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="only deterministic algorithms; an operator without one is an error",
    )
    cli.add_hardware_group(parser)
    return parser


# ---- Data and settings ---------------------------------------------------------------------------


def load_images(
    source: Source, args: argparse.Namespace, *, image_size: int | None, val_fraction: float
) -> dict[str, Images]:
    """Decode every image that the run will use. image_size: the input side in pixels, if known."""
    splits = ["train"]
    if not args.sanity_check:
        splits += ["validation", *(["test"] if "test" in source.splits else [])]
    images = {}
    for split in splits:
        source_split, rows = select_rows(
            source,
            split,
            val_fraction=val_fraction,
            seed=args.seed,
            limit_train=args.limit_train,
            limit_eval=args.limit_eval,
        )
        images[split] = decode(
            source,
            source_split,
            rows,
            image_size=image_size,
            num_workers=args.num_workers,
            store_limit=1e9 * args.store_limit,
            progress=Progress,
        )
    return images


def warn_of_untrained_classes(source: Source, train: Images) -> None:
    trained = set(train.labels.tolist())
    untrained = [repr(name) for number, name in enumerate(source.classes) if number not in trained]
    if untrained:
        more = " ..." if len(untrained) > 5 else ""
        print(f"No training image has the class {', '.join(untrained[:5])}{more}.")


def choose_image_size(*, recipe: str, dataset: str, images: Images) -> int:
    """The input side of a model from scratch: the images' own, but 224 px for reference recipes on STL-10."""
    return 224 if recipe == "reference" and is_stl10(dataset) else native_size(images)


# ---- Everything the loop works with --------------------------------------------------------------


@dataclass
class Run:
    """One training run. raw_model is the model without DDP and compilation; both share their weights."""

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

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step` (from 0)."""
        return learning_rate(
            step,
            base=self.settings.lr,
            total_steps=self.settings.total_steps,
            warmup_steps=round(self.settings.warmup_epochs * self.settings.steps_per_epoch),
            schedule=self.settings.schedule,
        )


def set_up(args: argparse.Namespace, accelerator: Accelerator, files: RunFiles) -> Run:
    """Turn flags into settings, images, a model and an optimizer, and prepare these for the hardware."""
    # Data: the model's weights decide the image size, which decides how large the images are kept.
    weights = models.find_weights(args.model, args.weights)
    image_size = args.image_size or models.default_image_size(args.model, weights)
    source = load_source(args.dataset)
    val_fraction = args.val_fraction or default_val_fraction(args.dataset)
    images = load_images(source, args, image_size=image_size, val_fraction=val_fraction)
    warn_of_untrained_classes(source, images["train"])
    image_size = image_size or choose_image_size(
        recipe=args.recipe, dataset=args.dataset, images=images["train"]
    )

    # Model: its first weights are a function of the seed alone.
    recipe = recipes.get_recipe(args.model, image_size, args.recipe)
    model_args = models.model_arguments(
        args.model,
        recipe,
        image_size=image_size,
        patch_size=args.patch_size,
        head_dropout=args.head_dropout,
    )
    model_args |= {"name": args.model, "num_classes": len(source.classes), "image_size": image_size}
    use_deterministic_algorithms(args.deterministic)
    torch.manual_seed(randomness.seed(args.seed, randomness.INIT))
    raw_model = models.build_model(**model_args, weights=weights.path)

    # Settings: from here on the flags are not read any more.
    settings = recipes.resolve(
        vars(args),
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
            f"--batch-size {settings.batch_size} is the batch of all {accelerator.num_processes} processes: "
            "give each an image"
        )
    step_settings = StepSettings(
        preprocessing=models.preprocessing(args.model, recipe, image_size, weights),
        augment=settings.augment,
        label_smoothing=settings.label_smoothing,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        clip_grad=settings.clip_grad,
        seed=settings.seed,
    )
    fingerprint = images["train"].fingerprint()
    same_everywhere = {
        name: value for name, value in vars(args).items() if not may_differ_between_processes(name)
    }
    check_agreement(accelerator, [same_everywhere, fingerprint, model_args])
    if not args.sanity_check:
        check_shared_folder(accelerator, args.output_dir)

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
    """Build the optimizer, then let accelerate move everything to its device and wrap it, once."""
    optimizer = build_optimizer(
        settings.optimizer, raw_model, lr=settings.lr, weight_decay=settings.weight_decay
    )
    model, optimizer = accelerator.prepare(raw_model, optimizer)
    fix_ddp_bucket_order(accelerator, model, settings.image_size)
    header = checkpoint.make_header(
        model=settings.model_args,
        classes=source.classes,
        preprocessing=step_settings.preprocessing,
        arguments=settings.recorded(),
        dataset={"name": source.name, "revision": source.revision, "train_sha256": fingerprint},
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
    """Let torch use only deterministic algorithms, and raise an error where an operator has none."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it at its first use
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)


def describe(run: Run) -> str:
    """What a person wants to see before a long run starts."""
    settings, processes = run.settings, run.accelerator.num_processes
    num_parameters, num_trainable = models.count_parameters(run.raw_model)
    counts = ", ".join(f"{len(images):,} {split}" for split, images in run.images.items())
    accumulation = settings.gradient_accumulation_steps
    micro_batch = math.ceil(settings.batch_size / accumulation / processes)
    plural = "es" if processes > 1 else ""
    last_lr = run.learning_rate(settings.total_steps - 1)
    return "\n".join(
        [
            f"model      {settings.model}, weights {run.weights}: {num_parameters:,} parameters, "
            f"{num_trainable:,} trainable",
            f"input      {run.step_settings.preprocessing}",
            f"data       {settings.dataset}: {counts}; augment {settings.augment}",
            f"batch      {settings.batch_size} = processes {processes} x accumulation {accumulation} "
            f"x micro-batch {micro_batch}",
            f"optimizer  {settings.optimizer}, lr {settings.lr:g}, weight decay {settings.weight_decay:g}, "
            f"{settings.schedule} to {last_lr:.3g}, recipe {settings.recipe}",
            f"length     {settings.epochs} epochs, {settings.total_steps:,} steps",
            f"hardware   {run.accelerator.device.type}, {processes} process{plural} of "
            f"{settings.num_threads} threads, "
            f"{precision_text(run.accelerator)}",
        ]
    )


def check_sanity(run: Run, num_batches: int) -> dict[str, Any]:
    """Only see whether the model can overfit `num_batches` batches of training images."""
    train, settings = run.images["train"], run.settings
    count = min(num_batches * settings.batch_size, len(train))
    chosen = stratified(train.labels, count, settings.seed, randomness.SUBSET)
    result = sanity_check(
        run.accelerator,
        run.model,
        run.raw_model,
        run.optimizer,
        train.subset(chosen),
        run.step_settings,
        model_name=settings.model,
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation_steps,
        lr=settings.lr,
        max_steps=settings.max_steps,
    )
    return dataclasses.asdict(result)


# ---- A new run, or the rest of one ---------------------------------------------------------------


class Progression:
    """What changes while a run goes on: its state, the sums of the epoch, the logs, the kept features."""

    def __init__(self, run: Run, run_lock: lock.Lock):
        settings = run.settings
        arguments = {
            name: value for name, value in settings.recorded().items() if not may_differ_on_resume(name)
        }
        arguments["training images"] = run.header["dataset"]["train_sha256"][:8]
        arguments["model"] = run.header["model"]
        self.run = run
        self.lock = run_lock
        self.states = state.States(
            run.files.states,
            accelerator=run.accelerator,
            model=run.raw_model,
            optimizer=run.optimizer,
            ema=run.ema,
            arguments=arguments,
        )
        self.state, self.totals = state.restore_or_begin(
            self.states, run.files, resume=settings.resume, force=settings.force
        )
        is_recorded = self.state.finished or self.state.num_seen == 0  # the log has its last step's records
        state.apply_forced_arguments(
            self.state,
            self.totals,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            batch_size=settings.batch_size,
            num_train_images=run.num_train_images,
            arguments_differ=self.states.arguments_differ,
        )
        self.probe_features = open_features(run)  # of the backbone that was just restored
        self.tracker = tracking.Tracker(
            run.files.logs,
            enabled=run.accelerator.is_main_process,
            first_step=self.state.step + is_recorded,
            log_bytes=self.state.log_bytes,
        )
        self.started = time.monotonic() - self.state.seconds
        num_full_epochs, rest = divmod(settings.total_steps, settings.steps_per_epoch)
        self.progress = Progress(
            num_full_epochs * run.num_train_images + rest * settings.batch_size,
            "epoch",
            done=self.state.epoch * run.num_train_images + self.state.num_seen,
        )

    def save(self) -> None:
        """Save a state to resume from. All processes call this; the main one writes."""
        self.run.guard.check()  # a state with a loss that was not finite is worth nothing
        self.lock.check()
        self.state.log_bytes = self.tracker.flush()
        self.state.seconds = time.monotonic() - self.started
        self.states.save(self.state, self.totals)

    def features_of(self, split: str) -> torch.Tensor | None:
        """The kept features (N, D) of a split for evaluation; None for a model that is not a probe."""
        return self.probe_features.of_split(split, EVAL_BATCH_SIZE) if self.probe_features else None


def may_differ_on_resume(flag: str) -> bool:
    return flag in MAY_DIFFER and MAY_DIFFER[flag].on_resume


def open_features(run: Run) -> features.ProbeFeatures | None:
    """The kept features of a linear probe; None for any other model."""
    if not isinstance(run.raw_model, models.ViTLinearProbe):
        return None
    probe_features = features.ProbeFeatures(
        run.accelerator,
        run.raw_model,
        run.images,
        run.step_settings.preprocessing,
        augment_name=run.settings.augment,
        seed=run.settings.seed,
        batch_size=run.settings.batch_size,
        accumulation=run.settings.gradient_accumulation_steps,
        num_views=run.settings.feature_views,
        mixes=run.step_settings.mixes,
    )
    print(f"features   are kept in {probe_features.folder}", flush=True)
    return probe_features


# ---- The loop ------------------------------------------------------------------------------------


def train_one_epoch(run: Run, now: Progression, epoch: int, signals: preemption.Preemption) -> None:
    """Train on the images of an epoch that `now.state` has not seen yet, each image once."""
    settings, current = run.settings, now.state
    run.model.train()
    now.progress.describe(f"epoch {epoch + 1}/{settings.epochs}")
    steps = training_steps(
        run.images["train"],
        seed=settings.seed,
        epoch=epoch,
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation_steps,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        mix=run.step_settings.mixes,
        start=math.ceil(current.num_seen / settings.batch_size),
        features=now.probe_features.of_epoch(epoch, signals.check) if now.probe_features else None,
    )
    num_steps_left = settings.max_steps - current.step if settings.max_steps else None
    for micro_batches in itertools.islice(steps, num_steps_left):
        num_images = min(settings.batch_size, run.num_train_images - current.num_seen)
        step_totals = train_step(
            run.accelerator,
            run.model,
            run.optimizer,
            micro_batches,
            epoch=epoch,
            step=current.step,
            lr=run.learning_rate(current.step),
            num_images=num_images,
            step_settings=run.step_settings,
        )
        now.totals += step_totals
        run.guard.watch(current.step, step_totals[0])
        if run.ema:
            run.ema.update(run.raw_model)
        current.step += 1
        current.num_seen += num_images
        now.progress.update(num_images)
        signals.check()  # all ranks, every step
        if current.step % CHECK_EVERY == 0:  # all ranks
            run.guard.check()
        if (
            settings.checkpoint_every and current.step % settings.checkpoint_every == 0
        ):  # all ranks; the main one writes
            now.save()


def finish_epoch(run: Run, now: Progression, epoch: int, signals: preemption.Preemption) -> None:
    """Validate, write checkpoints and record the epoch. Once an epoch, on all ranks; the main one writes."""
    settings, current = run.settings, now.state
    run.guard.check()
    loss_sum, num_correct = run.accelerator.gather(now.totals[None]).sum(dim=0).tolist()
    record = {
        "train_loss": loss_sum / current.num_seen,
        "train_accuracy": num_correct / current.num_seen,
        "learning_rate": run.learning_rate(current.step - 1),
    }

    # The averaged weights, where there is an average, are what is validated and kept.
    with run.ema.swapped_in(run.raw_model) if run.ema else contextlib.nullcontext():
        scores = evaluate_model(
            run.raw_model,
            run.images["validation"],
            run.step_settings.preprocessing,
            batch_size=EVAL_BATCH_SIZE,
            accelerator=run.accelerator,
            progress=signals.check,
            features=now.features_of("validation"),
        )
        if not math.isfinite(scores["loss"]):
            raise FloatingPointError(
                f"the validation loss was not finite after step {current.step}: {NOT_FINITE_HELP}"
            )
        is_best, is_last = judge_epoch(settings, current, epoch, scores)
        header = run.header | {"epoch": epoch + 1, "step": current.step, "metrics": scores}
        clock = {"train_seconds": time.monotonic() - now.started}
        now.lock.check()
        if is_best and run.accelerator.is_main_process:
            checkpoint.save_checkpoint(run.files.best, run.raw_model.state_dict(), header, clock)
        if is_last and run.accelerator.is_main_process:
            checkpoint.save_checkpoint(run.files.final, run.raw_model.state_dict(), header, clock)

    record |= {f"validation_{name}": value for name, value in scores.items()}
    now.tracker.histograms(run.raw_model, current.step)
    now.tracker.record("epoch", step=current.step, epoch=epoch + 1, **record)
    now.progress.say(epoch_text(settings, current, epoch, record, is_best))
    if is_last:
        current.finished = True
        return
    current.epoch, current.num_seen = epoch + 1, 0
    now.totals.zero_()
    now.save()


def judge_epoch(
    settings: Settings, current: state.RunState, epoch: int, scores: dict[str, float]
) -> tuple[bool, bool]:
    """Return whether the epoch is the best so far, and whether it is the last. Remember the best."""
    score, better = scores[settings.best_metric], BEST_METRICS[settings.best_metric]
    is_best = current.best is None or better(score, current.best) != current.best
    if is_best:
        current.best, current.best_epoch, current.best_scores = score, epoch + 1, scores
    num_stale = epoch + 1 - current.best_epoch
    stops_early = settings.early_stop > 0 and num_stale >= settings.early_stop
    return is_best, epoch + 1 == settings.epochs or stops_early


def epoch_text(
    settings: Settings, current: state.RunState, epoch: int, record: dict[str, float], is_best: bool
) -> str:
    return (
        f"epoch {epoch + 1}/{settings.epochs}  step {current.step:,}  lr {record['learning_rate']:.2e}  "
        f"train loss {record['train_loss']:.4f} acc {record['train_accuracy']:.4f}  "
        f"validation loss {record['validation_loss']:.4f} acc {record['validation_accuracy']:.4f}"
        f"{'  best' if is_best else ''}"
    )


def test_best_epoch(run: Run, now: Progression, signals: preemption.Preemption) -> None:
    """Evaluate the best epoch on test, where the dataset has one: once in a run, at its end. All ranks."""
    if now.state.test is not None:
        return
    run.accelerator.wait_for_everyone()  # for the main process to have written the best checkpoint
    if "test" in run.images:
        best_model, _ = checkpoint.load_model(run.files.best)
        now.state.test = evaluate_model(
            run.accelerator.prepare_model(best_model, evaluation_mode=True),
            run.images["test"],
            run.step_settings.preprocessing,
            batch_size=EVAL_BATCH_SIZE,
            accelerator=run.accelerator,
            progress=signals.check,
            features=now.features_of("test"),
        )
        scores = {f"test_{name}": value for name, value in now.state.test.items()}
        now.tracker.record("test", step=now.state.step, best_epoch=now.state.best_epoch, **scores)
    now.save()


def run_training(args: argparse.Namespace) -> dict[str, Any]:
    """The driver: check, set up, train. Returns what train_model documents."""
    models.check_model_name(args.model)
    run_name = models.file_name(args.model) if args.run_name is None else args.run_name
    files = RunFiles(args.output_dir, run_name)
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
    if args.sanity_check:
        return check_sanity(set_up(args, accelerator, files), args.num_batches)
    cli.check_output_dir(args.output_dir, "checkpoints", "runs")
    with lock.hold_run(accelerator, files) as run_lock:
        return train(args, accelerator, files, run_lock)


def train(
    args: argparse.Namespace, accelerator: Accelerator, files: RunFiles, run_lock: lock.Lock
) -> dict[str, Any]:
    """Set up, train and validate epoch by epoch, test. Returns what train_model documents."""
    # ---- Set-up: every image is decoded and every setting resolved before the first step.
    run = set_up(args, accelerator, files)
    print(describe(run), flush=True)

    # ---- Begin or resume: a resumed run ends bitwise as if it had never stopped.
    now = Progression(run, run_lock)

    # ---- The loop: a signal only leaves a mark, so that all processes stop after the same step.
    with preemption.Preemption(accelerator, now.save) as signals:
        epoch = now.state.epoch
        while not now.state.finished:
            train_one_epoch(run, now, epoch, signals)
            finish_epoch(run, now, epoch, signals)
            epoch += 1
        now.progress.close()

        # ---- Final test: the best epoch is evaluated once, on images that nothing was chosen by.
        test_best_epoch(run, now, signals)
    now.tracker.close()
    return report(run, now)


def report(run: Run, now: Progression) -> dict[str, Any]:
    """Print how the run ended, and return it."""
    current = now.state
    print(
        f"Trained {current.step:,} steps in {time.monotonic() - now.started:.0f} s. "
        f"Best epoch {current.best_epoch}: validation {run.settings.best_metric} {current.best:.4f}",
        flush=True,
    )
    if current.test:
        print(
            f"test accuracy {current.test['accuracy']:.4f}, macro F1 {current.test['macro_f1']:.4f} "
            f"({len(run.images['test']):,} images)"
        )
    logs = run.files.logs.parent
    print(f"Checkpoints {run.files.best} and {run.files.final}; curves: tensorboard --logdir {logs}")
    result: dict[str, Any] = {
        "run": run.files.run,
        "best_epoch": current.best_epoch,
        "steps": current.step,
        "validation": current.best_scores,
        "best_checkpoint": str(run.files.best),
        "final_checkpoint": str(run.files.final),
    }
    if current.test:
        result["test"] = current.test
    return result


def train_model(**options: Any) -> dict[str, Any]:
    """Train as the command does: train_model(model="cnn", dataset="digits", epochs=2).

    Options are the flags, with underscores.

    Returns run, best_epoch, steps, best_checkpoint, final_checkpoint, and the metrics of validation and,
    where the dataset has one, of test; with sanity_check=True: passed, accuracy, loss, steps. UserError: what
    the command would refuse.
    """
    return run_training(build_parser().parse_options(options))


def main(argv: list[str] | None = None) -> int:
    result = run_training(build_parser().parse_args(argv))
    return 0 if result.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
