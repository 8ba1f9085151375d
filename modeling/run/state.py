"""The state that a run resumes from: its position and its tensors.

No generator's state is saved, because every random number is a function of seed, epoch, step and image.
"""

import dataclasses
import hashlib
import json
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from modeling.errors import UserError
from modeling.files import atomic_write
from modeling.optim import Ema
from modeling.run.files import RunFiles

NUM_KEPT = 2  # states that a run keeps
_KEY = "state"  # the metadata key in a state's file


@dataclass
class RunState:
    """The position of a run: `step` updates are done; `num_seen` images of epoch `epoch` (from 0) are used.

    best is the value of --best-metric at the best epoch. log_bytes is the length of metrics.jsonl. seconds is
    the training time. finished: no step is left, and the last epoch is recorded. test holds the metrics on
    the test split, or None before the final test.
    """

    epoch: int = 0
    step: int = 0
    num_seen: int = 0
    best: float | None = None
    best_epoch: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    log_bytes: int = 0
    seconds: float = 0.0
    finished: bool = False
    test: dict[str, float] | None = None


class States:
    """A run's folder of states, step_{step}_{SHA-256}.safetensors. The newest NUM_KEPT are kept.

    Every process calls save and restore; the main process writes. All processes must see the folder.
    `arguments` are the values that must be the same when the run is resumed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        arguments: dict[str, Any],
    ):
        self.folder = folder
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.arguments = arguments
        self.restored_digest = 0
        self.arguments_differ = False

    def save(self, run_state: RunState, totals: torch.Tensor) -> None:
        """Write a state. totals (2,) float64: this process's loss sum and correct images in this epoch."""
        all_totals = self.accelerator.gather(totals[None])  # (processes, 2)
        if not self.accelerator.is_main_process:
            return self.accelerator.wait_for_everyone()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in (self.ema.average if self.ema else {}).items()}
        tensors["totals"] = all_totals
        plain: dict[str, dict[str, Any]] = {}
        for number, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{number}.{name}"] = value
                else:
                    plain.setdefault(str(number), {})[name] = value
        header = {
            "launcher": _launcher(),
            "position": dataclasses.asdict(run_state),
            "arguments": self.arguments,
            "optimizer": plain,
            "ema_updates": self.ema.updates if self.ema else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        content = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)})
        path = self.folder / f"step_{run_state.step:08d}_{_digest(content)}.safetensors"
        with atomic_write(path) as file:
            file.write(content)
        others = [p for p in list_states(self.folder) if p != path]
        older = [p for p in others if p.name[:13] < path.name[:13]]
        # A state with a later step is broken, or this run resumed from before it: remove it too.
        for old in {*others} - {*older[: NUM_KEPT - 1]}:
            old.unlink()
        self.accelerator.wait_for_everyone()

    def restore(self, *, force: bool, of_launcher: str | None = None) -> tuple[RunState, torch.Tensor] | None:
        """Load the newest complete state into model, optimizer and average. None: there is no state.

        Returns the run's position, and this process's totals (2,).

        With of_launcher, take only a state that a process of this launcher wrote. UserError: the state
        belongs to a run with other arguments (unless `force`), or to another model or optimizer.
        """
        found = read_newest(self.folder, warn=self.accelerator.is_main_process)
        if found is None or (of_launcher and found[2]["launcher"] != of_launcher):
            return None
        path, tensors, header = found
        names = sorted(self.arguments.keys() | header["arguments"].keys())
        saved, wanted = header["arguments"], json.loads(json.dumps(self.arguments))
        differing = [
            f"{name} {saved.get(name)!r} -> {wanted.get(name)!r}"
            for name in names
            if saved.get(name) != wanted.get(name)
        ]
        if differing and not force:
            raise UserError(
                f"{path.parent} belongs to a run with other arguments: {', '.join(differing)}; "
                "give the old ones, or --force"
            )
        if differing:
            print(f"Resuming by --force with other arguments: {', '.join(differing)}")
        if (saved["optimizer"] == "sgd") != (wanted["optimizer"] == "sgd"):
            raise UserError(
                f"{path} belongs to another optimizer: {wanted['optimizer']} cannot continue "
                f"from {saved['optimizer']}"
            )
        self.restored_digest = int(path.stem[-15:], 16)
        self.arguments_differ = bool(differing)
        groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = value
        state = {int(number): dict(values) for number, values in header["optimizer"].items()}
        for key, value in groups["optimizer"].items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        try:
            self.model.load_state_dict(groups["model"])
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{path} belongs to another model or optimizer: {str(error).splitlines()[0]}"
            ) from error
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    # Fused optimizers need the parameter's memory layout, such as channels-last.
                    values[name] = torch.empty_like(parameter).copy_(value)
        if self.ema and groups["ema"]:
            self.ema.updates = header["ema_updates"]
            for name, value in groups["ema"].items():
                self.ema.average[name].copy_(value)
        if self.accelerator.scaler and header["scaler"]:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        totals, device = tensors["totals"], self.accelerator.device
        # With another number of processes than before, process 0 gets all the sums and the others get zeros.
        if len(totals) != self.accelerator.num_processes:
            totals = F.pad(totals.sum(dim=0, keepdim=True), (0, 0, 0, self.accelerator.num_processes - 1))
        return RunState(**header["position"]), totals[self.accelerator.process_index].to(device)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _launcher() -> str:
    """Name the program that started this process. torch elastic keeps the name when it restarts processes."""
    return f"{platform.node()}:{os.getppid()}"


def restore_or_begin(
    states: States, run_files: RunFiles, *, resume: bool, force: bool
) -> tuple[RunState, torch.Tensor]:
    """Return the run's position, and this process's totals (2,) float64 of the epoch so far.

    With `resume`, or after torch elastic restarted the job, restore the newest state. Otherwise begin a new
    run, and move an older run's files aside. After a restart without `resume`, take only a state of this very
    job: if the job died before its first state, the newest one belongs to an older run. UserError: the
    processes found different states.
    """
    accelerator = states.accelerator
    num_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    restarts = accelerator.gather(torch.tensor([num_restarts], device=accelerator.device))
    is_restarted = int(restarts.max()) > 0
    restored = None
    if resume or is_restarted:
        restored = states.restore(force=force, of_launcher=None if resume else _launcher())
    found = accelerator.gather(torch.tensor([states.restored_digest], device=accelerator.device))
    if len(found.unique()) > 1:
        raise UserError(
            f"the processes found different states in {states.folder}: all machines must share it"
        )

    if restored:
        run_state = restored[0]
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
        restored = RunState(), torch.zeros(2, dtype=torch.float64, device=accelerator.device)

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


def apply_forced_arguments(
    run_state: RunState,
    totals: torch.Tensor,
    *,
    epochs: int,
    max_steps: int,
    batch_size: int,
    num_train_images: int,
    arguments_differ: bool,
) -> None:
    """Adapt a restored state to arguments that --force changed. A finished run that is now longer continues.

    UserError: the run would end before the state, or the state lies inside a batch of the new --batch-size.
    """
    if (max_steps and run_state.step > max_steps) or run_state.epoch >= epochs:
        raise UserError(
            f"the state is after step {run_state.step}, in epoch {run_state.epoch + 1}: "
            "give a larger --epochs or --max-steps"
        )
    is_longer = run_state.step < max_steps if max_steps else run_state.epoch + 1 < epochs
    if run_state.finished and arguments_differ and is_longer:
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


def list_states(folder: Path) -> list[Path]:
    """The states in a folder, newest first."""
    paths = [p for p in folder.glob("step_*.safetensors") if re.fullmatch(r"step_\d{8}_[0-9a-f]{16}", p.stem)]
    return sorted(paths, key=lambda p: (p.name[:13], p.stat().st_mtime_ns), reverse=True)


def read_newest(
    folder: Path, *, warn: bool = True
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return path, tensors and header of the newest state whose content matches the checksum in its name.

    A broken state is skipped with a warning. None: there is no complete state.
    """
    for path in list_states(folder):
        content = path.read_bytes()
        if path.stem.endswith(_digest(content)):
            length = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + length])["__metadata__"]
            return path, safetensors.torch.load(content), json.loads(metadata[_KEY])
        if warn:
            print(f"{path} is truncated or altered: the state before it is used", file=sys.stderr, flush=True)
    return None
