"""The state to resume a run from: where it is, and tensors. No generator's state, for all randomness is a function of where it is."""

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

KEEP = 2


_KEY = "state"


FREE_ARGUMENTS = {"run_name", "num_threads"}  # a resumed run may have others


@dataclass
class RunState:
    """Where a run is: `step` updates are done in all, and `num_seen` images of epoch `epoch` (from 0) seen.

    finished: no step is left, and its last epoch is recorded.
    """

    epoch: int = 0
    step: int = 0
    num_seen: int = 0
    best: float | None = None
    best_epoch: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    log_bytes: int = 0  # of metrics.jsonl
    seconds: float = 0.0
    finished: bool = False
    test: dict[str, float] | None = None


class States:
    """A run's folder of states: step_{step}_{SHA-256}.safetensors, the newest KEEP of them.

    Every process calls save and restore; the main one writes. All processes must see the folder.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer,
        ema: Ema | None,
        header: dict[str, Any],
    ):
        self.folder, self.accelerator, self.model, self.optimizer, self.ema = (
            folder,
            accelerator,
            model,
            optimizer,
            ema,
        )
        self.arguments = {
            name: value for name, value in header["arguments"].items() if name not in FREE_ARGUMENTS
        }
        self.restored, self.differs = 0, False
        self.arguments |= {"training images": header["dataset"]["train_sha256"][:8], "model": header["model"]}

    def save(self, position: RunState, totals: torch.Tensor) -> None:
        """Write a state. totals (2,) float64: this process's sums of the epoch so far."""
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
            "position": dataclasses.asdict(position),
            "arguments": self.arguments,
            "optimizer": plain,
            "ema_updates": self.ema.updates if self.ema else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        content = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)})
        path = self.folder / f"step_{position.step:08d}_{_digest(content)}.safetensors"
        with atomic_write(path) as file:
            file.write(content)
        others = [p for p in list_states(self.folder) if p != path]
        older = [p for p in others if p.name[:13] < path.name[:13]]
        for old in {*others} - {*older[: KEEP - 1]}:  # a newer one is broken, or of a course that was left
            old.unlink()
        self.accelerator.wait_for_everyone()

    def restore(self, *, force: bool, of_launcher: str | None = None) -> tuple[RunState, torch.Tensor] | None:
        """Load the newest whole state into model, optimizer and average; its position and this process's totals. None: there is none.

        of_launcher: only one that this launcher's processes wrote. UserError: it is of a run with other arguments (unless `force`),
        or of another model or optimizer.
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
                f"{path.parent} is of a run with other arguments: {', '.join(differing)}; give those, or --force"
            )
        if differing:
            print(f"Resuming by --force with other arguments: {', '.join(differing)}")
        if (saved["optimizer"] == "sgd") != (wanted["optimizer"] == "sgd"):
            raise UserError(
                f"{path} is of another model or optimizer: {wanted['optimizer']} cannot go on from {saved['optimizer']}"
            )
        self.restored, self.differs = int(path.stem[-15:], 16), bool(differing)
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
                f"{path} is of another model or optimizer: {str(error).splitlines()[0]}"
            ) from error
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(
                        value
                    )  # in its layout in memory, as fused optimizers take it
        if self.ema and groups["ema"]:
            self.ema.updates = header["ema_updates"]
            for name, value in groups["ema"].items():
                self.ema.average[name].copy_(value)
        if self.accelerator.scaler and header["scaler"]:
            self.accelerator.scaler.load_state_dict(header["scaler"])
        totals, device = tensors["totals"], self.accelerator.device
        if (
            len(totals) != self.accelerator.num_processes
        ):  # of another number of processes: the first keeps the sums
            totals = F.pad(totals.sum(dim=0, keepdim=True), (0, 0, 0, self.accelerator.num_processes - 1))
        return RunState(**header["position"]), totals[self.accelerator.process_index].to(device)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _launcher() -> str:
    """What started this process: the same for a process that torch elastic starts again."""
    return f"{platform.node()}:{os.getppid()}"


def restore_or_begin(states: States, args, run: str) -> tuple[RunState, torch.Tensor]:
    """Where the run begins, and this process's totals: at the newest state with --resume, or when torch elastic restarted the job.

    Without --resume that state must be of the same job: one that died before its first state finds those of older runs. ValueError:
    the processes found different states.
    """
    accelerator = states.accelerator
    restarted = torch.tensor(
        [int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))], device=accelerator.device
    )
    restarted = int(accelerator.gather(restarted).max()) > 0
    restored = None
    if args.resume or restarted:
        restored = states.restore(force=args.force, of_launcher=None if args.resume else _launcher())
    found = accelerator.gather(torch.tensor([states.restored], device=accelerator.device))
    if len(found.unique()) > 1:
        raise UserError(
            f"the processes found different states in {states.folder}: it must be shared by all machines"
        )
    if restored:
        finished = " (it was finished)" if restored[0].finished and restored[0].test else ""
        print(
            f"Resuming {run!r} after step {restored[0].step:,}, in epoch {restored[0].epoch + 1}{finished}",
            flush=True,
        )
    else:
        if args.resume or restarted:
            print(
                f"There is no state of {run!r} to resume in {states.folder}: starting from the beginning",
                flush=True,
            )
        moved = RunFiles(args.output_dir, run).move_aside() if accelerator.is_main_process else None
        if moved:
            states_too = (moved / "checkpoints" / f"{run}_state").exists()
            print(
                f"The files of an older run {run!r} are now in {moved}{' (move them back to --resume it)' if states_too else ''}"
            )
        restored = RunState(), torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    if accelerator.is_main_process:  # what a kill left of a file that was being written
        for half in [
            *states.folder.glob(".step_*.tmp"),
            *states.folder.parent.glob(f".{run}_*.safetensors.*.tmp"),
        ]:
            half.unlink()
    accelerator.wait_for_everyone()
    return restored


def apply_forced_arguments(
    position: RunState, totals: torch.Tensor, args, num_train: int, differs: bool
) -> None:
    """Fit a restored position to arguments that --force changed. UserError: they end before it, or cut an epoch elsewhere."""
    if position.step > (args.max_steps or position.step) or position.epoch >= args.epochs:
        raise UserError(
            f"the state is after step {position.step}, in epoch {position.epoch + 1}: give a longer run than that"
        )
    if (
        position.finished
        and differs
        and (position.step < args.max_steps if args.max_steps else position.epoch + 1 < args.epochs)
    ):
        position.finished, position.test = False, None
        if position.num_seen == num_train:
            position.epoch, position.num_seen = position.epoch + 1, 0
            totals.zero_()
    if position.num_seen % args.batch_size and position.num_seen < num_train:
        raise UserError(
            f"the state has seen {position.num_seen} images of its epoch, not a multiple of --batch-size {args.batch_size}"
        )


def list_states(folder: Path) -> list[Path]:
    """The states in a folder, newest first."""
    paths = [p for p in folder.glob("step_*.safetensors") if re.fullmatch(r"step_\d{8}_[0-9a-f]{16}", p.stem)]
    return sorted(paths, key=lambda p: (p.name[:13], p.stat().st_mtime_ns), reverse=True)


def read_newest(
    folder: Path, *, warn: bool = True
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Path, tensors and header of the newest state whose content has its checksum; a broken one is passed over with a warning."""
    for path in list_states(folder):
        content = path.read_bytes()
        if path.stem.endswith(_digest(content)):
            length = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + length])["__metadata__"]
            return path, safetensors.torch.load(content), json.loads(metadata[_KEY])
        if warn:
            print(f"{path} is truncated or altered: the state before it is used", file=sys.stderr, flush=True)
    return None
