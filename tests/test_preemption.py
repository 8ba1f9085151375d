"""Signals: all processes agree to end, within seconds. SIGUSR2 and SIGHUP are SIGTERM."""

import os
import pty
import signal
from types import SimpleNamespace

import pytest
import torch

from modeling.run import preemption

ONE = SimpleNamespace(num_processes=1, is_main_process=True, device=torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_saves_a_state_and_ends_with_143(number, capsys):
    signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    saved = []
    with pytest.raises(SystemExit) as ended:
        with preemption.Preemption(ONE, lambda: saved.append(1)) as signals:
            signals.check()
            os.kill(os.getpid(), number)
            signals.check()
    assert (saved, ended.value.code) == ([1], 143)
    assert f"{number.name}: a state is saved" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL


def test_under_nohup_a_run_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.Preemption(ONE, lambda: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_terminal_that_is_gone_does_not_stop_the_state_from_being_saved():
    controller, terminal = pty.openpty()
    signals = preemption.Preemption(ONE, lambda: None)
    signals.terminals = [terminal]
    os.close(controller)
    with pytest.raises(OSError):
        os.write(terminal, b"epoch 1")
    signals._mark(signal.SIGHUP, None)
    assert os.write(terminal, b"epoch 1") == 7
    os.close(terminal)


class Gpus:
    """Two processes on devices that are not CPUs. The other one takes `other_seconds` a call."""

    num_processes, is_main_process, device = 2, True, torch.device("meta")

    def __init__(self):
        self.mark, self.other_seconds, self.asked = 0.0, 0.0, 0

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.tensor([[0.0, 0.0], [self.mark, self.other_seconds]])


def test_on_gpus_the_processes_ask_each_other_by_time():
    gpus = Gpus()
    signals = preemption.Preemption(gpus, lambda: None)

    def asked_in(calls: int) -> int:
        before = gpus.asked
        for _ in range(calls):
            signals.check()
        return gpus.asked - before

    assert asked_in(1) == 1, "the first call"
    assert asked_in(100) == 5, "fast steps: every 20"
    gpus.other_seconds = 0.5  # of the slowest process
    asked_in(20)
    assert asked_in(100) == 25, "every 4 steps are 2 seconds"
    gpus.other_seconds = 30.0
    asked_in(5)
    assert asked_in(10) == 10, "every step"
    gpus.other_seconds = 0.0
    asked_in(1)
    assert asked_in(3) == 0
    gpus.mark = float(signal.SIGTERM)
    with pytest.raises(preemption.Preempted, match="SIGTERM"):
        signals.ask()  # as at the end of an epoch
