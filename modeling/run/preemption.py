"""Signals that ask a run to end: all processes stop after the same step, and one state is saved."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]  # Windows has no SIGUSR1
GPU_CHECK_EVERY = (
    20  # on a GPU the processes ask each other only every so many calls: each time waits for the device
)
ends_process = False  # whether this is a command, which a second signal ends at once: cli.run sets it
SAME_SIGNAL_SECONDS = 0.5  # a launcher forwards what the terminal has already sent


class Preempted(Exception):
    """All processes have agreed to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Preemption:
    """In this block a signal only leaves a mark, which check() turns into Preempted on every process.

    On Preempted it calls `save`, which every process enters, and raises KeyboardInterrupt (SIGINT) or
    SystemExit(143). A second signal ends a command at once. In a notebook, whose process goes on, it raises
    the same exceptions at once, and no state is saved.
    """

    def __init__(self, accelerator: Accelerator, save: Callable[[], None]):
        self.accelerator, self.save = accelerator, save
        self.number, self.marked, self.calls = 0, 0.0, 0

    def __enter__(self) -> "Preemption":
        self.in_main = (
            threading.current_thread() is threading.main_thread()
        )  # Python delivers signals to no other
        self.previous = (
            {number: signal.signal(number, self._mark) for number in SIGNALS} if self.in_main else {}
        )
        return self

    def _mark(self, number: int, frame) -> None:
        if self.number and time.monotonic() - self.marked > SAME_SIGNAL_SECONDS:
            if ends_process:
                os._exit(_status(number))
            raise _exception(number)
        self.number, self.marked = self.number or number, self.marked or time.monotonic()

    def check(self, *_) -> None:
        """Called by every process equally often. Preempted: one of them has a mark."""
        self.calls += 1
        number = self.number
        if self.accelerator.num_processes > 1:
            if self.accelerator.device.type == "cuda" and self.calls % GPU_CHECK_EVERY:
                return
            mark = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(mark).max())
        if number:
            raise Preempted(number)

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if isinstance(error, Preempted):
                self.save()
                if self.accelerator.is_main_process:
                    print(
                        f"{error}: a state is saved; the same command with --resume goes on from it",
                        file=sys.stderr,
                        flush=True,
                    )
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)
        if isinstance(error, Preempted):
            raise _exception(error.number)


def _status(number: int) -> int:
    """The exit status of a process that a signal has stopped."""
    return 130 if number == signal.SIGINT else 143


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(_status(number))
