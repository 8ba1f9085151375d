"""Train an image classifier: arguments -> recipe -> data -> model -> prepare -> the loop -> final evaluation.

    accelerate launch train.py --model vit --lr 0.01                                                      # on what there is
    accelerate launch --config_file accelerate_configs/single_gpu_bf16.yaml train.py --model vit           # one GPU
    accelerate launch --config_file accelerate_configs/multi_gpu_bf16.yaml train.py --model vit --resume   # many

Writes checkpoints/{run}_best.safetensors, {run}_final.safetensors and {run}_state/ (to --resume from), and runs/{run}/ for
TensorBoard, under --output-dir.
"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from modeling import cli, features, models, randomness, recipes
from modeling.data.augment import AUGMENT_SETS
from modeling.data.batches import training_steps
from modeling.data.images import Images, decode, native_size
from modeling.data.sources import Source, default_val_fraction, is_stl10, load_source, select_rows, stratified
from modeling.engine import StepSettings, complete_view, evaluate_model, fix_ddp_bucket_order, train_step
from modeling.errors import UserError
from modeling.optim import Ema, build_optimizer, learning_rate
from modeling.progress import Progress
from modeling.run import checkpoint, preemption, state, tracking
from modeling.run.files import RunFiles
from modeling.run.launch import check_agreement, make_accelerator, precision_text
from modeling.sanity import sanity_check

CHECK_EVERY = 20  # steps between looks at the flag that a loss was not finite: each look waits for the device
NOT_FINITE_HELP = "use a lower --lr, --warmup-epochs 1 or --clip-grad 1"
BEST_METRICS = {"accuracy": max, "balanced_accuracy": max, "macro_f1": max, "loss": min}


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
        help="of vit: views of each image whose features are computed, once, and kept; epoch e sees view e mod K (0: a view an epoch)",
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


def resolve(args: argparse.Namespace, recipe: recipes.Recipe) -> None:
    """Fill the flags that the user did not give from the recipe."""
    for field in fields(recipe):
        if getattr(args, field.name, 0) is None:
            setattr(args, field.name, getattr(recipe, field.name))


def choose_image_size(args: argparse.Namespace, images: Images) -> int:
    """For a model from scratch the images' own size, and 224 for the reference recipes on STL-10."""
    published = 224 if args.recipe == "reference" and is_stl10(args.dataset) else None
    return published or native_size(images)


def load_images(args: argparse.Namespace, size: int | None) -> tuple[Source, dict[str, Images]]:
    """Decode every image that the run will use, at the model's `size` where that is known by now."""
    source = load_source(args.dataset)
    args.val_fraction = args.val_fraction or default_val_fraction(args.dataset)
    limits = dict(limit_train=args.limit_train, limit_eval=args.limit_eval)
    wanted = (
        ["train"]
        if args.sanity_check
        else ["train", "validation", *(["test"] if "test" in source.splits else [])]
    )
    rows = {
        split: select_rows(source, split, val_fraction=args.val_fraction, seed=args.seed, **limits)
        for split in wanted
    }
    own, train_rows = rows["train"]
    trained = set(source.labels(own)[train_rows].tolist())
    untrained = [name for number, name in enumerate(source.classes) if number not in trained]
    if untrained:
        print(
            f"No training image has the class {', '.join(map(repr, untrained[:5]))}{' ...' if len(untrained) > 5 else ''}."
        )
    if args.sanity_check:
        count = args.num_batches * (
            args.batch_size or recipes.get_recipe(args.model, args.image_size or 224, args.recipe).batch_size
        )
        chosen = stratified(
            source.labels(own)[train_rows], min(count, len(train_rows)), args.seed, randomness.SUBSET
        )
        rows["train"] = own, train_rows[chosen]
    options = dict(
        image_size=size, num_workers=args.num_workers, store_limit=1e9 * args.store_limit, progress=Progress
    )
    images = {split: decode(source, own, r, **options) for split, (own, r) in rows.items()}
    return source, images


def describe(
    args: argparse.Namespace,
    accelerator,
    images: dict[str, Images],
    model,
    weights,
    preprocessing,
    total_steps,
) -> str:
    """What a person wants to see before a long run starts."""
    total, trainable = models.count_parameters(model)
    counts = ", ".join(f"{len(part):,} {split}" for split, part in images.items())
    accumulation, processes = args.gradient_accumulation_steps, accelerator.num_processes
    micro = math.ceil(args.batch_size / accumulation / processes)
    threads = f"{processes} process{'es' if processes > 1 else ''} of {torch.get_num_threads()} threads"
    return "\n".join(
        [
            f"model      {args.model}, weights {weights}: {total:,} parameters, {trainable:,} trainable",
            f"input      {preprocessing}",
            f"data       {args.dataset}: {counts}; augment {args.augment}",
            f"batch      {args.batch_size} = processes {processes} x accumulation {accumulation} x micro-batch {micro}",
            f"optimizer  {args.optimizer}, lr {args.lr:g}, weight decay {args.weight_decay:g}, {args.schedule}, recipe {args.recipe}",
            f"length     {args.epochs} epochs, {total_steps:,} steps",
            f"hardware   {accelerator.device.type}, {threads}, {precision_text(accelerator)}",
        ]
    )


def run_training(args: argparse.Namespace) -> dict[str, Any]:
    # ---- arguments, recipe, data -----------------------------------------------------------------------------------------------
    models.check_model_name(args.model)
    run = args.run_name = models.file_name(args.model) if args.run_name is None else args.run_name
    run_files = RunFiles(args.output_dir, run)
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
    if not args.sanity_check:
        cli.check_output_dir(args.output_dir, "checkpoints", "runs")
    weights = models.find_weights(args.model, args.weights)
    size = args.image_size or models.default_image_size(args.model, weights)
    source, images = load_images(args, size)
    args.image_size = size or choose_image_size(args, images["train"])
    recipe = recipes.get_recipe(args.model, args.image_size, args.recipe)
    args.schedule, asked_views = recipe.schedule, args.feature_views is not None
    resolve(args, recipe)
    if args.batch_size < accelerator.num_processes:
        raise UserError(
            f"--batch-size {args.batch_size} is the batch of all {accelerator.num_processes} processes: give each an image"
        )

    # ---- model and optimizer ---------------------------------------------------------------------------------------------------
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(args.deterministic)
    model_args = models.model_arguments(
        args.model,
        recipe,
        image_size=args.image_size,
        patch_size=args.patch_size,
        head_dropout=args.head_dropout,
    )
    model_args |= {"name": args.model, "num_classes": len(source.classes), "image_size": args.image_size}
    torch.manual_seed(randomness.seed(args.seed, randomness.INIT))
    raw_model = models.build_model(**model_args, weights=weights.path)
    features.choose_views(args, raw_model, asked=asked_views)
    optimizer = build_optimizer(args.optimizer, raw_model, lr=args.lr, weight_decay=args.weight_decay)
    objective = StepSettings(
        preprocessing=models.preprocessing(args.model, recipe, args.image_size, weights),
        augment=args.augment,
        label_smoothing=args.label_smoothing,
        mixup=args.mixup,
        cutmix=args.cutmix,
        clip_grad=args.clip_grad,
        seed=args.seed,
    )

    # ---- prepare, once ---------------------------------------------------------------------------------------------------------
    fingerprint = images["train"].fingerprint()
    check_agreement(accelerator, args, [fingerprint, model_args])
    model, optimizer = accelerator.prepare(raw_model, optimizer)
    fix_ddp_bucket_order(accelerator, model, args.image_size)
    if args.compile:
        model = torch.compile(model)
    if args.sanity_check:
        return sanity_check(args, accelerator, model, raw_model, optimizer, images["train"], objective)
    ema = Ema(raw_model, args.ema) if args.ema else None

    # ---- a new run, or the rest of one -----------------------------------------------------------------------------------------
    steps_per_epoch = math.ceil(len(images["train"]) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    args.epochs = math.ceil(total_steps / steps_per_epoch)
    print(
        describe(args, accelerator, images, raw_model, weights, objective.preprocessing, total_steps),
        flush=True,
    )
    header = checkpoint.make_header(
        model=model_args,
        classes=source.classes,
        preprocessing=objective.preprocessing,
        arguments=vars(args)
        | {"num_threads": torch.get_num_threads(), "mixed_precision": accelerator.mixed_precision},
        dataset={"name": source.name, "revision": source.revision, "train_sha256": fingerprint},
        weights=weights,
    )
    paths = {"best": run_files.best, "final": run_files.final}
    states = state.States(run_files.states, accelerator, raw_model, optimizer, ema, header)
    position, totals = state.restore_or_begin(states, args, run)
    recorded = position.finished or position.num_seen == 0  # what there is to say of this step
    state.apply_forced_arguments(position, totals, args, len(images["train"]), states.differs)
    caches = features.open_caches(
        args, accelerator, raw_model, images, objective.preprocessing
    )  # of the backbone as it is by now
    if caches:
        print(f"features   are kept in {caches['validation'].folder.parent}", flush=True)
    log = dict(first_step=position.step + recorded, log_bytes=position.log_bytes)
    tracker = tracking.Tracker(run_files.logs, enabled=accelerator.is_main_process, **log)

    def save_state() -> None:
        stop_if_bad(accelerator, first_bad)
        position.log_bytes, position.seconds = tracker.flush(), time.monotonic() - started
        states.save(position, totals)

    # ---- the loop --------------------------------------------------------------------------------------------------------------
    started = time.monotonic() - position.seconds
    schedule = dict(
        total_steps=total_steps,
        warmup_steps=round(args.warmup_epochs * steps_per_epoch),
        schedule=args.schedule,
    )
    rate = functools.partial(learning_rate, base=args.lr, **schedule)
    first_bad = torch.tensor(-1, device=accelerator.device)
    better = BEST_METRICS[args.best_metric]
    full_epochs, rest = divmod(total_steps, steps_per_epoch)
    num_done = position.epoch * len(images["train"]) + position.num_seen
    progress = Progress(full_epochs * len(images["train"]) + rest * args.batch_size, "epoch", done=num_done)
    with preemption.Preemption(accelerator, save_state) as signals:
        for epoch in range(position.epoch, args.epochs) if not position.finished else ():
            model.train()
            progress.describe(f"epoch {epoch + 1}/{args.epochs}")
            share = dict(batch_size=args.batch_size, accumulation=args.gradient_accumulation_steps)
            cache = caches.get("train")
            steps = training_steps(
                images["train"],
                seed=args.seed,
                epoch=epoch,
                **share,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                mix=objective.mixes,
                start=math.ceil(position.num_seen / args.batch_size),
                with_pixels=not (
                    cache and complete_view(accelerator, cache, images["train"], epoch, objective, **share)
                ),
            )
            for micro_batches in itertools.islice(steps, args.max_steps and args.max_steps - position.step):
                num_images = min(args.batch_size, len(images["train"]) - position.num_seen)
                where = dict(epoch=epoch, step=position.step, num_images=num_images)
                what = dict(lr=rate(position.step), objective=objective, cache=cache)
                step_totals = train_step(accelerator, model, optimizer, micro_batches, **where, **what)
                totals += step_totals
                first_bad = torch.where(
                    (first_bad < 0) & ~step_totals[0].isfinite(), position.step, first_bad
                )
                if ema:
                    ema.update(raw_model)
                position.step, position.num_seen = position.step + 1, position.num_seen + num_images
                progress.update(num_images)
                signals.check()
                if position.step % CHECK_EVERY == 0:  # all ranks
                    stop_if_bad(accelerator, first_bad)
                if (
                    args.checkpoint_every and position.step % args.checkpoint_every == 0
                ):  # all ranks; the main one writes
                    save_state()

            # once an epoch, all ranks; only the main one writes
            stop_if_bad(accelerator, first_bad)
            loss_sum, num_right = accelerator.gather(totals[None]).sum(dim=0).tolist()
            num_images, lr = position.num_seen, rate(position.step - 1)
            record = {
                "train_loss": loss_sum / num_images,
                "train_accuracy": num_right / num_images,
                "learning_rate": lr,
            }
            with ema.swapped_in(raw_model) if ema else contextlib.nullcontext():
                options = dict(
                    accelerator=accelerator, progress=signals.check, cache=caches.get("validation")
                )
                scores = evaluate_model(raw_model, images["validation"], objective.preprocessing, **options)
                if not math.isfinite(scores["loss"]):
                    raise FloatingPointError(
                        f"the validation loss was not finite after step {position.step}: {NOT_FINITE_HELP}"
                    )
                record |= {f"validation_{name}": value for name, value in scores.items()}
                header |= {"epoch": epoch + 1, "step": position.step, "metrics": scores}
                is_best = (
                    position.best is None or better(scores[args.best_metric], position.best) != position.best
                )
                stale = 0 if is_best else epoch + 1 - position.best_epoch
                last = epoch + 1 == args.epochs or (args.early_stop and stale >= args.early_stop)
                if is_best:
                    position.best, position.best_epoch, position.best_scores = (
                        scores[args.best_metric],
                        epoch + 1,
                        scores,
                    )
                clock = {"train_seconds": time.monotonic() - started}
                for kind in [
                    kind
                    for kind, due in (("best", is_best), ("final", last))
                    if due and accelerator.is_main_process
                ]:
                    checkpoint.save_checkpoint(paths[kind], raw_model.state_dict(), header, clock)
            tracker.histograms(raw_model, position.step)
            tracker.record("epoch", step=position.step, epoch=epoch + 1, **record)
            train_text = f"train loss {record['train_loss']:.4f} acc {record['train_accuracy']:.4f}"
            validation_text = f"validation loss {scores['loss']:.4f} acc {scores['accuracy']:.4f}{'  best' if is_best else ''}"
            progress.say(
                f"epoch {epoch + 1}/{args.epochs}  step {position.step:,}  lr {lr:.2e}  {train_text}  {validation_text}"
            )
            if last:
                position.finished = True
                break
            position.epoch, position.num_seen = epoch + 1, 0
            totals.zero_()
            save_state()
        progress.close()

        # ---- final evaluation: the best epoch, once, on test -------------------------------------------------------------------
        if position.test is None:
            accelerator.wait_for_everyone()  # for the main one to have written the best checkpoint
            if "test" in images:
                best_model = accelerator.prepare_model(
                    checkpoint.load_model(paths["best"])[0], evaluation_mode=True
                )
                options = dict(accelerator=accelerator, progress=signals.check, cache=caches.get("test"))
                position.test = evaluate_model(best_model, images["test"], objective.preprocessing, **options)
                scores = {f"test_{name}": value for name, value in position.test.items()}
                tracker.record("test", step=position.step, best_epoch=position.best_epoch, **scores)
            save_state()
    tracker.close()
    seconds = time.monotonic() - started
    best_text = f"Best epoch {position.best_epoch}: validation {args.best_metric} {position.best:.4f}"
    print(f"Trained {position.step:,} steps in {seconds:.0f} s. {best_text}", flush=True)
    if position.test:
        test = position.test
        print(
            f"test accuracy {test['accuracy']:.4f}, macro F1 {test['macro_f1']:.4f} ({len(images['test']):,} images)"
        )
    print(
        f"Checkpoints {paths['best']} and {paths['final']}; curves: tensorboard --logdir {args.output_dir / 'runs'}"
    )
    result = {
        "run": run,
        "best_epoch": position.best_epoch,
        "steps": position.step,
        "validation": position.best_scores,
    }
    return (
        result
        | {f"{kind}_checkpoint": str(path) for kind, path in paths.items()}
        | ({"test": position.test} if position.test else {})
    )


def stop_if_bad(accelerator, first_bad: torch.Tensor) -> None:
    """FloatingPointError on every process: one of them had a loss that was not finite. first_bad: the step, or -1."""
    step = int(accelerator.gather(first_bad[None]).max())
    if step >= 0:
        raise FloatingPointError(f"the loss was not finite at step {step}: {NOT_FINITE_HELP}")


def train_model(**options: Any) -> dict[str, Any]:
    """Train as the command does: train_model(model="cnn", dataset="digits", epochs=2). Options are the flags, with underscores.

    Gives run, best_epoch, steps, best_checkpoint, final_checkpoint, and the metrics of validation and, where there is one, test;
    with sanity_check=True passed, accuracy, loss, steps. UserError: what the command would refuse.
    """
    return run_training(build_parser().parse_options(options))


def main(argv: list[str] | None = None) -> int:
    result = run_training(build_parser().parse_args(argv))
    return 0 if result.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
