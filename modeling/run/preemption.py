"""Signals that ask a run to end: all processes stop after the same step, and one state is saved."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

# SIGUSR2 is what submitit sends, SIGHUP what a closed terminal does. Windows has fewer.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# On a GPU each question of the processes to each other waits for the device, so they ask now and then only.
ASK_SECONDS = 2.0
MOST_CALLS = 20  # from one question to the next
SAME_SIGNAL_SECONDS = 0.5  # a launcher forwards what the terminal has already sent


class Preempted(Exception):
    """All processes have agreed to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Preemption:
    """In this block a signal only leaves a mark, which check() turns into Preempted on every process.

    On Preempted it calls `save`, which every process enters, and raises KeyboardInterrupt (SIGINT) or
    SystemExit(143). A second signal ends the process at once.
    """

    def __init__(self, accelerator: Accelerator, save: Callable[[], None]):
        self.accelerator, self.save = accelerator, save
        self.number, self.marked = 0, 0.0
        self.calls_left, self.calls, self.asked = 1, 0, time.monotonic()
        self.terminals: list[int] = []

    def __enter__(self) -> "Preemption":
        self.previous = {}
        self.terminals = [number for number in (1, 2) if _is_terminal(number)]
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            for number in SIGNALS:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup: the run outlives its terminal
                self.previous[number] = signal.signal(number, self._mark)
        return self

    def _mark(self, number: int, frame) -> None:
        if self.number and time.monotonic() - self.marked > SAME_SIGNAL_SECONDS:
            os._exit(130 if number == signal.SIGINT else 143)
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
        """Called by every process equally often. Preempted: one of them has a mark."""
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
        if isinstance(error, Preempted):
            self.save()
            if self.accelerator.is_main_process:
                print(
                    f"{error}: a state is saved; the same command with --resume goes on from it",
                    file=sys.stderr,
                    flush=True,
                )
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if isinstance(error, Preempted):
            raise KeyboardInterrupt if error.number == signal.SIGINT else SystemExit(143)


def calls_until_next(call_seconds: float) -> int:
    """After how many calls the processes ask again, when a call takes so long."""
    return max(1, min(MOST_CALLS, int(ASK_SECONDS / max(call_seconds, 1e-6))))


def _is_terminal(number: int) -> bool:
    try:
        return os.isatty(number)
    except OSError:  # closed
        return False
