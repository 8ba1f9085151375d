"""Train an image classifier: flags -> settings -> data -> model -> prepare -> the loop -> final test.

    python train.py --model cnn_small --dataset digits                                            # CPU
    accelerate launch --config_file accelerate_configs/single_gpu_bf16.yaml train.py --model vit  # one GPU
    accelerate launch --config_file accelerate_configs/multi_gpu_bf16.yaml train.py --model vit   # many GPUs

Under --output-dir it writes checkpoints/{run}_best.safetensors and {run}_final.safetensors, the folder
checkpoints/{run}_state/ to --resume from, and runs/{run}/ with metrics.jsonl, TensorBoard's events and
curves.png.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import sys
import time
from pathlib import Path
from typing import Any

from modeling import cli, metrics, models, randomness
from modeling.data.augment import AUGMENT_SETS
from modeling.data.batches import training_steps
from modeling.data.stratified import stratified
from modeling.engine import check_finite, evaluate_model, predict, train_step
from modeling.progression import EVAL_BATCH_SIZE, Progression, report
from modeling.run import checkpoint, lock, preemption, state, tracking
from modeling.run.files import RunFiles
from modeling.run.launch import Accelerator, make_accelerator, on_main_process
from modeling.run.process import process_as_it_was
from modeling.sanity import sanity_check
from modeling.settings import Settings
from modeling.setup import Run, describe, list_skipped, set_up

# Steps between two checks for a non-finite loss. A check waits for the device, so it is not made every step.
CHECK_EVERY = 20
BEST_METRICS = {"accuracy": max, "balanced_accuracy": max, "macro_f1": max, "loss": min}


# ---- Flags ---------------------------------------------------------------------------------------


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument_group("main flags").add_argument
    add("--model", default="cnn", help=f"{', '.join(models.MODELS)}, or timm/NAME (default: cnn)")
    add(
        "--dataset",
        default="stl10",
        help="stl10, cifar10, digits, a hub id, folder or table (default: stl10)",
    )
    add(
        "--epochs",
        type=cli.POSITIVE_INT,
        help="passes over the training images (default: the recipe's, which can be more for a small dataset)",
    )
    add("--batch-size", type=cli.POSITIVE_INT, help="images per update, of all processes together")
    add("--lr", type=cli.POSITIVE, help="peak learning rate (default: the recipe's)")
    add("--output-dir", type=cli.path, default=Path(), help="where checkpoints/ and runs/ go (default: here)")
    add("--run-name", help="name of the run's files (default: the model's name)")
    add(
        "--report-to",
        choices=tracking.REPORT_TO,
        default="tensorboard",
        help="tracker (default: tensorboard)",
    )
    add("--seed", type=cli.SEED, default=42, help="seed of every random number (default: 42)")

    add = parser.add_argument_group("recipe (defaults are the recipe's; 0 is off)").add_argument
    add("--recipe", choices=("tuned", "reference"), default="tuned", help="(default: tuned, our best)")
    add("--max-steps", type=cli.POSITIVE_INT, help="number of updates; overrides --epochs (default: not set)")
    add("--optimizer", choices=("adam", "adamw", "sgd", "muon"), help="see docs/models.md, Optimizers")
    add("--weight-decay", type=cli.NON_NEGATIVE, help="the optimizer's weight decay")
    add("--warmup-epochs", type=cli.EPOCHS, help="epochs of linear warm-up of the learning rate")
    add("--augment", choices=AUGMENT_SETS, help="random changes of each training image")
    add("--label-smoothing", type=cli.SHARE, help="share of the target spread over all classes")
    add("--mixup", type=cli.NON_NEGATIVE, metavar="ALPHA", help="blend pairs; weight from Beta(ALPHA, ALPHA)")
    add("--cutmix", type=cli.NON_NEGATIVE, metavar="ALPHA", help="paste a box; area from Beta(ALPHA, ALPHA)")
    add("--clip-grad", type=cli.NON_NEGATIVE, metavar="NORM", help="clip the gradient to this norm")
    add("--ema", type=cli.SHARE, metavar="DECAY", help="average the weights; checkpoints hold the average")
    add("--gradient-accumulation-steps", type=cli.POSITIVE_INT, default=1, help="micro-batches (default: 1)")

    add = parser.add_argument_group("model").add_argument
    add("--weights", default="default", help="default (the hub's), none, hf-hub:ORG/NAME or a file")
    add("--image-size", type=cli.POSITIVE_INT, help="side in pixels (default: see docs/models.md)")
    add("--patch-size", type=cli.POSITIVE_INT, help="of vit_scratch (default: 4, 8 or 16 px, by image size)")
    add("--head-dropout", type=cli.SHARE, help="dropout before the last layer (default: the model's)")
    add("--feature-views", type=cli.NUM_WORKERS, metavar="K", help="vit: views to keep (0: new each epoch)")

    add = parser.add_argument_group("data").add_argument
    add("--val-fraction", type=cli.FRACTION, help="share of train for validation (default: 0.1; stl10: 0.2)")
    add("--limit-train", type=cli.POSITIVE_INT, metavar="N", help="train on a stratified subset of N images")
    add("--limit-eval", type=cli.POSITIVE_INT, metavar="N", help="validate and test on subsets of N images")

    cli.add_data_choices(parser)
    add = parser.add_argument_group("resuming (each epoch and each signal saves a state)").add_argument
    add("--checkpoint-every", type=cli.POSITIVE_INT, metavar="STEPS", help="also save one every STEPS steps")
    add("--resume", action="store_true", help="continue from the newest state; start anew if none")
    add("--force", action="store_true", help="resume with other arguments than the state's")

    add = parser.add_argument_group("selection and checks").add_argument
    add("--best-metric", choices=tuple(BEST_METRICS), default="accuracy", help="(default: accuracy)")
    add("--early-stop", type=cli.POSITIVE_INT, metavar="EPOCHS", help="stop after EPOCHS without a new best")
    add("--sanity-check", action="store_true", help="only test whether the model overfits a few batches")
    add("--num-batches", type=cli.POSITIVE_INT, default=5, help="batches of --sanity-check (default: 5)")
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--deterministic", action="store_true", help="use only deterministic algorithms, or fail")
    cli.add_hardware_group(parser)
    return parser


# ---- The sanity check ----------------------------------------------------------------------------


def check_sanity(run: Run, num_batches: int) -> dict[str, Any]:
    """Test whether the model can overfit `num_batches` batches of training images. Nothing is written."""
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


# ---- The loop ------------------------------------------------------------------------------------


def train_one_epoch(run: Run, now: Progression, epoch: int, signals: preemption.Preemption) -> None:
    """Train once on each image of the epoch. After a resume, images that were seen before are skipped."""
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
    now.pace.begin()
    for micro_batches in now.pace.watch(itertools.islice(steps, num_steps_left)):
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
        now.totals += step_totals[:2]
        run.guard.watch(current.step, step_totals[0])
        if run.ema:
            run.ema.update(run.raw_model)
        current.step += 1
        current.num_seen += num_images
        now.pace.add(num_images, step_totals[2])
        now.progress.update(num_images)
        if current.step % CHECK_EVERY == 0:  # all ranks
            run.guard.check()
            now.report_pace()
        signals.check()  # all ranks, every step
        # All ranks enter; the main one writes.
        if settings.checkpoint_every and current.step % settings.checkpoint_every == 0:
            now.save()
    signals.ask()  # all ranks: a signal of the last steps is seen before the validation


def finish_epoch(run: Run, now: Progression, epoch: int, signals: preemption.Preemption) -> None:
    """Validate, write checkpoints and record the epoch. All ranks call this; the main one writes."""
    settings, current = run.settings, now.state
    run.guard.check()
    now.report_pace()
    loss_sum, num_correct = run.accelerator.gather(now.totals[None]).sum(dim=0).tolist()
    record = {
        "train_loss": loss_sum / current.num_seen,
        "train_accuracy": num_correct / current.num_seen,
        "learning_rate": run.learning_rate(current.step - 1),
    }

    # With --ema, validate and save the averaged weights.
    with run.ema.swapped_in(run.raw_model) if run.ema else contextlib.nullcontext():
        predictions = predict(
            run.raw_model,
            run.images["validation"],
            run.step_settings.preprocessing,
            batch_size=EVAL_BATCH_SIZE,
            accelerator=run.accelerator,
            progress=signals.check,
            features=now.features_of("validation"),
        )
        check_finite(predictions, "validation")
        scores = metrics.compute(predictions)
        is_best, is_last = judge_epoch(settings, current, epoch, scores)
        header = run.header | now.state.described(epoch, scores)
        clock = {"train_seconds": time.monotonic() - now.started}
        now.lock.check()
        if is_best and run.accelerator.is_main_process:
            checkpoint.save_checkpoint(run.files.best, run.raw_model.state_dict(), header, clock)
        if is_last and run.accelerator.is_main_process:
            checkpoint.save_checkpoint(run.files.final, run.raw_model.state_dict(), header, clock)

    record |= {f"validation_{name}": value for name, value in scores.items()}
    now.tracker.histograms(run.raw_model, current.step)
    now.report_confusions(predictions, run.images["validation"].classes)
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
    """Evaluate the best epoch on the test split, if there is one. All ranks call this once, at the end."""
    if now.state.test is not None:
        return
    run.accelerator.wait_for_everyone()  # until the main process has written the best checkpoint
    if "test" in run.images:
        now.state.test = evaluate_model(
            run.accelerator.prepare_model(now.load_best(), evaluation_mode=True),
            run.images["test"],
            run.step_settings.preprocessing,
            batch_size=EVAL_BATCH_SIZE,
            accelerator=run.accelerator,
            progress=signals.check,
            features=now.features_of("test"),
            split="test",
        )
        scores = {f"test_{name}": value for name, value in now.state.test.items()}
        now.tracker.record("test", step=now.state.step, best_epoch=now.state.best_epoch, **scores)
    now.save()


def run_training(args: argparse.Namespace) -> dict[str, Any]:
    """Check the flags, lock the run's files, and train. The result is described in train_model."""
    models.check_model_name(args.model)
    tracking.check_installed(args.report_to)
    run_name = models.file_name(args.model) if args.run_name is None else args.run_name
    files = RunFiles(args.output_dir, run_name)
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, num_threads=args.num_threads)
    if args.sanity_check:
        return check_sanity(set_up(vars(args), accelerator, files), args.num_batches)
    on_main_process(accelerator, files.check_writable)
    with lock.hold_run(accelerator, files) as run_lock:
        return train(args, accelerator, files, run_lock)


def train(
    args: argparse.Namespace, accelerator: Accelerator, files: RunFiles, run_lock: lock.Lock
) -> dict[str, Any]:
    """The driver: set up, train and validate epoch by epoch, test."""
    # ---- Set-up: every image is decoded and every setting resolved before the first step.
    run = set_up(vars(args), accelerator, files)
    print(describe(run), flush=True)

    # ---- Begin or resume: a resumed run ends bitwise as if it had never stopped.
    now = Progression(run, run_lock)
    list_skipped(run)

    # ---- The loop: a signal such as Ctrl-C is only noted. All processes then stop after the same step.
    with contextlib.closing(now.tracker), preemption.Preemption(accelerator, now.save) as signals:
        epoch = now.state.epoch
        while not now.state.finished:
            train_one_epoch(run, now, epoch, signals)
            finish_epoch(run, now, epoch, signals)
            epoch += 1
        now.progress.close()

        # ---- Final test: evaluate the best epoch once. No choice was made on these images.
        test_best_epoch(run, now, signals)
        return report(run, now)


@process_as_it_was()
def train_model(**options: Any) -> dict[str, Any]:
    """Train as the command does: train_model(model="cnn", dataset="digits", epochs=2).

    Options are the flags, with underscores.

    Returns a dict with run, best_epoch, steps, best_checkpoint, final_checkpoint, validation (metrics), and
    test (metrics) if the dataset has a test split. With sanity_check=True the keys are passed, accuracy, loss
    and steps. UserError: an option is wrong, as for the command.
    """
    return run_training(build_parser().parse_options(options))


def main(argv: list[str] | None = None) -> int:
    result = run_training(build_parser().parse_args(argv))
    return 0 if result.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
