"""Resuming: the state is restored and checked before the first step, or the run begins."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from modeling.errors import UserError
from modeling.run import environment
from modeling.run.checkpoint import read_header
from modeling.run.files import RunFiles
from modeling.run.state import RunState, States, launcher
from modeling.settings import Settings


def restore_or_begin(
    states: States, run_files: RunFiles, *, resume: bool, force: bool
) -> tuple[RunState, torch.Tensor]:
    """Return the run's position, and this process's totals (2,) float64 of the epoch so far.

    With `resume`, or after torch elastic restarted the job, restore the newest state. Otherwise begin a new
    run, and move an older run's files aside. After a restart without `resume`, take only a state of this very
    job: if the job died before its first state, the newest one belongs to an older run. UserError: the
    processes found different states, or the best checkpoint is not this run's.
    """
    accelerator = states.accelerator
    num_restarts = environment.integer("TORCHELASTIC_RESTART_COUNT", 0)
    restarts = accelerator.gather(torch.tensor([num_restarts], device=accelerator.device))
    is_restarted = int(restarts.max()) > 0
    restored = None
    if resume or is_restarted:
        restored = states.restore(force=force, of_launcher=None if resume else launcher(accelerator))
    found = accelerator.gather(torch.tensor([states.restored_digest], device=accelerator.device))
    if len(found.unique()) > 1:
        raise UserError(
            f"the processes found different states in {states.folder}: all machines must share it"
        )

    if restored:
        run_state = restored[0]
        check_best(accelerator, run_state, run_files.best, force=force)
        note = " (it was finished)" if run_state.finished and run_state.test else ""
        print(
            f"Resuming {run_files.run!r} after step {run_state.step:,}, in epoch {run_state.epoch + 1}{note}",
            flush=True,
        )
    else:
        if resume or is_restarted:
            print(
                f"There is no state of {run_files.run!r} in {states.folder} to resume from: "
                "starting from the beginning"
            )
        if accelerator.is_main_process:
            _move_older_run_aside(run_files)
        run_id = states.run_id()
        restored = RunState(run_id=run_id), torch.zeros(2, dtype=torch.float64, device=accelerator.device)

    if accelerator.is_main_process:  # remove the unfinished files of a killed process
        leftovers = [*states.folder.glob(".step_*.tmp")]
        leftovers += states.folder.parent.glob(f".{run_files.best.name}.*.tmp")
        leftovers += states.folder.parent.glob(f".{run_files.final.name}.*.tmp")
        for leftover in leftovers:
            leftover.unlink()
    accelerator.wait_for_everyone()
    return restored


def _move_older_run_aside(run_files: RunFiles) -> None:
    advice = " (move them back to --resume it)" if run_files.states.exists() else ""
    folders = run_files.move_aside()
    if folders:
        places = " and ".join(map(str, folders))
        print(f"The files of an older run {run_files.run!r} are now in {places}{advice}", flush=True)


def check_best(accelerator: Accelerator, run_state: RunState, best: Path, *, force: bool) -> None:
    """Compare the checkpoint of the best epoch with the state, which knows that epoch and its metrics.

    A kill can come after a best checkpoint and before its state. Its epoch is then trained again, and is the
    best again. UserError, on every process: the file is missing, or is of another run or epoch, and there is
    no --force to choose the best from the epochs to come.
    """
    if not run_state.best_epoch or run_state.test is not None:
        return
    problem = [_problem_of_best(run_state, best) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0] is None:
        return
    if problem[0] and (run_state.finished or not force):
        advice = "" if run_state.finished else ", or give --force to choose the best from the epochs to come"
        raise UserError(
            f"{best} should be the best checkpoint of this run, of epoch {run_state.best_epoch}, "
            f"but {problem[0]}: put the right file back{advice}"
        )
    if problem[0]:
        print(f"The best epoch is chosen from those to come, because of {best}: {problem[0]}", flush=True)
    run_state.forget_best()


def _problem_of_best(run_state: RunState, best: Path) -> str | None:
    """What is wrong with the best checkpoint; None: nothing; "": its epoch is trained again."""
    if not best.exists():
        return "it is missing"
    try:
        header = read_header(best)
    except UserError:
        return "it is not a checkpoint"
    if run_state.is_best(header):
        return None
    if header.get("run_id") != run_state.run_id:
        return "it is of another run"
    return "" if header["epoch"] > run_state.epoch else f"it is of epoch {header['epoch']}"


def apply_forced_arguments(
    run_state: RunState,
    totals: torch.Tensor,
    *,
    differing: set[str],
    settings: Settings,
    num_train_images: int,
) -> None:
    """Adapt a restored state to arguments that --force changed. A finished run that is now longer continues.

    UserError: the run would end before the state, the state lies inside a batch of the new --batch-size, or a
    saved number now means something else.
    """
    epochs, max_steps, batch_size = settings.epochs, settings.max_steps, settings.batch_size
    if (max_steps and run_state.step > max_steps) or run_state.epoch >= epochs:
        raise UserError(
            f"the state is after step {run_state.step}, in epoch {run_state.epoch + 1}: "
            "give a larger --epochs or --max-steps"
        )
    is_longer = run_state.step < max_steps if max_steps else run_state.epoch + 1 < epochs
    if run_state.finished and differing:
        if not is_longer:
            raise UserError(
                f"the run is finished after step {run_state.step}: other arguments change nothing in it; "
                "give a larger --epochs or --max-steps, or start a new run without --resume"
            )
        run_state.finished = False
        run_state.test = None
        if run_state.num_seen == num_train_images:
            run_state.epoch += 1
            run_state.num_seen = 0
            totals.zero_()
    if run_state.num_seen % batch_size and run_state.num_seen < num_train_images:
        raise UserError(
            f"the state has seen {run_state.num_seen} images of its epoch, "
            f"not a multiple of --batch-size {batch_size}: give the old --batch-size"
        )
    step_here = run_state.epoch * settings.steps_per_epoch + math.ceil(run_state.num_seen / batch_size)
    counts_steps = settings.schedule != "constant" or settings.warmup_epochs or max_steps
    if run_state.step != step_here and counts_steps:
        raise UserError(
            f"the state is after step {run_state.step}, which would be step {step_here} with this batch size "
            "and number of training images. The learning rate or --max-steps counts steps: give the old ones"
        )
    if "best_metric" in differing and run_state.best_epoch:
        run_state.best = run_state.best_scores[settings.best_metric]
    if "validation images" in differing and run_state.best_epoch:
        run_state.forget_best()
        print("The validation images are others: the best epoch is chosen from those to come", flush=True)
