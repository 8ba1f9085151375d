"""Signals stop a run, Ctrl-C for example: after the same step on every process, with a saved state."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

# submitit sends SIGUSR2, a closed terminal SIGHUP. Windows has fewer signals.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# Processes on GPUs ask each other every ASK_SECONDS, at most MOST_CALLS calls of check() later. Each question
# waits for the device.
ASK_SECONDS = 2.0
MOST_CALLS = 20
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
        self.number, self.marked = 0, 0.0
        self.calls_left, self.calls, self.asked = 1, 0, time.monotonic()
        self.terminals: list[int] = []

    def __enter__(self) -> "Preemption":
        self.previous = {}
        self.terminals = [number for number in (1, 2) if _is_terminal(number)]
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there only
            for number in SIGNALS:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup: the run outlives its terminal
                self.previous[number] = signal.signal(number, self._mark)
        return self

    def _mark(self, number: int, frame) -> None:
        if self.number and time.monotonic() - self.marked > SAME_SIGNAL_SECONDS:
            if ends_process:
                os._exit(_status(number))
            raise _exception(number)
        self.number, self.marked = self.number or number, self.marked or time.monotonic()
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminal()

    def _leave_terminal(self) -> None:
        """Print into nothing: where a terminal is gone each line is an error, and no state would be saved."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        for number in self.terminals:
            os.dup2(nothing, number)
        os.close(nothing)

    def check(self, *_) -> None:
        """All processes call this equally often. Preempted: one of them got a signal."""
        self.calls += 1
        self.calls_left -= 1
        if self.calls_left <= 0 or self.accelerator.device.type == "cpu":
            self.ask()

    def ask(self) -> None:
        """Let the processes ask each other now. All of them call this. Preempted: one of them has a mark.

        They agree on the calls until they ask again, from the slowest one's seconds a call.
        """
        number = self.number
        if self.accelerator.num_processes > 1:
            now = time.monotonic()
            call_seconds = (now - self.asked) / max(1, self.calls)
            answers = torch.tensor(
                [number, call_seconds], dtype=torch.float32, device=self.accelerator.device
            )
            highest = self.accelerator.gather(answers[None]).amax(dim=0).tolist()
            number = int(highest[0])
            self.calls_left = calls_until_next(highest[1])
            self.calls, self.asked = 0, now
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


def calls_until_next(call_seconds: float) -> int:
    """After how many calls the processes ask again, when a call takes so long."""
    return max(1, min(MOST_CALLS, int(ASK_SECONDS / max(call_seconds, 1e-6))))


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:  # closed
        return False


def _status(number: int) -> int:
    """The exit status of a process that a signal has stopped."""
    return 130 if number == signal.SIGINT else 143


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(_status(number))
