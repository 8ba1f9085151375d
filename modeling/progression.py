"""Everything that changes during a run: state, sums of the epoch, logs, kept features."""

import time

import torch

from modeling import features, models
from modeling.progress import Progress
from modeling.run import lock, state, tracking
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
        is_recorded = self.state.finished or self.state.num_seen == 0  # the last step is already in the log
        state.apply_forced_arguments(
            self.state,
            self.totals,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            batch_size=settings.batch_size,
            num_train_images=run.num_train_images,
            arguments_differ=self.states.arguments_differ,
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

    def features_of(self, split: str) -> torch.Tensor | None:
        """The kept features (N, D) of a split for evaluation. None: the model is no linear probe."""
        return self.probe_features.of_split(split, EVAL_BATCH_SIZE) if self.probe_features else None


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
