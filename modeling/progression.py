"""Everything that changes during a run: state, sums of the epoch, logs, kept features."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from modeling import features, models
from modeling.errors import UserError
from modeling.progress import Progress
from modeling.run import checkpoint, lock, resume, state, tracking
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
        is_recorded = self.state.finished or self.state.num_seen == 0  # the last step is already in the log
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
        self.run.guard.check()  # never save weights after a loss that was not finite
        self.lock.check()
        self.state.log_bytes = self.tracker.flush()
        self.state.seconds = time.monotonic() - self.started
        self.states.save(self.state, self.totals)

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
