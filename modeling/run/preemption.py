"""Ctrl-C (SIGINT), SIGTERM and SIGUSR1 stop a run: after the same step everywhere, with a saved state."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# Calls of check() between two questions among the processes on GPUs. Each question waits for the device.
GPU_CHECK_EVERY = 20
# On Ctrl-C a process can get SIGINT twice: from the terminal and from the launcher. That counts as one
# signal.
SAME_SIGNAL_SECONDS = 0.5
ends_process = False  # whether a second signal ends the process at once: cli.run sets it for commands


class Preempted(Exception):
    """A process got a signal, and all processes know it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Preemption:
    """In this block a signal is only noted. The next check() raises Preempted on every process.

    When Preempted leaves the block, every process calls `save`. Then it raises KeyboardInterrupt (SIGINT,
    exit status 130) or SystemExit(143). A second signal ends a command at once, without saving. In a
    notebook, whose process must live on, it raises the same exceptions at once.
    """

    def __init__(self, accelerator: Accelerator, save: Callable[[], None]):
        self.accelerator, self.save = accelerator, save
        self.number, self.marked, self.calls = 0, 0.0, 0

    def __enter__(self) -> "Preemption":
        # Python delivers signals to the main thread only.
        self.in_main = threading.current_thread() is threading.main_thread()
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
        """All processes call this equally often. Preempted: one of them got a signal."""
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
                        f"{error}: a state is saved; run the same command with --resume to continue",
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
