"""Everything that changes during a run: state, sums of the epoch, logs, kept features."""

import hashlib
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling import features, models
from modeling.data.batches import training_steps
from modeling.engine import Predictions, make_inputs
from modeling.errors import UserError
from modeling.progress import Progress
from modeling.run import checkpoint, curves, lock, pictures, resume, state, tracking
from modeling.run.pace import Pace
from modeling.settings import MAY_DIFFER
from modeling.setup import Run

EVAL_BATCH_SIZE = 64  # images


class Progression:
    """Everything that changes during a run. The constructor restores a state, or begins the run."""

    def __init__(self, run: Run, run_lock: lock.Lock):
        settings = run.settings
        arguments = {
            name: value for name, value in settings.recorded().items() if not may_differ_on_resume(name)
        }
        arguments |= identity(run)
        self.run = run
        self.lock = run_lock
        self.states = state.States(
            run.files.states,
            accelerator=run.accelerator,
            model=run.raw_model,
            optimizer=run.optimizer,
            ema=run.ema,
            arguments=arguments,
            versions=run.header["versions"],
        )
        self.state, self.totals = resume.restore_or_begin(
            self.states, run.files, resume=settings.resume, force=settings.force
        )
        # A state that is saved before the validation of its epoch comes before that step's record.
        awaits_validation = not self.state.finished and (
            self.state.num_seen == run.num_train_images or self.state.step == settings.total_steps
        )
        resume.apply_forced_arguments(
            self.state,
            self.totals,
            differing=self.states.differing,
            settings=settings,
            num_train_images=run.num_train_images,
        )
        self.probe_features = open_features(run)  # after restoring, because they depend on the backbone
        self.tracker = tracking.Tracker(
            run.files.logs,
            enabled=run.accelerator.is_main_process,
            first_step=self.state.step if awaits_validation or not self.state.step else self.state.step + 1,
            log_bytes=self.state.log_bytes,
            report_to=settings.report_to,
            config=settings.recorded(),
        )
        if self.tracker.is_reporting and self.state.step == 0:
            self.tracker.image("training_images", first_images(run), 0)
        self.pace = Pace()
        self.started = time.monotonic() - self.state.seconds
        num_full_epochs, rest = divmod(settings.total_steps, settings.steps_per_epoch)
        self.progress = Progress(
            num_full_epochs * run.num_train_images + rest * settings.batch_size,
            "epoch",
            done=self.state.epoch * run.num_train_images + self.state.num_seen,
        )

    def save(self) -> None:
        """Save a state to resume from. All processes call this; the main one writes."""
        self.run.guard.check()  # never save weights after a loss that was not finite
        self.lock.check()
        self.state.log_bytes = self.tracker.flush()
        self.state.seconds = time.monotonic() - self.started
        self.states.save(self.state, self.totals)

    def report_pace(self) -> None:
        """Report speed and gradients of the steps since the last report. Waits for the device."""
        self.tracker.scalars(self.pace.read(), self.state.step)

    def report_confusions(self, predictions: Predictions, classes: list[str]) -> None:
        """Report the confusion matrix of a validation."""
        if self.tracker.is_reporting:
            picture = pictures.confusion_picture(
                predictions.labels.numpy(), predictions.predicted.numpy(), classes
            )
            self.tracker.image("confusion_matrix/validation", picture, self.state.step)

    def load_best(self) -> torch.nn.Module:
        """The model of the best epoch. UserError: its checkpoint is not the one that this run wrote."""
        path = self.run.files.best
        model, header = checkpoint.load_model(path)
        if not self.state.is_best(header):
            raise UserError(f"{path} was replaced meanwhile: it is not this run's best checkpoint")
        return model

    def features_of(self, split: str) -> torch.Tensor | None:
        """The kept features (N, D) of a split for evaluation. None: the model is no linear probe."""
        return self.probe_features.of_split(split, EVAL_BATCH_SIZE) if self.probe_features else None


def first_images(run: Run) -> np.ndarray:
    """The first training images of the run in a square, augmented as the model sees them."""
    batch_size = min(run.settings.batch_size, pictures.MOST_IMAGES)
    steps = training_steps(
        run.images["train"],
        seed=run.settings.seed,
        epoch=0,
        batch_size=batch_size,
        mix=run.step_settings.mixes,
    )
    batch = next(steps)[0].to(run.accelerator.device)
    x, _ = make_inputs(batch, epoch=0, step=0, step_settings=run.step_settings)
    return pictures.image_grid(x, run.step_settings.preprocessing)


def identity(run: Run) -> dict[str, Any]:
    """What must be equal on resuming besides the settings: images, weights and model, not their paths."""
    weights = run.weights.path
    return {
        "classes": hashlib.sha256(json.dumps(run.header["classes"]).encode()).hexdigest()[:8],
        **{f"{split} images": images.fingerprint()[:8] for split, images in run.images.items()},
        "model": run.header["model"],
        "preprocessing": run.header["preprocessing"],
        "weights file": file_digest(weights)[:8] if weights else "none",
    }


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def may_differ_on_resume(flag: str) -> bool:
    return flag in MAY_DIFFER and MAY_DIFFER[flag].on_resume


def open_features(run: Run) -> features.ProbeFeatures | None:
    """Open the kept features of a linear probe. None: the model is no linear probe."""
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
    print(f"features   kept in {probe_features.folder}", flush=True)
    return probe_features


def report(run: Run, now: Progression) -> dict[str, Any]:
    """Draw the curves, print how the run ended and the next command. Return what train_model documents."""
    current, files = now.state, run.files
    scores = {f"validation_{name}": value for name, value in (current.best_scores or {}).items()}
    scores |= {f"test_{name}": value for name, value in (current.test or {}).items()}
    now.tracker.final(run.settings.recorded(), scores, current.step + 1)
    picture = files.logs / "curves.png"
    if run.accelerator.is_main_process:
        title = f"{files.run}: {run.settings.model} on {run.settings.dataset}"
        curves.draw_curves(picture, files.logs / "metrics.jsonl", title=title, best_epoch=current.best_epoch)
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
    print(f"Checkpoints {files.best} and {files.final}; curves {picture}")
    if run.settings.report_to == "tensorboard":
        print(f"Watch: tensorboard --logdir {shlex.quote(str(files.logs.parent))}")
    print(f"Next: {next_command(run)}")
    result: dict[str, Any] = {
        "run": files.run,
        "best_epoch": current.best_epoch,
        "steps": current.step,
        "validation": current.best_scores,
        "best_checkpoint": str(files.best),
        "final_checkpoint": str(files.final),
    }
    if current.test:
        result["test"] = current.test
    return result


def next_command(run: Run) -> str:
    """The command that evaluates the best checkpoint."""
    words = ["python", "evaluate.py", "--ckpt", str(run.files.best)]
    if run.files.output_dir != Path():
        words += ["--output-dir", str(run.files.output_dir)]
    return shlex.join(words)
