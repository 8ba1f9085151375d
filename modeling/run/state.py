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

import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional as F

from modeling.errors import UserError
from modeling.files import atomic_write, unique_tensors
from modeling.models.tensors import add_shared
from modeling.optim import Ema
from modeling.run.header import parse_json, require, validate_state
from modeling.run.lock import start_ticks
from modeling.settings import complete

NUM_KEPT = 2  # states that a run keeps
_KEY = "state"  # the metadata key in a state's file


@dataclass
class RunState:
    """The position of a run: `step` updates are done; `num_seen` images of epoch `epoch` (from 0) are used.

    run_id is the same in a run and those that resume it. best is the value of --best-metric at the best
    epoch. log_bytes is the length of metrics.jsonl. seconds is the training time. finished: no step is left,
    and the last epoch is recorded. test holds the metrics on the test split, or None before the final test.
    """

    run_id: str = ""
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

    def described(self, epoch: int, scores: dict[str, float]) -> dict[str, Any]:
        """What a checkpoint's header says of the moment after epoch `epoch` (from 0)."""
        return {"run_id": self.run_id, "epoch": epoch + 1, "step": self.step, "metrics": scores}

    def is_best(self, header: dict[str, Any]) -> bool:
        """Whether a checkpoint's header is that of this run's best epoch."""
        found = header.get("run_id"), header["epoch"], header["metrics"]
        return found == (self.run_id, self.best_epoch, self.best_scores)

    def forget_best(self) -> None:
        """Let the next epoch be the best so far."""
        self.best, self.best_epoch, self.best_scores = None, 0, {}


class States:
    """A run's folder of states, step_{step}_{SHA-256}.safetensors. The newest NUM_KEPT are kept.

    Every process calls save and restore; the main process writes. All processes must see the folder.
    `arguments` are the values that must be the same when the run is resumed.
    A change of `versions`, those of the packages, is only printed.
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
        versions: dict[str, str],
    ):
        self.folder = folder
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self.arguments = arguments
        self.versions = versions
        self.restored_digest = 0
        self.differing: set[str] = set()  # the names of arguments that --force changed

    def run_id(self) -> str:
        """The name of a run that begins with these arguments. It is reproducible, as all of a header is."""
        return _digest(json.dumps(self.arguments, sort_keys=True).encode())

    def save(self, run_state: RunState, totals: torch.Tensor) -> None:
        """Write a state. totals (2,) float64: this process's loss sum and correct images in this epoch."""
        all_totals = self.accelerator.gather(totals[None])  # (processes, 2)
        started_by = launcher(self.accelerator)
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
            "launcher": started_by,
            "position": dataclasses.asdict(run_state),
            "arguments": self.arguments,
            "versions": self.versions,
            "optimizer": plain,
            "ema_updates": self.ema.updates if self.ema else 0,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        content = safetensors.torch.save(unique_tensors(tensors), metadata={_KEY: json.dumps(header)})
        path = self.folder / f"step_{run_state.step:08d}_{_digest(content)}.safetensors"
        with atomic_write(path) as file:
            file.write(content)
        others = [p for p in list_states(self.folder) if p != path]
        older = [p for p in others if _step(p) < run_state.step]
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
        saved, wanted = complete(header["arguments"]), json.loads(json.dumps(self.arguments))
        changes = _changes(saved, wanted)
        if changes and not force:
            raise UserError(
                f"{path.parent} belongs to a run with other arguments: {', '.join(changes.values())}; "
                "give the old ones, or --force"
            )
        if changes:
            print(f"Resuming by --force with other arguments: {', '.join(changes.values())}")
        updates = _changes(header["versions"], self.versions)
        if updates:
            print(f"Other versions than when the state was saved: {', '.join(updates.values())}")
        if saved["optimizer"].removesuffix("w") != wanted["optimizer"].removesuffix("w"):  # adam, adamw
            raise UserError(
                f"{path} belongs to another optimizer: {wanted['optimizer']} cannot continue "
                f"from {saved['optimizer']}"
            )
        self.restored_digest = int(path.stem[-15:], 16)
        self.differing = set(changes)
        groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        tensors.setdefault("totals", torch.empty(0))
        for key, value in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = value
        state = {int(number): dict(values) for number, values in header["optimizer"].items()}
        for key, value in groups["optimizer"].items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        try:
            self._check(groups, tensors["totals"])
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

    def _check(self, groups: dict[str, dict[str, torch.Tensor]], totals: torch.Tensor) -> None:
        """UserError: the tensors are not those of this model, optimizer and average."""
        add_shared(groups["model"], self.model)
        require(
            totals.dim() == 2 and totals.shape[1] == 2 and totals.dtype == torch.float64, "totals are odd"
        )
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        for key, value in groups["optimizer"].items():
            number = int(key.partition(".")[0])
            require(number < len(parameters), f"optimizer.{key} is of no parameter")
            require(
                value.dim() == 0 or value.shape == parameters[number].shape, f"optimizer.{key} does not fit"
            )
        averages = self.ema.average if self.ema else {}
        for key, value in groups["ema"].items():
            fits = not averages or (key in averages and averages[key].shape == value.shape)
            require(fits, f"ema.{key} does not fit")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """{name: "name old -> new"} of the values that differ."""
    names = sorted(old.keys() | new.keys())
    return {
        name: f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    }


def launcher(accelerator: Accelerator) -> str:
    """Name the program that started the main process. torch elastic keeps it when it restarts processes."""
    parent = os.getppid()
    text = [f"{platform.node()}:{parent}:{start_ticks(parent)}"]
    if accelerator.num_processes > 1:
        broadcast_object_list(text)
    return text[0]


def list_states(folder: Path) -> list[Path]:
    """The states in a folder, newest first."""
    paths = folder.glob("step_*.safetensors")
    states = [path for path in paths if re.fullmatch(r"step_\d{8,}_[0-9a-f]{16}", path.stem)]
    return sorted(states, key=lambda path: (_step(path), path.stat().st_mtime_ns), reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.split("_")[1])


def read_newest(
    folder: Path, *, warn: bool = True
) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return path, tensors and header of the newest state whose content matches the checksum in its name.

    A broken state is skipped with a warning. None: there is no complete state.
    """
    for path in list_states(folder):
        content = path.read_bytes()
        if path.stem.endswith(_digest(content)):
            return path, *_parse(content, path)
        if warn:
            print(f"{path} is truncated or altered: the state before it is used", file=sys.stderr, flush=True)
    return None


def _parse(content: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return tensors and header of a state. UserError: this program did not write it."""
    try:
        metadata = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")].decode())["__metadata__"]
        header = parse_json(metadata[_KEY])
        validate_state(header, {field.name for field in dataclasses.fields(RunState)})
        return safetensors.torch.load(content), header
    except (UserError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is no state of this program: {error}") from error
